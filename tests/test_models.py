"""Any causal language model: from a folder or the hub's cache, padded or not, whole or refused in one sentence."""

import json
import logging
import os
import shutil
import subprocess
import sys
import warnings
from fnmatch import fnmatch
from pathlib import Path

import huggingface_hub.constants
import numpy
import pytest
import safetensors.torch
import tokenizers
import torch
import transformers
from conftest import in_tiers, make_toy_tokenizer
from hypothesis import given
from hypothesis import strategies as st
from torch.overrides import TorchFunctionMode
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedModel
from transformers.activations import NewGELUActivation
from transformers.utils import logging as transformers_logging

import gradmm
from gradmm import models
from gradmm.device import layers_of
from gradmm.errors import UserError
from gradmm.models import (
    COMPILED,
    INSTRUCTIONS,
    KEPT,
    batches_by_length,
    fast_dtype,
    load_model,
    pad_left,
    wrap_model,
)
from gradmm.spaces import linear_maps
from gradmm.tasks import Task
from gradmm.training import trainable_copy

COMMIT = "0123456789abcdef0123456789abcdef01234567"
SMALL = {
    "vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4,
    "intermediate_size": 64, "max_position_embeddings": 64, "head_dim": 8, "bos_token_id": 0, "eos_token_id": 0,
        "pad_token_id": 0,
}  # fmt: skip
SEQUENCES = [[0, 40, 41, 42, 43, 44, 45], [0, 50], [7], [0, 40, 41, 60, 61]]


def random_lm(kind: str, dtype: torch.dtype = torch.float64, **options):
    """A random language model of a family that the shared fixtures leave out."""
    known = AutoConfig.for_model(kind)
    common = {key: value for key, value in SMALL.items() if hasattr(known, key) or key in known.attribute_map}
    if kind == "falcon":  # computes its own
        del common["head_dim"]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(type(known)(**{**common, **options})).to(dtype).eval()


def save(lm, tokenizer, folder: Path, **options) -> Path:
    lm.save_pretrained(folder, **options)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def saved(tmp_path, tiny_lm, toy_tokenizer):
    """`saved(kind)` saves a tiny model and gives its folder."""
    return lambda kind="llama", **options: save(
        tiny_lm(kind, dtype=torch.float32), toy_tokenizer, tmp_path / kind, **options
    )


def change_config(folder: Path, **changes) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


# ---------------------------------------------------------------- loading


def test_a_folder_loads_as_it_was_saved(saved, kind, tiny_lm):
    folder = saved(kind)
    model, source = load_model(folder, device="cpu", dtype="float64"), tiny_lm(kind, dtype=torch.float32).double()
    assert (model.name, model.revision, model.context) == (kind, None, 64)
    assert model.dtype == torch.float64 and model.embedding.shape == (97, 32) == model.head_weight.shape
    assert not model.lm.training and not any(p.requires_grad for p in model.lm.parameters())
    ids = torch.tensor(SEQUENCES[:1])
    logits = torch.nn.functional.linear(model.hidden_of(SEQUENCES[:1]), model.head_weight, model.head_bias)
    torch.testing.assert_close(logits, source(ids).logits[:, -1].detach(), rtol=1e-9, atol=1e-9)
    assert (model.head_bias is not None) == (kind == "phi")
    assert (model.head_weight.data_ptr() == model.embedding.data_ptr()) == (kind in ("gpt2", "opt"))
    assert len(model.tokenizer) <= 97


def test_the_fingerprint_is_of_the_files_and_not_of_their_place(saved, tmp_path):
    folder = saved()
    first = load_model(folder)
    shutil.copytree(folder, tmp_path / "copy")
    assert load_model(tmp_path / "copy").fingerprint == first.fingerprint
    assert load_model(folder, dtype="bfloat16").fingerprint == first.fingerprint
    changed = []
    for name, old, new in (
        ("tokenizer.json", b"great", b"grand"),
        ("config.json", b"silu", b"gelu"),
        ("model.safetensors", None, None),
    ):
        path = tmp_path / "copy" / name
        kept = path.read_bytes()
        path.write_bytes(kept.replace(old, new) if old else kept[:-1] + bytes([kept[-1] ^ 1]))
        changed.append(load_model(tmp_path / "copy").fingerprint)
        path.write_bytes(kept)
    assert len({first.fingerprint, *changed}) == 4


def test_a_model_in_memory_has_a_fingerprint_of_its_weights(tiny_lm, toy_tokenizer):
    one, same, other = (wrap_model(tiny_lm("gpt2", seed=seed), toy_tokenizer, "m").fingerprint for seed in (0, 0, 1))
    assert one == same != other
    lm = tiny_lm("gpt2")
    lm.register_buffer("scalar", torch.tensor(1.0))
    assert wrap_model(lm, toy_tokenizer, "m").fingerprint != one


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A local copy of the hub's cache, and nothing else; `hub(id)` gives the folder of a model's snapshot."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))

    def add(name: str, reference: str = "main", commit: str = COMMIT) -> Path:
        home = tmp_path / "hub" / f"models--{name.replace('/', '--')}"
        (home / "refs" / reference).parent.mkdir(parents=True, exist_ok=True)
        (home / "refs" / reference).write_text(commit)
        return home / "snapshots" / commit

    return add


