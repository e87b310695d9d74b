"""Releases that know nothing of the real examples: what the search does with no target, or with a random one.

Letters: n real examples of a class, V vocabulary, D hidden width.
"""

from dataclasses import replace

import torch
from torch import Tensor

from gradmm.gradients import Factors, FactorTarget, LabelSpace, Target
from gradmm.privacy import Release
from gradmm.seeds import generator


def without_gradient(target: Release) -> Release:
    """The Release with every target zero."""
    return replace(target, targets=tuple(_zero(one.factors) for one in target.targets))


def _zero(pairs: Factors) -> Target:
    return FactorTarget(Factors(torch.zeros_like(pairs.delta[:1]), torch.zeros_like(pairs.hidden[:1]), pairs.bias))


def random_directions(target: Release, seed: int) -> Release:
    """The Release with every target a random one of the same rank, and of the same norm in weight and bias.

    Under a loss over the label tokens alone every delta adds up to zero over these, so the random ones do too: all of a random
    target lies where a text can reach it.

    Args:
        target: an exact Release: targets kept as n factor pairs, delta (n, V) and hidden (n, D).
    """
    balanced = isinstance(target.space, LabelSpace)
    sources = [generator(seed, "random target", label) for label in range(len(target.targets))]
    drawn = (_random(one, source, balanced) for one, source in zip(target.targets, sources, strict=True))
    return replace(target, targets=tuple(drawn))


def _random(target: FactorTarget, source: torch.Generator, balanced: bool) -> Target:
    delta, hidden = (_normal_like(value, source) for value in (target.factors.delta, target.factors.hidden))
    delta = delta - delta.mean(-1, keepdim=True) if balanced else delta
    if target.factors.bias:
        delta = delta * (target.norms[1].sqrt() / delta.mean(0).norm())
    drawn = FactorTarget(Factors(delta, hidden, target.factors.bias))
    scale = (target.norms[0] / drawn.norms[0]).sqrt()
    return FactorTarget(Factors(delta, hidden * scale, target.factors.bias))


def _normal_like(value: Tensor, source: torch.Generator) -> Tensor:
    return torch.randn(value.shape, generator=source, dtype=value.dtype).to(value.device)
