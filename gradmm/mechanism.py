r"""The Gaussian mechanism: clipped sums, how much noise, from where, and a ledger of what was spent.

Knows no model and no text: it is given gradients as factor pairs and a budget. For values q(data) whose L2
distance between neighbouring data sets is at most `sensitivity`, q + N(0, sigma^2 I) is (epsilon, delta)-differentially
private if and only if, with mu = sensitivity / sigma and Phi the normal distribution function,

    Phi(mu/2 - epsilon/mu) - exp(epsilon) Phi(-mu/2 - epsilon/mu) <= delta

(Balle and Wang 2018, arXiv 1805.06530, theorem 8). Several releases of this kind, also ones chosen after seeing earlier
ones, are together as private as one with mu^2 = sum of mu_i^2 (Dong, Roth and Su 2019, arXiv 1905.02383, section 3).
Letters: n examples of a class, R rows and r directions of the release space.
"""

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy
import torch
from scipy.special import ndtri
from torch import Tensor

from gradmm.errors import Rule, check_values, is_number, one_of, require, require_type
from gradmm.gradients import DenseTarget, Factors
from gradmm.seeds import generator

RELATIONS = {"replace-one": 2.0, "add-remove": 1.0}  # sensitivity of a clipped sum, in units of the clip
# A mechanism that hands out each example as it is with the chance delta is (0, delta)-private, so a delta of 1 / n
# promises next to nothing. The number of examples is private; this bound is public, and no claim above it is called
# private, however many there are.
LARGEST_DELTA = 0.01
CLIP_RANGE = (1e-30, 1e30)  # a float32 holds the noised sums
SOLVER_TOLERANCE = 1e-16
SOLVER_SLACK = 1e-9  # relative: above the root finder's tolerance, so that the claim errs on the safe side
ROUNDING_SLACK = 2.0**-20  # share of the clip given up so that rounding cannot exceed the sensitivity
BLOCK = 1 << 20  # noise values drawn at once


# ---------------------------------------------------------------- how much noise


def exact_sigma(epsilon: float, delta: float) -> float:
    """The smallest sigma at sensitivity 1, by the exact condition above (dp-accounting's solver, rounded up)."""
    import dp_accounting

    return dp_accounting.get_sigma_gaussian(epsilon, delta, tol=SOLVER_TOLERANCE) * (1 + SOLVER_SLACK)


def classic_sigma(epsilon: float, delta: float) -> float:
    """sqrt(2 ln(1.25/delta)) / epsilon, valid for epsilon <= 1 alone (Dwork and Roth 2014, theorem A.1).

    Raises:
        UserError: epsilon above 1.

    >>> classic_sigma(1.0, 1e-5) > exact_sigma(1.0, 1e-5)  # the exact calibration needs less noise
    True
    """
    require(
        epsilon <= 1,
        f"epsilon = {epsilon} with the classic calibration, which is proved up to 1: use calibration='exact'",
    )
    return math.sqrt(2 * math.log(1.25 / delta)) / epsilon


def zhao2019_sigma(epsilon: float, delta: float) -> float:
    """(c + sqrt(c^2 + epsilon)) / (epsilon sqrt 2), c^2 = ln(2 / (sqrt(16 delta + 1) - 1)), for delta < 0.5 (Zhao et
    al. 2019, arXiv 1911.12060).
    """
    square = math.log(2 / (math.sqrt(16 * delta + 1) - 1))
    return (math.sqrt(square) + math.sqrt(square + epsilon)) / (epsilon * math.sqrt(2))


CALIBRATIONS: dict[str, Callable[[float, float], float]] = {
    "exact": exact_sigma,
    "classic": classic_sigma,
    "zhao2019": zhao2019_sigma,
}
CLAIM = {  # what a claim of privacy may say
    "epsilon": Rule(
        lambda value: is_number(value) and value > 0,
        "{name} = {value}, it must be positive and finite: give such as 1.0",
    ),
    "delta": Rule(
        lambda value: is_number(value) and 0 < value <= LARGEST_DELTA,
        f"{{name}} = {{value}}, it must be above 0 and at most {LARGEST_DELTA} (whoever hands out each example as it "
        "is with the chance delta keeps to it): give such as 1e-5, well below 1 / number of examples",
    ),
    "clip": Rule(
        lambda value: is_number(value) and CLIP_RANGE[0] <= value <= CLIP_RANGE[1],
        "{name} = {value}, it must lie between " + "{:g} and {:g}: give such as 1.0".format(*CLIP_RANGE),
    ),
    "relation": one_of(RELATIONS),
    "calibration": one_of(CALIBRATIONS),
}


