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
sigma^2) on each, the cosine of S + noise to S is about

    |S| / sqrt(|S|^2 + d sigma^2)

(the noise's length concentrates, its part along S averages out: close for d of ten or more, a little low below). The
class sums are mostly the bias between the labels times the mean hidden state, which all texts share; what sets the
classes apart, and what balanced training follows, is the *contrast*: the sum over classes with hidden states taken from
their mean, sum_i w_i delta_i (h_i - mean h)^T with w_i the clip's factor.
"""

import dataclasses
import math
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral

import numpy
import torch
from scipy.stats import binom
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.metrics import roc_auc_score, roc_curve
from torch import Tensor

from gradmm.data import Example, check_examples
from gradmm.errors import is_number, require, require_texts, require_type, require_whole
from gradmm.experiments.metrics import longest_shared_spans, words
from gradmm.gradients import DenseTarget, Factors, Head, HeadSpace, Space, head_factors
from gradmm.matching import factors_of
from gradmm.mechanism import Bits, LedgerEntry, clip_scale, noised_sums, plan_entry, system_bits
from gradmm.models import Model, require_model
from gradmm.privacy import Release, release
from gradmm.seeds import generator
from gradmm.spaces import BodySketch
from gradmm.tasks import Task, TaskTokens, tokenize_task

LARGEST_EPSILON = 100.0
BISECTIONS = 50
ROWS_AT_ONCE = 256  # texts whose (V,) deltas are held at once
_EXACT = "label rows, unclipped"
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
    require(
        all(isinstance(count, Integral) for count in (canaries, guesses, correct))
        and 0 <= correct <= guesses <= canaries
        and guesses >= 1,
        f"{correct} right of {guesses} guesses about {canaries} canaries: give right <= guesses <= canaries",
    )
    require(
        is_number(confidence) and 0 < confidence < 1,
        f"confidence = {confidence!r}, it must lie between 0 and 1: give such as 0.95",
    )
    low, high = 0.0, LARGEST_EPSILON
    if p_value(canaries, guesses, correct, low, delta) > 1 - confidence:
        return 0.0
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        refuted = p_value(canaries, guesses, correct, middle, delta) <= 1 - confidence
        low, high = (middle, high) if refuted else (low, middle)
    return low


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
        seed: of the coins.
        bits: the noise's source.

    Raises:
        UserError: no ledger entry, no whole number of canaries, or a confidence outside (0, 1).
    """
    require_type(entry, LedgerEntry, "the entry", "give an entry of a Release's ledger")
    rows = math.isqrt(require_whole(canaries, "canaries", 1) - 1) + 1
    coins = _coins(canaries, seed)
    numbers = torch.arange(canaries)
    delta, hidden = torch.zeros(canaries, rows, dtype=torch.float64), torch.zeros(canaries, rows, dtype=torch.float64)
    other = -1.0 if entry.relation == "replace-one" else 0.0
    delta[numbers, numbers // rows] = CANARY_NORM * entry.clip * torch.where(coins, 1.0, other).double()
    hidden[numbers, numbers % rows] = 1.0
    entry_here = dataclasses.replace(entry, coordinates=rows * rows)
    (target,) = noised_sums([Factors(delta, hidden)], entry_here, bits)
    scores = target.weight.flatten()[:canaries] - entry.clip * (1 + other) / 2
    return _judge(scores, coins, entry, guesses, confidence)


def audit_release(
    model: Model,
    task: Task,
    canaries: Sequence[tuple[Example, Example | None]],
    companions: Iterable = (),
    *,
    guesses: int | None = None,
    confidence: float = 0.95,
    seed: int = 0,
    **options,
) -> Audit:
    """Audit a whole `privacy.release` of examples, of which each is the first or the second of its pair.

    The adversary knows all pairs and companions, and guesses each coin by its linear minimum-mean-square-error estimate
    from the released sums; texts whose gradients are alike hide each other, so this bound is weaker than
    `audit_mechanism`'s.

    Args:
        model, task, options: as for `release`; `epsilon` is needed.
        canaries: m pairs of examples or rows; the second is None exactly when the relation is "add-remove".
        companions: further private examples, whatever `examples.check_examples` takes; every class needs one, whatever
            the coins say.
        guesses, confidence, seed: as in `audit_mechanism`.

    Raises:
        UserError: as `release`, no canaries, or pairs that do not fit the relation.
    """
    require_model(model)
    require(
        isinstance(canaries, Iterable) and all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in canaries),
        f"the canaries are of type {type(canaries).__name__}: give a list of pairs of examples",
    )
    canaries = [
        tuple(None if one is None else check_examples([one], task, "canary")[0] for one in pair) for pair in canaries
    ]
    companions = check_examples(companions, task, "companion")
    require(len(canaries) > 0, "there are no canaries: give pairs of examples")
    require(
        options.get("epsilon") is not None,
        "epsilon is None, and a release without privacy has no claim to audit: give epsilon",
    )
    paired = options.get("relation", "replace-one") == "replace-one"
    require(
        all((second is not None) == paired for _, second in canaries),
        "a canary is a pair of examples for replace-one, and an example with None for add-remove: mend the pairs",
    )
    coins = _coins(len(canaries), seed)
    present = [pair[0] if coin else pair[1] for pair, coin in zip(canaries, coins.tolist(), strict=True)]
    released = release(model, task, [*companions, *(e for e in present if e is not None)], **options)
    return _judge(
        _coin_estimates(model, task, canaries, companions, released), coins, released.ledger[-1], guesses, confidence
    )


def _coins(count: int, seed: int) -> Tensor:
    return torch.randint(2, (count,), generator=generator(seed, "canaries")).bool()


def _judge(scores: Tensor, coins: Tensor, entry: LedgerEntry, guesses: int | None, confidence: float) -> Audit:
    """Guess the coins with the largest scores; a positive score means the first version."""
    guesses = min(len(coins), max(1, round(2 * math.sqrt(len(coins))))) if guesses is None else guesses
    surest = scores.abs().argsort(descending=True)[:guesses].cpu()
    correct = int(((scores.cpu() > 0) == coins)[surest].sum())
    bound = epsilon_lower_bound(len(coins), guesses, correct, entry.delta, confidence)
    return Audit(bound, entry.epsilon, entry.delta, confidence, len(coins), guesses, correct)


@dataclass(frozen=True)
class _Atoms:
    """Clipped gradients of single examples, and the share of each that the adversary expects in the release."""

    factors: Factors
    classes: Tensor
    expected: Tensor

    def gram(self) -> Tensor:
        """Inner products; gradients of different classes land in different targets."""
        products = self.factors.hidden @ self.factors.hidden.mT + float(self.factors.bias)
        return (self.factors.delta @ self.factors.delta.mT) * products * (self.classes[:, None] == self.classes)

    def inner(self, targets: Sequence[DenseTarget]) -> Tensor:
        """Inner products with the released sums."""
        return torch.stack([
            sum(DenseTarget(*(None if v is None else v.double() for v in (t.weight, t.bias))).inner(self.factors[i]))
            for i, t in ((i, targets[label]) for i, label in enumerate(self.classes.tolist()))
        ])  # fmt: skip


def _coin_estimates(model: Model, task: Task, canaries, companions, released: Release) -> Tensor:
    """The estimate (A^T A + sigma^2 I)^-1 A^T (G - E G) of the coins as signs, A = half the pairs' differences:
    (m,).
    """
    firsts, seconds = [first for first, _ in canaries], [second for _, second in canaries if second is not None]
    examples = [*firsts, *seconds, *companions]
    entry, share = released.ledger[-1], 0.5
    expected = torch.tensor(
        [share] * (len(firsts) + len(seconds)) + [1.0] * len(companions), dtype=torch.float64, device=model.device
    )
    atoms = _Atoms(*_clipped(model, task, examples, released.space, entry.clip), expected)
    gram = atoms.gram()
    residual = atoms.inner(released.targets) - gram @ expected
    half = torch.zeros(len(firsts), len(examples), dtype=torch.float64, device=model.device)
    numbers = torch.arange(len(firsts))
    half[numbers, numbers] = share
    if seconds:
        half[numbers, numbers + len(firsts)] = -share
    noise = entry.sigma**2 * torch.eye(len(firsts), dtype=torch.float64, device=model.device)
    return torch.linalg.solve(half @ gram @ half.mT + noise, half @ residual)


def _clipped(
    model: Model, task: Task, examples: Sequence[Example], space: HeadSpace | BodySketch, clip: float
) -> tuple[Factors, Tensor]:
    """Each example's clipped gradient in the release space, float64, and its class."""
    tokens = tokenize_task(task, model.tokenizer)
    classes = torch.tensor([example.label for example in examples], device=model.device)
    sequences = [tokens.sequence(example.text) for example in examples]
    found = factors_of(model, tokens, space, sequences, [example.label for example in examples])
    delta = found.delta.double() * clip_scale(found, clip)[:, None]
    return Factors(delta, found.hidden.double(), found.bias), classes


# ---------------------------------------------------------------- membership inference


@dataclass(frozen=True)
class Membership:
    """How well a score tells members from others.

    Attributes:
        auc: the area under the ROC curve, 0.5 for a guess.
        low, high: its bootstrap interval.
        level: the interval's confidence.
        true_positive_rate: share of members found where at most `false_positive_rate` of the others are.
        members, others: how many of each.
    """

    auc: float
    low: float
    high: float
    level: float
    true_positive_rate: float
    false_positive_rate: float
    members: int
    others: int


def membership(
    members: Sequence[float],
    others: Sequence[float],
    *,
    level: float = 0.95,
    false_positive_rate: float = 0.05,
    resamples: int = 2000,
    seed: int = 0,
) -> Membership:
    """The ROC of scores that are meant to be higher for members.

    Args:
        members: n scores of the private examples.
        others: o scores of examples of the same kind that were not used.
        level: of the percentile bootstrap interval, which redraws members and others apart.
        false_positive_rate: where the true-positive rate is read.
        resamples: of the bootstrap.
        seed: of the bootstrap.

    Raises:
        UserError: no members, no others, or scores that are not finite.
    """
    inside, outside = (numpy.asarray(values, dtype=numpy.float64) for values in (members, others))
    require(
        min(len(inside), len(outside)) >= 1,
        f"there are {len(inside)} members and {len(outside)} others: give at least one of each",
    )
    require(bool(numpy.isfinite([*inside, *outside]).all()), "a membership score is not finite: leave that example out")
    truth, scores = [1] * len(inside) + [0] * len(outside), [*inside, *outside]
    wins = (inside[:, None] > outside) + 0.5 * (inside[:, None] == outside)  # (n, o)
    source = generator(seed, "membership bootstrap")
    shares = [torch.rand(resamples, count, generator=source).numpy() for count in wins.shape]
    drawn = [
        numpy.stack([numpy.bincount((row * row.size).astype(int), minlength=row.size) for row in part])
        for part in shares
    ]
    areas = ((drawn[0] @ wins) * drawn[1]).sum(1) / wins.size
    low, high = numpy.quantile(areas, [(1 - level) / 2, (1 + level) / 2])
    false, true, _ = roc_curve(truth, scores, drop_intermediate=False)
    return Membership(
        auc=float(roc_auc_score(truth, scores)),
        low=float(low),
        high=float(high),
        level=level,
        true_positive_rate=float(true[false <= false_positive_rate].max()),
        false_positive_rate=false_positive_rate,
        members=len(inside),
        others=len(outside),
    )


def loss_scores(model: Model, task: Task, examples: Iterable, reference: Model | None = None) -> list[float]:
    """Minus each example's label loss under a (fine-tuned) model, in nats; with a reference, how much lower than
    under it.
    """
    examples = check_examples(examples, task, "example")
    scores = -_label_losses(model, task, examples)
    return (scores if reference is None else scores + _label_losses(reference, task, examples)).tolist()


@torch.no_grad()
def _label_losses(model: Model, task: Task, examples: Sequence[Example]) -> Tensor:
    require_model(model)
    tokens = tokenize_task(task, model.tokenizer)
    logits = model.logits_of(model.hidden_of([tokens.sequence(example.text) for example in examples]), tokens.labels)
    labels = torch.tensor([example.label for example in examples], device=logits.device)
    return torch.nn.functional.cross_entropy(logits, labels, reduction="none").double().cpu()


def ngram_scores(texts: Sequence[str], synthetic: Sequence[str], n: int = 3) -> list[float]:
    """The share of each text's word n-grams that occur in the synthetic texts; 0 for a text of fewer words."""
    known = set().union(*(_ngrams(text, n) for text in synthetic))
    grams = [_ngrams(text, n) for text in texts]
    return [len(found & known) / len(found) if found else 0.0 for found in grams]


def _ngrams(text: str, n: int) -> set[tuple[str, ...]]:
    return set(zip(*(words(text)[i:] for i in range(n)), strict=False))


def neighbour_scores(texts: Sequence[str], synthetic: Sequence[str]) -> list[float]:
    """Each text's cosine to its nearest synthetic text, over TF-IDF of letter 3- to 5-grams fitted on the synthetic
    texts.

    Raises:
        UserError: no synthetic text has a letter.
    """
    require(any(text.strip() for text in synthetic), "there is no synthetic text to compare with: give at least one")
    vectors = TfidfVectorizer(analyzer="char_wb", ngram_range=(3, 5))
    known = vectors.fit_transform(synthetic)
    return (vectors.transform(texts) @ known.T).max(axis=1).toarray().ravel().tolist()


def span_scores(
    texts: Sequence[str], synthetic: Sequence[str], encode: Callable[[str], Sequence[Hashable]] = words
) -> list[int]:
    """The longest run of each text that stands in any one synthetic text, in words, or in tokens with
    `TaskTokens.encode`.

    Runs that held-out texts share as well are the language's; only what exceeds them is leakage.
    """
    return longest_shared_spans([encode(text) for text in texts], [encode(text) for text in synthetic])


TEXT_ATTACKS: dict[str, Callable[[Sequence[str], Sequence[str]], Sequence[float]]] = {
    "3-grams": ngram_scores,
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
    synthetic, members, others = (
        require_texts(texts, name)
        for name, texts in (("the synthetic texts", synthetic), ("the members", members), ("the others", others))
    )
    return {
        name: membership(score(members, synthetic), score(others, synthetic), seed=seed)
        for name, score in TEXT_ATTACKS.items()
    }


# ---------------------------------------------------------------- signal to noise


def expected_cosine(signal: float, coordinates: int, sigma: float) -> float:
    """The cosine of a vector of length `signal` to itself with noise on every coordinate, to first order."""
    return signal / math.sqrt(signal**2 + coordinates * sigma**2)


def signal_to_noise(
    model: Model,
    task: Task,
    examples: Iterable,
    sizes: Sequence[int],
    spaces: Mapping[str, Space],
    epsilons: Sequence[float],
    delta: float,
    clip: float = 1.0,
    relation: str = "replace-one",
) -> list[dict]:
    """What is left of target and contrast, computed from the clean sums and sigma with no release.

    Args:
        examples: the first sizes[i] / C of each class are used for sizes[i].
        sizes: n, ascending.
        spaces: name -> coordinates of the gradient of the loss over all tokens, `spaces.release_space` of HEAD_SPACES.
        epsilons, delta, clip, relation: as for `privacy.release`, exact calibration.

    Returns:
        One row for each space, size and epsilon: coordinates (of one class), sigma, signal (length of a class's clean
            sum),
        noise (expected length of its noise), target (expected cosine of a class's noised sum to the clean one, mean
        over classes), contrast (the same of the contrast), kept (cosine of the space's clean contrast to that of
        unclipped gradients on the label rows) and useful (contrast times kept).

    Raises:
        UserError: sizes that do not ascend or exceed the examples of a class.
    """
    require_model(model)
    examples = check_examples(examples, task, "example")
    classes = [[e for e in examples if e.label == label] for label in range(len(task.labels))]
    counts = [size // len(classes) for size in sizes]
    require(
        counts == sorted(counts) and counts[:1] > [0] and counts[-1] <= min(map(len, classes)),
        f"sizes = {list(sizes)} for classes of {[len(members) for members in classes]}: give ascending sizes that "
        "the classes allow",
    )
    tokens = tokenize_task(task, model.tokenizer)
    rows = torch.tensor(tokens.labels, device=model.device)
    measured = {**{name: (space, clip) for name, space in spaces.items()}, _EXACT: (Space(rows), math.inf)}
    sums = {name: [_Sums()] * len(classes) for name in measured}
    found = []
    for begin, count, size in zip([0, *counts], counts, sizes, strict=False):
        for label, members in enumerate(classes):
            for factors in _gradients(model, tokens, [example.text for example in members[begin:count]], label):
                for name, (space, most) in measured.items():
                    sums[name][label] = sums[name][label].plus(space.restrict(factors), most)
        exact = _contrast(sums[_EXACT])
        for name, space in spaces.items():
            kept = _cosine(_on_label_rows(_contrast(sums[name]), space, rows), exact)
            entries = [
                plan_entry("sums", name, epsilon, delta, relation, clip, "exact", len(sums[name][0].flat))
                for epsilon in epsilons
            ]
            found += [{"space": name, "n": size, **_figures(sums[name], entry, kept)} for entry in entries]
    return found


@dataclass(frozen=True)
class _Sums:
    """Sums over a class: weighted gradients (R, r), weighted deltas (R,), hidden states (r,), texts; float64."""

    weight: Tensor | float = 0.0
    delta: Tensor | float = 0.0
    hidden: Tensor | float = 0.0
    count: int = 0
    bias: bool = False

    def plus(self, factors: Factors, clip: float) -> "_Sums":
        """With more texts."""
        delta = factors.delta.double() * clip_scale(factors, clip)[:, None]
        hidden = factors.hidden.double()
        weight = self.weight + delta.mT @ hidden
        return _Sums(
            weight, self.delta + delta.sum(0), self.hidden + hidden.sum(0), self.count + len(delta), factors.bias
        )

    @property
    def flat(self) -> Tensor:
        """All that is released of the class."""
        return torch.cat([self.weight.flatten(), self.delta]) if self.bias else self.weight.flatten()


def _contrast(sums: Sequence[_Sums]) -> Tensor:
    """The sum over classes with hidden states taken from their mean: (R, r)."""
    mean = sum(part.hidden for part in sums) / sum(part.count for part in sums)
    return sum(part.weight for part in sums) - torch.outer(sum(part.delta for part in sums), mean)


def _gradients(model: Model, tokens: TaskTokens, texts: Sequence[str], label: int) -> Iterator[Factors]:
    """The texts' gradients of the whole head, block by block."""
    head = Head(model.head_weight, model.head_bias)
    for begin in range(0, len(texts), ROWS_AT_ONCE):
        hidden = model.hidden_of([tokens.sequence(text) for text in texts[begin : begin + ROWS_AT_ONCE]])
        yield head_factors(hidden, torch.full((len(hidden),), tokens.labels[label], device=hidden.device), head)


def _on_label_rows(value: Tensor, space: Space, rows: Tensor) -> Tensor:
    """A matrix of a space in the coordinates of the label rows: (R, r) -> (C, D)."""
    value = value[rows] if space.rows is None else value
    return value if space.basis is None else value @ space.basis.to(value).mT


def _cosine(a: Tensor, b: Tensor) -> float:
    return float((a * b).sum() / (a.norm() * b.norm()).clamp_min(torch.finfo(a.dtype).tiny))


def _figures(sums: Sequence[_Sums], entry: LedgerEntry, kept: float) -> dict:
    signals, size, clean = [float(part.flat.norm()) for part in sums], entry.coordinates, _contrast(sums)
    contrast = expected_cosine(float(clean.norm()), clean.numel(), entry.sigma * math.sqrt(len(sums)))
    return {
        "epsilon": entry.epsilon,
        "coordinates": size,
        "sigma": entry.sigma,
        "signal": sum(signals) / len(signals),
        "noise": entry.sigma * math.sqrt(size),
        "target": sum(expected_cosine(signal, size, entry.sigma) for signal in signals) / len(signals),
        "contrast": contrast,
        "kept": kept,
        "useful": contrast * kept,
    }
