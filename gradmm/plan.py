"""What a run derives from its inputs before it draws or computes anything.

Letters: K groups, B examples of a group, L tokens, C classes.
"""

import math
from dataclasses import asdict, dataclass, replace

import torch

from gradmm import admm, sharding
from gradmm.errors import require
from gradmm.matching import Matching
from gradmm.models import Model, kind_of
from gradmm.privacy import Release
from gradmm.projection import DecodingConfig, TokenTables, gathered_numbers
from gradmm.selection import Selector
from gradmm.settings import SynthesisConfig
from gradmm.sizing import ModelShape, Work, expected_bytes, groups_at_once
from gradmm.sketch import BodySketch
from gradmm.tasks import Task, TaskTokens, tokenize_task

# By the kind of device: rows of a projection. More of them share what a step costs whatever its size, the reading of
# the weights
# and the calls, but hold more of the solver's state and more keys and values.
TEXTS_PER_BATCH = {"cpu": 100, "other": 256}
MIN_TOKENS = 4  # of a text that may end early
# By the weights' type: groups of a pass on a CPU. In bfloat16 two share its calls, and fit beside small weights.
GROUPS_PER_PASS = {torch.float64: 1, torch.float32: 1, torch.bfloat16: 2}


@dataclass(frozen=True)
class Plan:
    """Everything that a run derives from its inputs before it draws or computes anything.

    Attributes:
        length: tokens of a text, those that its prompt begins it with included.
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
    decoding: DecodingConfig
    tables: TokenTables
    length: int
    classes: tuple[int, ...]
    per_class: tuple[int, ...]
    batch: int
    solver: admm.Config

    @staticmethod
    def of(model: Model, task: Task, release: Release, config: SynthesisConfig) -> "Plan":
        """Derive it.

        Raises:
            UserError: fewer texts than classes, a length beyond the model's context, or no end token where one is
                needed.
        """
        tokens = tokenize_task(task, model.tokenizer)
        count = len(task.labels)
        require(
            config.n_synthetic >= count,
            f"n_synthetic = {config.n_synthetic}, but {count} classes need one text each: ask for {count} or more",
        )
        per_class = tuple(config.n_synthetic // count + (label < config.n_synthetic % count) for label in range(count))
        classes = tuple(
            label
            for label in range(count)
            for _ in range(math.ceil(per_class[label] * config.oversample / config.group_size))
        )
        require(
            config.search == "pool" or not isinstance(release.space, BodySketch),
            f"targets in the space {release.space_name!r} are matched by choosing texts: set search = 'pool', or "
            "release in another space",
        )
        # Texts that are moved have in them what their prompts begin them with.
        opened = max(map(len, tokens.openings)) if config.search == "admm" else 0
        length = opened + (config.length or release.length)
        _check_context(model, tokens, length, opened)
        end = _end_token(model, config)
        batch, together = work_units(
            model, len(tokens.start + tokens.prefix + tokens.suffix) + length, config, len(classes)
        )
        return Plan(
            model=model,
            task=task,
            tokens=tokens,
            release=release,
            config=config,
            matching=Matching(model, tokens, release.targets, release.space, config.distance, end),
            decoding=DecodingConfig(config.projection, config.top_k, model.vocabulary, end, min(MIN_TOKENS, length)),
            tables=TokenTables.of(model),
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
                        "statement": self.release.statement,
                            "ledger": [asdict(entry) for entry in self.release.ledger]},
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
            positions=len(self.tokens.start + self.tokens.prefix + self.tokens.suffix) + self.length,
            prompt=max(map(len, self.tokens.prompts)),
            batch=self.batch,
            together=self.solver.groups_per_pass,
            top_k=self.config.top_k,
            targets=sum(target.numbers for target in self.release.targets),
            gathered=gathered_numbers(self.model.device),
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
            f"{count} processes would share {units} units of work of up to {self.batch} groups: set "
            "groups_per_batch to at most "
            f"{max(1, len(self.classes) // count)}, or launch {units} at most",
        )

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

    def batches(self) -> list[range]:
        """The numbers of the groups of each batch."""
        return [
            range(first, min(first + self.batch, len(self.classes)))
            for first in range(0, len(self.classes), self.batch)
        ]


def _end_token(model: Model, config: SynthesisConfig) -> int | None:
    if not config.early_end:
        return None
    require(len(model.ends) > 0, f"{model.name} has no end-of-text token: set early_end = False and init = 'normal'")
    return model.ends[0]


def _check_context(model: Model, tokens: TaskTokens, length: int, opened: int) -> None:
    around = max(len(tokens.start + tokens.prefix + tokens.suffix), max(map(len, tokens.prompts)))
    require(
        around + length <= model.context,
        f"length = {length - opened} with a template or prompt of {around + opened} tokens, {model.name} reads "
        f"{model.context}: take a length of at most {model.context - around - opened}",
    )


def work_units(model: Model, positions: int, config: SynthesisConfig, groups: int) -> tuple[int, int]:
    """The groups of a batch, and the groups that the model sees at once in the solver's inner steps.

    Both follow from settings and shapes alone. Batches are as equal as can be, with about `TEXTS_PER_BATCH` at most. On
    a CPU an inner step sees one group, so that nothing that is computed of a group depends on the others, to the last
    bit; in bfloat16, where that does not hold anyway, two, and a batch has no half pass but the last one. Elsewhere it
    sees as many groups as keep the activations within the size of the weights, and at least one.

    Args:
        positions: tokens of a text with its template.
        groups: all groups of the run.
    """
    kind = kind_of(model.device)
    most = max(1, TEXTS_PER_BATCH[kind] // config.group_size)
    batch = min(groups, config.groups_per_batch or math.ceil(groups / math.ceil(groups / most)))
    if kind != "cpu":
        return batch, groups_at_once(ModelShape.of(model), positions, config.group_size, batch)
    together = min(batch, GROUPS_PER_PASS[model.dtype])
    whole = math.ceil(batch / together) * together
    return batch if config.groups_per_batch else min(groups, whole), together
