"""Texts read side by side, token by token: with a cache that grows, or in places that stay where a GPU replays a step.

Knows no task and draws nothing. Letters: N sequences, P positions, D hidden width. Both decoders give the same states;
a loop that uses one gives the other's texts.
"""

import logging
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer, StaticLayer

from gradmm.device import SPARE, WARM_UP, Graphs, memory_of
from gradmm.errors import first_line, require
from gradmm.models import Model, ModelShape, kind_of, pad_left

LOG = logging.getLogger(__name__)
EVERY = 8  # tokens between two questions whether all texts have ended: each one waits for the device
ROWS, PLACES = 32, 16  # a stage has multiples of these: batches of nearly the same shape share one
AT_MOST = 1024  # texts side by side on a GPU: from there on its arithmetic takes as long as it takes
SHARE = 0.25  # of a card's memory that the texts at work on it may take
PLAIN = (DynamicLayer, DynamicSlidingWindowLayer)  # a cache of these is keys and values and nothing else
LOGIT_BYTES = 56  # for each token of the vocabulary: logits in two types, masks, probabilities, sorted and placed


class Decoder(Protocol):
    """Sequences that have been read: the states (N, D) at their ends, and whether the device may be waited for now."""

    @property
    def state(self) -> Tensor:
        """(N, D)."""

    @property
    def due(self) -> bool:
        """Whether the host may ask for what is on the device now."""

    def read_on(self, token: Tensor, ended: Tensor) -> Tensor | slice:
        """Read one more token (N,) of each text, of those that have `ended` (N,) perhaps too: the rows that are left;
        none once all have ended.
        """


@contextmanager
def decoder_of(model: Model, sequences: Sequence[Sequence[int]], room: int) -> Iterator[Decoder]:
    """N sequences, each of one token at least, that have been read, by the decoder that suits the model's device.

    Args:
        room: how many more tokens will be read, at most.
    """
    _check_reading(model)
    if not (DECODERS[kind_of(model.device)] is StaticDecoder and stands_still(model)):
        yield CachedDecoder.of(model, sequences)
        return
    reader = StaticDecoder.of(model, sequences, room)
    yield reader
    reader.leave(model)


