"""What gradmm is compared with: baselines, coresets of real examples, and controls whose target knows nothing of them.

Each method gives the examples that it trains on. Texts are chosen by exact gradients of real examples: nothing here is
private. Letters: N points, n real examples of a class, D width of a state, V vocabulary.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from gradmm.data import Example, check_examples, sample_examples
from gradmm.errors import require, require_whole
from gradmm.experiments.seed_run import SeedRun
from gradmm.generation import Sampling, generate_counts
from gradmm.gradients import Factors, FactorTarget, LabelSpace, Target
from gradmm.mechanism import noised_sums, seeded_bits
from gradmm.models import Model, require_model
from gradmm.plan import Plan
from gradmm.privacy import Release
from gradmm.seeds import generator, stream
from gradmm.tasks import Task, tokenize_task

# ---------------------------------------------------------------- controls


def random_directions(target: Release, seed: int) -> Release:
    """The Release with every target a random one of the same rank, and of the same norm in weight and bias.

    Under a loss over the label tokens alone every delta adds up to zero over these, so the random ones do too: all of a
    random target lies where a text can reach it.

    Args:
        target: an exact Release: targets kept as n factor pairs, delta (n, V) and hidden (n, D).
    """
    balanced = isinstance(target.space, LabelSpace)
    sources = [generator(seed, "random target", label) for label in range(len(target.targets))]
    drawn = (_random(one, source, balanced) for one, source in zip(target.targets, sources, strict=True))
    return replace(target, targets=tuple(drawn))


def _random(target: FactorTarget, source: torch.Generator, balanced: bool) -> Target:
    delta, hidden = (_normal_like(value, source) for value in (target.factors.delta, target.factors.hidden))
    delta = delta - delta.mean(-1, keepdim=True) if balanced else delta
    if target.factors.bias:
        delta = delta * (target.norms[1].sqrt() / delta.mean(0).norm())
    drawn = FactorTarget(Factors(delta, hidden, target.factors.bias))
    scale = (target.norms[0] / drawn.norms[0]).sqrt()
    return FactorTarget(Factors(delta, hidden * scale, target.factors.bias))


def _normal_like(value: Tensor, source: torch.Generator) -> Tensor:
    return torch.randn(value.shape, generator=source, dtype=value.dtype).to(value.device)


def noise_only(release: Release, seed: int) -> Release:
    """A Release of the same shape and noise with no example in it: what can its texts do that the real ones' cannot?

    Raises:
        UserError: a Release without noise.
    """
    require(bool(release.ledger), "the Release holds no noise: make it with epsilon")
    nothing = []
    for target in release.targets:
        delta, hidden = (torch.zeros(1, size, dtype=target.weight.dtype) for size in target.weight.shape)
        nothing.append(Factors(delta, hidden, target.bias is not None))
    targets = noised_sums(nothing, release.ledger[-1], seeded_bits(seed))
    statement = f"not private: a control that holds noise alone, of the seed {seed}, and nothing of the real examples"
    return replace(release, targets=targets, private=False, statement=statement).to(release.targets[0].weight.device)


# ---------------------------------------------------------------- coresets


def herding_order(points: Tensor, count: int) -> list[int]:
    """Points whose running mean stays nearest to the mean of all (Welling 2009): (N, D) -> row numbers in the order
    taken.

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
    """Greedy k-center (Gonzalez 1985; Sener and Savarese 2018): (N, D) -> row numbers in the order taken.

    The first centre is the point nearest to the mean, each next one the point farthest from all centres so far; the
    largest distance left is at most twice the smallest possible for the first centre given. Ties go to the first row.
    """
    taken = [int((points - points.mean(0)).square().sum(1).argmin())]
    near = torch.full((len(points),), torch.inf, dtype=points.dtype, device=points.device)
    while len(taken) < count:
        near = torch.minimum(near, (points - points[taken[-1]]).square().sum(1))
        near[taken] = -torch.inf  # a point is taken once even where several coincide
        taken.append(int(near.argmax()))
    return taken


