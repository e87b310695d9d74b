"""The pipeline: a Release, a task and a model in, a synthetic data set with a manifest out.

Never sees private text: what it knows of the real examples is the Release. Everything it draws depends on
(seed, purpose, group) alone, and it writes as it goes, so an interrupted run continues to the same bytes.
Letters: K groups, B examples of a group, L tokens, D width, C classes.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path

import datasets
import pandas
import torch
from torch import Tensor
from tqdm.auto import tqdm

from gradmm import admm, sharding
from gradmm.card import dataset_card
from gradmm.errors import is_number, is_whole, require, shown
from gradmm.evaluation import perplexities
from gradmm.generation import Batch, Sampling, generate_texts
from gradmm.gradients import DISTANCES
from gradmm.initialisation import CHOICES, INITIALISATIONS, Shape
from gradmm.locks import alone
from gradmm.matching import Matching
from gradmm.models import Model
from gradmm.privacy import Release
from gradmm.projection import PROJECTIONS, Reading, Tables, allowed_tokens, project, text_mask
from gradmm.runs import RunFolder
from gradmm.seeds import generator, stream
from gradmm.selection import FILTERS, RANKINGS, label_probabilities, select
from gradmm.sharding import Crew
from gradmm.sizing import ModelShape, Work, expected_bytes, groups_at_once
from gradmm.sketch import BodySketch
from gradmm.tasks import Task, TaskTokens, tokenize_task

TEXTS_PER_BATCH = {"cpu": 64, "other": 256}  # rows of a projection beyond which a step costs in proportion
OnStep = Callable[[int, admm.Result], None]


@dataclass(frozen=True)
class SynthesisConfig:
    """Settings of a synthesis; `PRESETS` holds the published ones.

    Attributes:
        n_synthetic: texts to keep in all, at least one a class; classes get as equal a number as possible.
        oversample: texts written for each text kept, at least 1; the filter and the ranking choose.
        group_size: B, texts that match the target together.
        outer_steps, inner_steps, rho, lr, gradient_clip, balance_rho: see `admm.Config`. A token changes when lam / rho
            outgrows the distance between neighbouring embeddings; f's gradients are small, so a rho as large as the
            published ones leaves generated starts as they are.
        projection, top_k: the order (a name in `projection.PROJECTIONS`) and its number of candidates.
        search: a name in SEARCHES: "admm" moves texts towards the target (all settings of the solver, the projection and the
            start are its own), "pool" has the model write `oversample` times as many finished texts from the public prompts
            and leaves the rest to filter and ranking.
        length: L, tokens of a text; None takes the Release's.
        early_end, min_tokens: whether a text may end before L tokens, and not before how many.
        distance: "cosine" or "l2".
        init: "generated" starts x at texts that the model writes from the public prompts (it needs `early_end`), "normal" at
            random vectors as published.
        init_candidates, init_norm: draws of each group, and the norm that random vectors are scaled to (None: the mean norm of
            the embeddings).
        init_choice: "best" starts a group as its draw with the lowest matching loss, as published; "greedy" puts it together
            from the texts of all its draws, which at the same cost starts lower; 25 draws for 500 cost a twentieth.
        filter: a name in `selection.FILTERS`. A model that cannot yet do the task misreads the labels, and its filter then
            teaches its own mistakes: "none" by default, "label" as published.
        ranking: a name in RANKINGS: "text" keeps the texts of each class that match the target best one by one, "group"
            those that, added one after the other, match it best together, "joint" those that, added to the classes in turn,
            best match each class's target and the sum of all classes' targets, which balanced training follows.
        perplexity_weight: ranking "text" adds this times the log-perplexity to the matching loss.
        groups_per_batch: the unit of work: groups that are projected together, saved together and given to one process
            together. None follows from the number and size of the groups (`work_units`), never from the memory or the
            number of processes, so that none of these can change a result.
        seed: names every random draw.
        solver: the solver's part of these settings; follows from them.
    """

    n_synthetic: int = 100
    oversample: float = 2.0
    group_size: int = 10
    outer_steps: int = 10
    inner_steps: int = 20
    rho: float = 0.003
    lr: float = 0.008
    gradient_clip: float | None = 1.0
    balance_rho: bool = False
    projection: str = "lm_then_nearest"
    top_k: int = 50
    search: str = "admm"
    length: int | None = None
    early_end: bool = True
    min_tokens: int = 4
    distance: str = "cosine"
    init: str = "generated"
    init_candidates: int = 4
    init_norm: float | None = None
    init_choice: str = "best"
    filter: str = "none"
    ranking: str = "text"
    perplexity_weight: float = 0.0
    groups_per_batch: int | None = None
    seed: int = 0
    solver: admm.Config = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for name in ("n_synthetic", "group_size", "top_k", "min_tokens", "init_candidates"):
            _require_count(name, getattr(self, name))
        for name in ("length", "groups_per_batch"):
            _require_count(name, 1 if getattr(self, name) is None else getattr(self, name))
        for name, least, mend in (("oversample", 1, "1.5 writes half as many again"), ("perplexity_weight", 0, "0 ignores it")):
            value = getattr(self, name)
            require(is_number(value) and value >= least, f"{name} = {shown(value)}, it must be at least {least}: {mend}")
        require(
            self.init_norm is None or (is_number(self.init_norm) and self.init_norm > 0),
            f"init_norm = {shown(self.init_norm)}, it must be above 0, or None: None takes the mean norm of the embeddings",
        )
        for name in ("early_end", "balance_rho"):
            require(isinstance(getattr(self, name), bool), f"{name} = {shown(getattr(self, name))}, it must be True or False: give one of them")
        require(is_whole(self.seed), f"seed = {shown(self.seed)}, it must be a whole number: give such as 0")
        require(self.early_end or self.init == "normal", "init = 'generated' writes texts of several lengths: set early_end, or init = 'normal'")
        for name, known in (("search", SEARCHES), ("init", INITIALISATIONS), ("init_choice", CHOICES), ("projection", PROJECTIONS), ("filter", FILTERS), ("distance", DISTANCES), ("ranking", RANKINGS)):
            value = getattr(self, name)
            require(isinstance(value, str) and value in known, f"the {name} {shown(value)} is not known: use one of {', '.join(known)}")
        object.__setattr__(self, "solver", self._solver())  # checks the solver's own settings

    def _solver(self) -> admm.Config:
        return admm.Config(
            rho=self.rho,
            outer_steps=self.outer_steps,
            inner_steps=self.inner_steps,
            lr=self.lr,
            clip=self.gradient_clip,
            balance=self.balance_rho,
        )

    @staticmethod
    def from_dict(values: dict) -> "SynthesisConfig":
        """Settings from plain values; unknown names are errors.

        Raises:
            UserError: a name that is no setting, or a value that a setting cannot have.
        """
        known = {item.name for item in fields(SynthesisConfig) if item.init}
        unknown = sorted(set(values) - known)
        require(not unknown, f"unknown setting {', '.join(map(repr, unknown))}: the settings are {', '.join(sorted(known))}")
        return SynthesisConfig(**values)


def _require_count(name: str, value) -> None:
    require(
        is_whole(value) and value >= 1,
        f"{name} = {shown(value)}, it must be a whole number of at least 1: give {SynthesisConfig.__dict__[name] or 1}",
    )


@dataclass(frozen=True)
class SynthesisResult:
    """What a synthesis gives.

    Attributes:
        dataset: every text written: text, label, label_name, match, perplexity, group, kept, reason.
        history: one row per ADMM step and group (`admm.step` names the columns), with batch and label.
        manifest: settings, versions, seeds, reasons, times; plain values.
    """

    dataset: datasets.Dataset
    history: pandas.DataFrame
    manifest: dict

    @cached_property
    def kept(self) -> datasets.Dataset:
        """The texts that were kept."""
        return self.dataset.filter(lambda row: row["kept"])


def synthesize(
    model: Model,
    task: Task,
    release: Release,
    config: SynthesisConfig | None = None,
    output: str | Path | None = None,
    progress: bool = True,
    on_step: OnStep | None = None,
) -> SynthesisResult:
    """Write synthetic examples whose gradients match a Release.

    Args:
        model: the model that the Release was made with.
        task: its task.
        release: from `gradmm.release`; private text itself is refused.
        config: the settings.
        output: a folder that receives `synthetic.jsonl`, `history.jsonl`, `manifest.json`, `README.md` and unfinished work.
            Unfinished work of the same settings is continued, finished work read back. None keeps everything in memory.
            Processes that a launcher started (`gradmm.sharding`) share the work and all return the whole result; they need
            a folder that each of them sees.
        progress: whether to show a progress bar.
        on_step: sees the number of the batch and the solver's Result after every outer step.

    Returns:
        SynthesisResult.

    Raises:
        UserError: `release` is no Release or belongs to another model or task; the settings do not fit the model; the
            folder holds another run's settings, or another run is at work in it.

    Example:
        >>> import gradmm
        >>> task, data = gradmm.load_data("demo")
        >>> model = gradmm.load_model("demo", device="cpu")
        >>> target = gradmm.release(model, task, gradmm.sample_examples(data.train, 4, task, seed=0))
        >>> config = gradmm.SynthesisConfig(n_synthetic=2, group_size=1, outer_steps=1, inner_steps=1)
        >>> result = gradmm.synthesize(model, task, target, config, progress=False)
        >>> len(result.dataset), [row["label_name"] for row in result.kept]
        (4, ['negative', 'positive'])
    """
    release, config = _checked(release, model, task).to(model.device), config or SynthesisConfig()
    plan = Plan.of(model, task, release, config)
    plan.check_processes()
    with sharding.crew(output) as crew, alone(output if crew.leads else None):
        folder = crew.after_first("open", lambda: _open(plan, output, crew))
        written = None if folder.finished else SEARCHES[config.search](plan, folder, crew, progress and crew.leads, on_step)
        return crew.after_first("close", lambda: _conclude(plan, written, folder))


def _open(plan: "Plan", output: str | Path | None, crew: Crew) -> RunFolder:
    if not crew.leads:
        crew.find(Path(output) / "manifest.json")
    return RunFolder.open(output, plan.identity())


def _conclude(plan: "Plan", written: "Written | None", folder: RunFolder) -> SynthesisResult:
    """The results, read back where they are finished, by another process or an earlier run; else judged and saved."""
    if folder.finished:
        rows, history, manifest = folder.load()
        return SynthesisResult(datasets.Dataset.from_list(rows, features=_features()), history, manifest)
    result = _collect(plan, written, folder)
    folder.finish(result.dataset.to_list(), result.history, result.manifest, dataset_card(result.manifest))
    return result


def _checked(release, model: Model, task: Task) -> Release:
    require(
        isinstance(release, Release),
        f"synthesize was given {type(release).__name__} where a Release belongs: real texts enter through gradmm.release alone",
    )
    require(
        release.model == model.fingerprint,
        f"the Release was made with another model than {model.name}: release the examples with this model",
    )
    require(
        release.task == task.fingerprint,
        f"the Release was made with other labels, template or verbalizers than task {task.name!r}: release again with it",
    )
    return release


# ---------------------------------------------------------------- the plan


@dataclass(frozen=True)
class Plan:
    """Everything that a run derives from its inputs before it draws or computes anything.

    Attributes:
        length: tokens of a text.
        classes: the label number of each group.
        per_class: how many texts of each class are kept.
        batch: groups of a unit of work.
        solver: the solver's settings, with the groups that the model sees at once.
    """

    model: Model
    task: Task
    tokens: TaskTokens
    release: Release
    config: SynthesisConfig
    matching: Matching
    reading: Reading
    tables: Tables
    length: int
    classes: tuple[int, ...]
    per_class: tuple[int, ...]
    batch: int
    solver: admm.Config

    @staticmethod
    def of(model: Model, task: Task, release: Release, config: SynthesisConfig) -> "Plan":
        """Derive it.

        Raises:
            UserError: fewer texts than classes, a length beyond the model's context, or no end token where one is needed.
        """
        tokens = tokenize_task(task, model.tokenizer)
        count = len(task.labels)
        require(config.n_synthetic >= count, f"n_synthetic = {config.n_synthetic}, but {count} classes need one text each: ask for {count} or more")
        per_class = tuple(config.n_synthetic // count + (label < config.n_synthetic % count) for label in range(count))
        classes = tuple(
            label for label in range(count) for _ in range(math.ceil(per_class[label] * config.oversample / config.group_size))
        )
        require(
            config.search == "pool" or not isinstance(release.space, BodySketch),
            f"targets in the space {release.space_name!r} are matched by choosing texts: set search = 'pool', or release in another space",
        )
        length = config.length or release.length
        _check_context(model, tokens, length)
        end = _end_token(model, config)
        batch, together = work_units(model, len(tokens.start + tokens.head + tokens.tail) + length, config, len(classes))
        return Plan(
            model=model,
            task=task,
            tokens=tokens,
            release=release,
            config=config,
            matching=Matching(model, tokens, release.targets, release.space, config.distance, end),
            reading=Reading(config.projection, config.top_k, allowed_tokens(model), end, min(config.min_tokens, length)),
            tables=Tables.of(model),
            length=length,
            classes=classes,
            per_class=per_class,
            batch=batch,
            solver=replace(config.solver, groups_per_pass=together),
        )

    def identity(self) -> dict:
        """What must be equal for unfinished work to be continued."""
        return {
            "config": asdict(self.config),
            "task": self.task.to_dict(),
            "model": {"name": self.model.name, "revision": self.model.revision, "fingerprint": self.model.fingerprint,
                      "dtype": str(self.model.dtype).removeprefix("torch.")},
            "release": {"fingerprint": self.release.fingerprint, "private": self.release.private,
                        "statement": self.release.statement, "ledger": [asdict(entry) for entry in self.release.ledger]},
            "length": self.length,
            "groups": len(self.classes),
            "groups_per_batch": self.batch,
            "groups_per_pass": self.solver.groups_per_pass,
        }  # fmt: skip

    def expected_bytes(self) -> dict[str, int]:
        """What the run takes by the rule of `sizing.expected_bytes`."""
        work = Work(
            groups=len(self.classes),
            count=self.config.group_size,
            length=self.length,
            positions=len(self.tokens.start + self.tokens.head + self.tokens.tail) + self.length,
            prompt=max(map(len, self.tokens.prompts)),
            batch=self.batch,
            together=self.solver.groups_per_pass,
            top_k=self.config.top_k,
            targets=sum(target.numbers for target in self.release.targets),
        )
        return expected_bytes(ModelShape.of(self.model), work)

    def check_processes(self) -> None:
        """Refuse more processes than there are units of work for.

        Raises:
            UserError: there are more.
        """
        count, units = sharding.launched()[1], len(self.batches())
        require(
            self.config.search == "pool" or count <= units,
            f"{count} processes would share {units} units of work of up to {self.batch} groups: set groups_per_batch to at most "
            f"{max(1, len(self.classes) // count)}, or launch {units} at most",
        )

    def batches(self) -> list[range]:
        """The numbers of the groups of each batch."""
        return [range(first, min(first + self.batch, len(self.classes))) for first in range(0, len(self.classes), self.batch)]


def _end_token(model: Model, config: SynthesisConfig) -> int | None:
    if not config.early_end:
        return None
    end = model.tokenizer.eos_token_id
    require(end is not None, f"{model.name} has no end-of-text token: set early_end = False and init = 'normal'")
    return end


def _check_context(model: Model, tokens: TaskTokens, length: int) -> None:
    around = max(len(tokens.start + tokens.head + tokens.tail), max(map(len, tokens.prompts)))
    require(
        around + length <= model.context,
        f"length = {length} with a template or prompt of {around} tokens, {model.name} reads {model.context}: "
        f"take a length of at most {model.context - around}",
    )


def work_units(model: Model, positions: int, config: SynthesisConfig, groups: int) -> tuple[int, int]:
    """The groups of a batch, and the groups that the model sees at once in the solver's inner steps.

    Both follow from settings and shapes alone. Batches are as equal as can be and have about the rows from which on a step
    of the projection costs in proportion. On a CPU an inner step sees one group: more are no faster there, and so nothing
    that is computed of a group depends on the others, to the last bit. Elsewhere it sees as many groups as keep the
    activations within the size of the weights, and at least one.

    Args:
        positions: tokens of a text with its template.
        groups: all groups of the run.
    """
    kind = "cpu" if model.device.type == "cpu" else "other"
    most = max(1, TEXTS_PER_BATCH[kind] // config.group_size)
    batch = min(groups, config.groups_per_batch or math.ceil(groups / math.ceil(groups / most)))
    if kind == "cpu":
        return batch, 1
    return batch, groups_at_once(ModelShape.of(model), positions, config.group_size, batch)


# ---------------------------------------------------------------- the work


@dataclass(frozen=True)
class Written:
    """What a search gives: N texts in the order of writing with their labels and groups, its history and how groups ended."""

    texts: list[str]
    classes: list[int]
    groups: list[int]
    history: pandas.DataFrame
    ended: list[dict]


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


SEARCHES = {"admm": _search_admm, "pool": _search_pool}


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


# ---------------------------------------------------------------- the results


def _collect(plan: Plan, written: Written, folder: RunFolder) -> SynthesisResult:
    """The texts' scores and verdicts, and the manifest."""
    rows = [{**row, "group": group} for row, group in zip(judge_texts(plan, written.texts, written.classes), written.groups, strict=True)]
    kept = [row for row in rows if row["kept"]]
    manifest = {
        **folder.manifest,
        "expected_bytes": plan.expected_bytes(),
        "groups_ended": written.ended,
        "kept": len(kept),
        "set_match": dict(zip(plan.task.labels, _set_match(plan, kept), strict=True)),
    }
    return SynthesisResult(datasets.Dataset.from_list(rows, features=_features()), written.history, manifest)


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


