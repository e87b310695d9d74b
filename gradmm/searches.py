"""The searches: ways to write texts for a Release, in units of work that any number of processes may share.

Each takes a plan and the circumstances of a run, and gives what it has written. It draws by (seed, purpose, group)
alone and saves as it goes, so that an interrupted run continues to the same bytes. Letters: B examples of a group, L
tokens, D width.
"""

import logging
import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import cast

import pandas
import torch
from torch import Tensor
from tqdm.auto import tqdm

from gradmm import admm
from gradmm.device import compiled_layers, fast_products, forget, halving, most_at_once
from gradmm.generation import Batch, Sampling, check_prompts, generate_counts, warn_of_prompts
from gradmm.initialisation import Shape, best_of
from gradmm.plan import MIN_TOKENS, Plan
from gradmm.progress import advance, stage, ticking
from gradmm.projection import project, text_mask
from gradmm.runs import RunFolder
from gradmm.seeds import generator, stream
from gradmm.sharding import ProcessGroup

LOG = logging.getLogger(__name__)
OnStep = Callable[[int, admm.Result], None]


@dataclass(frozen=True)
class SearchOutput:
    """What a search gives: N texts in the order of writing with labels and groups, its history if it has steps,
    how groups ended.
    """

    texts: list[str]
    classes: list[int]
    groups: list[int]
    history: pandas.DataFrame | None
    ended: list[dict]


@dataclass(frozen=True)
class RunContext:
    """Where a search runs: the run's folder, the processes at work, whether a bar shows, who sees the steps."""

    folder: RunFolder
    processes: ProcessGroup
    progress: bool
    on_step: OnStep | None


def search(
    plan: Plan, folder: RunFolder, processes: ProcessGroup, progress: bool, on_step: OnStep | None
) -> SearchOutput:
    """What the search of the plan's name writes."""
    try:
        return BY_NAME[plan.config.search](plan, RunContext(folder, processes, progress, on_step))
    finally:
        if plan.model.device.type != "cpu":
            forget()


# ---------------------------------------------------------------- admm


def _search_admm(plan: Plan, here: RunContext) -> SearchOutput:
    """Texts moved towards the target by the solver: every batch of groups from where it stands to its end."""
    check_prompts(plan.model, plan.tokens, plan.decoding.vocabulary, [plan.length] * len(plan.task.labels))
    warn_of_prompts(plan.tokens, plan.model.vocabulary)
    folder, processes, numbers = here.folder, here.processes, range(len(plan.batches()))
    total = len(numbers[processes.rank :: processes.count]) * plan.config.outer_steps

    def read(number: int) -> admm.Result:
        processes.find(folder.place(number))
        saved = cast(admm.Result, folder.load_result(number, plan.model.device))  # it was found
        return saved.without_vectors()

    with tqdm(total=total, desc="matching", unit="step", disable=not here.progress) as bar, ticking(bar):

        def run(number: int) -> admm.Result:
            result = _solved(plan, number, here, _report(number, here, bar))
            folder.save_result(number, result)
            return result.without_vectors()

        results = processes.share("batches", numbers, run, read)
    sizes = [len(ids) for result in results for ids in result.value]
    return SearchOutput(
        texts=[_text(plan, row) for result in results for row in result.value.cpu().flatten(0, 1)],
        classes=[label for label, size in zip(plan.classes, sizes, strict=True) for _ in range(size)],
        groups=[group for group, size in enumerate(sizes) for _ in range(size)],
        history=pandas.DataFrame(_history(plan, results)),
        ended=_ended(plan, results),
    )


def _solved(plan: Plan, number: int, here: RunContext, report: Callable[[admm.Result], None]) -> admm.Result:
    """A batch of groups at its end, from where the folder has it.

    Args:
        number: of the batch.
        report: hears of each step.
    """
    groups, model = plan.batches()[number], plan.model
    classes = torch.tensor([plan.classes[group] for group in groups])
    latest = [here.folder.load_result(number, model.device)]

    def solve(together: int) -> admm.Result:
        def heard(result: admm.Result) -> None:
            latest[0] = result  # where half of the groups at once go on, should the memory not hold them
            if plan.solver.groups_per_pass is None:
                here.folder.keep_fitted(model.device, together)
            report(result)

        return admm.solve(
            lambda x, ids, which: plan.matching.of_vectors(x, ids, classes[which]),
            lambda v, which: _projected(plan, v, classes[which]),
            latest[0] or admm.start(_initial(plan, groups, classes, together)),
            replace(plan.solver, groups_per_pass=together),
            heard,
            partial(compiled_layers, model.lm) if plan.compiles else nullcontext,
        )

    with fast_products(model.device):
        together = plan.solver.groups_per_pass or here.folder.fitted(model.device, partial(_fitting, plan, classes))
        return halving(solve, together, "groups")


def _fitting(plan: Plan, classes: Tensor) -> int:
    """How many groups of a batch the device's memory holds in one pass."""
    shape = (len(classes), plan.config.group_size, plan.length)

    def trial(size: int) -> None:
        width = plan.model.embedding_shape[1]
        wide = torch.promote_types(plan.model.dtype, torch.float32)
        x = torch.ones(size, *shape[1:], width, dtype=wide, device=plan.model.device, requires_grad=True)
        ids = torch.zeros(x.shape[:3], dtype=torch.long, device=x.device)
        torch.autograd.grad(plan.matching.of_vectors(x, ids, classes[:size]).sum(), x)

    size = most_at_once(trial, len(classes), plan.model.device)
    LOG.info("%d of %d groups are seen at once", size, len(classes))
    return size


