"""What a training set is like beside what it teaches: its fluency, its variety, and how its gradient matches the real one.

Letters: N examples, C classes.
"""

import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch

from gradmm.classification import Encoded
from gradmm.evaluation import distinct_n, duplicate_share, longest_shared_spans, perplexity, self_bleu, words
from gradmm.examples import Example
from gradmm.gradients import FactorTarget, Target
from gradmm.matching import Matching
from gradmm.models import Model
from gradmm.seeds import generator
from gradmm.tasks import tokenize_task
from gradmm.training import train_at_rate, trainable_copy
from gradmm.trial import Trial

METRIC_TEXTS = 500  # texts of a set that are measured at most, a seeded sample; training reads them all
MEASURES = ("perplexity", "second_perplexity", "match", "distinct_2", "self_bleu", "duplicates", "longest_shared_span", "tokens")


def measure(trial: Trial, examples: Sequence[Example]) -> dict:
    """What a set is like, see MEASURES; None for each where there are no examples."""
    if not examples:
        return dict.fromkeys(MEASURES)
    bench, texts = trial.bench, [example.text for example in examples]
    read = perplexity(bench.model, texts)
    matching = Matching(bench.model, tokenize_task(bench.task, bench.model.tokenizer), trial.release.targets, trial.release.space)
    sequences, real = ([words(text) for text in some] for some in (texts, [example.text for example in trial.real]))
    return {
        "perplexity": read.corpus,
        "second_perplexity": None if bench.second is None else perplexity(bench.second, texts).corpus,
        "match": _match(matching, examples),
        "distinct_2": distinct_n(texts, 2),
        "self_bleu": self_bleu(texts, trial.seed, limit=bench.config.n_real) if len(texts) > 1 else None,
        "duplicates": duplicate_share(texts),
        "longest_shared_span": max(longest_shared_spans(sequences, real)),
        "tokens": statistics.fmean(read.tokens),
    }


def thinned(examples: Sequence[Example], seed: int, limit: int | None = METRIC_TEXTS) -> list[Example]:
    """At most `limit` of the examples, drawn with the seed, in the order in which they stand; None takes all."""
    order = torch.randperm(len(examples), generator=generator(seed, "measured examples"))[:limit].tolist()
    return [examples[row] for row in sorted(order)]


def _matching(trial: Trial, model: Model, targets: Sequence[Target]) -> Matching:
    """At another model than the Release's, in its space."""
    return Matching(model, tokenize_task(trial.bench.task, model.tokenizer), targets, trial.release.space)


def _match(matching: Matching, examples: Sequence[Example]) -> float:
    """1 - cosine of the set's gradient with the real examples', mean over classes."""
    return statistics.fmean(matching.of_sets([e.text for e in examples], [e.label for e in examples]))


def measure_on(learner: Model, trial: Trial, examples: Sequence[Example]) -> dict:
    """What of MEASURES depends on the model that reads: another's perplexity, tokens, and `match` between its own gradients."""
    if not examples:
        return dict.fromkeys(("perplexity", "match", "tokens"))
    read = perplexity(learner, [example.text for example in examples])
    targets = [_target(trial, learner, label) for label in range(len(trial.bench.task.labels))]
    return {
        "perplexity": read.corpus,
        "match": _match(_matching(trial, learner, targets), examples),
        "tokens": statistics.fmean(read.tokens),
    }


def similarities(trial: Trial, sets: dict[str, list[Example]]) -> dict[str, dict[str, float]]:
    """How alike the gradients of each set and of the real examples are while a model trains on the real ones.

    Cosine of the gradients in the Release's space, mean over classes, at the weights after each of `similarity_steps`:
    matching asks for it at step 0 alone. One training serves all sets.

    Returns:
        For each set {step: cosine}; an empty set has none, and without steps nothing is trained.
    """
    found: dict[str, dict[str, float]] = {name: {} for name in sets}
    for step, model in _training(trial) if any(sets.values()) and trial.bench.config.similarity_steps else ():
        targets = [_target(trial, model, label) for label in range(len(trial.bench.task.labels))]
        for name, examples in sets.items():
            if examples:
                found[name][str(step)] = 1 - _match(_matching(trial, model, targets), examples)
    return found


@torch.no_grad()
def _target(trial: Trial, model: Model, label: int) -> FactorTarget:
    texts = [example.text for example in trial.real if example.label == label]
    return FactorTarget(_matching(trial, model, ()).factors(texts, [label] * len(texts)))


def _training(trial: Trial) -> Iterator[tuple[int, Model]]:
    """(step, the model as it is then) of the fine-tuning on the real examples."""
    bench, steps = trial.bench, trial.bench.config.similarity_steps
    config = replace(bench.config.finetuning, seed=trial.seed, patience=None, eval_every=math.gcd(*steps) or 1)
    tokens, model = tokenize_task(bench.task, bench.model.tokenizer), trainable_copy(bench.model, config)
    data = Encoded.of(bench.model, bench.task, tokens, trial.real, "real")
    for row in train_at_rate(model, tokens, data, data, config.learning_rates[-1], config):
        if row["step"] in steps:
            yield row["step"], model
        if row["step"] >= max(steps):
            return
