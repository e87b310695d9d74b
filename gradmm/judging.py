"""Which texts to keep, whoever wrote them, with every measurement that decides it.

Knows the plan and no search. Letters: N texts.
"""

import math
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from gradmm.evaluation import perplexities
from gradmm.examples import Example
from gradmm.plan import Plan
from gradmm.selection import (
    FILTERS,
    RANKINGS,
    Verdict,
    count_dropped,
    keep_all,
    label_probabilities,
    select,
    unreadable,
)


def judge_texts(plan: Plan, texts: list[str], classes: list[int]) -> list[dict]:
    """Measure texts, whoever wrote them, and decide which to keep.

    Args:
        texts: N texts in the order of writing; an empty one is never kept.
        classes: the label number that each is meant to have.

    Returns:
        N rows of the columns of `SynthesisResult.dataset`.
    """
    perplexity = _perplexities(plan, texts)
    verdicts, match = choose_texts(plan, texts, classes, perplexity)
    return [
        {
            "text": text,
            "label": label,
            "label_name": plan.task.labels[label],
            "match": match[i],
            "perplexity": perplexity[i],
            "group": i // plan.config.group_size,
            "kept": verdicts[i].kept,
            "reason": verdicts[i].reason,
        }
        for i, (text, label) in enumerate(zip(texts, classes, strict=True))
    ]


def keep_examples(plan: Plan, examples: Sequence[Example]) -> list[Example]:
    """Those of N examples whose texts are to be kept, by `choose_texts`."""
    verdicts, _ = choose_texts(plan, [example.text for example in examples], [example.label for example in examples])
    return [example for example, verdict in zip(examples, verdicts, strict=True) if verdict.kept]


def choose_texts(
    plan: Plan, texts: list[str], classes: list[int], perplexity: list[float] | None = None
) -> tuple[list[Verdict], list[float]]:
    """Decide which texts to keep: the readable ones, of these what the label filter passes, then the ranking within each class.

    Warns where fewer are kept than were asked for.

    Args:
        texts, classes: as `judge_texts`.
        perplexity: of each text; None measures them.

    Returns:
        N verdicts, and the matching loss of each text by itself.
    """
    perplexity = _perplexities(plan, texts) if perplexity is None else perplexity
    barred = unreadable(texts, [plan.task.instructions[label] for label in classes], perplexity)
    spoken = [i for i, text in enumerate(texts) if text]
    some, labels = [texts[i] for i in spoken], [classes[i] for i in spoken]
    probabilities, misread = _read_labels(plan, texts, classes, [i for i, reason in enumerate(barred) if reason is None])
    weight = plan.config.perplexity_weight
    penalties = [weight * math.log(perplexity[i]) if weight else 0.0 for i in spoken]
    usable = [barred[i] is None and misread[i] is None for i in spoken]
    criterion, rank = RANKINGS[plan.config.ranking]
    match, scores = rank(plan.matching, some, labels, usable, penalties, plan.per_class)
    match, scores = (_spread(values, spoken, len(texts)) for values in (match, scores))
    verdicts = select(barred, classes, scores, misread, probabilities, plan.per_class, plan.task.labels, criterion)
    _warn_of_shortage(verdicts, sum(plan.per_class))
    return verdicts, match


def _warn_of_shortage(verdicts: Sequence[Verdict], wanted: int) -> None:
    kept = sum(verdict.kept for verdict in verdicts)
    if kept < wanted:
        counts = ", ".join(f"{name} {count}" for name, count in count_dropped([verdict.reason for verdict in verdicts]).items())
        warnings.warn(
            f"{kept} of {wanted} texts are kept: of the {len(verdicts)} written too many were dropped ({counts}); raise oversample, "
            "or take other generation prompts or another model",
            stacklevel=2,
        )


def _read_labels(plan: Plan, texts: list[str], classes: list[int], readable: list[int]) -> tuple[Tensor, list[int | None]]:
    """The model's label probabilities (N, C), and what the filter makes of them; nothing is read for a filter that keeps all."""
    probabilities = torch.zeros(len(texts), len(plan.task.labels))
    misread: list[int | None] = [None] * len(texts)
    passes = FILTERS[plan.config.filter]
    if readable and passes is not keep_all:
        probabilities[readable] = label_probabilities(plan.model, plan.tokens, [texts[i] for i in readable]).cpu()
        for i, found in zip(readable, passes(probabilities[readable], [classes[i] for i in readable]), strict=True):
            misread[i] = found
    return probabilities, misread


def _perplexities(plan: Plan, texts: list[str]) -> list[float]:
    spoken = [i for i, text in enumerate(texts) if text]
    return _spread(perplexities(plan.model, [texts[i] for i in spoken]), spoken, len(texts))


def _spread(values: list[float], places: list[int], count: int) -> list[float]:
    spread = [math.inf] * count
    for place, value in zip(places, values, strict=True):
        spread[place] = value
    return spread
