"""Causal language models: loading at a pinned revision, and the few views of them that the method needs.

Knows no task. Letters: N sequences, T positions, D hidden width, V vocabulary. Files are safetensors and JSON only;
code from a model's folder is never run.
"""

import hashlib
import inspect
import json
import logging
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    modeling_gguf_pytorch_utils,
)
from transformers.activations import NewGELUActivation
from transformers.utils import logging as transformers_logging

from gradmm import files
from gradmm.device import body_of, enough_memory, fast_products, free_to_ask, in_batches, layers_of, memory_of
from gradmm.errors import UserError, first_line, require, require_flag, require_type, short_repr
from gradmm.markup import plain_name
from gradmm.progress import advance, announced, shown
from gradmm.sharding import launched
from gradmm.vocabulary import Vocabulary, tokens_of

LOG = logging.getLogger(__name__)
DATA = Path(__file__).parent / "data" / "demo"
BUILT_IN = {"demo": DATA / "model", "demo-b": DATA / "model-b"}
SAFE_PATTERNS = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]
TOKENIZER_FILES = ("tokenizer*", "vocab*", "*.model")
CHAT_FILES = ("chat_template*",)
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.pickle")
DTYPES = {
    "float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16, "float16": torch.float16,
}  # fmt: skip
FAST = ("amx_bf16", "avx512_bf16")  # what the framework calls a processor's instructions for bfloat16
INSTRUCTIONS = (*FAST, "bf16")  # and ARM's, about whose speed nothing is known here
# oneDNN's and PyTorch's cache of compiled products.
COMPILED = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")
KEPT = "64"  # of each: a step has some twenty shapes of product
TOKENS_PER_BATCH = 2048  # on a CPU; on a GPU what this share of its memory holds, within bounds
MEMORY_SHARE, MOST_TOKENS = 0.2, 1 << 16
# Numbers a layer, token and width unit held between forward and backward: 10 to 22 by family, measured.
ACTIVATION_NUMBERS = 24
ONE_DEVICE = (
    "a model stands on one device here: leave device_map out, give device such as 'cuda:0', and dtype='bfloat16' for "
    "half the memory"
)
HEAD_SCALE = 1000.0
LARGEST_LOGIT = 1e4  # of the check in float16, which ends at 65,504


@dataclass(frozen=True)
class ModelShape:
    """A language model in numbers.

    Attributes:
        layers, width, inner, vocabulary: of the body (inner: width within a feed-forward block) and the head.
        weights: numbers in all, shared ones once.
        bytes: of one number.
    """

    layers: int
    width: int
    inner: int
    vocabulary: int
    weights: int
    bytes: int

    @property
    def wide(self) -> int:
        """Bytes of a number of the ADMM state and of matching sums: float32 at least."""
        return max(4, self.bytes)

    @staticmethod
    def of(model: "Model") -> "ModelShape":
        """A loaded model's."""
        config, width = model.lm.config.get_text_config(), model.head_weight.shape[1]
        inner = getattr(config, "intermediate_size", None) or getattr(config, "ffn_dim", None) or 4 * width
        weights = sum(weight.numel() for weight in model.lm.parameters())
        return ModelShape(
            config.num_hidden_layers, width, inner, model.head_weight.shape[0], weights, model.dtype.itemsize
        )


