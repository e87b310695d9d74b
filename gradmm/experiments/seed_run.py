"""What a comparison of training sets shares: its settings, its experiment, and the run of one seed.

Reads real examples; knows no method.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import torch

from gradmm import files
from gradmm.config import FinetuneConfig, SynthesisConfig
from gradmm.data import Example, Splits, check_examples, sample_examples
from gradmm.errors import is_whole, plain_fields, require, require_type, require_whole, short_repr
from gradmm.evaluation import perplexities
from gradmm.generation import Sampling
from gradmm.gradients import Factors, FactorTarget
from gradmm.matching import Matching
from gradmm.models import Model, require_model
from gradmm.plan import Plan
from gradmm.privacy import Release, release
from gradmm.spaces import SPACES, own_texts
from gradmm.synthesis import SynthesisResult, synthesize
from gradmm.tasks import Task, tokenize_task


@dataclass(frozen=True)
class ComparisonConfig:
    """Settings of a comparison; the seeds in `synthesis` and `finetuning` give way to the comparison's.

    Attributes:
        n_real: real examples that gradmm's Release is made of, all classes together.
        space: the parameters whose gradients are matched, a name in `spaces.SPACES` that needs no public texts; None
            takes what suits the search.
        synthesis: its n_synthetic is the budget of every method but "none", "all_real" and "real".
        finetuning: the same for every method, all real texts included: equal steps, not equal passes.
        sampling: of the zero-shot and few-shot texts; None: Sampling's defaults at the synthesis's temperature.
        max_test: test examples used at most, the same for all seeds; None uses all.
        similarity_steps: steps of training on the real examples after which gradients are compared, at the last of the
            learning rates. None compares no gradients: ().
        second: another model for a second perplexity.
        learners: further models, of any architecture and tokenizer, that are trained and judged on the same examples;
            see `Comparison.on`.
        pools: for some seeds the texts that these settings would write, if another comparison or synthesis wrote them,
            kept or not: gradmm chooses from them. Others would make other results without a word.
        workers: processes on the CPU that share the runs and the threads; None takes two on a CPU where torch has two
            threads or more, else one. Results are equal to the last bit where the number of threads of each is.
    """

    n_real: int = 50
    space: str | None = None
    synthesis: SynthesisConfig = SynthesisConfig()
    finetuning: FinetuneConfig = FinetuneConfig()
    sampling: Sampling | None = None
    max_test: int | None = None
    similarity_steps: tuple[int, ...] = (0, 10, 50)
    second: Model | None = field(default=None, repr=False)
    learners: Sequence[Model] = field(default=(), repr=False)
    pools: Mapping[int, Iterable] = field(default_factory=dict, repr=False)
    workers: int | None = 1

    def __post_init__(self) -> None:
        plain_fields(self)
        for name, kind in (("synthesis", SynthesisConfig), ("finetuning", FinetuneConfig)):
            require_type(getattr(self, name), kind, f"a comparison's {name}", f"give a {kind.__name__}")
        require_type(self.sampling, Sampling | None, "a comparison's sampling", "give a Sampling")
        require_whole(self.n_real, "n_real", 1)
        require(
            self.space is None or (isinstance(self.space, str) and self.space in SPACES),
            f"the space {short_repr(self.space)} is not known: use one of {', '.join(SPACES)}",
        )
        steps, last = self.similarity_steps, self.finetuning.steps
        require(
            isinstance(steps, list | tuple) and all(is_whole(step) and 0 <= step <= last for step in steps),
            f"similarity_steps = {short_repr(steps)}, each must be a whole number from 0 to the fine-tuning's "
            f"{last} steps: give such as (0, {last})",
        )
        for name, value in (("max_test", self.max_test), ("workers", self.workers)):
            if value is not None:
                require_whole(value, name, 1)
        for one in (*([] if self.second is None else [self.second]), *self.learners):
            require_model(one)
        require_type(self.pools, Mapping, "the pools", "give a mapping from seeds to texts")
        object.__setattr__(self, "similarity_steps", tuple(steps))
        object.__setattr__(self, "learners", tuple(self.learners))

    @property
    def release_space(self) -> str:
        """`space`, or what suits the search."""
        return self.space or self.synthesis.space


def candidates(rows: Iterable, task: Task) -> list[Example]:
    """A pool as Examples: all texts to choose from, whether or not another choice kept them; none that is empty."""
    rows = [row if isinstance(row, Example) else {**row, "kept": True} for row in rows]
    return check_examples((row for row in rows if isinstance(row, Example) or row.get("text")), task, "pool text")


@dataclass(frozen=True, eq=False)
class Experiment:
    """What all methods and seeds share.

    Attributes:
        coresets: the examples of the methods that draw nothing, chosen once.
        settings: SHA-256 of all that a record depends on but its method and seed.
        folder: None keeps everything in memory.
    """

    model: Model
    task: Task
    splits: Splits
    config: ComparisonConfig
    coresets: dict[str, list[Example]]
    settings: str
    folder: Path | None

    def load(self, method: str, seed: int) -> dict | None:
        """A finished record, or None.

        Raises:
            UserError: the record there was made with other settings.
        """
        place = self._place(method, seed)
        if place is None or not place.exists():
            return None
        record = files.read_json(place, files.MAX_TEXT_BYTES)
        require(
            isinstance(record, dict) and record.get("settings") == self.settings,
            f"{place} was made with other settings than its folder: remove it and run again",
        )
        return record

    def save(self, record: dict) -> None:
        """Keep a finished record, if there is a folder."""
        if place := self._place(record["method"], record["seed"]):
            files.write_json(place, record)

    def _place(self, method: str, seed: int) -> Path | None:
        return None if self.folder is None else self.folder / "records" / f"{method}-seed{seed}.json"


@dataclass(frozen=True, eq=False)
class SeedRun:
    """What every method of one seed is given; real examples, Releases and texts are made once, when asked for."""

    experiment: Experiment
    seed: int

    @property
    def synthesis(self) -> SynthesisConfig:
        """The settings with this seed."""
        return replace(self.experiment.config.synthesis, seed=self.seed)

    @property
    def sampling(self) -> Sampling:
        """How zero-shot and few-shot texts are drawn."""
        return self.experiment.config.sampling or Sampling(temperature=self.synthesis.temperature)

    @cached_property
    def real(self) -> list[Example]:
        """The real examples."""
        one = self.experiment
        return sample_examples(one.splits.train, one.config.n_real, one.task, self.seed)

    @cached_property
    def release(self) -> Release:
        """Their exact gradients."""
        one, space = self.experiment, self.experiment.config.release_space
        return release(one.model, one.task, self.real, space=space, cache=one.folder, progress=False)

    @cached_property
    def blank(self) -> Release:
        """A Release of zeros, which knows nothing of the real examples; of the head, whose gradients cost least."""
        return without_gradient(release(self.experiment.model, self.experiment.task, self.real, space="head"))

    @cached_property
    def written(self) -> SynthesisResult:
        """What gradmm wrote for the Release."""
        return self._synthesize("gradmm", self.release, self.synthesis)

    @cached_property
    def matched(self) -> list[Example]:
        """The texts whose gradients match the Release."""
        if self.seed in self.experiment.config.pools:
            return self.choose(self.pool, self.synthesis)
        return self._kept(self.written)

    @cached_property
    def pool(self) -> Sequence[Example]:
        """All texts that gradmm wrote, or what the experiment was given for them."""
        given = self.experiment.config.pools.get(self.seed)
        if given is not None:
            return list(given)
        rows = self.written.candidates.to_list()
        self._perplexities.update((row["text"], row["perplexity"]) for row in rows)
        return _examples_of(rows)

    @cached_property
    def own_texts(self) -> list[str]:
        """What the model writes from the public prompts: over these its preference for some label is taken."""
        one = self.experiment
        return own_texts(one.model, tokenize_task(one.task, one.model.tokenizer), cache=one.folder)

    @cached_property
    def matchings(self) -> dict[str, Matching]:
        """The real examples as targets at each learner that was asked so far, by its name."""
        return {}

    @cached_property
    def _perplexities(self) -> dict[str, float]:
        """Of the texts that were read so far."""
        return {}

    def write(self, name: str, target: Release, config: SynthesisConfig) -> list[Example]:
        """The texts that gradmm keeps for another target; a pool, which depends on no target, is not written again."""
        if config.search != "pool":
            return self._kept(self._synthesize(name, target, config))
        return self.among(self.pool, target, config)

    def choose(self, pool: Sequence[Example], config: SynthesisConfig) -> list[Example]:
        """Those of any examples that gradmm keeps for the Release."""
        return self.among(pool, self.release, config)

    def among(self, pool: Sequence[Example], target: Release, config: SynthesisConfig) -> list[Example]:
        """Those of any examples that gradmm keeps for another target."""
        plan = Plan.of(self.experiment.model, self.experiment.task, target, config)
        new = [text for text in dict.fromkeys(one.text for one in pool) if text and text not in self._perplexities]
        self._perplexities.update(zip(new, perplexities(plan.model, new), strict=True))
        kept = plan.selector.keep(pool, [self._perplexities.get(one.text, math.inf) for one in pool])
        return check_examples(kept, self.experiment.task)

    def _synthesize(self, name: str, target: Release, config: SynthesisConfig) -> SynthesisResult:
        """A synthesis; continued where it was interrupted."""
        one = self.experiment
        folder = None if one.folder is None else _synthesis_folder(one.folder, name, self.seed)
        return synthesize(one.model, one.task, target, config, folder, progress=False)

    def _kept(self, found: SynthesisResult) -> list[Example]:
        return check_examples([row for row in found.candidates.to_list() if row["kept"]], self.experiment.task)


def written_texts(folder: Path, seeds: Sequence[int]) -> dict[int, list[Example]]:
    """What gradmm wrote in a finished comparison's folder with each seed, kept or not: see `ComparisonConfig.pools`."""
    places = {seed: _synthesis_folder(folder, "gradmm", seed) / "synthetic.jsonl" for seed in seeds}
    return {seed: _examples_of(files.read_json_lines(place)) for seed, place in places.items()}


def _synthesis_folder(folder: Path, name: str, seed: int) -> Path:
    return folder / "synthesis" / f"{name}-seed{seed}"


def _examples_of(rows: Iterable[dict]) -> list[Example]:
    return [Example(row["text"], row["label"]) for row in rows]


def exact_targets(target: Release) -> list[FactorTarget]:
    """The targets of a Release without noise.

    Raises:
        UserError: a Release with noise.
    """
    found = [one for one in target.targets if isinstance(one, FactorTarget)]
    require(len(found) == len(target.targets), "the Release holds noise: give one that was made without epsilon")
    return found


def without_gradient(target: Release) -> Release:
    """An exact Release with every target zero."""
    zeros = []
    for pairs in (one.factors for one in exact_targets(target)):
        zero = Factors(torch.zeros_like(pairs.delta[:1]), torch.zeros_like(pairs.hidden[:1]), pairs.bias)
        zeros.append(FactorTarget(zero))
    return replace(target, targets=tuple(zeros), examples="")
