"""The solver against problems with known answers, and its bookkeeping; no language model is involved."""

import itertools
import math

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
    """A convex quadratic that couples the positions: f(x) = ||M vec(x) - centre||^2, so nearest-by-position is not optimal."""
    return lambda x, ids, groups: (x.flatten(1) @ matrix.T - centre[groups]).square().sum(-1)


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=WIDE)


def test_a_quadratic_over_a_discrete_set_ends_at_its_known_optimum():
    codes, centres = draw(12, 3), draw(40, 1, 1, 3, seed=1)
    config = admm.Config(rho=1.0, outer_steps=25, inner_steps=40, lr=0.05)
    result = admm.solve(quadratic(centres), nearest(codes), admm.start(draw(40, 1, 1, 3, seed=2), config), config)
    best = torch.cdist(centres.flatten(0, 2), codes).argmin(-1).view(40, 1, 1)
    assert torch.equal(result.value, best)
    torch.testing.assert_close(result.match, (codes[best] - centres).square().sum((1, 2, 3)))


def test_a_coupled_quadratic_over_a_small_discrete_set_is_no_worse_than_rounding_and_near_the_best_of_all():
    codes, matrix, centre = draw(4, 2), draw(6, 6, seed=1), draw(8, 6, seed=2)
    f = coupled(matrix, centre)
    every = torch.stack([codes[list(choice)] for choice in itertools.product(range(4), repeat=3)])  # (64, 3, 2)
    values = torch.stack([f(every.unsqueeze(1), None, torch.full((64,), k)) for k in range(8)])
    continuous = torch.linalg.solve(matrix, centre.T).T.view(8, 1, 3, 2)
    rounded = f(nearest(codes)(continuous, None)[0], None, torch.arange(8))
    config = admm.Config(rho=2.0, outer_steps=60, inner_steps=40, lr=0.05, clip=None)
    result = admm.solve(f, nearest(codes), admm.start(continuous, config), config)
    found = f(codes[result.value], None, torch.arange(8))
    torch.testing.assert_close(result.match, found)
    assert bool((found <= rounded + 1e-12).all()) and bool((found >= values.min(1).values - 1e-12).all())
    assert int((found <= values.min(1).values + 1e-9).sum()) >= 6


def test_a_convex_set_is_solved_to_its_known_optimum_with_vanishing_residuals():
    centres = 3 * draw(2, 1, 2, 3)

    def ball(v, groups):
        return v / v.norm(dim=-1, keepdim=True).clamp_min(1), torch.zeros(v.shape[:3], dtype=torch.long)

    config = admm.Config(rho=1.0, outer_steps=300, inner_steps=60, lr=0.01, clip=None, tolerance=1e-3)
    result = admm.solve(quadratic(centres), ball, admm.start(torch.zeros_like(centres), config), config)
    best = centres / centres.norm(dim=-1, keepdim=True).clamp_min(1)
    torch.testing.assert_close(result.state.z, best, atol=0.02, rtol=0)
    assert result.reason == (admm.CONVERGED,) * 2
    last = [row for row in result.history if row["group"] == 0][-1]
    assert max(last["primal"], last["dual"]) <= 1e-3 * math.sqrt(6) and last["stationarity"] < 0.1