CORESETS: dict[str, Callable[[Tensor, int], list[int]]] = {"herding": herding_order, "k_center": k_center_order}


def select_coreset(
    model: Model, task: Task, examples: Sequence[Example], n: int, method: str, seed: int = 0
) -> list[Example]:
    """Choose `n` real examples, as equal a number of each class as `n` allows, class by class.

    Points are the model's last hidden states at the end of the prompt, where the label is read; each class is chosen
    from alone. Texts of fewer than `task.min_words` words are left out. What is chosen is real text: it is not private.

    Args:
        method: "random" (`sample_examples`, which reads no hidden state) or a name in `CORESETS`.
        seed: for "random"; the others draw nothing.

    Raises:
        UserError: an unknown method, n below the number of classes or above what some class has.
    """
    require_model(model)
    known = ("random", *CORESETS)
    require(method in known, f"the coreset method {method!r} is not known: use one of {', '.join(known)}")
    if method == "random":
        return sample_examples(examples, n, task, seed)
    return select_coresets(model, task, examples, n, [method])[method]


def select_coresets(
    model: Model, task: Task, examples: Sequence[Example], n: int, methods: Sequence[str]
) -> dict[str, list[Example]]:
    """What `select_coreset` chooses by each of several methods in CORESETS; the texts are read once for all.

    Raises:
        UserError: as `select_coreset`.
    """
    require_model(model)
    examples, classes = check_examples(examples, task, "example"), len(task.labels)
    require(
        require_whole(n, "n") >= classes,
        f"n = {n}, but {classes} classes need at least {classes}: ask for more examples",
    )
    tokens = tokenize_task(task, model.tokenizer)
    chosen: dict[str, list[Example]] = {method: [] for method in methods}
    for label, name in enumerate(task.labels):
        pool = [e for e in examples if e.label == label and len(e.text.split()) >= task.min_words]
        count = n // classes + (label < n % classes)
        require(
            count <= len(pool),
            f"n = {n} needs {count} examples of {name!r}, but {len(pool)} of at least {task.min_words} word(s) "
            "exist: lower n",
        )
        points = model.hidden_of([tokens.sequence(example.text) for example in pool])
        points = points.to(torch.promote_types(points.dtype, torch.float32))
        for method, taken in chosen.items():
            taken += [pool[row] for row in CORESETS[method](points, count)]
    return chosen


# ---------------------------------------------------------------- methods


GENERATED = 4.0  # baselines' texts for each that is kept, at most: the label filter alone chooses among them


def no_training(seed_run: SeedRun) -> list[Example]:
    """The model as it came."""
    return []


def all_real(seed_run: SeedRun) -> list[Example]:
    """Every train text of at least `task.min_words` words."""
    return [e for e in seed_run.experiment.splits.train if len(e.text.split()) >= seed_run.experiment.task.min_words]


def real_seen(seed_run: SeedRun) -> list[Example]:
    """The real examples that gradmm saw."""
    return seed_run.real


def random_real(seed_run: SeedRun) -> list[Example]:
    """Random real examples at the synthetic budget, drawn apart from those that gradmm saw."""
    experiment = seed_run.experiment
    return select_coreset(
        experiment.model,
        experiment.task,
        experiment.splits.train,
        seed_run.synthesis.n_synthetic,
        "random",
        stream(seed_run.seed, "random coreset"),
    )


def matched_real(seed_run: SeedRun) -> list[Example]:
    """Other real examples, chosen as gradmm chooses texts and from as many: what the choice is worth where every
    text is real.
    """
    experiment, config = seed_run.experiment, replace(seed_run.synthesis, search="pool", ranking="group")
    seen = {example.text for example in seed_run.real}
    others = [example for example in all_real(seed_run) if example.text not in seen]
    count = min(len(others), math.ceil(config.n_synthetic * config.oversample))
    pool = select_coreset(
        experiment.model, experiment.task, others, count, "random", stream(seed_run.seed, "real pool")
    )
    return seed_run.choose(pool, config)


