"""What gradmm is compared with: baselines, coresets of real examples, and controls whose target knows nothing of them.

Each method gives the examples that it trains on; nothing here is private. Letters: N points, D width of a state.
"""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from gradmm.data import Example, check_examples, equal_counts, sample_examples
from gradmm.errors import require, require_whole
from gradmm.experiments.seed_run import SeedRun, exact_targets
from gradmm.generation import Sampling, generate_counts
from gradmm.gradients import DenseTarget, Factors, FactorTarget
from gradmm.mechanism import noised_sums, seeded_bits
from gradmm.models import Model, require_model
from gradmm.plan import Plan
from gradmm.privacy import Release
from gradmm.readability import count_words
from gradmm.seeds import generator, stream
from gradmm.selection import calibrate, label_probabilities
from gradmm.tasks import Task, tokenize_task

# ---------------------------------------------------------------- controls


def random_directions(target: Release, seed: int) -> Release:
    """An exact Release with every target a random one of the same rank, and of the same norm in weight and bias."""
    sources = (generator(seed, "random target", label) for label in range(len(target.targets)))
    drawn = (_random(one, source) for one, source in zip(exact_targets(target), sources, strict=True))
    return replace(target, targets=tuple(drawn), examples="")


def _random(target: FactorTarget, source: torch.Generator) -> FactorTarget:
    real = target.factors
    delta, hidden = (
        torch.randn(value.shape, generator=source, dtype=value.dtype).to(value.device)
        for value in (real.delta, real.hidden)
    )
    if real.bias:
        delta = delta * (target.norms[1].sqrt() / delta.mean(0).norm())
    drawn = FactorTarget(Factors(delta, hidden, real.bias))
    return FactorTarget(Factors(delta, hidden * (target.norms[0] / drawn.norms[0]).sqrt(), real.bias))


def noise_only(release: Release, seed: int) -> Release:
    """A Release of the same shape and noise with no example in it: what can its texts do that the real ones' cannot?

    Raises:
        UserError: a Release without noise.
    """
    require(bool(release.ledger), "the Release holds no noise: make it with epsilon")
    dense = [target for target in release.targets if isinstance(target, DenseTarget)]
    nothing = []
    for target in dense:
        delta, hidden = (torch.zeros(1, size, dtype=target.weight.dtype) for size in target.weight.shape)
        nothing.append(Factors(delta, hidden, target.bias is not None))
    targets = noised_sums(nothing, release.ledger[-1], seeded_bits(seed))
    statement = f"not private: a control that holds noise alone, of the seed {seed}, and nothing of the real examples"
    return replace(release, targets=targets, private=False, statement=statement).to(dense[0].weight.device)


# ---------------------------------------------------------------- coresets


def herding_order(points: Tensor, count: int) -> list[int]:
    """Points whose running mean stays nearest to the mean of all (Welling 2009): (N, D) -> row numbers as taken.

    Each step takes the point that brings the mean of those taken nearest to the whole mean; ties go to the first row.
    """
    mean, total = points.mean(0), torch.zeros_like(points[0])
    open_rows = torch.ones(len(points), dtype=torch.bool, device=points.device)
    taken: list[int] = []
    for size in range(1, count + 1):
        far = ((total + points) / size - mean).square().sum(1).masked_fill(~open_rows, torch.inf)
        taken.append(int(far.argmin()))
        total = total + points[taken[-1]]
        open_rows[taken[-1]] = False
    return taken


def k_center_order(points: Tensor, count: int) -> list[int]:
    """Greedy k-center (Gonzalez 1985; Sener and Savarese 2018): (N, D) -> row numbers as taken.

    The first centre is the point nearest to the mean, each next one the point farthest from all centres so far. Ties go
    to the first row.
    """
    taken = [int((points - points.mean(0)).square().sum(1).argmin())]
    near = torch.full((len(points),), torch.inf, dtype=points.dtype, device=points.device)
    while len(taken) < count:
        near = torch.minimum(near, (points - points[taken[-1]]).square().sum(1))
        near[taken] = -torch.inf  # a point is taken once even where several coincide
        taken.append(int(near.argmax()))
    return taken


CORESETS: dict[str, Callable[[Tensor, int], list[int]]] = {"herding": herding_order, "k_center": k_center_order}