def test_a_hub_id_loads_from_the_cache_and_records_its_commit(hub, kind, tiny_lm, toy_tokenizer):
    save(tiny_lm(kind), toy_tokenizer, hub(f"someone/tiny-{kind}"))
    model = load_model(f"someone/tiny-{kind}")
    assert (model.name, model.revision, model.dtype) == (f"someone/tiny-{kind}", COMMIT, torch.float32)
    assert load_model(f"someone/tiny-{kind}", revision=COMMIT).fingerprint == model.fingerprint


def test_a_revision_is_found_by_its_name(hub, tiny_lm, toy_tokenizer):
    other = COMMIT[::-1]
    for seed, place in enumerate((hub("someone/m"), hub("someone/m", "refs/pr/1", other))):
        save(tiny_lm("gpt2", seed=seed), toy_tokenizer, place)
    first, second = load_model("someone/m"), load_model("someone/m", revision="refs/pr/1")
    assert (first.revision, second.revision) == (COMMIT, other)
    assert first.fingerprint != second.fingerprint


def test_what_is_neither_folder_nor_hub_id_is_refused(hub, tmp_path, saved):
    with pytest.raises(UserError, match="'someone/absent' is not a folder here and .* hub .*: check") as caught:
        load_model("someone/absent")
    assert "\n" not in str(caught.value)
    for path in (str(tmp_path / "absent"), "./absent", "a/b/c"):
        with pytest.raises(UserError, match="there is no model folder .*: check the path, or give a hub id"):
            load_model(path)
    with pytest.raises(UserError, match="is a folder, which has no revision 'main': leave the revision out"):
        load_model(saved(), revision="main")


def test_weights_in_several_files_are_one_model(saved, tmp_path, tiny_lm, toy_tokenizer):
    folder = save(tiny_lm("llama", dtype=torch.float32), toy_tokenizer, tmp_path / "shards", max_shard_size="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    assert torch.equal(load_model(folder).hidden_of(SEQUENCES), load_model(saved()).hidden_of(SEQUENCES))
    sorted(folder.glob("*.safetensors"))[1].unlink()
    with pytest.raises(UserError, match="shards is no causal language model that can be loaded"):
        load_model(folder)


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16])
def test_half_precision_files_load_as_float32(tmp_path, tiny_lm, toy_tokenizer, stored):
    folder = save(tiny_lm("llama").to(stored), toy_tokenizer, tmp_path / "half")
    model = load_model(folder)
    assert {parameter.dtype for parameter in model.lm.parameters()} == {torch.float32}
    assert torch.equal(model.embedding, tiny_lm("llama").to(stored).float().get_input_embeddings().weight)
    assert model.hidden_of(SEQUENCES).isfinite().all()


NO_INSTRUCTIONS = dict.fromkeys(INSTRUCTIONS, False)


@pytest.mark.parametrize("feature", [*INSTRUCTIONS, "avx512_f"])
@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
def test_bfloat16_needs_its_instructions_and_auto_those_for_products(saved, monkeypatch, feature, dtype):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {**NO_INSTRUCTIONS, feature: True})
    half = feature in (("amx_bf16", "avx512_bf16") if dtype == "auto" else INSTRUCTIONS)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        model = load_model(saved("llama"), device="cpu", dtype=dtype)
    assert model.dtype == (torch.bfloat16 if half else torch.float32) and bool(told) == (dtype != "auto" and not half)
    assert dtype != "auto" or model.lm.config._attn_implementation == ("eager" if half else "sdpa")


def test_a_processor_without_instructions_for_bfloat16_is_given_float32_with_one_warning(saved, monkeypatch):
    folder = saved("llama")
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: NO_INSTRUCTIONS)
    for dtype in ("bfloat16", torch.bfloat16):
        message = "this processor has no instructions for bfloat16: the model is loaded in float32"
        with pytest.warns(UserWarning, match=message) as told:
            assert load_model(folder, device="cpu", dtype=dtype).dtype == torch.float32
        assert [one.filename for one in told] == [__file__]


def test_few_compiled_products_are_kept_unless_the_environment_says_how_many(tiny_model, monkeypatch):
    theirs, ours = COMPILED
    monkeypatch.setenv(theirs, "7")
    monkeypatch.setenv(ours, "")  # so that it is put back at the end
    monkeypatch.delenv(ours)
    tiny_model("gpt2", dtype=torch.float32)
    assert ours not in os.environ
    tiny_model("gpt2", dtype=torch.bfloat16)
    assert (os.environ[theirs], os.environ.get(ours)) == ("7", KEPT)


