"""Where the signal goes, and one factor at a time around a base setting: match, fluency and accuracy.

Every setting is a comparison of its own folder, so an interrupted run continues and a finished one is read.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path

import pandas
import torch
from scipy.stats import t as student
from torch import Tensor
from torch.nn.functional import cosine_similarity
from tqdm.auto import tqdm

from gradmm.config import PRESETS, SynthesisConfig, preset
from gradmm.data import Example, Splits, check_examples
from gradmm.errors import require
from gradmm.experiments.protocol import compare
from gradmm.experiments.seed_run import ComparisonConfig, written_texts
from gradmm.gradients import Space
from gradmm.matching import factors_of
from gradmm.models import Model, require_model
from gradmm.spaces import BodySketch, release_space
from gradmm.tasks import Task, TaskTokens, tokenize_task

QUANTITIES = ("validation_accuracy", "accuracy", "match_loss", "perplexity")  # `accuracy` is of the test texts
AGREEMENT_SPACES = ("head", "body")
_OF_COMPARISON = {"n_real", "space"}
# of the texts of a pool, which do not depend on these
_OF_CHOICE = {"space", "ranking", "filter", "distance", "perplexity_weight"}
_OF_SYNTHESIS = {item.name for item in fields(SynthesisConfig)} - {"seed", "groups_per_batch"}


@torch.no_grad()
def agreement(
    model: Model, task: Task, real: Sequence[Example], sets: Mapping[str, Sequence[Example]], public: Sequence[str]
) -> pandas.DataFrame:
    """How far the gradients of sets of examples agree with the real ones', in several release spaces of one model.

    Per-class cosines hardly see the contrast between the classes, the sum over classes of their mean gradients, which
    is what training on balanced data follows; and a preference for one verbalizer is common to all texts.

    Args:
        real, sets: examples of every class, and named sets of such.
        public: texts over which the model's preference among the verbalizers is taken.

    Returns:
        One row for each of AGREEMENT_SPACES and set: space, set, per_class (mean cosine), contrast (cosine), and
        classes (the mean cosine of the real classes' gradients to each other, the same for every set).
    """
    require_model(model)
    tokens, rows = tokenize_task(task, model.tokenizer), []
    real = check_examples(real, task, "real example")
    sets = {name: check_examples(examples, task, f"{name} example") for name, examples in sets.items()}
    for name in AGREEMENT_SPACES:
        space = release_space(model, tokens, name, None if name == "head" else public)
        target = _class_means(model, tokens, space, real)
        pairs = cosine_similarity(target[:, None], target[None], dim=-1)
        between = float((pairs.sum() - len(pairs)) / (len(pairs) * (len(pairs) - 1)))
        for which, examples in sets.items():
            means = _class_means(model, tokens, space, examples)
            alike = float(cosine_similarity(means, target, dim=-1).mean())
            contrast = float(cosine_similarity(means.sum(0), target.sum(0), dim=0))
            rows.append({"space": name, "set": which, "per_class": alike, "contrast": contrast, "classes": between})
    return pandas.DataFrame(rows)


def _class_means(model: Model, tokens: TaskTokens, space: Space | BodySketch, examples: Sequence[Example]) -> Tensor:
    """The mean gradient of each class in the space, flat: (C, d)."""
    means = []
    for label in range(len(tokens.labels)):
        texts = [tokens.sequence(example.text) for example in examples if example.label == label]
        require(len(texts) > 0, f"a set has no example of class {label}: every set needs one of each class")
        found = factors_of(model, tokens, space, texts, [label] * len(texts))
        means.append((found.delta.mT @ found.hidden).flatten() / len(texts))
    return torch.stack(means)


def vary(
    model: Model,
    task: Task,
    splits: Splits,
    base: ComparisonConfig,
    factors: Mapping[str, Sequence],
    seeds: Sequence[int],
    output: str | Path | None = None,
    progress: bool = True,
) -> pandas.DataFrame:
    """Run gradmm at the base and at every other value of each factor, with the same seeds.

    Settings that choose otherwise from the pool that the base wrote read it from the base's folder.

    Args:
        base: the setting around which one factor at a time is changed.
        factors: names of `SynthesisConfig` settings, "n_real", "space" or "preset", with the values to try; the base's
            own value belongs to every factor and is run once. A preset is run as it is, with the base's number of
            texts: the budget that all share.
        seeds: as in `compare`; runs of one seed see the same real examples, but for "n_real".
        output: a folder that receives one comparison for each setting, or None.
        progress: whether to show a progress bar over settings.

    Returns:
        One row for each factor, value and seed: factor, value, base (whether it is the base's value), seed, QUANTITIES.

    Raises:
        UserError: an unknown factor, or a value that does not fit.
    """
    levels = {factor: _levels(base, factor, values) for factor, values in factors.items()}
    settings = {"base": base}  # checked, all of them, before anything runs
    choices: set[str] = set()
    written: dict[int, list[Example]] = {}
    found = {}
    for factor, values in levels.items():
        others = {_name(base, factor, value): changed(base, factor, value) for value in values}
        settings |= {name: config for name, config in others.items() if name != "base"}
        choices |= set(others) - {"base"} if factor in _OF_CHOICE else set()
    for name, config in tqdm(settings.items(), desc="varying", unit="setting", disable=not progress):
        folder = None if output is None else Path(output) / name
        config = replace(config, pools=written) if name in choices else config
        found[name] = compare(model, task, splits, config, ["gradmm"], seeds, folder, progress=False).records
        if name == "base" and folder is not None and base.synthesis.search == "pool":
            written = written_texts(folder, seeds)
    return pandas.DataFrame(
        {"factor": factor, "value": value, "base": value == value_of(base, factor), "seed": record["seed"]}
        | {quantity: record[quantity] for quantity in QUANTITIES}
        for factor, values in levels.items()
        for value in values
        for record in found[_name(base, factor, value)]
    )


def changed(base: ComparisonConfig, factor: str, value) -> ComparisonConfig:
    """The base with one factor at another value.

    Raises:
        UserError: an unknown preset, or a value that the factor cannot have.
    """
    if factor in _OF_COMPARISON:
        return replace(base, **{factor: value})
    if factor == "preset":
        return replace(base, synthesis=preset(value, n_synthetic=base.synthesis.n_synthetic, seed=base.synthesis.seed))
    return replace(base, synthesis=replace(base.synthesis, **{factor: value}))


def against_base(
    frame: pandas.DataFrame, quantity: str = "validation_accuracy", confidence: float = 0.95
) -> pandas.DataFrame:
    """How far each setting lies from the base, paired by seed.

    Args:
        frame: from `vary`.
        quantity: one of QUANTITIES. Choose a setting by its validation accuracy: the best of several by the test
            accuracy looks better than it is.
        confidence: of the interval of the mean difference, by Student's t over seeds.

    Returns:
        One row for each factor's values but the base's: factor, value, mean, difference (from the base), low, high; no
        interval for a single seed.
    """
    rows, bases = [], frame[frame["base"]].groupby("factor")["value"].first()
    for factor, part in frame.groupby("factor", sort=False):
        table = part.pivot(index="seed", columns="value", values=quantity)[part["value"].unique()].astype(float)
        base = table[bases[factor]]
        for value, one in table.drop(columns=bases[factor]).items():
            gaps, seeds = one - base, len(table)
            half = student.ppf((1 + confidence) / 2, seeds - 1) * gaps.sem() if seeds > 1 else math.nan
            row = {"factor": factor, "value": value, "mean": one.mean(), "difference": gaps.mean()}
            rows.append(row | {"low": gaps.mean() - half, "high": gaps.mean() + half})
    return pandas.DataFrame(rows, columns=["factor", "value", "mean", "difference", "low", "high"])


def _levels(base: ComparisonConfig, factor: str, values: Sequence) -> list:
    """The values with the base's own among them, numbers in rising order."""
    known = sorted(_OF_COMPARISON | _OF_SYNTHESIS | {"preset"})
    require(factor in known, f"the factor {factor!r} is not known: use some of {', '.join(known)}")
    levels = list(dict.fromkeys([value_of(base, factor), *values]))
    numbers = all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in levels)
    return sorted(levels) if numbers else levels


def value_of(base: ComparisonConfig, factor: str):
    """The base's own value of a factor; a base that is no preset as it stands has the preset "the base"."""
    if factor == "space":
        return base.release_space
    if factor == "preset":
        return next((name for name in PRESETS if changed(base, factor, name) == base), "the base")
    return getattr(base if factor in _OF_COMPARISON else base.synthesis, factor)


def _name(base: ComparisonConfig, factor: str, value) -> str:
    return "base" if value == value_of(base, factor) else f"{factor}={value}"
