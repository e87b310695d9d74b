"""Do synthetic examples replace real ones? Named methods at one budget, trained and judged by the same code.

Every method is a function of a `Trial` (one seed: its real examples, their Release, the settings) and gives the examples
to train on. Reads real examples and writes texts chosen by exact gradients: nothing here is private.
Letters: N examples, C classes, M test examples, S seeds.
"""

import hashlib
import json
import math
import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path

import pandas
import torch
from torch import Tensor
from tqdm.auto import tqdm

from gradmm import files
from gradmm.coresets import CORESETS, select_coreset
from gradmm.errors import require
from gradmm.evaluation import (
    distinct_n,
    duplicate_share,
    longest_shared_spans,
    paired_bootstrap,
    perplexity,
    self_bleu,
    summarise_runs,
    words,
)
from gradmm.examples import Example, Splits, check_examples, sample_examples
from gradmm.finetuning import Encoded, FinetuneConfig, evaluate, finetune, train_at_rate, trainable_copy
from gradmm.generation import Sampling, generate_texts
from gradmm.gradients import Factors, FactorTarget, Target
from gradmm.matching import Matching
from gradmm.models import Model
from gradmm.privacy import Release, release
from gradmm.runs import RunFolder, finite_or_none
from gradmm.seeds import generator, stream
from gradmm.synthesis import Plan, SynthesisConfig, judge_texts, synthesize
from gradmm.tasks import Task, tokenize_task

METRIC_TEXTS = 500  # texts of a set that are measured at most, a seeded sample; training reads them all
MEASURES = ("perplexity", "second_perplexity", "match", "distinct_2", "self_bleu", "duplicates", "longest_shared_span", "tokens")


@dataclass(frozen=True)
class ComparisonConfig:
    """Settings of a comparison; the seeds in `synthesis` and `finetuning` give way to the comparison's.

    Attributes:
        n_real: real examples that gradmm's Release is made of, all classes together.
        synthesis: its n_synthetic is the budget of every method but "none", "all_real" and "real".
        finetuning: the same for every method, all real texts included: equal steps, not equal passes.
        sampling: of the zero-shot and few-shot texts.
        max_test: test examples used at most, the same for all seeds; None uses all.
        similarity_steps: steps of training on the real examples after which gradients are compared, at the last of the
            learning rates; at most the fine-tuning's own.
    """

    n_real: int = 50
    synthesis: SynthesisConfig = SynthesisConfig()
    finetuning: FinetuneConfig = FinetuneConfig()
    sampling: Sampling = Sampling()
    max_test: int | None = None
    similarity_steps: tuple[int, ...] = (0, 10, 50)

    def __post_init__(self) -> None:
        steps, last = tuple(self.similarity_steps), self.finetuning.steps
        require(
            all(isinstance(step, int) and 0 <= step <= last for step in steps) and len(steps) > 0,
            f"similarity_steps = {steps}, each must be a whole number from 0 to the fine-tuning's {last} steps: give such as (0, {last})",
        )
        require(
            self.max_test is None or (isinstance(self.max_test, int) and self.max_test >= 1),
            f"max_test = {self.max_test!r}, it must be a whole number of at least 1, or None for all",
        )
        object.__setattr__(self, "similarity_steps", steps)


@dataclass(frozen=True, eq=False)
class Bench:
    """What all methods and seeds share.

    Attributes:
        coresets: the examples of the methods that draw nothing, chosen once.
        settings: SHA-256 of all that a record depends on but its method and seed.
        folder: None keeps everything in memory.
        second: a model that reads the texts but did not write them, or None.
    """

    model: Model
    task: Task
    splits: Splits
    config: ComparisonConfig
    coresets: dict[str, list[Example]]
    settings: str
    folder: Path | None
    second: Model | None

    def place(self, method: str, seed: int) -> Path:
        """Where the record of a method and seed is written."""
        return self.folder / "records" / f"{method}-seed{seed}.json"

    def load(self, method: str, seed: int) -> dict | None:
        """A finished record, or None."""
        if self.folder is None or not self.place(method, seed).exists():
            return None
        record = files.read_json(self.place(method, seed), files.MAX_TEXT_BYTES)
        require(
            isinstance(record, dict) and record.get("settings") == self.settings,
            f"{self.place(method, seed)} was made with other settings than its folder: remove it and run again",
        )
        return record


