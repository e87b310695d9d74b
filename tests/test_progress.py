"""One bar at a time where it is asked for, nothing where it is not, and quiet loggers that say what happened."""

import logging

import pytest
import torch
from test_finetuning import QUICK, TWO, toy
from test_synthesis import REAL, TASK

import gradmm
from gradmm import progress
from gradmm.experiments import audit
from gradmm.progress import advance, shown, stage


@pytest.fixture
def at_once(monkeypatch):
    """Bars from the first moment on, not after two seconds."""
    monkeypatch.setattr(progress, "SECONDS", 0.0)


def test_a_stage_shows_how_far_it_is_and_grows(at_once, capsys):
    with shown(True), stage("reading", 4):
        advance(3)
        with stage("a part of it", 2):
            advance(3)
    said = capsys.readouterr().err
    assert "reading: 100%" in said and "6/6" in said and "a part" not in said


def test_nothing_is_shown_by_default_or_where_it_is_done_at_once(capsys, monkeypatch):
    with stage("reading", 2):
        advance(2)
    advance(1)  # outside of every stage
    with shown(True), stage("reading", 2):
        advance(2)
    with shown(True), shown(False), stage("reading", 2):
        advance(2)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("show", [True, False])
def test_every_long_step_of_a_run_has_a_bar_or_none(tiny_model, at_once, capsys, show):
    model = tiny_model("llama", dtype=torch.float32)
    release = gradmm.release(model, TASK, REAL, progress=show)
    config = gradmm.SynthesisConfig(n_synthetic=4, oversample=2.0, length=5)
    gradmm.synthesize(model, TASK, release, config, progress=show)
    gradmm.finetune(model, TWO, toy(TWO, 0, 2), toy(TWO, 20, 2), toy(TWO, 30, 2), QUICK, progress=show)
    said = capsys.readouterr().err
    stages = ("reading gradients", "writing texts", "reading perplexities", "reading the texts' gradients", "testing")
    assert all((f"{name}: 100%" in said) == show for name in stages) and (show or said == "")


def test_loggers_say_what_happened_to_those_who_listen(tmp_path, tiny_model, caplog, capsys):
    with caplog.at_level(logging.INFO, "gradmm"):
        gradmm.load_model("demo", device="cpu")
        model, output = tiny_model("llama", dtype=torch.float32), tmp_path / "run"
        release = gradmm.release(model, TASK, REAL, space="head", progress=False)
        for _ in range(2):
            config = gradmm.SynthesisConfig(n_synthetic=2, oversample=2.0, length=5)
            gradmm.synthesize(model, TASK, release, config, output, progress=False)
    said = caplog.text
    assert "demo loaded on cpu in float32" in said and "2 groups of texts of 5 tokens" in said
    assert f"results are read back from {output}" in said and capsys.readouterr().err == ""


@pytest.mark.parametrize("show", [True, False])
def test_an_audit_s_losses_have_a_bar(tiny_model, at_once, capsys, show):
    model = tiny_model("llama", dtype=torch.float32)
    audit.loss_scores(model, TASK, REAL, progress=show)
    assert ("reading losses: 100%" in capsys.readouterr().err) == show