def select_coresets(
    model: Model, task: Task, examples: Sequence[Example], n: int, methods: Sequence[str]
) -> dict[str, list[Example]]:
    """Choose `n` real examples by each of several methods in CORESETS, as equal a number of each class as `n` allows.

    Points are the model's last hidden states at the end of the prompt, where the label is read; each class is chosen
    from alone. Texts of fewer than `task.min_words` words are left out. What is chosen is real text: not private.

    Raises:
        UserError: an unknown method, n below the number of classes or above what some class has.
    """
    unknown = [name for name in methods if name not in CORESETS]
    require(not unknown, f"the coreset methods {unknown} are not known: use some of {', '.join(CORESETS)}")
    require_model(model)
    examples, classes = check_examples(examples, task, "example"), len(task.labels)
    short = f"n = {n}, but {classes} classes need at least {classes}: ask for more examples"
    require(require_whole(n, "n") >= classes, short)
    tokens = tokenize_task(task, model.tokenizer)
    chosen: dict[str, list[Example]] = {method: [] for method in methods}
    for label, (name, count) in enumerate(zip(task.labels, equal_counts(n, classes), strict=True)):
        pool = [example for example in _long_enough(examples, task) if example.label == label]
        few = f"{len(pool)} of at least {task.min_words} word(s) exist: lower n"
        require(count <= len(pool), f"n = {n} needs {count} examples of {name!r}, but {few}")
        points = model.hidden_of([tokens.sequence(example.text) for example in pool])
        points = points.to(torch.promote_types(points.dtype, torch.float32))
        for method, taken in chosen.items():
            taken += [pool[row] for row in CORESETS[method](points, count)]
    return chosen


def check_budget(task: Task, train: Sequence[Example], n_synthetic: int, methods: Sequence[str]) -> None:
    """Check that every class has enough real texts for the methods that take as many of them as are written.

    Raises:
        UserError: one of these is among the methods, and a class has too few.
    """
    taking, classes = [name for name in ("random", *CORESETS) if name in methods], len(task.labels)
    least = f"n_synthetic = {n_synthetic}, but {classes} classes need at least {classes}: raise n_synthetic"
    require(not taking or n_synthetic >= classes, least)
    having = Counter(example.label for example in _long_enough(train, task))
    wanted = equal_counts(n_synthetic, classes)
    few = [f"{having[label]} of {task.labels[label]!r}" for label in range(classes) if having[label] < wanted[label]]
    need = f"n_synthetic = {n_synthetic} needs {max(wanted)} real texts of each class for {', '.join(taking)}"
    there = f"{', '.join(few)} of at least {task.min_words} word(s) exist"
    require(not (taking and few), f"{need}, but {there}: lower n_synthetic, or leave these methods out")


def _long_enough(examples: Sequence[Example], task: Task) -> list[Example]:
    return [example for example in examples if count_words(example.text) >= task.min_words]


# ---------------------------------------------------------------- methods


# Baselines' texts for each that is kept, at most: the label filter alone chooses among them, or nothing but what makes
# a text unreadable.
FILTERED, UNFILTERED = 4.0, 1.25
UNMATCHED: dict[str, Any] = {
    "distance": "cosine",
    "ranking": "text",
    "perplexity_weight": 0.0,
}  # settings under which order decides


def no_training(seed_run: SeedRun) -> list[Example]:
    """The model as it came."""
    return []


def all_real(seed_run: SeedRun) -> list[Example]:
    """Every train text of at least `task.min_words` words."""
    return _long_enough(seed_run.experiment.splits.train, seed_run.experiment.task)


def real_seen(seed_run: SeedRun) -> list[Example]:
    """The real examples that gradmm saw."""
    return seed_run.real


def random_real(seed_run: SeedRun) -> list[Example]:
    """Random real examples at the synthetic budget, from all training texts: also those that gradmm saw."""
    one, seed = seed_run.experiment, stream(seed_run.seed, "random coreset")
    return sample_examples(one.splits.train, seed_run.synthesis.n_synthetic, one.task, seed)


def matched_real(seed_run: SeedRun) -> list[Example]:
    """Other real examples, chosen as gradmm chooses texts and from as many: what the choice alone is worth."""
    config, one = seed_run.synthesis, seed_run.experiment
    if config.search == "admm":
        config = replace(config, search="pool", ranking="group")
    seen = {example.text for example in seed_run.real}
    others = [example for example in all_real(seed_run) if example.text not in seen]
    each = math.ceil(config.n_synthetic * config.oversample / len(one.task.labels))
    pool: list[Example] = []
    for label in range(len(one.task.labels)):
        own = [example for example in others if example.label == label]
        order = torch.randperm(len(own), generator=generator(seed_run.seed, "real pool", label))[:each]
        pool += [own[place] for place in order.tolist()]
    return seed_run.choose(pool, config)


def herding(seed_run: SeedRun) -> list[Example]:
    """Real examples by `herding_order` at the synthetic budget, from all training texts."""
    return seed_run.experiment.coresets["herding"]


def k_center(seed_run: SeedRun) -> list[Example]:
    """Real examples by `k_center_order` at the synthetic budget, from all training texts."""
    return seed_run.experiment.coresets["k_center"]