@dataclass(frozen=True, eq=False)
class Trial:
    """What every method of one seed is given; real examples, Release and gradmm's texts are made once, when asked for."""

    bench: Bench
    seed: int

    @property
    def synthesis(self) -> SynthesisConfig:
        """The settings with this seed."""
        return replace(self.bench.config.synthesis, seed=self.seed)

    @cached_property
    def real(self) -> list[Example]:
        """The real examples."""
        return sample_examples(self.bench.splits.train, self.bench.config.n_real, self.bench.task, self.seed)

    @cached_property
    def release(self) -> Release:
        """Their exact gradients."""
        return release(self.bench.model, self.bench.task, self.real)

    @cached_property
    def matched(self) -> list[Example]:
        """The texts whose gradients match the Release."""
        return self.write("gradmm", self.release, self.synthesis)

    def write(self, name: str, target: Release, config: SynthesisConfig) -> list[Example]:
        """The kept texts of a synthesis; continued where it was interrupted."""
        bench = self.bench
        folder = None if bench.folder is None else bench.folder / "synthesis" / f"{name}-seed{self.seed}"
        result = synthesize(bench.model, bench.task, target, config, folder, progress=False)
        return check_examples([row for row in result.dataset.to_list() if row["kept"]], bench.task)


# ---------------------------------------------------------------- the methods


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


def herding(trial: Trial) -> list[Example]:
    """Real examples by `coresets.herding` at the synthetic budget."""
    return trial.bench.coresets["herding"]


def k_center(trial: Trial) -> list[Example]:
    """Real examples by `coresets.k_center` at the synthetic budget."""
    return trial.bench.coresets["k_center"]


def zero_shot(trial: Trial) -> list[Example]:
    """Texts that the model writes from the public prompts, as many as gradmm writes, kept by gradmm's own filter."""
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
    bench, config = trial.bench, trial.synthesis
    plan = Plan.of(bench.model, bench.task, trial.release, config)
    counts = [plan.classes.count(label) * config.group_size for label in range(len(bench.task.labels))]
    most = max(counts)
    texts = generate_texts(bench.model, bench.task, most, trial.seed, sampling, shots)
    texts = [example for place, example in enumerate(texts) if place % most < counts[example.label]]
    rows = judge_texts(plan, [example.text for example in texts], [example.label for example in texts])
    return [example for example, row in zip(texts, rows, strict=True) if row["kept"]]


def prompt_only(trial: Trial) -> list[Example]:
    """The projection and its prompts without matching: gradmm with targets of zero, which know nothing of the real texts.

    A zero gradient has cosine 0 with everything, so every loss is 1: the first draw is projected, the first projection
    stays the best, and ranking falls back to the order of writing. The label filter, which reads no target, stays.
    """
    config = replace(
        trial.synthesis, outer_steps=1, inner_steps=1, init_candidates=1, distance="cosine", perplexity_weight=0.0
    )
    return trial.write("prompt_only", without_gradient(trial.release), config)


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


METHODS: dict[str, Callable[[Trial], list[Example]]] = {
    "none": no_training,
    "all_real": all_real,
    "real": real_seen,
    "random": random_real,
    "herding": herding,
    "k_center": k_center,
    "zero_shot": zero_shot,
    "few_shot": few_shot,
    "prompt_only": prompt_only,
    "random_target": random_target,
    "shuffled": shuffled,
    "gradmm": gradmm,
}


def without_gradient(target: Release) -> Release:
    """The Release with every target zero."""
    return replace(target, targets=tuple(_zero(one.factors) for one in target.targets))


def _zero(pairs: Factors) -> Target:
    return FactorTarget(Factors(torch.zeros_like(pairs.delta[:1]), torch.zeros_like(pairs.hidden[:1]), pairs.bias))