def herding(seed_run: SeedRun) -> list[Example]:
    """Real examples by `coresets.herding` at the synthetic budget."""
    return seed_run.experiment.coresets["herding"]


def k_center(seed_run: SeedRun) -> list[Example]:
    """Real examples by `coresets.k_center` at the synthetic budget."""
    return seed_run.experiment.coresets["k_center"]


def zero_shot(seed_run: SeedRun) -> list[Example]:
    """Texts that the model writes from the public prompts, kept by gradmm's own label filter: no real example is
    looked at.
    """
    return _generated(seed_run, seed_run.experiment.config.sampling, ())


def few_shot(seed_run: SeedRun) -> list[Example]:
    """As `zero_shot`, with real examples before each text: as many as the settings say, or fewer if these do not
    fit.
    """
    return _generated(seed_run, _fitting(seed_run), seed_run.real)


def _fitting(seed_run: SeedRun) -> Sampling:
    """The sampling with the most shots, at least one, of which even the longest leave room for a text in the
    context.
    """
    experiment, sampling = seed_run.experiment, seed_run.experiment.config.sampling
    tokens = tokenize_task(experiment.task, experiment.model.tokenizer)
    # Each shot stands behind a prompt and before a separator, which may meet the text in an odd token.
    around = max(map(len, tokens.prompts)) + len(tokens.encode(sampling.separator)) + 1
    room = experiment.model.context - sampling.max_tokens - around
    classes = [[e.text for e in seed_run.real if e.label == label] for label in range(len(experiment.task.labels))]
    lengths = [sorted((len(tokens.encode(text)) + around for text in texts), reverse=True) for texts in classes]
    fitting = [
        count for count in range(1, sampling.shots + 1) if max(sum(longest[:count]) for longest in lengths) <= room
    ]
    return replace(sampling, shots=max(fitting, default=1))


def _generated(seed_run: SeedRun, sampling: Sampling, shots: Sequence[Example]) -> list[Example]:
    experiment, config = (
        seed_run.experiment,
        replace(seed_run.synthesis, search="pool", distance="cosine", ranking="text", perplexity_weight=0.0),
    )
    config = replace(config, oversample=min(config.oversample, GENERATED))
    plan = Plan.of(experiment.model, experiment.task, seed_run.blank, config)
    texts = generate_counts(experiment.model, experiment.task, plan.written_per_class, seed_run.seed, sampling, shots)
    return plan.selector.keep(texts)


def prompt_only(seed_run: SeedRun) -> list[Example]:
    """The projection and its prompts without matching: gradmm with targets of zero, which know nothing of the real
    texts.

    A zero gradient has cosine 0 with everything, so every loss is 1: the first draw is projected, the first projection
    stays the best, and ranking falls back to the order of writing. The label filter, which reads no target, stays.
    """
    config = replace(
        seed_run.synthesis,
        ranking="text",
        outer_steps=1,
        inner_steps=1,
        init_candidates=1,
        distance="cosine",
        perplexity_weight=0.0,
    )
    return seed_run.write("prompt_only", seed_run.blank, config)


def random_target(seed_run: SeedRun) -> list[Example]:
    """gradmm with targets of random directions: what the search does when there is nothing to find."""
    return seed_run.write("random_target", random_directions(seed_run.release, seed_run.seed), seed_run.synthesis)


def gradmm(seed_run: SeedRun) -> list[Example]:
    """The method."""
    return seed_run.matched


def shuffled(seed_run: SeedRun) -> list[Example]:
    """gradmm's texts with labels dealt out at random: what their style alone teaches."""
    order = torch.randperm(len(seed_run.matched), generator=generator(seed_run.seed, "shuffled labels")).tolist()
    return [
        Example(example.text, seed_run.matched[row].label) for example, row in zip(seed_run.matched, order, strict=True)
    ]


WRITING = (
    "prompt_only",
    "random_target",
    "shuffled",
    "gradmm",
)  # what they share is worth more than all else: `SeedRun.written`

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
    "random_target": random_target,
    "shuffled": shuffled,
    "gradmm": gradmm,
}
