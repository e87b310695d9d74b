"""Which synthetic texts to keep: the readable, the label filter, ranking by matching loss, and a reason for each.

Works on public inputs only: the model, the texts and the released gradients. Letters: N texts, C classes.
"""

import math
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import numpy
import torch
from torch import Tensor

from gradmm.data import Example
from gradmm.errors import require
from gradmm.evaluation import perplexities
from gradmm.matching import Matching
from gradmm.models import Model
from gradmm.progress import stage
from gradmm.readability import ECHO, FRAGMENT, JUNK, LOOP, MARKUP, WORDLESS, flaw
from gradmm.tasks import TaskTokens

KEPT = "kept: rank {} of {} by {}"
EMPTY = "dropped: the text is empty"
DUPLICATE = "dropped: the same text stands earlier"
FLAW = "dropped: {}"
PERPLEXED = "dropped: its perplexity of {:.0f} is far above the {:.0f} of the middle text"
LABEL = "dropped: the model reads it as {}, {:.0%} sure"
RANK = "dropped: rank {} of {}, {} were asked for"
FILLED = "kept to fill: the model reads it as another label, but only {} of {} passed"

FEWEST, LEAST_SPREAD, TIMES = 8, 0.5, 4.5  # see `perplexity_range`
# Why texts are dropped, by the name under which a manifest counts them.
KINDS = {
    "empty": EMPTY,
    "duplicate": DUPLICATE,
    **{
        name: FLAW.format(reason)
        for name, reason in (
            ("loop", LOOP),
            ("fragment", FRAGMENT),
            ("markup", MARKUP),
            ("junk", JUNK),
            ("echo", ECHO),
            ("no word", WORDLESS),
        )
    },
    "perplexity": PERPLEXED,
    "label": LABEL,
    "rank": RANK,
}


@dataclass(frozen=True)
class Selection:
    """What became of one text.

    Attributes:
        rank: its place in the order in which texts of its class are taken, from 1; 0 of one that must not be kept.
    """

    kept: bool
    reason: str
    rank: int = 0