def _projected(plan: Plan, v: Tensor, classes: Tensor) -> tuple[Tensor, Tensor]:
    """v (k, B, L, D) -> the readable texts' embeddings and tokens."""
    rows = classes.repeat_interleave(v.shape[1]).to(v.device)
    tokens = plan.tokens
    ids = project(plan.model, plan.tables, v.flatten(0, 1), tokens.prompts, rows, plan.decoding, tokens.openings).view(
        v.shape[:3]
    )
    return plan.model.embed(ids).to(v.dtype), ids


def _initial(plan: Plan, groups: range, classes: Tensor, together: int) -> Tensor:
    config = plan.config
    sources = [generator(config.seed, "initial x", group) for group in groups]
    shape = Shape(config.group_size, plan.length, config.temperature)
    return best_of(
        config.init,
        config.init_candidates,
        plan.matching,
        plan.decoding,
        shape,
        classes,
        sources,
        together,
    )


def _report(number: int, here: RunContext, bar: tqdm) -> Callable[[admm.Result], None]:
    before = 0

    def report(result: admm.Result) -> None:
        nonlocal before
        here.processes.check()
        if here.on_step is not None:
            here.on_step(number, result)
        bar.update(result.state.step - before)  # what was taken before an interruption too
        before = result.state.step
        bar.set_postfix(match_loss=f"{result.match_loss.mean().item():.4f}")
        here.folder.snapshot(number, result)

    return report


def _text(plan: Plan, ids: Tensor) -> str:
    """The text of (L,) tokens; empty of a group that never had a projection (it went non-finite at once).

    Read again it may have more tokens: of the first ones alone where the model's context holds no more.
    """
    count = int(text_mask(ids, plan.decoding.end).sum())
    kept = [token for token in ids[:count].tolist() if token >= 0]
    while True:
        text = " ".join(plan.tokens.decode(kept).split())
        if not kept or len(plan.tokens.sequence(text)) <= plan.model.context:
            return text
        kept.pop()


def _history(plan: Plan, results: Sequence[admm.Result]) -> list[dict]:
    return [
        {
            "label": plan.task.labels[plan.classes[row["group"] + groups.start]],
            **row,
            "group": row["group"] + groups.start,
        }
        for groups, result in zip(plan.batches(), results, strict=True)
        for row in result.history
    ]


def _ended(plan: Plan, results: Sequence[admm.Result]) -> list[dict]:
    """Why each group stopped, and its loss."""
    reasons = [reason for result in results for reason in result.reason]
    matches = [value for result in results for value in result.match_loss.tolist()]
    return [
        {
            "group": group,
            "label": plan.task.labels[label],
            "reason": reason,
            "match_loss": match if math.isfinite(match) else None,
        }
        for group, (label, reason, match) in enumerate(zip(plan.classes, reasons, matches, strict=True))
    ]


# ---------------------------------------------------------------- pool


def _search_pool(plan: Plan, here: RunContext) -> SearchOutput:
    """Finished texts that the model writes freely; each class is one group."""
    tokens = plan.tokens
    around = max(
        *map(len, tokens.prompts), len(tokens.start + tokens.prefix + tokens.suffix) + max(map(len, tokens.openings))
    )
    longest = max(MIN_TOKENS, min(2 * plan.length, plan.model.context - around))
    sampling = Sampling(temperature=plan.config.temperature, max_tokens=longest, min_tokens=MIN_TOKENS)
    share = _TextUnits(here.folder, here.processes)
    source = stream(plan.config.seed, "pool")
    with stage("writing texts", sum(plan.written_per_class)):
        pool = generate_counts(plan.model, plan.task, plan.written_per_class, source, sampling, share=share)
    classes = [example.label for example in pool]
    ended = [
        {"group": number, "label": label, "reason": "the pool is written", "match_loss": None}
        for number, label in enumerate(plan.task.labels)
    ]
    return SearchOutput([example.text for example in pool], classes, classes, None, ended)


@dataclass
class _TextUnits:
    """Shares the batches of texts of each round out to the processes; a unit is a batch, numbered through all
    rounds.
    """

    folder: RunFolder
    processes: ProcessGroup
    given: int = 0

    def __call__(self, batches: Sequence[Batch], write: Callable[[Batch], list[str]]) -> list[list[str]]:
        first = self.given
        self.given += len(batches)

        def work(unit: int) -> list[str]:
            texts = self.folder.load_texts(unit)
            if texts is not None:
                advance(len(texts))
                return texts
            texts = write(batches[unit - first])
            self.folder.save_texts(unit, texts)
            return texts

        def read(unit: int) -> list[str]:
            self.processes.find(self.folder.texts_place(unit))
            return cast(list[str], self.folder.load_texts(unit))  # they were found

        return self.processes.share(f"texts {first}", range(first, self.given), work, read)


BY_NAME = {"admm": _search_admm, "pool": _search_pool}  # of config.SEARCHES
