"""What a run derives from its inputs before it draws or computes anything.

Letters: K groups, B examples of a group, L tokens, C classes.
"""

import math
from dataclasses import asdict, dataclass, replace
from functools import cached_property

import torch

from gradmm import admm, sharding
from gradmm.config import SynthesisConfig
from gradmm.data import equal_counts
from gradmm.device import COMPILED_FROM
from gradmm.errors import require
from gradmm.generation import TOGETHER
from gradmm.matching import Matching
from gradmm.models import Model, kind_of
from gradmm.privacy import Release, check_context
from gradmm.projection import DecodingConfig, TokenTables
from gradmm.selection import Selector
from gradmm.spaces import BODY_SPACES, to_match
from gradmm.tasks import Task, TaskTokens, tokenize_task, warn_of_equal_prompts

# By the kind of device: rows of a projection. More of them share what a step costs whatever its size, the reading of
# the weights and the calls, but hold more of the solver's state and more keys and values.
TEXTS_PER_BATCH = {"cpu": 100, "other": 256}
MIN_TOKENS = 4  # of a text that may end early
# By the weights' type: groups of a pass on a CPU, 1 in others. In bfloat16 two share its calls and fit beside small
# weights.
GROUPS_PER_PASS = {torch.bfloat16: 2}


@dataclass(frozen=True)
class Plan:
    """Everything that a run derives from its inputs before it draws or computes anything.

    Attributes:
        length: tokens of a text, those that its prompt begins it with included.
        classes: the label number of each group.
        per_class: how many texts of each class are kept.
        batch: groups of a unit of work.
        solver: the solver's settings, with the groups that the model sees at once; None where its device says how many.
    """

    model: Model
    task: Task
    tokens: TaskTokens
    release: Release
    config: SynthesisConfig
    matching: Matching
    decoding: DecodingConfig
    length: int
    classes: tuple[int, ...]
    per_class: tuple[int, ...]
    batch: int
    solver: admm.Config

    @staticmethod
    def of(model: Model, task: Task, release: Release, config: SynthesisConfig) -> "Plan":
        """Derive it.

        Raises:
            UserError: what `check_request` refuses.
        """
        tokens, count = tokenize_task(task, model.tokenizer), len(task.labels)
        check_request(task, release.space_name, config, private=bool(release.ledger))
        per_class = tuple(equal_counts(config.n_synthetic, count))
        classes = tuple(
            label
            for label in range(count)
            for _ in range(math.ceil(per_class[label] * config.oversample / config.group_size))
        )
        length, decoding = _decoding(model, tokens, config, release.length)
        batch, together = work_units(model, config, len(classes))
        targets, space = to_match(release.space, release.targets)
        return Plan(
            model=model,
            task=task,
            tokens=tokens,
            release=release,
            config=config,
            matching=Matching(model, tokens, targets, space, config.distance, decoding.end),
            decoding=decoding,
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
            "release": {**_known(self.release), "space": self.release.space_name,
                        "private": self.release.private, "statement": self.release.statement,
                        "ledger": [asdict(entry) for entry in self.release.ledger]},
            "length": self.length,
            "groups": len(self.classes),
            "groups_per_batch": self.batch,
            "groups_per_pass": self.solver.groups_per_pass,
            "texts_per_unit": TOGETHER[kind_of(self.model.device)],
        }  # fmt: skip

    def check_processes(self) -> None:
        """Refuse more processes than there are units of work for.

        Raises:
            UserError: there are more.
        """
        count, units = sharding.launched()[1], len(self.batches())
        require(
            self.config.search == "pool" or count <= units,
            f"{count} processes would share {units} units of work of up to {self.batch} groups: set groups_per_batch "
            f"to at most {max(1, len(self.classes) // count)}, or launch {units} at most",
        )

    @cached_property
    def tables(self) -> TokenTables:
        """What projections look tokens up in; a pool makes none."""
        return TokenTables.of(self.model)

    @property
    def selector(self) -> Selector:
        """By what the texts are chosen."""
        config = self.config
        return Selector(
            self.model,
            self.tokens,
            self.matching,
            self.per_class,
            config.filter,
            config.ranking,
            config.perplexity_weight,
        )

    @property
    def written_per_class(self) -> tuple[int, ...]:
        """How many texts of each class a pool has."""
        return tuple(math.ceil(count * self.config.oversample) for count in self.per_class)

    @property
    def compiles(self) -> bool:
        """Whether the inner steps are so many that compiled layers pay, on a GPU."""
        steps = self.solver.outer_steps * self.solver.inner_steps
        return self.model.device.type == "cuda" and steps >= COMPILED_FROM

    def batches(self) -> list[range]:
        """The numbers of the groups of each batch."""
        return [
            range(first, min(first + self.batch, len(self.classes)))
            for first in range(0, len(self.classes), self.batch)
        ]