def test_the_golden_trajectory():
    """Guards order, signs and scaling of the three updates. It may change only with a deliberate change of algorithm."""
    centres, codes = draw(1, 1, 2, 2), draw(5, 2, seed=3)
    config = admm.Config(rho=0.5, outer_steps=4, inner_steps=5, lr=0.1)
    result = admm.solve(quadratic(centres), nearest(codes), admm.start(draw(1, 1, 2, 2, seed=4), config), config)
    x, lam, f = draw(1, 1, 2, 2, seed=4), torch.zeros(1, 1, 2, 2, dtype=WIDE), quadratic(centres)
    for row in result.history:
        z, ids = nearest(codes)(x + lam / 0.5, None)
        variable = x.clone().requires_grad_(True)
        adam = torch.optim.Adam([variable], lr=0.1)
        for _ in range(5):
            adam.zero_grad()
            (f(variable, ids, [0]) + 0.25 * (variable - z + lam / 0.5).square().sum()).backward()
            torch.nn.utils.clip_grad_norm_([variable], 1.0)
            adam.step()
        new = variable.detach()
        lam = lam + 0.5 * (new - z)
        gradient = 2 * (new - centres)
        expected = {
            "match_x": f(new, ids, [0]),
            "match_z": f(z, ids, [0]),
            "primal": (new - z).norm(),
            "dual": (0.5 * (new - x)).norm(),
            "stationarity": (gradient + lam).norm(),
        }
        x = new
        assert {name: row[name] for name in expected} == pytest.approx({k: float(v) for k, v in expected.items()}, rel=1e-4)
    torch.testing.assert_close(result.state.lam, lam, rtol=1e-4, atol=1e-6)


def test_the_answer_is_the_projected_iterate_with_the_lowest_match_z_not_the_last():
    codes = torch.tensor([[0.0], [1.0], [2.0]], dtype=WIDE)
    order = iter([2, 1, 0, 2])

    def scripted(v, groups):
        ids = torch.full(v.shape[:3], next(order))
        return codes[ids], ids

    config = admm.Config(outer_steps=3, inner_steps=1)
    f = quadratic(torch.full((1, 1, 1, 1), 0.9, dtype=WIDE))
    result = admm.solve(f, scripted, admm.start(torch.zeros(1, 1, 1, 1, dtype=WIDE), config), config)
    assert result.value.item() == 1 and result.match.item() == pytest.approx(0.01)
    assert [row["match_z"] for row in result.history] == pytest.approx([1.21, 0.01, 0.81])


def test_the_last_x_is_projected_too():
    codes = torch.tensor([[0.0], [1.0]], dtype=WIDE)
    config = admm.Config(outer_steps=1, inner_steps=200, lr=0.05, rho=1e-3)
    f = quadratic(torch.ones(1, 1, 1, 1, dtype=WIDE))
    result = admm.solve(f, nearest(codes), admm.start(torch.zeros(1, 1, 1, 1, dtype=WIDE), config), config)
    assert result.history[0]["match_z"] == 1.0 and result.value.item() == 1 and result.match.item() == 0.0


def test_groups_do_not_influence_one_another():
    codes, centres, x = draw(9, 2), draw(3, 2, 2, 2, seed=1), draw(3, 2, 2, 2, seed=2)
    config = admm.Config(rho=1.0, outer_steps=6, inner_steps=7, lr=0.1)
    together = admm.solve(quadratic(centres), nearest(codes), admm.start(x, config), config)
    for group in range(3):
        one = slice(group, group + 1)
        alone = admm.solve(quadratic(centres[one]), nearest(codes), admm.start(x[one], config), config)
        assert torch.equal(alone.value[0], together.value[group])
        torch.testing.assert_close(alone.state.x[0], together.state.x[group])


@pytest.mark.parametrize("cut", [1, 3, 5])
def test_a_run_continued_from_a_result_equals_the_uninterrupted_one(cut):
    codes, centres, x = draw(9, 2), draw(2, 2, 2, 2, seed=1), draw(2, 2, 2, 2, seed=2)
    config = admm.Config(rho=1.0, outer_steps=6, inner_steps=7, lr=0.1)
    held = []
    whole = admm.solve(quadratic(centres), nearest(codes), admm.start(x, config), config, held.append)
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
    start = admm.start(draw(2, 1, 2, 2), config)
    result = admm.solve(poisoned, nearest(codes), start, config)
    alone = admm.solve(quadratic(centres), nearest(codes), start, config)
    assert result.reason == (admm.NON_FINITE.format(1), admm.STEP_LIMIT.format(5))
    assert torch.equal(result.value[1], alone.value[1]) and math.isinf(result.match[0])


