"""Perplexity, variety, copying and intervals, each against a second way of computing it."""

import json
import math

import numpy
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gradmm import evaluation
from gradmm.errors import UserError
from gradmm.evaluation import perplexities, perplexity
from gradmm.experiments.metrics import (
    MEASURES,
    distinct_n,
    duplicate_share,
    longest_shared_spans,
    paired_bootstrap,
    summarise_runs,
)
from gradmm.experiments.results import table_of
from gradmm.models import load_model
from gradmm.readability import words

TEXTS = [
    "the movie was great.", "a", "we saw the dull film and the actor sat on the red cat", "bad music",
    "the movie was great.",
]  # fmt: skip


def test_perplexity_is_the_exponential_of_the_models_own_loss(tiny_model, kind, monkeypatch):
    model = tiny_model(kind)
    monkeypatch.setattr(evaluation, "LOGITS_AT_ONCE", 97 * 3)
    found = perplexity(model, TEXTS, tokens_per_batch=30)
    losses, counts = [], []
    for text in TEXTS:
        own = model.tokenizer(text, add_special_tokens=False)["input_ids"]
        ids = torch.tensor(
            [[0, *own] if len(own) == 1 else own]
        )  # the tokenizer begins no text: only a lone token needs a context
        losses.append(torch.nn.functional.cross_entropy(model.lm(ids).logits[0, :-1], ids[0, 1:]).item())
        counts.append(ids.shape[1] - 1)
    assert found.tokens == tuple(counts)
    assert found.per_text == pytest.approx([math.exp(loss) for loss in losses], rel=1e-9)
    corpus = sum(loss * count for loss, count in zip(losses, counts, strict=True)) / sum(counts)
    assert found.corpus == pytest.approx(math.exp(corpus), rel=1e-9)
    assert perplexities(model, TEXTS) == pytest.approx(list(found.per_text), rel=1e-9)


def test_perplexity_of_a_model_that_knows_nothing_is_the_size_of_its_vocabulary(tiny_model):
    model = tiny_model("llama")
    model.head_weight.zero_()
    assert perplexity(model, TEXTS).corpus == pytest.approx(97)


def test_perplexity_refuses_what_it_cannot_read(tiny_model):
    model = tiny_model("gpt2")
    assert perplexities(model, []) == []
    for texts, match in (([], "0 texts"), (["great", ""], r"text \[2\]"), (["great " * 70], "tokens")):
        with pytest.raises(UserError, match=match):
            perplexity(model, texts)


def test_an_impossible_text_has_infinite_perplexity(tiny_model):
    model = tiny_model("llama")
    model.head_weight.mul_(1e5)
    assert perplexity(model, TEXTS).corpus == math.inf


def test_distinct_n_by_hand():
    assert distinct_n(["a b a b", "A B c"], 1) == 3 / 7
    assert distinct_n(["a b a b", "A B c"], 2) == 3 / 5
    assert distinct_n(["a", "b"], 2) == 0 and distinct_n([], 1) == 0
    with pytest.raises(UserError, match="n = 0"):
        distinct_n(["a"], 0)


def test_an_older_record_s_table_shows_what_it_knows():
    whole = {"accuracy": {"mean": 0.5, "std": None, "runs": [0.5]}, "minus_gradmm": None, "macro_f1": 0.5, "n": 2}
    whole |= {"similarity": {}} | dict.fromkeys(MEASURES)
    older = {name: value for name, value in whole.items() if name not in ("flawed", "unfinished")}
    shown = [set(table_of({"real": figures}).columns) for figures in (whole, older)]
    assert shown[0] - shown[1] == {"flawed", "unfinished"} and "second_perplexity" not in shown[0]


def test_duplicates_are_blind_to_case_and_spaces():
    assert duplicate_share(["a b", "A  b", "b a", "a b"]) == 0.5 and duplicate_share([]) == 0


def longest_by_force(sequence, references) -> int:
    runs = {tuple(r[i:j]) for r in references for i in range(len(r)) for j in range(i + 1, len(r) + 1)}
    return max(
        (j - i for i in range(len(sequence)) for j in range(i + 1, len(sequence) + 1) if tuple(sequence[i:j]) in runs),
        default=0,
    )


letters = st.lists(st.lists(st.integers(0, 2), max_size=9), max_size=5)


@settings(max_examples=150, deadline=None)
@given(letters, letters)
def test_longest_shared_spans_equal_brute_force(sequences, references):
    assert longest_shared_spans(sequences, references) == [longest_by_force(one, references) for one in sequences]


