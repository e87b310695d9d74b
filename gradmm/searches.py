"""The searches: ways to write texts for a Release, in units of work that any number of processes may share.

Each takes a plan and the circumstances of a run, and gives what it has written. It draws by (seed, purpose, group) alone and
saves as it goes, so that an interrupted run continues to the same bytes. A search among texts keeps its place as the solver
does, in an `admm.Result`, whose vectors are then of width 0. Letters: K groups, B examples of a group, L tokens, D width.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import pandas
import torch
from torch import Tensor
from tqdm.auto import tqdm

from gradmm import admm
from gradmm.examples import Example
from gradmm.generation import Batch, Sampling, generate_counts
from gradmm.initialisation import CHOICES, Shape
from gradmm.judging import keep_examples
from gradmm.plan import Plan
from gradmm.projection import Reading, embedding_spread, project, text_mask
from gradmm.runs import RunFolder
from gradmm.seeds import generator, stream
from gradmm.settings import SynthesisConfig
from gradmm.sharding import Crew
from gradmm.swaps import Swapper
from gradmm.tasks import warn_of_equal_prompts

OnStep = Callable[[int, admm.Result], None]


@dataclass(frozen=True)
class Written:
    """What a search gives: N texts in the order of writing with labels and groups, its history if it has steps, how groups ended."""

    texts: list[str]
    classes: list[int]
    groups: list[int]
    history: pandas.DataFrame | None
    ended: list[dict]


@dataclass(frozen=True)
class Circumstances:
    """Where a search runs: the run's folder, the processes at work, whether a bar shows, who sees the steps."""

    folder: RunFolder
    crew: Crew
    progress: bool
    on_step: OnStep | None


def search(plan: Plan, folder: RunFolder, crew: Crew, progress: bool, on_step: OnStep | None) -> Written:
    """What the search of the plan's name writes."""
    return _BY_NAME[plan.config.search](plan, Circumstances(folder, crew, progress, on_step))


# ---------------------------------------------------------------- groups of texts

Report = Callable[[admm.Result], None]
Work = Callable[[int, admm.Result | None, Report], admm.Result]


def _search_groups(plan: Plan, here: Circumstances, units: Sequence[range], classes: Sequence[int], work: Work) -> Written:
    """Every unit of groups from where it stands to its end.

    Args:
        units: the numbers of each unit's groups.
        classes: the label number of each group.
        work: the number of a unit, what the folder holds of it, and who hears of each step -> the unit at its end.
    """
    folder, crew, numbers = here.folder, here.crew, range(len(units))
    total = len(numbers[crew.rank :: crew.count]) * plan.config.outer_steps

    def read(number: int) -> admm.Result:
        crew.find(folder.place(number))
        return folder.load_result(number, plan.model.device).without_vectors()

    with tqdm(total=total, desc="matching", unit="step", disable=not here.progress) as bar:

        def run(number: int) -> admm.Result:
            held = folder.load_result(number, plan.model.device)
            bar.update(held.state.step if held else 0)
            result = work(number, held, _report(number, here, bar))
            folder.save_result(number, result)
            return result.without_vectors()

        results = crew.share("batches", numbers, run, read)
    sizes = [len(ids) for result in results for ids in result.value]
    return Written(
        texts=[_text(plan, row) for result in results for row in result.value.cpu().flatten(0, 1)],
        classes=[label for label, size in zip(classes, sizes, strict=True) for _ in range(size)],
        groups=[group for group, size in enumerate(sizes) for _ in range(size)],
        history=pandas.DataFrame(_history(plan, units, classes, results)),
        ended=_ended(plan, classes, results),
    )


def _report(number: int, here: Circumstances, bar: tqdm) -> Report:
    def report(result: admm.Result) -> None:
        here.crew.check()
        if here.on_step is not None:
            here.on_step(number, result)
        bar.update(1)
        bar.set_postfix(match=f"{result.match.mean().item():.4f}")
        here.folder.snapshot(number, result)

    return report


def _text(plan: Plan, ids: Tensor) -> str:
    """The text of (L,) tokens; empty of a group that never had a projection (it went non-finite at once)."""
    count = int(text_mask(ids, plan.reading.end).sum())
    return plan.tokens.decode(token for token in ids[:count].tolist() if token >= 0)


