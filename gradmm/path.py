"""Gradients at several points of a fine-tuning path: what training follows after its first step, too.

The path is public. Copies of the model are trained on texts that the model writes from the task's prompts, labelled by these,
so it is a function of the model, the task and a fixed seed; whoever loads a Release walks it again. Knows no real text.
Letters: K points, M linear maps, r rank, C classes, N texts.
"""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from gradmm.classification import Encoded, label_preference
from gradmm.errors import require
from gradmm.generation import prompted_texts
from gradmm.gradients import Factors
from gradmm.models import Model
from gradmm.seeds import stream
from gradmm.sketch import BodySketch
from gradmm.tasks import TaskTokens
from gradmm.training import FinetuneConfig, train_at_rate, trainable_copy

STEPS = (0, 10, 30)  # of training, at which a gradient is taken; the first point is the model itself
TEXTS = 32  # of each class, to train on
SETTINGS = FinetuneConfig(steps=STEPS[-1], eval_every=10, patience=None)


@dataclass(frozen=True, eq=False)
class PathSketch(BodySketch):
    """The coordinates of sketched gradients of every linear map at K points of the path, one point after the other.

    Attributes:
        preference: (K, C) the preference, as in `BodySketch`, of the model at each point.
        rank: r.
        prompts: names the prompts from which the path was walked; a task's fingerprint does not hold them.
    """

    prompts: int = 0

    @classmethod
    def of(cls, model: Model, tokens: TaskTokens, texts: Sequence[str], **options) -> "PathSketch":
        """With the preferences over public texts."""
        preferences = [label_preference(point, tokens, texts) for point in points(model, tokens)]
        return cls(torch.stack(preferences), prompts=_named(tokens), **options)

    def at(self, place: int) -> BodySketch:
        """The coordinates at one point."""
        return BodySketch(self.preference[place], self.rank)

    def size(self, model: Model) -> int:
        """How many numbers a sketch has: K M r^2."""
        return len(STEPS) * super().size(model)

    def factors(self, model: Model, tokens: TaskTokens, sequences: Sequence[Sequence[int]], classes: Sequence[int]) -> Factors:
        """As `BodySketch.factors`, of `model` and of the copies of it that the path leads to.

        Raises:
            UserError: a task with other prompts, from which another path is walked.
        """
        require(
            self.prompts == _named(tokens),
            "the targets in the space 'body_path' were made with other generation prompts than the task has: release again with this task",
        )
        parts = [self.at(place).factors(point, tokens, sequences, classes) for place, point in enumerate(points(model, tokens))]
        return replace(parts[0], hidden=torch.cat([part.hidden for part in parts], dim=1))


# A private release asks for the points once for every text; they go with the model that they belong to.
_WALKED: WeakKeyDictionary[Model, tuple[TaskTokens, tuple[Model, ...]]] = WeakKeyDictionary()


def points(model: Model, tokens: TaskTokens) -> tuple[Model, ...]:
    """The model as it is and as it is after each of STEPS of training on its own texts: K models, K - 1 of them copies.

    The training is that of `finetuning` with its default settings: the loss over the label tokens, the last of its rates.

    Raises:
        UserError: the training diverges.
    """
    if _WALKED.get(model, (None,))[0] != tokens:
        with torch.enable_grad():
            _WALKED[model] = (tokens, tuple(_walk(model, tokens)))
    return (model, *_WALKED[model][1])


def _named(tokens: TaskTokens) -> int:
    return stream(0, repr(tokens.prompts))


def _walk(model: Model, tokens: TaskTokens) -> Iterator[Model]:
    sequences = [tokens.sequence(text) for text in prompted_texts(model, tokens, TEXTS)]
    labels: Tensor = torch.arange(len(tokens.labels), device=model.device).repeat_interleave(TEXTS)
    data, trained, step = Encoded(sequences, labels), trainable_copy(model), 0
    for row in train_at_rate(trained, tokens, data, data, SETTINGS.learning_rates[-1], SETTINGS):
        step = row["step"]
        if step in STEPS[1:]:
            yield replace(trained, lm=copy.deepcopy(trained.lm).requires_grad_(False))
    require(step == STEPS[-1], f"training {model.name} on its own texts diverges after {step} steps: use another space than 'body_path'")
