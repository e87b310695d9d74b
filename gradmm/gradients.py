r"""Gradients of the prompted classification loss and the distance between two of them.

Knows no text and no model files: it is given final hidden states, the head, and target gradients.
Letters: K groups, B examples of a group, n real examples, V rows of the head, D hidden width.

With h the final hidden state at the last position, p = softmax(W h + b) and delta = p - e_y, one example's gradient of
the cross-entropy is d/dW = delta h^T and d/db = delta. Inner products of such gradients need no V x D matrix:

    <G_target, G(X)> = 1/(B n) sum_{b,k} (delta_b . delta_k)(h_b . h_k)
    ||G(X)||^2       = 1/B^2   sum_{b,b'} (delta_b . delta_b')(h_b . h_b')

and for the bias the same with (h . h) replaced by 1. Source: Nguyen et al. 2025 (arXiv 2502.17607) for matching the
last layer; the identities follow from tr((a b^T)^T c d^T) = (a . c)(b . d).
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, reduce

import torch
from torch import Tensor
from torch.nn.functional import linear

from gradmm.errors import require

DISTANCES = ("cosine", "l2")
TINY = 1e-30


@dataclass(frozen=True)
class Head:
    """The rows of the output head over which the loss is taken.

    Attributes:
        weight: W, (V, D).
        bias: b, (V,), or None.
    """

    weight: Tensor
    bias: Tensor | None = None


@dataclass(frozen=True)
class Factors:
    """Gradients of single examples as factor pairs.

    Attributes:
        delta: softmax minus one-hot, (..., V).
        hidden: final hidden states, (..., D).
        bias: whether the head's bias is matched too.
    """

    delta: Tensor
    hidden: Tensor
    bias: bool = False

    def unsqueeze(self, dim: int) -> "Factors":
        """The same pairs with one more leading dimension."""
        return Factors(self.delta.unsqueeze(dim), self.hidden.unsqueeze(dim), self.bias)

    def __getitem__(self, index) -> "Factors":
        return Factors(self.delta[index], self.hidden[index], self.bias)


@dataclass(frozen=True)
class Space:
    """The coordinates in which gradients are compared: some rows of the head, some directions of hidden states.

    Attributes:
        rows: (R,) row numbers, or None for all V.
        basis: (D, r) with orthonormal columns, or None for all D.
    """

    rows: Tensor | None = None
    basis: Tensor | None = None

    def restrict(self, factors: Factors) -> Factors:
        """Factor pairs in this space: (..., V), (..., D) -> (..., R), (..., r)."""
        delta = factors.delta if self.rows is None else factors.delta[..., self.rows]
        hidden = factors.hidden if self.basis is None else factors.hidden @ self.basis.to(factors.hidden.dtype)
        return Factors(delta, hidden, factors.bias)

    def factors(self, hidden: Tensor, labels: Tensor, head: Head) -> Factors:
        """Gradients of the cross-entropy over the whole head in this space; arguments as `head_factors`."""
        return self.restrict(head_factors(hidden, labels, head))


def head_factors(hidden: Tensor, labels: Tensor, head: Head) -> Factors:
    """The factor pairs of the cross-entropy's gradient; differentiable in `hidden`.

    Args:
        hidden: (..., D) final hidden states.
        labels: (...) rows of the head that are right.
        head: the head, (V, D).

    Returns:
        Factors with delta (..., V) and hidden (..., D), in float32 or, if `hidden` is float64, float64.
    """
    logits = linear(hidden, head.weight, head.bias)
    wide = torch.promote_types(hidden.dtype, torch.float32)
    probabilities = torch.softmax(logits, dim=-1, dtype=wide)
    right = torch.ones_like(labels, dtype=wide).unsqueeze(-1)
    delta = probabilities.scatter_add(-1, labels.unsqueeze(-1), -right)
    return Factors(delta, hidden.to(wide), head.bias is not None)


# ---------------------------------------------------------------- targets


@dataclass(frozen=True)
class FactorTarget:
    """A target kept as the factor pairs of its n real examples; its value is their mean."""

    factors: Factors

    def inner(self, factors: Factors) -> list[Tensor]:
        """<G_target, g> of each example's gradient g, for weight and bias: factors (..., V), (..., D) -> (...)."""
        deltas = factors.delta @ self.factors.delta.mT  # (..., n)
        hiddens = factors.hidden @ self.factors.hidden.mT  # (..., n)
        weight = (deltas * hiddens).mean(-1)
        return [weight, deltas.mean(-1)] if factors.bias else [weight]

    @cached_property
    def norms(self) -> list[Tensor]:
        """||G_target||^2 for weight and bias."""
        return group_norms(self.factors)


@dataclass(frozen=True)
class DenseTarget:
    """A target as explicit matrices: noised, or in a small space.

    Attributes:
        weight: (V, D).
        bias: (V,), or None.
    """

    weight: Tensor
    bias: Tensor | None = None

    def inner(self, factors: Factors) -> list[Tensor]:
        """<G_target, g> of each example's gradient g, through G h alone."""
        weight = ((factors.hidden @ self.weight.mT) * factors.delta).sum(-1)
        return [weight] if self.bias is None else [weight, factors.delta @ self.bias]

    @cached_property
    def norms(self) -> list[Tensor]:
        """||G_target||^2 for weight and bias."""
        weight = self.weight.square().sum()
        return [weight] if self.bias is None else [weight, self.bias.square().sum()]


Target = FactorTarget | DenseTarget