def _history(plan: Plan, units: Sequence[range], classes: Sequence[int], results: Sequence[admm.Result]) -> list[dict]:
    return [
        {"label": plan.task.labels[classes[row["group"] + groups.start]], **row, "group": row["group"] + groups.start}
        for groups, result in zip(units, results, strict=True)
        for row in result.history
    ]


def _ended(plan: Plan, classes: Sequence[int], results: Sequence[admm.Result]) -> list[dict]:
    """Why each group stopped, and its loss."""
    reasons = [reason for result in results for reason in result.reason]
    matches = [value for result in results for value in result.match.tolist()]
    return [
        {"group": group, "label": plan.task.labels[label], "reason": reason, "match": match if math.isfinite(match) else None}
        for group, (label, reason, match) in enumerate(zip(classes, reasons, matches, strict=True))
    ]


# ---------------------------------------------------------------- admm


def _search_admm(plan: Plan, here: Circumstances) -> Written:
    """Texts moved towards the target by the solver."""
    warn_of_equal_prompts(plan.task)

    def work(number: int, held: admm.Result | None, report: Report) -> admm.Result:
        groups, classes = _groups_of(plan, number)
        return admm.solve(
            lambda x, ids, which: plan.matching.of_vectors(x, ids, classes[which]),
            lambda v, which: _projected(plan, v, classes[which], plan.reading),
            held or admm.start(_initial(plan, groups, classes), plan.solver),
            plan.solver,
            report,
        )

    return _search_groups(plan, here, plan.batches(), plan.classes, work)


def _groups_of(plan: Plan, number: int) -> tuple[range, Tensor]:
    """The numbers of a batch's groups, and their classes (K,)."""
    groups = plan.batches()[number]
    return groups, torch.tensor([plan.classes[group] for group in groups], device=plan.model.device)


