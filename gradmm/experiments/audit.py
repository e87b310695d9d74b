r"""What a release gives away and what it keeps: a lower bound on epsilon, membership inference, and signal to noise.

Plays the adversary: knows canaries or candidate examples and asks what the published thing says of them. An attack that
fails proves nothing; one that succeeds beyond the claim disproves it. Letters: m canaries, n members or examples, o
others, C classes, D hidden width, R rows and r directions of the release space.

The audit of one release (Steinke, Nasr and Jagielski 2023, arXiv 2305.08846, theorem 5.2): for each of m canaries a
fair coin decides which of two versions is among the private examples. The adversary sees the release and guesses the
`guesses` coins of which it is surest. If the release is (epsilon, delta)-private, then with W ~ Binomial(guesses, e^eps
/ (1 + e^eps))

    P(at least v right) <= P(W >= v) + 2 m delta max over i of P(v > W >= v - i) / i

The lower bound is the largest epsilon that the number of right guesses refutes at the given confidence.

How much of the clean gradient survives a release is told from the private texts, outside every privacy guarantee:
publish these figures for public data alone. With S the clean sum of clipped gradients in d coordinates and noise N(0,
sigma^2) on each, the cosine of S + noise to S is about |S| / sqrt(|S|^2 + d sigma^2) (close for d of ten or more). The
class sums are mostly the bias between the labels times the mean hidden state, which all texts share; what sets the
classes apart, and what balanced training follows, is the *contrast*: the sum over classes with hidden states taken from
their mean, sum_i w_i delta_i (h_i - mean h)^T with w_i the clip's factor. In a sketch of every layer the preference for
some label is taken out already, along a few directions also what texts of a class share, and the contrast is the sum
over classes of what is left.
"""

import dataclasses
import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, reduce
from numbers import Integral

import numpy
import torch
from scipy.optimize import brentq
from scipy.stats import binom
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.metrics import roc_auc_score, roc_curve
from torch import Tensor

from gradmm.data import Example, check_examples
from gradmm.errors import is_number, require, require_texts, require_type, require_whole
from gradmm.experiments.metrics import longest_shared_spans
from gradmm.gradients import Factors, Head, Space, head_factors
from gradmm.mechanism import Bits, LedgerEntry, clip_scale, noised_sums, plan_entry, system_bits
from gradmm.models import Model, require_model
from gradmm.progress import shown, stage
from gradmm.readability import words
from gradmm.seeds import generator, stream
from gradmm.spaces import BodySketch
from gradmm.tasks import Task, TaskTokens, tokenize_task

LARGEST_EPSILON = 100.0
ROWS_AT_ONCE = 256  # texts whose (V,) deltas are held at once
_EXACT = "unclipped, whole:"
CANARY_NORM = 10.0  # in units of the clip, so that clipping is put to the test


@dataclass(frozen=True)
class Audit:
    """One audited release.

    Attributes:
        epsilon_lower: epsilon is at least this, at `confidence`; 0 when the guesses show nothing.
        claim: the epsilon that the release claims.
        delta: the delta of both.
        confidence: the chance, at least, that a true claim is not refuted.
        canaries, guesses, correct: how many there were, were guessed, and were guessed right.
    """

    epsilon_lower: float
    claim: float
    delta: float
    confidence: float
    canaries: int
    guesses: int
    correct: int

    @property
    def refuted(self) -> bool:
        """Whether the claim is refuted."""
        return self.epsilon_lower > self.claim


def p_value(canaries: int, guesses: int, correct: int, epsilon: float, delta: float) -> float:
    """The largest chance with which an (epsilon, delta)-private release allows so many right guesses."""
    if correct == 0:
        return 1.0
    chance = 1 / (1 + math.exp(-epsilon))
    below = numpy.cumsum(binom.pmf(numpy.arange(correct - 1, -1, -1), guesses, chance))  # P(v > W >= v - i), i = 1 .. v
    steepest = float((below / numpy.arange(1, correct + 1)).max())
    return min(1.0, float(binom.sf(correct - 1, guesses, chance)) + 2 * canaries * delta * steepest)


