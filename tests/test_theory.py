"""The constants and the bounds, each against what does not share its code."""

import math

import pytest
import torch

from gradmm.errors import UserError
from gradmm.experiments import theory


@pytest.fixture(scope="module", params=[2, 4])
def problem(request) -> theory.LogisticProblem:
    draw = torch.Generator().manual_seed(request.param)
    hidden = torch.randn(60, 5, generator=draw, dtype=torch.float64)
    labels = torch.randint(request.param, (60,), generator=draw)
    return theory.LogisticProblem(hidden, labels, request.param, 0.05)


def points(problem, count=5):
    draw = torch.Generator().manual_seed(1)
    return [torch.randn(problem.origin.shape, generator=draw, dtype=torch.float64) for _ in range(count)]


def test_the_gradient_is_autograds(problem):
    for point in points(problem):
        w = point.clone().requires_grad_(True)
        loss = (
            torch.nn.functional.cross_entropy(problem.hidden @ w.mT, problem.labels)
            + problem.penalty / 2 * w.square().sum()
        )
        (wanted,) = torch.autograd.grad(loss, w)
        assert torch.allclose(problem.gradient(point), wanted, rtol=1e-12, atol=1e-14)
        assert problem.value(point) == pytest.approx(loss.item())


def test_the_constants_enclose_every_curvature(problem):
    for point in [problem.origin, *points(problem)]:
        size = point.numel()
        hessian = torch.autograd.functional.jacobian(problem.gradient, point).reshape(size, size)
        curvatures = torch.linalg.eigvalsh(hessian)
        assert problem.convexity * (1 - 1e-9) <= curvatures[0] and curvatures[-1] <= problem.smoothness * (1 + 1e-9)


def test_the_minimum_is_one_and_the_pl_inequality_holds(problem):
    for point in points(problem):
        gap = problem.value(point) - problem.minimum
        assert gap > 0 and problem.gradient(point).square().sum() >= 2 * problem.convexity * gap
    gaps, _, path = theory.descend(problem, lambda t, w, gradient: torch.zeros_like(w), 3000)
    assert abs(gaps[-1]) < 1e-12 and problem.gradient(path[-1]).norm() < 1e-6


@pytest.mark.parametrize("eps", [0.0, 0.01, 0.1, 1.0])
def test_no_error_of_a_given_norm_breaks_the_bound(problem, eps):
    draw = torch.Generator().manual_seed(0)
    flat = torch.zeros_like(problem.origin)
    flat[:, 0] = 1 / math.sqrt(len(flat))
    kinds = {
        "random": lambda t, w, gradient: torch.nn.functional.normalize(
            torch.randn(w.shape, generator=draw, dtype=w.dtype).flatten(), dim=0
        ).view_as(w),
        "against the gradient": lambda t, w, gradient: -gradient / gradient.norm(),
        "flat": lambda t, w, gradient: flat,
    }
    for kind in kinds.values():
        gaps, errors, path = theory.descend(problem, lambda t, w, gradient, kind=kind: eps * kind(t, w, gradient), 300)
        bounds = theory.gap_bounds(gaps[0], errors, problem.smoothness, problem.convexity)
        assert errors == pytest.approx([eps] * 300) and len(gaps) == len(bounds) == len(path) == 301
        assert all(gap <= bound + 1e-12 for gap, bound in zip(gaps, bounds, strict=True))


def test_an_error_in_a_flat_direction_attains_the_limit(problem):
    flat = torch.zeros_like(problem.origin)
    flat[:, 0] = 1 / math.sqrt(
        len(flat)
    )  # the same for every class: no probability changes, so the curvature is the penalty
    gaps, errors, _ = theory.descend(problem, lambda t, w, gradient: 0.1 * flat, 4000)
    limit = 0.1**2 / (2 * problem.convexity)
    assert gaps[-1] == pytest.approx(limit, rel=1e-6)
    assert theory.gap_bounds(gaps[0], errors, problem.smoothness, problem.convexity)[-1] == pytest.approx(
        limit, rel=1e-6
    )


def test_a_problem_without_penalty_is_refused(problem):
    with pytest.raises(UserError, match="penalty = 0"):
        theory.LogisticProblem(problem.hidden, problem.labels, problem.classes, 0.0)