def _projected(plan: Plan, v: Tensor, classes: Tensor, reading: Reading, noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """v (k, B, L, D) -> the readable texts' embeddings and tokens; noise (k, B, L, candidates)."""
    groups, count, length, _ = v.shape
    rows, noise = classes.repeat_interleave(count), None if noise is None else noise.flatten(0, 1)
    ids = project(plan.model, plan.tables, v.flatten(0, 1), plan.tokens.prompts, rows, reading, noise)
    ids = ids.view(groups, count, length)
    return plan.model.embed(ids).to(v.dtype), ids


def _initial(plan: Plan, groups: range, classes: Tensor) -> Tensor:
    config = plan.config
    sources = [generator(config.seed, "initial x", group) for group in groups]
    shape = Shape(config.group_size, plan.length, config.init_norm)
    together = plan.solver.groups_per_pass
    return CHOICES[config.init_choice](config.init, config.init_candidates, plan.matching, plan.reading, shape, classes, sources, together)


# ---------------------------------------------------------------- guided


def _search_guided(plan: Plan, here: Circumstances) -> Written:
    """Texts written anew in every round, led by the gradient of f at the last ones; each group's best round counts."""
    reading = replace(plan.reading, order="guided", beams=plan.config.beams)
    strength = plan.config.guidance_weight / embedding_spread(plan.tables, plan.reading.allowed)

    def work(number: int, held: admm.Result | None, report: Report) -> admm.Result:
        groups, classes = _groups_of(plan, number)
        result = held
        if result is None:
            z, ids = _projected(plan, _initial(plan, groups, classes), classes, plan.reading)
            result = drafts(ids, _values(plan, z, ids, classes))
        while result.state.active.any():
            result = guided_round(plan, result, classes, reading, strength, _noise(plan, groups, result.state.step + 1))
            report(result)
        return result

    return _search_groups(plan, here, plan.batches(), plan.classes, work)


def drafts(ids: Tensor, match: Tensor) -> admm.Result:
    """Where a search among texts begins: (K, B, L) tokens and f (K,)."""
    groups, nothing = len(ids), match.new_empty(*ids.shape, 0)
    state = admm.State(
        x=nothing, lam=nothing, rho=match.new_zeros(groups), ids=ids, step=0,
        active=torch.ones(groups, dtype=torch.bool, device=ids.device),
    )  # fmt: skip
    none = admm.Result(torch.full_like(ids, -1), torch.full_like(match, math.inf), ("",) * groups, [], state, torch.zeros_like(ids[:, 0, 0]))
    return admm.keep_better(none, torch.arange(groups, device=ids.device), ids, match)


def _noise(plan: Plan, groups: range, step: int) -> Tensor | None:
    """Gumbel noise of the configured scale for the walk of a step, (K, B, L, k), each group's from its own generator."""
    config = plan.config
    if config.temperature == 0:
        return None
    size = (config.group_size, plan.length, config.top_k)
    uniform = torch.stack([torch.rand(size, generator=generator(config.seed, f"guided step {step}", group)) for group in groups])
    return -config.temperature * (-uniform.clamp(1e-7, 1 - 1e-7).log()).log().to(plan.model.device)


def guided_round(
    plan: Plan, result: admm.Result, classes: Tensor, reading: Reading, strength: float, noise: Tensor | None = None
) -> admm.Result:
    """One round of the groups that are active: gradient, direction, new texts, and their f.

    The direction at a position is minus the gradient there, scaled to length `strength`: f's gradients are tiny beside
    log-probabilities, and their size differs by orders of magnitude between models, targets and positions, so that no weight of
    the gradient itself would mean the same twice. A position without a gradient (behind a text's end) is left to the model.

    Args:
        result: `drafts`, or the last round's.
        classes: (K,) each group's class.
        reading: of the order "guided".
        strength: the length of a direction.
        noise: (K, B, L, k) added to the scores, see `projection.project`.

    Returns:
        The result with one more step: rows of history with match_z (f of the new texts), promised (its change to first order),
        changed (share of tokens), seconds.
    """
    begun, moving = time.perf_counter(), result.state.active.nonzero().squeeze(-1)
    ids, labels, step = result.state.ids[moving], classes[moving], result.state.step + 1
    x = plan.model.embed(ids).to(torch.promote_types(plan.model.dtype, torch.float32))
    gradient = torch.cat(_in_passes(plan, lambda *some: _gradient(plan, *some), x, ids, labels))
    direction = -strength * gradient / gradient.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(x.dtype).tiny)
    z, new = _projected(plan, direction.nan_to_num(0.0, 0.0, 0.0), labels, reading, None if noise is None else noise[moving])
    match, promised = _values(plan, z, new, labels), ((z - x) * gradient).sum((1, 2, 3))
    changed = (new != ids).to(x.dtype).mean((1, 2))
    seconds, reasons, active = (time.perf_counter() - begun) / len(moving), list(result.reason), result.state.active.clone()
    rows = []
    for i, group in enumerate(moving.tolist()):
        rows.append({"step": step, "group": group, "match_z": match[i].item(), "promised": promised[i].item(), "changed": changed[i].item(), "seconds": seconds})
        reasons[group] = _reason(rows[-1], plan.config)
        active[group] = not reasons[group]
    state = replace(result.state, ids=result.state.ids.index_copy(0, moving, new), step=step, active=active)
    return replace(admm.keep_better(result, moving, new, match), state=state, reason=tuple(reasons), history=[*result.history, *rows])


def _reason(row: dict, config: SynthesisConfig) -> str:
    """Why a group stops; without draws, the same texts once are the same texts for ever."""
    if not (math.isfinite(row["match_z"]) and math.isfinite(row["promised"])):
        return admm.NON_FINITE.format(row["step"])
    if row["changed"] == 0 and config.temperature == 0:
        return admm.STABLE.format(1)
    return admm.STEP_LIMIT.format(config.outer_steps) if row["step"] >= config.outer_steps else ""


def _gradient(plan: Plan, x: Tensor, ids: Tensor, classes: Tensor) -> Tensor:
    value = x.detach().clone().requires_grad_(True)
    (gradient,) = torch.autograd.grad(plan.matching.of_vectors(value, ids, classes).sum(), value)
    return gradient