def epsilon_lower_bound(canaries: int, guesses: int, correct: int, delta: float, confidence: float = 0.95) -> float:
    """The largest epsilon that `correct` right guesses refute.

    Raises:
        UserError: counts that do not fit together, or a confidence outside (0, 1).
    """
    counts = (correct, guesses, canaries)
    fitting = all(isinstance(count, Integral) for count in counts) and 0 <= correct <= guesses <= canaries
    such = f"{correct} right of {guesses} guesses about {canaries} canaries"
    require(fitting and guesses >= 1, f"{such}: give right <= guesses <= canaries")
    sure = is_number(confidence) and 0 < confidence < 1
    require(sure, f"confidence = {confidence!r}, it must lie between 0 and 1: give such as 0.95")

    def spare(epsilon: float) -> float:
        return p_value(canaries, guesses, correct, epsilon, delta) - (1 - confidence)

    if spare(0.0) > 0:
        return 0.0
    return LARGEST_EPSILON if spare(LARGEST_EPSILON) <= 0 else float(brentq(spare, 0.0, LARGEST_EPSILON))


def audit_mechanism(
    entry: LedgerEntry,
    canaries: int = 1000,
    guesses: int | None = None,
    confidence: float = 0.95,
    seed: int = 0,
    bits: Bits = system_bits,
) -> Audit:
    """Audit clipping, summing and noising as `release` does them, with canaries that are as far apart as they can be.

    Every canary is one entry of the matrix, ten times too long, with its sign ("replace-one") or its presence
    ("add-remove") up to its coin: the neighbours of the worst case, all orthogonal.

    Args:
        entry: from a Release's ledger, or `mechanism.plan_entry`.
        canaries: m.
        guesses: how many coins are guessed; None takes 2 sqrt(m).
        confidence: of the lower bound.
        seed, bits: of the coins, and the noise's source.

    Raises:
        UserError: no ledger entry, no whole number of canaries, or a confidence outside (0, 1).
    """
    require_type(entry, LedgerEntry, "the entry", "give an entry of a Release's ledger")
    rows = math.isqrt(require_whole(canaries, "canaries", 1) - 1) + 1
    coins = torch.randint(2, (canaries,), generator=generator(seed, "canaries")).bool()
    numbers = torch.arange(canaries)
    delta, hidden = torch.zeros(canaries, rows, dtype=torch.float64), torch.zeros(canaries, rows, dtype=torch.float64)
    other = -1.0 if entry.relation == "replace-one" else 0.0
    delta[numbers, numbers // rows] = CANARY_NORM * entry.clip * torch.where(coins, 1.0, other).double()
    hidden[numbers, numbers % rows] = 1.0
    entry_here = dataclasses.replace(entry, coordinates=rows * rows)
    (target,) = noised_sums([Factors(delta, hidden)], entry_here, bits)
    scores = target.weight.flatten()[:canaries] - entry.clip * (1 + other) / 2
    guesses = min(canaries, max(1, round(2 * math.sqrt(canaries)))) if guesses is None else guesses
    surest = scores.abs().argsort(descending=True)[:guesses]
    correct = int(((scores > 0) == coins)[surest].sum())
    bound = epsilon_lower_bound(canaries, guesses, correct, entry.delta, confidence)
    return Audit(bound, entry.epsilon, entry.delta, confidence, canaries, guesses, correct)


# ---------------------------------------------------------------- membership inference


@dataclass(frozen=True)
class Membership:
    """How well a score tells members from others.

    Attributes:
        auc: the area under the ROC curve, 0.5 for a guess.
        low, high: its bootstrap interval, at 95%.
        true_positive_rate: share of members found where at most 5% of the others are.
    """

    auc: float
    low: float
    high: float
    true_positive_rate: float


def membership(members: Sequence[float], others: Sequence[float], resamples: int = 2000, seed: int = 0) -> Membership:
    """The ROC of scores that are meant to be higher for members.

    Args:
        members: n scores of the private examples.
        others: o scores of examples of the same kind that were not used.
        resamples, seed: of the percentile bootstrap, which redraws members and others apart.

    Raises:
        UserError: no members, no others, or scores that are not finite.
    """
    inside, outside = (numpy.asarray(values, dtype=numpy.float64) for values in (members, others))
    scores, truth = numpy.concatenate([inside, outside]), [1] * len(inside) + [0] * len(outside)
    both = f"there are {len(inside)} members and {len(outside)} others: give at least one of each"
    require(min(len(inside), len(outside)) >= 1, both)
    require(bool(numpy.isfinite(scores).all()), "a membership score is not finite: leave that example out")
    wins = (inside[:, None] > outside) + 0.5 * (inside[:, None] == outside)  # (n, o)
    draw = numpy.random.default_rng(stream(seed, "membership bootstrap"))
    rows, columns = (draw.multinomial(size, numpy.full(size, 1 / size), size=resamples) for size in wins.shape)
    low, high = numpy.quantile(((rows @ wins) * columns).sum(1) / wins.size, [0.025, 0.975])
    false, true, _ = roc_curve(truth, scores, drop_intermediate=False)
    found, auc = float(true[false <= 0.05].max()), float(roc_auc_score(truth, scores))
    return Membership(auc, float(low), float(high), found)


def loss_scores(
    model: Model, task: Task, examples: Iterable, reference: Model | None = None, progress: bool = True
) -> list[float]:
    """Minus each example's label loss under a model, in nats; with a reference, how much lower than under that."""
    examples = check_examples(examples, task, "example")
    with shown(progress), stage("reading losses", len(examples) * (1 if reference is None else 2)):
        scores = -_label_losses(model, task, examples)
        return (scores if reference is None else scores + _label_losses(reference, task, examples)).tolist()


@torch.no_grad()
def _label_losses(model: Model, task: Task, examples: Sequence[Example]) -> Tensor:
    require_model(model)
    tokens = tokenize_task(task, model.tokenizer)
    logits = model.logits_of(model.hidden_of([tokens.sequence(example.text) for example in examples]), tokens.labels)
    labels = torch.tensor([example.label for example in examples], device=logits.device)
    return torch.nn.functional.cross_entropy(logits, labels, reduction="none").double().cpu()


def neighbour_scores(texts: Sequence[str], synthetic: Sequence[str]) -> list[float]:
    """Each text's cosine to its nearest synthetic text, over their TF-IDF of letter 3- to 5-grams.

    Raises:
        UserError: no synthetic text has a letter.
    """
    require(any(text.strip() for text in synthetic), "there is no synthetic text to compare with: give at least one")
    vectors = TfidfVectorizer(analyzer="char_wb", ngram_range=(3, 5))
    known = vectors.fit_transform(synthetic)
    return (vectors.transform(texts) @ known.T).max(axis=1).toarray().ravel().tolist()


def span_scores(texts: Sequence[str], synthetic: Sequence[str]) -> list[int]:
    """The longest run of words of each text that stands in any one synthetic text.

    Runs that held-out texts share as well are the language's; only what exceeds them is leakage.
    """
    return longest_shared_spans([words(text) for text in texts], [words(text) for text in synthetic])


TEXT_ATTACKS: dict[str, Callable[[Sequence[str], Sequence[str]], Sequence[float]]] = {
    "nearest neighbour": neighbour_scores,
    "longest shared span": span_scores,
}


def attack_texts(
    synthetic: Sequence[str], members: Sequence[str], others: Sequence[str], seed: int = 0
) -> dict[str, Membership]:
    """Every attack that needs nothing but published texts: attack's name -> how well it tells members from others.

    Raises:
        UserError: examples where texts belong, or none of them.
    """
    named = (("the synthetic texts", synthetic), ("the members", members), ("the others", others))
    synthetic, members, others = (require_texts(texts, name) for name, texts in named)
    attacks = TEXT_ATTACKS.items()
    return {name: membership(score(members, synthetic), score(others, synthetic), seed=seed) for name, score in attacks}


# ---------------------------------------------------------------- signal to noise


def expected_cosine(signal: float, coordinates: int, sigma: float) -> float:
    """The cosine of a vector of length `signal` to itself with noise on every coordinate, to first order."""
    return signal / math.sqrt(signal**2 + coordinates * sigma**2)


def signal_to_noise(
    model: Model,
    task: Task,
    examples: Iterable,
    sizes: Sequence[int],
    spaces: Mapping[str, Space | BodySketch],
    epsilons: Sequence[float],
    delta: float,
    clip: float = 1.0,
) -> list[dict]:
    """What is left of target and contrast, computed from the clean sums and sigma with no release.

    Args:
        examples: the first sizes[i] / C of each class are used for sizes[i].
        sizes: n, ascending.
        spaces: name -> coordinates, see `spaces.release_space`.
        epsilons, delta, clip: as for `privacy.release`, exact calibration under "replace-one".

    Returns:
        One row for each space, size and epsilon: coordinates (of one class), sigma, signal (length of a class's clean
        sum), noise (expected length of its noise), target (expected cosine of a class's noised sum to the clean one,
        mean over classes), contrast (the same of the contrast), kept (cosine of the space's clean contrast to that of
        unclipped gradients on the label rows, or of unclipped whole sketches, also without what texts of a class share)
        and useful (contrast times kept).

    Raises:
        UserError: sizes that do not ascend or exceed the examples of a class.
    """
    require_model(model)
    classes: list[list[str]] = [[] for _ in task.labels]
    for example in check_examples(examples, task, "example"):
        classes[example.label].append(example.text)
    counts = [size // len(classes) for size in sizes]
    few = f"sizes = {list(sizes)} for classes of {[len(members) for members in classes]}"
    fitting = counts == sorted(counts) and counts[:1] > [0] and counts[-1] <= min(map(len, classes))
    require(fitting, f"{few}: give ascending sizes that the classes allow")
    tokens = tokenize_task(task, model.tokenizer)
    rows = torch.tensor(tokens.labels, device=model.device)
    measured: dict[str, tuple[Space | BodySketch, float]] = {name: (space, clip) for name, space in spaces.items()}
    wholes, exact = _wholes(spaces, rows)
    measured |= {name: (space, math.inf) for name, space in exact.items()}
    sums: dict[str, dict[int, _Sums]] = {name: {} for name in measured}
    found = []
    for begin, count, size in zip([0, *counts], counts, sizes, strict=False):
        for label, texts in enumerate(classes):
            for some in _blocks([tokens.sequence(text) for text in texts[begin:count]]):
                read = _Read(model, tokens, some, label)
                for name, (space, most) in measured.items():
                    more = _Sums.of(read.factors(space), most)
                    sums[name][label] = sums[name][label] + more if label in sums[name] else more
        for name, space in spaces.items():
            clean = _contrast(sums[name], space)
            kept = _cosine(_in_whole(clean, space, rows), _contrast(sums[wholes[name]], exact[wholes[name]]))
            for epsilon in epsilons:
                flat = len(sums[name][0].flat)
                entry = plan_entry("sums", name, epsilon, delta, "replace-one", clip, "exact", flat)
                found.append({"space": name, "n": size, **_figures(sums[name], clean, entry, kept)})
    return found


@dataclass(frozen=True)
class _Sums:
    """Sums over a class: weighted gradients (R, r), weighted deltas (R,), hidden states (r,), texts; float64."""

    weight: Tensor
    delta: Tensor
    hidden: Tensor
    count: int
    bias: bool

    @staticmethod
    def of(factors: Factors, clip: float) -> "_Sums":
        """Over some texts."""
        delta, hidden = factors.delta.double() * clip_scale(factors, clip)[:, None], factors.hidden.double()
        return _Sums(delta.mT @ hidden, delta.sum(0), hidden.sum(0), len(delta), factors.bias)

    def __add__(self, other: "_Sums") -> "_Sums":
        weight, delta, hidden = self.weight + other.weight, self.delta + other.delta, self.hidden + other.hidden
        return _Sums(weight, delta, hidden, self.count + other.count, self.bias)

    @property
    def flat(self) -> Tensor:
        """All that is released of the class."""
        return torch.cat([self.weight.flatten(), self.delta]) if self.bias else self.weight.flatten()


def _contrast(sums: Mapping[int, _Sums], space: Space | BodySketch) -> Tensor:
    """The sum over classes, of the head with hidden states taken from their mean: (R, r)."""
    whole = reduce(_Sums.__add__, sums.values())
    if isinstance(space, BodySketch):
        return whole.weight
    return whole.weight - torch.outer(whole.delta, whole.hidden / whole.count)


@dataclass(frozen=True)
class _Read:
    """The gradients of some texts of a class in any space; the head's, and a sketch and its directions, are read once.

    Attributes:
        sketches: those that were read, by the preference that was taken out.
    """

    model: Model
    tokens: TaskTokens
    sequences: Sequence[Sequence[int]]
    label: int
    sketches: dict[tuple[float, ...], Tensor] = field(default_factory=dict)

    def factors(self, space: Space | BodySketch) -> Factors:
        """In this space."""
        if not isinstance(space, BodySketch):
            return space.restrict(self._head)
        key = tuple(space.preference.tolist())
        if key not in self.sketches:
            labels = [self.label] * len(self.sequences)
            self.sketches[key] = space.sketches(self.model, self.tokens, self.sequences, labels)
        return space.along(self.sketches[key])

    @cached_property
    def _head(self) -> Factors:
        hidden = self.model.hidden_of(self.sequences)
        labels = torch.full((len(hidden),), self.tokens.labels[self.label], device=hidden.device)
        return head_factors(hidden, labels, Head(self.model.head_weight, self.model.head_bias))


def _blocks(sequences: Sequence[Sequence[int]]) -> Iterator[Sequence[Sequence[int]]]:
    for begin in range(0, len(sequences), ROWS_AT_ONCE):
        yield sequences[begin : begin + ROWS_AT_ONCE]


def _wholes(
    spaces: Mapping[str, Space | BodySketch], rows: Tensor
) -> tuple[dict[str, str], dict[str, Space | BodySketch]]:
    """Of each space the name of what it is a part of, one for all of the head, and these by name."""
    names = {
        name: f"{_EXACT} {name if isinstance(space, BodySketch) else 'label rows'}" for name, space in spaces.items()
    }
    return names, {names[name]: _whole(space, rows) for name, space in spaces.items()}


def _whole(space: Space | BodySketch, rows: Tensor) -> Space | BodySketch:
    """What a space is a part of: the label rows, or the whole sketch."""
    return dataclasses.replace(space, basis=None) if isinstance(space, BodySketch) else Space(rows)


def _in_whole(value: Tensor, space: Space | BodySketch, rows: Tensor) -> Tensor:
    """A matrix of a space in the coordinates of what it is a part of: (R, r) -> (C, D), or (1, k) -> (1, M r^2)."""
    value = value[rows] if isinstance(space, Space) and space.rows is None else value
    return value if space.basis is None else value @ space.basis.to(value).mT


def _cosine(a: Tensor, b: Tensor) -> float:
    return float((a * b).sum() / (a.norm() * b.norm()).clamp_min(torch.finfo(a.dtype).tiny))


def _figures(sums: Mapping[int, _Sums], clean: Tensor, entry: LedgerEntry, kept: float) -> dict:
    size, sigma = entry.coordinates, entry.sigma
    signals = [float(part.flat.norm()) for part in sums.values()]
    contrast = expected_cosine(float(clean.norm()), clean.numel(), sigma * math.sqrt(len(sums)))
    return {
        "epsilon": entry.epsilon,
        "coordinates": size,
        "sigma": sigma,
        "signal": statistics.fmean(signals),
        "noise": sigma * math.sqrt(size),
        "target": statistics.fmean(expected_cosine(signal, size, sigma) for signal in signals),
        "contrast": contrast,
        "kept": kept,
        "useful": contrast * kept,
    }
