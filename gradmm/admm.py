r"""ADMM for min_x f(x) subject to x in E, with E a set that one can only project on.

Knows nothing of language models: it is given `objective` and `project`. Unscaled dual, and z moves first:

    z   <- project(x + lam / rho)
    x   <- inner_steps of Adam on  f(x) + rho/2 ||x - z + lam/rho||^2
    lam <- lam + rho (x - z)

Residuals of this order: primal ||x - z||; dual ||rho (x_new - x_old)||; and ||grad f(x) + lam||, the stationarity of x.
For a discrete E nothing guarantees convergence, so the answer is the projected iterate with the lowest f(z): values of
the augmented Lagrangian cannot be compared between steps, since z and lam change.

Letters: K problems (groups) side by side, each with variables of shape (B, L, D); they never influence one another.
Source: Boyd et al. 2011, sections 3 and 9; Nguyen et al. 2025 (arXiv 2502.17607), algorithm 1.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gradmm.errors import is_number, is_whole, require, short_repr

Objective = Callable[[Tensor, Tensor, Tensor], Tensor]
Project = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]

STEP_LIMIT = "step limit: all {} outer steps were taken"
NON_FINITE = "non-finite: the loss or its gradient was not a number at step {}"
STOPPED = "stopped by callback at step {}"


@dataclass(frozen=True)
class Config:
    """Settings of the solver; the defaults are the published ones.

    Attributes:
        rho: penalty, > 0. Larger keeps x nearer to z.
        outer_steps, inner_steps: iterations, >= 1.
        lr: Adam's step size, > 0.
        clip: each group's gradient of the augmented Lagrangian is scaled to at most this norm; None does not clip.
        groups_per_pass: groups that the objective sees at once, which bounds the memory; None: all. With 1, every
            number of a group is computed by itself, so that not even its rounding depends on the groups beside it.
    """

    rho: float = 0.1
    outer_steps: int = 30
    inner_steps: int = 50
    lr: float = 0.008
    clip: float | None = 1.0
    groups_per_pass: int | None = None

    def __post_init__(self) -> None:
        for name in ("rho", "lr"):
            value = getattr(self, name)
            require(
                _positive(value),
                f"{name} = {short_repr(value)}, it must be a finite number above 0: try {type(self).__dict__[name]}",
            )
        for name in ("outer_steps", "inner_steps"):
            value = getattr(self, name)
            require(
                is_whole(value) and value >= 1,
                f"{name} = {short_repr(value)}, it must be a whole number of at least 1: try 10",
            )
        require(
            self.groups_per_pass is None or (is_whole(self.groups_per_pass) and self.groups_per_pass >= 1),
            f"groups_per_pass = {self.groups_per_pass!r}, it must be a whole number of at least 1, or None for "
            "all groups at once",
        )
        require(
            self.clip is None or _positive(self.clip),
            f"clip = {short_repr(self.clip)}, it must be above 0, or None: None does not clip",
        )


def _positive(value) -> bool:
    return is_number(value) and value > 0


@dataclass(frozen=True)
class State:
    """Where the solver stands; z follows from x and lam, so a step neither needs nor keeps the last one.

    Attributes:
        x, lam: (K, B, L, D).
        ids: (K, B, L), the discrete form of the last z, opaque here.
        step: outer steps taken.
        active: (K,) bool, the groups that still move.
    """

    x: Tensor
    lam: Tensor
    ids: Tensor
    step: int
    active: Tensor


@dataclass(frozen=True)
class Result:
    """What `solve` returns, and what it can continue from.

    Attributes:
        value: (K, B, L) ids of each group's best projected iterate.
        match_loss: (K,) f at that iterate.
        reason: K sentences saying why each group stopped ("" while it has not).
        history: one row per outer step and group.
        state: the last state.
    """

    value: Tensor
    match_loss: Tensor
    reason: tuple[str, ...]
    history: list[dict]
    state: State

    def without_vectors(self) -> "Result":
        """What is asked of a run that has ended, without x and lam; it cannot be continued."""
        none = self.state.x.new_empty(0)
        return replace(self, state=replace(self.state, x=none, lam=none))


def start(x: Tensor) -> Result:
    """The point before the first step: x given, lam = 0, no projection yet.

    Args:
        x: (K, B, L, D) initial values, finite.

    Raises:
        UserError: x has a value that is not finite.
    """
    require(bool(torch.isfinite(x).all()), "the initial x has values that are not finite: start from finite embeddings")
    groups = x.shape[0]
    ids = torch.full(x.shape[:3], -1, device=x.device)
    state = State(
        x=x.detach().clone(),
        lam=x.new_zeros(()).expand_as(x),  # takes no memory
        ids=ids,
        step=0,
        active=torch.ones(groups, dtype=torch.bool, device=x.device),
    )
    infinite = torch.full((groups,), math.inf, dtype=x.dtype, device=x.device)
    return Result(ids, infinite, ("",) * groups, [], state)


def solve(
    objective: Objective,
    project: Project,
    begin: Result,
    config: Config,
    callback: Callable[[Result], bool | None] | None = None,
) -> Result:
    """Run ADMM from `begin` until every group has a reason to stop.

    Args:
        objective: (x (k, B, L, D), ids (k, B, L), groups (k,)) -> f of each group, (k,). `ids` is the last projection
            (an objective may need to know which positions it left empty), `groups` the numbers of these groups.
        project: (v (k, B, L, D), groups (k,)) -> (z like v, ids (k, B, L)), the nearest allowed point in the caller's
            sense.
        begin: `start(...)`, or an earlier Result, which is then continued as if it had never stopped.
        callback: sees the Result after every outer step, outside the clock; a true return stops all groups.

    Returns:
        Result.

    >>> import torch
    >>> config = Config(rho=1.0, outer_steps=5, inner_steps=5, lr=0.1)
    >>> def objective(x, ids, groups):  # pulls every number to 0.9
    ...     return (x - 0.9).square().sum((1, 2, 3))
    >>> def project(v, groups):  # whole numbers alone are allowed
    ...     return v.round(), v.round().long().squeeze(-1)
    >>> result = solve(objective, project, start(torch.zeros(1, 1, 2, 1)), config)
    >>> result.value, result.reason
    (tensor([[[1, 1]]]), ('step limit: all 5 outer steps were taken',))
    """
    result = begin
    del begin  # else its vectors would be held to the end
    while result.state.active.any():
        result = _finish(_advance(objective, project, result, config), config)
        if callback is not None and callback(result):
            return _stop_all(result, STOPPED.format(result.state.step))
    return _close(objective, project, result, config)


def step(objective: Objective, project: Project, state: State, config: Config) -> tuple[State, dict[str, Tensor]]:
    """One outer step of the active groups: z, then x, then lam.

    Returns:
        The new state, and measurements of shape (k,) for the k active groups: match_x, match_z, primal, dual,
        stationarity, inner_gradient, changed (share of tokens).
    """
    groups, rho = state.active.nonzero().squeeze(1), config.rho

    # z <- project(x + lam / rho)
    z, ids = project(state.x[groups] + state.lam[groups] / rho, groups)

    # x <- inner_steps of Adam on  f(x) + rho/2 ||x - z + lam/rho||^2, for as many groups at once as a pass may have
    x, parts = state.x.clone(), []
    for some in _passes(groups, config):
        here = groups[some]
        f = _seen(objective, ids[some], here)
        x[here], measured = _move(f, state.x[here], z[some], state.lam[here], config)
        parts.append(measured)

    # lam <- lam + rho (x - z); here and not in the passes, where it would be held beside the old one
    lam = state.lam.index_copy(0, groups, state.lam[groups] + rho * (x[groups] - z))

    measures = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    measures["changed"] = (ids != state.ids[groups]).to(x.dtype).mean((1, 2))
    return replace(state, x=x, lam=lam, ids=state.ids.index_copy(0, groups, ids), step=state.step + 1), measures


def _seen(objective: Objective, ids: Tensor, groups: Tensor) -> Callable[[Tensor], Tensor]:
    """f of some groups as a function of their x alone."""
    return lambda x: objective(x, ids, groups)


def _passes(groups: Tensor, config: Config) -> tuple[Tensor, ...]:
    """The places of the groups that the objective sees at once."""
    return torch.arange(len(groups), device=groups.device).split(config.groups_per_pass or len(groups))


def _move(f, old: Tensor, z: Tensor, lam: Tensor, config: Config) -> tuple[Tensor, dict[str, Tensor]]:
    """x of the groups of one pass, and measurements; nothing here depends on the groups of another pass."""
    with torch.no_grad():
        match_z = f(z)
    x, inner_gradient = _minimise(f, old, z, lam, config)
    match_x, gradient = _value_and_gradient(f, x)
    return x, {
        "match_x": match_x,
        "match_z": match_z,
        "primal": _norm(x - z),
        "dual": _norm(config.rho * (x - old)),
        "stationarity": _norm(gradient + (lam + config.rho * (x - z))),
        "inner_gradient": inner_gradient,
    }


def _minimise(f, x: Tensor, z: Tensor, lam: Tensor, config: Config) -> tuple[Tensor, Tensor]:
    """Adam on the augmented Lagrangian in x, each group clipped by itself: (x, last gradient norm of each group)."""
    anchor = z - lam / config.rho
    value = x.clone().requires_grad_(True)
    adam = torch.optim.Adam([value], lr=config.lr)
    for _ in range(config.inner_steps):
        (gradient,) = torch.autograd.grad(f(value).sum(), value)
        gradient = gradient + config.rho * (value.detach() - anchor)
        norm = _norm(gradient)
        if config.clip is not None:
            gradient = gradient * (config.clip / norm.clamp_min(1e-12)).clamp(max=1).view(-1, 1, 1, 1)
        value.grad = gradient
        adam.step()
    return value.detach(), norm


def _value_and_gradient(f, x: Tensor) -> tuple[Tensor, Tensor]:
    value = x.clone().requires_grad_(True)
    loss = f(value)
    (gradient,) = torch.autograd.grad(loss.sum(), value)
    return loss.detach(), gradient


def _norm(value: Tensor) -> Tensor:
    return value.flatten(1).norm(dim=1)


# ---------------------------------------------------------------- the driver's bookkeeping


def _advance(objective: Objective, project: Project, result: Result, config: Config) -> Result:
    """One outer step and its row of history; the best projected iterate of each group is kept."""
    begun = time.perf_counter()
    groups = result.state.active.nonzero().squeeze(1)
    state, measures = step(objective, project, result.state, config)
    seconds = (time.perf_counter() - begun) / len(groups)
    best = _keep_better(result, groups, state.ids[groups], measures["match_z"])
    columns = {name: value.tolist() for name, value in measures.items()}
    rows = [
        {
            "step": state.step,
            "group": group,
            **{name: column[i] for name, column in columns.items()},
            "seconds": seconds,
        }
        for i, group in enumerate(groups.tolist())
    ]
    return replace(best, state=state, history=[*result.history, *rows])


def _finish(result: Result, config: Config) -> Result:
    """Stop the groups that have a reason to."""
    state, reasons, active = result.state, list(result.reason), result.state.active.clone()
    for row in result.history[len(result.history) - int(active.sum()) :]:
        group = row["group"]
        reasons[group] = _reason(row, config)
        active[group] = not reasons[group]
    return replace(result, reason=tuple(reasons), state=replace(state, active=active))


def _reason(row: dict, config: Config) -> str:
    if not all(math.isfinite(row[name]) for name in ("match_x", "match_z", "primal", "inner_gradient", "stationarity")):
        return NON_FINITE.format(row["step"])
    return STEP_LIMIT.format(config.outer_steps) if row["step"] >= config.outer_steps else ""


def _close(objective: Objective, project: Project, result: Result, config: Config) -> Result:
    """Project the last x of each group too: without it the work of the last inner steps would be lost."""
    state = result.state
    sound = torch.isfinite(state.x).flatten(1).all(1) & torch.isfinite(state.lam).flatten(1).all(1)
    groups = sound.nonzero().squeeze(1)
    if not len(groups):
        return result
    with torch.no_grad():
        z, ids = project(state.x[groups] + state.lam[groups] / config.rho, groups)
        values = [objective(z[some], ids[some], groups[some]) for some in _passes(groups, config)]
        return _keep_better(result, groups, ids, torch.cat(values))


def _keep_better(result: Result, groups: Tensor, ids: Tensor, match: Tensor) -> Result:
    """Replace the best projected iterate of the groups whose new one has a lower f."""
    better = match < result.match_loss[groups]
    chosen = groups[better]
    return replace(
        result,
        value=result.value.index_copy(0, chosen, ids[better]),
        match_loss=result.match_loss.index_copy(0, chosen, match[better]),
    )


def _stop_all(result: Result, reason: str) -> Result:
    reasons = tuple(old or reason for old in result.reason)
    return replace(result, reason=reasons, state=replace(result.state, active=torch.zeros_like(result.state.active)))