def test_a_whole_copy_is_found_and_runs_do_not_cross_references():
    long = [str(i) for i in range(400)]
    assert longest_shared_spans([long, words("the Red cat")], [long, words("was the red"), words("cat sat")]) == [
        400,
        2,
    ]


def outcomes(seed: int, runs: int, examples: int, rate: float) -> numpy.ndarray:
    return numpy.random.default_rng(seed).random((runs, examples)) < rate


def test_one_run_gives_scipys_paired_bootstrap():
    a, b = outcomes(0, 1, 300, 0.8), outcomes(1, 1, 300, 0.7)
    found = paired_bootstrap(a, b, resamples=50_000)
    reference = scipy.stats.bootstrap(
        (a[0], b[0]), lambda x, y, axis: x.mean(axis) - y.mean(axis), paired=True, vectorized=True, method="percentile",
        n_resamples=50_000, random_state=numpy.random.default_rng(0),
    ).confidence_interval  # fmt: skip
    assert found.mean == pytest.approx(a.mean() - b.mean())
    assert (found.low, found.high) == pytest.approx((reference.low, reference.high), abs=0.006)


def test_many_seeds_of_one_example_give_scipys_bootstrap_over_seeds():
    a, b = outcomes(2, 200, 1, 0.8), outcomes(3, 200, 1, 0.6)
    found = paired_bootstrap(a, b, resamples=5000, confidence=0.9)
    reference = scipy.stats.bootstrap(
        (a[:, 0] * 1.0 - b[:, 0],), numpy.mean, method="percentile", n_resamples=5000, confidence_level=0.9,
        random_state=numpy.random.default_rng(0),
    ).confidence_interval  # fmt: skip
    assert (found.low, found.high) == pytest.approx((reference.low, reference.high), abs=0.01)


def test_seeds_that_disagree_widen_the_interval_and_pairing_narrows_it():
    base = outcomes(4, 1, 400, 0.7)
    steady = paired_bootstrap(numpy.repeat(base, 4, 0), numpy.zeros((4, 400)), resamples=2000)
    mixed = paired_bootstrap(numpy.concatenate([base, base, ~base, ~base]), numpy.zeros((4, 400)), resamples=2000)
    assert mixed.high - mixed.low > 2 * (steady.high - steady.low)
    same = paired_bootstrap(base, base, resamples=200)
    assert (same.mean, same.low, same.high) == (0, 0, 0)


@pytest.mark.parametrize("of_examples", [0.0, 3.0])
def test_of_five_seeds_an_interval_covers_the_truth_as_often_as_it_says(of_examples):
    draw, covered = numpy.random.default_rng(0), 0
    for _ in range(200):
        gap = draw.normal(size=(5, 1)) + of_examples * draw.normal(size=(1, 20))
        found = paired_bootstrap(gap, numpy.zeros_like(gap), resamples=300)
        covered += found.low <= 0 <= found.high
    assert 0.91 <= covered / 200 <= 0.99  # without Student's part 0.83 and 0.89


def test_the_interval_is_a_function_of_the_seed():
    a, b = outcomes(5, 3, 50, 0.8), outcomes(6, 3, 50, 0.7)
    one, two, other = (paired_bootstrap(a, b, seed=seed, resamples=300) for seed in (1, 1, 2))
    assert one == two != other
    assert one.low < one.mean < one.high


@pytest.mark.parametrize(("shape", "confidence", "match"), [((2, 9), 0.95, "shapes"), ((3, 8), 95, "confidence")])
def test_unequal_results_are_refused(shape, confidence, match):
    with pytest.raises(UserError, match=match):
        paired_bootstrap(outcomes(0, 3, 8, 0.5), outcomes(0, *shape, 0.5), confidence=confidence)


def test_summaries():
    found = summarise_runs([0.5, 0.7, 0.9])
    assert (found.mean, found.std, found.runs) == (pytest.approx(0.7), pytest.approx(0.2), (0.5, 0.7, 0.9))
    assert summarise_runs([0.5]).std is None
    with pytest.raises(UserError, match="0 runs"):
        summarise_runs([])


@pytest.mark.slow
def test_the_bench_model_reads_film_reviews_as_recorded(bench):
    lines = (bench / "data" / "sst2" / "test.jsonl").read_text(encoding="utf-8").splitlines()
    texts = [json.loads(line)["text"] for line in lines]
    model = load_model(bench / "imdb-lm")
    # The record has an end-of-text token before each text, which this tokenizer does not put there itself.
    assert perplexity(model, [model.tokenizer.eos_token + text for text in texts]).corpus == pytest.approx(
        122, rel=0.03
    )
