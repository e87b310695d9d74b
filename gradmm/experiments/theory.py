r"""What the derivations of the book are checked on: a problem whose constants are known, and a bound on descent.

Gradient descent with an error e_t in its gradient, w <- w - (grad f(w) + e_t) / L. If f is L-smooth, then
f(w+) <= f(w) - ||grad f(w)||^2 / (2 L) + ||e_t||^2 / (2 L); with ||grad f||^2 >= 2 mu (f - f*) (Polyak 1963; Karimi,
Nutini and Schmidt 2016) therefore

    f(w_{t+1}) - f* <= (1 - mu/L) (f(w_t) - f*) + ||e_t||^2 / (2 L),

and with ||e_t|| <= eps the gap ends at no more than eps^2 / (2 mu). `notebooks/01-theory.ipynb` derives it in full.
Letters: n examples, C classes, D hidden width, T steps.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy
import torch
from scipy.optimize import minimize
from torch import Tensor
from torch.nn.functional import cross_entropy, one_hot

from gradmm.errors import require

GRADIENT_TOLERANCE = 1e-11


@dataclass(frozen=True, eq=False)
class LogisticProblem:
    r"""l2-regularised multinomial logistic regression, f(W) = mean cross-entropy of softmax(W h) + penalty/2 ||W||^2.

    Its gradient is that of an output head of C rows below a frozen body, plus the penalty's.

    Attributes:
        hidden: the inputs h, (n, D), float64.
        labels: (n,) in 0 .. C - 1.
        classes: C.
        penalty: above 0.
    """

    hidden: Tensor
    labels: Tensor
    classes: int
    penalty: float

    def __post_init__(self) -> None:
        require(self.penalty > 0, f"penalty = {self.penalty!r}, it must be above 0: without it no PL constant is known")

    @property
    def smoothness(self) -> float:
        """L = lambda_max(mean of h h^T) / 2 + penalty, since diag(p) - p p^T is at most 1/2."""
        second = self.hidden.mT @ self.hidden / len(self.hidden)
        return float(torch.linalg.eigvalsh(second)[-1]) / 2 + self.penalty

    @property
    def convexity(self) -> float:
        """mu = penalty: f is penalty-strongly convex, which implies the PL inequality with the same constant."""
        return self.penalty

    def value(self, w: Tensor) -> float:
        """f at W (C, D)."""
        return float(cross_entropy(self.hidden @ w.mT, self.labels) + self.penalty / 2 * w.square().sum())

    def gradient(self, w: Tensor) -> Tensor:
        """mean of delta h^T + penalty W, (C, D)."""
        delta = (self.hidden @ w.mT).softmax(-1) - one_hot(self.labels, self.classes)
        return delta.mT @ self.hidden / len(self.hidden) + self.penalty * w

    @property
    def origin(self) -> Tensor:
        """W = 0, (C, D)."""
        return self.hidden.new_zeros(self.classes, self.hidden.shape[1])

    @cached_property
    def minimum(self) -> float:
        """f*, up to ||grad f||^2 / (2 mu), below 1e-16 in practice (L-BFGS of scipy)."""
        shape = self.origin.shape

        def both(flat: numpy.ndarray) -> tuple[float, numpy.ndarray]:
            w = torch.from_numpy(flat).view(shape)
            return self.value(w), self.gradient(w).flatten().numpy()

        options = {"maxiter": 10_000, "maxfun": 20_000, "ftol": 0.0, "gtol": GRADIENT_TOLERANCE}
        return float(minimize(both, self.origin.flatten().numpy(), jac=True, method="L-BFGS-B", options=options).fun)


def descend(
    problem: LogisticProblem, error: Callable[[int, Tensor, Tensor], Tensor], steps: int
) -> tuple[list[float], list[float], list[Tensor]]:
    """Gradient descent from W = 0 with step 1/L and an error in every gradient.

    Args:
        error: (t, W, grad f(W)) -> e_t, all but t of shape (C, D).
        steps: T.

    Returns:
        The gaps f(w_t) - f* (T + 1), the error norms ||e_t|| (T) and the path (T + 1).
    """
    w, step = problem.origin, 1 / problem.smoothness
    path: list[Tensor] = [w]
    errors: list[float] = []
    for t in range(steps):
        gradient = problem.gradient(w)
        wrong = error(t, w, gradient)
        w = w - step * (gradient + wrong)
        path.append(w)
        errors.append(float(wrong.norm()))
    return [problem.value(w) - problem.minimum for w in path], errors, path


def gap_bounds(gap: float, errors: Sequence[float], smoothness: float, convexity: float) -> list[float]:
    """The bound on f(w_t) - f* at every step, unrolled from the module's inequality.

    Args:
        gap: f(w_0) - f*.
        errors: T bounds on ||e_t||.

    Returns:
        T + 1 numbers.
    """
    bounds = [gap]
    for error in errors:
        bounds.append((1 - convexity / smoothness) * bounds[-1] + error**2 / (2 * smoothness))
    return bounds
