"""The searches: ways to write texts for a Release, in units of work that any number of processes may share.

Each takes a plan, a run's folder and the processes at work, and gives what it has written. It draws by (seed, purpose, group)
alone and saves as it goes, so that an interrupted run continues to the same bytes. Letters: K groups, B examples of a group,
L tokens, D width.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pandas
import torch
from torch import Tensor
from tqdm.auto import tqdm

from gradmm import admm
from gradmm.generation import Batch, Sampling, generate_texts
from gradmm.initialisation import CHOICES, Shape
from gradmm.plan import Plan
from gradmm.projection import project, text_mask
from gradmm.runs import RunFolder
from gradmm.seeds import generator, stream
from gradmm.settings import SEARCHES
from gradmm.sharding import Crew

OnStep = Callable[[int, admm.Result], None]


@dataclass(frozen=True)
class Written:
    """What a search gives: N texts in the order of writing with their labels and groups, its history and how groups ended."""

    texts: list[str]
    classes: list[int]
    groups: list[int]
    history: pandas.DataFrame
    ended: list[dict]


def search(plan: Plan, folder: RunFolder, crew: Crew, progress: bool, on_step: OnStep | None) -> Written:
    """What the search of the plan's name writes."""
    return _BY_NAME[plan.config.search](plan, folder, crew, progress, on_step)


# ---------------------------------------------------------------- admm


def _search_admm(plan: Plan, folder: RunFolder, crew: Crew, progress: bool, on_step: OnStep | None) -> Written:
    """Every batch of groups from where it stands to its end."""
    numbers = range(len(plan.batches()))
    total = len(numbers[crew.rank :: crew.count]) * plan.config.outer_steps

    def read(number: int) -> admm.Result:
        crew.find(folder.place(number))
        return folder.load_result(number, plan.model.device)

    with tqdm(total=total, desc="matching", unit="step", disable=not progress) as bar:

        def run(number: int) -> admm.Result:
            return _run_batch(plan, number, folder, bar, _report(number, folder, crew, bar, on_step))

        batches = crew.share("batches", numbers, run, read)
    ids = torch.cat([result.value for result in batches]).cpu()
    lengths = text_mask(ids, plan.reading.end).sum(-1).flatten().tolist()
    return Written(
        texts=[plan.tokens.decode(row[:count]) for row, count in zip(_written(ids), lengths, strict=True)],
        classes=[label for label in plan.classes for _ in range(ids.shape[1])],
        groups=[group for group in range(len(ids)) for _ in range(ids.shape[1])],
        history=pandas.DataFrame(_history(plan, batches)),
        ended=_ended(plan, batches),
    )


def _run_batch(plan: Plan, number: int, folder: RunFolder, bar: tqdm, report: Callable[[admm.Result], None]) -> admm.Result:
    groups = plan.batches()[number]
    classes = torch.tensor([plan.classes[group] for group in groups], device=plan.model.device)
    begin = folder.load_result(number, plan.model.device)
    if begin is None:
        begin = admm.start(_initial(plan, groups, classes), plan.solver)
    bar.update(begin.state.step)
    result = admm.solve(
        lambda x, ids, which: plan.matching.of_vectors(x, ids, classes[which]),
        _projection(plan, classes),
        begin,
        plan.solver,
        report,
    )
    folder.save_result(number, result)
    return result


def _projection(plan: Plan, classes: Tensor) -> admm.Project:
    """v (k, B, L, D) -> the nearest readable texts' embeddings and tokens."""

    def projected(v: Tensor, which: Tensor) -> tuple[Tensor, Tensor]:
        groups, count, length, _ = v.shape
        rows = classes[which].repeat_interleave(count)
        ids = project(plan.model, plan.tables, v.flatten(0, 1), plan.tokens.prompts, rows, plan.reading)
        ids = ids.view(groups, count, length)
        return plan.model.embed(ids).to(v.dtype), ids

    return projected


def _report(number: int, folder: RunFolder, crew: Crew, bar: tqdm, on_step: OnStep | None) -> Callable[[admm.Result], None]:
    def report(result: admm.Result) -> None:
        crew.check()
        if on_step is not None:
            on_step(number, result)
        bar.update(1)
        bar.set_postfix(match=f"{result.match.mean().item():.4f}")
        folder.snapshot(number, result)

    return report


def _initial(plan: Plan, groups: range, classes: Tensor) -> Tensor:
    config = plan.config
    sources = [generator(config.seed, "initial x", group) for group in groups]
    shape = Shape(config.group_size, plan.length, config.init_norm)
    together = plan.solver.groups_per_pass
    return CHOICES[config.init_choice](config.init, config.init_candidates, plan.matching, plan.reading, shape, classes, sources, together)


def _ended(plan: Plan, batches: list[admm.Result]) -> list[dict]:
    """Why each group stopped, and its loss."""
    reasons = [reason for result in batches for reason in result.reason]
    matches = [value for result in batches for value in result.match.tolist()]
    return [
        {"group": group, "label": plan.task.labels[label], "reason": reason, "match": match if math.isfinite(match) else None}
        for group, (label, reason, match) in enumerate(zip(plan.classes, reasons, matches, strict=True))
    ]


def _written(ids: Tensor) -> list[list[int]]:
    """Each text's tokens; a group that never had a projection (it went non-finite at once) has empty texts."""
    return [[token for token in row if token >= 0] for row in ids.flatten(0, 1).tolist()]


def _history(plan: Plan, batches: list[admm.Result]) -> list[dict]:
    return [
        {"label": plan.task.labels[plan.classes[row["group"] + groups.start]], **row, "group": row["group"] + groups.start}
        for groups, result in zip(plan.batches(), batches, strict=True)
        for row in result.history
    ]


# ---------------------------------------------------------------- pool


def _search_pool(plan: Plan, folder: RunFolder, crew: Crew, progress: bool, on_step: OnStep | None) -> Written:
    """Finished texts that the model writes freely; each class is one group."""
    counts = [math.ceil(count * plan.config.oversample) for count in plan.per_class]
    around = max(map(len, plan.tokens.prompts))
    longest = max(plan.config.min_tokens, min(2 * plan.length, plan.model.context - around))
    sampling = Sampling(max_tokens=longest, min_tokens=plan.config.min_tokens)
    share = _TextUnits(folder, crew)
    found = generate_texts(plan.model, plan.task, max(counts), stream(plan.config.seed, "pool"), sampling, share=share)
    kept = [example for place, example in enumerate(found) if place % max(counts) < counts[example.label]]
    classes = [example.label for example in kept]
    ended = [{"group": number, "label": label, "reason": "the pool is written", "match": None} for number, label in enumerate(plan.task.labels)]
    return Written([example.text for example in kept], classes, classes, pandas.DataFrame(columns=["step", "group"]), ended)


@dataclass
class _TextUnits:
    """Shares the batches of texts of each round out to the processes; a unit is a batch, numbered through all rounds."""

    folder: RunFolder
    crew: Crew
    given: int = 0

    def __call__(self, batches: Sequence[Batch], write: Callable[[Batch], list[str]]) -> list[list[str]]:
        first = self.given
        self.given += len(batches)

        def work(unit: int) -> list[str]:
            texts = self.folder.load_texts(unit)
            if texts is None:
                texts = write(batches[unit - first])
                self.folder.save_texts(unit, texts)
            return texts

        def read(unit: int) -> list[str]:
            self.crew.find(self.folder.texts_place(unit))
            return self.folder.load_texts(unit)

        return self.crew.share(f"texts {first}", range(first, self.given), work, read)


_BY_NAME = dict(zip(SEARCHES, (_search_admm, _search_pool), strict=True))
