"""What a set of texts is like, how near its gradients are to the target's, and how sure a difference of accuracies is.

Words are `readability.words`. Letters: N texts, S seeds, M test examples.
"""

import math
import statistics
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy
import torch
from numpy.typing import ArrayLike
from scipy.stats import norm
from scipy.stats import t as student

from gradmm.classification import Encoded
from gradmm.data import Example, content_hash
from gradmm.errors import require, require_whole
from gradmm.evaluation import perplexity
from gradmm.experiments.seed_run import SeedRun
from gradmm.gradients import FactorTarget, Space, Target
from gradmm.matching import Matching
from gradmm.models import Model
from gradmm.readability import ends_sentence, flaw, words
from gradmm.seeds import generator, stream
from gradmm.spaces import BodySketch, release_space, to_match
from gradmm.tasks import tokenize_task
from gradmm.training import adamw, train_at_rate, trainable_copy

Items = Sequence[Hashable]
METRIC_TEXTS = 500  # texts of a set that are measured at most, a seeded sample; training reads them all
DRAWN_AT_ONCE = 1 << 20  # numbers of a bootstrap, which bounds its memory
MEASURES: tuple[str, ...] = ("perplexity", "second_perplexity", "match_loss", "distinct_2", "duplicates")
MEASURES += ("flawed", "unfinished", "longest_shared_span", "tokens")


# ---------------------------------------------------------------- of one seed's run


def measure(seed_run: SeedRun, examples: Sequence[Example]) -> dict:
    """What a set is like, see MEASURES; None for each where there are no examples."""
    if not examples:
        return dict.fromkeys(MEASURES)
    experiment, texts = seed_run.experiment, [example.text for example in examples]
    read, second = perplexity(experiment.model, texts), experiment.config.second
    matching = _matching(seed_run, experiment.model, to_match(seed_run.release.space, seed_run.release.targets)[0])
    sequences, real = ([words(example.text) for example in some] for some in (examples, seed_run.real))
    return {
        "perplexity": read.corpus,
        "second_perplexity": None if second is None else perplexity(second, texts).corpus,
        "match_loss": _match(matching, examples),
        "distinct_2": distinct_n(texts, 2),
        "duplicates": duplicate_share(texts),
        "flawed": statistics.fmean(flaw(text) is not None for text in texts),
        "unfinished": statistics.fmean(not ends_sentence(text.rstrip(), "") for text in texts),
        "longest_shared_span": max(longest_shared_spans(sequences, real)),
        "tokens": statistics.fmean(read.tokens),
    }


def subsample(examples: Sequence[Example], seed: int, limit: int | None = METRIC_TEXTS) -> list[Example]:
    """At most `limit` of the examples, drawn with the seed, in the order in which they stand; None takes all.

    No class is left out, however rare, if `limit` allows one of each.
    """
    order = torch.randperm(len(examples), generator=generator(seed, "measured examples")).tolist()
    first = {examples[row].label: row for row in reversed(order)}  # of each class the one that is drawn first
    return [examples[row] for row in sorted(list(dict.fromkeys([*first.values(), *order]))[:limit])]


def _matching(
    seed_run: SeedRun, model: Model, targets: Sequence[Target] = (), space: Space | BodySketch | None = None
) -> Matching:
    """At another model than the Release's, where texts are compared in the Release's space or its own."""
    tokens = tokenize_task(seed_run.experiment.task, model.tokenizer)
    return Matching(model, tokens, targets, to_match(seed_run.release.space if space is None else space, ())[1])


def _match(matching: Matching, examples: Sequence[Example]) -> float:
    """1 - cosine of the set's gradient with the real examples', mean over classes."""
    return statistics.fmean(matching.of_sets([e.text for e in examples], [e.label for e in examples]))


