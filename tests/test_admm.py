"""The solver against problems with known answers, and its bookkeeping; no language model is involved."""

import gc
import itertools
import math
import time
from dataclasses import replace

import pytest
import torch

from gradmm import admm
from gradmm.errors import UserError

WIDE = torch.float64


def quadratic(centres):
    """f(x) = ||x - centre||^2 of each group; centres (K, B, L, D)."""
    return lambda x, ids, groups: (x - centres[groups]).square().sum((1, 2, 3))


def nearest(codes):
    """Project every vector on the nearest of codes (S, D)."""

    def project(v, groups):
        ids = torch.cdist(v.flatten(0, 2), codes).argmin(-1).view(v.shape[:3])
        return codes[ids], ids

    return project


def coupled(matrix, centre):
    """A convex quadratic that couples the positions, ||M vec(x) - centre||^2; the nearest by position is not best."""
    return lambda x, ids, groups: (x.flatten(1) @ matrix.T - centre[groups]).square().sum(-1)


def nowhere(v, groups):
    """A projection that leaves every vector where it is."""
    return v, torch.zeros(v.shape[:3], dtype=torch.long)


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=WIDE)


def test_a_quadratic_over_a_discrete_set_ends_at_its_known_optimum():
    codes, centres = draw(12, 3), draw(40, 1, 1, 3, seed=1)
    config = admm.Config(rho=1.0, outer_steps=25, inner_steps=40, lr=0.05)
    result = admm.solve(quadratic(centres), nearest(codes), admm.start(draw(40, 1, 1, 3, seed=2)), config)
    best = torch.cdist(centres.flatten(0, 2), codes).argmin(-1).view(40, 1, 1)
    assert torch.equal(result.value, best)
    torch.testing.assert_close(result.match_loss, (codes[best] - centres).square().sum((1, 2, 3)))


def test_a_coupled_quadratic_over_a_small_discrete_set_is_no_worse_than_rounding_and_near_the_best_of_all():
    codes, matrix, centre = draw(4, 2), draw(6, 6, seed=1), draw(8, 6, seed=2)
    f = coupled(matrix, centre)
    every = torch.stack([codes[list(choice)] for choice in itertools.product(range(4), repeat=3)])  # (64, 3, 2)
    values = torch.stack([f(every.unsqueeze(1), None, torch.full((64,), k)) for k in range(8)])
    continuous = torch.linalg.solve(matrix, centre.T).T.view(8, 1, 3, 2)
    rounded = f(nearest(codes)(continuous, None)[0], None, torch.arange(8))
    config = admm.Config(rho=2.0, outer_steps=60, inner_steps=40, lr=0.05, clip=None)
    result = admm.solve(f, nearest(codes), admm.start(continuous), config)
    found = f(codes[result.value], None, torch.arange(8))
    torch.testing.assert_close(result.match_loss, found)
    assert bool((found <= rounded + 1e-12).all()) and bool((found >= values.min(1).values - 1e-12).all())
    assert int((found <= values.min(1).values + 1e-9).sum()) >= 6


def test_a_convex_set_is_solved_to_its_known_optimum_with_vanishing_residuals():
    centres, projected = 3 * draw(2, 1, 2, 3), []

    def ball(v, groups):
        projected.append(v / v.norm(dim=-1, keepdim=True).clamp_min(1))
        return projected[-1], torch.zeros(v.shape[:3], dtype=torch.long)

    config = admm.Config(rho=1.0, outer_steps=60, inner_steps=60, lr=0.01, clip=None)
    result = admm.solve(quadratic(centres), ball, admm.start(torch.zeros_like(centres)), config)
    best = centres / centres.norm(dim=-1, keepdim=True).clamp_min(1)
    torch.testing.assert_close(projected[-1], best, atol=0.02, rtol=0)
    last = [row for row in result.history if row["group"] == 0][-1]
    assert max(last["primal"], last["dual"]) <= 1e-3 * math.sqrt(6) and last["stationarity"] < 0.1


