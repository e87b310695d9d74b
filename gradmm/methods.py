"""The ways to get a training set, by name: each is a function of a `Trial` and gives the examples to train on.

Knows nothing of training or judging. Texts are chosen by exact gradients of real examples: nothing here is private.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from gradmm.controls import random_directions
from gradmm.coresets import select_coreset
from gradmm.examples import Example
from gradmm.generation import Sampling, generate_counts
from gradmm.plan import Plan
from gradmm.seeds import generator, stream
from gradmm.tasks import tokenize_task
from gradmm.trial import Trial

GENERATED = 4.0  # baselines' texts for each that is kept, at most: the label filter alone chooses among them


def no_training(trial: Trial) -> list[Example]:
    """The model as it came."""
    return []


def all_real(trial: Trial) -> list[Example]:
    """Every train text of at least `task.min_words` words."""
    return [e for e in trial.bench.splits.train if len(e.text.split()) >= trial.bench.task.min_words]


def real_seen(trial: Trial) -> list[Example]:
    """The real examples that gradmm saw."""
    return trial.real


def random_real(trial: Trial) -> list[Example]:
    """Random real examples at the synthetic budget, drawn apart from those that gradmm saw."""
    bench = trial.bench
    return select_coreset(
        bench.model, bench.task, bench.splits.train, trial.synthesis.n_synthetic, "random", stream(trial.seed, "random coreset")
    )


def matched_real(trial: Trial) -> list[Example]:
    """Other real examples, chosen as gradmm chooses texts and from as many: what the choice is worth where every text is real."""
    bench, config = trial.bench, replace(trial.synthesis, search="pool", ranking="group")
    seen = {example.text for example in trial.real}
    others = [example for example in all_real(trial) if example.text not in seen]
    count = min(len(others), math.ceil(config.n_synthetic * config.oversample))
    pool = select_coreset(bench.model, bench.task, others, count, "random", stream(trial.seed, "real pool"))
    return trial.choose(pool, config)


def herding(trial: Trial) -> list[Example]:
    """Real examples by `coresets.herding` at the synthetic budget."""
    return trial.bench.coresets["herding"]


def k_center(trial: Trial) -> list[Example]:
    """Real examples by `coresets.k_center` at the synthetic budget."""
    return trial.bench.coresets["k_center"]


def zero_shot(trial: Trial) -> list[Example]:
    """Texts that the model writes from the public prompts, kept by gradmm's own label filter: no real example is looked at."""
    return _generated(trial, trial.bench.config.sampling, ())


def few_shot(trial: Trial) -> list[Example]:
    """As `zero_shot`, with real examples before each text: as many as the settings say, or fewer if these do not fit."""
    return _generated(trial, _fitting(trial), trial.real)


def _fitting(trial: Trial) -> Sampling:
    """The sampling with the most shots, at least one, of which even the longest leave room for a text in the context."""
    bench, sampling = trial.bench, trial.bench.config.sampling
    tokens = tokenize_task(bench.task, bench.model.tokenizer)
    # Each shot stands behind a prompt and before a separator, which may meet the text in an odd token.
    around = max(map(len, tokens.prompts)) + len(tokens.encode(sampling.separator)) + 1
    room = bench.model.context - sampling.max_tokens - around
    classes = [[e.text for e in trial.real if e.label == label] for label in range(len(bench.task.labels))]
    lengths = [sorted((len(tokens.encode(text)) + around for text in texts), reverse=True) for texts in classes]
    fitting = [count for count in range(1, sampling.shots + 1) if max(sum(longest[:count]) for longest in lengths) <= room]
    return replace(sampling, shots=max(fitting, default=1))


def _generated(trial: Trial, sampling: Sampling, shots: Sequence[Example]) -> list[Example]:
    bench, config = trial.bench, replace(trial.synthesis, search="pool", distance="cosine", ranking="text", perplexity_weight=0.0)
    config = replace(config, oversample=min(config.oversample, GENERATED))
    plan = Plan.of(bench.model, bench.task, trial.blank, config)
    texts = generate_counts(bench.model, bench.task, plan.written_per_class, trial.seed, sampling, shots)
    return plan.selection.keep(texts)


def prompt_only(trial: Trial) -> list[Example]:
    """The projection and its prompts without matching: gradmm with targets of zero, which know nothing of the real texts.

    A zero gradient has cosine 0 with everything, so every loss is 1: the first draw is projected, the first projection
    stays the best, and ranking falls back to the order of writing. The label filter, which reads no target, stays.
    """
    config = replace(
        trial.synthesis, ranking="text", outer_steps=1, inner_steps=1, init_candidates=1, distance="cosine", perplexity_weight=0.0
    )
    return trial.write("prompt_only", trial.blank, config)


def random_target(trial: Trial) -> list[Example]:
    """gradmm with targets of random directions: what the search does when there is nothing to find."""
    return trial.write("random_target", random_directions(trial.release, trial.seed), trial.synthesis)


def gradmm(trial: Trial) -> list[Example]:
    """The method."""
    return trial.matched


def shuffled(trial: Trial) -> list[Example]:
    """gradmm's texts with labels dealt out at random: what their style alone teaches."""
    order = torch.randperm(len(trial.matched), generator=generator(trial.seed, "shuffled labels")).tolist()
    return [Example(example.text, trial.matched[row].label) for example, row in zip(trial.matched, order, strict=True)]


WRITING = ("prompt_only", "random_target", "shuffled", "gradmm")  # what they share is worth more than all else: `Trial.written`

METHODS: dict[str, Callable[[Trial], list[Example]]] = {
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
