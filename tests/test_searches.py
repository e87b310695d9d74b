"""The searches among texts: each step against a literal one, the same bytes again, after a stop, and by two processes."""

from dataclasses import replace

import pytest
import torch
from test_sharding import together
from test_synthesis import REAL, SMALL, TASK, files_of

import gradmm
from gradmm import reference
from gradmm.errors import UserError
from gradmm.plan import Plan
from gradmm.runs import RunFolder
from gradmm.searches import drafts, guided_round, search
from gradmm.sharding import Crew
from gradmm.synthesis import synthesize

CONFIGS = {
    "guided": replace(SMALL, search="guided", outer_steps=3, guidance_weight=2.0, top_k=20),
}


@pytest.fixture(scope="module")
def setting(tiny_model):
    model = tiny_model("llama", dtype=torch.float32)
    return model, TASK, gradmm.release(model, TASK, REAL)


def plan_of(model, config) -> Plan:
    return Plan.of(model, TASK, gradmm.release(model, TASK, REAL), config)


def literal_f(model, plan, label, distance):
    """x (B, L, D) -> f by the explicit gradient of the head."""
    tokens, real = plan.tokens, [row["text"] for row in REAL if row["label"] == label]
    answer = tokens.labels[label]
    target = reference.real_gradient(model.lm, [tokens.sequence(text) for text in real], [answer] * len(real))
    before, after = (model.embed(torch.tensor(list(ids), dtype=torch.long)) for ids in (tokens.start + tokens.head, tokens.tail))
    return lambda x: reference.match(model.lm, x, before, after, torch.full((len(x),), answer), target, distance)


@pytest.mark.parametrize(("name", "distance"), [("llama", "cosine"), ("phi", "l2")])
def test_a_guided_round_equals_the_literal_one(tiny_model, name, distance):
    model = tiny_model(name)
    plan = plan_of(model, replace(CONFIGS["guided"], early_end=False, init="normal", distance=distance))
    classes, words = torch.tensor([0, 1, 1]), plan.reading.allowed.nonzero().squeeze(-1)
    ids = words[torch.randint(0, len(words), (3, 2, 5), generator=torch.Generator().manual_seed(0))]
    begin = drafts(ids, torch.full((3,), torch.inf, dtype=torch.float64))
    result = guided_round(plan, begin, classes, replace(plan.reading, order="guided"), strength=1.5)
    for group, label in enumerate(classes.tolist()):
        f, x = literal_f(model, plan, label, distance), model.embed(ids[group]).detach().requires_grad_(True)
        (gradient,) = torch.autograd.grad(f(x), x)
        direction = -1.5 * gradient / gradient.norm(dim=-1, keepdim=True)
        expected = reference.project(model.lm, direction, plan.tokens.prompts[label], "guided", 20, plan.reading.allowed)
        row = result.history[group]
        assert torch.equal(result.state.ids[group], expected) and torch.equal(result.value[group], expected)
        assert result.match[group].item() == pytest.approx(f(model.embed(expected)).item(), abs=1e-10)
        assert row["promised"] == pytest.approx(((model.embed(expected) - x) * gradient).sum().item(), rel=1e-8)


def test_the_best_round_of_each_group_is_kept(setting):
    model, task, release = setting
    result = synthesize(model, task, release, CONFIGS["guided"], progress=False)
    best = result.history.groupby("group")["match_z"].min()
    for row in result.manifest["groups_ended"]:
        assert row["match"] <= best[row["group"]] and row["reason"].startswith(("step limit", "tokens stable"))
    assert set(result.history.columns) == {"step", "group", "label", "match_z", "promised", "changed", "seconds"}


def test_beams_and_the_size_of_a_batch_change_no_more_than_they_say(setting):
    model, task, release = setting
    config = replace(CONFIGS["guided"], beams=3, end_at="sentence")
    runs = [synthesize(model, task, release, replace(config, groups_per_batch=size), progress=False) for size in (1, 4)]
    assert runs[0].dataset.to_list() == runs[1].dataset.to_list()


@pytest.mark.parametrize("search_name", CONFIGS)
def test_the_same_bytes_again_and_after_a_stop(setting, tmp_path, monkeypatch, search_name):
    model, task, release = setting
    config = replace(CONFIGS[search_name], groups_per_batch=2)
    first = synthesize(model, task, release, config, tmp_path / "whole", progress=False)
    assert synthesize(model, task, release, config, tmp_path / "whole", progress=False).history.equals(first.history)
    monkeypatch.setattr("gradmm.runs.SNAPSHOT_SECONDS", 0.0)
    seen = []

    def interrupt(batch, result):
        seen.append(batch)
        if len(seen) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        synthesize(model, task, release, config, tmp_path / "cut", progress=False, on_step=interrupt)
    again = []
    synthesize(model, task, release, config, tmp_path / "cut", progress=False, on_step=lambda batch, result: again.append(batch))
    assert len(again) == len(first.history.drop_duplicates(["step", "label"])) - 1
    assert files_of(tmp_path / "cut") == files_of(tmp_path / "whole")


@pytest.mark.parametrize("search_name", CONFIGS)
def test_two_processes_write_what_one_writes(tiny_model, tmp_path, search_name):
    config = replace(CONFIGS[search_name], groups_per_batch=2)
    plans = [plan_of(tiny_model("llama", dtype=torch.float32), config) for _ in range(3)]
    folders = [RunFolder.open(tmp_path / name, plan.identity()) for name, plan in zip(("one", "two", "two"), plans, strict=True)]
    alone = search(plans[0], folders[0], Crew(), False, None)
    calls = [lambda crew, i=i: search(plans[i], folders[i], crew, False, None) for i in (1, 2)]
    for found in together(*calls):
        assert (found.texts, found.classes, found.groups, found.ended) == (alone.texts, alone.classes, alone.groups, alone.ended)
        assert found.history.drop(columns="seconds").equals(alone.history.drop(columns="seconds"))


@pytest.mark.parametrize("search_name", CONFIGS)
def test_the_body_is_refused(setting, search_name):
    model, task, _ = setting
    with pytest.raises(UserError, match="targets in the space 'body' are matched by choosing texts: set search = 'pool'"):
        synthesize(model, task, gradmm.release(model, task, REAL, space="body"), CONFIGS[search_name], progress=False)
