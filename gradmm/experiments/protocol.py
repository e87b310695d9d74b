"""Do synthetic examples replace real ones? Named methods at one budget, trained and judged by the same code.

Runs every method with every seed and keeps one record of each; reads real examples and keeps nothing private.
"""

import hashlib
import json
import math
import multiprocessing
import os
import pickle
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from gradmm import files
from gradmm.classification import Evaluation, check_fit, evaluate, evaluate_calibrated
from gradmm.data import Example, Splits, without_overlap
from gradmm.errors import UserError, is_whole, require, require_flag, require_type, short_repr
from gradmm.evaluation import text_tokens
from gradmm.experiments.baselines import CORESETS, METHODS, OF_REAL_TEXT, WRITING, check_budget, select_coresets
from gradmm.experiments.metrics import measure, measure_on, similarities, subsample
from gradmm.experiments.records import memory_bytes
from gradmm.experiments.results import Comparison
from gradmm.experiments.seed_run import ComparisonConfig, Experiment, SeedRun, candidates
from gradmm.files import lock
from gradmm.finetuning import finetune, looked_at
from gradmm.models import Model, ModelShape, require_model
from gradmm.progress import ticking
from gradmm.rows import SPLITS
from gradmm.runs import RunFolder, finite_row
from gradmm.tasks import Task, from_start

TUNING_COPIES = 6  # numbers a weight in a fine-tuning: as it came, as it is, gradient, two moments, and the best so far
BESIDE: dict[str, Any] = {
    "second": None,
    "learners": (),
    "pools": {},
    "workers": 1,
}  # settings that a folder's identity names apart


def compare(
    model: Model,
    task: Task,
    splits: Splits,
    config: ComparisonConfig | None = None,
    methods: Sequence[str] = tuple(METHODS),
    seeds: Sequence[int] = (0,),
    output: str | Path | None = None,
    progress: bool = True,
) -> Comparison:
    """Make each method's examples, train on them, and judge: every seed draws real examples, texts and batches anew.

    A script that asks for several workers needs the usual `if __name__ == "__main__"`.

    Args:
        model: it writes or chooses the examples.
        methods: names in METHODS.
        seeds: different whole numbers; runs of one seed are paired.
        output: a folder that receives one record for each method and seed, and the syntheses. What is finished there is
            read back and not done again; more methods or seeds may be asked for. None keeps everything in memory.
        progress: whether to show a progress bar, of runs (with several workers, of the runs that one does in one go).

    Raises:
        UserError: an argument of another type, an unknown method, repeated seeds, learners of one name, data that does
            not fit the task, the budget or a model (see `classification.check_fit`), or a folder with a comparison of
            other settings or another run at work.
    """
    begun, config = time.time(), ComparisonConfig() if config is None else config
    _check(model, splits, config, methods, seeds)
    require_flag(progress, "progress")
    seeds, workers = [int(seed) for seed in seeds], usual_workers(model) if config.workers is None else config.workers
    several = f"workers = {workers} on {model.device}: several are for the CPU, give 1"
    require(workers == 1 or model.device.type == "cpu", several)
    config = replace(config, pools={seed: candidates(rows, task) for seed, rows in config.pools.items()})
    splits = replace(splits, test=subsample(splits.test, 0, config.max_test))
    check_fit(model, task, splits, SPLITS)
    check_budget(task, splits.train, config.synthesis.n_synthetic, methods)
    _check_learners(model, task, splits, config.learners)
    if config.second is not None and set(methods) & set(OF_REAL_TEXT):
        _check_second(config.second, splits.train)
    with lock(output):
        folder = RunFolder.open(output, _identity(model, task, splits, config))
        settings = hashlib.sha256(json.dumps(folder.manifest, sort_keys=True).encode()).hexdigest()
        experiment = Experiment(model, task, splits, config, {}, settings, folder.path)
        if folder.path is not None:
            files.remove_unfinished(folder.path / "records")
        records = _records(experiment, methods, seeds, workers, progress)
        if folder.path is not None and not folder.finished:
            clock = {"seconds": round(time.time() - begun, 3)}
            files.write_json(folder.path / "manifest.json", {**folder.manifest, "status": "complete", "clock": clock})
    return Comparison(task, tuple(example.label for example in splits.test), records)