COMPILING = """
import torch
from gradmm import models
models.keep_few_compiled()
def grown(rows, weight=torch.ones(512, 512).bfloat16()):
    before = resident()
    for count in rows:
        torch.nn.functional.linear(torch.ones(count, 512).bfloat16(), weight)
    return resident() - before
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096
grown(range(1, 101))
print(grown(range(101, 401)))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="no /proc")
@pytest.mark.skipif(fast_dtype("cpu") != torch.bfloat16, reason="bfloat16 is slow here")
def test_products_of_many_shapes_hold_no_more_memory_than_those_of_a_hundred():
    environment = {name: value for name, value in os.environ.items() if name not in COMPILED}
    found = subprocess.check_output([sys.executable, "-c", COMPILING], env=environment, stdin=subprocess.DEVNULL)
    assert int(found) < 40e6  # 300 more products: 0.25 MB each and more if all were kept


@pytest.mark.parametrize("native, expected", [(True, torch.bfloat16), (False, torch.float32)])
def test_auto_on_a_gpu_asks_for_bfloat16_without_emulation(monkeypatch, native, expected):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: native or including_emulation)
    assert fast_dtype("cuda") == expected


def test_of_several_processes_each_has_a_gpu_that_it_sees(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for name, value in (("RANK", "3"), ("WORLD_SIZE", "4"), ("LOCAL_RANK", "3")):
        monkeypatch.setenv(name, value)
    for seen, expected in ((1, "cuda:0"), (2, "cuda:1"), (4, "cuda:3")):
        monkeypatch.setattr(torch.cuda, "device_count", lambda seen=seen: seen)
        assert models.find_device("auto") == torch.device(expected)


def test_a_device_without_float64_is_refused_at_once(monkeypatch):
    def zeros(*size, dtype, device):
        raise TypeError("Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64.")

    monkeypatch.setattr(torch, "zeros", zeros)
    with pytest.raises(UserError, match=r"the device 'mps' is not usable here .*doesn't support float64.*: use cpu"):
        models.find_device("mps")


def test_states_come_in_the_model_s_type_whatever_autocast_makes_of_them(toy_tokenizer):
    lm = random_lm("opt", torch.float32, word_embed_proj_dim=16)
    model = wrap_model(lm, toy_tokenizer, "opt")
    with torch.autocast("cpu", torch.bfloat16):
        assert model.hidden_of([[5, 6, 7]]).dtype == torch.float32


def test_bfloat16_is_near_float32(saved, kind):
    folder = saved(kind)
    exact, half = load_model(folder), load_model(folder)
    rough = wrap_model(half.lm.bfloat16(), half.tokenizer, "half")
    assert rough.dtype == rough.hidden_of(SEQUENCES).dtype == torch.bfloat16
    error = (rough.hidden_of(SEQUENCES).float() - exact.hidden_of(SEQUENCES)).norm() / exact.hidden_of(SEQUENCES).norm()
    assert error < 0.06


def test_embeddings_narrower_than_the_body(toy_tokenizer, tmp_path):
    lm = random_lm("opt", torch.float32, word_embed_proj_dim=16, ffn_dim=64)
    model = load_model(save(lm, toy_tokenizer, tmp_path / "narrow"), dtype="float64")
    assert model.embedding.shape == model.head_weight.shape == (97, 16)
    states = model.hidden_of(SEQUENCES)
    assert states.shape == (4, 16)
    expected = lm.double()(torch.tensor(SEQUENCES[:1])).logits[:, -1]
    torch.testing.assert_close(states[:1] @ model.head_weight.T, expected, rtol=1e-9, atol=1e-9)


def test_the_bench_model_loads(bench):
    model = load_model(bench / "imdb-lm")
    assert (model.embedding.shape, model.context, model.dtype) == ((8192, 256), 256, torch.float32)
    assert model.head_weight.data_ptr() != model.embedding.data_ptr()


# ---------------------------------------------------------------- padding


def padded(model, sequence: list[int], places: list[int], length: int):
    """One sequence with its tokens at some places, and junk that the mask hides at the others: (embeds, mask)."""
    ids, mask = torch.full((1, length), 13), torch.zeros(1, length, dtype=torch.long)
    ids[0, places], mask[0, places] = torch.tensor(sequence), 1
    return model.embed(ids), mask


PLACES = {
    "left": [3, 4, 5, 6, 7], "middle": [0, 1, 2, 6, 7], "before the last": [0, 1, 2, 3, 7],
    "scattered": [1, 2, 4, 6, 7], "after the first": [0, 4, 5, 6, 7],
}  # fmt: skip


def assert_padding_changes_nothing(model, tolerance: float):
    close = {"rtol": tolerance, "atol": tolerance}
    sequence = SEQUENCES[3]
    plain = model.embed(torch.tensor([sequence])).requires_grad_()
    expected = model.last_hidden(plain)
    (slope,) = torch.autograd.grad(expected.sum(), plain)
    for places in PLACES.values():
        embeds, mask = padded(model, sequence, places, 8)
        found = model.last_hidden(embeds.requires_grad_(), mask)
        torch.testing.assert_close(found, expected, **close)
        (padded_slope,) = torch.autograd.grad(found.sum(), embeds)
        torch.testing.assert_close(padded_slope[:, places], slope, **close)
        assert not padded_slope[mask == 0].any()
    alone = torch.cat([model.hidden_of([some]) for some in SEQUENCES])
    torch.testing.assert_close(model.hidden_of(SEQUENCES), alone, **close)
    torch.testing.assert_close(model.hidden_of(SEQUENCES, tokens_per_batch=8), alone, **close)


def test_padding_anywhere_changes_nothing(tiny_model, kind):
    assert_padding_changes_nothing(tiny_model(kind), 1e-9)


FAMILIES = {
    "bloom": {"n_layer": 2, "n_head": 4}, "falcon": {"num_kv_heads": 4}, "gemma": {}, "gemma3_text": {}, "mistral": {},
    "mixtral": {"num_local_experts": 4},
    "mpt": {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 64},
    "phi3": {}, "qwen3": {},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2},
}  # fmt: skip


class Widened(TorchFunctionMode):
    """Within this, what a family computes in float32 whatever the weights are is computed in float64."""

    def __torch_function__(self, function, types, given=(), named=None):
        if function is torch.Tensor.float:
            return given[0].double()
        named = {key: widened(value) for key, value in (named or {}).items()}
        return function(*map(widened, given), **named)


def widened(value):
    return torch.float64 if value is torch.float32 else value


@pytest.mark.parametrize("family", in_tiers(FAMILIES, "bloom", "gemma3_text", "gpt_oss"))
def test_other_families_have_no_traps(toy_tokenizer, family):
    lm = random_lm(family, torch.float64, **FAMILIES[family])
    lm.set_experts_implementation("eager")  # the grouped product of mixtures of experts knows no float64
    with Widened():
        model = wrap_model(lm, toy_tokenizer, family)
        assert_padding_changes_nothing(model, 1e-9)
        assert_the_head_reads_the_last_state(model, 1e-12)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_the_grouped_products_of_experts_have_no_traps(toy_tokenizer, family):
    model = wrap_model(random_lm(family, torch.float32, **FAMILIES[family]), toy_tokenizer, family)
    assert_padding_changes_nothing(model, 1e-5)
    assert_the_head_reads_the_last_state(model, 1e-5)


def assert_the_head_reads_the_last_state(model, tolerance: float):
    ids = torch.tensor(SEQUENCES[:1])
    logits = torch.nn.functional.linear(model.last_hidden(model.embed(ids)), model.head_weight, model.head_bias)
    expected = model.lm(ids, attention_mask=torch.ones_like(ids)).logits[:, -1]
    torch.testing.assert_close(logits, expected, rtol=tolerance, atol=tolerance)
    assert torch.equal(model.embedding[ids], model.embed(ids))
    assert model.embedding_shape == model.embedding.shape


@pytest.mark.parametrize("kind", ["gpt2", "phi"])
def test_a_faster_kernel_computes_the_same_function(tiny_lm, toy_tokenizer, kind):
    ids = torch.tensor(SEQUENCES[:1])
    expected = tiny_lm(kind)(ids).logits
    assert sum(isinstance(module, NewGELUActivation) for module in tiny_lm(kind).modules()) == 2
    model = wrap_model(tiny_lm(kind), toy_tokenizer, kind)
    assert not any(isinstance(module, NewGELUActivation) for module in model.lm.modules())
    torch.testing.assert_close(model.lm(ids).logits, expected, rtol=1e-12, atol=1e-12)


def test_the_last_state_leaves_the_model_as_it_was(tiny_model, kind):
    model = tiny_model(kind)
    embeds = model.embed(torch.tensor(SEQUENCES[:1]))
    before = model.body(inputs_embeds=embeds, attention_mask=None, use_cache=False).last_hidden_state
    torch.testing.assert_close(model.last_hidden(embeds), before[:, -1], rtol=1e-12, atol=1e-12)
    after = model.body(inputs_embeds=embeds, attention_mask=None, use_cache=False).last_hidden_state
    assert torch.equal(before, after)
    assert not any("forward" in vars(module) or module._forward_pre_hooks for module in model.lm.modules())


def test_no_text_no_tokens_and_too_many_tokens(tiny_model):
    model = tiny_model("llama")
    assert model.hidden_of([]).shape == (0, 32)
    assert model.hidden_of([[5] * 64]).shape == (1, 32)
    with pytest.raises(UserError, match="text 2 has 65 tokens with its template, tiny-llama reads 64: shorten it or"):
        model.hidden_of([[5], [5] * 65])
    with pytest.raises(
        UserError,
        match="^b has 70 tokens with its template, tiny-llama reads 64, and 2 more of the 4 texts are too long: "
        "shorten them or leave them out",
    ):
        model.check_lengths([[5], [5] * 70, [5] * 65, [5] * 80], ["a", "b", "c", "d"])
    with pytest.raises(UserError, match="text 1 has no tokens: every text needs at least one"):
        model.hidden_of([[]])


lengths = st.lists(st.lists(st.integers(1, 96), min_size=1, max_size=12), min_size=1, max_size=12)


@given(lengths)
def test_left_padding_keeps_every_token(sequences):
    ids, mask = pad_left(sequences)
    assert ids.shape == mask.shape == (len(sequences), max(map(len, sequences)))
    assert [row[keep.bool()].tolist() for row, keep in zip(ids, mask, strict=True)] == sequences
    assert mask[:, -1].all() and not ids[mask == 0].any()


@given(lengths, st.integers(1, 30))
def test_batches_hold_every_row_once_within_the_limit(sequences, limit):
    batches = batches_by_length(sequences, limit)
    assert sorted(row for batch in batches for row in batch) == list(range(len(sequences)))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(len(sequences[row]) for row in batch) <= limit


# ---------------------------------------------------------------- refusals


def test_pickles_are_refused_by_name_and_never_read(saved):
    folder = saved()
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(UserError, match="only pytorch_model.bin, which could run code .* safetensors .*: convert"):
        load_model(folder)
    (folder / "pytorch_model.bin").unlink()
    with pytest.raises(UserError, match="llama has no weights; safetensors are needed"):
        load_model(folder)
    (folder / "config.json").unlink()
    with pytest.raises(UserError, match="llama has no config.json: give the folder of a transformers model"):
        load_model(folder)


CODE = """
open({marker!r}, "w")
from transformers import LlamaConfig, LlamaForCausalLM
class Config(LlamaConfig):
    model_type = "own"