def random_directions(target: Release, seed: int) -> Release:
    """The Release with every target a random one of the same rank, and of the same norm in weight and bias.

    Args:
        target: an exact Release: targets kept as n factor pairs, delta (n, V) and hidden (n, D).
    """
    return replace(
        target, targets=tuple(_random(one, generator(seed, "random target", label)) for label, one in enumerate(target.targets))
    )


def _random(target: FactorTarget, source: torch.Generator) -> Target:
    delta, hidden = (_normal_like(value, source) for value in (target.factors.delta, target.factors.hidden))
    if target.factors.bias:
        delta = delta * (target.norms()[1].sqrt() / delta.mean(0).norm())
    drawn = FactorTarget(Factors(delta, hidden, target.factors.bias))
    scale = (target.norms()[0] / drawn.norms()[0]).sqrt()
    return FactorTarget(Factors(delta, hidden * scale, target.factors.bias))


def _normal_like(value: Tensor, source: torch.Generator) -> Tensor:
    return torch.randn(value.shape, generator=source, dtype=value.dtype).to(value.device)


# ---------------------------------------------------------------- measures


def _measures(trial: Trial, examples: Sequence[Example]) -> dict:
    """What a set is like, see MEASURES; None for each where there are no examples."""
    if not examples:
        return dict.fromkeys(MEASURES)
    bench, texts = trial.bench, [example.text for example in examples]
    read = perplexity(bench.model, texts)
    sequences, real = ([words(text) for text in some] for some in (texts, [example.text for example in trial.real]))
    return {
        "perplexity": read.corpus,
        "second_perplexity": None if bench.second is None else perplexity(bench.second, texts).corpus,
        "match": _match(_matching(trial, bench.model, trial.release.targets), examples),
        "distinct_2": distinct_n(texts, 2),
        "self_bleu": self_bleu(texts, trial.seed, limit=bench.config.n_real) if len(texts) > 1 else None,
        "duplicates": duplicate_share(texts),
        "longest_shared_span": max(longest_shared_spans(sequences, real)),
        "tokens": statistics.fmean(read.tokens),
    }


def _thinned(examples: Sequence[Example], seed: int, limit: int | None = METRIC_TEXTS) -> list[Example]:
    order = torch.randperm(len(examples), generator=generator(seed, "measured examples"))[:limit].tolist()
    return [examples[row] for row in sorted(order)]


def _matching(trial: Trial, model: Model, targets: Sequence[Target]) -> Matching:
    return Matching(model, tokenize_task(trial.bench.task, model.tokenizer), targets, trial.release.space)


def _match(matching: Matching, examples: Sequence[Example]) -> float:
    """1 - cosine of the set's gradient with the real examples', mean over classes."""
    return statistics.fmean(matching.of_sets([e.text for e in examples], [e.label for e in examples]))


def _similarities(trial: Trial, sets: dict[str, list[Example]]) -> dict[str, dict[str, float]]:
    """How alike the gradients of each set and of the real examples are while a model trains on the real ones.

    Cosine of the head's gradients, mean over classes, at the weights after each of `similarity_steps`: matching asks for
    it at step 0 alone. One training serves all sets.

    Returns:
        For each set {step: cosine}; an empty set has none.
    """
    found: dict[str, dict[str, float]] = {name: {} for name in sets}
    for step, model in _training(trial) if any(sets.values()) else ():
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
    tokens, model = tokenize_task(bench.task, bench.model.tokenizer), trainable_copy(bench.model)
    data = Encoded.of(bench.model, bench.task, tokens, trial.real, "real")
    for row in train_at_rate(model, tokens, data, data, config.learning_rates[-1], config):
        if row["step"] in steps:
            yield row["step"], model
        if row["step"] >= max(steps):
            return


# ---------------------------------------------------------------- runs


