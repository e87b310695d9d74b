"""Releases that know nothing of the real examples: what the search does with no target, or with a random one.

Letters: n real examples of a class, V vocabulary, D hidden width.
"""

from dataclasses import replace

import torch
from torch import Tensor

from gradmm.gradients import Factors, FactorTarget, Target
from gradmm.privacy import Release
from gradmm.seeds import generator


def without_gradient(target: Release) -> Release:
    """The Release with every target zero."""
    return replace(target, targets=tuple(_zero(one.factors) for one in target.targets))


def _zero(pairs: Factors) -> Target:
    return FactorTarget(Factors(torch.zeros_like(pairs.delta[:1]), torch.zeros_like(pairs.hidden[:1]), pairs.bias))


def random_directions(target: Release, seed: int) -> Release:
    """The Release with every target a random one of the same rank, and of the same norm in weight and bias.

    Args:
        target: an exact Release: targets kept as n factor pairs, delta (n, V) and hidden (n, D).
    """
    return replace(
        target, targets=tuple(_random(one, generator(seed, "random target", label)) for label, one in enumerate(target.targets))
    )


def _random(target: FactorTarget, source: torch.Generator) -> Target:
    delta, hidden = (_normal_like(value, source) for value in (target.factors.delta, target.factors.hidden))
    if target.factors.bias:
        delta = delta * (target.norms()[1].sqrt() / delta.mean(0).norm())
    drawn = FactorTarget(Factors(delta, hidden, target.factors.bias))
    scale = (target.norms()[0] / drawn.norms()[0]).sqrt()
    return FactorTarget(Factors(delta, hidden * scale, target.factors.bias))


def _normal_like(value: Tensor, source: torch.Generator) -> Tensor:
    return torch.randn(value.shape, generator=source, dtype=value.dtype).to(value.device)
