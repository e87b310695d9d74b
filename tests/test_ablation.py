"""One factor at a time: the base is run once, every row says what it is, and effects are paired by seed."""

from dataclasses import replace

import numpy
import pandas
import pytest
import scipy.stats
import torch
from test_protocol import CONFIG, FOUR, TWO, splits_of, toy

from gradmm.config import PRESETS, SynthesisConfig
from gradmm.data import Example
from gradmm.errors import UserError
from gradmm.experiments import seed_run
from gradmm.experiments.ablation import against_base, agreement, changed, value_of, vary
from gradmm.spaces import BodySketch
from gradmm.synthesis import synthesize
from gradmm.tasks import tokenize_task

FACTORS = {"rho": [0.5], "n_real": [4], "projection": ["lm_then_nearest", "nearest_then_lm"]}


@pytest.mark.slow
def test_one_factor_changes_at_a_time_and_the_base_is_run_once(tiny_model, tmp_path):
    model = tiny_model("llama", dtype=torch.float32)
    frame = vary(model, TWO, splits_of(TWO), CONFIG, FACTORS, (0, 1), tmp_path, progress=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "base",
        "n_real=4",
        "projection=nearest_then_lm",
        "rho=0.5",
    ]
    assert [tuple(row) for row in frame[["factor", "value", "base"]].drop_duplicates().itertuples(index=False)] == [
        ("rho", 0.003, True), ("rho", 0.5, False), ("n_real", 4, False), ("n_real", 8, True),
        ("projection", "lm_then_nearest", True), ("projection", "nearest_then_lm", False),
    ]  # fmt: skip
    base = frame[frame["base"]]
    assert all(len(part.drop(columns=["factor", "value"]).drop_duplicates()) == 2 for _, part in base.groupby("factor"))
    again = vary(model, TWO, splits_of(TWO), CONFIG, FACTORS, (0, 1), tmp_path, progress=False)
    pandas.testing.assert_frame_equal(frame, again)


@pytest.mark.slow
def test_a_pool_is_written_once_and_chosen_from_as_if_it_were_written_again(tiny_model, tmp_path, monkeypatch):
    model, written = tiny_model("llama", dtype=torch.float32), []
    base = replace(CONFIG, synthesis=SynthesisConfig(n_synthetic=4, oversample=2.0, length=12))
    factors = {"space": ["label_rows"], "ranking": ["text"], "oversample": [1.5]}
    apart = vary(model, TWO, splits_of(TWO), base, factors, (0,), progress=False)
    monkeypatch.setattr(
        seed_run, "synthesize", lambda *given, **named: written.append(given) or synthesize(*given, **named)
    )
    shared = vary(model, TWO, splits_of(TWO), base, factors, (0,), tmp_path, progress=False)
    pandas.testing.assert_frame_equal(apart, shared)
    assert len(written) == 2  # the base's and the smaller one
    pandas.testing.assert_frame_equal(
        shared, vary(model, TWO, splits_of(TWO), base, factors, (0,), tmp_path, progress=False)
    )
    assert len(written) == 2


@pytest.mark.parametrize("name", ["admm", "paper", "official"])
def test_a_preset_is_a_factor_and_keeps_the_budget_alone(name):
    base = replace(CONFIG, synthesis=SynthesisConfig(n_synthetic=4, outer_steps=3, inner_steps=2, rho=0.5, seed=5))
    assert changed(base, "preset", name).synthesis == replace(PRESETS[name], n_synthetic=4, seed=5)


def test_an_unknown_preset_is_refused_and_a_base_is_called_after_a_preset_that_it_is():
    base = replace(CONFIG, synthesis=SynthesisConfig(n_synthetic=4, seed=5))
    with pytest.raises(UserError, match="'Paper' is not known: did you mean paper"):
        changed(base, "preset", "Paper")
    assert value_of(base, "preset") == "pool"
    assert value_of(replace(base, synthesis=replace(base.synthesis, top_k=3)), "preset") == "the base"


