"""Projection of continuous sequences on readable text, left to right with the language model's cache.

Knows no gradients and no labels. Letters: N sequences, L positions, D embedding width, V vocabulary, k candidates.
Two published orders (Nguyen et al. 2025): the paper's text takes the nearest of the likely tokens, the authors' code the
likeliest of the near ones.
"""

import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import linear

from gradmm.errors import require
from gradmm.models import Model, pad_left

ROWS_PER_BLOCK = 4096
GATHERED_NUMBERS = 1 << 26  # candidates' rows held at once; bounds memory, not results


@dataclass(frozen=True)
class Tables:
    """What a projection looks tokens up in: head (V, D') and bias (V,), embeddings (V, D) and their squared norms (V,)."""

    head: Tensor
    bias: Tensor | None
    embedding: Tensor
    squares: Tensor

    @staticmethod
    def of(model: Model) -> "Tables":
        """The tables of a model."""
        wide, table = torch.promote_types(model.dtype, torch.float32), model.embedding
        squares = [some.to(wide).square().sum(-1) for some in table.split(ROWS_PER_BLOCK)]  # in blocks: no second table
        return Tables(model.head_weight, model.head_bias, table, torch.cat(squares))


Choose = Callable[[Tables, Tensor, Tensor, Tensor, int], Tensor]


def lm_then_nearest(tables: Tables, state: Tensor, target: Tensor, allowed: Tensor, k: int) -> Tensor:
    """Among the k most likely next tokens, the one whose embedding is nearest to the target (the paper's text).

    Args:
        tables: the model's.
        state: (N, D') states that the head reads.
        target: (N, D) continuous vectors.
        allowed: (V,) or (N, V) bool.
        k: number of candidates.

    Returns:
        (N,) tokens.

    >>> import torch
    >>> table = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    >>> tables, every = Tables(table, None, table, table.square().sum(-1)), torch.ones(3, dtype=torch.bool)
    >>> state, target = torch.tensor([[1.0, 0.1]]), torch.tensor([[0.0, 1.0]])  # the model wants 1, the target is 2
    >>> lm_then_nearest(tables, state, target, every, k=1), lm_then_nearest(tables, state, target, every, k=2)
    (tensor([1]), tensor([2]))
    """
    logits = linear(state, tables.head, tables.bias).masked_fill(~allowed, -torch.inf)
    scores, candidates = logits.topk(k, dim=-1)
    near = _at(tables.embedding, candidates, target)
    far = tables.squares[candidates] - 2 * near
    return _pick(candidates, far.masked_fill(scores == -torch.inf, torch.inf).argmin(-1))


def nearest_then_lm(tables: Tables, state: Tensor, target: Tensor, allowed: Tensor, k: int) -> Tensor:
    """Among the k tokens nearest to the target, the most likely one (the authors' code); arguments as `lm_then_nearest`."""
    far = tables.squares - 2 * linear(target.to(tables.embedding.dtype), tables.embedding)
    distances, candidates = far.masked_fill(~allowed, torch.inf).topk(k, dim=-1, largest=False)
    logits = _at(tables.head, candidates, state)
    if tables.bias is not None:
        logits = logits + tables.bias[candidates]
    return _pick(candidates, logits.masked_fill(distances == torch.inf, -torch.inf).argmax(-1))


PROJECTIONS: dict[str, Choose] = {"lm_then_nearest": lm_then_nearest, "nearest_then_lm": nearest_then_lm}


