"""LoRA: only the adapter learns, the base stays, and what comes out is a model like any other."""

import sys
from dataclasses import replace

import pytest
import torch
import transformers
from conftest import LONG_KINDS, VOCABULARY

from gradmm import finetuning, training
from gradmm.classification import evaluate
from gradmm.config import FinetuneConfig
from gradmm.data import Example
from gradmm.device import layers_of
from gradmm.errors import UserError
from gradmm.finetuning import fit
from gradmm.models import wrap_model
from gradmm.tasks import Task
from gradmm.training import trainable_copy

TASK = Task("toy", ("negative", "positive"), (" bad", " great"), "{text} it was", ("a", "the"))
CONFIG = FinetuneConfig(
    steps=8, batch_size=4, learning_rates=(1e-2, 5e-2), eval_every=2, warmup=1, adapter="lora", adapter_rank=2
)
TRAIN = [
    Example(f"the {word} {noun}", label)
    for label, word in enumerate(("red", "blue"))
    for noun in ("cat", "dog", "movie")
]


def state(lm) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in lm.state_dict().items()}


def same(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_without_peft_the_extra_is_named(tiny_model, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(
        UserError, match=r"adapter = 'lora' needs the package peft: install it with pip install 'gradmm\[lora\]'"
    ):
        trainable_copy(tiny_model("llama"), CONFIG)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"adapter": "lorra"}, "'lorra' is not known: use one of lora"),
        ({"adapter_rank": 0}, "adapter_rank = 0"),
    ],
)
def test_settings_out_of_range(settings, message):
    with pytest.raises(UserError, match=message):
        replace(CONFIG, **settings)


def test_the_adapter_alone_learns_from_step_0_of_the_model(tiny_model, kind):
    pytest.importorskip("peft", reason="the extra lora is not installed", exc_type=ImportError)
    model = tiny_model(kind, dtype=torch.float32)
    copy = trainable_copy(model, CONFIG)
    learning = {name for name, weights in copy.lm.named_parameters() if weights.requires_grad}
    assert learning and all(".lora_" in name for name in learning)
    ids = [[3, 4, 5], [7, 8]]
    assert torch.equal(copy.hidden_of(ids), model.hidden_of(ids))


@pytest.mark.parametrize("kind", LONG_KINDS)
def test_training_leaves_the_model_and_gives_one_like_it(tiny_model, kind):
    pytest.importorskip("peft", reason="the extra lora is not installed", exc_type=ImportError)
    model = tiny_model(kind, dtype=torch.float32)
    before, drawn = state(model.lm), torch.random.get_rng_state()
    # The labels that the model does not give, so that a later step than 0 is the best one.
    guesses = evaluate(model, TASK, TRAIN).predictions
    train = [replace(example, label=1 - guess) for example, guess in zip(TRAIN, guesses, strict=True)]
    found, again = (fit(model, TASK, train, train, CONFIG) for _ in range(2))
    assert same(before, state(model.lm)) and torch.equal(drawn, torch.random.get_rng_state())
    assert found.curve == again.curve and same(state(found.model.lm), state(again.model.lm))
    after = state(found.model.lm)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert found.step > 0 and after.keys() == before.keys() and changed
    assert all(
        before[name].ndim == 2 and not {"wte", "wpe", "embed_tokens", "embed_in", "lm_head"} & set(name.split("."))
        for name in changed
    )
    assert evaluate(found.model, TASK, train).accuracy == pytest.approx(found.validation_accuracy)


@pytest.mark.parametrize("kind", ["mamba", "mamba2"])
def test_maps_that_a_kernel_reads_itself_have_no_adapter(kind, toy_tokenizer):
    pytest.importorskip("peft", reason="the extra lora is not installed", exc_type=ImportError)
    small = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}
    small |= {"num_heads": 8, "head_dim": 8, "n_groups": 1} if kind == "mamba2" else {}
    lm = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(kind, **small)).eval()
    copy = trainable_copy(wrap_model(lm, toy_tokenizer, kind), CONFIG)
    learning = {name for name, weights in copy.lm.named_parameters() if weights.requires_grad}
    assert learning and all(".in_proj.lora_" in name or "x_proj" in name or "dt_proj" in name for name in learning)


@pytest.mark.parametrize("step", ["trainable_copy", "train_at_rates"])
def test_what_the_memory_does_not_hold_is_refused_with_what_helps(tiny_model, monkeypatch, step):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB\nmore")

    monkeypatch.setattr(finetuning, step, full)
    with pytest.raises(UserError, match=r"does not hold the weights that learn .*2.00 GiB\): let fewer .* layers = 4"):
        fit(tiny_model(), TASK, TRAIN, TRAIN, replace(CONFIG, adapter=None))


