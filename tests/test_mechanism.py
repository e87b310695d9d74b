"""The Gaussian mechanism against second implementations, a search for worse neighbours, and the noise's statistics."""

import dataclasses
import math

import numpy
import pytest
import torch
from dp_accounting import GaussianDpEvent, SelfComposedDpEvent
from dp_accounting.pld import PLDAccountant
from scipy import special, stats

from gradmm import mechanism
from gradmm.errors import UserError
from gradmm.gradients import Factors

EPSILONS = numpy.logspace(-3, 2, 11)
DELTAS = numpy.logspace(-12, -2, 11)


def entry(**changes) -> mechanism.LedgerEntry:
    given = {
        "epsilon": 1.0, "delta": 1e-5, "relation": "replace-one", "clip": 1.0, "calibration": "exact",
        "coordinates": 64,
    }  # fmt: skip
    return mechanism.plan_entry("sums", "head", **{**given, **changes})


def balle_wang_sigma(epsilon: float, delta: float) -> float:
    """Algorithm 1 of Balle and Wang (2018): sigma = alpha / sqrt(2 epsilon) at sensitivity 1."""

    def loss(sign: int, v: float) -> float:
        above = special.log_ndtr(sign * math.sqrt(epsilon * v))
        below = epsilon + special.log_ndtr(-math.sqrt(epsilon * (v + 2)))
        return math.exp(above) * -math.expm1(below - above)

    sign = 1 if delta >= loss(1, 0.0) else -1
    low, high = 0.0, 1.0
    while (loss(sign, high) <= delta) == (sign > 0):
        high *= 2
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if (loss(sign, middle) <= delta) == (sign > 0) else (low, middle)
    return (math.sqrt(1 + low / 2) - sign * math.sqrt(low / 2)) / math.sqrt(2 * epsilon)


@pytest.mark.parametrize("epsilon", EPSILONS)
def test_the_exact_noise_is_balle_and_wangs(epsilon):
    expected = [balle_wang_sigma(epsilon, delta) for delta in DELTAS]
    assert [mechanism.exact_sigma(epsilon, delta) for delta in DELTAS] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("epsilon", EPSILONS)
def test_no_calibration_uses_less_noise_than_needed(epsilon):
    for delta in DELTAS:
        exact = mechanism.exact_sigma(epsilon, delta)
        assert mechanism.zhao2019_sigma(epsilon, delta) >= exact
        if epsilon <= 1:
            assert mechanism.classic_sigma(epsilon, delta) >= exact


def test_epsilon_and_sigma_are_inverses():
    for epsilon in EPSILONS:
        for delta in DELTAS:
            found = mechanism.total_epsilon([entry(epsilon=float(epsilon), delta=float(delta))], float(delta))
            assert found == pytest.approx(epsilon, rel=1e-6) and found <= epsilon * (1 + 1e-12)


# ---------------------------------------------------------------- composition and budget


@pytest.mark.parametrize("times", [1, 3, 10])
def test_composition_agrees_with_the_privacy_loss_accountant(times):
    one = entry(epsilon=0.7)
    accountant = PLDAccountant().compose(SelfComposedDpEvent(GaussianDpEvent(one.sigma / one.sensitivity), times))
    exact, bound = mechanism.total_epsilon([one] * times, 1e-5), accountant.get_epsilon(1e-5)
    assert exact <= bound * (1 + 1e-9) and exact == pytest.approx(bound, rel=2e-3)


def test_a_budget_is_never_exceeded():
    ledger = mechanism.Ledger(1.0, 1e-5)
    ledger.charge(entry(epsilon=0.6))
    ledger.charge(entry(epsilon=0.6))
    before = ledger.entries
    with pytest.raises(UserError, match="the budget is 1 and 0.8"):
        ledger.charge(entry(epsilon=0.6))
    assert ledger.entries is before and ledger.spent < 1.0


