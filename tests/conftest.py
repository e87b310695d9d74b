"""Shared fixtures: tiny random language models, a toy tokenizer and the bench's folder; no test needs a network.

Every kind of tiny model stands for a family with its own trap: tied heads (gpt2, opt), an untied head (llama), a head
with a bias (phi), an embedding that is named differently (gpt_neox), grouped keys (qwen2).
"""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import copy
import functools
import importlib
import string
import threading
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from hypothesis import HealthCheck, settings
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from tqdm import tqdm

import gradmm.models
from gradmm import decoding, generation

ROOT = Path(__file__).resolve().parents[1]
BENCH = ROOT.parent / "shared" / "bench"
VOCABULARY, WIDTH, LAYERS, HEADS, CONTEXT = 97, 32, 2, 4, 64
END, UNKNOWN = "<|endoftext|>", "<|unknown|>"
KINDS = ("gpt2", "opt", "llama", "phi", "gpt_neox", "qwen2")
TIED = ("gpt2", "opt")
WORDS = """
    great good bad terrible fine dull it was is the a and but not very movie film story actor actors plot scene ending
    music joy sadness love fear world sports business text some words this that of in to i feel we you they about one
    two three red blue cat dog sat on saw like made all time
""".split()


def in_tiers(values: Iterable, *fast) -> list:
    """The values of a test's parameter: those that are named again are in the fast tier, the others in the slow one."""
    return [pytest.param(value, marks=() if value in fast else pytest.mark.slow) for value in values]


LONG_KINDS = in_tiers(KINDS, "llama", "phi")  # for a test that takes long
# For a test against a second implementation: Gemma scales its embeddings on the way in.
ORACLE_KINDS = in_tiers((*KINDS, "gemma"), "gpt2", "llama", "phi", "gemma")


def pytest_configure(config):
    # One thread each: results do not depend on how many workers share the cores, and two workers do not compete.
    torch.set_num_threads(1)
    # tqdm's own is one for all forked processes: of `make mutants` one that is killed would hold up all the others.
    tqdm.set_lock(threading.RLock())
    # How long an example takes to draw or to run says how busy the machine is.
    settings.register_profile("busy", deadline=None, suppress_health_check=[HealthCheck.too_slow])
    settings.load_profile("busy")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items):
    """Notebooks and slow tests first and dealt out to the workers, each of which begins with an equal part of the
    list: one that begins as the last keeps the others waiting.
    """
    long = [item for item in items if item.get_closest_marker("slow") or "shared_folder" in item.fixturenames]
    long.sort(key=lambda item: item.path.stem != "test_notebooks")
    rest = [item for item in items if item not in set(long)]
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    part = -(-len(rest) // workers)
    items[:] = [item for n in range(workers) for item in long[n::workers] + rest[n * part : (n + 1) * part]]
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(scope="session")
def bench() -> Path:
    """The folder of real data and a small language model beside the repository; skips where it is absent."""
    if not BENCH.is_dir():
        pytest.skip("the bench folder is not here")
    return BENCH


@pytest.fixture
def benchmark(monkeypatch):
    """The factory `benchmark(name)` of a script as a module."""
    monkeypatch.syspath_prepend(ROOT / "tests" / "benchmarks")
    threads = torch.get_num_threads()
    yield importlib.import_module
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def extension():
    """The factory `extension(name)` of one of the book's own Sphinx extensions as a module."""
    pytest.importorskip("sphinx", reason="jupyter-book is not installed")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "book" / "_ext")
        yield importlib.import_module


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory) -> Path:
    """A folder of this run of the tests, the same for all worker processes and for both runs of `make test-all`."""
    own = tmp_path_factory.getbasetemp()
    folder = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "shared"
    folder = Path(os.environ.get("GRADMM_TESTS_SHARED", folder))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def configuration_of(kind: str, tied: bool) -> transformers.PretrainedConfig:
    config = transformers.AutoConfig.for_model(kind)
    common = {
        "vocab_size": VOCABULARY, "hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS,
        "max_position_embeddings": CONTEXT, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0,
        "tie_word_embeddings": tied,
    }  # fmt: skip
    special = {
        "gpt2": {"n_inner": 2 * WIDTH, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
        "opt": {"ffn_dim": 2 * WIDTH, "word_embed_proj_dim": WIDTH, "dropout": 0.0},
        "llama": {"intermediate_size": 2 * WIDTH, "num_key_value_heads": HEADS},
        "phi": {"intermediate_size": 2 * WIDTH, "num_key_value_heads": HEADS},
        "gpt_neox": {"intermediate_size": 2 * WIDTH},
        "qwen2": {"intermediate_size": 2 * WIDTH, "num_key_value_heads": HEADS // 2},
        "gemma": {"intermediate_size": 2 * WIDTH, "num_key_value_heads": HEADS, "head_dim": WIDTH // HEADS},
    }
    return type(config)(**common, **special[kind])


@functools.cache
def _drawn(kind: str, seed: int, tied: bool, dtype: torch.dtype):
    config = configuration_of(kind, tied)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        lm = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").to(dtype)
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in lm.parameters():
            is_norm = parameter.ndim == 1 and bool((parameter == 1).all())
            noise = torch.randn(parameter.shape, generator=draw, dtype=torch.float64).to(dtype)
            parameter.copy_(1 + 0.1 * noise if is_norm else 0.2 * noise)
    return lm.eval()


def make_tiny_lm(kind: str, seed: int = 0, tied: bool | None = None, dtype: torch.dtype = torch.float64):
    """A random causal language model: V = 97, D = 32, 2 layers, 4 heads, context 64, end token 0.

    Weights are drawn wide enough (standard deviation 0.2) that the logits are far from uniform, and biases are not
    zero.

    Args:
        kind: one of `KINDS`, or "gemma".
        seed: of the weights; the same seed gives the same model.
        tied: whether the head shares the embedding's weights; None takes the family's habit.
        dtype: of the weights.
    """
    return copy.deepcopy(_drawn(kind, seed, kind in TIED if tied is None else tied, dtype))


def make_toy_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """A byte-level tokenizer of at most 97 tokens: letters, some punctuation, and whole words with their leading space.

    Lower-cases; the longest known piece wins, so " great" is one token while its letters can also spell it: decoding
    and encoding again need not give the same tokens, and the models' last rows belong to no token, as with real ones.
    """
    pieces = [END, UNKNOWN, "Ġ", *string.ascii_lowercase, *".,':", *(f"Ġ{word}" for word in WORDS)]
    vocabulary = {piece: number for number, piece in enumerate(dict.fromkeys(pieces))}
    assert len(vocabulary) <= VOCABULARY
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token=UNKNOWN, continuing_subword_prefix=""))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END,
        eos_token=END,
        pad_token=END,
        unk_token=UNKNOWN,
        model_max_length=CONTEXT,
    )