@dataclass(frozen=True)
class LedgerEntry:
    """What one release spent.

    Attributes:
        what: what was released.
        space: the release space's name.
        epsilon, delta: the claim.
        relation: which data sets are neighbours.
        clip: the largest norm of one example's contribution.
        sensitivity: the largest L2 distance of the sums of neighbours.
        calibration: how sigma was found.
        sigma: the noise's standard deviation in every coordinate, in units of the summed gradients.
        coordinates: how many numbers were released.
    """

    what: str
    space: str
    epsilon: float
    delta: float
    relation: str
    clip: float
    sensitivity: float
    calibration: str
    sigma: float
    coordinates: int

    @property
    def grid(self) -> float:
        """The power of two that released numbers are multiples of; small enough for `ROUNDING_SLACK` to cover it."""
        return 2.0 ** math.floor(math.log2(ROUNDING_SLACK * self.sensitivity / (4 * math.sqrt(self.coordinates))))


def plan_entry(
    what: str,
    space: str,
    epsilon: float,
    delta: float,
    relation: str,
    clip: float,
    calibration: str,
    coordinates: int,
) -> LedgerEntry:
    """Check a claim and find the noise that backs it; nothing is spent yet.

    Raises:
        UserError: a part of the claim that breaks its rule in `CLAIM`, or is outside of the calibration's range.

    >>> claim = {"relation": "replace-one", "clip": 1.0, "calibration": "exact", "coordinates": 320}
    >>> entry = plan_entry("gradients", "label_rows", 1.0, 1e-5, **claim)
    >>> entry.sensitivity, round(entry.sigma, 2)
    (2.0, 7.46)
    """
    claim = {"epsilon": epsilon, "delta": delta, "relation": relation, "clip": clip, "calibration": calibration}
    check_values(claim, CLAIM)
    sensitivity = RELATIONS[relation] * clip
    sigma = sensitivity * CALIBRATIONS[calibration](epsilon, delta)
    values = (float(epsilon), float(delta), relation, float(clip), sensitivity, calibration, sigma, coordinates)
    return LedgerEntry(what, space, *values)


# ---------------------------------------------------------------- composition


def total_epsilon(entries: Sequence[LedgerEntry], delta: float) -> float:
    """The epsilon at `delta` of several releases of the same data together: exact for Gaussian noise.

    Raises:
        UserError: the entries count different neighbours.
    """
    import dp_accounting

    if not entries:
        return 0.0
    relations = sorted({entry.relation for entry in entries})
    require(
        len(relations) == 1,
        f"the ledger holds the relations {' and '.join(relations)}, which do not add up: use one throughout",
    )
    mu = math.hypot(*(entry.sensitivity / entry.sigma for entry in entries))
    return dp_accounting.get_epsilon_gaussian(1 / mu, delta)


@dataclass
class Ledger:
    """What has been spent on one set of private examples, and the most that may be.

    A new session continues a ledger with the `ledger` of the last Release: `Ledger(1.0, 1e-5, release.ledger)`. Nothing
    outside the ledger is counted: whoever releases the same examples under two ledgers has spent both.

    Attributes:
        epsilon, delta: the budget of all releases together.
        entries: what has been spent, oldest first.

    Raises:
        UserError: a budget that is no budget, or entries beyond it.
    """

    epsilon: float
    delta: float
    entries: tuple[LedgerEntry, ...] = ()

    def __post_init__(self) -> None:
        check_values({"epsilon": self.epsilon, "delta": self.delta}, CLAIM)
        require_type(self.entries, tuple | list, "the ledger's entries", "give the `ledger` of a Release")
        entries, self.entries = tuple(self.entries), ()
        for entry in entries:
            self.charge(entry)

    @property
    def spent(self) -> float:
        """The epsilon spent so far, at the budget's delta."""
        return total_epsilon(self.entries, self.delta)

    def check(self, entry: LedgerEntry) -> None:
        """Raise if an expense would exceed the budget; record nothing.

        Raises:
            UserError: the budget would be exceeded.
        """
        require_type(entry, LedgerEntry, "the expense", "give a LedgerEntry, as in the `ledger` of a Release")
        after = total_epsilon((*self.entries, entry), self.delta)
        require(
            after <= self.epsilon * (1 + SOLVER_SLACK),
            f"this release would bring the total epsilon to {after:.6g} at delta {self.delta:g}, the budget is "
            f"{self.epsilon:g} and {self.spent:.6g} is spent: lower epsilon or use a Release that was made already",
        )

    def charge(self, entry: LedgerEntry) -> None:
        """Record an expense, or raise as `check` and record nothing."""
        self.check(entry)
        self.entries = (*self.entries, entry)