def test_a_budget_may_be_spent_whole_and_only_once():
    ledger = mechanism.Ledger(1.0, 1e-5)
    ledger.charge(entry())
    for epsilon in (1e-3, 1.0):
        with pytest.raises(UserError, match="budget"):
            ledger.charge(entry(epsilon=epsilon))


def test_a_ledger_continues_from_entries_and_refuses_what_does_not_fit():
    spent = (entry(epsilon=0.5),)
    assert mechanism.Ledger(1.0, 1e-5, spent).spent == pytest.approx(0.5, rel=1e-6)
    with pytest.raises(UserError, match="budget"):
        mechanism.Ledger(0.4, 1e-5, spent)
    with pytest.raises(UserError, match="do not add up"):
        mechanism.Ledger(9.0, 1e-5, (*spent, entry(relation="add-remove")))
    with pytest.raises(UserError, match="epsilon"):
        mechanism.Ledger(0.0, 1e-5)


def test_a_claim_at_a_smaller_delta_costs_more_of_the_budget():
    one = entry(epsilon=1.0, delta=1e-3)
    with pytest.raises(UserError, match="budget"):
        mechanism.Ledger(1.0, 1e-6).charge(one)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"epsilon": 0}, "epsilon = 0"), ({"epsilon": -1.0}, "epsilon = -1"), ({"epsilon": math.inf}, "epsilon = inf"),
        ({"epsilon": math.nan}, "epsilon = nan"), ({"epsilon": "1"}, "epsilon = '1'"),
        ({"delta": None}, "delta = None"), ({"delta": 0.0}, "delta = 0.0"), ({"delta": 1.0}, "delta = 1.0"),
        ({"delta": math.nan}, "delta = nan"), ({"clip": 0.0}, "clip = 0.0"), ({"clip": -1.0}, "clip = -1.0"),
        ({"clip": math.inf}, "clip = inf"), ({"relation": "swap"}, "'swap'"), ({"calibration": "tight"}, "'tight'"),
        ({"calibration": "classic", "epsilon": 1.5}, "classic"),
        ({"calibration": "zhao2019", "delta": 0.6}, "delta = 0.6"),
    ],
)  # fmt: skip
def test_a_claim_out_of_range_is_refused(changes, words):
    with pytest.raises(UserError, match=words) as caught:
        entry(**changes)
    assert ": " in str(caught.value) and "\n" not in str(caught.value)


# ---------------------------------------------------------------- clip and sensitivity


def draw_factors(count: int, bias: bool, seed: int = 0, scale: float = 1.0) -> Factors:
    draw = torch.Generator().manual_seed(seed)
    delta, hidden = (torch.randn(count, size, generator=draw, dtype=torch.float64) for size in (5, 4))
    return Factors(delta * scale, hidden, bias)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("clip", [1e-3, 1.0, 8.0, 1e6])
def test_the_clipped_sum_is_that_of_explicit_gradients(bias, clip):
    factors = draw_factors(7, bias)
    expected_weight, expected_bias = torch.zeros(5, 4, dtype=torch.float64), torch.zeros(5, dtype=torch.float64)
    for delta, hidden in zip(factors.delta, factors.hidden, strict=True):
        parts = [torch.outer(delta, hidden).flatten(), delta if bias else delta[:0]]
        scale = min(1.0, clip / torch.cat(parts).norm().item())
        expected_weight, expected_bias = (
            expected_weight + scale * torch.outer(delta, hidden),
            expected_bias + scale * delta,
        )
    weight, found = mechanism.clipped_sum(factors, clip)
    torch.testing.assert_close(weight, expected_weight, rtol=0, atol=1e-5 * min(clip, 1e2))
    if bias:
        torch.testing.assert_close(found, expected_bias, rtol=0, atol=1e-5 * min(clip, 1e2))
    else:
        assert found is None


def test_a_zero_gradient_adds_nothing():
    weight, bias = mechanism.clipped_sum(Factors(torch.zeros(2, 3), torch.randn(2, 4), True), 1.0)
    assert not weight.any() and not bias.any()


