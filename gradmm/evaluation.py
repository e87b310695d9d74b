"""How surprising texts are to a language model: their perplexity.

Knows no task. Letters: N texts, T positions, D width, V vocabulary.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, linear

from gradmm.device import in_batches
from gradmm.errors import require
from gradmm.models import Model, batches_by_length, pad_left
from gradmm.progress import advance
from gradmm.tasks import from_start

LOGITS_AT_ONCE = 1 << 22  # numbers held at once; bounds memory, not results

# ---------------------------------------------------------------- perplexity


@dataclass(frozen=True)
class Perplexity:
    """How surprising N texts are to a language model; the exponential of a mean negative log-likelihood a token.

    Attributes:
        corpus: over all tokens together.
        per_text: N values, each over its text's tokens.
        tokens: N counts.
    """

    corpus: float
    per_text: tuple[float, ...]
    tokens: tuple[int, ...]


def perplexity(model: Model, texts: Sequence[str], tokens_per_batch: int | None = None) -> Perplexity:
    """The perplexity of texts, each read alone as the tokenizer begins a text (`tasks.from_start`).

    What stands before the text is given and does not count. A tokenizer that puts nothing there gives the first token
    away, unless it is the only one. A text too unlikely for a float64 exponential has infinity.

    Args:
        tokens_per_batch: tokens of one pass, padding included; None: `Model.tokens_at_once`.

    Raises:
        UserError: no texts, a text without a token to predict, or one longer than the model's context.
    """
    require(len(texts) > 0, "there are 0 texts, perplexity needs at least 1: give some")
    sums, counts = _negative_log_likelihoods(model, text_tokens(model, texts), tokens_per_batch)
    per_text = tuple(_exp(total / count) for total, count in zip(sums, counts, strict=True))
    return Perplexity(_exp(sum(sums) / sum(counts)), per_text, tuple(counts))


def perplexities(model: Model, texts: Sequence[str]) -> list[float]:
    """The perplexity of each text, see `perplexity`; none for no texts."""
    return list(perplexity(model, texts).per_text) if len(texts) else []


def _exp(value: float) -> float:
    return math.exp(value) if value < 709 else math.inf


def text_tokens(model: Model, texts: Sequence[str]) -> list[list[int]]:
    """The tokens of texts as `perplexity` reads them."""
    ids = [model.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] for text in texts]
    return from_start(model.tokenizer, ids, least=2)


@torch.no_grad()
def _negative_log_likelihoods(
    model: Model, sequences: list[list[int]], tokens_per_batch: int | None
) -> tuple[list[float], list[int]]:
    """Sums over each sequence's tokens after the first, in nats, and their numbers."""
    model.check_lengths(sequences)
    short = [number for number, sequence in enumerate(sequences, 1) if len(sequence) < 2]
    require(not short, f"text {short[:1]} has no token to predict: every text needs a word")
    sums = torch.zeros(len(sequences), dtype=torch.float64)

    def read(rows: list[int]) -> None:
        ids, mask = pad_left([sequences[row] for row in rows], model.device)
        known = None if bool(mask.all()) else mask
        hidden = model.body(inputs_embeds=model.embed(ids), attention_mask=known, use_cache=False).last_hidden_state
        predicted = (mask[:, 1:] * mask[:, :-1]).bool()  # (N, T - 1): a token with a token of its text before it
        losses = torch.zeros(predicted.shape, dtype=torch.float64, device=model.device)
        losses[predicted] = _token_losses(model, hidden[:, :-1][predicted], ids[:, 1:][predicted])
        sums[rows] = losses.sum(1).cpu()
        advance(len(rows))

    in_batches(read, batches_by_length(sequences, tokens_per_batch or model.tokens_at_once()))
    return sums.tolist(), [len(sequence) - 1 for sequence in sequences]


def _token_losses(model: Model, hidden: Tensor, ids: Tensor) -> Tensor:
    """-log p of each token: (rows, D), (rows,) -> (rows,), in blocks of rows so that the logits never stand whole."""
    wide = torch.promote_types(hidden.dtype, torch.float32)
    block = max(1, LOGITS_AT_ONCE // model.head_weight.shape[0])
    losses = [
        cross_entropy(linear(some, model.head_weight, model.head_bias).to(wide), wanted, reduction="none")
        for some, wanted in zip(hidden.split(block), ids.split(block), strict=True)
    ]
    return torch.cat(losses).double()
