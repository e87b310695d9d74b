"""What a set of texts is like, and how sure a difference of accuracies is.

Knows no training. Words are runs between spaces, lower-cased. Letters: N texts, T positions, D width, V vocabulary,
S seeds, M test examples.
"""

import math
import statistics
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy
import torch
from sacrebleu.metrics import BLEU
from torch import Tensor
from torch.nn.functional import cross_entropy, linear

from gradmm.errors import require, require_whole
from gradmm.examples import content_hash
from gradmm.models import TOKENS_PER_BATCH, Model, batches_by_length, pad_left
from gradmm.seeds import generator, stream
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


def perplexity(model: Model, texts: Sequence[str], tokens_per_batch: int = TOKENS_PER_BATCH) -> Perplexity:
    """The perplexity of texts, each read alone as the tokenizer begins a text (`tasks.from_start`).

    What stands before the text is given and does not count. A tokenizer that puts nothing there gives the first token away,
    unless it is the only one. A text too unlikely for a float64 exponential has infinity.

    Raises:
        UserError: no texts, a text without a token to predict, or one longer than the model's context.
    """
    require(len(texts) > 0, "there are 0 texts, perplexity needs at least 1: give some")
    sums, counts = _negative_log_likelihoods(model, _from_start(model, texts), tokens_per_batch)
    per_text = tuple(_exp(total / count) for total, count in zip(sums, counts, strict=True))
    return Perplexity(_exp(sum(sums) / sum(counts)), per_text, tuple(counts))


def perplexities(model: Model, texts: Sequence[str]) -> list[float]:
    """The perplexity of each text, see `perplexity`; none for no texts."""
    return list(perplexity(model, texts).per_text) if len(texts) else []


def _exp(value: float) -> float:
    return math.exp(value) if value < 709 else math.inf


def _from_start(model: Model, texts: Sequence[str]) -> list[list[int]]:
    ids = [model.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] for text in texts]
    return from_start(model.tokenizer, ids, least=2)


@torch.no_grad()
def _negative_log_likelihoods(model: Model, sequences: list[list[int]], tokens_per_batch: int) -> tuple[list[float], list[int]]:
    """Sums over each sequence's tokens after the first, in nats, and their numbers."""
    model.check_lengths(sequences)
    short = [number for number, sequence in enumerate(sequences, 1) if len(sequence) < 2]
    require(not short, f"text {short[:1]} has no token to predict: every text needs a word")
    sums = torch.zeros(len(sequences), dtype=torch.float64)
    for rows in batches_by_length(sequences, tokens_per_batch):
        ids, mask = pad_left([sequences[row] for row in rows], model.device)
        known = None if bool(mask.all()) else mask
        hidden = model.body(input_ids=ids, attention_mask=known, use_cache=False).last_hidden_state
        predicted = (mask[:, 1:] * mask[:, :-1]).bool()  # (N, T - 1): a token with a token of its text before it
        losses = torch.zeros(predicted.shape, dtype=torch.float64, device=model.device)
        losses[predicted] = _token_losses(model, hidden[:, :-1][predicted], ids[:, 1:][predicted])
        sums[rows] = losses.sum(1).cpu()
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


# ---------------------------------------------------------------- variety and copying


def words(text: str) -> list[str]:
    """The text's words, lower-cased."""
    return text.lower().split()


def distinct_n(texts: Sequence[str], n: int) -> float:
    """The share of the texts' word n-grams that are distinct (Li et al. 2016); 0 where no text has n words.

    Raises:
        UserError: n is no whole number of at least 1.
    """
    n = require_whole(n, "n", 1)
    grams = [gram for text in texts for gram in zip(*(words(text)[i:] for i in range(n)), strict=False)]
    return len(set(grams)) / len(grams) if grams else 0.0


def self_bleu(texts: Sequence[str], seed: int = 0, limit: int = 200) -> float:
    """How alike texts are: the mean BLEU-4 of a text against all others as references (Zhu et al. 2018), 0 to 100.

    Sentence BLEU of sacrebleu with its own tokenizer and effective order. More than `limit` texts are first thinned to a
    seeded sample of that size, because the work grows with its square and the value with its size: compare equal sizes.

    Raises:
        UserError: fewer than two texts.
    """
    require(len(texts) >= 2, f"self-BLEU of {len(texts)} text(s): at least 2 are needed, so give more")
    drawn = torch.randperm(len(texts), generator=generator(seed, "self-BLEU"))[:limit].tolist()
    some = [texts[row].lower() for row in sorted(drawn)]
    bleu = BLEU(effective_order=True)
    scores = [bleu.sentence_score(text, some[:place] + some[place + 1 :]).score for place, text in enumerate(some)]
    return statistics.fmean(scores)


def duplicate_share(texts: Sequence[str]) -> float:
    """The share of texts whose words, case aside, stand earlier in the list."""
    return 1 - len({content_hash(text) for text in texts}) / len(texts) if len(texts) else 0.0