def distance(ours: list[Factors], theirs: list[Factors], clip: float) -> torch.Tensor:
    """Joint L2 distance of the sums of all classes of two data sets."""
    squares = [
        (one - other).square().sum()
        for a, b in zip(ours, theirs, strict=True)
        for one, other in zip(mechanism.clipped_sum(a, clip), mechanism.clipped_sum(b, clip), strict=True)
        if one is not None
    ]
    return torch.stack(squares).sum().sqrt()


NEIGHBOURS = {
    # the differing example's class before and after; None is absent
    "same label": ("replace-one", 0, 0, 2.0),
    "new label": ("replace-one", 0, 1, math.sqrt(2)),
    "gone": ("add-remove", 1, None, 1.0),
}


@pytest.mark.parametrize("bias", [pytest.param(False, marks=pytest.mark.slow), True])
@pytest.mark.parametrize("case", NEIGHBOURS)
def test_no_neighbour_is_further_than_the_sensitivity(case, bias):
    """Gradient ascent over both versions of the differing example, from many starts, beside fixed companions."""
    relation, before, after, reach = NEIGHBOURS[case]
    clip, furthest = 0.7, 0.0
    limit = entry(relation=relation, clip=clip).sensitivity
    for start in range(8):
        common = [draw_factors(3, bias, seed=10 + number) for number in range(2)]
        moved = [draw_factors(1, bias, seed=start), draw_factors(1, bias, seed=100 + start, scale=0.01)]
        leaves = [part.requires_grad_() for one in moved for part in (one.delta, one.hidden)]
        ascent = torch.optim.Adam(leaves, lr=0.2)
        for _ in range(60):
            versions = []
            for example, label in zip(moved, (before, after), strict=True):
                joined = Factors(
                    *(torch.cat([getattr(common[label or 0], f), getattr(example, f)]) for f in ("delta", "hidden")),
                    bias,
                )
                versions.append([joined if label == number else common[number] for number in range(2)])
            found = distance(*versions, clip)
            ascent.zero_grad()
            (-found).backward()
            ascent.step()
            furthest = max(furthest, found.item())
    assert furthest <= limit
    assert furthest == pytest.approx(reach * clip, rel=1e-3)


def test_sensitivity_holds_after_rounding_to_the_grid():
    claim = entry(coordinates=20, epsilon=1e-3)
    ours, theirs = draw_factors(4, False, seed=1, scale=50.0), draw_factors(4, False, seed=1, scale=50.0)
    theirs.delta[0] = -ours.delta[0]
    sums = [mechanism.clipped_sum(one, claim.clip)[0] for one in (ours, theirs)]
    rounded = [(one / claim.grid).round() * claim.grid for one in sums]
    assert (rounded[0] - rounded[1]).norm() <= claim.sensitivity


# ---------------------------------------------------------------- noise


def test_noise_is_normal_independent_and_of_the_planned_size():
    claim = entry(coordinates=40_000)
    first, second = (
        mechanism.add_noise(
            torch.zeros(200, 200, dtype=torch.float64), claim.sigma, claim.grid, mechanism.seeded_bits(s)
        )
        for s in (1, 2)
    )
    scaled = (first / claim.sigma).flatten().numpy()
    assert stats.kstest(scaled, "norm").pvalue > 1e-3
    assert scaled.var() == pytest.approx(1, abs=5 * math.sqrt(2 / scaled.size))
    for lag in (1, 2, 200):
        assert abs(numpy.corrcoef(scaled[:-lag], scaled[lag:])[0, 1]) < 5 / math.sqrt(scaled.size)
    assert abs(numpy.corrcoef(scaled, second.flatten().numpy())[0, 1]) < 5 / math.sqrt(scaled.size)


def test_the_systems_noise_is_normal_and_never_repeats():
    one, other = (mechanism.normals(mechanism.system_bits(20_000)) for _ in range(2))
    assert stats.kstest(one, "norm").pvalue > 1e-6
    assert not numpy.isin(one, other).any()


