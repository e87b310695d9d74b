"""One bar at a time where it is asked for, nothing where it is not, and quiet loggers that say what happened."""

import logging
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from test_finetuning import QUICK, TWO, toy
from test_synthesis import REAL, TASK

import gradmm
from gradmm import cli, progress
from gradmm.experiments import audit
from gradmm.progress import advance, announced, shown, stage


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


def test_a_slow_stage_shows_its_bar_before_anything_is_done(monkeypatch, capsys):
    monkeypatch.setattr(progress, "SECONDS", 0.2)
    with shown(True), stage("reading", 4):
        time.sleep(1.0)
        assert "reading:   0%" in capsys.readouterr().err
        advance(4)
    assert "reading: 100%" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("terminal", "show", "ticks"), [(True, True, True), (False, True, False), (True, False, False)]
)
def test_the_clock_of_a_bar_that_stands_goes_on_in_a_terminal(monkeypatch, capsys, terminal, show, ticks):
    monkeypatch.setattr(progress, "SECONDS", 0.05)
    monkeypatch.setattr(progress, "TICK", 0.05)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal, raising=False)
    with shown(show), stage("reading", 4):
        advance(1)
        time.sleep(1.0)
    said = capsys.readouterr().err
    assert (said.count("1/4") > 3) == ticks and (show or said == "")


def test_what_cannot_be_counted_has_one_line_if_it_is_slow(monkeypatch, capsys):
    with shown(True), announced("loading"):  # two seconds are not over
        pass
    monkeypatch.setattr(progress, "SECONDS", 0.05)
    with announced("loading"):  # nobody asked
        time.sleep(0.5)
    assert capsys.readouterr().err == ""
    with shown(True), announced("loading"):
        time.sleep(0.5)
    assert capsys.readouterr().err == "loading ...\n"
    with shown(True), stage("reading", 2), announced("loading"):  # the bar is enough
        time.sleep(0.5)
    assert "loading" not in capsys.readouterr().err


@pytest.mark.parametrize("show", [True, False])
@pytest.mark.parametrize("name", ["demo", "demo-b"])
def test_a_slow_load_says_so_or_nothing(monkeypatch, capsys, name, show):
    monkeypatch.setattr(progress, "SECONDS", 0.01)
    gradmm.load_model(name, device="cpu", progress=show)
    assert capsys.readouterr().err == (f"loading the model {name} ...\n" if show else "")


@pytest.mark.parametrize(
    ("terminal", "options", "said"),
    [(True, [], "loading PyTorch and transformers ...\n"), (True, ["--quiet"], ""), (False, [], "")],
)
def test_the_command_says_on_a_terminal_that_libraries_load(monkeypatch, capsys, terminal, options, said):
    def slow_import(name):
        time.sleep(0.5)
        return SimpleNamespace(evaluate=lambda arguments: None)

    monkeypatch.setattr(progress, "SECONDS", 0.05)
    monkeypatch.setattr(cli, "import_module", slow_import)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal, raising=False)
    assert cli.main(["evaluate", *options]) == 0 and capsys.readouterr().err == said


@pytest.mark.parametrize("show", [True, False])
def test_every_long_step_of_a_run_has_a_bar_or_none(tiny_model, at_once, capsys, show):
    model = tiny_model("llama", dtype=torch.float32)
    release = gradmm.release(model, TASK, REAL, progress=show)
    config = gradmm.SynthesisConfig(n_synthetic=4, oversample=2.0, length=12)
    gradmm.synthesize(model, TASK, release, config, progress=show)
    gradmm.finetune(model, TWO, toy(TWO, 0, 2), toy(TWO, 20, 2), toy(TWO, 30, 2), QUICK, progress=show)
    said = capsys.readouterr().err
    stages = ("reading gradients", "writing texts", "reading perplexities", "reading the texts' gradients", "testing")
    assert all((f"{name}: 100%" in said) == show for name in stages) and (show or said == "")


def test_loggers_say_what_happened_to_those_who_listen(tmp_path, tiny_model, caplog, capsys):
    with caplog.at_level(logging.INFO, "gradmm"):
        gradmm.load_model("demo", device="cpu", progress=False)
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