@pytest.mark.parametrize("clip", [1.0, 0.25])
def test_the_golden_trajectory(clip):
    """Guards order, signs and scaling of the updates. It may change only with a deliberate change of algorithm."""
    centres, codes = draw(1, 1, 2, 2), draw(5, 2, seed=3)
    config = admm.Config(rho=0.5, outer_steps=4, inner_steps=5, lr=0.1, clip=clip)
    result = admm.solve(quadratic(centres), nearest(codes), admm.start(draw(1, 1, 2, 2, seed=4)), config)
    x, lam, f = draw(1, 1, 2, 2, seed=4), torch.zeros(1, 1, 2, 2, dtype=WIDE), quadratic(centres)
    for row in result.history:
        z, ids = nearest(codes)(x + lam / 0.5, None)
        variable = x.clone().requires_grad_(True)
        adam = torch.optim.Adam([variable], lr=0.1)
        for _ in range(5):
            adam.zero_grad()
            (f(variable, ids, [0]) + 0.25 * (variable - z + lam / 0.5).square().sum()).backward()
            torch.nn.utils.clip_grad_norm_([variable], clip)
            adam.step()
        new = variable.detach()
        lam = lam + 0.5 * (new - z)
        gradient = 2 * (new - centres)
        expected = {
            "match_x": f(new, ids, [0]), "match_z": f(z, ids, [0]), "primal": (new - z).norm(),
            "dual": (0.5 * (new - x)).norm(), "stationarity": (gradient + lam).norm(),
        }  # fmt: skip
        x = new
        assert {name: row[name] for name in expected} == pytest.approx(
            {k: float(v) for k, v in expected.items()}, rel=1e-4
        )
    torch.testing.assert_close(result.state.lam, lam, rtol=1e-4, atol=1e-6)


def test_the_answer_is_the_projected_iterate_with_the_lowest_match_z_not_the_last():
    codes = torch.tensor([[0.0], [1.0], [2.0]], dtype=WIDE)
    order = iter([2, 1, 0, 2])

    def scripted(v, groups):
        ids = torch.full(v.shape[:3], next(order))
        return codes[ids], ids

    config = admm.Config(outer_steps=3, inner_steps=1)
    f = quadratic(torch.full((1, 1, 1, 1), 0.9, dtype=WIDE))
    result = admm.solve(f, scripted, admm.start(torch.zeros(1, 1, 1, 1, dtype=WIDE)), config)
    assert result.value.item() == 1 and result.match_loss.item() == pytest.approx(0.01)
    assert [row["match_z"] for row in result.history] == pytest.approx([1.21, 0.01, 0.81])


def test_the_last_x_is_projected_too():
    codes = torch.tensor([[0.0], [1.0]], dtype=WIDE)
    config = admm.Config(outer_steps=1, inner_steps=200, lr=0.05, rho=1e-3)
    f = quadratic(torch.ones(1, 1, 1, 1, dtype=WIDE))
    result = admm.solve(f, nearest(codes), admm.start(torch.zeros(1, 1, 1, 1, dtype=WIDE)), config)
    assert result.history[0]["match_z"] == 1.0 and result.value.item() == 1 and result.match_loss.item() == 0.0


def test_groups_do_not_influence_one_another():
    codes, centres, x = draw(9, 2), draw(3, 2, 2, 2, seed=1), draw(3, 2, 2, 2, seed=2)
    config = admm.Config(rho=1.0, outer_steps=6, inner_steps=7, lr=0.1)
    together = admm.solve(quadratic(centres), nearest(codes), admm.start(x), config)
    for group in range(3):
        one = slice(group, group + 1)
        alone = admm.solve(quadratic(centres[one]), nearest(codes), admm.start(x[one]), config)
        assert torch.equal(alone.value[0], together.value[group])
        torch.testing.assert_close(alone.state.x[0], together.state.x[group])


@pytest.mark.parametrize("cut", [1, 3, 5])
def test_a_run_continued_from_a_result_equals_the_uninterrupted_one(cut):
    codes, centres, x = draw(9, 2), draw(2, 2, 2, 2, seed=1), draw(2, 2, 2, 2, seed=2)
    config = admm.Config(rho=1.0, outer_steps=6, inner_steps=7, lr=0.1)
    held = []
    whole = admm.solve(quadratic(centres), nearest(codes), admm.start(x), config, held.append)
    continued = admm.solve(quadratic(centres), nearest(codes), held[cut - 1], config)
    assert torch.equal(continued.value, whole.value) and torch.equal(continued.state.x, whole.state.x)
    clockless = [[{k: v for k, v in row.items() if k != "seconds"} for row in r.history] for r in (continued, whole)]
    assert clockless[0] == clockless[1] and continued.reason == whole.reason
    again = admm.solve(quadratic(centres), nearest(codes), whole, config)
    assert torch.equal(again.value, whole.value) and again.history == whole.history