# ---------------------------------------------------------------- noise

Bits = Callable[[int], numpy.ndarray]


def system_bits(count: int) -> numpy.ndarray:
    """`count` numbers of 64 bits from the operating system's cryptographic generator."""
    return numpy.frombuffer(os.urandom(8 * count), dtype=numpy.uint64)


def seeded_bits(seed: int) -> Bits:
    """Repeatable bits, for experiments: whoever knows or guesses the seed can take the noise off again."""
    source = generator(seed, "release noise")
    return lambda count: (
        torch.empty(count, dtype=torch.int64).random_(-(2**63), None, generator=source).numpy().view(numpy.uint64)
    )


def normals(bits: numpy.ndarray) -> numpy.ndarray:
    """Standard normal numbers by inversion: one bit is the sign, 63 the tail probability, so tails reach 9 sigma."""
    tail = ((bits & numpy.uint64(2**63 - 1)).astype(numpy.float64) + 0.5) * 2.0**-64
    size = ndtri(tail)
    return numpy.where(bits >> numpy.uint64(63), size, -size)


def add_noise(values: Tensor, sigma: float, grid: float, bits: Bits) -> Tensor:
    """values + N(0, sigma^2) in place, as multiples of `grid`.

    Values and noise are rounded to the grid apart and added exactly, which is the same as rounding the sum of the
    rounded values and unrounded noise: a step after the mechanism. So a released number's low bits say nothing about
    the value. This closes the known attack on floating-point noise (Mironov 2012). What remains is that 64 random bits
    stand for a real number: no proof covers that, as it would for the discrete Gaussian (Canonne, Kamath and Steinke
    2020). Sums beyond 2^53 grid steps (more than 100,000 examples in the largest heads) would be added inexactly.

    Args:
        values: float64, any shape, contiguous, on the CPU.
        sigma: standard deviation, in units of `values`.
        grid: a power of two.
        bits: where randomness comes from.
    """
    flat = values.view(-1)
    for block in flat.split(BLOCK):
        noise = torch.from_numpy(normals(bits(len(block)))) * sigma
        block.copy_(((block / grid).round() + (noise / grid).round()) * grid)
    return values


def clip_scale(factors: Factors, clip: float) -> Tensor:
    """What to multiply each gradient by so that its joint norm over weight and bias is at most `clip`: (n,), float64.

    Aims 2^-20 below `clip`, which covers the rounding of the sums of up to 90,000 examples and of the release's grid.
    """
    delta, hidden = factors.delta.double(), factors.hidden.double()
    norms = delta.norm(dim=-1) * (hidden.square().sum(-1) + float(factors.bias)).sqrt()
    return (clip * (1 - ROUNDING_SLACK) / norms.clamp_min(torch.finfo(torch.float64).tiny)).clamp(max=1.0)


def clipped_sum(factors: Factors, clip: float) -> tuple[Tensor, Tensor | None]:
    """The sum of gradients, each scaled down to the joint norm `clip` where it is longer, without any (n, R, r): weight
    (R, r) and bias (R,) or None.
    """
    scaled = factors.delta.double() * clip_scale(factors, clip)[:, None]
    return scaled.mT @ factors.hidden.double(), scaled.sum(0) if factors.bias else None


def noised_sums(classes: Sequence[Factors], entry: LedgerEntry, bits: Bits) -> tuple[DenseTarget, ...]:
    """The mechanism: each class's clipped sum plus the noise that `entry` planned, typed and placed as its factors."""
    targets = []
    for factors in classes:
        sums = [part for part in clipped_sum(factors, entry.clip) if part is not None]
        noised = [add_noise(part.cpu().contiguous(), entry.sigma, entry.grid, bits) for part in sums]
        targets.append(DenseTarget(*(part.to(factors.hidden) for part in noised)))
    return tuple(targets)