def compare(
    model: Model,
    task: Task,
    splits: Splits,
    config: ComparisonConfig = ComparisonConfig(),
    methods: Sequence[str] = tuple(METHODS),
    seeds: Sequence[int] = (0,),
    output: str | Path | None = None,
    progress: bool = True,
    workers: int = 1,
    second: Model | None = None,
) -> "Comparison":
    """Make each method's examples, train on them, and judge: every seed draws real examples, texts and batches anew.

    Args:
        methods: names in METHODS.
        seeds: different whole numbers; runs of one seed are paired.
        output: a folder that receives one record for each method and seed, and the syntheses. What is finished there is
            read back and not done again; more methods or seeds may be asked for. None keeps everything in memory.
        progress: whether to show a progress bar, of runs (with several workers, of whole seeds).
        workers: processes on the CPU that share the seeds and the threads; a script that asks for several needs the usual
            `if __name__ == "__main__"`. Results are equal to the last bit where the number of threads of each is.
        second: another model for a second perplexity.

    Returns:
        Comparison.

    Raises:
        UserError: an unknown method, repeated seeds, or a folder that holds a comparison with other settings.
    """
    begun = time.time()
    _check(model, methods, seeds, workers)
    splits = replace(splits, test=_thinned(splits.test, 0, config.max_test))
    folder = RunFolder.open(output, _identity(model, task, splits, config, second))
    settings = hashlib.sha256(json.dumps(folder.manifest, sort_keys=True).encode()).hexdigest()
    bench = Bench(model, task, splits, config, {}, settings, folder.path, second)
    records = {(name, seed): bench.load(name, seed) for seed in seeds for name in methods}
    pending = {seed: [name for name in methods if records[name, seed] is None] for seed in seeds}
    wanted = [name for name in CORESETS if any(name in names for names in pending.values())]
    bench = replace(bench, coresets={name: select_coreset(model, task, splits.train, config.synthesis.n_synthetic, name) for name in wanted})
    for record in _run(bench, {seed: names for seed, names in pending.items() if names}, len(records), progress, workers):
        records[record["method"], record["seed"]] = record
    if folder.path is not None:
        clock = {"seconds": round(time.time() - begun, 3)}
        files.write_json(folder.path / "manifest.json", {**folder.manifest, "status": "complete", "clock": clock})
    return Comparison(task, tuple(example.label for example in splits.test), [records[name, seed] for name in methods for seed in seeds])


def _check(model: Model, methods: Sequence[str], seeds: Sequence[int], workers: int) -> None:
    unknown = [name for name in methods if name not in METHODS]
    require(not unknown and len(methods) > 0, f"the methods {unknown} are not known: use some of {', '.join(METHODS)}")
    require(len(set(methods)) == len(methods), f"methods = {list(methods)} names one twice: give each once")
    require(len(set(seeds)) == len(seeds) > 0, f"seeds = {list(seeds)}, they must differ and be at least one: give such as [0, 1, 2]")
    require(isinstance(workers, int) and workers >= 1, f"workers = {workers!r}, it must be a whole number of at least 1: give 1 or 2")
    require(workers == 1 or model.device.type == "cpu", f"workers = {workers} on {model.device}: several are for the CPU, give 1")


def _identity(model: Model, task: Task, splits: Splits, config: ComparisonConfig, second: Model | None) -> dict:
    parts = [[(example.text, example.label) for example in some] for some in (splits.train, splits.validation, splits.test)]
    return {
        "config": asdict(config),
        "task": task.to_dict(),
        "model": {"name": model.name, "revision": model.revision, "fingerprint": model.fingerprint},
        "second": None if second is None else {"name": second.name, "fingerprint": second.fingerprint},
        "data": {"source": splits.source, "fingerprint": hashlib.sha256(repr(parts).encode()).hexdigest()},
    }


def _run(bench: Bench, pending: dict[int, list[str]], total: int, progress: bool, workers: int) -> Iterator[dict]:
    """The records that are missing, as they are finished."""
    missing = sum(map(len, pending.values()))
    with tqdm(total=total, initial=total - missing, desc="comparing", unit="run", disable=not progress) as bar:
        for records in _seeds(bench, pending, workers) if missing else ():
            for record in records:
                bar.update(1)
                bar.set_postfix(method=record["method"], seed=record["seed"], accuracy=f"{record['accuracy']:.3f}")
                yield record


