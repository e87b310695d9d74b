"""Gradients along a public path: those of the copies that the training leads to, the same for everybody who walks it."""

from dataclasses import replace

import pytest
import torch
from test_sketch import TASK, TEXTS, literal

from gradmm import path
from gradmm.classification import Encoded, label_preference
from gradmm.errors import UserError
from gradmm.generation import prompted_texts
from gradmm.sketch import BodySketch
from gradmm.tasks import tokenize_task
from gradmm.training import train_at_rate, trainable_copy

PUBLIC = ["one long story", "not made"]
NAMED = replace(TASK, generation_prompts=("a", "the", "it"))


@pytest.fixture(autouse=True)
def few_texts(monkeypatch):
    monkeypatch.setattr(path, "TEXTS", 2)


@pytest.mark.parametrize("kind", ["gpt2", "phi"])
def test_each_part_is_the_sketch_of_a_copy_that_was_trained_so_far(tiny_model, kind):
    model = tiny_model(kind)
    tokens, labels = tokenize_task(NAMED, model.tokenizer), [0, 1, 2, 1, 0]
    before = {name: value.clone() for name, value in model.lm.state_dict().items()}
    space = path.PathSketch.of(model, tokens, PUBLIC, rank=2)
    with torch.no_grad():  # as where texts are chosen
        found = space.factors(model, tokens, [tokens.sequence(text) for text in TEXTS], labels)
    assert found.delta.tolist() == [[1.0]] * 5 and found.hidden.shape == (5, space.size(model))
    assert all(torch.equal(value, before[name]) for name, value in model.lm.state_dict().items())

    data = Encoded([tokens.sequence(text) for text in prompted_texts(model, tokens, 2)], torch.tensor([0, 0, 1, 1, 2, 2]))
    copy, places, parts = trainable_copy(model), {0: 0, 10: 1, 30: 2}, found.hidden.chunk(3, dim=1)
    for row in train_at_rate(copy, tokens, data, data, path.SETTINGS.learning_rates[-1], path.SETTINGS):
        if row["step"] not in places:
            continue
        place, still = places.pop(row["step"]), trainable_copy(copy)
        still.lm.requires_grad_(False)
        torch.testing.assert_close(space.preference[place], label_preference(still, tokens, PUBLIC))
        for sketch, text, label in zip(parts[place], TEXTS, labels, strict=True):
            wanted = literal(still, tokens, BodySketch(space.preference[place], 2), text, label)
            torch.testing.assert_close(sketch, wanted.to(sketch), rtol=1e-6, atol=1e-9)
    assert not places and not torch.allclose(parts[0], parts[2])


def test_the_path_is_walked_once_for_a_model_and_a_task_and_again_the_same(tiny_model, monkeypatch):
    model, again, walks = tiny_model("llama"), tiny_model("llama"), []
    tokens, walk = tokenize_task(NAMED, model.tokenizer), path._walk
    monkeypatch.setattr(path, "_walk", lambda *given: walks.append(given) or walk(*given))
    first = [point.lm for point in path.points(model, tokens)]
    assert [point.lm for point in path.points(model, tokenize_task(NAMED, model.tokenizer))] == first and len(walks) == 1
    for one, other in zip(first, path.points(again, tokens), strict=True):
        assert all(torch.equal(value, other.lm.state_dict()[name]) for name, value in one.state_dict().items())
    path.points(model, tokenize_task(TASK, model.tokenizer))  # other prompts, another path
    assert len(walks) == 3


def test_targets_of_a_path_from_other_prompts_are_refused(tiny_model):
    model = tiny_model("llama")
    named, other = (tokenize_task(task, model.tokenizer) for task in (NAMED, TASK))
    space = path.PathSketch.of(model, named, PUBLIC, rank=2)
    with pytest.raises(UserError, match="made with other generation prompts than the task has"):
        space.factors(model, other, [other.sequence("a cat")], [0])


def test_a_training_that_diverges_is_refused(tiny_model):
    model = tiny_model("llama")
    with torch.no_grad():
        model.lm.model.norm.weight[3] = float("nan")
    with pytest.raises(UserError, match="diverges after 0 steps: use another space than 'body_path'"):
        path.points(model, tokenize_task(NAMED, model.tokenizer))
