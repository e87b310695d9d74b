"""Which texts to keep, whoever wrote them, with every measurement that decides it.

Knows the plan and no search. Letters: N texts.
"""

import math

import torch

from gradmm.evaluation import perplexities
from gradmm.plan import Plan
from gradmm.selection import FILTERS, RANKINGS, label_probabilities, select


def judge_texts(plan: Plan, texts: list[str], classes: list[int]) -> list[dict]:
    """Measure texts, whoever wrote them, and decide which to keep: the label filter, then the ranking within each class.

    Args:
        texts: N texts in the order of writing; an empty one is never kept.
        classes: the label number that each is meant to have.

    Returns:
        N rows of the columns of `SynthesisResult.dataset`.
    """
    spoken = [i for i, text in enumerate(texts) if text]
    some, labels = [texts[i] for i in spoken], [classes[i] for i in spoken]
    probabilities = torch.zeros(len(texts), len(plan.task.labels))
    misread: list[int | None] = [None] * len(texts)
    if spoken:
        probabilities[spoken] = label_probabilities(plan.model, plan.tokens, some).cpu()
        for i, found in zip(spoken, FILTERS[plan.config.filter](probabilities[spoken], labels), strict=True):
            misread[i] = found
    perplexity, weight = perplexities(plan.model, some), plan.config.perplexity_weight
    penalties = [weight * math.log(value) if weight else 0.0 for value in perplexity]
    criterion, rank = RANKINGS[plan.config.ranking]
    match, scores = rank(plan.matching, some, labels, [misread[i] for i in spoken], penalties, plan.per_class)
    match, scores, perplexity = (_spread(values, spoken, len(texts)) for values in (match, scores, perplexity))
    verdicts = select(texts, classes, scores, misread, probabilities, plan.per_class, plan.task.labels, criterion)
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


def _spread(values: list[float], places: list[int], count: int) -> list[float]:
    spread = [math.inf] * count
    for place, value in zip(places, values, strict=True):
        spread[place] = value
    return spread