def _known(release: Release) -> dict[str, str]:
    """By what a Release is known again: exact gradients by their examples, noise by itself."""
    return {"examples": release.examples} if release.examples else {"fingerprint": release.fingerprint}


def check_request(
    task: Task,
    space_name: str,
    config: SynthesisConfig,
    private: bool,
    model: Model | None = None,
    length: int | None = None,
) -> None:
    """Refuse a synthesis that no targets could make possible: to call before a private release is paid for.

    Warns where a model is to write and classes have the same generation prompt: reading gradients may take an hour.

    Args:
        task: the task.
        space_name: the release's space.
        config: the settings.
        private: whether the release has a ledger.
        model: None leaves out what depends on the model.
        length: the release's, tokens of a text; None where it is not known yet.

    Raises:
        UserError: a space that the search cannot match; fewer texts than classes; a distance that says
            nothing of a private release; with a model a length beyond its context, more candidates than it has tokens,
            or no end token where one is needed.
    """
    count = len(task.labels)
    require(
        config.n_synthetic >= count,
        f"n_synthetic = {config.n_synthetic}, but {count} classes need one text each: ask for {count} or more",
    )
    require(
        config.search == "pool" or space_name not in BODY_SPACES,
        f"targets in the space {space_name!r} are matched by choosing texts: set search = 'pool', or "
        "release in another space",
    )
    require(
        config.distance == "cosine" or not private,
        f"distance = {config.distance!r} compares lengths, and those of a private release, noised sums of clipped "
        "gradients, say nothing: set distance = 'cosine'",
    )
    if config.search == "pool":
        warn_of_equal_prompts(task)
    if model is not None:
        _decoding(model, tokenize_task(task, model.tokenizer), config, length or 1)


def _decoding(model: Model, tokens: TaskTokens, config: SynthesisConfig, length: int) -> tuple[int, DecodingConfig]:
    """The tokens of a text, those that its prompt begins it with included, and what may be written of it.

    Args:
        length: the release's.
    """
    # Texts that are moved have in them what their prompts begin them with.
    opened = max(map(len, tokens.openings)) if config.search == "admm" else 0
    length = opened + (config.length or length)
    check_context(model, tokens, length, opened)
    top_k = config.top_k if config.search == "admm" else 1  # a pool projects nothing
    end = _end_token(model, config)
    return length, DecodingConfig(config.projection, top_k, model.vocabulary, end, min(MIN_TOKENS, length))


def _end_token(model: Model, config: SynthesisConfig) -> int | None:
    if config.search == "pool" or config.init != "generated":
        return None
    require(len(model.ends) > 0, f"{model.name} has no end-of-text token: set init = 'normal'")
    return model.ends[0]


def work_units(model: Model, config: SynthesisConfig, groups: int) -> tuple[int, int | None]:
    """The groups of a batch, and the groups that the model sees at once in the solver's inner steps.

    Both follow from settings and shapes alone. Batches are as equal as can be, with about `TEXTS_PER_BATCH` at most. On
    a CPU an inner step sees one group, so that nothing that is computed of a group depends on the others, to the last
    bit; in bfloat16, where that does not hold anyway, two, and a batch has no half pass but the last one. Elsewhere it
    sees as many as the memory holds, which is found out there: None.

    Args:
        groups: all groups of the run.
    """
    kind = kind_of(model.device)
    most = max(1, TEXTS_PER_BATCH[kind] // config.group_size)
    batch = min(groups, config.groups_per_batch or math.ceil(groups / math.ceil(groups / most)))
    if kind != "cpu":
        return batch, None
    together = min(batch, GROUPS_PER_PASS.get(model.dtype, 1))
    whole = math.ceil(batch / together) * together
    return batch if config.groups_per_batch else min(groups, whole), together
