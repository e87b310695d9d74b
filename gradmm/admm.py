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
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gradmm.device import Graphs
from gradmm.errors import COUNT, above_zero, check_settings, require

Objective = Callable[[Tensor, Tensor, Tensor], Tensor]
Project = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]

STEP_LIMIT = "step limit: all {} outer steps were taken"
NON_FINITE = "non-finite: the loss or its gradient was not a number at step {}"
RULES = {
    "rho": above_zero(0.1),
    "lr": above_zero(0.008),
    "clip": above_zero(1.0),
    "outer_steps": COUNT,
    "inner_steps": COUNT,
    "groups_per_pass": COUNT,
}


@dataclass(frozen=True)
class Config:
    """Settings of the solver; the defaults are published ones, rho one of several.

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
        check_settings(self, RULES)


@dataclass(frozen=True)
class State:
    """Where the solver stands; z follows from x and lam, so a step neither needs nor keeps the last one.

    Attributes:
        x, lam: (K, B, L, D).
        ids: (K, B, L), the discrete form of the last z, opaque here.
        step: outer steps taken.
        active: (K,) bool, the groups that still move; on the CPU, whose loop it leads.
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
        active=torch.ones(groups, dtype=torch.bool),
    )
    infinite = torch.full((groups,), math.inf, dtype=x.dtype, device=x.device)
    return Result(ids, infinite, ("",) * groups, [], state)