def _at(table: Tensor, candidates: Tensor, vectors: Tensor) -> Tensor:
    """table[candidates] . vectors: (V, D), (N, k), (N, D) -> (N, k), in blocks of rows."""
    wide = torch.promote_types(table.dtype, torch.float32)
    rows = max(1, GATHERED_NUMBERS // (candidates.shape[1] * table.shape[1]))
    blocks = [
        (table[some].to(wide) @ vector.to(wide).unsqueeze(-1)).squeeze(-1)
        for some, vector in zip(candidates.split(rows), vectors.split(rows), strict=True)
    ]
    return torch.cat(blocks)


def _pick(candidates: Tensor, best: Tensor) -> Tensor:
    return candidates.gather(-1, best.unsqueeze(-1)).squeeze(-1)


# ---------------------------------------------------------------- the walk from left to right


@dataclass(frozen=True)
class Reading:
    """What the projection may write.

    Attributes:
        order: a name in PROJECTIONS.
        k: candidates of each position, at least 1 and at most the number of allowed tokens.
        allowed: (V,) bool, see `allowed_tokens`.
        end: the token that ends a text early; None writes all L positions.
        min_tokens: no text ends before it has this many tokens.
        closes: (V,) bool, tokens after which a text ends (`generation.closing_tokens`): then it ends there and nowhere else, and
            `end` only fills the rest; None leaves the end to the order's choice of `end`.
    """

    order: str
    k: int
    allowed: Tensor
    end: int | None = None
    min_tokens: int = 1
    closes: Tensor | None = None

    def __post_init__(self) -> None:
        require(self.closes is None or self.end is not None, "closes without an end token to fill the rest: give end, or leave closes out")
        require(self.order in PROJECTIONS, f"the projection {self.order!r} is not known: use one of {', '.join(PROJECTIONS)}")
        count = int(self.allowed.sum())
        require(
            isinstance(self.k, int) and 1 <= self.k <= count,
            f"top_k = {self.k!r}, it must be from 1 to the {count} allowed tokens of the {self.allowed.numel()} in the "
            f"vocabulary: try {min(200, count)}",
        )


@torch.no_grad()
def project(model: Model, tables: Tables, v: Tensor, prompts: Sequence[tuple[int, ...]], rows: Tensor, reading: Reading) -> Tensor:
    """Project N continuous sequences on tokens, all side by side; each position costs one cached step.

    Args:
        v: (N, L, D).
        prompts: the generation prompts, each at least one token (the begin-of-text token will do), encoded once each.
        rows: (N,) the number of each sequence's prompt.
        reading: order, candidates, mask and end.

    Returns:
        (N, L) tokens; after a text's end all are `end`.

    Raises:
        UserError: an empty prompt, or prompt and text longer than the context.
    """
    longest = max(map(len, prompts))
    require(min(map(len, prompts)) > 0, "a generation prompt has no tokens and the tokenizer no begin-of-text token: give a prompt")
    require(
        longest + v.shape[1] <= model.context,
        f"a prompt of {longest} and a text of {v.shape[1]} tokens exceed the context of {model.context}: shorten one of them",
    )
    choose, padded = PROJECTIONS[reading.order], len(set(map(len, prompts))) > 1
    state, cache, mask = _read_prompts(model, prompts, rows, padded)
    ended = torch.zeros(v.shape[0], dtype=torch.bool, device=v.device)
    chosen: list[Tensor] = []
    for position in range(v.shape[1]):
        allowed = _allowed_at(reading, position)
        token = choose(tables, state, v[:, position], allowed, reading.k)
        if reading.end is not None:
            token = torch.where(ended, reading.end, token)
            ended = ended | _ends(reading, token, position)
        chosen.append(token)
        if position + 1 < v.shape[1]:
            mask = None if mask is None else torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
            state, cache = model.read(token[:, None], mask, cache)
    return torch.stack(chosen, dim=1)


def _read_prompts(model: Model, prompts: Sequence[tuple[int, ...]], rows: Tensor, padded: bool):
    """Encode each prompt once and hand its state and cache to its sequences: (state (N, D), cache, mask (N, P) or None)."""
    ids, mask = pad_left(prompts, model.device)
    state, cache = model.read(ids, mask if padded else None)
    cache.batch_select_indices(rows)
    return state[rows], cache, mask[rows] if padded else None


def _allowed_at(reading: Reading, position: int) -> Tensor:
    if reading.end is None:
        return reading.allowed
    allowed = reading.allowed.clone()
    allowed[reading.end] = reading.closes is None and position >= reading.min_tokens
    return allowed


def _ends(reading: Reading, token: Tensor, position: int) -> Tensor:
    """Whether a text ends with its token at this position: (N,) -> (N,) bool."""
    if reading.closes is None:
        return token == reading.end
    return reading.closes[token] & (position + 1 >= reading.min_tokens)


def text_mask(ids: Tensor, end: int | None) -> Tensor:
    """1 for tokens of the text, 0 from its `end` token on: (..., L) -> (..., L) long."""
    if end is None:
        return torch.ones_like(ids)
    return ((ids == end).long().cumsum(-1) == 0).long()


def allowed_tokens(model: Model) -> Tensor:
    """Which tokens a text may hold: (V,) bool.

    Left out: special tokens, rows of the embedding beyond the tokenizer, and tokens that do not decode to printable text
    on one line by themselves (fragments of characters, control characters).
    """
    size = model.embedding.shape[0]
    special = set(model.tokenizer.all_special_ids)
    known = min(size, len(model.tokenizer))
    texts = model.tokenizer.batch_decode([[token] for token in range(known)], clean_up_tokenization_spaces=False)
    allowed = [token not in special and _printable(text) for token, text in enumerate(texts)]
    return torch.tensor(allowed + [False] * (size - known), device=model.device)


def _printable(text: str) -> bool:
    return bool(text.strip()) and "\ufffd" not in text and all(c == " " or unicodedata.category(c)[0] != "C" for c in text)
