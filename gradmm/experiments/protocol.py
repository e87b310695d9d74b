"""Do synthetic examples replace real ones? Named methods at one budget, trained and judged by the same code.

Runs every method with every seed and keeps one record of each; reads real examples and keeps nothing private.
"""

import hashlib
import json
import math
import multiprocessing
import os
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, replace
from pathlib import Path

import torch
from tqdm.auto import tqdm

from gradmm import files
from gradmm.classification import check_fit, evaluate
from gradmm.data import Example, Splits, check_examples, without_overlap
from gradmm.errors import UserError, is_whole, require, require_flag, require_type, short_repr
from gradmm.experiments.baselines import CORESETS, METHODS, WRITING, select_coresets
from gradmm.experiments.metrics import measure, measure_on, similarities, subsample
from gradmm.experiments.records import memory_bytes
from gradmm.experiments.results import Comparison
from gradmm.experiments.seed_run import ComparisonConfig, Experiment, SeedRun
from gradmm.files import lock
from gradmm.finetuning import finetune
from gradmm.models import Model, require_model
from gradmm.plan import ModelShape
from gradmm.rows import SPLITS
from gradmm.runs import RunFolder, finite_or_none
from gradmm.tasks import Task

TUNING_COPIES = 6  # numbers a weight in a fine-tuning: as it came, as it is, gradient, two moments, and the best so far


def compare(
    model: Model,
    task: Task,
    splits: Splits,
    config: ComparisonConfig | None = None,
    methods: Sequence[str] = tuple(METHODS),
    seeds: Sequence[int] = (0,),
    output: str | Path | None = None,
    progress: bool = True,
    workers: int | None = 1,
    second: Model | None = None,
    learners: Sequence[Model] = (),
    pools: Mapping[int, Iterable] | None = None,
) -> Comparison:
    """Make each method's examples, train on them, and judge: every seed draws real examples, texts and batches anew.

    Args:
        methods: names in METHODS.
        seeds: different whole numbers; runs of one seed are paired.
        output: a folder that receives one record for each method and seed, and the syntheses. What is finished there is
            read back and not done again; more methods or seeds may be asked for. None keeps everything in memory.
        progress: whether to show a progress bar, of runs (with several workers, of the runs that one does in one go).
        workers: processes on the CPU that share the runs and the threads; None takes two on a CPU where torch has two
            threads or more, else one. A script that asks for several needs the usual `if __name__ == "__main__"`.
            Results are equal to the last bit where the number of threads of each is.
        second: another model for a second perplexity.
        learners: further models, of any architecture and tokenizer, that are trained and judged on the same examples,
            which `model` wrote or chose; see `Comparison.on`.
        pools: for each seed the texts that these settings would write, if another comparison or synthesis wrote them,
            kept or not: gradmm chooses from them. Others would make other results without a word.

    Returns:
        Comparison.

    Raises:
        UserError: an argument of another type, an unknown method, repeated seeds, learners of one name, data that does
            not fit the task or a model (see `classification.check_fit`), or a folder with a comparison of other
            settings or another run at work.
    """
    _check_types(model, splits, config, methods, seeds, progress, second, learners, pools)
    begun, config = time.time(), config or ComparisonConfig()
    workers = usual_workers(model) if workers is None else workers
    _check(model, methods, seeds, workers)
    seeds = [int(seed) for seed in seeds]
    pools = {seed: _candidates(rows, task) for seed, rows in (pools or {}).items()}
    splits = replace(splits, test=subsample(splits.test, 0, config.max_test))
    check_fit(model, task, splits, SPLITS)
    _check_learners(model, task, splits, learners)
    with lock(output):
        folder = RunFolder.open(output, _identity(model, task, splits, config, second, learners))
        settings = hashlib.sha256(json.dumps(folder.manifest, sort_keys=True).encode()).hexdigest()
        experiment = Experiment(model, task, splits, config, {}, settings, folder.path, second, tuple(learners), pools)
        if folder.path is not None:
            files.remove_unfinished(folder.path / "records")
        records = {(name, seed): experiment.load(name, seed) for seed in seeds for name in methods}
        missing = {seed: [name for name in methods if records[name, seed] is None] for seed in seeds}
        for record in _run(
            _with_coresets(experiment, missing),
            {seed: names for seed, names in missing.items() if names},
            len(records),
            progress,
            workers,
        ):
            records[record["method"], record["seed"]] = record
        if folder.path is not None and (any(missing.values()) or not folder.finished):
            clock = {"seconds": round(time.time() - begun, 3)}
            files.write_json(folder.path / "manifest.json", {**folder.manifest, "status": "complete", "clock": clock})
    return Comparison(
        task,
        tuple(example.label for example in splits.test),
        [records[name, seed] for name in methods for seed in seeds],
    )