def measure_on(learner: Model, seed_run: SeedRun, examples: Sequence[Example]) -> dict:
    """What of MEASURES depends on the model that reads: perplexity, tokens, and `match_loss` of its own gradients.

    They are taken in the learner's own space of the Release's name: with its label tokens, and its own preference over
    the texts that the writer's is taken over, since a learner need not be able to write.
    """
    if not examples:
        return dict.fromkeys(("perplexity", "match_loss", "tokens"))
    read = perplexity(learner, [example.text for example in examples])
    held = seed_run.matchings
    if learner.name not in held:
        tokens, name = tokenize_task(seed_run.experiment.task, learner.tokenizer), seed_run.release.space_name
        space = release_space(learner, tokens, name, seed_run.own_texts if name == "body" else None)
        held[learner.name] = _matching(seed_run, learner, _targets(seed_run, learner, space), space)
    loss = _match(held[learner.name], examples)
    return {"perplexity": read.corpus, "match_loss": loss, "tokens": statistics.fmean(read.tokens)}


def similarities(seed_run: SeedRun, sets: dict[str, list[Example]]) -> dict[str, dict[str, float]]:
    """How alike the gradients of each set and of the real examples are while a model trains on the real ones.

    Cosine in the Release's space, mean over classes, at the weights after each of `similarity_steps`: matching asks for
    it at step 0 alone. One training serves all sets.

    Returns:
        For each set {step: cosine}; an empty set has none, and without steps nothing is trained.
    """
    found: dict[str, dict[str, float]] = {name: {} for name in sets}
    asked = any(sets.values()) and seed_run.experiment.config.similarity_steps
    for step, model in _training(seed_run) if asked else ():
        matching = _matching(seed_run, model, _targets(seed_run, model))
        for name, examples in sets.items():
            if examples:
                found[name][str(step)] = 1 - _match(matching, examples)
    return found


@torch.no_grad()
def _targets(seed_run: SeedRun, model: Model, space: Space | BodySketch | None = None) -> list[Target]:
    """The real examples' gradients at another model, class by class."""
    matching = _matching(seed_run, model, space=space)
    targets: list[Target] = []
    for label in range(len(seed_run.experiment.task.labels)):
        texts = [example.text for example in seed_run.real if example.label == label]
        targets.append(FactorTarget(matching.factors(texts, [label] * len(texts))))
    return targets


def _training(seed_run: SeedRun) -> Iterator[tuple[int, Model]]:
    """(step, the model as it is then) of the fine-tuning on the real examples."""
    experiment, steps = seed_run.experiment, seed_run.experiment.config.similarity_steps
    config = replace(experiment.config.finetuning, seed=seed_run.seed, patience=None, eval_every=math.gcd(*steps) or 1)
    tokens, model = tokenize_task(experiment.task, experiment.model.tokenizer), trainable_copy(experiment.model, config)
    data = Encoded.of(experiment.model, experiment.task, tokens, seed_run.real, "real")
    optimizer = adamw(model, config.learning_rates[-1], config)
    for row in train_at_rate(model, tokens, data, data, optimizer, config):
        if row["step"] in steps:
            yield row["step"], model
        if row["step"] >= max(steps):
            return


# ---------------------------------------------------------------- variety and copying


def ngrams(items: Items, n: int) -> list[tuple]:
    """The runs of n elements of a text's words, or of a tokenizer's ids."""
    return list(zip(*(items[start:] for start in range(n)), strict=False))


def distinct_n(texts: Sequence[str], n: int) -> float:
    """The share of the texts' word n-grams that are distinct (Li et al. 2016); 0 where no text has n words."""
    grams = [gram for text in texts for gram in ngrams(words(text), require_whole(n, "n", 1))]
    return len(set(grams)) / len(grams) if grams else 0.0


def duplicate_share(texts: Sequence[str]) -> float:
    """The share of texts whose words, case aside, stand earlier in the list."""
    return 1 - len({content_hash(text) for text in texts}) / len(texts) if len(texts) else 0.0


def longest_shared_spans(sequences: Sequence[Items], references: Sequence[Items]) -> list[int]:
    """The length of the longest run of each sequence that stands in any one reference: N whole numbers.

    Elements are whatever is compared: `words(text)`, or a tokenizer's ids. Exact: one length after the other, until no
    run of it is shared.
    """
    longest = [0] * len(sequences)
    for length in range(1, max(map(len, references), default=0) + 1):
        known = {run for one in references for run in ngrams(one, length)}
        for row, one in enumerate(sequences):
            if not known.isdisjoint(ngrams(one, length)):
                longest[row] = length
        if max(longest, default=0) < length:
            break
    return longest