def _seeds(bench: Bench, pending: dict[int, list[str]], workers: int) -> Iterator[Iterator[dict] | list[dict]]:
    """The records of one seed after the other."""
    if workers == 1:
        yield from (_run_seed(bench, names, seed) for seed, names in pending.items())
        return
    threads = max(1, torch.get_num_threads() // workers)
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), torch.set_num_threads, (threads,)) as pool:
        started = [pool.submit(_run_whole_seed, bench, names, seed) for seed, names in pending.items()]
        for future in as_completed(started):
            yield future.result()


def _run_whole_seed(bench: Bench, methods: Sequence[str], seed: int) -> list[dict]:
    return list(_run_seed(bench, methods, seed))


def _run_seed(bench: Bench, methods: Sequence[str], seed: int) -> Iterator[dict]:
    """All examples first, so that one training serves every gradient similarity; then one method after the other."""
    trial = Trial(bench, seed)
    sets = {name: METHODS[name](trial) for name in methods}
    measured = {name: _thinned(examples, seed) for name, examples in sets.items()}
    similarities = _similarities(trial, measured)
    for name, examples in sets.items():
        record = {"method": name, "seed": seed, "settings": bench.settings, "n": len(examples)}
        record |= _trained(trial, examples)
        record |= {key: finite_or_none(value) for key, value in _measures(trial, measured[name]).items()}
        record["similarity"] = {step: finite_or_none(value) for step, value in similarities[name].items()}
        if bench.folder is not None:
            files.write_json(bench.place(name, seed), record)
        yield record


def _trained(trial: Trial, examples: Sequence[Example]) -> dict:
    """The figures of a fine-tuning, or of the model as it came where there are no examples."""
    bench, splits = trial.bench, trial.bench.splits
    if not examples:
        test = evaluate(bench.model, bench.task, splits.test)
        chosen = {"learning_rate": None, "step": 0, "validation_accuracy": None, "curve": []}
    else:
        config = replace(bench.config.finetuning, seed=trial.seed)
        found = finetune(bench.model, bench.task, examples, splits.validation, splits.test, config)
        test, curve = found.test, [{key: finite_or_none(value) for key, value in row.items()} for row in found.curve]
        chosen = {"learning_rate": found.learning_rate, "step": found.step}
        chosen |= {"validation_accuracy": found.validation_accuracy, "curve": curve}
    return {"accuracy": test.accuracy, "macro_f1": test.macro_f1, "predictions": list(test.predictions), **chosen}


# ---------------------------------------------------------------- results