def judge_texts(plan: Plan, texts: list[str], classes: list[int]) -> list[dict]:
    """Measure texts, whoever wrote them, and decide which to keep: the label filter, then the ranking within each class.

    Args:
        texts: N texts in the order of writing; an empty one is never kept.
        classes: the label number that each is meant to have.

    Returns:
        N rows of the columns of `SynthesisResult.dataset`.
    """
    spoken = [i for i, text in enumerate(texts) if text]
    some, labels = [texts[i] for i in spoken], [classes[i] for i in spoken]
    match = _spread(plan.matching.of_texts(some, labels).tolist(), spoken, len(texts))
    perplexity = _spread(perplexities(plan.model, some), spoken, len(texts))
    probabilities = torch.zeros(len(texts), len(plan.task.labels))
    misread: list[int | None] = [None] * len(texts)
    if spoken:
        probabilities[spoken] = label_probabilities(plan.model, plan.tokens, some).cpu()
        for i, found in zip(spoken, FILTERS[plan.config.filter](probabilities[spoken], labels), strict=True):
            misread[i] = found
    weight, (criterion, rank) = plan.config.perplexity_weight, RANKINGS[plan.config.ranking]
    scores = [m + weight * math.log(p) if weight else m for m, p in zip(match, perplexity, strict=True)]
    scores = rank(plan.matching, texts, classes, misread, scores, plan.per_class)
    verdicts = select(texts, classes, scores, misread, probabilities, plan.per_class, plan.task.labels, criterion)
    return [
        {
            "text": text,
            "label": label,
            "label_name": plan.task.labels[label],
            "match": match[i],
            "perplexity": perplexity[i],
            "group": i // plan.config.group_size,
            "kept": verdicts[i].kept,
            "reason": verdicts[i].reason,
        }
        for i, (text, label) in enumerate(zip(texts, classes, strict=True))
    ]


