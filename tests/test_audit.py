"""The audit: true claims survive it, broken mechanisms do not; and the attacks on texts and models."""

import dataclasses

import pytest
import torch
from scipy import stats

from gradmm import mechanism
from gradmm.data import Example
from gradmm.errors import UserError
from gradmm.experiments import audit
from gradmm.tasks import Task

TASK = Task("toy", ("negative", "positive"), (" bad", " great"), "{text} it was")
CLAIMS = (0.5, 1.0, 4.0)
CONFIDENCE = 0.95


def entry(epsilon: float, relation: str = "replace-one") -> mechanism.LedgerEntry:
    return mechanism.plan_entry("sums", "head", epsilon, 1e-5, relation, 1.0, "exact", 1)


def brute_p_value(canaries: int, guesses: int, correct: int, epsilon: float, delta: float) -> float:
    """The theorem, one term at a time."""
    w = stats.binom(guesses, torch.tensor(epsilon, dtype=torch.float64).sigmoid().item())
    tail = [sum(w.pmf(k) for k in range(v, guesses + 1)) for v in range(guesses + 2)]
    steepest = max(2 / i * (tail[max(correct - i, 0)] - tail[correct]) for i in range(1, canaries + 1))
    return min(1.0, tail[correct] + delta * canaries * steepest)


@pytest.mark.parametrize(("canaries", "guesses", "correct"), [(10, 10, 9), (40, 12, 12), (30, 30, 15), (20, 5, 1)])
@pytest.mark.parametrize("epsilon", [0.0, 0.5, 3.0])
def test_the_p_value_is_the_theorems(canaries, guesses, correct, epsilon):
    found = audit.p_value(canaries, guesses, correct, epsilon, 1e-3)
    assert found == pytest.approx(brute_p_value(canaries, guesses, correct, epsilon, 1e-3))


def test_the_lower_bound_grows_with_right_guesses_and_is_tight():
    bounds = [audit.epsilon_lower_bound(1000, 100, v, 1e-5) for v in (50, 70, 90, 100)]
    assert bounds[0] == 0 and bounds == sorted(bounds) and bounds[-1] == pytest.approx(3.5, abs=0.1)
    assert audit.p_value(1000, 100, 90, bounds[2], 1e-5) == pytest.approx(1 - CONFIDENCE, rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("relation", mechanism.RELATIONS)
@pytest.mark.parametrize("epsilon", CLAIMS)
def test_true_claims_are_refuted_no_more_often_than_the_confidence_allows(epsilon, relation):
    runs = 200
    audits = [
        audit.audit_mechanism(
            entry(epsilon, relation), 400, confidence=CONFIDENCE, seed=run, bits=mechanism.seeded_bits(run)
        )
        for run in range(runs)
    ]
    refuted = sum(result.refuted for result in audits)
    assert refuted <= stats.binom.ppf(0.999, runs, 1 - CONFIDENCE)
    assert sum(result.correct for result in audits) > 0.5 * sum(result.guesses for result in audits)


BROKEN = {"half the noise": {"sigma": 0.5}, "a clip that is twice as long": {"clip": 2.0}}


@pytest.mark.parametrize("relation", mechanism.RELATIONS)
@pytest.mark.parametrize("fault", BROKEN)
@pytest.mark.parametrize(("epsilon", "guesses"), [(1.0, 400), (4.0, 2000)])
def test_broken_mechanisms_are_caught(epsilon, guesses, fault, relation):
    sound = entry(epsilon, relation)
    broken = dataclasses.replace(
        sound, **{name: getattr(sound, name) * factor for name, factor in BROKEN[fault].items()}
    )
    for claim, refuted in ((sound, False), (broken, True)):
        found = audit.audit_mechanism(claim, 40_000, guesses, CONFIDENCE, seed=1, bits=mechanism.seeded_bits(1))
        assert found.refuted == refuted


def test_forgotten_clipping_is_caught(monkeypatch):
    monkeypatch.setattr(
        mechanism, "clip_scale", lambda factors, clip: torch.ones(len(factors.delta), dtype=torch.float64)
    )
    assert audit.audit_mechanism(entry(1.0), 1000, bits=mechanism.seeded_bits(0)).refuted


def test_an_audit_that_makes_no_sense_is_refused():
    with pytest.raises(UserError, match="guesses"):
        audit.epsilon_lower_bound(10, 20, 5, 1e-5)
    with pytest.raises(UserError, match="confidence"):
        audit.epsilon_lower_bound(10, 10, 5, 1e-5, 1.0)


# ---------------------------------------------------------------- membership inference


def test_membership_of_separated_equal_and_reversed_scores():
    found = audit.membership([3.0, 4.0, 5.0], [0.0, 1.0, 2.0])
    assert (found.auc, found.low, found.high, found.true_positive_rate) == (1, 1, 1, 1)
    assert audit.membership([1.0, 1.0], [1.0, 1.0]).auc == 0.5
    assert audit.membership([0.0], [1.0]).auc == 0


@pytest.mark.slow
def test_the_membership_interval_covers_the_truth_about_as_often_as_it_says():
    draw = torch.Generator().manual_seed(0)
    truth = stats.norm.cdf(0.5 / 2**0.5)
    hits = 0
    for _ in range(200):
        members, others = torch.randn(2, 40, generator=draw)
        found = audit.membership((members + 0.5).tolist(), others.tolist(), resamples=300)
        hits += found.low <= truth <= found.high
    assert stats.binomtest(hits, 200, 0.95).pvalue > 1e-4


@pytest.mark.parametrize(("members", "others"), [([], [1.0]), ([1.0], []), ([float("nan")], [1.0])])
def test_membership_needs_finite_scores_of_both_kinds(members, others):
    with pytest.raises(UserError):
        audit.membership(members, others)


def test_copied_texts_are_found_by_every_attack_on_texts():
    members = ["the film was a great story about a dog", "we saw a dull movie about the world"]
    others = ["music and sports make people happy today", "one two three red blue cats on the wall"]
    synthetic = [members[0] + " and more", members[1], "something else again here"]
    assert {name: found.auc for name, found in audit.attack_texts(synthetic, members, others).items()} == dict.fromkeys(
        audit.TEXT_ATTACKS, 1.0
    )
    assert audit.span_scores(members, synthetic) == [9, 8]
    with pytest.raises(UserError, match="no synthetic"):
        audit.neighbour_scores(members, ["", " "])


def test_loss_scores_are_minus_the_label_loss_and_may_be_relative(tiny_model):
    model = tiny_model("phi")
    examples = [Example("the movie is terrible", 0), Example("a good film", 1)]
    scores = audit.loss_scores(model, TASK, examples)
    swapped = audit.loss_scores(model, TASK, [Example(e.text, 1 - e.label) for e in examples])
    total = torch.tensor(scores).exp() + torch.tensor(swapped).exp()
    torch.testing.assert_close(total, torch.ones(2), rtol=0, atol=1e-6)
    assert audit.loss_scores(model, TASK, examples, reference=model) == pytest.approx([0.0, 0.0])
    other = tiny_model("phi", seed=5)
    expected = [a - b for a, b in zip(scores, audit.loss_scores(other, TASK, examples), strict=True)]
    assert audit.loss_scores(model, TASK, examples, reference=other) == pytest.approx(expected)
