"""What a comparison of training sets shares: its settings, its experiment, and the seed_run of one seed.

Reads real examples; knows no method. Letters: M test examples.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import torch

from gradmm import files
from gradmm.config import FinetuneConfig, SynthesisConfig
from gradmm.data import Example, Splits, check_examples, sample_examples
from gradmm.errors import is_whole, plain_fields, require, require_type, short_repr
from gradmm.generation import Sampling
from gradmm.gradients import Factors, FactorTarget, Target
from gradmm.models import Model
from gradmm.plan import Plan
from gradmm.privacy import Release, release
from gradmm.spaces import SPACES
from gradmm.synthesis import SynthesisResult, synthesize
from gradmm.tasks import Task


@dataclass(frozen=True)
class ComparisonConfig:
    """Settings of a comparison; the seeds in `synthesis` and `finetuning` give way to the comparison's.

    Attributes:
        n_real: real examples that gradmm's Release is made of, all classes together.
        space: the parameters whose gradients are matched, a name in `spaces.SPACES` that needs no public texts; None
            takes what suits the search.
        synthesis: its n_synthetic is the budget of every method but "none", "all_real" and "real".
        finetuning: the same for every method, all real texts included: equal steps, not equal passes.
        sampling: of the zero-shot and few-shot texts.
        max_test: test examples used at most, the same for all seeds; None uses all.
        similarity_steps: steps of training on the real examples after which gradients are compared, at the last of the
            learning rates; at most the fine-tuning's own. None compares no gradients: ().
    """

    n_real: int = 50
    space: str | None = None
    synthesis: SynthesisConfig = SynthesisConfig()
    finetuning: FinetuneConfig = FinetuneConfig()
    sampling: Sampling = Sampling()
    max_test: int | None = None
    similarity_steps: tuple[int, ...] = (0, 10, 50)

    def __post_init__(self) -> None:
        plain_fields(self)
        for name, kind in (("synthesis", SynthesisConfig), ("finetuning", FinetuneConfig), ("sampling", Sampling)):
            require_type(getattr(self, name), kind, f"a comparison's {name}", f"give a {kind.__name__}")
        require(
            is_whole(self.n_real) and self.n_real >= 1,
            f"n_real = {short_repr(self.n_real)}, it must be a whole number of at least 1: give such as 50",
        )
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
        require(
            self.max_test is None or (is_whole(self.max_test) and self.max_test >= 1),
            f"max_test = {short_repr(self.max_test)}, it must be a whole number of at least 1, or None for all",
        )
        object.__setattr__(self, "similarity_steps", tuple(steps))

    @property
    def release_space(self) -> str:
        """`space`, or what suits the search."""
        return self.space or self.synthesis.space


@dataclass(frozen=True, eq=False)
class Experiment:
    """What all methods and seeds share.

    Attributes:
        coresets: the examples of the methods that draw nothing, chosen once.
        settings: SHA-256 of all that a record depends on but its method and seed.
        folder: None keeps everything in memory.
        second: a model that reads the texts but did not write them, or None.
        learners: further models that are trained on every method's examples.
        pools: for some seeds the texts that gradmm would write.
    """

    model: Model
    task: Task
    splits: Splits
    config: ComparisonConfig
    coresets: dict[str, list[Example]]
    settings: str
    folder: Path | None
    second: Model | None
    learners: tuple[Model, ...] = ()
    pools: Mapping[int, Sequence[Example]] = field(default_factory=dict)

    def place(self, method: str, seed: int) -> Path:
        """Where the record of a method and seed is written."""
        return self.folder / "records" / f"{method}-seed{seed}.json"

    def load(self, method: str, seed: int) -> dict | None:
        """A finished record, or None.

        Raises:
            UserError: the record there was made with other settings.
        """
        if self.folder is None or not self.place(method, seed).exists():
            return None
        record = files.read_json(self.place(method, seed), files.MAX_TEXT_BYTES)
        require(
            isinstance(record, dict) and record.get("settings") == self.settings,
            f"{self.place(method, seed)} was made with other settings than its folder: remove it and run again",
        )
        return record


@dataclass(frozen=True, eq=False)
class SeedRun:
    """What every method of one seed is given; real examples, Releases and gradmm's texts are made once, when asked
    for.
    """

    experiment: Experiment
    seed: int

    @property
    def synthesis(self) -> SynthesisConfig:
        """The settings with this seed."""
        return replace(self.experiment.config.synthesis, seed=self.seed)

    @cached_property
    def real(self) -> list[Example]:
        """The real examples."""
        return sample_examples(
            self.experiment.splits.train, self.experiment.config.n_real, self.experiment.task, self.seed
        )

    @cached_property
    def release(self) -> Release:
        """Their exact gradients."""
        space, cache = self.experiment.config.release_space, self.experiment.folder
        return release(self.experiment.model, self.experiment.task, self.real, space=space, cache=cache, progress=False)

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
        return (
            self.choose(self.pool, self.synthesis) if self.seed in self.experiment.pools else self._kept(self.written)
        )

    @cached_property
    def pool(self) -> Sequence[Example]:
        """All texts that gradmm wrote, or what the experiment was given for them."""
        written = self.experiment.pools.get(self.seed)
        return (
            [Example(row["text"], row["label"]) for row in self.written.dataset.to_list()]
            if written is None
            else written
        )

    def write(self, name: str, target: Release, config: SynthesisConfig) -> list[Example]:
        """The texts that gradmm keeps for another target; a pool, which depends on no target, is not written again."""
        if config.search != "pool":
            return self._kept(self._synthesize(name, target, config))
        return self._chosen(self.pool, target, config)

    def choose(self, pool: Sequence[Example], config: SynthesisConfig) -> list[Example]:
        """Those of any examples that gradmm keeps for the Release."""
        return self._chosen(pool, self.release, config)

    def _chosen(self, pool: Sequence[Example], target: Release, config: SynthesisConfig) -> list[Example]:
        plan = Plan.of(self.experiment.model, self.experiment.task, target, config)
        return check_examples(plan.selector.keep(pool), self.experiment.task)

    def _synthesize(self, name: str, target: Release, config: SynthesisConfig) -> SynthesisResult:
        """A synthesis; continued where it was interrupted."""
        folder = None if self.experiment.folder is None else _synthesis_folder(self.experiment.folder, name, self.seed)
        return synthesize(self.experiment.model, self.experiment.task, target, config, folder, progress=False)

    def _kept(self, found: SynthesisResult) -> list[Example]:
        return check_examples([row for row in found.dataset.to_list() if row["kept"]], self.experiment.task)


def written_texts(folder: Path, seeds: Sequence[int]) -> dict[int, list[Example]]:
    """What gradmm wrote in a finished comparison's folder with each seed, kept or not: see `Experiment.pools`."""
    places = {seed: _synthesis_folder(folder, "gradmm", seed) / "synthetic.jsonl" for seed in seeds}
    return {
        seed: [Example(row["text"], row["label"]) for row in files.read_json_lines(place)]
        for seed, place in places.items()
    }


def _synthesis_folder(folder: Path, name: str, seed: int) -> Path:
    return folder / "synthesis" / f"{name}-seed{seed}"


def without_gradient(target: Release) -> Release:
    """The Release with every target zero."""
    return replace(target, targets=tuple(_zero(one.factors) for one in target.targets))


def _zero(pairs: Factors) -> Target:
    return FactorTarget(Factors(torch.zeros_like(pairs.delta[:1]), torch.zeros_like(pairs.hidden[:1]), pairs.bias))