def side_by_side(model: Model, count: int, length: int) -> int:
    """How many of `count` texts are read side by side, at least 1: on a CPU all, on a GPU what a share of it holds.

    It follows from the size of the card, not from what is free of it, so that the same card does the same.

    Args:
        length: tokens of a prompt and its text.
    """
    memory = memory_of(model.device)
    return max(1, min(count, AT_MOST, int(SHARE * memory) // bytes_of_text(model, length))) if memory else count


def bytes_of_text(model: Model, length: int) -> int:
    """What a text takes while it is read and written: keys, values and a pass over it, and blocks of logits."""
    shape = ModelShape.of(model)
    numbers = (2 * shape.layers + 8) * shape.width + 4 * shape.inner
    return numbers * length * shape.bytes + LOGIT_BYTES * shape.vocabulary


def check_room(
    model: Model, prompts: Sequence[Sequence[int]], rooms: Sequence[int], mend: str = "shorten one of them"
) -> None:
    """Refuse prompts that a text can't stand behind.

    Args:
        prompts, rooms: N prompts in tokens, and how many tokens each one's text may have.

    Raises:
        UserError: an empty prompt, or prompt and text longer than the context.
    """
    require(
        min(map(len, prompts)) > 0,
        "a generation prompt has no tokens and the tokenizer no begin-of-text token: give a prompt",
    )
    prompt, text = max(zip(map(len, prompts), rooms, strict=True), key=sum)
    require(
        prompt + text <= model.context,
        f"a prompt of {prompt} and a text of {text} tokens exceed the context of {model.context}: {mend}",
    )


# ---------------------------------------------------------------- a cache that grows


@dataclass
class CachedDecoder:
    """Sequences whose cache grows, with its mask (N, P) or None: a text that has ended is left behind."""

    model: Model
    state: Tensor
    cache: Cache
    mask: Tensor | None
    due: bool = True

    @staticmethod
    def of(model: Model, sequences: Sequence[Sequence[int]]) -> "CachedDecoder":
        """N sequences, each of one token at least, that have been read; what is read alike is read once."""
        places = {sequence: place for place, sequence in enumerate(dict.fromkeys(map(tuple, sequences)))}
        ids, mask = pad_left(list(places), model.device)
        padded = None if bool(mask.all()) else mask
        state, cache = model.read(ids, padded)
        reader = CachedDecoder(model, state, cache, padded)
        reader.select(torch.tensor([places[tuple(sequence)] for sequence in sequences], device=model.device))
        return reader

    def select(self, rows: Tensor) -> None:
        """Go on with these sequences alone, in this order; one may come several times."""
        _reorder(self.cache, rows)
        self.state, self.mask = self.state[rows], None if self.mask is None else self.mask[rows]

    def read(self, token: Tensor) -> None:
        """One more token of each: (N,)."""
        if self.mask is not None:
            self.mask = torch.cat([self.mask, self.mask.new_ones(len(self.mask), 1)], dim=1)
        self.state, self.cache = self.model.read(token[:, None], self.mask, self.cache)

    def read_on(self, token: Tensor, ended: Tensor) -> Tensor:
        """See `Decoder`: only what has not ended is read and left."""
        going = (~ended).nonzero().squeeze(1)
        if 0 < len(going) < len(token):
            self.select(going)
        if len(going):
            self.read(token[going])
        return going


def _reorder(cache, rows: Tensor) -> None:
    """Keep these sequences of a cache, in this order; Mamba's, in transformers 5.4, has no method for it."""
    if hasattr(cache, "reorder_cache"):
        cache.reorder_cache(rows)
        return
    for states in (cache.conv_states, cache.ssm_states):
        states[:] = [state[rows] for state in states]


# ---------------------------------------------------------------- places that stay


class _Layer(StaticLayer):
    """A layer's keys and values, (rows, heads, places, width each), of every place from the beginning.

    All layers share one number, the place of the next token. A sliding window is left to the mask: what has left it
    stays here and isn't looked at.
    """

    def __init__(self, like: DynamicLayer, rows: int, places: int, place: Tensor) -> None:
        super().__init__(places)
        keys, values = like.keys, like.values
        self.keys = keys.new_zeros(rows, keys.shape[1], places, keys.shape[3])
        self.values = values.new_zeros(rows, values.shape[1], places, values.shape[3])
        self.cumulative_length, self.device, self.is_initialized = place, keys.device, True

    def take(self, layer: DynamicLayer, end: int) -> None:
        """The keys and values of another layer, whose last belong at the place before `end`, and nothing else."""
        for own, given in ((self.keys, layer.keys), (self.values, layer.values)):
            own.zero_()  # what isn't looked at has to be a number
            own[: len(given), :, end - given.shape[2] : end].copy_(given)

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Write one token's at its place."""
        place = self.cumulative_length.view(1)
        self.keys.index_copy_(2, place, key_states)
        self.values.index_copy_(2, place, value_states)
        return self.keys, self.values


class _Stage:
    """Tensors that stay where they are for `rows` texts of at most `places` tokens, and the step that reads a token."""

    def __init__(self, like: CachedDecoder, rows: int, places: int) -> None:
        device = like.state.device
        self.model, self.fits = weakref.proxy(like.model), _fits(like.model, rows, places)
        self.token = torch.zeros(rows, dtype=torch.long, device=device)
        self.state = like.state.new_zeros(rows, like.state.shape[1])
        self.mask = torch.zeros(rows, places, dtype=torch.long, device=device)
        self.place = StaticLayer(1).cumulative_length.to(device)  # in the shape that transformers has it
        self.layers = [_Layer(layer, rows, places, self.place) for layer in like.cache.layers]
        self.cache, self.graphs = Cache(layers=self.layers), Graphs(device, lm=like.model.lm)

    def begin(self, reader: CachedDecoder) -> int:
        """Take over what another decoder has read: how many places that fills."""
        count = len(reader.state)
        end = reader.cache.get_seq_length()
        for mine, layer in zip(self.layers, reader.cache.layers, strict=True):
            mine.take(layer, end)
        self.state[:count].copy_(reader.state)
        self.mask[:count, :end] = 1 if reader.mask is None else reader.mask
        self.go_back(end)
        return end

    def go_back(self, end: int) -> None:
        """Forget what stands from a place on."""
        self.place.fill_(end)
        self.mask[:, end:] = 0

    def read(self, end: int) -> None:
        """Read the tokens that stand in `token`, at the place `end`."""
        self.graphs.of("read", self._step, partial(self.go_back, end))()

    def _step(self) -> None:
        self.mask.index_fill_(1, self.place.view(1), 1)
        state, _ = self.model.read(self.token[:, None], self.mask, self.cache)
        self.state.copy_(state)
        self.place.add_(1)


def _fits(model: Model, rows: int, places: int) -> tuple[int, ...]:
    """What a stage is good for: so many rows and places, and a model's weights where they are now."""
    return (rows, places, *(weights.data_ptr() for weights in model.lm.parameters()))


_STAGES: weakref.WeakKeyDictionary[Model, _Stage] = weakref.WeakKeyDictionary()  # each model's last
SPARE.append(_STAGES.clear)


@dataclass
class StaticDecoder:
    """Sequences on a stage that stays where it is: a GPU replays the step of one token, and no text is left behind.

    What a text reads behind its end is to be ignored. Whether all have ended is asked every few tokens.

    Attributes:
        stage: where they are read.
        count: N.
        end: how many places are filled.
        reads: how many tokens of each have been read.
    """

    stage: _Stage
    count: int
    end: int
    reads: int = 0

    @staticmethod
    def of(model: Model, sequences: Sequence[Sequence[int]], room: int) -> "StaticDecoder":
        """N sequences, each of one token at least, that have been read: on the stage that was left last, if it fits.

        Args:
            room: how many more tokens will be read, at most.
        """
        reader, left = CachedDecoder.of(model, sequences), _STAGES.pop(model, None)
        places = reader.cache.get_seq_length() + room + WARM_UP  # a capture reads that many more
        shape = (-(-len(sequences) // ROWS) * ROWS, -(-places // PLACES) * PLACES)
        if left is None or left.fits != _fits(model, *shape):
            del left  # its memory first
            left = _Stage(reader, *shape)
        return StaticDecoder(left, len(sequences), left.begin(reader))

    def leave(self, model: Model) -> None:
        """Leave the stage to the next."""
        _STAGES[model] = self.stage

    @property
    def state(self) -> Tensor:
        """The states (N, D) at the ends."""
        return self.stage.state[: self.count]

    @property
    def due(self) -> bool:
        """See `Decoder`."""
        return (self.reads + 1) % EVERY == 0

    def read(self, token: Tensor) -> None:
        """One more token of each: (N,)."""
        self.stage.token[: self.count].copy_(token)
        self.stage.read(self.end)
        self.end, self.reads = self.end + 1, self.reads + 1

    def read_on(self, token: Tensor, ended: Tensor) -> slice:
        """See `Decoder`: all are read and left, until all have ended."""
        if self.due and bool(ended.all()):
            return slice(0)
        self.read(token)
        return slice(None)


DECODERS = {"cpu": CachedDecoder, "other": StaticDecoder}
_STANDING: weakref.WeakKeyDictionary[Model, bool] = weakref.WeakKeyDictionary()


_CHECKED: weakref.WeakSet[Model] = weakref.WeakSet()


@torch.no_grad()
def _check_reading(model: Model) -> None:
    """Raise unless a model reads token by token what it reads at once: tried on a few tokens, once a model.

    Some families keep no cache, and the state of others does not know of padding.
    """
    if model in _CHECKED:
        return
    tokens = [token % model.embedding_shape[0] for token in range(7)]
    begun, more = [tokens[:3], tokens[3:4]], tokens[4:6]
    ids, mask = pad_left([[*some, token] for some, token in zip(begun, more, strict=True)], model.device)
    whole = model.last_hidden(model.embed(ids), mask).float()
    try:
        reader = CachedDecoder.of(model, begun)
        reader.read(torch.tensor(more, device=model.device))
        apart = (reader.state.float() - whole).norm() / whole.norm()
        near = bool(apart <= max(1e-3, 16 * torch.finfo(model.dtype).eps))
        fault = (
            "" if near or not whole.isfinite().all() else "its states are others then"
        )  # broken weights are no cache's
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever a family without a cache does
        fault = first_line(error)
    require(
        not fault,
        f"{model.name} can't be read token by token, which writing texts needs ({fault}): give another model to write; "
        "this one can be released from in the head's spaces, evaluated and fine-tuned",
    )
    _CHECKED.add(model)


def stands_still(model: Model) -> bool:
    """Whether a model reads on a stage what it reads with a cache that grows: tried on a few tokens, once a model."""
    if model not in _STANDING:
        fault = _fault(model)
        _STANDING[model] = fault is None
        if fault is not None:
            LOG.info("%s is read token by token with a cache that grows: %s", model.name, fault)
    return _STANDING[model]


@torch.no_grad()
def _fault(model: Model) -> str | None:
    """Why a model can't be read on a stage; None where it can."""
    tokens = [token % model.embedding_shape[0] for token in range(7)]
    cached = CachedDecoder.of(model, [tokens[:3], tokens[3:4]])
    if not all(type(layer) in PLAIN for layer in getattr(cached.cache, "layers", (None,))):
        return "its state is more than keys and values"
    try:
        static = StaticDecoder.of(model, [tokens[:3], tokens[3:4]], 2)
        for some in (tokens[4:6], tokens[5:7]):
            for reader in (cached, static):
                reader.read(torch.tensor(some, device=model.device))
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # families refuse a cache of places in many ways
        return first_line(error)
    apart, size = (float(some.double().norm()) for some in (static.state - cached.state, cached.state))
    return None if apart <= torch.finfo(model.dtype).eps ** 0.5 * size else "its states differ with places that stay"