@dataclass(frozen=True, eq=False)
class Comparison:
    """What a comparison gives.

    Attributes:
        labels: M label numbers of the test examples.
        records: one for each method and seed: method, seed, n, accuracy, macro_f1, predictions (M), learning_rate, step,
            validation_accuracy, curve (see `finetuning.Training`), similarity ({step: cosine}) and MEASURES.
    """

    task: Task
    labels: tuple[int, ...]
    records: list[dict]

    def of(self, method: str) -> list[dict]:
        """The records of a method, seed by seed."""
        return [record for record in self.records if record["method"] == method]

    @cached_property
    def methods(self) -> dict[str, dict]:
        """Each method's figures over its seeds.

        accuracy {mean, std, runs}; means of macro_f1, n, the measures and the similarity of each step; and
        `minus_gradmm` {mean, low, high, confidence}: this method's accuracy minus gradmm's, with a paired bootstrap
        interval over test examples and seeds (None for gradmm itself, or without it).
        """
        return {name: self._summary(name) for name in dict.fromkeys(record["method"] for record in self.records)}

    def _summary(self, name: str) -> dict:
        records = self.of(name)
        means = {key: _mean([record[key] for record in records]) for key in ("macro_f1", "n", *MEASURES)}
        steps = {step: _mean([record["similarity"][step] for record in records]) for step in records[0]["similarity"]}
        return {
            "accuracy": asdict(summarise_runs([record["accuracy"] for record in records])),
            **means,
            "similarity": steps,
            "minus_gradmm": None if name == "gradmm" or not self.of("gradmm") else self.difference(name, "gradmm"),
        }

    def difference(self, first: str, second: str) -> dict[str, float]:
        """The accuracy of `first` minus that of `second`, see `evaluation.paired_bootstrap`."""
        return asdict(paired_bootstrap(self._correct(first), self._correct(second)))

    def _correct(self, name: str) -> list[list[bool]]:
        return [[a == b for a, b in zip(record["predictions"], self.labels, strict=True)] for record in self.of(name)]

    def verdict(self, first: str, second: str) -> str:
        """Whether `first` beats `second`, as a sentence; only an interval that leaves out 0 decides."""
        gap, (one, other) = self.difference(first, second), (self.methods[name]["accuracy"]["mean"] for name in (first, second))
        word = "beats" if gap["low"] > 0 else "is beaten by" if gap["high"] < 0 else "cannot be told from"
        return (
            f"{first} ({one:.3f}) {word} {second} ({other:.3f}): difference {gap['mean']:+.3f}, "
            f"{gap['confidence']:.0%} interval {gap['low']:+.3f} to {gap['high']:+.3f}"
        )

    def table(self) -> pandas.DataFrame:
        """One row for each method."""
        return pandas.DataFrame([_table_row(name, figures) for name, figures in self.methods.items()])

    def curves(self) -> pandas.DataFrame:
        """Every look of every fine-tuning: method, seed and the columns of `finetuning.Training.curve`."""
        rows = [{"method": r["method"], "seed": r["seed"], **look} for r in self.records for look in r["curve"]]
        return pandas.DataFrame(rows)

    def curve(self, method: str, column: str, learning_rate: float) -> pandas.DataFrame:
        """Mean and standard deviation over seeds of a column of `curves`, by step, as far as every seed was trained."""
        values = self._by_step(method, column, learning_rate)
        return pandas.DataFrame({"mean": values.mean(axis=1), "std": values.std(axis=1)})

    def divergence(self, first: str, second: str, column: str, learning_rate: float) -> int | None:
        """The first step at which two methods' curves differ by more than twice the standard error of the paired difference.

        None if there is no such step, or one seed alone.
        """
        gap = (self._by_step(first, column, learning_rate) - self._by_step(second, column, learning_rate)).dropna()
        if gap.shape[1] < 2:
            return None
        apart = gap.mean(axis=1).abs() > 2 * gap.std(axis=1) / math.sqrt(gap.shape[1])
        return int(apart.idxmax()) if apart.any() else None

    def _by_step(self, method: str, column: str, learning_rate: float) -> pandas.DataFrame:
        """Steps as rows, seeds as columns."""
        curves = self.curves()
        some = curves[(curves["method"] == method) & (curves["learning_rate"] == learning_rate)]
        return some.pivot(index="step", columns="seed", values=column).astype(float).dropna()


def _mean(values: Sequence[float | None]) -> float | None:
    """The mean; None where a run has no figure (no examples, or not finite)."""
    return None if any(value is None for value in values) else statistics.fmean(values)


def _table_row(name: str, figures: dict) -> dict:
    accuracy, gap = figures["accuracy"], figures["minus_gradmm"]
    return {
        "method": name,
        "n": figures["n"],
        "accuracy": accuracy["mean"],
        "std": accuracy["std"],
        "minus gradmm": None if gap is None else gap["mean"],
        "95% interval": "" if gap is None else f"{gap['low']:+.3f} to {gap['high']:+.3f}",
        "macro F1": figures["macro_f1"],
        **{key: figures[key] for key in MEASURES if figures[key] is not None or key != "second_perplexity"},
        **{f"cosine at step {step}": value for step, value in figures["similarity"].items()},
    }
