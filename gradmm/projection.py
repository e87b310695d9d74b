"""Projection of continuous sequences on readable text, left to right with the language model's cache.

Knows no gradients and no labels. Letters: N sequences, L positions, D embedding width, V vocabulary, k candidates.
Two published orders (Nguyen et al. 2025): the paper's text takes the nearest of the likely tokens, the authors' code
the likeliest of the near ones.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import linear

from gradmm.decoding import Decoder, check_room, decoder_of, side_by_side
from gradmm.device import in_batches
from gradmm.errors import require
from gradmm.models import Model, kind_of
from gradmm.vocabulary import Vocabulary

ROWS_PER_BLOCK = 4096
GATHERED_NUMBERS = {
    "cpu": 1 << 20,
    "other": 1 << 26,
}  # candidates' rows held at once: what a cache holds, or few launches


@dataclass(frozen=True)
class TokenTables:
    """What a projection looks tokens up in: head (V, D') and bias (V,), embeddings (V, D) and their squared norms
    (V,).
    """

    head: Tensor
    bias: Tensor | None
    embedding: Tensor
    squares: Tensor

    @staticmethod
    def of(model: Model) -> "TokenTables":
        """The tables of a model."""
        wide, table = torch.promote_types(model.dtype, torch.float32), model.embedding
        squares = [some.to(wide).square().sum(1) for some in table.split(ROWS_PER_BLOCK)]  # in blocks: no second table
        return TokenTables(model.head_weight, model.head_bias, table, torch.cat(squares))


Choose = Callable[[TokenTables, Tensor, Tensor, Tensor, int], Tensor]


def lm_then_nearest(tables: TokenTables, state: Tensor, target: Tensor, allowed: Tensor, k: int) -> Tensor:
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
    >>> tables, every = TokenTables(table, None, table, table.square().sum(-1)), torch.ones(3, dtype=torch.bool)
    >>> state, target = torch.tensor([[1.0, 0.1]]), torch.tensor([[0.0, 1.0]])  # the model wants 1, the target is 2
    >>> lm_then_nearest(tables, state, target, every, k=1), lm_then_nearest(tables, state, target, every, k=2)
    (tensor([1]), tensor([2]))
    """
    scores, candidates = top(linear(state, tables.head, tables.bias).masked_fill_(~allowed, -torch.inf), k)
    near = inner_products(tables.embedding, candidates, target)
    far = tables.squares[candidates] - 2 * near
    return _pick(candidates, far.masked_fill(scores == -torch.inf, torch.inf).argmin(1))


def nearest_then_lm(tables: TokenTables, state: Tensor, target: Tensor, allowed: Tensor, k: int) -> Tensor:
    """Among the k tokens nearest to the target, the most likely one (the authors' code); arguments as
    `lm_then_nearest`.
    """
    near = 2 * linear(target.to(tables.embedding.dtype), tables.embedding) - tables.squares
    nearness, candidates = top(near.masked_fill_(~allowed, -torch.inf), k)
    logits = inner_products(tables.head, candidates, state)
    if tables.bias is not None:
        logits = logits + tables.bias[candidates]
    return _pick(candidates, logits.masked_fill(nearness == -torch.inf, -torch.inf).argmax(1))


PROJECTIONS: dict[str, Choose] = {"lm_then_nearest": lm_then_nearest, "nearest_then_lm": nearest_then_lm}


def top(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """`scores.topk(k)` by two smaller searches: (N, V) -> values, the largest first, and their places, (N, k).

    The V scores stand in c rows of n columns. The k largest are in the k columns with the largest maxima, or equalled
    there; with c near sqrt(V / k), both searches are of about sqrt(V k) numbers.

    >>> import torch
    >>> values, places = top(torch.tensor([[3.0, 9.0, 1.0, 7.0, 5.0, 8.0, 2.0, 6.0]]), 2)  # 2 rows of 4 columns
    >>> values.tolist(), places.tolist()
    ([[9.0, 8.0]], [[1, 5]])
    """
    size = scores.shape[1]
    c = max(divisor for divisor in range(1, math.isqrt(size // k) + 1) if size % divisor == 0)
    if c == 1:
        return scores.topk(k)
    grid = scores.unflatten(1, (c, size // c))
    columns = grid.amax(1).topk(k, sorted=False).indices
    values, places = grid.gather(2, columns.unsqueeze(1).expand(-1, c, -1)).flatten(1).topk(k)
    return values, columns.gather(1, places % k) + places // k * (size // c)


def inner_products(table: Tensor, candidates: Tensor, vectors: Tensor) -> Tensor:
    """table[candidates] . vectors: (V, D), (N, k), (N, D) -> (N, k), without a gradient.

    In blocks of rows that share one place in memory: to the processor new memory costs more than the products in it.
    """
    (count, k), width = candidates.shape, table.shape[1]
    rows = max(1, min(count, gathered_numbers(table.device) // (k * width)))
    found = table.new_empty(rows * k, width)
    wide = found.to(torch.promote_types(table.dtype, torch.float32))
    products = wide.new_empty(count, k)
    parts = (candidates.split(rows), vectors.to(wide.dtype).split(rows), products.split(rows))
    for some, vector, product in zip(*parts, strict=True):
        here = slice(some.numel())
        torch.index_select(table, 0, some.flatten(), out=found[here])
        if wide is not found:
            wide[here] = found[here]
        torch.bmm(vector.unsqueeze(1), wide[here].view(-1, k, width).mT, out=product.unsqueeze(1))
    return products


def gathered_numbers(device: torch.device) -> int:
    """Numbers of candidates' rows that `inner_products` holds at once on a device; one candidate list at least."""
    return GATHERED_NUMBERS[kind_of(device)]


def _pick(candidates: Tensor, best: Tensor) -> Tensor:
    return candidates.gather(1, best.unsqueeze(1)).squeeze(1)


# ---------------------------------------------------------------- the walk from left to right


@dataclass(frozen=True)
class DecodingConfig:
    """What the projection may write.

    Attributes:
        order: a name in PROJECTIONS.
        k: candidates of each position, at least 1 and at most the number of tokens of whole characters.
        vocabulary: which tokens a text may hold where.
        end: the token that ends a text early; None writes all L positions.
        min_tokens: no text ends before it has this many tokens of its own, those of its opening not counted.
    """

    order: str
    k: int
    vocabulary: Vocabulary
    end: int | None = None
    min_tokens: int = 1

    def __post_init__(self) -> None:
        require(
            self.order in PROJECTIONS,
            f"the projection {self.order!r} is not known: use one of {', '.join(PROJECTIONS)}",
        )
        allowed = self.vocabulary.whole
        count = int(allowed.sum())
        require(
            isinstance(self.k, int) and 1 <= self.k <= count,
            f"top_k = {self.k!r}, it must be from 1 to the {count} allowed tokens of the {allowed.numel()} in the "
            f"vocabulary: try {min(200, count)}",
        )


@torch.no_grad()
def project(
    model: Model,
    tables: TokenTables,
    v: Tensor,
    prompts: Sequence[tuple[int, ...]],
    rows: Tensor,
    decoding: DecodingConfig,
    openings: Sequence[tuple[int, ...]] = (),
) -> Tensor:
    """Project N continuous sequences on tokens, all side by side; each position costs one cached step.

    Args:
        v: (N, L, D).
        prompts: the generation prompts, each at least one token (the begin-of-text token will do), encoded once each.
        rows: (N,) the number of each sequence's prompt.
        decoding: order, candidates, vocabulary and end.
        openings: the tokens at the end of each prompt that are its texts' first; none without them.

    Returns:
        (N, L) tokens, opening included; after a text's end all are `end`.

    Raises:
        UserError: an empty prompt, or prompt and text longer than the context.
    """
    check_room(model, prompts, [v.shape[1]] * len(prompts))
    ids = torch.full(v.shape[:2], -1 if decoding.end is None else decoding.end, device=v.device)
    for number, opening in enumerate(openings):
        ids[rows == number, : len(opening)] = torch.tensor(opening, dtype=torch.long, device=v.device)
    opened = torch.tensor([len(opening) for opening in openings] or [0] * len(prompts), device=v.device)[rows]
    before = torch.tensor([prompt[-1] for prompt in prompts], device=v.device)[rows]
    sequences = [prompts[row] for row in rows.tolist()]

    def work(some: list[int]) -> None:
        here = slice(some[0], some[-1] + 1)
        with decoder_of(model, sequences[here], v.shape[1]) as reader:
            ids[here] = _decode(tables, v[here], reader, decoding, ids[here].clone(), opened[here], before[here])

    size = side_by_side(model, len(v), max(map(len, prompts)) + v.shape[1])
    in_batches(work, [some.tolist() for some in torch.arange(len(v), device="cpu").split(size)])
    return ids


def _decode(
    tables: TokenTables,
    v: Tensor,
    reader: Decoder,
    decoding: DecodingConfig,
    ids: Tensor,
    opened: Tensor,
    before: Tensor,
) -> Tensor:
    """Token by token: v (N, L, D) -> ids (N, L).

    Args:
        ids: with the openings in it.
        opened: (N,) how many tokens of each opening.
        before: (N,) the last token of each prompt.
    """
    rows, end = torch.arange(len(v), device=v.device), v.shape[1] - 1
    place, state, done = opened, torch.zeros_like(opened), torch.zeros_like(opened, dtype=torch.bool)
    for step in range(v.shape[1]):
        allowed = _allowed_at(decoding, state, end - place, step, before)
        token = PROJECTIONS[decoding.order](tables, reader.state, v[rows, place], allowed, decoding.k)
        ids[rows, place] = torch.where(done, ids[rows, place], token)
        done = done | (place == end) if decoding.end is None else done | (place == end) | (token == decoding.end)
        if step == end:
            break
        going = reader.read_on(token, done)
        # What a text that is done may go on with doesn't matter, but there has to be something.
        state = decoding.vocabulary.state_after(state, token).masked_fill(done, 0)
        rows, place, state, done = rows[going], (place + 1).clamp_max(end)[going], state[going], done[going]
        if len(rows) == 0:
            break
    return ids


def _allowed_at(decoding: DecodingConfig, state: Tensor, left: Tensor, step: int, before: Tensor) -> Tensor:
    """What each text may go on with at a step, by its state and the room `left` behind it: (N, V), or (V,) for all."""
    allowed = decoding.vocabulary.open_to(state, left)
    if step == 0:
        allowed = allowed & decoding.vocabulary.first(before)
    if decoding.end is None:
        return allowed
    allowed = allowed.clone()
    ending = allowed.select(-1, decoding.end).fill_(step >= decoding.min_tokens)
    if allowed.ndim > 1:
        ending &= state == 0
    return allowed


def text_mask(ids: Tensor, end: int | None) -> Tensor:
    """1 for tokens of the text, 0 from its `end` token on: (..., L) -> (..., L) long."""
    if end is None:
        return torch.ones_like(ids)
    return ((ids == end).long().cumsum(-1) == 0).long()