@dataclass(frozen=True)
class Selector:
    """By what texts are chosen, whoever wrote them.

    Attributes:
        tokens: the task in the model's tokens.
        matching: the released targets.
        per_class: C counts: how many texts of each class to keep.
        filter: a name in FILTERS.
        ranking: a name in RANKINGS.
        perplexity_weight: what a nat of log-perplexity, of a group the mean, adds to the matching loss.
    """

    model: Model
    tokens: TaskTokens
    matching: Matching
    per_class: Sequence[int]
    filter: str = "none"
    ranking: str = "group"
    perplexity_weight: float = 0.0

    def rows(self, texts: list[str], classes: list[int]) -> list[dict]:
        """Every text with all that decides about it.

        Args:
            texts: N texts in the order of writing; an empty one is never kept.
            classes: the label number that each is meant to have.

        Returns:
            N rows of the columns of `SynthesisResult.candidates` without the group, and of the `Selection`'s rank.
        """
        perplexity = self._perplexities(texts)
        verdicts, match = self.choose(texts, classes, perplexity)
        labels = self.tokens.task.labels
        return [
            {
                "text": text,
                "label": label,
                "label_name": labels[label],
                "match_loss": match[i],
                "perplexity": perplexity[i],
                **asdict(verdicts[i]),
            }
            for i, (text, label) in enumerate(zip(texts, classes, strict=True))
        ]

    def keep(self, examples: Sequence[Example], perplexity: list[float] | None = None) -> list[Example]:
        """Those of N examples whose texts are to be kept; perplexity as in `choose`."""
        texts, classes = [example.text for example in examples], [example.label for example in examples]
        verdicts, _ = self.choose(texts, classes, perplexity)
        return [example for example, verdict in zip(examples, verdicts, strict=True) if verdict.kept]

    def choose(
        self, texts: list[str], classes: list[int], perplexity: list[float] | None = None
    ) -> tuple[list[Selection], list[float]]:
        """Which texts to keep: the readable ones, of these what the filter passes, then the ranking within each class.

        Warns where fewer are kept than were asked for.

        Args:
            texts, classes: as `rows`.
            perplexity: of each text; None measures them.

        Returns:
            N verdicts, and the matching loss of each text by itself.
        """
        perplexity = self._perplexities(texts) if perplexity is None else perplexity
        barred = unreadable(texts, [self.tokens.task.instructions[label] for label in classes], perplexity)
        readable = [i for i, reason in enumerate(barred) if reason is None]
        probabilities, misread = self._read_labels(texts, classes, readable)
        spoken = [i for i, text in enumerate(texts) if text]
        weight = self.perplexity_weight
        penalties = [weight * math.log(perplexity[i]) if weight else 0.0 for i in spoken]
        usable = [barred[i] is None and misread[i] is None for i in spoken]
        criterion, rank = RANKINGS[self.ranking]
        criterion += " and perplexity" if weight else ""
        some, labels = [texts[i] for i in spoken], [classes[i] for i in spoken]
        with stage("reading the texts' gradients", len(some)):
            match, scores = rank(self.matching, some, labels, usable, penalties, self.per_class)
        match, scores = (_spread(values, spoken, len(texts)) for values in (match, scores))
        names = self.tokens.task.labels
        verdicts = select(barred, classes, scores, misread, probabilities, self.per_class, names, criterion)
        _warn_of_shortage(verdicts, sum(self.per_class))
        return verdicts, match

    def _read_labels(
        self, texts: list[str], classes: list[int], readable: list[int]
    ) -> tuple[Tensor, list[int | None]]:
        """The label probabilities (N, C), and what the filter makes of them; for one that keeps all nothing is read."""
        probabilities = torch.zeros(len(texts), len(self.tokens.labels))
        misread: list[int | None] = [None] * len(texts)
        passes = FILTERS[self.filter]
        if readable and passes is not keep_all:
            read = label_probabilities(self.model, self.tokens, [texts[i] for i in readable]).cpu()
            probabilities[readable] = read
            for i, found in zip(readable, passes(read, [classes[i] for i in readable]), strict=True):
                misread[i] = found
        return probabilities, misread

    def _perplexities(self, texts: list[str]) -> list[float]:
        spoken = [i for i, text in enumerate(texts) if text]
        with stage("reading perplexities", len(spoken)):
            return _spread(perplexities(self.model, [texts[i] for i in spoken]), spoken, len(texts))


def unreadable(texts: Sequence[str], instructions: Sequence[str], perplexities: Sequence[float]) -> list[str | None]:
    """Why each of N texts must not be kept, whatever its label and loss; None where it may.

    It is empty, equals an earlier one, has a `readability.flaw`, or is far more perplexing than the others.

    Args:
        texts: N texts.
        instructions: what each was written from and is no part of it.
        perplexities: of each.
    """
    middle, most = perplexity_range(perplexities)
    seen: set[str] = set()
    reasons: list[str | None] = []
    for text, asked, perplexity in zip(texts, instructions, perplexities, strict=True):
        found = None
        if not text.strip():
            found = EMPTY
        elif text in seen:
            found = DUPLICATE
        elif sentence := flaw(text, asked):
            found = FLAW.format(sentence)
        elif not perplexity <= most:
            found = PERPLEXED.format(perplexity, middle)
        reasons.append(found)
        seen.add(text)
    return reasons