def longest_shared_spans(
    sequences: Sequence[Sequence[Hashable]], references: Sequence[Sequence[Hashable]]
) -> list[int]:
    """The length of the longest run of each sequence that stands in any one reference: N whole numbers.

    Elements are whatever is compared: `words(text)`, or a tokenizer's ids. Exact: a run of length k + 1 can only start
    where a run of length k does, so only those places are looked at again.
    """
    longest = [0] * len(sequences)
    ours = [(row, start) for row, sequence in enumerate(sequences) for start in range(len(sequence))]
    theirs = [(row, start) for row, sequence in enumerate(references) for start in range(len(sequence))]
    length = 0
    while ours:
        length += 1
        ours = _common(sequences, ours, references, theirs, length)
        theirs = _common(references, theirs, sequences, ours, length)
        for row, _ in ours:
            longest[row] = length
    return longest


def _common(sequences, places, others, other_places, length: int) -> list[tuple[int, int]]:
    """Those places where a run of `length` elements starts that also starts at one of the other places."""
    runs = {tuple(others[row][start : start + length]) for row, start in other_places if start + length <= len(others[row])}
    return [(row, start) for row, start in places if tuple(sequences[row][start : start + length]) in runs]


# ---------------------------------------------------------------- runs and differences


@dataclass(frozen=True)
class Summary:
    """Figures of several runs: `mean`, sample standard deviation `std` (None of one run), the `runs` themselves."""

    mean: float
    std: float | None
    runs: tuple[float, ...]


def summarise_runs(values: Sequence[float]) -> Summary:
    """Mean and spread of one figure over runs that differ in their seed.

    Raises:
        UserError: no runs.
    """
    require(len(values) > 0, "there are 0 runs to summarise, at least 1 is needed: run one")
    return Summary(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None, tuple(map(float, values)))


@dataclass(frozen=True)
class Difference:
    """An accuracy difference and the interval `low` to `high` that covers it with the confidence asked for."""

    mean: float
    low: float
    high: float
    confidence: float


def paired_bootstrap(
    first: Sequence[Sequence[bool]],
    second: Sequence[Sequence[bool]],
    seed: int = 0,
    confidence: float = 0.95,
    resamples: int = 10_000,
) -> Difference:
    """The accuracy of `first` minus that of `second`, with a percentile bootstrap interval over examples and seeds.

    Test examples are drawn with replacement, the same for both methods and all seeds; so are seeds, in pairs: run s of
    one method goes with run s of the other (same seed, same real examples). With few seeds the interval is somewhat
    narrow, as the spread of S values drawn from S falls short by a factor of (S - 1) / S.

    Args:
        first, second: (S, M) whether run s is right on test example m.

    Raises:
        UserError: shapes that differ or are empty, or a confidence outside (0, 1).
    """
    a, b = numpy.asarray(first, dtype=float), numpy.asarray(second, dtype=float)
    require(
        a.shape == b.shape and a.ndim == 2 and a.size > 0,
        f"the two methods have results of shapes {a.shape} and {b.shape}: give both the same seeds and test examples, (S, M)",
    )
    require(0 < confidence < 1, f"confidence = {confidence!r}, it must be between 0 and 1: 0.95 is usual")
    gap = a - b  # (S, M)
    low, high = _between(_resampled(gap, seed, resamples) / gap.size, confidence)
    return Difference(float(gap.mean()), low, high, confidence)


@dataclass(frozen=True)
class Share:
    """One gain as a share of another and the interval `low` to `high` that covers it with the confidence asked for."""

    share: float
    low: float
    high: float
    confidence: float


def paired_share(
    part: Sequence[Sequence[float]],
    whole: Sequence[Sequence[float]],
    seed: int = 0,
    confidence: float = 0.95,
    resamples: int = 10_000,
) -> Share | None:
    """The mean of `part` over that of `whole`, with a percentile bootstrap interval as in `paired_bootstrap`.

    Args:
        part, whole: (S, M) what run s gains on test example m, the same runs and examples in both: 1 where it is right and
            a base is wrong, -1 the other way, 0 where they agree.

    Returns:
        Share; None where the interval of `whole` itself does not lie above 0, as a share of nothing is no number.

    Raises:
        UserError: as `paired_bootstrap`.
    """
    gain = paired_bootstrap(whole, numpy.zeros_like(numpy.asarray(part, dtype=float)), seed, confidence, resamples)
    if gain.low <= 0:
        return None
    over, under = (numpy.asarray(gains, dtype=float) for gains in (part, whole))
    below = _resampled(under, seed, resamples)
    shares = _resampled(over, seed, resamples)[below > 0] / below[below > 0]
    return Share(float(over.mean() / under.mean()), *_between(shares, confidence), confidence)


def _resampled(gap: numpy.ndarray, seed: int, resamples: int) -> numpy.ndarray:
    """Sums of (S, M) over runs and examples drawn with replacement: (resamples,), the same draws for each seed and shape."""
    draw = numpy.random.default_rng(stream(seed, "paired bootstrap"))
    runs, examples = gap.shape
    values = [
        draw.multinomial(runs, [1 / runs] * runs) @ gap @ draw.multinomial(examples, [1 / examples] * examples)
        for _ in range(resamples)
    ]
    return numpy.array(values)


def _between(values: numpy.ndarray, confidence: float) -> tuple[float, float]:
    low, high = numpy.quantile(values, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)
