"""What is defined where numbers run out, and how far apart runs are that need not be equal: types and numbers of
threads.

Equal to the last byte on a CPU, and tested elsewhere: batch sizes (`test_synthesis`), resumed or not (`test_synthesis`,
`test_crash`), processes with equal numbers of threads (`test_protocol`).
"""

import copy
import json
from dataclasses import replace

import pytest
import torch
from test_synthesis import REAL, SMALL, TASK

import gradmm
from gradmm.gradients import DenseTarget, Factors, FactorTarget
from gradmm.matching import Matching
from gradmm.models import wrap_model
from gradmm.tasks import tokenize_task


@pytest.fixture(scope="module")
def model(tiny_model):
    return tiny_model("llama", dtype=torch.float32)


@pytest.fixture(scope="module")
def demo(demo_model):
    """The demo's task, real examples and model in float32 and bfloat16."""
    task, splits = gradmm.load_data("demo")
    half = wrap_model(copy.deepcopy(demo_model.lm).bfloat16(), demo_model.tokenizer, "demo")
    models = {"float32": demo_model, "bfloat16": half}
    return task, gradmm.sample_examples(splits.train, 20, task, seed=0), models


# ---------------------------------------------------------------- degenerate targets


def zeroed(release: gradmm.Release) -> gradmm.Release:
    """A Release of the same shape whose gradients are zero."""
    pairs = [target.factors for target in release.targets]
    return replace(release, targets=tuple(FactorTarget(Factors(p.delta * 0, p.hidden, p.bias)) for p in pairs))


@pytest.mark.parametrize("distance", ["cosine", "l2"])
def test_a_zero_target_leaves_every_text_as_far_as_it_is_and_the_run_ends_as_any_other(model, distance):
    release = zeroed(gradmm.release(model, TASK, REAL, space="head"))
    result = gradmm.synthesize(model, TASK, release, replace(SMALL, distance=distance), progress=False)
    matching = Matching(model, tokenize_task(TASK, model.tokenizer), release.targets, release.space, distance)
    for row in result.candidates:
        if row["text"]:
            norms = matching.factors([row["text"]], [row["label"]])
            wanted = 1.0 if distance == "cosine" else float(norms.delta.square().sum() * norms.hidden.square().sum())
            assert row["match_loss"] == pytest.approx(wanted, rel=1e-4)
    assert len(result.kept) == 4
    assert all(row["reason"].startswith("step limit") for row in result.manifest["groups_ended"])


def test_a_noised_target_that_came_out_zero_is_the_same(model):
    release = gradmm.release(model, TASK, REAL, epsilon=1.0, delta=1e-5, length=5, space="label_rows")
    nothing = replace(release, targets=tuple(DenseTarget(target.weight * 0, None) for target in release.targets))
    result = gradmm.synthesize(model, TASK, nothing, SMALL, progress=False)
    assert {row["match_loss"] for row in result.candidates if row["text"]} == {1.0}


def test_one_example_a_class_is_enough(model):
    release = gradmm.release(model, TASK, [REAL[0], REAL[-1]], space="head")
    result = gradmm.synthesize(model, TASK, release, SMALL, progress=False)
    assert len(result.kept) == 4 and all(0 <= row["match_loss"] <= 2 for row in result.kept)
    matching = Matching(model, tokenize_task(TASK, model.tokenizer), release.targets, release.space)
    assert matching.of_texts([REAL[0]["text"]], [0]).item() == pytest.approx(0, abs=1e-5)


def test_identical_examples_are_the_target_of_one_of_them(model):
    one, many = (gradmm.release(model, TASK, [REAL[0]] * count + [REAL[-1]] * count, space="head") for count in (1, 7))
    texts, classes = [row["text"] for row in REAL], [row["label"] for row in REAL]
    found = [
        Matching(model, tokenize_task(TASK, model.tokenizer), r.targets, r.space).of_texts(texts, classes)
        for r in (one, many)
    ]
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-6)
    assert len(gradmm.synthesize(model, TASK, replace(many, length=5), SMALL, progress=False).kept) == 4


def test_identical_synthetic_texts_are_kept_once(model, monkeypatch):
    monkeypatch.setattr("gradmm.tasks.TaskTokens.decode", lambda self, ids: "one text")
    with pytest.warns(UserWarning, match="1 of 4 texts are kept: .*duplicate 7"):
        result = gradmm.synthesize(model, TASK, gradmm.release(model, TASK, REAL, space="head"), SMALL, progress=False)
    reasons = [row["reason"] for row in result.candidates]
    assert reasons.count("dropped: the same text stands earlier") == len(reasons) - 1 and len(result.kept) == 1


# ---------------------------------------------------------------- bfloat16 and threads


def test_bfloat16_moves_the_demo_s_loss_and_gradient_little(demo):
    """The bounds that the book states: 0.01 of a loss between 0 and 2, a twentieth of the gradient's norm."""
    task, real, models = demo
    values, slopes = [], []
    draw = torch.randn(2, 4, 12, models["float32"].embedding.shape[1], generator=torch.Generator().manual_seed(0))
    for model in models.values():
        release = gradmm.release(model, task, real, space="head")
        matching = Matching(model, tokenize_task(task, model.tokenizer), release.targets, release.space)
        x = (draw * models["float32"].embedding.std()).requires_grad_(True)
        value = matching.of_vectors(x, torch.ones(2, 4, 12, dtype=torch.long), torch.tensor([0, 1]))
        values.append(value.detach())
        slopes.append(torch.autograd.grad(value.sum(), x)[0].flatten(1))
    apart, turned = (
        (values[0] - values[1]).abs().max().item(),
        ((slopes[0] - slopes[1]).norm(dim=1) / slopes[0].norm(dim=1)).max().item(),
    )
    print(json.dumps({"loss": apart, "gradient": turned}))
    assert apart < 0.01 and turned < 0.05


@pytest.mark.slow
def test_how_far_apart_runs_with_other_threads_or_types_are(demo):
    """Rounding moves a token now and then, and from there on two runs write different texts of the same quality."""
    task, real, models = demo
    config = replace(gradmm.PRESETS["admm"], oversample=3, n_synthetic=12, group_size=6, outer_steps=3, inner_steps=5)
    runs = {"one thread": ("float32", 1), "two threads": ("float32", 2), "bfloat16": ("bfloat16", 1)}
    found = {}
    for name, (dtype, threads) in runs.items():
        torch.set_num_threads(threads)
        try:
            model = models[dtype]
            found[name] = gradmm.synthesize(
                model, task, gradmm.release(model, task, real, length=16, space="head"), config, progress=False
            )
        finally:
            torch.set_num_threads(1)
    base = found["one thread"]
    for name in ("two threads", "bfloat16"):
        same = sum(a == b for a, b in zip(base.candidates["text"], found[name].candidates["text"], strict=True)) / len(
            base.candidates
        )
        apart = [abs(a - found[name].manifest["set_match"][label]) for label, a in base.manifest["set_match"].items()]
        print(
            json.dumps(
                {"run": name, "same texts": same, "set match apart": apart, "set match": base.manifest["set_match"]}
            )
        )
        assert max(apart) < 0.01
        if name == "two threads":
            assert same >= 0.5