@pytest.fixture(scope="session")
def tiny_lm():
    """The factory `tiny_lm(kind, seed=0, tied=None, dtype=torch.float64)`, see `make_tiny_lm`."""
    return make_tiny_lm


@pytest.fixture(scope="session")
def toy_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """The tokenizer of the tiny models, see `make_toy_tokenizer`."""
    return make_toy_tokenizer()


@pytest.fixture(scope="session")
def tiny_model():
    """The factory `tiny_model(kind, ...)` of `gradmm.models.Model`: a tiny language model with the toy tokenizer."""

    def make(kind: str = "llama", **options) -> gradmm.models.Model:
        return gradmm.models.wrap_model(make_tiny_lm(kind, **options), make_toy_tokenizer(), f"tiny-{kind}")

    return make


def held_to(model: gradmm.models.Model, allowed: torch.Tensor) -> gradmm.models.Model:
    """The model with a vocabulary of no other tokens than these: (V,) bool."""
    held = replace(model)
    vars(held)["vocabulary"] = model.vocabulary.only(allowed)
    return held


@pytest.fixture(scope="session")
def demo_model() -> gradmm.models.Model:
    """The embedded default on the CPU, for tests that leave it as it is."""
    return gradmm.models.load_model("demo", device="cpu")


@pytest.fixture(params=in_tiers(KINDS, "gpt2", "llama", "phi"))
def kind(request) -> str:
    """Every family of tiny model in turn; in the fast tier a tied head, an untied one and one with a bias."""
    return request.param


@pytest.fixture(params=decoding.DECODERS)
def decoder(request, monkeypatch):
    """What a CPU uses and what a GPU uses to write texts, both on the CPU."""
    monkeypatch.setitem(decoding.DECODERS, "cpu", decoding.DECODERS[request.param])
    monkeypatch.setitem(generation.BORDERS, "cpu", generation.BORDERS[request.param])
    return decoding.DECODERS["cpu"]
