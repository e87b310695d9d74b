"""The body's gradients, sketched: equal to what autograd and explicit matrices give, unbiased, and those of an adapter."""

import copy
from dataclasses import replace

import pytest
import torch
from transformers.pytorch_utils import Conv1D

from gradmm.adapters import add_lora
from gradmm.errors import UserError
from gradmm.gradients import parameter_gradient
from gradmm.matching import factors_of
from gradmm.sketch import BodySketch, LastBlockSketch, LoraSketch, linear_maps
from gradmm.tasks import Task, tokenize_task

TASK = Task("toy", ("bad", "good", "odd"), (" bad", " great", " world"), "{text} it was")
TEXTS = ["a fine movie", "this was one dull plot", "the cat", "music and fear", "red"]


def literal(model, tokens, space: BodySketch, text: str, label: int) -> torch.Tensor:
    """One text's sketch from explicit gradients of the space's linear maps: (M r^2,), or (r outputs,) for an adapter."""
    layers = space.layers(model)
    weights = [layer.weight.requires_grad_(True) for layer in layers.values()]
    hidden = model.lm.base_model(input_ids=torch.tensor([tokens.sequence(text)])).last_hidden_state[:, -1]
    logits = model.logits_of(hidden, tokens.labels) - space.preference
    gradients = parameter_gradient(torch.nn.functional.cross_entropy(logits, torch.tensor([label])), weights)
    parts = []
    for number, ((name, layer), gradient) in enumerate(zip(layers.items(), gradients, strict=True)):
        layer.weight.requires_grad_(False)
        inward = gradient if isinstance(layer, Conv1D) else gradient.mT  # (in, out)
        identities = torch.eye(inward.shape[0]).to(inward), torch.eye(inward.shape[1]).to(inward)
        left, right = space._sides(number, name, *identities)
        parts.append((left.to(inward).mT @ inward @ right.to(inward)).flatten())
    return torch.cat(parts)


@pytest.mark.parametrize("sketch", [BodySketch, LastBlockSketch, LoraSketch])
def test_sketches_equal_explicit_gradients(tiny_model, kind, sketch):
    model = tiny_model(kind)
    tokens, labels = tokenize_task(TASK, model.tokenizer), [0, 1, 2, 1, 0]
    space = sketch.of(model, tokens, ["one long story", "not made"], rank=3)
    found = space.factors(model, tokens, [tokens.sequence(text) for text in TEXTS], labels)
    assert found.delta.tolist() == [[1.0]] * 5 and found.hidden.shape == (5, space.size(model)) and not found.bias
    for row, text, label in zip(found.hidden, TEXTS, labels, strict=True):
        torch.testing.assert_close(row, literal(model, tokens, space, text, label).to(row), rtol=1e-6, atol=1e-9)


def test_the_last_block_is_a_part_of_the_body(tiny_model, kind):
    model = tiny_model(kind)
    body, last = (list(sketch(torch.zeros(3)).layers(model)) for sketch in (BodySketch, LastBlockSketch))
    assert 2 * len(last) == len(body) and body[-len(last) :] == last  # two layers, alike


def test_the_lora_space_is_the_gradient_of_an_adapters_b(tiny_model, kind):
    """Against peft's own forward pass and autograd: an adapter as fine-tuning begins with, and texts one by one."""
    pytest.importorskip("peft", reason="the extra lora is not installed", exc_type=ImportError)
    model = tiny_model(kind)
    tokens, labels = tokenize_task(TASK, model.tokenizer), [0, 1, 2, 1, 0]
    space = LoraSketch.of(model, tokens, ["one long story", "not made"])
    found = space.factors(model, tokens, [tokens.sequence(text) for text in TEXTS], labels).hidden
    adapted = replace(model, lm=copy.deepcopy(model.lm))
    add_lora(adapted.lm, space.rank, seed=0)
    adapter = {side: [p for name, p in adapted.lm.named_parameters() if f".lora_{side}." in name] for side in "AB"}
    for row, text, label in zip(found, TEXTS, labels, strict=True):
        hidden = adapted.body(input_ids=torch.tensor([tokens.sequence(text)])).last_hidden_state[:, -1]
        loss = torch.nn.functional.cross_entropy(adapted.logits_of(hidden, tokens.labels) - space.preference, torch.tensor([label]))
        explicit = parameter_gradient(loss, [*adapter["B"], *adapter["A"]])
        slopes = explicit[: len(adapter["B"])]
        torch.testing.assert_close(row, torch.cat([slope.mT.flatten() for slope in slopes]).to(row), rtol=1e-6, atol=1e-9)
        assert not any(bool(slope.any()) for slope in explicit[len(slopes) :])


def test_inner_products_are_those_of_the_gradients_when_the_rank_grows(tiny_model):
    model = tiny_model("llama")
    tokens = tokenize_task(TASK, model.tokenizer)
    weights = [layer.weight for layer in linear_maps(model).values()]
    space = BodySketch.of(model, tokens, ["one long story"], rank=256)
    exact = []
    for text, label in zip(TEXTS, (0, 1, 2, 1, 0), strict=True):
        for weight in weights:
            weight.requires_grad_(True)
        hidden = model.lm.base_model(input_ids=torch.tensor([tokens.sequence(text)])).last_hidden_state[:, -1]
        logits = model.logits_of(hidden, tokens.labels) - space.preference
        exact.append(torch.cat([g.flatten() for g in parameter_gradient(torch.nn.functional.cross_entropy(logits, torch.tensor([label])), weights)]))
        for weight in weights:
            weight.requires_grad_(False)
    sketched = torch.nn.functional.normalize(factors_of(model, tokens, space, [tokens.sequence(t) for t in TEXTS], (0, 1, 2, 1, 0)).hidden, dim=-1)
    true = torch.nn.functional.normalize(torch.stack(exact), dim=-1)
    torch.testing.assert_close(sketched @ sketched.mT, (true @ true.mT).to(sketched), rtol=0, atol=0.05)


@pytest.mark.parametrize("sketch", [BodySketch, LoraSketch])
def test_neighbours_do_not_change_a_sketch(tiny_model, kind, sketch):
    model = tiny_model(kind)
    tokens = tokenize_task(TASK, model.tokenizer)
    space = sketch(torch.zeros(3, dtype=torch.float64), rank=2)
    sequences = [tokens.sequence(text) for text in TEXTS]
    together = space.factors(model, tokens, sequences, [0] * 5).hidden
    alone = torch.cat([space.factors(model, tokens, [sequence], [0]).hidden for sequence in sequences])
    torch.testing.assert_close(together, alone, rtol=1e-8, atol=1e-12)


def test_a_text_beyond_the_context_is_refused(tiny_model):
    model = tiny_model("llama")
    with pytest.raises(UserError, match="text 1 has 1000 tokens"):
        BodySketch(torch.zeros(3)).factors(model, tokenize_task(TASK, model.tokenizer), [[1] * 1000], [0])