def test_a_group_that_turns_non_finite_stops_with_a_reason_and_leaves_the_others():
    codes, centres = draw(9, 2), draw(2, 1, 2, 2, seed=1)

    def poisoned(x, ids, groups):
        return quadratic(centres)(x, ids, groups) * torch.where(groups == 0, torch.nan, 1.0)

    config = admm.Config(rho=1.0, outer_steps=5, inner_steps=4, lr=0.1)
    start = admm.start(draw(2, 1, 2, 2))
    result = admm.solve(poisoned, nearest(codes), start, config)
    alone = admm.solve(quadratic(centres), nearest(codes), start, config)
    assert result.reason == (admm.NON_FINITE.format(1), admm.STEP_LIMIT.format(5))
    assert torch.equal(result.value[1], alone.value[1]) and math.isinf(result.match_loss[0])


def test_each_groups_gradient_is_clipped_by_itself():
    centres = torch.tensor([1e6, 0.3], dtype=WIDE).view(2, 1, 1, 1)
    codes = torch.zeros(1, 1, dtype=WIDE)
    config = admm.Config(rho=1.0, outer_steps=1, inner_steps=3, lr=0.01, clip=1.0)
    both = admm.solve(quadratic(centres), nearest(codes), admm.start(torch.zeros_like(centres)), config)
    small = admm.solve(quadratic(centres[1:]), nearest(codes), admm.start(torch.zeros(1, 1, 1, 1, dtype=WIDE)), config)
    torch.testing.assert_close(both.state.x[1], small.state.x[0])


def test_a_gradient_below_the_clip_is_left_as_it_is_and_one_above_it_gets_that_norm():
    """The projection leaves x where it is, so that z = x and lam = 0 in the only step."""
    centres, handed = draw(1, 1, 2, 2), {}
    x, norms = centres + 0.1 * draw(1, 1, 2, 2, seed=1), {clip: [] for clip in (None, 1e3, 0.05)}
    for clip, seen in norms.items():

        def step(self, own=torch.optim.Adam.step, seen=seen):
            seen.append(self.param_groups[0]["params"][0].grad.clone())
            return own(self)

        config = admm.Config(rho=0.5, outer_steps=1, inner_steps=4, lr=0.01, clip=clip)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.optim.Adam, "step", step)
            result = admm.solve(quadratic(centres), nowhere, admm.start(x), config)
        handed[clip] = (result.state.x, torch.stack(seen))
    assert torch.equal(handed[None][1], handed[1e3][1]) and torch.equal(handed[None][0], handed[1e3][0])
    free, clipped = (handed[clip][1].flatten(1).norm(dim=1) for clip in (None, 0.05))
    assert bool((free > 0.05).all()) and bool((free < 1).all())
    torch.testing.assert_close(clipped, torch.full((4,), 0.05, dtype=WIDE))


@pytest.mark.parametrize(
    "settings",
    [
        {"rho": 0}, {"rho": -1.0}, {"rho": math.nan}, {"rho": math.inf}, {"outer_steps": 0}, {"inner_steps": 0},
        {"inner_steps": 2.5}, {"lr": 0}, {"clip": 0}, {"clip": -1.0}, {"clip": math.nan}, {"rho": "0.1"},
        {"outer_steps": True},
    ],
)  # fmt: skip
def test_bad_settings_are_refused_by_name(settings):
    (name, value), *_ = settings.items()
    with pytest.raises(UserError, match=f"{name} = {value!r}.*must"):
        admm.Config(**settings)


def test_a_start_that_is_not_finite_is_refused():
    with pytest.raises(UserError, match="^the initial x has values that are not finite: start from finite embeddings$"):
        admm.start(torch.full((1, 1, 1, 1), torch.nan))


def test_the_number_of_groups_in_a_pass_changes_no_number():
    codes, centres = draw(12, 3), draw(5, 2, 2, 3, seed=1)
    seen, results = [], []
    for size in (None, 1, 2):
        config = admm.Config(rho=1.0, outer_steps=4, inner_steps=5, lr=0.05, groups_per_pass=size)
        f = quadratic(centres)

        def counted(x, ids, groups, f=f):
            seen.append(len(x))
            return f(x, ids, groups)

        results.append(admm.solve(counted, nearest(codes), admm.start(draw(5, 2, 2, 3, seed=2)), config))
        assert set(seen) == {None: {5}, 1: {1}, 2: {2, 1}}[size]
        seen.clear()
    for other in results[1:]:
        assert torch.equal(other.value, results[0].value)
        torch.testing.assert_close(other.state.x, results[0].state.x)
    with pytest.raises(UserError, match="groups_per_pass = 0, it must be a whole number of at least 1"):
        admm.Config(groups_per_pass=0)