def perplexity_range(perplexities: Sequence[float]) -> tuple[float, float]:
    """The median of a pool's perplexities, and the most that a text may have: all beyond is extreme.

    `TIMES` half the interquartile range above the median, in logarithms: neither moves, however bad the worst fourth of
    the texts, and both keep their meaning whatever the model's scale. The half range counts as `LEAST_SPREAD` at least,
    so that no text is dropped for a perplexity of less than exp(2.25) = 9.5 times the median, however alike the others
    are. Fewer than `FEWEST` finite values, of which two lie above the quartile, tell nothing of their spread: then only
    infinity is extreme.

    >>> middle, most = perplexity_range([90.0, 100.0, 110.0] * 5 + [3632.0])
    >>> middle, round(most)
    (100.0, 949)
    """
    finite = [value for value in perplexities if math.isfinite(value)]
    if len(finite) < FEWEST:
        return float(numpy.median(finite or [math.inf])), sys.float_info.max
    low, middle, high = numpy.quantile(numpy.log(finite), [0.25, 0.5, 0.75])
    return float(numpy.median(finite)), float(numpy.exp(middle + TIMES * max((high - low) / 2, LEAST_SPREAD)))


def count_dropped(reasons: Sequence[str]) -> dict[str, int]:
    """How many texts were dropped for each of `KINDS`, the most frequent first; from the reasons of verdicts."""
    kinds = [name for reason in reasons for name, words in KINDS.items() if reason.startswith(words.partition("{")[0])]
    return dict(Counter(kinds).most_common())


@torch.no_grad()
def label_probabilities(model: Model, tokens: TaskTokens, texts: Sequence[str]) -> Tensor:
    """The model's own probability of each label, softmax over the verbalizers: (N, C)."""
    hidden = model.hidden_of([tokens.sequence(text) for text in texts])
    return model.logits_of(hidden, tokens.labels).float().softmax(-1)


def calibrate(probabilities: Tensor, classes: Sequence[int]) -> Tensor:
    """Take out the model's preference for some verbalizer: (N, C) -> (N, C).

    The mean log-probability over the texts, each class weighing the same, is subtracted; the texts are balanced by
    construction, so nothing but their own average is used (after Zhao et al. 2021, with texts for content-free
    prompts).
    """
    logs = probabilities.clamp_min(1e-30).log()
    labels = torch.tensor(list(classes), device=logs.device)
    means = torch.stack([logs[labels == number].mean(0) for number in labels.unique().tolist()])
    return (logs - means.mean(0)).softmax(-1)


def keep_all(probabilities: Tensor, classes: Sequence[int]) -> list[int | None]:
    """No filter: every text passes."""
    return [None] * len(classes)


def label_filter(probabilities: Tensor, classes: Sequence[int]) -> list[int | None]:
    """The label that the model reads instead of the right one, for each text; None where it agrees."""
    read = probabilities.argmax(-1).tolist()
    return [None if found == label else found for found, label in zip(read, classes, strict=True)]


def calibrated_label_filter(probabilities: Tensor, classes: Sequence[int]) -> list[int | None]:
    """`label_filter` after `calibrate`."""
    return label_filter(calibrate(probabilities, classes), classes) if len(classes) else []


FILTERS: dict[str, Callable[[Tensor, Sequence[int]], list[int | None]]] = {
    "none": keep_all,
    "label": label_filter,
    "calibrated_label": calibrated_label_filter,
}


def rank_texts(
    matching: Matching, texts: Sequence[str], classes: Sequence[int], usable: Sequence[bool],
    penalties: Sequence[float], per_class: Sequence[int],
) -> tuple[list[float], list[float]]:  # fmt: skip
    """Every text by its own loss and penalty: (N losses, N scores, lower is better)."""
    losses = matching.of_texts(texts, classes).tolist()
    return losses, [loss + penalty for loss, penalty in zip(losses, penalties, strict=True)]


def rank_groups(
    matching: Matching, texts: Sequence[str], classes: Sequence[int], usable: Sequence[bool],
    penalties: Sequence[float], per_class: Sequence[int],
) -> tuple[list[float], list[float]]:  # fmt: skip
    """The usable texts of each class in `greedy_order`, behind them the others as `rank_texts` has them."""
    losses, scores = [0.0] * len(texts), [0.0] * len(texts)
    for number, wanted in enumerate(per_class):
        members = [i for i, label in enumerate(classes) if label == number]
        free = [place for place, i in enumerate(members) if usable[i]]
        some, extra = [texts[i] for i in members], [penalties[i] for i in members]
        own, order = matching.alone_and_together(some, number, wanted, free, extra)
        for place, i in enumerate(members):
            losses[i], scores[i] = own[place], len(texts) + own[place] + penalties[i]
        for rank, place in enumerate(order):
            scores[members[place]] = float(rank)
    return losses, scores