@torch.no_grad()
def _values(plan: Plan, z: Tensor, ids: Tensor, classes: Tensor) -> Tensor:
    """f of texts: (K, B, L, D), (K, B, L), (K,) -> (K,)."""
    return torch.cat(_in_passes(plan, plan.matching.of_vectors, z, ids, classes))


def _in_passes(plan: Plan, call: Callable[..., Tensor], *parts: Tensor) -> list[Tensor]:
    """The call's results on as many groups at once as the plan lets the model see."""
    size = plan.solver.groups_per_pass or len(parts[0])
    return [call(*some) for some in zip(*(part.split(size) for part in parts), strict=True)]


# ---------------------------------------------------------------- swap

NO_SWAP = "no swap: none of those tried at step {} lowers the loss of fluent texts"


def _search_swap(plan: Plan, here: Circumstances) -> Written:
    """The texts that the pool with ranking "group" would keep, refined by single-token swaps; each class is one group."""
    pool = _search_pool(plan, here)
    written = [Example(text, label) for text, label in zip(pool.texts, pool.classes, strict=True)]
    kept = keep_examples(replace(plan, config=replace(plan.config, ranking="group")), written)
    begun = [[example.text for example in kept if example.label == label] for label in range(len(plan.task.labels))]

    def work(number: int, held: admm.Result | None, report: Report) -> admm.Result:
        texts = begun[number]
        swapper, result = Swapper.of(plan, number, texts), held
        if result is None:
            match = plan.matching.of_sets(texts, [number] * len(texts))[number]
            result = drafts(_token_rows(plan, texts), torch.tensor([match], device=plan.model.device))
        while result.state.active.any():
            result = swap_round(plan, result, swapper)
            report(result)
        return result

    units = [range(label, label + 1) for label in range(len(begun))]
    return _search_groups(plan, here, units, range(len(begun)), work)


def _token_rows(plan: Plan, texts: Sequence[str]) -> Tensor:
    """Texts as one group of tokens with the end token behind each: (1, N, L)."""
    rows = [plan.tokens.encode(text) for text in texts]
    longest = max(map(len, rows))
    return torch.tensor([[row + [plan.reading.end] * (longest - len(row)) for row in rows]], device=plan.model.device)


def swap_round(plan: Plan, result: admm.Result, swapper: Swapper) -> admm.Result:
    """One more step of a class: rows of history with match_z (f of its texts), swaps, changed (share of tokens), seconds."""
    begun, step, ids = time.perf_counter(), result.state.step + 1, result.state.ids
    moved, swaps = swapper.round(ids[0])
    match = result.match.new_tensor([swaps[-1].match]) if swaps else result.match
    changed = len(swaps) / int(text_mask(ids, plan.reading.end).sum())
    row = {"step": step, "group": 0, "match_z": match.item(), "swaps": len(swaps), "changed": changed, "seconds": time.perf_counter() - begun}
    last = admm.STEP_LIMIT.format(step) if step >= plan.config.outer_steps else ""
    reason = last if swaps else NO_SWAP.format(step)
    state = replace(result.state, ids=moved[None], step=step, active=result.state.active & (reason == ""))
    better = admm.keep_better(result, torch.zeros_like(result.stable), moved[None], match)
    return replace(better, state=state, reason=(reason,), history=[*result.history, row])


# ---------------------------------------------------------------- pool


def _search_pool(plan: Plan, here: Circumstances) -> Written:
    """Finished texts that the model writes freely; each class is one group."""
    around = max(map(len, plan.tokens.prompts))
    longest = max(plan.config.min_tokens, min(2 * plan.length, plan.model.context - around))
    sampling = Sampling(max_tokens=longest, min_tokens=plan.config.min_tokens)
    share = _TextUnits(here.folder, here.crew)
    pool = generate_counts(plan.model, plan.task, plan.written_per_class, stream(plan.config.seed, "pool"), sampling, share=share)
    classes = [example.label for example in pool]
    ended = [{"group": number, "label": label, "reason": "the pool is written", "match": None} for number, label in enumerate(plan.task.labels)]
    return Written([example.text for example in pool], classes, classes, None, ended)


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


_BY_NAME = {"admm": _search_admm, "pool": _search_pool, "guided": _search_guided, "swap": _search_swap}  # of settings.SEARCHES