# ---------------------------------------------------------------- the bookkeeping, number by number


def scripted(*steps):
    """A projection that returns the given tokens (L,) one step after the other; a token is its own embedding."""
    order = iter(steps)

    def project(v, groups):
        ids = torch.tensor(next(order)).expand(v.shape[:3])
        return ids.to(v.dtype).unsqueeze(-1).expand(v.shape), ids

    return project


def flat(x, ids, groups):
    """A loss that is the same everywhere."""
    return (x * 0).sum((1, 2, 3)) + 0.5


def test_the_defaults_are_the_published_ones():
    config = admm.Config()
    assert (config.rho, config.outer_steps, config.inner_steps, config.lr, config.clip) == (0.1, 30, 50, 0.008, 1.0)
    assert config.groups_per_pass is None


def test_a_result_without_vectors_has_all_else():
    begin = admm.start(draw(2, 3, 4, 5))
    lean = begin.without_vectors()
    assert [part.numel() for part in (lean.state.x, lean.state.lam)] == [0, 0]
    for name in ("value", "match_loss"):
        assert getattr(lean, name) is getattr(begin, name)
    for name in ("ids", "active"):
        assert getattr(lean.state, name) is getattr(begin.state, name)
    assert (lean.reason, lean.history, lean.state.step) == (begin.reason, begin.history, begin.state.step)


def test_a_step_holds_four_vectors_of_each_group_while_the_objective_is_asked():
    codes, held = draw(5, 2), set()
    config = admm.Config(outer_steps=3, inner_steps=1, groups_per_pass=1)
    begin = admm.start(draw(3, 1, 3, 2))

    def objective(x, ids, groups):
        if x.requires_grad and groups == 2:  # the last pass holds most, and to look through all objects takes its time
            found = (
                some.untyped_storage()
                for some in gc.get_objects()
                if type(some) is torch.Tensor and some.shape == begin.state.x.shape
            )
            held.add(
                len(
                    {some.data_ptr() for some in found if some.nbytes() == 8 * begin.state.x.numel()}
                    - {begin.state.x.data_ptr()}
                )
            )
        return x.square().sum((1, 2, 3))

    admm.solve(objective, nearest(codes), begin, config)
    assert max(held) == 4  # x as it was and as it will be, z, lam; where it began is the caller's


def test_a_start_is_as_said():
    x = draw(2, 3, 4, 5)
    begin = admm.start(x)
    state = begin.state
    assert torch.equal(state.x, x) and state.x is not x and not state.lam.any() and state.step == 0
    assert state.lam.untyped_storage().nbytes() == x.element_size()  # zeros take no memory
    assert state.active.tolist() == [True, True]
    assert torch.equal(state.ids, torch.full((2, 3, 4), -1)) and torch.equal(begin.value, state.ids)
    assert state.active.dtype == torch.bool and state.ids.dtype == torch.long
    assert begin.match_loss.tolist() == [math.inf, math.inf] and begin.reason == ("", "") and begin.history == []


def test_the_share_of_changed_tokens():
    config = admm.Config(outer_steps=6, inner_steps=1)
    tokens = scripted([1, 2], [1, 3], [1, 3], [4, 3], [4, 3], [4, 3], [4, 3])
    result = admm.solve(flat, tokens, admm.start(torch.zeros(1, 1, 2, 1, dtype=WIDE)), config)
    assert [row["changed"] for row in result.history] == [1.0, 0.5, 0.0, 0.5, 0.0, 0.0]
    assert [(row["step"], row["group"]) for row in result.history] == [(step, 0) for step in range(1, 7)]


def test_among_equal_projections_the_first_is_kept():
    config = admm.Config(outer_steps=3, inner_steps=1)
    result = admm.solve(flat, scripted([1], [2], [3], [4]), admm.start(torch.zeros(1, 1, 1, 1, dtype=WIDE)), config)
    assert result.value.item() == 1 and result.match_loss.item() == 0.5


