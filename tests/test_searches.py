"""The searches among texts: each step against a literal one, the same bytes again, after a stop, and by two processes."""

import math
from dataclasses import replace

import pytest
import torch
from test_sharding import together
from test_synthesis import REAL, SMALL, TASK, files_of

import gradmm
from gradmm import reference, searches
from gradmm.controls import without_gradient
from gradmm.errors import UserError
from gradmm.evaluation import is_complete_sentence, perplexities
from gradmm.plan import Plan
from gradmm.runs import RunFolder
from gradmm.searches import drafts, guided_round, search
from gradmm.settings import SEARCHES
from gradmm.sharding import Crew
from gradmm.swaps import Swapper
from gradmm.synthesis import synthesize

CONFIGS = {
    "guided": replace(SMALL, search="guided", outer_steps=3, guidance_weight=2.0, top_k=20),
    "swap": replace(SMALL, search="swap", outer_steps=3, oversample=4.0, length=12, top_k=20, fluency_slack=0.5),
}


def test_every_search_of_the_settings_is_there():
    assert set(searches._BY_NAME) == set(SEARCHES)


@pytest.fixture(scope="module")
def setting(tiny_model):
    model = tiny_model("llama", dtype=torch.float32)
    return model, TASK, gradmm.release(model, TASK, REAL, space="head")


def plan_of(model, config) -> Plan:
    return Plan.of(model, TASK, gradmm.release(model, TASK, REAL, space="head"), config)


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
        assert row["match"] <= best[row["group"]] and row["reason"].startswith("step limit")
    assert set(result.history.columns) == {"step", "group", "label", "match_z", "promised", "changed", "seconds"}


def test_without_draws_the_same_texts_once_end_a_group(setting):
    model, task, release = setting
    config = replace(CONFIGS["guided"], temperature=0.0, guidance_weight=0.0)
    result = synthesize(model, task, release, config, progress=False)
    assert len(result.history) == 2 * 4
    assert all(row["reason"] == "tokens stable: the projection returned the same tokens 1 times in a row" for row in result.manifest["groups_ended"])
    drawn = synthesize(model, task, release, replace(config, temperature=1.0), progress=False)
    assert len(drawn.history) == 3 * 4 and len(set(drawn.dataset["text"])) == 8


def test_beams_and_the_size_of_a_batch_change_no_more_than_they_say(setting):
    model, task, release = setting
    config = replace(CONFIGS["guided"], beams=3, end_at="sentence")
    runs = [synthesize(model, task, release, replace(config, groups_per_batch=size), progress=False) for size in (1, 4)]
    assert runs[0].dataset.to_list() == runs[1].dataset.to_list()


@pytest.mark.parametrize("name", ["llama", "phi"])
def test_f_of_a_class_and_its_gradient_come_from_two_sweeps_over_the_texts(tiny_model, name):
    plan = plan_of(tiny_model(name), CONFIGS["swap"])
    ids = torch.randint(1, 97, (5, 6), generator=torch.Generator().manual_seed(1))
    ids[2, 4:], ids[4, 3:] = plan.reading.end, plan.reading.end
    x = plan.model.embed(ids)[None].detach().requires_grad_(True)
    expected = plan.matching.of_vectors(x, ids[None], torch.tensor([1]))
    (slopes,) = torch.autograd.grad(expected.sum(), x)
    for at_once in (1, 2, 5):
        match, gradient = plan.matching.of_tokens(ids, 1, at_once)
        assert match.item() == pytest.approx(expected.item(), abs=1e-12)
        assert torch.allclose(gradient, slopes[0], atol=1e-12) and not gradient[2, 4:].any()