def test_settings_are_compared_with_the_base_by_seed():
    rows = [
        ("a", value, value == 1, seed, 0.5 + 0.1 * value + 0.01 * seed) for value in (0, 1, 2) for seed in (0, 1, 2)
    ]
    rows += [
        ("b", value, value == "x", seed, 0.6 if (seed + len(value)) % 2 else 0.5)
        for value in ("x", "yy")
        for seed in (0, 1, 2)
    ]
    frame = pandas.DataFrame(rows, columns=["factor", "value", "base", "seed", "validation_accuracy"])
    found = against_base(frame.assign(accuracy=0.0))  # by validation: the test texts choose nothing
    assert list(zip(found["factor"], found["value"], strict=True)) == [("a", 0), ("a", 2), ("b", "yy")]
    assert found["difference"].tolist() == pytest.approx([-0.1, 0.1, -0.1 / 3])
    assert found["mean"].tolist() == pytest.approx([0.51, 0.71, 1.6 / 3])
    differences = [-0.1, 0.1, -0.1]  # of b, paired by seed
    low, high = scipy.stats.t.interval(0.95, 2, numpy.mean(differences), scipy.stats.sem(differences))
    assert found.iloc[2][["low", "high"]].tolist() == pytest.approx([low, high])
    assert against_base(frame[frame["seed"] == 0])["low"].isna().all()


def test_unknown_factors_and_values_that_do_not_fit_are_refused_before_anything_runs(tiny_model, tmp_path):
    model = tiny_model("llama", dtype=torch.float32)
    for factors, message in (
        ({"rh0": [1]}, "the factor 'rh0' is not known: use some of"),
        ({"rho": [0.5], "top_k": [0]}, "top_k = 0"),
    ):
        with pytest.raises(UserError, match=message):
            vary(model, TWO, splits_of(TWO), CONFIG, factors, (0,), tmp_path / "none", progress=False)
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("task", [TWO, FOUR], ids=lambda task: task.name)
def test_agreement_equals_gradients_taken_by_autograd(tiny_model, task):
    model = tiny_model("phi")
    tokens, real, other = tokenize_task(task, model.tokenizer), toy(task, 0, 3), toy(task, 9, 2)
    texts = [example.text for example in toy(task, 20, 2)]
    found = agreement(model, task, real, {"real": real, "other": other}, texts)
    assert found[found["set"] == "real"][["per_class", "contrast"]].to_numpy() == pytest.approx(1.0)

    def gradient(examples: list[Example]):
        weight = model.head_weight.clone().requires_grad_(True)
        logits = model.hidden_of([tokens.sequence(example.text) for example in examples]) @ weight.T + model.head_bias
        labels = torch.tensor([tokens.labels[example.label] for example in examples])
        return torch.autograd.grad(torch.nn.functional.cross_entropy(logits, labels), weight)[0].flatten()

    row = found[(found["set"] == "other") & (found["space"] == "head")].iloc[0]
    cosine = torch.nn.functional.cosine_similarity(gradient(other), gradient(real), dim=0)
    assert row["contrast"] == pytest.approx(float(cosine), rel=1e-6)
    other_public = agreement(model, task, real, {"other": other}, texts[:1])
    bodies = [frame[(frame["set"] == "other") & (frame["space"] == "body")].iloc[0] for frame in (found, other_public)]
    space, means = BodySketch.of(model, tokens, texts), []
    for examples in (other, real):
        sequences = [tokens.sequence(example.text) for example in examples]
        sketches = space.factors(model, tokens, sequences, [example.label for example in examples]).hidden
        labels = torch.tensor([example.label for example in examples])
        means.append(sum(sketches[labels == label].mean(0) for label in range(len(task.labels))))
    cosine = torch.nn.functional.cosine_similarity(*means, dim=0)
    assert bodies[0]["contrast"] == pytest.approx(float(cosine), rel=1e-6) != bodies[1]["contrast"]
    with pytest.raises(UserError, match="a set has no example of class 0"):
        agreement(model, task, real, {"half": [example for example in real if example.label]}, texts)