def _sum(tensors: Sequence[Tensor]) -> Tensor:
    return reduce(torch.add, tensors)


def grams(factors: Factors) -> list[Tensor]:
    """<g_b, g_b'> of single gradients: factors (..., B, V), (..., B, D) -> (..., B, B), for weight and bias."""
    deltas = factors.delta @ factors.delta.mT
    weight = deltas * (factors.hidden @ factors.hidden.mT)
    return [weight, deltas] if factors.bias else [weight]


def group_norms(factors: Factors) -> list[Tensor]:
    """||G(X)||^2 of the mean gradient of each group: factors (..., B, V), (..., B, D) -> (...), weight and bias."""
    return [gram.mean((-2, -1)) for gram in grams(factors)]


# ---------------------------------------------------------------- distances


def combine(inners: Iterable[Tensor], norms: Iterable[Tensor], target_norms: Sequence[Tensor], distance: str) -> Tensor:
    """The distance of two gradients from their inner products and squared norms, one entry per matched tensor.

    "cosine" is 1 - cosine averaged over tensors; a zero gradient has cosine 0 with everything. "l2" is the squared
    Euclidean distance, summed over tensors.

    Raises:
        UserError: an unknown distance.
    """
    require(distance in DISTANCES, f"the distance {distance!r} is not known: use one of {', '.join(DISTANCES)}")
    if distance == "l2":
        return _sum([n - 2 * inner + target for inner, n, target in zip(inners, norms, target_norms, strict=True)])
    cosines = [
        inner / (norm.clamp_min(TINY).sqrt() * target.clamp_min(TINY).sqrt())
        for inner, norm, target in zip(inners, norms, target_norms, strict=True)
    ]
    return 1 - _sum(cosines) / len(cosines)


def match_groups(factors: Factors, which: Tensor, targets: Sequence[Target], distance: str = "cosine") -> Tensor:
    """The matching loss of K groups at once, in closed form.

    Args:
        factors: delta (K, B, V) and hidden (K, B, D), in the targets' coordinates.
        which: (K,) the number of each group's target, on the CPU: a GPU is not waited for.
        targets: what each class's mean gradient shall be.
        distance: "cosine" or "l2".

    Returns:
        (K,).
    """
    numbers, counts = (value.tolist() for value in which.unique_consecutive(return_counts=True))
    runs = [
        Factors(*parts, factors.bias)
        for parts in zip(factors.delta.split(counts), factors.hidden.split(counts), strict=True)
    ]
    inners = zip(
        *[[inner.mean(1) for inner in targets[number].inner(run)] for number, run in zip(numbers, runs, strict=True)],
        strict=True,
    )
    target_norms = zip(*[targets[number].norms for number in which.tolist()], strict=True)
    return combine(
        [torch.cat(parts) for parts in inners],
        group_norms(factors),
        [torch.stack(parts) for parts in target_norms],
        distance,
    )


def greedy_order(
    factors: Factors, target: Target, count: int, distance: str = "cosine", penalties: Sequence[float] | None = None
) -> list[int]:
    """Examples in the order in which each, added to those before it, gives the group with the lowest matching loss.

    All in inner products: O(N (V + D)) for each choice, and no N x N or V x D matrix.

    Args:
        factors: delta (N, V) and hidden (N, D), in the target's coordinates.
        target: what the group's mean gradient shall be.
        count: how many to choose; all N if there are fewer.
        distance: "cosine" or "l2".
        penalties: N numbers, of which the group's mean is added to its loss.

    Returns:
        Row numbers, the first chosen first; among equals the one that stands earlier.

    >>> import torch
    >>> factors = Factors(torch.eye(2), torch.eye(2))  # two examples that share nothing
    >>> greedy_order(factors, FactorTarget(Factors(torch.eye(2)[1:], torch.eye(2)[1:])), count=1)
    [1]
    """
    norms = target.norms
    to_target = torch.stack(target.inner(factors)).double()  # (P, N) of P matched tensors
    delta, hidden = (
        torch.linalg.vector_norm(value, dim=1, dtype=torch.float64).square()
        for value in (factors.delta, factors.hidden)
    )
    squares = torch.stack([delta * hidden, delta][: 1 + factors.bias])  # (P, N) ||g_i||^2
    chosen, cross = torch.zeros_like(delta), torch.zeros_like(squares)  # (P, N) <sum of the chosen, g_i>
    extra = torch.tensor(penalties or [0.0] * len(delta), dtype=torch.float64, device=delta.device)
    order: list[int] = []
    for size in range(1, min(count, len(delta)) + 1):
        inners = ((to_target @ chosen)[:, None] + to_target) / size
        sums = (cross @ chosen)[:, None] + 2 * cross + squares
        loss = combine(inners, sums / size**2, norms, distance) + extra / size
        order.append(int(loss.masked_fill(chosen > 0, torch.inf).argmin()))
        chosen[order[-1]] = 1
        cross += torch.stack(FactorTarget(factors[order[-1:]]).inner(factors))
    return order


def losses_as_added(factors: Factors, target: Target, distance: str = "cosine") -> Tensor:
    """The matching loss of the first example, of the first two together, and so on to all N: (N,); arguments as
    `greedy_order`."""
    sizes = torch.arange(1, len(factors.delta) + 1, device=factors.delta.device)
    inners = [inner.cumsum(0) / sizes for inner in target.inner(factors)]
    norms = [gram.cumsum(0).cumsum(1).diagonal() / sizes**2 for gram in grams(factors)]
    return combine(inners, norms, target.norms, distance)