def usual_workers(model: Model) -> int:
    """Processes that share the runs where none are asked for: two fill two cores better than one with two threads.

    One on a GPU, with one thread, and where the memory does not hold two fine-tunings of the model.
    """
    if model.device.type != "cpu" or torch.get_num_threads() == 1:
        return 1
    shape = ModelShape.of(model)
    return 2 if 2 * TUNING_COPIES * shape.weights * shape.wide <= (memory_bytes() or math.inf) else 1


def _with_coresets(experiment: Experiment, missing: dict[int, list[str]]) -> Experiment:
    """The experiment with the coresets that are needed, chosen once for all seeds."""
    wanted = [name for name in CORESETS if any(name in names for names in missing.values())]
    if not wanted:
        return experiment
    return replace(
        experiment,
        coresets=select_coresets(
            experiment.model, experiment.task, experiment.splits.train, experiment.config.synthesis.n_synthetic, wanted
        ),
    )


def _check_types(model, splits, config, methods, seeds, progress, second, learners, pools) -> None:
    for one in (model, *([] if second is None else [second]), *learners):
        require_model(one)
    require_type(splits, Splits, "the splits", "give what gradmm.load_data returns")
    require_type(config, ComparisonConfig | None, "the config", "give a ComparisonConfig")
    for name, values in (("methods", methods), ("seeds", seeds)):
        listed = isinstance(values, Iterable) and not isinstance(values, str | bytes)
        require(listed, f"{name} are of type {type(values).__name__}: give a list")
    require_type(pools, Mapping | None, "the pools", "give a mapping from seeds to texts")
    require_flag(progress, "progress")


def _candidates(rows: Iterable, task: Task) -> list[Example]:
    """A pool as Examples: the texts to choose from, whether or not another choice kept them; none that is empty."""
    rows = [row if isinstance(row, Example) else {**row, "kept": True} for row in rows]
    return check_examples((row for row in rows if isinstance(row, Example) or row.get("text")), task, "pool text")


def _check(model: Model, methods: Sequence[str], seeds: Sequence[int], workers: int) -> None:
    unknown = [name for name in methods if not isinstance(name, str) or name not in METHODS]
    require(not unknown and len(methods) > 0, f"the methods {unknown} are not known: use some of {', '.join(METHODS)}")
    require(len(set(methods)) == len(methods), f"methods = {list(methods)} names one twice: give each once")
    require(
        all(map(is_whole, seeds)),
        f"seeds = {short_repr(list(seeds))}, they must be whole numbers: give such as [0, 1, 2]",
    )
    require(
        len(set(seeds)) == len(seeds) > 0,
        f"seeds = {list(seeds)}, they must differ and be at least one: give such as [0, 1, 2]",
    )
    require(
        is_whole(workers) and workers >= 1,
        f"workers = {workers!r}, it must be a whole number of at least 1: give 1 or 2",
    )
    require(
        workers == 1 or model.device.type == "cpu",
        f"workers = {workers} on {model.device}: several are for the CPU, give 1",
    )


def _check_learners(model: Model, task: Task, splits: Splits, learners: Sequence[Model]) -> None:
    names = [one.name for one in (model, *learners)]
    require(
        len(set(names)) == len(names),
        f"the models {', '.join(names)} must have different names: give each learner once",
    )
    away = [one.name for one in learners if one.device != model.device]
    require(not away, f"the learners {', '.join(away)} are not on {model.device} as {model.name} is: load them there")
    for one in learners:
        try:
            check_fit(one, task, splits, SPLITS)  # now, not after hours of writing texts that it cannot learn from
        except UserError as error:
            raise UserError(f"{one.name} cannot learn this task: {error}") from error


def _identity(
    model: Model, task: Task, splits: Splits, config: ComparisonConfig, second: Model | None, learners: Sequence[Model]
) -> dict:
    parts = [
        [(example.text, example.label) for example in some] for some in (splits.train, splits.validation, splits.test)
    ]
    return {
        "config": asdict(config),
        "task": task.to_dict(),
        "model": {"name": model.name, "revision": model.revision, "fingerprint": model.fingerprint},
        "second": None if second is None else {"name": second.name, "fingerprint": second.fingerprint},
        "learners": [{"name": one.name, "fingerprint": one.fingerprint} for one in learners],
        "data": {"source": splits.source, "fingerprint": hashlib.sha256(repr(parts).encode()).hexdigest()},
    }