def zero_shot(seed_run: SeedRun) -> list[Example]:
    """Texts that the model writes from the public prompts, kept by gradmm's own label filter: it sees no real one."""
    return _generated(seed_run, seed_run.sampling, ())


def few_shot(seed_run: SeedRun) -> list[Example]:
    """As `zero_shot`, with real examples before each text: as many as the settings say, or as fit."""
    return _generated(seed_run, fitting_shots(seed_run), seed_run.real)


def fitting_shots(seed_run: SeedRun) -> Sampling:
    """The sampling with the most shots, at least one, of which even the longest leave room for a text."""
    experiment, sampling = seed_run.experiment, seed_run.sampling
    tokens = tokenize_task(experiment.task, experiment.model.tokenizer)
    # Each shot stands behind a prompt and before a separator, which may meet the text in an odd token.
    around = max(map(len, tokens.prompts)) + len(tokens.encode(sampling.separator)) + 1
    room = experiment.model.context - sampling.max_tokens - around
    lengths = [
        sorted((len(tokens.encode(e.text)) + around for e in seed_run.real if e.label == label), reverse=True)
        for label in range(len(experiment.task.labels))
    ]
    counts = range(1, sampling.shots + 1)
    fitting = [count for count in counts if max(sum(longest[:count]) for longest in lengths) <= room]
    return replace(sampling, shots=max(fitting, default=1))


def _generated(seed_run: SeedRun, sampling: Sampling, shots: Sequence[Example]) -> list[Example]:
    experiment, config = seed_run.experiment, seed_run.synthesis
    oversample = min(config.oversample, UNFILTERED if config.filter == "none" else FILTERED)
    config = replace(config, search="pool", oversample=oversample, **UNMATCHED)
    plan = Plan.of(experiment.model, experiment.task, seed_run.blank, config)
    texts = generate_counts(experiment.model, experiment.task, plan.written_per_class, seed_run.seed, sampling, shots)
    return plan.selector.keep(texts)


def prompt_only(seed_run: SeedRun) -> list[Example]:
    """The projection and its prompts without matching: gradmm with targets of zero, which know of no real text.

    A zero gradient has cosine 0 with everything, so every loss is 1: the first draw is projected, the first projection
    stays the best, and ranking falls back to the order of writing. The label filter, which reads no target, stays.
    """
    config = replace(seed_run.synthesis, outer_steps=1, inner_steps=1, init_candidates=1, **UNMATCHED)
    return seed_run.write("prompt_only", seed_run.blank, config)


def surest(seed_run: SeedRun) -> list[Example]:
    """Of gradmm's candidates those that the model reads most surely as their label, once its preference is taken out.

    What the model knows already chooses, as where written texts are filtered by confidence; no gradient and no target
    does.
    """
    pool, experiment = seed_run.pool, seed_run.experiment
    tokens = tokenize_task(experiment.task, experiment.model.tokenizer)
    classes = [example.label for example in pool]
    read = label_probabilities(experiment.model, tokens, [example.text for example in pool]).double()
    sure = calibrate(read, classes)[range(len(pool)), classes]
    order = sure.argsort(descending=True, stable=True).tolist()
    return seed_run.among([pool[row] for row in order], seed_run.blank, replace(seed_run.synthesis, **UNMATCHED))


def random_target(seed_run: SeedRun) -> list[Example]:
    """gradmm with targets of random directions: what the search does when there is nothing to find."""
    return seed_run.write("random_target", random_directions(seed_run.release, seed_run.seed), seed_run.synthesis)


def gradmm(seed_run: SeedRun) -> list[Example]:
    """The method."""
    return seed_run.matched


def shuffled(seed_run: SeedRun) -> list[Example]:
    """gradmm's texts with labels dealt out at random: what their style alone teaches."""
    ours = seed_run.matched
    order = torch.randperm(len(ours), generator=generator(seed_run.seed, "shuffled labels")).tolist()
    return [Example(example.text, ours[row].label) for example, row in zip(ours, order, strict=True)]


WRITING = (
    "prompt_only",
    "surest",
    "random_target",
    "shuffled",
    "gradmm",
)  # they share a synthesis, which is most of the work

OF_REAL_TEXT = ("real", "random", "herding", "k_center", "matched_real", "all_real")

METHODS: dict[str, Callable[[SeedRun], list[Example]]] = {
    "none": no_training,
    "all_real": all_real,
    "real": real_seen,
    "random": random_real,
    "matched_real": matched_real,
    "herding": herding,
    "k_center": k_center,
    "zero_shot": zero_shot,
    "few_shot": few_shot,
    "prompt_only": prompt_only,
    "surest": surest,
    "random_target": random_target,
    "shuffled": shuffled,
    "gradmm": gradmm,
}
