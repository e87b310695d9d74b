"""The constants, the bounds and the two views of a Gaussian release, each against what does not share its code."""

import math

import numpy
import pytest
import torch
from scipy.integrate import quad
from scipy.stats import norm

from gradmm.classification import evaluate
from gradmm.data import Example
from gradmm.errors import UserError
from gradmm.experiments import theory
from gradmm.mechanism import exact_sigma
from gradmm.tasks import Task
from gradmm.training import trainable_copy

TASK = Task("toy", ("negative", "positive"), (" bad", " great"), "{text} it was")
REAL = [
    Example("the film was a dull story", 0), Example("we saw fine actors", 1), Example("terrible plot", 0),
    Example("i love the music", 1),
]  # fmt: skip
OTHER = [Example("a bad movie", 0), Example("a great movie and a fine cat", 1)]


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


# ---------------------------------------------------------------- on a language model


def test_the_fine_tuning_gradient_is_that_of_the_loss_that_is_evaluated(tiny_model, kind):
    model = tiny_model(kind)
    trained = trainable_copy(model)
    loss, gradient = theory.loss_gradient(trained, TASK, REAL)
    assert loss == pytest.approx(evaluate(model, TASK, REAL).loss, rel=1e-9)
    draw = torch.Generator().manual_seed(0)
    unit = torch.nn.functional.normalize
    direction = unit(
        unit(torch.randn(gradient.shape, generator=draw, dtype=gradient.dtype), dim=0) + unit(gradient, dim=0), dim=0
    )
    vector = torch.nn.utils.parameters_to_vector(trained.lm.parameters()).detach()
    assert gradient.shape == vector.shape
    values = []
    for sign in (1, -1):
        torch.nn.utils.vector_to_parameters(vector + sign * 2e-4 * direction, trained.lm.parameters())
        values.append(evaluate(trained, TASK, REAL).loss)
    assert float(gradient @ direction) == pytest.approx(
        (values[0] - values[1]) / 4e-4, rel=2e-3
    )  # some norms round to float32


def test_a_path_is_gradient_descent_and_leaves_the_model_alone(tiny_model):
    model = tiny_model()
    before = [p.clone() for p in model.lm.parameters()]
    rows = theory.follow(model, TASK, OTHER, REAL, 1e-3, 3)
    assert all(torch.equal(a, b) for a, b in zip(before, model.lm.parameters(), strict=True))
    assert [row["step"] for row in rows] == [0, 1, 2, 3] and rows[0]["smoothness"] is None
    trained = trainable_copy(model)
    for row in rows:
        (loss, wanted), (train_loss, used) = (theory.loss_gradient(trained, TASK, some) for some in (REAL, OTHER))
        assert (row["loss"], row["train_loss"], row["error"], row["gradient"]) == pytest.approx(
            (loss, train_loss, float((used - wanted).norm()), float(wanted.norm())), rel=1e-9
        )
        assert row["cosine"] == pytest.approx(
            float(torch.nn.functional.cosine_similarity(used, wanted, dim=0)), rel=1e-9
        )
        vector = torch.nn.utils.parameters_to_vector(trained.lm.parameters()).detach() - 1e-3 * used
        torch.nn.utils.vector_to_parameters(vector, trained.lm.parameters())


def test_a_path_on_the_real_examples_has_no_error_and_goes_down(tiny_model):
    rows = theory.follow(tiny_model(), TASK, REAL, REAL, 1e-3, 3)
    assert {row["error"] for row in rows} == {0.0} and all(row["cosine"] == pytest.approx(1) for row in rows)
    assert all(after["loss"] < row["loss"] for row, after in zip(rows[:-1], rows[1:], strict=True))
    assert all(row["smoothness"] > 0 for row in rows[1:])


# ---------------------------------------------------------------- privacy


@pytest.mark.parametrize("epsilon, delta", [(0.05, 1e-4), (1.0, 1e-5), (8.0, 1e-6)])
def test_delta_is_that_of_the_calibration_and_of_the_integral(epsilon, delta):
    mu = 1 / exact_sigma(epsilon, delta)
    assert theory.gaussian_delta(epsilon, mu) == pytest.approx(delta, rel=1e-6)
    start = mu / 2 - epsilon / mu  # from here down N(0, 1) is more than exp(epsilon) times as likely as N(mu, 1)
    loss, _ = quad(lambda t: norm.pdf(t) - math.exp(epsilon) * norm.pdf(t - mu), start - 12, start, epsabs=1e-15)
    assert theory.gaussian_delta(epsilon, mu) == pytest.approx(loss, rel=1e-6)


@pytest.mark.parametrize("mu", [0.1, 1.0, 4.0])
def test_coarser_outputs_lose_no_more_and_fine_ones_almost_as_much(mu):
    for epsilon in numpy.linspace(0, 4, 9):
        exact = theory.gaussian_delta(epsilon, mu)
        nested = [theory.binned_delta(epsilon, mu, numpy.arange(-10, 10.01, width)) for width in (0.125, 0.5, 2.0)]
        assert exact + 1e-15 >= nested[0] >= nested[1] - 1e-15 and nested[1] >= nested[2] - 1e-15
        assert nested[0] == pytest.approx(exact, abs=2e-3)
    assert theory.binned_delta(0.5, mu, []) == 0.0


def test_the_best_threshold_is_where_the_likelihoods_part():
    epsilon, mu = 1.0, 1.0
    assert theory.binned_delta(epsilon, mu, [mu / 2 - epsilon / mu]) == pytest.approx(
        theory.gaussian_delta(epsilon, mu), rel=1e-9
    )
    assert theory.binned_delta(epsilon, mu, [0.7]) < theory.gaussian_delta(epsilon, mu)