def test_a_size_that_the_memory_held_is_kept_for_later_steps(tiny_model, monkeypatch):
    sizes, cut = [], training.batches_by_length

    def full(sequences, size):
        sizes.append(size)
        if size > 20:
            raise torch.OutOfMemoryError("full")
        return cut(sequences, size)

    model, config = tiny_model(), replace(CONFIG, adapter=None, batch_size=4, steps=3, learning_rates=(1e-3,))
    plain = fit(model, TASK, TRAIN, TRAIN, config)
    monkeypatch.setattr(training, "batches_by_length", full)
    found = fit(model, TASK, TRAIN, TRAIN, config)
    held = min(sizes)
    assert sizes.index(held) > 0 and set(sizes[sizes.index(held) :]) == {held}
    assert [row["validation_loss"] for row in found.curve] == pytest.approx(
        [row["validation_loss"] for row in plain.curve]
    )


def test_another_seed_starts_another_adapter(tiny_model):
    pytest.importorskip("peft", reason="the extra lora is not installed", exc_type=ImportError)
    model = tiny_model("llama", dtype=torch.float32)
    one, two, other = (state(trainable_copy(model, replace(CONFIG, seed=seed)).lm) for seed in (1, 1, 2))
    assert same(one, two) and not same(one, other)


@pytest.mark.parametrize("kind", LONG_KINDS)
@pytest.mark.parametrize("adapter", [None, "lora"])
def test_a_bfloat16_model_learns_as_the_float32_model_of_its_weights(tiny_model, kind, adapter):
    if adapter:
        pytest.importorskip("peft", reason="the extra lora is not installed", exc_type=ImportError)
    half, single = (tiny_model(kind, dtype=dtype) for dtype in (torch.bfloat16, torch.float32))
    single.lm.set_attn_implementation(half.lm.config._attn_implementation)  # plain products, in another order of sums
    for ours, theirs in zip(
        [*single.lm.parameters(), *single.lm.buffers()], [*half.lm.parameters(), *half.lm.buffers()], strict=True
    ):
        ours.copy_(theirs)
    found, expected = (fit(model, TASK, TRAIN, TRAIN, replace(CONFIG, adapter=adapter)) for model in (half, single))
    assert found.curve == expected.curve and same(state(found.model.lm), state(expected.model.lm))


@pytest.mark.parametrize("count", [1, 2])
def test_the_last_layers_and_the_norms_behind_them_alone_learn(tiny_model, kind, count):
    model = tiny_model(kind, dtype=torch.float32)
    config = replace(CONFIG, adapter=None, layers=count)
    guesses = evaluate(model, TASK, TRAIN).predictions
    train = [replace(example, label=1 - guess) for example, guess in zip(TRAIN, guesses, strict=True)]
    found, before = fit(model, TASK, train, train, config), state(model.lm)
    after = state(found.model.lm)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    layers = layers_of(model.lm.base_model)
    last = {id(weights) for layer in layers[-count:] for weights in layer.parameters()}
    inside = {id(weights) for layer in layers for weights in layer.parameters()}
    names = {name: id(weights) for name, weights in model.lm.named_parameters()}
    assert found.step > 0 and any(names[name] in last for name in changed)
    assert all(names[name] in last or (names[name] not in inside and before[name].ndim == 1) for name in changed)


def test_what_learns_in_a_llama_by_name(tiny_model):
    model = tiny_model("llama", dtype=torch.float32)
    config = replace(CONFIG, adapter=None, layers=1, learning_rates=(1e-2,))
    trained = trainable_copy(model, config)
    learning = [name for name, weights in trained.lm.named_parameters() if weights.requires_grad]
    last = len(layers_of(model.lm.base_model)) - 1
    assert all(f"layers.{last}." in name or name == "model.norm.weight" for name in learning)
    assert "model.norm.weight" in learning and f"model.layers.{last}.mlp.up_proj.weight" in learning


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"adapter": None, "layers": 0}, "layers = 0"),
        ({"adapter": "lora", "layers": 1}, "adapter = 'lora' and layers = 1: give one of them"),
        ({"adapter": None, "layers": 99}, r"layers = 99, but the model has \d: give fewer"),
    ],
)
def test_layers_that_cannot_learn_are_refused(tiny_model, settings, message):
    with pytest.raises(UserError, match=message):
        fit(tiny_model("llama"), TASK, TRAIN, TRAIN, replace(CONFIG, **settings))


def test_maps_of_a_kind_of_their_own_learn_too_and_routers_do_not(toy_tokenizer):
    pytest.importorskip("peft", reason="the extra lora is not installed", exc_type=ImportError)
    small = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2, "vocab_size": VOCABULARY}
    moe = {"num_key_value_heads": 4, "intermediate_size": 64, "num_local_experts": 2}
    for kind, more in (("falcon", {}), ("phimoe", moe)):
        config = transformers.AutoConfig.for_model(kind, **small, **more)
        lm = transformers.AutoModelForCausalLM.from_config(config).eval()
        copy = trainable_copy(wrap_model(lm, toy_tokenizer, kind), replace(CONFIG, adapter="lora"))
        names = [name for name, weights in copy.lm.named_parameters() if weights.requires_grad]
        assert names and not [name for name in names if ".router." in name or ".gate." in name]