@dataclass(frozen=True, eq=False, repr=False)
class Model:
    """A causal language model with its tokenizer; its parameters are frozen and it is in evaluation mode.

    Attributes:
        lm: the transformers model.
        tokenizer: its tokenizer.
        name: the hub id or the folder's name.
        revision: the hub's commit; None for a folder.
        fingerprint: SHA-256 of configuration, weights and, for a model loaded from files, tokenizer.
    """

    lm: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str
    revision: str | None
    fingerprint: str

    def __repr__(self) -> str:
        """Without the layers."""
        return f"Model({self.name!r}, {self.dtype}, {self.device})"

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.head_weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The weights' type."""
        return self.head_weight.dtype

    @property
    def embedding(self) -> Tensor:
        """The token embeddings as the first layer gets them, (V, D); a scaled copy for families such as Gemma."""
        layer = self.lm.get_input_embeddings()
        return layer(torch.arange(len(layer.weight), device=self.device)) if self._scales_embeddings else layer.weight

    @property
    def embedding_shape(self) -> tuple[int, ...]:
        """V and D of `embedding`, without a copy of it."""
        return tuple(self.lm.get_input_embeddings().weight.shape)

    @cached_property
    def pieces(self) -> tuple[str, ...]:
        """The text that each token adds behind a letter, V; empty for rows of the embedding beyond the tokenizer."""
        size, tokenizer = self.embedding_shape[0], self.tokenizer
        letter = tokenizer("a", add_special_tokens=False)["input_ids"][-1:]  # alone, some decoders drop a token's space
        whole = [[*letter, token] for token in range(min(size, tokens_of(tokenizer)))]
        known = tokenizer.batch_decode([letter, *whole], clean_up_tokenization_spaces=False)
        return (*(text.removeprefix(known[0]) for text in known[1:]), *[""] * (size - len(whole)))

    @property
    def ends(self) -> tuple[int, ...]:
        """The tokens that end a text: the tokenizer's first, then those of the model's settings for generation."""
        given = getattr(getattr(self.lm, "generation_config", None), "eos_token_id", None)
        known = (self.tokenizer.eos_token_id, *(given if isinstance(given, list | tuple) else (given,)))
        return tuple(dict.fromkeys(token for token in known if token is not None and token < self.embedding_shape[0]))

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """What its tokens do to a text."""
        return Vocabulary.of(self.tokenizer, self.pieces, self.ends, self.device)

    @property
    def head_weight(self) -> Tensor:
        """The output head's matrix W, (V, D), found through `get_output_embeddings` (it may be the embeddings)."""
        return self.lm.get_output_embeddings().weight

    @property
    def head_bias(self) -> Tensor | None:
        """The output head's bias, (V,), if it has one."""
        return getattr(self.lm.get_output_embeddings(), "bias", None)

    def logits_of(self, hidden: Tensor, rows: Sequence[int]) -> Tensor:
        """The logits of some rows of the head, in float32 at least: (..., D) -> (..., R)."""
        chosen = torch.tensor(list(rows), device=hidden.device)
        wide = torch.promote_types(hidden.dtype, torch.float32)
        bias = None if self.head_bias is None else self.head_bias[chosen].to(wide)
        return linear(hidden.to(wide), self.head_weight[chosen].to(wide), bias)

    @property
    def context(self) -> int:
        """The longest sequence in tokens."""
        config = self.lm.config.get_text_config()
        known = (getattr(config, name, None) for name in ("max_position_embeddings", "max_seq_len"))  # MPT's
        return next(filter(None, known), 1 << 30)

    @cached_property
    def _scales_embeddings(self) -> bool:
        layer = self.lm.get_input_embeddings()
        return not torch.equal(layer(torch.arange(3, device=self.device)), layer.weight[:3])

    @cached_property
    def _takes_positions(self) -> bool:
        return "position_ids" in inspect.signature(body_of(self.lm).forward).parameters

    @cached_property
    def _last_mlp(self) -> torch.nn.Module | None:
        """The last layer's feed-forward block, where the family keeps layers in a list and it is a module."""
        layers = layers_of(self.lm)
        return getattr(layers[-1], "mlp", None) if layers else None

    def read(self, ids: Tensor, mask: Tensor | None = None, cache=None):
        """Read tokens behind those of a cache: (N, T) ids, (N, P + T) mask or None -> ((N, D) at the end, cache)."""
        if cache is not None and not any(hasattr(layer, "keys") for layer in getattr(cache, "layers", ())):
            mask = None  # a recurrent state (Mamba) has nothing of the padding before it
        output = self.body(
            inputs_embeds=self.embed(ids),
            attention_mask=mask,
            use_cache=True,
            **({} if cache is None else {self._cache_name: cache}),
        )
        return output.last_hidden_state[:, -1], output[self._cache_name]

    @cached_property
    def _cache_name(self) -> str:
        """What this family and version of transformers call the keys and values, or the state, of tokens once read."""
        known = inspect.signature(body_of(self.lm).forward).parameters
        return next((name for name in ("cache", "cache_params") if name in known), "past_key_values")

    def body(self, **inputs):
        """One pass of the body; positions count the tokens that the mask keeps, so padding changes nothing."""
        mask = inputs.get("attention_mask")
        if mask is not None and self._takes_positions:
            length = inputs["input_ids" if "input_ids" in inputs else "inputs_embeds"].shape[1]
            inputs["position_ids"] = (mask.long().cumsum(-1) - 1).clamp(min=0)[:, -length:]
        with fast_products(self.device):
            return body_of(self.lm)(**inputs)

    def last_hidden(self, embeds: Tensor, mask: Tensor | None = None) -> Tensor:
        """The state that the head reads at the last position.

        Args:
            embeds: (N, T, D) input embeddings; the last position is a real token in every row.
            mask: (N, T), 1 for tokens and 0 for padding anywhere before the last position; None keeps all. Tokens are
                moved to the right of all padding first, because some families count places and not positions (MPT,
                Mamba).

        Returns:
            (N, D).
        """
        if mask is not None and free_to_ask(mask) and bool(mask.all()):
            mask = None
        if mask is not None:
            order = mask.argsort(dim=1, stable=True)
            embeds, mask = embeds.take_along_dim(order.unsqueeze(-1), 1), mask.take_along_dim(order, 1)
        with _last_position_only(self._last_mlp):
            return self.body(inputs_embeds=embeds, attention_mask=mask, use_cache=False).last_hidden_state[:, -1]

    def embed(self, ids: Tensor) -> Tensor:
        """Rows of the embedding matrix: ids (...) -> (..., D)."""
        layer = self.lm.get_input_embeddings()
        # By rows, not by the layer, where the two are equal: the layer gives a padding token, often the first, no
        # gradient.
        return layer(ids) if self._scales_embeddings else layer.weight[ids]

    def tokens_at_once(self, on_cpu: int = TOKENS_PER_BATCH, backward: bool = False) -> int:
        """Tokens of a batch of texts, padding included; they change speed and memory alone.

        Args:
            on_cpu: how many on a CPU. On a GPU as many as a share of its memory holds, by arithmetic.
            backward: whether all layers' values are kept for a backward pass.
        """
        memory = memory_of(self.device)
        if not memory:
            return on_cpu
        shape = ModelShape.of(self)
        numbers = ACTIVATION_NUMBERS * shape.layers * shape.width if backward else 4 * shape.inner + 8 * shape.width
        return min(MOST_TOKENS, max(on_cpu, int(MEMORY_SHARE * memory) // (numbers * shape.bytes)))

    @torch.no_grad()
    def hidden_of(self, sequences: Sequence[Sequence[int]], tokens_per_batch: int | None = None) -> Tensor:
        """The last hidden state of token sequences of any lengths, in batches of similar length.

        Args:
            tokens_per_batch: None: `tokens_at_once`.

        Returns:
            (N, D) in the order of `sequences`.

        Raises:
            UserError: an empty sequence, or one longer than the model's context.
        """
        self.check_lengths(sequences)
        states = torch.empty(len(sequences), self.head_weight.shape[1], device=self.device, dtype=self.dtype)

        def read(rows: list[int]) -> None:
            ids, mask = pad_left([sequences[row] for row in rows], self.device)
            states[rows] = self.last_hidden(self.embed(ids), mask).to(self.dtype)  # autocast may give another
            advance(len(rows))

        in_batches(read, batches_by_length(sequences, tokens_per_batch or self.tokens_at_once()))
        return states

    def check_lengths(self, sequences: Sequence[Sequence[int]], places: Sequence[str] = ()) -> None:
        """Raise for a sequence that is empty or longer than the context.

        Args:
            places: what an error calls each sequence, such as "train.jsonl, line 4"; without them they are numbered.

        Raises:
            UserError: there is one; the first is named, and how many there are.
        """
        places = places or [f"text {number}" for number in range(1, len(sequences) + 1)]
        for place, sequence in zip(places, sequences, strict=True):
            require(len(sequence) > 0, f"{place} has no tokens: every text needs at least one")
        long = [index for index, sequence in enumerate(sequences) if len(sequence) > self.context]
        if long:
            more = f", and {len(long) - 1} more of the {len(sequences)} texts are too long" if len(long) > 1 else ""
            raise UserError(
                f"{places[long[0]]} has {len(sequences[long[0]])} tokens with its template, {self.name} reads "
                f"{self.context}{more}: shorten {'them or leave them' if more else 'it or leave it'} out"
            )


@contextmanager
def _last_position_only(mlp: torch.nn.Module | None) -> Iterator[None]:
    """Within this, a feed-forward block computes the last position alone and gives zeros for the others.

    It works position by position, and nothing after the last layer's block reads another position, so the last hidden
    state is the same and most of the last layer's work is not done.
    """
    if mlp is None:
        yield
        return
    whole, own = mlp.forward, vars(mlp).get("forward")

    def narrow(states, *others, **named):
        last = None
        if not others and not named and states.ndim == 3:  # BLOOM's block, for one, takes the residual too
            last = whole(states[:, -1:].contiguous())  # of a view, a linear layer would copy its weights for every row
        if not isinstance(last, Tensor):  # a mixture of experts may give its routing back
            return whole(states, *others, **named)
        return torch.nn.functional.pad(last, (0, 0, states.shape[1] - 1, 0))

    mlp.forward = narrow
    try:
        yield
    finally:
        del mlp.forward
        if own is not None:  # a hook of another library
            mlp.forward = own


def pad_left(sequences: Sequence[Sequence[int]], device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """Token sequences as (ids, mask), both (N, T), padded on the left with token 0 under mask 0."""
    longest = max(map(len, sequences))
    ids = torch.zeros(len(sequences), longest, dtype=torch.long)
    mask = torch.zeros(len(sequences), longest, dtype=torch.long)
    for row, sequence in enumerate(sequences):
        ids[row, longest - len(sequence) :] = torch.tensor(sequence)
        mask[row, longest - len(sequence) :] = 1
    return ids.to(device), mask.to(device)


def batches_by_length(sequences: Sequence[Sequence[int]], tokens_per_batch: int) -> list[list[int]]:
    """Row numbers in batches of similar length, each at most `tokens_per_batch` tokens with padding, or one row."""
    order = sorted(range(len(sequences)), key=lambda row: (len(sequences[row]), row))
    batches: list[list[int]] = []
    for row in order:
        if batches and (len(batches[-1]) + 1) * len(sequences[row]) <= tokens_per_batch:
            batches[-1].append(row)
        else:
            batches.append([row])
    return batches


def require_model(model) -> None:
    """Raise unless it is a `Model`, not its name or folder.

    Raises:
        UserError: it is of another type.
    """
    require_type(model, Model, "the model", "give what gradmm.load_model returns")


# ---------------------------------------------------------------- loading


def load_model(
    name: str | Path,
    *,
    revision: str | None = None,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    device_map: Any = None,
    progress: bool = True,
) -> Model:
    """Load a causal language model.

    Args:
        name: a hub id, a local folder, a GGUF file (`gradmm[gguf]`; its weights are widened to `dtype`), "demo" or
            "demo-b" (the small models shipped with the package).
        revision: a hub commit, tag or branch; the commit found is recorded in `Model.revision`.
        device: default "cuda" if there is one, else "cpu"; "cuda" is the GPU of this process's number where a launcher
            started several on this machine, else the first.
        dtype: "float32" (default on a CPU), "bfloat16", "float16", "float64", or "auto" (default on a GPU): bfloat16
            where the device multiplies it fast (see `fast_dtype`), else float32. "bfloat16" on a processor without
            instructions for it warns and loads float32. Only float32 and float64 on a CPU give the same bytes on every
            run of a machine type.
        device_map: refused: a model stands on one device.
        progress: whether a line on stderr says so if it takes more than two seconds.

    Raises:
        UserError: not found, no safetensors weights (pickles are never read), no output head, an unknown device or
            dtype, weights that are missing from the files, a revision of a folder, or a model that `wrap_model`
            refuses.

    Example:
        >>> import gradmm
        >>> model = gradmm.load_model("demo", device="cpu")
        >>> model.name, model.context
        ('demo', 128)
    """
    require(
        not isinstance(name, torch.nn.Module),
        f"the model is an object of type {type(name).__name__}: give it and its tokenizer to gradmm.wrap_model",
    )
    require(
        isinstance(name, str | Path) and str(name) != "",
        f"the model is {short_repr(name)}: give a hub id, a folder, or demo",
    )
    require(device_map is None, f"device_map = {short_repr(device_map)}, but {ONE_DEVICE}")
    require_type(revision, str | None, "the revision", "give a hub commit, tag or branch as text")
    require_flag(progress, "progress")
    device = find_device(device)
    dtype = _dtype(dtype, device)
    if dtype == torch.bfloat16 and device.type == "cpu" and not _has_any(INSTRUCTIONS):
        warnings.warn(
            "this processor has no instructions for bfloat16: the model is loaded in float32, as with dtype='auto'",
            stacklevel=2,
        )
        dtype = torch.float32
    with shown(progress and launched()[0] == 0), announced(f"loading the model {name}"):
        if str(name).endswith(".gguf"):
            return _load_gguf(files.as_path(name, "the model"), device, dtype)
        return _load_folder(str(name), revision, device, dtype)


def _load_folder(name: str, revision: str | None, device: torch.device, dtype: torch.dtype) -> Model:
    folder, found = _folder(name, revision)
    lm, tokenizer = _load(folder, name, dtype)
    LOG.info("%s loaded on %s in %s", name, device, str(dtype).removeprefix("torch."))
    called = name if found or name in BUILT_IN else plain_name(Path(folder).resolve().name)
    return wrap_model(_on(lm, device), tokenizer, called, found, _hash_files(folder))


def _load(folder: Path, name: str, dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    _refuse_pickles(folder, name)
    mend = "give a hub id or a folder with config.json, model.safetensors and tokenizer files"
    require(
        any(path for pattern in TOKENIZER_FILES for path in folder.glob(pattern)),
        f"{name} is no causal language model that can be loaded (it has no tokenizer files): {mend}",
    )
    return _read(folder, name, mend, dtype, use_safetensors=True)


def _read(
    folder: Path, name: str, mend: str, dtype: torch.dtype, **how: Any
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A model and its tokenizer by transformers; `how` says from which kind of file."""
    try:
        with _quiet():
            if "gguf_file" in how:  # it holds all of a tokenizer; AutoTokenizer of 5.4 makes Llama's CodeLlama's
                tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, gguf_file=how["gguf_file"])
            else:
                tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
                if type(tokenizer).__name__ == "MistralCommonBackend":  # with mistral-common; it lacks much
                    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
            lm, loading = AutoModelForCausalLM.from_pretrained(
                folder, dtype=dtype, trust_remote_code=False, output_loading_info=True, **how
            )
    except Exception as error:  # transformers raises many kinds; each means that there is no usable model
        raise UserError(
            f"{name} is no causal language model that can be loaded ({first_line(error)}): {mend}"
        ) from error
    _align(lm)
    absent = sorted(loading["missing_keys"])
    require(
        not absent,
        f"{name} lacks {len(absent)} of its weights, such as {absent[:1]}, which would be random: give the whole "
        "model, saved with its output head",
    )
    return lm, tokenizer


def _load_gguf(path: Path, device: torch.device, dtype: torch.dtype) -> Model:
    """A model from one GGUF file, its weights widened."""
    require(path.is_file(), f"there is no model file {path}: check the path")
    require(find_spec("gguf") is not None, "a GGUF file needs gguf: install it with pip install 'gradmm[gguf]'")
    mend = "give a GGUF file of a family that transformers widens, or the folder that it was made of"
    lm, tokenizer = _read(path.parent, str(path), mend, dtype, gguf_file=path.name)
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return wrap_model(_on(lm, device), tokenizer, plain_name(path.stem), None, digest)


def _on(lm: PreTrainedModel, device: torch.device) -> PreTrainedModel:
    with enough_memory("the model", "take a smaller one, dtype = 'bfloat16' or device = 'cpu'"):
        return lm.to(device)


def wrap_model(
    lm, tokenizer, name: str = "model", revision: str | None = None, fingerprint: str | None = None
) -> Model:
    """Make a `Model` of a transformers model already in memory: freezes it, puts it in evaluation mode, checks it.

    Args:
        lm: on one device, its weights as they are to be used.
        tokenizer: its tokenizer.
        name: for reports.

    Raises:
        UserError: no output head, logits that are not W h + b of the last hidden state (scaled or capped), a state that
            depends on later tokens, or a tokenizer that has tokens of text without a row in the model.
    """
    require_type(lm, PreTrainedModel, "the model", "give a causal language model of transformers")
    require_type(tokenizer, PreTrainedTokenizerBase, "the tokenizer", "give the one that belongs to the model")
    devices = set((getattr(lm, "hf_device_map", None) or {}).values())
    require(len(devices) < 2, f"{name} is on {len(devices)} devices, but {ONE_DEVICE}")
    lm.requires_grad_(False).eval()
    use_fast_kernels(lm)
    model = Model(lm, tokenizer, name, revision, fingerprint or _hash_state(lm))
    _check_head(model)
    held = model.embedding_shape[0]
    beyond = [token for number, token in tokenizer.added_tokens_decoder.items() if number >= held and not token.special]
    require(  # one that no text holds, such as Gemma 3's for images, may have no row
        tokenizer.vocab_size <= held and not beyond and max(tokenizer("a")["input_ids"], default=0) < held,
        f"the tokenizer of {name} has {len(tokenizer)} tokens, its model {held}: give the tokenizer that belongs to it",
    )
    return model


def use_fast_kernels(lm) -> None:
    """The same functions by faster kernels, in place.

    One for the tanh form of GELU, which GPT-2 and Phi write as nine operations and keep the values of. For a model in
    bfloat16 on a CPU: plain products for its attention, where the fused kernel spends its time converting, and few
    compiled products kept.
    """
    weights = next(lm.parameters())
    for module in list(lm.modules()):
        for name, child in module.named_children():
            if isinstance(child, NewGELUActivation):
                setattr(module, name, torch.nn.GELU(approximate="tanh"))
    if (weights.device.type, weights.dtype) != ("cpu", torch.bfloat16):
        return
    keep_few_compiled()
    if getattr(lm.config, "_attn_implementation", None) == "sdpa":
        lm.set_attn_implementation("eager")


def keep_few_compiled() -> None:
    """Bound the memory of compiled products on a CPU; works before the process's first product in bfloat16.

    The framework compiles one for each shape, and texts of many lengths have many. It would keep 1024 in each of two
    caches, at half a megabyte; what is not there is compiled again in a millisecond. A capacity in the environment is
    left as it is.
    """
    for name in COMPILED:
        os.environ.setdefault(name, KEPT)


@contextmanager
def _quiet() -> Iterator[None]:
    """Hush transformers' progress bar and advice while a model loads, and leave both as they were."""
    verbosity, bar = transformers_logging.get_verbosity(), modeling_gguf_pytorch_utils.tqdm
    hook = transformers_logging.set_tqdm_hook(lambda bar, args, kwargs: bar(*args, **{**kwargs, "disable": True}))
    transformers_logging.set_verbosity_error()
    modeling_gguf_pytorch_utils.tqdm = partial(bar, disable=True)  # widening a GGUF file asks no hook
    try:
        yield
    finally:
        modeling_gguf_pytorch_utils.tqdm = bar
        transformers_logging.set_verbosity(verbosity)
        transformers_logging.set_tqdm_hook(hook)


def find_device(device) -> torch.device:
    """The device that a name stands for; of several processes each has a GPU of its own.

    Args:
        device: a name, such as cpu or cuda, or a torch.device; None, "" and auto take a GPU where there is one.

    Raises:
        UserError: it is of another type, or not usable here.
    """
    _, processes, number = launched()
    gpu = f"cuda:{number % max(1, torch.cuda.device_count())}" if processes > 1 else "cuda"  # each may see one alone
    require_type(device, str | torch.device | None, "the device", "use cpu, cuda or auto")
    if device in (None, "", "auto"):
        return torch.device(gpu if torch.cuda.is_available() else "cpu")
    device = gpu if str(device) == "cuda" else device
    try:
        torch.zeros(1, dtype=torch.float64, device=device).item()  # sums that decide are taken in it; MPS has none
        return torch.device(device)
    except (RuntimeError, AssertionError, TypeError) as error:
        raise UserError(
            f"the device {device!r} is not usable here ({first_line(error)}): use cpu, cuda or auto"
        ) from error


def _align(lm: torch.nn.Module) -> None:
    """Move weights from the file's places to aligned memory: else the layout would decide on the last bits."""
    for weights in (*lm.parameters(), *lm.buffers()):
        weights.data = weights.data.clone()


def kind_of(device: torch.device) -> str:
    """The key of a device in tables of what suits each kind: "cpu" or "other"."""
    return "cpu" if device.type == "cpu" else "other"


def fast_dtype(device: torch.device | str) -> torch.dtype:
    """The type in which a device multiplies matrices fastest without losing what the method needs.

    bfloat16 on a GPU that computes in it and on a processor with AMX or AVX-512 instructions for it; float32 elsewhere.
    The solver's state, the matching sums and every training stay in float32, which a GPU multiplies in TF32 (see
    `device.fast_products`).
    """
    if torch.device(device).type == "cuda":
        named = torch.device(device).index is not None
        with (
            torch.cuda.device(device) if named else nullcontext()
        ):  # torch asks of the current one, and cards may differ
            return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    return torch.bfloat16 if torch.device(device).type == "cpu" and _has_any(FAST) else torch.float32


def _has_any(names: tuple[str, ...]) -> bool:
    found = torch.cpu.get_capabilities()
    return any(found.get(name) for name in names)


def _dtype(dtype, device: torch.device) -> torch.dtype:
    require_type(dtype, str | torch.dtype | None, "the dtype", f"use one of {', '.join(DTYPES)} or auto")
    if dtype == "auto" or (dtype in (None, "") and device.type == "cuda"):
        return fast_dtype(device)
    found = DTYPES.get(dtype or "float32", dtype)
    require(found in DTYPES.values(), f"the dtype {dtype!r} is not usable: use one of {', '.join(DTYPES)} or auto")
    return found


def _folder(name: str, revision: str | None) -> tuple[Path, str | None]:
    """A model's local folder, from the hub if need be, and the hub's commit."""
    local = BUILT_IN.get(name) or files.as_path(name, "the model")
    if local.is_dir():
        require(not revision, f"{name} is a folder, which has no revision {revision!r}: leave the revision out")
        return local, None
    require(
        not Path(name).is_absolute() and not name.startswith(".") and name.count("/") <= 1,
        f"there is no model folder {name}: check the path, or give a hub id such as microsoft/phi-1_5",
    )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError

    try:
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=SAFE_PATTERNS))
    except Exception as error:  # the hub's client raises many kinds, all of them about reaching the model
        gated = "it is gated, so accept its licence on its page there and run `hf auth login` once"
        mend = gated if isinstance(error, GatedRepoError) else "check the name and the network"
        raise UserError(
            f"the model {name!r} is not a folder here and could not be fetched from the hub ({first_line(error)}): "
            f"{mend}, or give a local folder"
        ) from error
    return folder, folder.name


def _refuse_pickles(folder: Path, name: str) -> None:
    require((folder / "config.json").is_file(), f"{name} has no config.json: give the folder of a transformers model")
    if any(folder.glob("*.safetensors")):
        return
    pickles = sorted(path.name for pattern in PICKLES for path in folder.glob(pattern))
    found = f"only {', '.join(pickles)}, which could run code when read" if pickles else "no weights"
    raise UserError(
        f"{name} has {found}; safetensors are needed: convert the model with save_pretrained, or name a hub revision "
        "that has them (often refs/pr/1)"
    )


def _hash_files(folder: Path) -> str:
    digest = hashlib.sha256()
    patterns = ("config.json", "*.safetensors", "merges.txt", *TOKENIZER_FILES, *CHAT_FILES)
    for path in sorted({path for pattern in patterns for path in folder.glob(pattern) if path.is_file()}):
        digest.update(path.name.encode())
        with open(path, "rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def _hash_state(lm) -> str:
    digest = hashlib.sha256(json.dumps(lm.config.to_dict(), sort_keys=True, default=str).encode())
    for name, value in sorted(lm.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


@torch.no_grad()
def _check_head(model: Model) -> None:
    """The closed form needs logits = W h + b at the last hidden state of a causal model; try it on three tokens.

    What the head reads is scaled up for the comparison, so that a cap on the logits shows however small these are.
    """
    head = model.lm.get_output_embeddings()
    require(
        head is not None and getattr(head, "weight", None) is not None,
        f"{model.name} has no output head over the vocabulary: give a causal language model (…ForCausalLM)",
    )
    rows = model.embedding_shape[0]
    require(
        len(head.weight) == rows,
        f"{model.name} has {rows} input embeddings and a head of {len(head.weight)} rows: give a model where both are "
        "as many",
    )
    ids = torch.arange(3, device=model.device)[None] % rows
    tolerance = max(1e-3, 4 * torch.finfo(model.dtype).eps)  # bfloat16 rounds each logit by up to 2^-8 of itself
    try:
        states = model.hidden_of([ids[0, :1].tolist(), ids[0].tolist()])
        largest = float(linear(states, model.head_weight, model.head_bias).abs().max())
        scale = min(HEAD_SCALE, LARGEST_LOGIT / largest) if model.dtype == torch.float16 else HEAD_SCALE
        with _scaled_input(head, scale):
            logits = model.lm(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
        expected = linear(scale * states, model.head_weight, model.head_bias)
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise UserError(
            f"{model.name} could not be run as a causal language model ({first_line(error)}): give another model"
        ) from error
    require(
        _near(logits[0, 2], expected[1], tolerance),
        f"the logits of {model.name} are not W h + b of its last hidden state (they are scaled or capped), "
        "which the closed form needs: give another model",
    )
    require(
        _near(logits[0, 0], expected[0], 10 * tolerance),
        f"{model.name} lets a position see the tokens after it or padding before it: give a causal language model that "
        "reads an attention mask",
    )


@contextmanager
def _scaled_input(head: torch.nn.Module, factor: float) -> Iterator[None]:
    hook = head.register_forward_pre_hook(lambda module, args: (args[0] * factor, *args[1:]))
    try:
        yield
    finally:
        hook.remove()


def _near(one: Tensor, other: Tensor, tolerance: float) -> bool:
    """Whether no entry differs by more than a share of the largest."""
    return float((one - other).abs().max()) <= tolerance * float(other.abs().max())