def test_stopping_by_stable_tokens_and_by_callback():
    codes, centres = draw(3, 2), draw(1, 1, 2, 2, seed=1)
    config = admm.Config(rho=5.0, outer_steps=50, inner_steps=4, lr=0.01, patience=3)
    start = admm.start(draw(1, 1, 2, 2), config)
    result = admm.solve(quadratic(centres), nearest(codes), start, config)
    assert result.reason == (admm.STABLE.format(3),) and result.state.step < 50
    stopped = admm.solve(quadratic(centres), nearest(codes), start, config, lambda r: r.state.step == 2)
    assert stopped.reason == (admm.STOPPED.format(2),) and len(stopped.history) == 2


def test_balancing_changes_rho_and_records_it():
    centres = 100 * torch.ones(1, 1, 1, 1, dtype=WIDE)
    config = admm.Config(rho=1e-4, outer_steps=8, inner_steps=30, lr=0.5, balance=True)
    codes = torch.tensor([[0.0], [1.0]], dtype=WIDE)
    result = admm.solve(quadratic(centres), nearest(codes), admm.start(torch.zeros_like(centres), config), config)
    recorded = [row["rho"] for row in result.history]
    assert recorded[0] == pytest.approx(1e-4) and recorded[-1] > recorded[0]
    fixed = admm.Config(rho=1e-4, outer_steps=8, inner_steps=3)
    unchanged = admm.solve(quadratic(centres), nearest(codes), admm.start(torch.zeros_like(centres), fixed), fixed)
    assert [row["rho"] for row in unchanged.history] == [1e-4] * 8


def test_each_groups_gradient_is_clipped_by_itself():
    centres = torch.tensor([1e6, 0.3], dtype=WIDE).view(2, 1, 1, 1)
    codes = torch.zeros(1, 1, dtype=WIDE)
    config = admm.Config(rho=1.0, outer_steps=1, inner_steps=3, lr=0.01, clip=1.0)
    both = admm.solve(quadratic(centres), nearest(codes), admm.start(torch.zeros_like(centres), config), config)
    small = admm.solve(quadratic(centres[1:]), nearest(codes), admm.start(torch.zeros(1, 1, 1, 1, dtype=WIDE), config), config)
    torch.testing.assert_close(both.state.x[1], small.state.x[0])


@pytest.mark.parametrize(
    "settings",
    [
        {"rho": 0}, {"rho": -1.0}, {"rho": math.nan}, {"rho": math.inf}, {"outer_steps": 0}, {"inner_steps": 0},
        {"inner_steps": 2.5}, {"lr": 0}, {"clip": 0}, {"clip": -1.0}, {"tolerance": -1}, {"patience": -1}, {"balance_ratio": 0},
    ],
)  # fmt: skip
def test_bad_settings_are_refused_by_name(settings):
    (name, value), *_ = settings.items()
    with pytest.raises(UserError, match=f"{name} = {value!r}.*must"):
        admm.Config(**settings)


def test_a_start_that_is_not_finite_is_refused():
    with pytest.raises(UserError, match="not finite"):
        admm.start(torch.full((1, 1, 1, 1), torch.nan), admm.Config())


def test_the_number_of_groups_in_a_pass_changes_no_number():
    codes, centres = draw(12, 3), draw(5, 2, 2, 3, seed=1)
    seen, results = [], []
    for size in (None, 1, 2):
        config = admm.Config(rho=1.0, outer_steps=4, inner_steps=5, lr=0.05, groups_per_pass=size)
        f = quadratic(centres)

        def counted(x, ids, groups, f=f):
            seen.append(len(x))
            return f(x, ids, groups)

        results.append(admm.solve(counted, nearest(codes), admm.start(draw(5, 2, 2, 3, seed=2), config), config))
        assert set(seen) == {None: {5}, 1: {1}, 2: {2, 1}}[size]
        seen.clear()
    for other in results[1:]:
        assert torch.equal(other.value, results[0].value)
        torch.testing.assert_close(other.state.x, results[0].state.x)
    with pytest.raises(UserError, match="groups_per_pass = 0, it must be a whole number of at least 1"):
        admm.Config(groups_per_pass=0)