class Own(LlamaForCausalLM):
    config_class = Config
"""


@pytest.mark.parametrize("model_type", ["own", "llama"])
def test_code_beside_a_model_is_never_run(saved, tmp_path, model_type):
    folder, marker = saved(), tmp_path / "ran"
    (folder / "own.py").write_text(CODE.format(marker=str(marker)))
    change_config(
        folder, model_type=model_type, auto_map={"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Own"}
    )
    settings = folder / "tokenizer_config.json"
    settings.write_text(
        json.dumps({**json.loads(settings.read_text()), "auto_map": {"AutoTokenizer": ["own.Tokenizer", None]}})
    )
    if model_type == "llama":
        assert type(load_model(folder).lm) is transformers.LlamaForCausalLM
    else:
        with pytest.raises(UserError, match="llama is no causal language model that can be loaded") as caught:
            load_model(folder)
        assert "\n" not in str(caught.value)
    assert not marker.exists()


def test_a_body_saved_without_its_head_is_refused(tmp_path, saved, toy_tokenizer):
    body = AutoModel.from_pretrained(saved("llama"))
    folder = save(body, toy_tokenizer, tmp_path / "body")
    with pytest.raises(UserError, match="body lacks 1 of its weights, such as .'lm_head.weight'., .*: give the whole"):
        load_model(folder)


def test_a_tied_model_needs_no_head_of_its_own(tmp_path, saved, toy_tokenizer):
    folder = save(AutoModel.from_pretrained(saved("gpt2")), toy_tokenizer, tmp_path / "body")
    assert torch.equal(load_model(folder).head_weight, load_model(tmp_path / "gpt2").head_weight)


def test_a_missing_or_misshapen_weight_is_refused(saved):
    folder = saved("llama")
    path = folder / "model.safetensors"
    # In memory of their own: older versions of safetensors map the file, which is overwritten below.
    tensors = {key: value.clone() for key, value in safetensors.torch.load_file(path).items()}
    name = "model.layers.1.mlp.up_proj.weight"
    safetensors.torch.save_file({k: v for k, v in tensors.items() if k != name}, path, {"format": "pt"})
    with pytest.raises(UserError, match=f"lacks 1 of its weights, such as .'{name}'"):
        load_model(folder)
    safetensors.torch.save_file({**tensors, name: tensors[name][:3].clone()}, path, {"format": "pt"})
    with pytest.raises(UserError, match="is no causal language model that can be loaded"):
        load_model(folder)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_cut_file_is_refused(saved, name):
    path = saved() / name
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(UserError, match="llama is no causal language model that can be loaded") as caught:
        load_model(path.parent)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "shown"),
    [("tiny [v2]", "tiny (v2)"), ("<b>`x`", "(b)'x'"), ("two\nlines", "two_lines"), ("50% & $x", "50% & $x")],
)
def test_a_model_may_lie_in_a_folder_of_any_name(tmp_path, tiny_lm, toy_tokenizer, name, shown):
    assert load_model(save(tiny_lm("llama"), toy_tokenizer, tmp_path / name)).name == shown


def test_a_folder_without_tokenizer_is_refused(tmp_path, tiny_lm):
    tiny_lm("llama").save_pretrained(tmp_path / "bare")
    with pytest.raises(UserError, match="bare is no causal language model .*it has no tokenizer files"):
        load_model(tmp_path / "bare")


def test_an_encoder_decoder_is_refused(tmp_path, toy_tokenizer):
    config = transformers.T5Config(vocab_size=97, d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4)
    folder = save(transformers.T5ForConditionalGeneration(config), toy_tokenizer, tmp_path / "t5")
    with pytest.raises(UserError, match="t5 is no causal language model that can be loaded"):
        load_model(folder)


NOT_AFFINE = {
    "granite": {"logits_scaling": 8.0}, "granite slightly": {"logits_scaling": 1.01},
    "gemma2": {"final_logit_softcapping": 30.0}, "cohere": {"logit_scale": 0.0625}, "bert": {},
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("case", NOT_AFFINE)
def test_logits_that_are_not_affine_are_refused(toy_tokenizer, case, dtype):
    lm = random_lm(case.split()[0], dtype, **NOT_AFFINE[case])
    with pytest.raises(UserError, match="some model are not W h . b of its last hidden state .they are scaled or capp"):
        wrap_model(lm, toy_tokenizer, "some model")


def test_capped_logits_are_refused_in_bfloat16_too(toy_tokenizer):
    with pytest.raises(UserError, match="scaled or capped"):
        wrap_model(random_lm("gemma2", torch.bfloat16), toy_tokenizer, "capped")
    assert wrap_model(random_lm("gemma2", torch.bfloat16, final_logit_softcapping=None), toy_tokenizer, "not capped")


def test_a_model_that_sees_later_tokens_or_padding_is_refused(toy_tokenizer, monkeypatch):
    lm = random_lm("llama", torch.float32)
    forward = lm.model.forward

    def both_ways(input_ids=None, inputs_embeds=None, **named):
        embeds = lm.model.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        return forward(inputs_embeds=embeds + embeds.mean(1, keepdim=True), **named)

    monkeypatch.setattr(lm.model, "forward", both_ways)
    with pytest.raises(UserError, match="lets a position see the tokens after it"):
        wrap_model(lm, toy_tokenizer, "both ways")
    with pytest.raises(UserError, match="see the tokens after it or padding before it: give a causal language model"):
        wrap_model(random_lm("rwkv", torch.float32, context_length=64), toy_tokenizer, "no mask")


def test_a_model_without_a_head_is_refused(tiny_lm, toy_tokenizer):
    with pytest.raises(UserError, match="body has no output head over the vocabulary: give a causal language model"):
        wrap_model(tiny_lm("llama").model, toy_tokenizer, "body")


def test_a_tokenizer_of_another_model_is_refused(toy_tokenizer):
    with pytest.raises(UserError, match=f"of small has {len(toy_tokenizer)} tokens, its model 20: give the tokenizer"):
        wrap_model(random_lm("llama", vocab_size=20), toy_tokenizer, "small")


def test_a_special_token_that_no_text_holds_may_have_no_row():
    """As Gemma 3's for images."""
    tokenizer = make_toy_tokenizer()
    rows = len(tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    model = wrap_model(random_lm("llama", vocab_size=rows), tokenizer, "small")
    assert len(model.tokenizer) == rows + 1 and len(model.pieces) == rows
    tokenizer.add_tokens(["glorious"])
    with pytest.raises(UserError, match=f"of small has {rows + 2} tokens, its model {rows}: give the tokenizer"):
        wrap_model(random_lm("llama", vocab_size=rows), tokenizer, "small")


def test_of_a_model_that_reads_images_too_the_text_part_is_used(toy_tokenizer):
    config = AutoConfig.for_model("gemma3")
    text, vision = (
        {key: value for key, value in SMALL.items() if hasattr(part, key)}
        for part in (config.text_config, config.vision_config)
    )
    vision |= {"image_size": 28, "patch_size": 14}
    lm = AutoModelForCausalLM.from_config(type(config)(text_config=text, vision_config=vision)).double().eval()
    model = wrap_model(lm, toy_tokenizer, "both")
    layers = lm.get_decoder().layers
    assert model.context == SMALL["max_position_embeddings"] and layers_of(lm) == list(layers)
    assert all("vision" not in name for name in linear_maps(model))
    task = gradmm.Task("toy", ("bad", "good"), (" bad", " great"), "{text} it was", ("the film:", "a film:"))
    rows = [{"text": "a dull plot", "label": 0}, {"text": "a fine film", "label": 1}]
    assert gradmm.release(model, task, rows, space="body").space_name == "body"
    tuned = trainable_copy(model, gradmm.FinetuneConfig(layers=1))
    learning = {name for name, weights in tuned.lm.named_parameters() if weights.requires_grad}
    assert learning and not [name for name in learning if "vision" in name or "layers.0." in name]


def test_what_a_tokenizer_needs_is_fetched_and_counts(saved):
    folder = saved()
    before = load_model(folder).fingerprint
    tokenizer = make_toy_tokenizer()
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    tokenizer.save_pretrained(folder)
    written = [path.name for path in folder.iterdir()]
    assert "chat_template.jinja" in written
    assert all(any(fnmatch(name, pattern) for pattern in models.SAFE_PATTERNS) for name in written)
    assert load_model(folder).fingerprint != before


def test_a_model_that_the_memory_does_not_hold_is_refused_in_a_sentence(saved, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB\nmore")

    monkeypatch.setattr(PreTrainedModel, "to", full)
    with pytest.raises(UserError, match=r"memory does not hold the model \(.*2.00 GiB\): take a smaller one, dtype"):
        load_model(saved())


@pytest.mark.parametrize("device", ["graphics", "cuda:99", "meta", "cpu:x"])
def test_a_device_that_is_not_here_is_refused(device):
    with pytest.raises(UserError, match=f"device {device!r} is not usable here .*: use cpu, cuda or auto") as caught:
        load_model("anything", device=device)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("dtype", ["float8", "half", "int8", torch.float8_e5m2, torch.int8])
def test_a_dtype_that_is_not_used_is_refused(dtype):
    with pytest.raises(
        UserError, match="dtype .* is not usable: use one of float32, float64, bfloat16, float16 or auto"
    ):
        load_model("anything", dtype=dtype)


@pytest.mark.parametrize("device", [None, "", "auto"])
def test_the_device_is_chosen_where_none_is_named(device, monkeypatch):
    for there, kind in ((True, "cuda"), (False, "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        assert models.find_device(device) == torch.device(kind)


def test_loading_is_silent_and_leaves_transformers_as_it_was(saved, capfd):
    folder = saved("gpt2")
    verbosity, hook = logging.INFO, lambda bar, args, kwargs: bar(*args, **kwargs)
    before = transformers_logging.get_verbosity(), transformers_logging.set_tqdm_hook(hook)
    transformers_logging.set_verbosity(verbosity)
    try:
        capfd.readouterr()
        load_model(folder)
        with pytest.raises(UserError):
            (folder / "model.safetensors").write_bytes(b"cut")
            load_model(folder)
        assert capfd.readouterr() == ("", "")
        assert transformers_logging.get_verbosity() == verbosity
        assert transformers_logging.set_tqdm_hook(hook) is hook
    finally:
        transformers_logging.set_verbosity(before[0])
        transformers_logging.set_tqdm_hook(before[1])


def test_weights_are_aligned_whatever_the_layout_of_their_file(saved, tmp_path, tiny_lm, toy_tokenizer):
    sharded = save(tiny_lm("llama", dtype=torch.float32), toy_tokenizer, tmp_path / "aligned", max_shard_size="20KB")
    for folder in (saved(), sharded):
        assert {weights.data_ptr() % 64 for weights in load_model(folder).lm.parameters()} == {0}
    tied = load_model(save(tiny_lm("gpt2", dtype=torch.float32), toy_tokenizer, tmp_path / "tied"))
    assert tied.head_weight.data_ptr() == tied.lm.get_input_embeddings().weight.data_ptr()


def test_reading_on_from_a_cache_equals_reading_at_once(tiny_model, kind):
    model, ids = tiny_model(kind), torch.arange(12).view(2, 6)
    _, cache = model.read(ids[:, :4])
    torch.testing.assert_close(model.read(ids[:, 4:], cache=cache)[0], model.read(ids)[0])


# ---------------------------------------------------------------- models as users have them


def write_gguf(path: Path, tokenizer, without: str = "") -> dict[str, numpy.ndarray]:
    """A tiny Llama with random weights, but for one, and a byte-level vocabulary as one GGUF file; the weights."""
    gguf = pytest.importorskip("gguf")
    held = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    vocabulary = sorted(held["vocab"], key=held["vocab"].get)
    sizes = {"attn_q": (32, 32), "attn_k": (32, 32), "attn_v": (32, 32), "attn_output": (32, 32)}
    sizes |= {"ffn_gate": (64, 32), "ffn_up": (64, 32), "ffn_down": (32, 64), "attn_norm": (32,), "ffn_norm": (32,)}
    shapes = {"token_embd": (len(vocabulary), 32), "output": (len(vocabulary), 32), "output_norm": (32,)}
    shapes |= {f"blk.{layer}.{name}": shape for layer in range(2) for name, shape in sizes.items()}
    draw = numpy.random.default_rng(0)
    weights = {
        name: draw.normal(0.3, 0.3, shape).astype(numpy.float32) for name, shape in shapes.items() if name != without
    }
    writer = gguf.GGUFWriter(str(path), "llama")
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in held["merges"]]
    facts = {
        "context_length": 64, "embedding_length": 32, "block_count": 2, "feed_forward_length": 64, "head_count": 4,
        "head_count_kv": 4, "layer_norm_rms_eps": 1e-5, "rope_dimension_count": 8, "vocab_size": len(vocabulary),
        "tokenizer_model": "gpt2", "token_list": vocabulary, "token_merges": merges,
        "token_types": [1] * len(vocabulary), "bos_token_id": 0, "eos_token_id": 0,
    }  # fmt: skip
    for name, value in facts.items():
        getattr(writer, f"add_{name}")(value)
    for name, value in weights.items():
        writer.add_tensor(f"{name}.weight", value)
    for part in ("header", "kv_data", "tensors"):
        getattr(writer, f"write_{part}_to_file")()
    writer.close()
    return weights


@pytest.mark.slow
def test_a_gguf_file_is_a_model(tmp_path, demo_model, capsys):
    weights = write_gguf(tmp_path / "tiny one.gguf", demo_model.tokenizer)
    model = load_model(tmp_path / "tiny one.gguf", device="cpu")
    assert model.name == "tiny one" and model.revision is None and model.context == 64
    assert "GGUF" not in capsys.readouterr().err  # no bar but ours
    assert torch.equal(model.head_weight, torch.from_numpy(weights["output"]))
    text = "The room was lovely, and the staff great."
    assert model.tokenizer.decode(model.tokenizer(text, add_special_tokens=False)["input_ids"]) == text
    task = Task("x", ("no", "yes"), (" bad", " great"), generation_prompts=("Bad.", "Good."))
    rows = [{"text": text, "label": 1}, {"text": "It was dull.", "label": 0}]
    assert gradmm.release(model, task, rows, space="head").length > 4 and gradmm.evaluate(model, task, rows).loss > 0
    write_gguf(tmp_path / "part.gguf", demo_model.tokenizer, without="blk.1.ffn_up")
    with pytest.raises(UserError, match="lacks 1 of its weights, .*ffn_up|lacks 1 of its weights, .*up_proj"):
        load_model(tmp_path / "part.gguf", device="cpu")
    (tmp_path / "broken.gguf").write_bytes(b"GGUF")
    for name, words in {"broken": "is no causal language model that can", "none": "there is no model file"}.items():
        with pytest.raises(UserError, match=words):
            load_model(tmp_path / f"{name}.gguf")


def test_a_model_in_memory_is_wrapped_and_other_objects_are_refused(tiny_lm, toy_tokenizer, tmp_path):
    model = gradmm.wrap_model(tiny_lm("llama"), toy_tokenizer)
    assert model.name == "model" and len(model.fingerprint) == 64
    with pytest.raises(UserError, match="type LlamaForCausalLM: give it and its tokenizer to gradmm.wrap_model"):
        load_model(tiny_lm("llama"))
    with pytest.raises(UserError, match="the model is of type Linear: give a causal language model of transformers"):
        gradmm.wrap_model(torch.nn.Linear(2, 2), toy_tokenizer)
    with pytest.raises(UserError, match="the tokenizer is of type str: give the one that belongs to the model"):
        gradmm.wrap_model(tiny_lm("llama"), "gpt2")
    spread = tiny_lm("llama")
    spread.hf_device_map = {"model.embed_tokens": 0, "lm_head": 1}
    with pytest.raises(UserError, match="mine is on 2 devices, but a model stands on one device .*: leave device_map"):
        gradmm.wrap_model(spread, toy_tokenizer, "mine")
    for value in ("auto", {"": 0}):
        with pytest.raises(UserError, match="device_map = .*, but a model stands on one device here"):
            load_model("demo", device_map=value)


def test_a_model_in_float16_is_checked_read_and_trained(tiny_lm, toy_tokenizer, tmp_path):
    model = load_model(save(tiny_lm("llama"), toy_tokenizer, tmp_path / "x"), device="cpu", dtype="float16")
    wide = load_model(tmp_path / "x", device="cpu")
    assert model.dtype == torch.float16 and trainable_copy(model).dtype == torch.float32
    states, exact = (one.hidden_of([[5, 6, 7], [8, 9]]).float() for one in (model, wide))
    assert torch.allclose(states, exact, atol=2e-2)
    capped = tiny_lm("llama")
    head, forward = capped.get_output_embeddings(), capped.get_output_embeddings().forward
    head.forward = lambda states: 30 * torch.tanh(forward(states) / 30)
    with pytest.raises(UserError, match="are not W h"):
        gradmm.wrap_model(capped.half(), toy_tokenizer)


def test_the_context_of_mpt_is_known(toy_tokenizer):
    config = AutoConfig.for_model("mpt", d_model=32, n_heads=4, n_layers=2, max_seq_len=64, vocab_size=97)
    assert wrap_model(AutoModelForCausalLM.from_config(config), toy_tokenizer, "mpt").context == 64


def test_a_head_of_other_rows_than_the_embeddings_is_refused(tiny_lm, toy_tokenizer):
    lm = tiny_lm("llama", tied=False)
    lm.model.embed_tokens = torch.nn.Embedding(105, 32).double()
    with pytest.raises(UserError, match="toy has 105 input embeddings and a head of 97 rows: give a model where both"):
        wrap_model(lm, toy_tokenizer, "toy")


def test_a_body_under_another_name_than_the_family_says_is_found(tiny_lm, toy_tokenizer):
    lm = tiny_lm("llama")
    expected = wrap_model(lm, toy_tokenizer, "toy").hidden_of(SEQUENCES)
    lm.base_model_prefix = "language_model"  # as of Llama 4's text model
    assert lm.base_model is lm
    assert torch.equal(wrap_model(lm, toy_tokenizer, "toy").hidden_of(SEQUENCES), expected)


def test_tokens_whose_numbers_have_holes_are_all_known(tiny_lm):
    vocabulary = {"<|endoftext|>": 0, "<|unknown|>": 1, "Ġ": 2, "a": 3, "Ġgreat": 90, "Ġbad": 50, ".": 96}
    held = tokenizers.Tokenizer(
        tokenizers.models.WordPiece(vocabulary, unk_token="<|unknown|>", continuing_subword_prefix="")
    )
    held.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    held.decoder = tokenizers.decoders.ByteLevel()
    special = {"eos_token": "<|endoftext|>", "unk_token": "<|unknown|>"}
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=held, **special)
    model = wrap_model(tiny_lm("llama"), fast, "holes")
    assert [model.pieces[token] for token in (50, 90, 96, 95)] == [" bad", " great", ".", ""]
    assert model.vocabulary.whole.nonzero().flatten().tolist() == [2, 3, 50, 90, 96]