@pytest.mark.parametrize("distance", ["cosine", "l2"])
def test_a_round_of_swaps_equals_a_search_among_all_swaps(tiny_model, distance):
    model, words = tiny_model("llama"), ["Ġcat", "Ġdog", "Ġred", "Ġblue"]
    plan = plan_of(model, replace(CONFIGS["swap"], distance=distance, tries=100, top_k=4, fluency_slack=1e9))
    tokens = model.tokenizer.convert_tokens_to_ids(words)
    allowed = torch.zeros(97, dtype=torch.bool).index_fill(0, torch.tensor(tokens), True)
    plan = replace(plan, reading=replace(plan.reading, allowed=allowed))
    texts = ["a cat dog red", "a red red cat", "a dog cat blue"]
    ids = torch.tensor([plan.tokens.encode(text) for text in texts])
    f, open_rows, taken = literal_f(model, plan, 1, distance), {0, 1, 2}, list(texts)

    def value(changed):
        """f of three texts, one of them changed; infinite where the change is none that may be made."""
        (row,) = (changed != now).any(1).nonzero().flatten().tolist() or [None]
        if row not in open_rows or plan.tokens.decode(changed[row].tolist()) in taken:
            return float("inf")
        if plan.tokens.encode(plan.tokens.decode(changed[row].tolist())) != changed[row].tolist():
            return float("inf")
        return f(model.embed(changed)).item()

    now, expected, current = ids, [], f(model.embed(ids)).item()
    while open_rows:
        found, (row, position, token) = reference.best_swap(value, now, tokens)
        if not found < current:
            break
        now, current = now.clone(), found
        now[row, position] = token
        expected.append(((row, position, token), pytest.approx(found, abs=1e-10)))
        open_rows.remove(row)
        taken.append(plan.tokens.decode(now[row].tolist()))
    moved, swaps = Swapper.of(plan, 1, texts).round(ids)
    assert expected and torch.equal(moved, now)
    assert [((s.trial.row, s.trial.position, s.trial.token), s.match) for s in swaps] == expected


def test_swaps_lower_f_and_keep_texts_fluent_whole_and_distinct(setting):
    model, task, release = setting
    config = CONFIGS["swap"]
    before = synthesize(model, task, release, replace(config, search="pool", ranking="group"), progress=False)
    after = synthesize(model, task, release, config, progress=False)
    began, ended = before.kept.to_list(), after.kept.to_list()
    assert len(after.dataset) == len(ended) == len({row["text"] for row in ended}) == 4 and after.history["swaps"].max() > 0
    assert [row["label"] for row in ended] == [row["label"] for row in began]
    for old, new in zip(began, ended, strict=True):
        (start,), (now,) = perplexities(model, [old["text"]]), perplexities(model, [new["text"]])
        assert now <= start * math.exp(config.fluency_slack) * 1.001
        assert is_complete_sentence(new["text"]) or not is_complete_sentence(old["text"])
    for label in task.labels:
        assert after.manifest["set_match"][label] <= before.manifest["set_match"][label] + 1e-6
        assert after.history[after.history["label"] == label]["match_z"].is_monotonic_decreasing


def test_without_slack_in_perplexity_or_without_a_target_nothing_is_swapped(setting):
    model, task, release = setting
    blind = synthesize(model, task, without_gradient(release), CONFIGS["swap"], progress=False)
    assert all(row["reason"].startswith("no swap: none of those tried at step 1") for row in blind.manifest["groups_ended"])
    plan = plan_of(model, CONFIGS["swap"])
    texts = [row["text"] for row in blind.kept if row["label"] == 0]
    strict = replace(Swapper.of(plan, 0, texts), limits=(-1.0,) * len(texts))  # no text is that likely
    ids = torch.tensor([plan.tokens.encode(texts[0])])
    moved, swaps = strict.round(ids)
    assert torch.equal(moved, ids) and not swaps


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


def test_a_batch_that_has_ended_holds_no_vectors(setting, monkeypatch):
    model, task, release = setting
    held, own = [], Crew.share
    monkeypatch.setattr(Crew, "share", lambda self, *asked: held.append(own(self, *asked)) or held[-1])
    ended = synthesize(model, task, release, replace(SMALL, groups_per_batch=1), progress=False).manifest["groups_ended"]
    (results,) = held
    assert len(results) == len(ended) > 1 and all(row["match"] is not None for row in ended)
    assert [state.x.numel() + state.lam.numel() for state in (result.state for result in results)] == [0] * len(results)


@pytest.mark.parametrize("search_name", CONFIGS)
def test_the_body_is_refused(setting, search_name):
    model, task, _ = setting
    with pytest.raises(UserError, match="targets in the space 'body' are matched by choosing texts: set search = 'pool'"):
        synthesize(model, task, gradmm.release(model, task, REAL, space="body"), CONFIGS[search_name], progress=False)