def test_the_last_inner_gradient_is_recorded_before_it_is_clipped():
    centres = torch.full((1, 1, 1, 1), 50.0, dtype=WIDE)
    config = admm.Config(rho=1e-3, outer_steps=1, inner_steps=1, lr=0.01, clip=0.25)
    start = admm.start(torch.zeros_like(centres))
    result = admm.solve(quadratic(centres), nearest(torch.zeros(1, 1, dtype=WIDE)), start, config)
    assert result.history[0]["inner_gradient"] == pytest.approx(100.0) and result.history[0]["seconds"] > 0
    free = admm.Config(rho=1e-3, outer_steps=1, inner_steps=3, lr=0.01, clip=None)
    moved = admm.solve(quadratic(centres), nearest(torch.zeros(1, 1, dtype=WIDE)), start, free)
    assert moved.state.x.item() == pytest.approx(0.03, rel=1e-3)  # Adam's first steps are of size lr


def test_a_callback_sees_every_step_and_decides_nothing():
    def poisoned(x, ids, groups):
        return flat(x, ids, groups) * torch.where(groups == 0, torch.nan, 1.0)

    config, seen = admm.Config(outer_steps=5, inner_steps=1), []
    start = admm.start(torch.zeros(2, 1, 1, 1, dtype=WIDE))
    result = admm.solve(
        poisoned, scripted(*[[1]] * 9), start, config, lambda r: seen.append(r.state.step) or len(seen) == 3
    )
    assert seen == [1, 2, 3, 4, 5] and result.reason == (admm.NON_FINITE.format(1), admm.STEP_LIMIT.format(5))
    assert not result.state.active.any()
    assert [row["group"] for row in result.history] == [0, 1, 1, 1, 1, 1]


def test_a_projection_sees_x_plus_the_scaled_dual_of_the_groups_that_move():
    asked, codes, centres = [], draw(4, 2), draw(2, 1, 2, 2, seed=1)

    def watched(v, groups):
        asked.append((v.clone(), groups.tolist()))
        return nearest(codes)(v, groups)

    config = admm.Config(rho=0.5, outer_steps=2, inner_steps=2, lr=0.1)
    states = []
    admm.solve(quadratic(centres), watched, admm.start(draw(2, 1, 2, 2)), config, lambda r: states.append(r.state))
    for (v, groups), state in zip(asked[1:], states, strict=True):
        assert groups == [0, 1]
        torch.testing.assert_close(v, state.x + state.lam / 0.5)


def test_the_seconds_of_all_rows_are_those_of_the_run():
    config = admm.Config(outer_steps=3, inner_steps=2)
    begun = time.perf_counter()
    result = admm.solve(flat, scripted(*[[1]] * 4), admm.start(torch.zeros(50, 1, 1, 1, dtype=WIDE)), config)
    spent = time.perf_counter() - begun
    assert 0 < sum(row["seconds"] for row in result.history) <= spent


def test_what_is_made_lies_where_x_lies_and_what_leads_the_host_on_the_cpu():
    """x is on another device, as it is on a GPU."""
    begin = admm.start(draw(3, 1, 2, 2))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torch.isfinite", lambda x: torch.ones(1, dtype=torch.bool))
        moved = admm.start(torch.empty(3, 1, 2, 2, device="meta"))
    for name, there in (("value", "meta"), ("match_loss", "meta")):
        assert getattr(moved, name).device.type == there and getattr(begin, name).device.type == "cpu"
    assert moved.state.ids.device.type == "meta" and moved.state.active.device.type == "cpu"


@pytest.mark.parametrize("name", ["x", "lam"])
def test_the_last_projection_is_of_the_groups_that_are_finite(name):
    config = admm.Config(outer_steps=1, inner_steps=1)
    begin = admm.start(torch.zeros(2, 1, 2, 1, dtype=WIDE))
    part = getattr(begin.state, name).clone()
    part[0, 0, 1] = math.inf
    ended = replace(begin, state=replace(begin.state, **{name: part}, active=torch.zeros(2, dtype=torch.bool)))
    result = admm.solve(flat, scripted([1, 2]), ended, config)
    assert result.value.tolist() == [[[-1, -1]], [[1, 2]]] and result.match_loss.tolist() == [math.inf, 0.5]
    nothing = replace(ended, state=replace(ended.state, **{name: torch.full_like(part, math.nan)}))
    assert admm.solve(flat, scripted(), nothing, config) is nothing