def test_normals_are_symmetric_and_reach_nine_sigma():
    bits = numpy.array([0, 2**63, 2**63 - 1, 2**64 - 1], dtype=numpy.uint64)
    low, high, middle, other = mechanism.normals(bits)
    assert (low, middle) == (-high, -other) and abs(middle) < 1e-15
    assert abs(low) == pytest.approx(9.155, abs=0.001)


def test_released_numbers_are_multiples_of_the_grid_whatever_the_values():
    claim = entry()
    values = torch.randn(64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    noised = mechanism.add_noise(values.clone(), claim.sigma, claim.grid, mechanism.seeded_bits(3))
    alone = mechanism.add_noise(torch.zeros_like(values), claim.sigma, claim.grid, mechanism.seeded_bits(3))
    assert math.log2(claim.grid).is_integer()
    assert ((noised / claim.grid) % 1 == 0).all()
    assert torch.equal(noised - alone, (values / claim.grid).round() * claim.grid)


def test_every_class_weight_and_bias_gets_its_own_noise():
    claim = entry()
    classes = [Factors(torch.zeros(1, 8), torch.zeros(1, 6), True)] * 2
    numbers = torch.cat(
        [
            part.flatten()
            for t in mechanism.noised_sums(classes, claim, mechanism.seeded_bits(0))
            for part in (t.weight, t.bias)
        ]
    )
    assert len(numbers.unique()) == len(numbers) == 2 * 8 * 7
    assert numbers.std() == pytest.approx(claim.sigma, rel=0.3)
    again = mechanism.noised_sums(classes, claim, mechanism.seeded_bits(0))
    assert torch.equal(again[1].bias, numbers[-8:])


def test_entries_are_plain_values():
    assert all(isinstance(value, str | float | int) for value in dataclasses.asdict(entry()).values())


def test_the_older_calibrations_are_those_of_their_papers():
    assert mechanism.classic_sigma(0.5, 1e-5) == pytest.approx(9.689610525210778, rel=1e-12)
    # c^2 = ln(2 / (sqrt(1.00016) - 1)) = ln(2 / 7.99968e-5)
    assert mechanism.zhao2019_sigma(1.0, 1e-5) == pytest.approx((10.12669**0.5 + 11.12669**0.5) / 2**0.5, rel=1e-6)
    assert mechanism.zhao2019_sigma(4.0, 1e-5) == pytest.approx((10.12669**0.5 + 14.12669**0.5) / 32**0.5, rel=1e-6)


def test_nothing_spent_is_nothing_and_neighbours_of_two_kinds_do_not_add_up():
    assert mechanism.total_epsilon([], 1e-5) == 0.0
    mixed = [entry(relation=relation) for relation in ("replace-one", "add-remove")]
    words = "the ledger holds the relations add-remove and replace-one, which do not add up: use one throughout"
    with pytest.raises(UserError, match=f"^{words}$"):
        mechanism.total_epsilon(mixed, 1e-5)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: mechanism.Ledger(1.0, 0.5), "^delta = 0.5, it must be above 0"),
        (lambda: mechanism.Ledger(-1.0, 1e-5), "^epsilon = -1.0, it must be positive"),
        (lambda: mechanism.Ledger(1.0, 1e-5, "all"), "^the ledger's entries .*: give the `ledger` of a Release$"),
        (
            lambda: mechanism.Ledger(1.0, 1e-5).check("all"),
            "^the expense .*: give a LedgerEntry, as in the `ledger` of a Release$",
        ),
    ],
)
def test_what_is_no_budget_and_no_expense_is_named(make, words):
    with pytest.raises(UserError, match=words):
        make()


def test_a_fixed_seed_s_bits_stay_what_they_were():
    assert [hex(number) for number in mechanism.seeded_bits(0)(2).tolist()] == [
        "0x7a6a4a3e4c70c946",
        "0xd3b59489c72e9737",
    ]


@pytest.mark.parametrize(("relation", "times"), [("replace-one", 2), ("add-remove", 1)])
def test_the_sensitivity_grows_with_the_clip(relation, times):
    assert entry(relation=relation, clip=3.0).sensitivity == 3.0 * times
