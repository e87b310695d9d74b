"""The body's gradients, sketched: equal to what autograd and explicit matrices give, and unbiased."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from gradmm.errors import UserError
from gradmm.matching import factors_of
from gradmm.models import wrap_model
from gradmm.seeds import generator
from gradmm.spaces import BodySketch, linear_maps, release_space
from gradmm.tasks import Task, tokenize_task

TASK = Task("toy", ("bad", "good", "odd"), (" bad", " great", " world"), "{text} it was")
TEXTS = ["a fine movie", "this was one dull plot", "the cat", "music and fear", "red"]


def explicit(model, tokens, space: BodySketch, text: str, label: int) -> list[torch.Tensor]:
    """One text's gradient of every linear map by autograd."""
    weights = [layer.weight.requires_grad_(True) for layer in linear_maps(model).values()]
    hidden = model.lm.base_model(input_ids=torch.tensor([tokens.sequence(text)])).last_hidden_state[:, -1]
    logits = model.logits_of(hidden, tokens.labels) - space.preference
    gradients = torch.autograd.grad(torch.nn.functional.cross_entropy(logits, torch.tensor([label])), weights)
    for weight in weights:
        weight.requires_grad_(False)
    return list(gradients)


def literal(model, tokens, space: BodySketch, text: str, label: int) -> torch.Tensor:
    """One text's sketch from explicit gradients: (M r^2,)."""
    parts = []
    layers, gradients = linear_maps(model).values(), explicit(model, tokens, space, text, label)
    for number, (layer, gradient) in enumerate(zip(layers, gradients, strict=True)):
        inward = gradient if isinstance(layer, Conv1D) else gradient.mT  # (in, out)
        left, right = (
            torch.randn(size, space.rank, generator=generator(0, f"sketch {side}", number), dtype=torch.float64)
            for side, size in zip(("in", "out"), inward.shape, strict=True)
        )
        parts.append((left.mT @ inward.double() @ right / space.rank).flatten())
    return torch.cat(parts)


def test_sketches_equal_explicit_gradients(tiny_model, kind):
    model = tiny_model(kind)
    tokens, labels = tokenize_task(TASK, model.tokenizer), [0, 1, 2, 1, 0]
    space = BodySketch.of(model, tokens, ["one long story", "not made"], rank=3)
    found = space.factors(model, tokens, [tokens.sequence(text) for text in TEXTS], labels)
    assert found.delta.tolist() == [[1.0]] * 5 and found.hidden.shape == (5, space.size(model)) and not found.bias
    for row, text, label in zip(found.hidden, TEXTS, labels, strict=True):
        torch.testing.assert_close(row, literal(model, tokens, space, text, label).to(row), rtol=1e-6, atol=1e-9)


def test_inner_products_are_those_of_the_gradients_when_the_rank_grows(tiny_model):
    model = tiny_model("llama")
    tokens = tokenize_task(TASK, model.tokenizer)
    space, labels = BodySketch.of(model, tokens, ["one long story"], rank=256), (0, 1, 2, 1, 0)
    gradients = [explicit(model, tokens, space, text, label) for text, label in zip(TEXTS, labels, strict=True)]
    exact = [torch.cat([part.flatten() for part in parts]) for parts in gradients]
    found = factors_of(model, tokens, space, [tokens.sequence(text) for text in TEXTS], labels).hidden
    sketched = torch.nn.functional.normalize(found, dim=-1)
    true = torch.nn.functional.normalize(torch.stack(exact), dim=-1)
    torch.testing.assert_close(sketched @ sketched.mT, (true @ true.mT).to(sketched), rtol=0, atol=0.05)


def test_neighbours_do_not_change_a_sketch(tiny_model, kind):
    model = tiny_model(kind)
    tokens = tokenize_task(TASK, model.tokenizer)
    space = BodySketch(torch.zeros(3, dtype=torch.float64), rank=2)
    sequences = [tokens.sequence(text) for text in TEXTS]
    together = space.factors(model, tokens, sequences, [0] * 5).hidden
    alone = torch.cat([space.factors(model, tokens, [sequence], [0]).hidden for sequence in sequences])
    torch.testing.assert_close(together, alone, rtol=1e-8, atol=1e-12)


def test_a_text_beyond_the_context_is_refused(tiny_model):
    model = tiny_model("llama")
    with pytest.raises(UserError, match="text 1 has 1000 tokens"):
        BodySketch(torch.zeros(3)).factors(model, tokenize_task(TASK, model.tokenizer), [[1] * 1000], [0])


def test_a_caller_s_autocast_reads_the_same_in_fewer_digits(tiny_model):
    model = tiny_model("llama", dtype=torch.float32)
    tokens, labels = tokenize_task(TASK, model.tokenizer), [0, 1, 2, 1, 0]
    space, sequences = BodySketch.of(model, tokens, ["one long story"]), [tokens.sequence(text) for text in TEXTS]
    plain = space.factors(model, tokens, sequences, labels).hidden
    with torch.autocast("cpu", torch.bfloat16):
        found = space.factors(model, tokens, sequences, labels).hidden
    assert found.dtype == plain.dtype and torch.cosine_similarity(found, plain, dim=-1).min() > 0.98


@pytest.mark.parametrize("kind", ["mamba", "falcon_mamba"])
def test_maps_whose_weights_are_read_past_them_have_no_gradient_and_stop_nothing(kind, toy_tokenizer):
    config = AutoConfig.for_model(kind, vocab_size=97, hidden_size=32, num_hidden_layers=2, state_size=4)
    model = wrap_model(AutoModelForCausalLM.from_config(config).eval(), toy_tokenizer, kind)
    space = BodySketch(torch.zeros(3))
    found = space.factors(model, tokenize_task(TASK, toy_tokenizer), [[5, 6, 7], [8, 9]], [0, 1]).hidden
    by_map = found.view(2, -1, space.rank**2).norm(dim=2)
    names = list(linear_maps(model))
    assert bool(found.isfinite().all()) and any("dt_proj" in name for name in names)
    assert [name for name, norm in zip(names, by_map[0].tolist(), strict=True) if norm == 0] == [
        name for name in names if name.endswith("dt_proj")
    ]


def test_experts_that_are_left_out_are_warned_of(toy_tokenizer):
    config = AutoConfig.for_model(
        "mixtral", vocab_size=97, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4,
        intermediate_size=64, num_local_experts=2, num_experts_per_tok=1,
    )  # fmt: skip
    model = wrap_model(AutoModelForCausalLM.from_config(config).eval(), toy_tokenizer, "mixed")
    with pytest.warns(UserWarning, match="mixed mixes experts, whose weights the space 'body' leaves out"):
        release_space(model, tokenize_task(TASK, toy_tokenizer), "body", ["a film", "the plot"])