def usual_workers(model: Model) -> int:
    """Processes that share the runs where none are asked for: two fill two cores better than one with two threads.

    One on a GPU, with one thread, and where the memory does not hold two fine-tunings of the model.
    """
    if model.device.type != "cpu" or torch.get_num_threads() == 1:
        return 1
    shape = ModelShape.of(model)
    return 2 if 2 * TUNING_COPIES * shape.weights * shape.wide <= (memory_bytes() or math.inf) else 1


def _check(model: Model, splits: Splits, config: ComparisonConfig, methods: Any, seeds: Any) -> None:
    require_model(model)
    require_type(splits, Splits, "the splits", "give what gradmm.load_data returns")
    require_type(config, ComparisonConfig, "the config", "give a ComparisonConfig")
    for name, values in (("methods", methods), ("seeds", seeds)):
        listed = isinstance(values, Iterable) and not isinstance(values, str | bytes)
        require(listed, f"{name} are of type {type(values).__name__}: give a list")
    unknown = [name for name in methods if not isinstance(name, str) or name not in METHODS]
    require(not unknown and len(methods) > 0, f"the methods {unknown} are not known: use some of {', '.join(METHODS)}")
    require(len(set(methods)) == len(methods), f"methods = {list(methods)} names one twice: give each once")
    such, given = "give such as [0, 1, 2]", short_repr(list(seeds))
    require(all(map(is_whole, seeds)), f"seeds = {given}, they must be whole numbers: {such}")
    require(len(set(seeds)) == len(seeds) > 0, f"seeds = {given}, they must differ and be at least one: {such}")


def _check_learners(model: Model, task: Task, splits: Splits, learners: Sequence[Model]) -> None:
    names = [one.name for one in (model, *learners)]
    same = f"the models {', '.join(names)} must have different names: give each learner once"
    require(len(set(names)) == len(names), same)
    away = [one.name for one in learners if one.device != model.device]
    require(not away, f"the learners {', '.join(away)} are not on {model.device} as {model.name} is: load them there")
    for one in learners:
        try:
            check_fit(one, task, splits, SPLITS)  # now, not after hours of writing texts that it cannot learn from
        except UserError as error:
            raise UserError(f"{one.name} cannot learn this task: {error}") from error


def _check_second(second: Model, examples: Sequence[Example]) -> None:
    begun = len(from_start(second.tokenizer, [[]], least=2)[0])  # no text has more tokens than bytes behind these
    some = [example.text for example in examples if begun + len(example.text.encode()) > second.context]
    long = sum(len(one) > second.context for one in text_tokens(second, some))
    cause = f"the second model {second.name} reads {second.context} tokens, and {long} training text(s) have more"
    require(long == 0, f"{cause}: take another second model, or shorten them")


def _known(model: Model) -> dict[str, str]:
    """By what a model is known again; its fingerprint, of its files, is that of any type of weights."""
    return {"name": model.name, "fingerprint": model.fingerprint, "dtype": str(model.dtype).removeprefix("torch.")}


def _identity(model: Model, task: Task, splits: Splits, config: ComparisonConfig) -> dict:
    plain = asdict(replace(config, **BESIDE))
    parts = [[(example.text, example.label) for example in getattr(splits, name)] for name in SPLITS]
    second = config.second
    return {
        "config": {name: value for name, value in plain.items() if name not in BESIDE},
        "task": task.to_dict(),
        "model": {**_known(model), "revision": model.revision},
        "second": None if second is None else _known(second),
        "learners": [_known(one) for one in config.learners],
        "data": {"source": splits.source, "fingerprint": hashlib.sha256(repr(parts).encode()).hexdigest()},
    }


# ---------------------------------------------------------------- the runs, in one process or several


def _records(
    experiment: Experiment, methods: Sequence[str], seeds: Sequence[int], workers: int, progress: bool
) -> list[dict]:
    """The record of each method and seed: read back, or made now."""
    found = {(name, seed): experiment.load(name, seed) for name in methods for seed in seeds}
    missing = {seed: [name for name in methods if found[name, seed] is None] for seed in seeds}
    missing = {seed: names for seed, names in missing.items() if names}
    wanted = [name for name in CORESETS if any(name in names for names in missing.values())]
    if wanted:  # chosen once for all seeds
        train, count = experiment.splits.train, experiment.config.synthesis.n_synthetic
        chosen = select_coresets(experiment.model, experiment.task, train, count, wanted)
        experiment = replace(experiment, coresets=chosen)
    done = len(found) - sum(map(len, missing.values()))
    with tqdm(total=len(found), initial=done, desc="comparing", unit="run", disable=not progress) as bar, ticking(bar):
        for record in _made(experiment, missing, workers):
            found[record["method"], record["seed"]] = record
            bar.update(1)
            bar.set_postfix(method=record["method"], seed=record["seed"], accuracy=f"{record['accuracy']:.3f}")
    return [record for record in found.values() if record is not None]