# ---------------------------------------------------------------- runs and differences


@dataclass(frozen=True)
class Summary:
    """Figures of several runs: `mean`, sample standard deviation `std` (None of one run), the `runs` themselves."""

    mean: float
    std: float | None
    runs: tuple[float, ...]

    def __format__(self, spec: str) -> str:
        """The mean and, of several runs, the standard deviation, each as `spec` says but for the second's sign.

        >>> f"{summarise_runs([1.0, 2.0]):+.2f} and {summarise_runs([1.0]):+.2f}"
        '+1.50 ± 0.71 and +1.00'
        """
        return format(self.mean, spec) + ("" if self.std is None else f" ± {format(self.std, spec.lstrip('+'))}")


def summarise_runs(values: Sequence[float]) -> Summary:
    """Mean and spread of one figure over runs that differ in their seed.

    Raises:
        UserError: no runs.
    """
    require(len(values) > 0, "there are 0 runs to summarise, at least 1 is needed: run one")
    spread = statistics.stdev(values) if len(values) > 1 else None
    return Summary(statistics.fmean(values), spread, tuple(map(float, values)))


@dataclass(frozen=True)
class Difference:
    """An accuracy difference and the interval `low` to `high` that covers it with the confidence asked for."""

    mean: float
    low: float
    high: float
    confidence: float


def paired_bootstrap(
    first: ArrayLike, second: ArrayLike, seed: int = 0, confidence: float = 0.95, resamples: int = 10_000
) -> Difference:
    """The accuracy of `first` minus that of `second`, with a percentile bootstrap interval over examples and seeds.

    Test examples are drawn with replacement, the same for both methods and all seeds; so are seeds, in pairs: run s of
    one method goes with run s of the other (same seed, same real examples). What varies with both at once counts in
    each, so the interval is rather too wide than too narrow. Means of S values drawn from S spread too
    little, and few seeds say little of their spread: the seeds' part of each draw is stretched by sqrt(S / (S - 1)) and
    by Student's quantile over the normal one, so that for seeds alone the interval is about Student's. One seed says
    nothing of the spread over seeds, and its interval is that of the examples.

    Args:
        first, second: (S, M) whether run s is right on test example m.

    Raises:
        UserError: shapes that differ or are empty, or a confidence outside (0, 1).
    """
    a, b = numpy.asarray(first, dtype=float), numpy.asarray(second, dtype=float)
    require(
        a.shape == b.shape and a.ndim == 2 and a.size > 0,
        f"the two methods have results of shapes {a.shape} and {b.shape}: give both the same seeds and test "
        "examples, (S, M)",
    )
    require(0 < confidence < 1, f"confidence = {confidence!r}, it must be between 0 and 1: 0.95 is usual")
    gap = a - b  # (S, M)
    ends = [(1 - confidence) / 2, (1 + confidence) / 2]
    low, high = numpy.quantile(_resampled(gap, seed, resamples, _stretch(len(gap), ends[1])), ends)
    return Difference(float(gap.mean()), float(low), float(high), confidence)


def _stretch(seeds: int, end: float) -> float:
    """By how much the mean of S seeds drawn from S, at a quantile of the normal, falls short of Student's interval."""
    return student.ppf(end, seeds - 1) / norm.ppf(end) * math.sqrt(seeds / (seeds - 1)) if seeds > 1 else 1.0


def _resampled(gap: numpy.ndarray, seed: int, resamples: int, stretch: float) -> numpy.ndarray:
    """Means of (S, M) over runs and examples drawn with replacement, the runs' part stretched: (resamples,)."""
    draw = numpy.random.default_rng(stream(seed, "paired bootstrap"))
    moved = gap + (stretch - 1) * (gap.mean(1, keepdims=True) - gap.mean())
    (runs, examples), found = gap.shape, []
    for some in range(0, resamples, block := max(1, DRAWN_AT_ONCE // examples)):
        size = min(block, resamples - some)
        counts = (draw.integers(runs, size=(size, runs, 1)) == numpy.arange(runs)).mean(1)  # (size, S)
        found.append(numpy.take_along_axis(counts @ moved, draw.integers(examples, size=(size, examples)), 1).mean(1))
    return numpy.concatenate(found)