RANKINGS = {
    "text": ("matching loss", rank_texts),
    "group": ("the group's matching loss", rank_groups),
}


def select(
    barred: Sequence[str | None],
    classes: Sequence[int],
    scores: Sequence[float],
    misread: Sequence[int | None],
    probabilities: Tensor,
    per_class: Sequence[int],
    labels: Sequence[str],
    criterion: str = "matching loss",
) -> list[Selection]:
    """Keep the `per_class` texts of each class with the lowest score among those that passed the filter.

    Where fewer pass than were asked for, the best of the misread ones fill up, and say so; texts that are barred never
    do.

    Args:
        barred: for each of N texts why it must not be kept, or None, from `unreadable`.
        classes: N class numbers.
        scores: N values, lower is better.
        misread: N labels read instead of the right one, or None, from one of FILTERS.
        probabilities: (N, C), for the reasons' wording.
        per_class: how many to keep of each class.
        labels: C names.
        criterion: what the scores are, for the reasons' wording.

    Returns:
        N verdicts, in order.

    Raises:
        UserError: not as many reasons and scores as classes.

    >>> import torch
    >>> even = torch.full((3, 2), 0.5)
    >>> barred, classes, scores = [None, None, EMPTY], [0, 0, 0], [0.2, 0.1, 0.0]
    >>> found = select(barred, classes, scores, [None] * 3, even, per_class=[1, 0], labels=["bad", "good"])
    >>> [verdict.kept for verdict in found]  # the lowest score; the third is empty
    [False, True, False]
    """
    require(
        len(barred) == len(classes) == len(scores),
        f"{len(barred)} reasons, {len(classes)} classes, {len(scores)} scores: give one of each a text",
    )
    verdicts = {i: Selection(False, reason) for i, reason in enumerate(barred) if reason is not None}
    for number, wanted in enumerate(per_class):
        members = [i for i, label in enumerate(classes) if label == number and i not in verdicts]
        passed = sorted((i for i in members if misread[i] is None), key=lambda i: (scores[i], i))
        failed = {i: wrong for i in members if (wrong := misread[i]) is not None}
        for rank, i in enumerate(passed, 1):
            kept = rank <= wanted
            reason = (KEPT if kept else RANK).format(rank, len(passed), criterion if kept else wanted)
            verdicts[i] = Selection(kept, reason, rank)
        for rank, i in enumerate(sorted(failed, key=lambda i: (scores[i], i)), len(passed) + 1):
            reading = LABEL.format(labels[failed[i]], float(probabilities[i, failed[i]]))
            kept = rank <= wanted
            verdicts[i] = Selection(kept, FILLED.format(len(passed), wanted) if kept else reading, rank)
    return [verdicts[i] for i in range(len(classes))]


def _warn_of_shortage(verdicts: Sequence[Selection], wanted: int) -> None:
    kept = sum(verdict.kept for verdict in verdicts)
    if kept < wanted:
        counts = ", ".join(
            f"{name} {count}" for name, count in count_dropped([verdict.reason for verdict in verdicts]).items()
        )
        warnings.warn(
            f"{kept} of {wanted} texts are kept: of the {len(verdicts)} written too many were dropped ({counts}); "
            "raise oversample, or take other generation prompts or another model",
            stacklevel=2,
        )


def _spread(values: list[float], places: list[int], count: int) -> list[float]:
    spread = [math.inf] * count
    for place, value in zip(places, values, strict=True):
        spread[place] = value
    return spread
