"""What a little more of one text, in a whole short training, does to the loss of others (MGD, arXiv 2503.13751).

The weights w of N texts are 1; step t takes the mean of w times the loss over a batch and moves theta by Adam without
decay, at one rate. Backwards from the last step, with lam the gradient of the other examples' loss in theta:

    alpha  <- lam through Adam's step, to the batch's gradient       closed form, element by element
    dw_i   += <alpha, gradient of text i> / batch size
    lam    <- lam + H alpha                                          H: second derivatives of the batch's loss

The last two are central differences along alpha. Letters: N texts, T steps.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from gradmm.classification import Encoded
from gradmm.models import Model, batches_by_length, pad_left
from gradmm.tasks import TaskTokens

DECAYS = 0.9, 0.999  # of Adam's moments
TINY = 1e-4  # beside the root; with Adam's usual 1e-8 gradients near zero, all but noise, decide the derivative
PIECE = 1024  # tokens of one pass
SPAN = 0.1  # how far the differences reach to each side, in steps of Adam

Weights = list[Tensor]


def metagradients(
    model: Model, tokens: TaskTokens, data: Encoded, others: Encoded, steps: Sequence[Sequence[int]], rate: float
) -> Tensor:
    """The derivative of the mean loss of `others`, after a training, in the weight of each of N texts: (N,).

    Args:
        model: a `trainable_copy`, or what else learns; left as it was.
        steps: the rows of `data` that each of the T steps takes.
    """
    learning = [weights for weights in model.lm.parameters() if weights.requires_grad]
    begin = [weights.detach().clone() for weights in learning]
    held: list[Weights] = []
    for rows in steps:
        held.append(_gradient(model, tokens, data, rows, learning)[0])
        _move_to(learning, begin, held, rate)
    lam = _gradient(model, tokens, others, range(len(others.sequences)), learning)[0]
    moved = [Moved(torch.zeros_like(weights), torch.zeros_like(weights)) for weights in begin]
    found = torch.zeros(len(data.sequences), dtype=begin[0].dtype)
    for step in reversed(range(len(steps))):
        by_weight = zip(moved, lam, zip(*held[: step + 1], strict=True), strict=True)
        alpha = [one.through_step(part, past, rate) for one, part, past in by_weight]
        _move_to(learning, begin, held[:step], rate)
        bent, slopes = _along(model, tokens, data, steps[step], learning, alpha, rate)
        found[list(steps[step])] += slopes / len(steps[step])
        lam = [one + more for one, more in zip(lam, bent, strict=True)]
    _move_to(learning, begin, [], rate)
    return found


@dataclass(frozen=True, eq=False)
class Moved:
    """What the end's loss owes to a weight's two moments at the step that was reached backwards."""

    first: Tensor
    second: Tensor

    def through_step(self, lam: Tensor, past: Sequence[Tensor], rate: float) -> Tensor:
        """Take these one step back, in place; gives what the loss owes to the step's gradient, the last of `past`."""
        (keep, keep_square), count = DECAYS, len(past)
        mean, square = moments(past)
        root = square.sqrt()
        self.first.sub_(lam * rate / (1 - keep**count) / (root + TINY))
        bend = lam * rate * mean / (1 - keep_square**count) / (2 * root * (root + TINY) ** 2)
        self.second.add_(torch.where(root > 0, bend, 0))
        owed = (1 - keep) * self.first + 2 * (1 - keep_square) * past[-1] * self.second
        self.first.mul_(keep)
        self.second.mul_(keep_square)
        return owed


def moments(past: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Adam's two moments of a weight's gradients so far, corrected for their start at zero."""
    found = []
    for keep, power in zip(DECAYS, (1, 2), strict=True):
        total = torch.zeros_like(past[0])
        for gradient in past:
            total.mul_(keep).add_(gradient**power, alpha=1 - keep)
        found.append(total / (1 - keep ** len(past)))
    return found[0], found[1]


@torch.no_grad()
def _move_to(learning: Weights, begin: Weights, held: Sequence[Weights], rate: float) -> None:
    """Give the weights the values that they have behind the steps of these gradients."""
    for weights, start, *gradients in zip(learning, begin, *held, strict=True):
        weights.copy_(start)
        for count in range(1, len(gradients) + 1):
            mean, square = moments(gradients[:count])
            weights.sub_(rate * mean / (square.sqrt() + TINY))


def _along(
    model: Model, tokens: TaskTokens, data: Encoded, rows: Sequence[int], learning: Weights, way: Weights, rate: float
) -> tuple[Weights, Tensor]:
    """How the gradient of the rows' mean loss, and the loss of each, change along a way, by central differences."""
    length = math.sqrt(sum(float(part.square().sum()) for part in way))
    reach = SPAN * rate * math.sqrt(sum(part.numel() for part in way)) / length if length else 1.0
    sides = []
    for shift in (reach, -2 * reach):
        with torch.no_grad():
            torch._foreach_add_(learning, way, alpha=shift)
        sides.append(_gradient(model, tokens, data, rows, learning))
    (up, higher), (down, lower) = sides
    return [(one - other) / (2 * reach) for one, other in zip(up, down, strict=True)], (higher - lower) / (2 * reach)


def _gradient(
    model: Model, tokens: TaskTokens, data: Encoded, rows: Sequence[int], learning: Weights
) -> tuple[Weights, Tensor]:
    """The gradient of the rows' mean loss, and each one's loss."""
    sequences, losses = [data.sequences[row] for row in rows], torch.zeros(len(rows), dtype=learning[0].dtype)
    for piece in batches_by_length(sequences, PIECE):
        ids, mask = pad_left([sequences[place] for place in piece])
        logits = model.logits_of(model.last_hidden(model.embed(ids), mask), tokens.labels)
        own = cross_entropy(logits, data.labels[[rows[place] for place in piece]], reduction="none")
        (own.sum() / len(rows)).backward()
        losses[piece] = own.detach().to(losses.dtype)
    gradient = [torch.zeros_like(weights) if weights.grad is None else weights.grad for weights in learning]
    for weights in learning:
        weights.grad = None
    return gradient, losses