def _spread(values: list[float], places: list[int], count: int) -> list[float]:
    spread = [math.inf] * count
    for place, value in zip(places, values, strict=True):
        spread[place] = value
    return spread


def _set_match(plan: Plan, kept: list[dict]) -> list[float | None]:
    values = plan.matching.of_sets([row["text"] for row in kept], [row["label"] for row in kept])
    return [value if math.isfinite(value) else None for value in values]


def _history(plan: Plan, batches: list[admm.Result]) -> list[dict]:
    return [
        {"label": plan.task.labels[plan.classes[row["group"] + groups.start]], **row, "group": row["group"] + groups.start}
        for groups, result in zip(plan.batches(), batches, strict=True)
        for row in result.history
    ]


def _features() -> datasets.Features:
    kinds = {"text": "string", "label": "int64", "label_name": "string", "match": "float64", "perplexity": "float64",
             "group": "int64", "kept": "bool", "reason": "string"}  # fmt: skip
    return datasets.Features({name: datasets.Value(kind) for name, kind in kinds.items()})


# ---------------------------------------------------------------- published settings

_PUBLISHED = {
    "n_synthetic": 100,
    "oversample": 2.0,
    "outer_steps": 30,
    "inner_steps": 50,
    "rho": 0.01,  # the paper tries 0.01, 0.1, 0.5, 1 and 5; notebooks/params takes the smallest too
    "lr": 0.008,
    "top_k": 200,
    "early_end": False,
    "init": "normal",
    "init_candidates": 500,
    "init_norm": 1.4,
    "filter": "label",
    "perplexity_weight": 0.05,
}
PRESETS: dict[str, SynthesisConfig] = {
    "paper": SynthesisConfig(projection="lm_then_nearest", **_PUBLISHED),
    "official": SynthesisConfig(projection="nearest_then_lm", **_PUBLISHED),
}
