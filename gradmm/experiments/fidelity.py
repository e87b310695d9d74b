r"""How much of the clean gradient survives a release, and the control that holds noise alone: experiments on private data.

Knows the private texts; its figures are outside every privacy guarantee, so publish them for public data alone. With S
the clean sum of clipped gradients in d coordinates and noise N(0, sigma^2) on each, the cosine of S + noise to S is about

    |S| / sqrt(|S|^2 + d sigma^2)

(the noise's length concentrates, its part along S averages out: close for d of ten or more, a little low below). The
class sums are mostly the bias between the labels times the mean hidden state, which all texts share; what sets the classes
apart, and what balanced training follows, is the *contrast*: the sum over classes with hidden states taken from their
mean, sum_i w_i delta_i (h_i - mean h)^T with w_i the clip's factor. Letters: n examples in all, C classes, R rows and r
directions of the release space, D hidden width.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gradmm.errors import require
from gradmm.examples import check_examples
from gradmm.gradients import Factors, Head, Space, head_factors
from gradmm.mechanism import LedgerEntry, clip_scale, noised_sums, plan_entry, seeded_bits
from gradmm.models import Model, require_model
from gradmm.privacy import Release
from gradmm.tasks import Task, TaskTokens, tokenize_task

ROWS_AT_ONCE = 256  # texts whose (V,) deltas are held at once


def expected_cosine(signal: float, coordinates: int, sigma: float) -> float:
    """The cosine of a vector of length `signal` to itself with noise on every coordinate, to first order."""
    return signal / math.sqrt(signal**2 + coordinates * sigma**2)


def fidelity(
    model: Model,
    task: Task,
    examples: Iterable,
    sizes: Sequence[int],
    spaces: Mapping[str, Space],
    epsilons: Sequence[float],
    delta: float,
    clip: float = 1.0,
    relation: str = "replace-one",
) -> list[dict]:
    """What is left of target and contrast, computed from the clean sums and sigma with no release.

    Args:
        examples: the first sizes[i] / C of each class are used for sizes[i].
        sizes: n, ascending.
        spaces: name -> coordinates of the gradient of the loss over all tokens, `spaces.release_space` of HEAD_SPACES.
        epsilons, delta, clip, relation: as for `privacy.release`, exact calibration.

    Returns:
        One row for each space, size and epsilon: coordinates (of one class), sigma, signal (length of a class's clean sum),
        noise (expected length of its noise), target (expected cosine of a class's noised sum to the clean one, mean over
        classes), contrast (the same of the contrast), kept (cosine of the space's clean contrast to that of unclipped
        gradients on the label rows) and useful (contrast times kept).

    Raises:
        UserError: sizes that do not ascend or exceed the examples of a class.
    """
    require_model(model)
    examples = check_examples(examples, task, "example")
    classes = [[e for e in examples if e.label == label] for label in range(len(task.labels))]
    counts = [size // len(classes) for size in sizes]
    require(
        counts == sorted(counts) and counts[:1] > [0] and counts[-1] <= min(map(len, classes)),
        f"sizes = {list(sizes)} for classes of {[len(members) for members in classes]}: give ascending sizes that the classes allow",
    )
    tokens = tokenize_task(task, model.tokenizer)
    rows = torch.tensor(tokens.labels, device=model.device)
    measured = {**{name: (space, clip) for name, space in spaces.items()}, _EXACT: (Space(rows), math.inf)}
    sums = {name: [_Sums()] * len(classes) for name in measured}
    found = []
    for begin, count, size in zip([0, *counts], counts, sizes, strict=False):
        for label, members in enumerate(classes):
            for factors in _gradients(model, tokens, [example.text for example in members[begin:count]], label):
                for name, (space, most) in measured.items():
                    sums[name][label] = sums[name][label].plus(space.restrict(factors), most)
        exact = _contrast(sums[_EXACT])
        for name, space in spaces.items():
            kept = _cosine(_on_label_rows(_contrast(sums[name]), space, rows), exact)
            entries = [plan_entry("sums", name, epsilon, delta, relation, clip, "exact", len(sums[name][0].flat)) for epsilon in epsilons]
            found += [{"space": name, "n": size, **_figures(sums[name], entry, kept)} for entry in entries]
    return found


_EXACT = "label rows, unclipped"


@dataclass(frozen=True)
class _Sums:
    """Sums over a class: weighted gradients (R, r), weighted deltas (R,), hidden states (r,), texts; float64."""

    weight: Tensor | float = 0.0
    delta: Tensor | float = 0.0
    hidden: Tensor | float = 0.0
    count: int = 0
    bias: bool = False

    def plus(self, factors: Factors, clip: float) -> "_Sums":
        """With more texts."""
        delta = factors.delta.double() * clip_scale(factors, clip)[:, None]
        hidden = factors.hidden.double()
        weight = self.weight + delta.mT @ hidden
        return _Sums(weight, self.delta + delta.sum(0), self.hidden + hidden.sum(0), self.count + len(delta), factors.bias)

    @property
    def flat(self) -> Tensor:
        """All that is released of the class."""
        return torch.cat([self.weight.flatten(), self.delta]) if self.bias else self.weight.flatten()


def _contrast(sums: Sequence[_Sums]) -> Tensor:
    """The sum over classes with hidden states taken from their mean: (R, r)."""
    mean = sum(part.hidden for part in sums) / sum(part.count for part in sums)
    return sum(part.weight for part in sums) - torch.outer(sum(part.delta for part in sums), mean)


def _gradients(model: Model, tokens: TaskTokens, texts: Sequence[str], label: int) -> Iterator[Factors]:
    """The texts' gradients of the whole head, block by block."""
    head = Head(model.head_weight, model.head_bias)
    for begin in range(0, len(texts), ROWS_AT_ONCE):
        hidden = model.hidden_of([tokens.sequence(text) for text in texts[begin : begin + ROWS_AT_ONCE]])
        yield head_factors(hidden, torch.full((len(hidden),), tokens.labels[label], device=hidden.device), head)


def _on_label_rows(value: Tensor, space: Space, rows: Tensor) -> Tensor:
    """A matrix of a space in the coordinates of the label rows: (R, r) -> (C, D)."""
    value = value[rows] if space.rows is None else value
    return value if space.basis is None else value @ space.basis.to(value).mT


def _cosine(a: Tensor, b: Tensor) -> float:
    return float((a * b).sum() / (a.norm() * b.norm()).clamp_min(torch.finfo(a.dtype).tiny))


def _figures(sums: Sequence[_Sums], entry: LedgerEntry, kept: float) -> dict:
    signals, size, clean = [float(part.flat.norm()) for part in sums], entry.coordinates, _contrast(sums)
    contrast = expected_cosine(float(clean.norm()), clean.numel(), entry.sigma * math.sqrt(len(sums)))
    return {
        "epsilon": entry.epsilon,
        "coordinates": size,
        "sigma": entry.sigma,
        "signal": sum(signals) / len(signals),
        "noise": entry.sigma * math.sqrt(size),
        "target": sum(expected_cosine(signal, size, entry.sigma) for signal in signals) / len(signals),
        "contrast": contrast,
        "kept": kept,
        "useful": contrast * kept,
    }


def noise_only(release: Release, seed: int) -> Release:
    """A Release of the same shape and noise with no example in it: what can its texts do that the real ones' cannot?

    Raises:
        UserError: a Release without noise.
    """
    require(bool(release.ledger), "the Release holds no noise: make it with epsilon")
    nothing = []
    for target in release.targets:
        delta, hidden = (torch.zeros(1, size, dtype=target.weight.dtype) for size in target.weight.shape)
        nothing.append(Factors(delta, hidden, target.bias is not None))
    targets = noised_sums(nothing, release.ledger[-1], seeded_bits(seed))
    statement = f"not private: a control that holds noise alone, of the seed {seed}, and nothing of the real examples"
    return replace(release, targets=targets, private=False, statement=statement).to(release.targets[0].weight.device)