def _made(experiment: Experiment, missing: dict[int, list[str]], workers: int) -> Iterator[dict]:
    """Records as they are finished: seed by seed, or by several processes."""
    if workers == 1 or not missing:
        for seed, names in missing.items():
            yield from _run_seed(experiment, names, seed)
        return
    # Two pieces of a seed that need nothing of each other: the methods that share a synthesis, and the others.
    pieces = [([name for name in names if name in WRITING], seed) for seed, names in missing.items()]
    pieces += [([name for name in names if name not in WRITING], seed) for seed, names in missing.items()]
    pieces.sort(key=lambda piece: -len(piece[0]))  # the longest first, so that no process waits long for the last one
    threads = max(1, torch.get_num_threads() // workers)
    # Sent once to each, as bytes: sent with each piece, every weight would be a file in shared memory of its own.
    shared = (threads, pickle.dumps(experiment))
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _begin_worker, shared)
    try:
        started = [pool.submit(_run_all, names, seed) for names, seed in pieces if names]
        for future in as_completed(started):
            yield from future.result()
    finally:
        pool.shutdown(cancel_futures=True)  # after an error no other piece is begun


_shared: list[Experiment] = []  # of a worker, the one that it runs


def _begin_worker(threads: int, experiment: bytes) -> None:
    torch.set_num_threads(threads)
    _shared[:] = [pickle.loads(experiment)]  # our own parent's
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A worker whose parent was killed would wait for work, and hold its memory, for ever."""
    if (parent := multiprocessing.parent_process()) is not None:
        parent.join()
        os._exit(1)


def _run_all(methods: Sequence[str], seed: int) -> list[dict]:
    return list(_run_seed(_shared[0], methods, seed))


def _run_seed(experiment: Experiment, methods: Sequence[str], seed: int) -> Iterator[dict]:
    """All examples first, so that one training serves every gradient similarity; then one method after the other."""
    seed_run = SeedRun(experiment, seed)
    made = {name: METHODS[name](seed_run) for name in methods}
    sets = {name: without_overlap(examples, experiment.splits.test) for name, examples in made.items()}
    measured = {name: subsample(examples, seed) for name, examples in sets.items()}
    alike = similarities(seed_run, measured)
    for name, examples in sets.items():
        record: dict[str, Any] = {"method": name, "seed": seed, "settings": experiment.settings, "n": len(examples)}
        record["in_test"] = len(made[name]) - len(examples)  # written by chance as they stand in the test set, left out
        record |= _trained(seed_run, experiment.model, examples)
        record |= finite_row(measure(seed_run, measured[name]))
        record["similarity"] = finite_row(alike[name])
        record["elsewhere"] = {
            one.name: _trained(seed_run, one, examples) | finite_row(measure_on(one, seed_run, measured[name]))
            for one in experiment.config.learners
        }
        experiment.save(record)
        yield record


def _trained(seed_run: SeedRun, model: Model, examples: Sequence[Example]) -> dict:
    """The figures of a model's fine-tuning, or of the model as it came where there are no examples."""
    experiment, splits = seed_run.experiment, seed_run.experiment.splits
    chosen: dict[str, Any] = {"learning_rate": None, "step": 0, "validation_accuracy": None, "curve": []}
    config = replace(experiment.config.finetuning, seed=seed_run.seed)
    if examples:
        found = finetune(model, experiment.task, examples, splits.validation, splits.test, config, progress=False)
        test, calibrated = found.test, found.calibrated
        chosen["curve"] = [finite_row(row) for row in found.curve]
        chosen |= {name: getattr(found, name) for name in ("learning_rate", "step", "validation_accuracy")}
    else:
        texts = [example.text for example in looked_at(splits.validation, experiment.task, config)]
        test = evaluate(model, experiment.task, splits.test)
        calibrated = evaluate_calibrated(model, experiment.task, splits.test, texts)
    return {**_figures(test), **chosen, "calibrated": _figures(calibrated)}


def _figures(found: Evaluation) -> dict:
    return {"accuracy": found.accuracy, "macro_f1": found.macro_f1, "predictions": list(found.predictions)}
