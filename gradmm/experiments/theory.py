r"""What the book's derivations are checked on: a problem whose constants are known, bounds, and gradients along a path.

Gradient descent with an error e_t in its gradient, w <- w - (grad f(w) + e_t) / L. If f is L-smooth, then
f(w+) <= f(w) - ||grad f(w)||^2 / (2 L) + ||e_t||^2 / (2 L); with ||grad f||^2 >= 2 mu (f - f*) (Polyak 1963; Karimi,
Nutini and Schmidt 2016) therefore

    f(w_{t+1}) - f* <= (1 - mu/L) (f(w_t) - f*) + ||e_t||^2 / (2 L),

and with ||e_t|| <= eps the gap ends at no more than eps^2 / (2 mu). `notebooks/01-theory.ipynb` derives it in full.
Letters: n examples, C classes, D hidden width, P parameters, T steps.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy
import torch
from scipy.optimize import minimize
from scipy.special import ndtr
from torch import Tensor
from torch.nn.functional import cross_entropy, one_hot

from gradmm.classification import Encoded
from gradmm.data import Example
from gradmm.errors import require
from gradmm.models import Model, batches_by_length, pad_left
from gradmm.tasks import Task, tokenize_task
from gradmm.training import trainable_copy

TOKENS_PER_BATCH = 1024
GRADIENT_TOLERANCE = 1e-11

# ---------------------------------------------------------------- a problem whose constants are known


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


# ---------------------------------------------------------------- the same quantities on a language model


def loss_gradient(model: Model, task: Task, examples: Sequence[Example]) -> tuple[float, Tensor]:
    """The fine-tuning loss (cross-entropy over the C label tokens, mean over examples) and its gradient.

    Args:
        model: one whose parameters require gradients, see `training.trainable_copy`.

    Returns:
        The loss in nats, and the gradient with respect to all parameters, (P,), in the weights' type.
    """
    tokens = tokenize_task(task, model.tokenizer)
    data, parameters, total = Encoded.of(model, task, tokens, examples, "train"), list(model.lm.parameters()), 0.0
    model.lm.zero_grad(set_to_none=True)
    for rows in batches_by_length(data.sequences, TOKENS_PER_BATCH):
        ids, mask = pad_left([data.sequences[row] for row in rows], model.device)
        logits = model.logits_of(model.last_hidden(model.embed(ids), mask), tokens.labels)
        loss = cross_entropy(logits, data.labels[rows], reduction="sum") / len(examples)
        loss.backward()
        total += float(loss.detach())
    flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parameters])
    model.lm.zero_grad(set_to_none=True)
    return total, flat


def follow(
    model: Model, task: Task, train: Sequence[Example], real: Sequence[Example], rate: float, steps: int
) -> list[dict]:
    """Gradient descent on `train` (all parameters, whole batches), watched from `real`.

    Args:
        model: left as it is.
        rate: the step size.
        steps: T.

    Returns:
        T + 1 rows: step, loss and gradient (norm) on `real`, train_loss, error (norm of the difference of the
        gradients), cosine of the two, and from the second row on smoothness, ||change of the real gradient|| / ||change
        of the weights||.
    """
    trained, before = trainable_copy(model), None
    rows: list[dict[str, Any]] = []
    for step in range(steps + 1):
        loss, wanted = loss_gradient(trained, task, real)
        train_loss, used = (loss, wanted) if train is real else loss_gradient(trained, task, train)
        row: dict[str, Any] = {"step": step, "loss": loss, "train_loss": train_loss, "gradient": _norm(wanted)}
        row["error"] = _norm(used - wanted)
        row["cosine"] = _inner(wanted, used) / max(_norm(wanted) * _norm(used), 1e-30)
        row["smoothness"] = None if before is None else _norm(wanted - before[0]) / (rate * before[1])
        rows.append(row)
        before = wanted, _norm(used)
        with torch.no_grad():
            vector = torch.nn.utils.parameters_to_vector(trained.lm.parameters())
            torch.nn.utils.vector_to_parameters(vector - rate * used, trained.lm.parameters())
    return rows


def _inner(one: Tensor, other: Tensor) -> float:
    return float((one * other).sum(dtype=torch.float64))


def _norm(value: Tensor) -> float:
    return _inner(value, value) ** 0.5


# ---------------------------------------------------------------- privacy by post-processing


def gaussian_delta(epsilon: float, mu: float) -> float:
    """The Gaussian mechanism's smallest delta at epsilon, mu = sensitivity / sigma (Balle and Wang 2018, theorem 8)."""
    return float(ndtr(mu / 2 - epsilon / mu) - numpy.exp(epsilon) * ndtr(-mu / 2 - epsilon / mu))


def binned_delta(epsilon: float, mu: float, edges: Sequence[float]) -> float:
    """The smallest delta at epsilon of the same mechanism if only the interval that its output lies in is published.

    Both orders of the two neighbours count: N(0, 1) against N(mu, 1) and back.

    Args:
        edges: increasing interior limits of the intervals; the outermost ones are unbounded.
    """
    limits = numpy.concatenate([[-numpy.inf], numpy.asarray(edges, dtype=float), [numpy.inf]])
    here, there = (_masses(limits - shift) for shift in (0.0, mu))
    return max(float(numpy.maximum(p - numpy.exp(epsilon) * q, 0).sum()) for p, q in ((here, there), (there, here)))


def _masses(limits: numpy.ndarray) -> numpy.ndarray:
    """Normal probabilities of intervals, from the nearer tail so that small ones keep their digits."""
    low, high = limits[:-1], limits[1:]
    return numpy.where(low > 0, ndtr(-low) - ndtr(-high), ndtr(high) - ndtr(low))