def solve(
    objective: Objective,
    project: Project,
    begin: Result,
    config: Config,
    callback: Callable[[Result], object] = lambda result: None,
    within: Callable[[], AbstractContextManager] = nullcontext,
) -> Result:
    """Run ADMM from `begin` until every group has a reason to stop.

    Args:
        objective: (x (k, B, L, D), ids (k, B, L), groups (k,)) -> f of each group, (k,). `ids` is the last projection
            (an objective may need to know which positions it left empty), `groups` the numbers of these groups, on the
            CPU. On a GPU it is captured, see `device.Graphs`, so it may ask for no number of x and ids.
        project: (v (k, B, L, D), groups (k,)) -> (z like v, ids (k, B, L)), the nearest allowed point in the caller's
            sense.
        begin: `start(...)`, or an earlier Result, which is then continued as if it had never stopped.
        callback: sees the Result after every outer step, outside the clock.
        within: what surrounds a capture, see `device.Graphs`.

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
    inner = InnerLoop(objective, config, Graphs(result.state.x.device, within))
    while result.state.active.any():
        result = _finish(_advance(inner, project, result, config), config)
        callback(result)
    return _close(objective, project, result, config)


def step(inner: "InnerLoop", project: Project, state: State, config: Config) -> tuple[State, dict[str, Tensor]]:
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
        x[here], measured = inner.move(state.x[here], z[some], state.lam[here], ids[some], here)
        parts.append(measured)

    # lam <- lam + rho (x - z); here and not in the passes, where it would be held beside the old one
    lam = state.lam.index_copy(0, groups.to(x.device), state.lam[groups] + rho * (x[groups] - z))

    measures = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    measures["changed"] = (ids != state.ids[groups]).to(x.dtype).mean((1, 2))
    return replace(
        state, x=x, lam=lam, ids=state.ids.index_copy(0, groups.to(x.device), ids), step=state.step + 1
    ), measures


def _passes(groups: Tensor, config: Config) -> tuple[Tensor, ...]:
    """The places of the groups that the objective sees at once."""
    return torch.arange(len(groups)).split(config.groups_per_pass or len(groups))


class InnerLoop:
    """The x of the groups of one pass, moved by Adam; nothing here depends on the groups of another pass.

    All that an inner step reads and writes stays where it is, and nothing waits for the device, so that a GPU replays
    the step (see `device.Graphs`).
    """

    def __init__(self, objective: Objective, config: Config, graphs: Graphs) -> None:
        self.objective, self.config, self.graphs = objective, config, graphs
        self._buffers: dict[torch.Size, _Buffers] = {}

    def move(
        self, old: Tensor, z: Tensor, lam: Tensor, ids: Tensor, groups: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """x after all inner steps, and measurements.

        Args:
            old, z, lam: (k, B, L, D).
            ids: (k, B, L) tokens of z.
            groups: (k,) their numbers.
        """
        rho = self.config.rho
        if old.shape not in self._buffers:
            self._buffers[old.shape] = _Buffers.like(old, ids, self.config.lr)
        held = self._buffers[old.shape]
        held.ids.copy_(ids)
        self._run(held, groups, z, z, self._look, 1)
        match_z = held.match.clone()
        x, inner_gradient = self.minimise(groups, old, z - lam / rho)
        self._run(held, groups, x, z, self._measure, 1)
        return x, {
            "match_x": held.match.clone(),
            "match_z": match_z,
            "primal": _norm(x - z),
            "dual": _norm(rho * (x - old)),
            "stationarity": _norm(held.gradient + (lam + rho * (x - z))),
            "inner_gradient": inner_gradient,
        }

    def minimise(self, groups: Tensor, x: Tensor, anchor: Tensor) -> tuple[Tensor, Tensor]:
        """All inner steps from x: (x, the last gradient norm of each group); the ids are those of the last `move`."""
        held = self._buffers[x.shape]
        self._run(held, groups, x, anchor, self._descend, self.config.inner_steps)
        return held.value.detach().clone(), held.norm.clone()

    def _run(self, held: "_Buffers", groups: Tensor, x: Tensor, anchor: Tensor, what: Callable, times: int) -> None:
        """A step of these groups from x, so many times."""

        def begin() -> None:
            held.begin(x, anchor)

        begin()
        run = self.graphs.of((what.__name__, *groups.tolist()), lambda: what(held, groups), begin)
        for _ in range(times):
            run()

    def _descend(self, held: "_Buffers", groups: Tensor) -> None:
        """One step of Adam on the augmented Lagrangian in x, each group clipped by itself."""
        gradient = self._gradient(held, groups) + self.config.rho * (held.value.detach() - held.anchor)
        held.norm.copy_(_norm(gradient))
        if self.config.clip is not None:
            gradient = gradient * (self.config.clip / held.norm.clamp_min(1e-12)).clamp(max=1).view(-1, 1, 1, 1)
        held.value.grad = gradient
        held.adam.step()

    @torch.no_grad()
    def _look(self, held: "_Buffers", groups: Tensor) -> None:
        """f at x."""
        held.match.copy_(self.objective(held.value, held.ids, groups))

    def _measure(self, held: "_Buffers", groups: Tensor) -> None:
        """f at x and its gradient."""
        held.gradient.copy_(self._gradient(held, groups))

    def _gradient(self, held: "_Buffers", groups: Tensor) -> Tensor:
        match = self.objective(held.value, held.ids, groups)
        held.match.copy_(match.detach())
        return torch.autograd.grad(match.sum(), held.value)[0]


@dataclass(frozen=True)
class _Buffers:
    """What the inner steps of a pass of k groups read and write, in one place.

    Attributes:
        value: x. anchor: z - lam / rho. gradient: of f, (k, B, L, D) each.
        ids: (k, B, L).
        match, norm: f, and the last norm of the gradient of the augmented Lagrangian, (k,).
        adam: its optimizer.
    """

    value: Tensor
    anchor: Tensor
    gradient: Tensor
    ids: Tensor
    match: Tensor
    norm: Tensor
    adam: torch.optim.Adam

    @staticmethod
    def like(x: Tensor, ids: Tensor, lr: float) -> "_Buffers":
        """For the inner steps of such an x."""
        value = torch.empty_like(x, requires_grad=True)
        adam = torch.optim.Adam([value], lr=lr, capturable=x.is_cuda)
        adam._warned_capturable_if_run_uncaptured = True  # the runs before a capture are meant to be without one
        of_groups = x.new_empty(len(x))
        return _Buffers(
            value, torch.empty_like(x), torch.empty_like(x), torch.empty_like(ids), of_groups, of_groups.clone(), adam
        )

    @torch.no_grad()
    def begin(self, x: Tensor, anchor: Tensor) -> None:
        """The first step is the next one."""
        self.value.copy_(x)
        self.anchor.copy_(anchor)
        for moment in self.adam.state[self.value].values():
            moment.zero_()


def _norm(value: Tensor) -> Tensor:
    return value.flatten(1).norm(dim=1)


# ---------------------------------------------------------------- the driver's bookkeeping


def _advance(inner: InnerLoop, project: Project, result: Result, config: Config) -> Result:
    """One outer step and its row of history; the best projected iterate of each group is kept."""
    begun = time.perf_counter()
    groups = result.state.active.nonzero().squeeze(1)
    state, measures = step(inner, project, result.state, config)
    columns = {name: value.tolist() for name, value in measures.items()}  # waits for a GPU
    seconds = (time.perf_counter() - begun) / len(groups)
    best = _keep_better(result, groups, state.ids[groups], measures["match_z"])
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
    groups = sound.cpu().nonzero().squeeze(1)
    if not len(groups):
        return result
    with torch.no_grad():
        z, ids = project(state.x[groups] + state.lam[groups] / config.rho, groups)
        values = [objective(z[some], ids[some], groups[some]) for some in _passes(groups, config)]
        return _keep_better(result, groups, ids, torch.cat(values))


def _keep_better(result: Result, groups: Tensor, ids: Tensor, match: Tensor) -> Result:
    """Replace the best projected iterate of the groups whose new one has a lower f."""
    better = (match < result.match_loss[groups]).cpu()
    chosen = groups[better].to(match.device)
    return replace(
        result,
        value=result.value.index_copy(0, chosen, ids[better]),
        match_loss=result.match_loss.index_copy(0, chosen, match[better]),
    )