def _run(
    experiment: Experiment, pending: dict[int, list[str]], total: int, progress: bool, workers: int
) -> Iterator[dict]:
    """The records that are missing, as they are finished."""
    missing = sum(map(len, pending.values()))
    with tqdm(total=total, initial=total - missing, desc="comparing", unit="run", disable=not progress) as bar:
        for records in _seeds(experiment, pending, workers) if missing else ():
            for record in records:
                bar.update(1)
                bar.set_postfix(method=record["method"], seed=record["seed"], accuracy=f"{record['accuracy']:.3f}")
                yield record


def _seeds(
    experiment: Experiment, pending: dict[int, list[str]], workers: int
) -> Iterator[Iterator[dict] | list[dict]]:
    """The records of one seed after the other, or of a seed's methods that share a synthesis, and of its others."""
    if workers == 1:
        yield from (_run_seed(experiment, names, seed) for seed, names in pending.items())
        return
    threads = max(1, torch.get_num_threads() // workers)
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _begin_worker, (threads,)) as pool:
        pieces = [(part, seed) for seed, names in pending.items() for part in _apart(names) if part]
        pieces.sort(
            key=lambda piece: -len(piece[0])
        )  # the longest first, so that no process waits long for the last one
        started = [pool.submit(_run_all, experiment, part, seed) for part, seed in pieces]
        for future in as_completed(started):
            yield future.result()


def _begin_worker(threads: int) -> None:
    torch.set_num_threads(threads)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A worker whose parent was killed would wait for work, and hold its memory, for ever."""
    multiprocessing.parent_process().join()
    os._exit(1)


def _apart(methods: Sequence[str]) -> tuple[list[str], list[str]]:
    """The methods that share a synthesis, and the others: two pieces of work that need nothing of each other."""
    return [name for name in methods if name in WRITING], [name for name in methods if name not in WRITING]


def _run_all(experiment: Experiment, methods: Sequence[str], seed: int) -> list[dict]:
    return list(_run_seed(experiment, methods, seed))


def _run_seed(experiment: Experiment, methods: Sequence[str], seed: int) -> Iterator[dict]:
    """All examples first, so that one training serves every gradient similarity; then one method after the other."""
    seed_run = SeedRun(experiment, seed)
    made = {name: METHODS[name](seed_run) for name in methods}
    sets = {name: without_overlap(examples, experiment.splits.test) for name, examples in made.items()}
    measured = {name: subsample(examples, seed) for name, examples in sets.items()}
    alike = similarities(seed_run, measured)
    for name, examples in sets.items():
        record = {"method": name, "seed": seed, "settings": experiment.settings, "n": len(examples)}
        record["in_test"] = len(made[name]) - len(
            examples
        )  # written by chance as they stand in the test set, and left out
        record |= _trained(seed_run, experiment.model, examples)
        record |= _finite(measure(seed_run, measured[name]))
        record["similarity"] = _finite(alike[name])
        record["elsewhere"] = {
            one.name: _trained(seed_run, one, examples) | _finite(measure_on(one, seed_run, measured[name]))
            for one in experiment.learners
        }
        if experiment.folder is not None:
            files.write_json(experiment.place(name, seed), record)
        yield record


def _finite(values: dict) -> dict:
    return {key: finite_or_none(value) for key, value in values.items()}


def _trained(seed_run: SeedRun, model: Model, examples: Sequence[Example]) -> dict:
    """The figures of a model's fine-tuning, or of the model as it came where there are no examples."""
    experiment, splits = seed_run.experiment, seed_run.experiment.splits
    if not examples:
        test = evaluate(model, experiment.task, splits.test)
        chosen = {"learning_rate": None, "step": 0, "validation_accuracy": None, "curve": []}
    else:
        config = replace(experiment.config.finetuning, seed=seed_run.seed)
        found = finetune(model, experiment.task, examples, splits.validation, splits.test, config, progress=False)
        test, curve = found.test, [_finite(row) for row in found.curve]
        chosen = {"learning_rate": found.learning_rate, "step": found.step}
        chosen |= {"validation_accuracy": found.validation_accuracy, "curve": curve}
    return {"accuracy": test.accuracy, "macro_f1": test.macro_f1, "predictions": list(test.predictions), **chosen}
