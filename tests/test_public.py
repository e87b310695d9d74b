"""Every public function: wrong types and ranges are one sentence before any work, and rows of any kind go in alike."""

import functools
import math
from dataclasses import replace

import datasets
import huggingface_hub
import numpy
import pandas
import pytest
import torch
from test_finetuning import QUICK, toy
from test_protocol import CONFIG, TWO, splits_of
from test_synthesis import REAL, SMALL, TASK

import gradmm
from gradmm.classification import check_fit, evaluate_calibrated
from gradmm.config import PRESETS
from gradmm.data import check_examples
from gradmm.errors import UserError, is_number, is_whole
from gradmm.experiments import audit
from gradmm.experiments.baselines import select_coresets
from gradmm.experiments.metrics import distinct_n
from gradmm.experiments.protocol import compare
from gradmm.experiments.seed_run import ComparisonConfig, candidates
from gradmm.generation import Sampling, generate_texts
from gradmm.mechanism import CALIBRATIONS
from gradmm.models import Model

SECRET = "zebra"
PRIVATE = [
    {"text": f"the {SECRET} was {word}", "label": label}
    for word, label in (("good", 1), ("bad", 0), ("fine", 1), ("dull", 0))
]
FRAME = pandas.DataFrame(PRIVATE)
NAN, INF = math.nan, math.inf
HELD: dict = {}


@pytest.fixture(scope="module", autouse=True)
def setting(tiny_model):
    model = tiny_model("llama", dtype=torch.float32)
    HELD.update(model=model, release=gradmm.release(model, TASK, REAL, space="head"))


def released(model=None, task=TASK, examples=PRIVATE, **options):
    return gradmm.release(model or HELD["model"], task, examples, **options)


def private(**options):
    return released(**{"epsilon": 1.0, "delta": 1e-5, "length": 5, **options})


def kept(**options):
    given = {"folder": "kept", "model": HELD["model"], "task": TASK, "examples": PRIVATE, "source": {"data": "toy"}}
    return gradmm.release_once(**{**given, "epsilon": 1.0, "delta": 1e-5, "length": 5, **options})


def written(release=None, **options):
    given = {"model": HELD["model"], "task": TASK, "config": SMALL, "progress": False, **options}
    return gradmm.synthesize(release=HELD["release"] if release is None else release, **given)


def tuned(**options):
    sets = {"train": PRIVATE, "validation": REAL, "test": toy(TWO, 30, 2)}
    return gradmm.finetune(
        **{"model": HELD["model"], "task": TASK, "config": QUICK, "progress": False, **sets, **options}
    )


def fitted(**options):
    sets = {"train": PRIVATE, "validation": REAL}
    return gradmm.fit(**{"model": HELD["model"], "task": TASK, "config": QUICK, **sets, **options})


def judged(**options):
    return gradmm.evaluate(**{"model": HELD["model"], "task": TASK, "examples": PRIVATE, **options})


def drawn(**options):
    return gradmm.sample_examples(**{"examples": PRIVATE, "n": 2, "task": TASK, "seed": 0, **options})


def compared(**options):
    given = {
        "model": HELD["model"], "task": TWO, "splits": splits_of(TWO), "config": CONFIG, "methods": ("none",),
        "progress": False,
    }  # fmt: skip
    return compare(**{**given, **options})


def generated(**options):
    return generate_texts(**{"model": HELD["model"], "task": TASK, "n_per_class": 1, "seed": 0, **options})


# what is called, and how it is wrong -> (the call, words of the message)
CASES = {
    # the front door
    "load_model: a number": (lambda: gradmm.load_model(5), "the model is 5: give a hub id"),
    "load_model: a model": (lambda: gradmm.load_model(HELD["model"]), "give a hub id, a folder, or demo"),
    "load_model: revision": (lambda: gradmm.load_model("demo", revision=3),
        "the revision is of type int: give a hub commit"),
    "load_model: progress": (lambda: gradmm.load_model("demo", progress="no"), "progress = 'no', it must be True or"),
    "load_model: device": (lambda: gradmm.load_model("demo", device=0.5),
        "the device is of type float: use cpu, cuda or auto"),
    "load_model: dtype": (lambda: gradmm.load_model("demo", dtype=16), "the dtype is of type int: use one of float32"),
    "load_model: dtype of numpy": (lambda: gradmm.load_model("demo", dtype=numpy.float32),
        "the dtype is of type type: use one of float32"),
    "Model: text too long": (lambda: judged(examples=[("x" * 9, 1)]),
        "test example 1 is tuple: give an object with text and label"),
    "load_task: a number": (lambda: gradmm.load_task(3), "the task is 3: give a path or a name as text"),
    "load_task: a list": (lambda: gradmm.load_task(["sst2"]), "give a path or a name as text"),
    "load_data: rows": (lambda: gradmm.load_data(PRIVATE), "the data is"),
    "load_data: a task of numbers": (lambda: gradmm.load_data("demo", 3), "the task is 3"),
    "Task: labels": (lambda: gradmm.Task("t", "ab", (" a", " b")), "task 't': labels = 'ab': give a list of strings"),
    "Task: hub": (lambda: replace(TASK, hub="sst2"), "task 'toy': hub = 'sst2': give a HubSource"),
    "Task: min_words": (lambda: replace(TASK, min_words=1.5), "'toy': min_words = 1.5, it must be a whole number"),
    "Task: min_words true": (lambda: replace(TASK, min_words=True), "min_words = True, it must be a whole number"),
    "TASKS: for a task": (lambda: released(task=gradmm.TASKS), "the task is of type dict: give what gradmm.load_task"),
    "Splits: of a dict": (lambda: check_fit(HELD["model"], TASK, {"train": PRIVATE}),
        "of type dict: give what gradmm.load_data returns"),
    "Example: a number for a text": (lambda: judged(examples=[gradmm.Example(7, 0)]),
        "test example 1 has a text of type int"),
    "Example: a fraction for a label": (lambda: judged(examples=[gradmm.Example("the cat", 0.5)]),
        "test example 1 has the label 0.5"),
    # drawing
    "sample_examples: a text": (lambda: drawn(examples=f"the {SECRET}"), "the rows are of type str: give a list"),
    "sample_examples: a frame": (lambda: drawn(examples=FRAME), "of type DataFrame: give a list of objects"),
    "sample_examples: one row": (lambda: drawn(examples=PRIVATE[0]), "the rows are of type dict: give a list"),
    "sample_examples: n": (lambda: drawn(n=2.0), "n_real = 2.0 is not a whole number"),
    "sample_examples: n true": (lambda: drawn(n=True), "n_real = True is not a whole number"),
    "sample_examples: task": (lambda: drawn(task="sst2"), "the task is of type str: give what gradmm.load_task"),
    "sample_examples: seed": (lambda: drawn(seed="0"), "seed = '0', it must be a whole number"),
    "sample_examples: seed of a fraction": (lambda: drawn(seed=0.5), "seed = 0.5, it must be a whole number"),
    # releases
    "release: model": (lambda: released(model="demo"), "the model is of type str: give what gradmm.load_model returns"),
    "release: task": (lambda: released(task="sst2"), "the task is of type str: give what gradmm.load_task"),
    "release: examples": (lambda: released(examples=f"the {SECRET} was good"), "the rows are of type str: give a list"),
    "release: texts": (lambda: released(examples=[row["text"] for row in PRIVATE]),
        "example 1 is str: give an object with text and label"),
    "release: swapped": (lambda: released(task=PRIVATE, examples=TASK), "the task is of type list: give"),
    "release: epsilon true": (lambda: private(epsilon=True), "epsilon = True, it must be positive and finite"),
    "release: epsilon negative": (lambda: private(epsilon=-1), "epsilon = -1, it must be positive and finite"),
    "release: epsilon nan": (lambda: private(epsilon=NAN), "epsilon = nan, it must be positive and finite"),
    "release: epsilon of numpy, infinite": (lambda: private(epsilon=numpy.float64(INF)),
        "it must be positive and finite"),
    "release: delta a half": (lambda: private(delta=0.5), "delta = 0.5, it must be above 0 and at most 0.01"),
    "release: delta in words": (lambda: private(delta="1e-5"), "delta = '1e-5', it must be above 0 and at most 0.01"),
    "release: delta nothing": (lambda: private(delta=0), "delta = 0, it must be above 0 and at most 0.01"),
    "release: clip": (lambda: private(clip=-1.0), "clip = -1.0, it must lie between"),
    "release: clip without epsilon": (lambda: released(clip=0), "clip = 0, it must lie between"),
    "release: clip true": (lambda: private(clip=True), "clip = True, it must lie between"),
    "release: relation": (lambda: private(relation=["replace-one"]), "the relation ['replace-one'] is not known"),
    "release: calibration": (lambda: private(calibration=CALIBRATIONS), "is not known: use one of exact"),
    "release: length 0": (lambda: private(length=0), "length = 0, it must be a whole number of at least 1"),
    "release: length of a fraction": (lambda: private(length=2.5),
        "length = 2.5, it must be a whole number of at least 1"),
    "release: length true": (lambda: released(length=True), "length = True, it must be a whole number"),
    "release: space": (lambda: released(space=5), "the release space 5 is not known: use one of head"),
    "release: public_texts": (lambda: released(space="body", public_texts="some words"),
        "public_texts are of type str: give a list of texts"),
    "release: public_texts of rows": (lambda: released(space="body", public_texts=PRIVATE),
        "public_texts hold something of type dict"),
    "release: directions": (lambda: released(space="label_rows_subspace", public_texts=["a"], directions=True),
        "directions = True"),
    "release: ledger": (lambda: private(ledger="x.json"), "the ledger is of type str: give a gradmm.Ledger"),
    "release: noise_seed": (lambda: private(noise_seed=1.5), "noise_seed = 1.5, it must be a whole number"),
    "release: noise_seed true": (lambda: private(noise_seed=True), "noise_seed = True, it must be a whole number"),
    "release: cache": (lambda: released(space="body", cache=5), "the cache is 5: give a path"),
    "release: progress": (lambda: released(progress="no"), "progress = 'no', it must be True or False"),
    "release: config": (lambda: released(config={"epsilon": 1.0}), "the config is of type dict: give a gradmm.Release"),
    "release: a setting": (lambda: released(epsilonn=1.0), "unknown setting 'epsilonn': the settings are calibration"),
    "ReleaseConfig: epsilon alone": (lambda: gradmm.ReleaseConfig(epsilon=1.0), "epsilon = 1.0 without a length"),
    "ReleaseConfig: no delta": (lambda: gradmm.ReleaseConfig(epsilon=1.0, length=3), "epsilon = 1.0 without delta"),
    "prompt_completion: rows": (lambda: gradmm.prompt_completion(TASK, "text"), "the rows are of type str"),
    "prompt_completion: task": (lambda: gradmm.prompt_completion("demo", PRIVATE), "the task is of type str"),
    "load_model: a device map": (lambda: gradmm.load_model("demo", device_map="auto"), "device_map = 'auto', but"),
    "wrap_model: a name": (lambda: gradmm.wrap_model("demo", None), "the model is of type str: give a causal language"),
    "load_data: a column": (lambda: gradmm.load_data("demo", text=1), "a column's name is of type int"),
    "release_once: model": (lambda: kept(model="demo"), "the model is of type str"),
    "release_once: task": (lambda: kept(task="sst2"), "the task is of type str"),
    "release_once: source": (lambda: kept(source="demo"), "source is of type str: give public facts"),
    "release_once: folder": (lambda: kept(folder=3), "the folder of the release is 3: give a path"),
    "preset: another spelling": (lambda: gradmm.preset("ADMM"), "did you mean admm?"),
    "preset: a config": (lambda: gradmm.preset(SMALL), "is not known: "),
    "preset: a setting": (lambda: gradmm.preset("admm", steps=3), "unknown setting 'steps'"),
    "load_release: a number": (lambda: gradmm.load_release(3), "the Release is 3: give a path"),
    "Release: saved to a number": (lambda: HELD["release"].save(3), "the Release is 3: give a path"),
    "Ledger: delta a half": (lambda: gradmm.Ledger(1.0, 0.5), "delta = 0.5, it must be above 0 and at most 0.01"),
    "Ledger: epsilon": (lambda: gradmm.Ledger("1", 1e-5), "epsilon = '1', it must be positive and finite"),
    "Ledger: entries": (lambda: gradmm.Ledger(1.0, 1e-5, "x.json"),
        "the ledger's entries is of type str: give the `ledger`"),
    "Ledger: dicts for entries": (lambda: gradmm.Ledger(1.0, 1e-5, [{}]),
        "the expense is of type dict: give a LedgerEntry"),
    # syntheses
    "synthesize: config": (lambda: written(config="pool"),
        "the config is of type str: give a gradmm.SynthesisConfig, such as gradmm.PRESETS['pool']"),
    "synthesize: another config": (lambda: written(config=QUICK),
        "the config is of type FinetuneConfig: give a gradmm.SynthesisConfig"),
    "synthesize: release": (lambda: written(release=PRIVATE), "synthesize was given list where a Release belongs"),
    "synthesize: model": (lambda: written(model="demo"), "the model is of type str"),
    "synthesize: task": (lambda: written(task="demo"), "the task is of type str"),
    "synthesize: output": (lambda: written(output=123), "the output folder is 123: give a path"),
    "synthesize: progress": (lambda: written(progress="no"), "progress = 'no', it must be True or False"),
    "synthesize: on_step": (lambda: written(on_step=5), "on_step is of type int: give a function"),
    "SynthesisResult: for its texts": (lambda: judged(examples=gradmm.SynthesisResult(None, None, {})),
        "the rows are of type SynthesisResult"),
    "PRESETS: for a config": (lambda: written(config=PRESETS),
        "the config is of type dict: give a gradmm.SynthesisConfig"),
    "SynthesisConfig: seed true": (lambda: replace(SMALL, seed=True), "seed = True, it must be a whole number"),
    "FinetuneConfig: numpy's true": (lambda: gradmm.FinetuneConfig(autocast=numpy.bool_(True)),
        "it must be True or False"),
    "SynthesisConfig: rho": (lambda: replace(SMALL, rho=numpy.float32(NAN)),
        "rho = nan, it must be a finite number above 0"),
    # fine-tuning and judging
    "finetune: config": (lambda: tuned(config=SMALL),
        "the config is of type SynthesisConfig: give a gradmm.FinetuneConfig"),
    "finetune: model": (lambda: tuned(model="demo"), "the model is of type str"),
    "finetune: task": (lambda: tuned(task=TASK.to_dict()), "the task is of type dict"),
    "finetune: train": (lambda: tuned(train=FRAME), "of type DataFrame: give a list of objects"),
    "finetune: validation": (lambda: tuned(validation=None), "the rows are of type NoneType: give a list"),
    "finetune: nothing": (lambda: tuned(train=[]), "there are 0 train examples"),
    "finetune: output": (lambda: tuned(output=123), "the output folder is 123: give a path"),
    "finetune: progress": (lambda: tuned(progress=print),
        "progress = <built-in function print>, it must be True or False"),
    "finetune: on_look": (lambda: tuned(on_look=True), "on_look is of type bool: give a function"),
    "fit: config": (lambda: fitted(config=SMALL), "is of type SynthesisConfig: give a gradmm.FinetuneConfig"),
    "fit: model": (lambda: fitted(model="demo"), "the model is of type str"),
    "fit: on_look": (lambda: fitted(on_look=True), "on_look is of type bool: give a function"),
    "FinetuneConfig: steps": (lambda: replace(QUICK, steps=numpy.float64(3)),
        "it must be a whole number of at least 1"),
    "FinetuneConfig: numpy's false": (lambda: replace(QUICK, autocast=numpy.bool_(False)), "it must be True or False"),
    "evaluate: model": (lambda: judged(model="demo"), "the model is of type str"),
    "evaluate: examples": (lambda: judged(examples=f"the {SECRET}"), "the rows are of type str"),
    "evaluate: splits": (lambda: judged(examples=splits_of(TWO)), "the rows are of type Splits: give a list"),
    "evaluate: tokens": (lambda: judged(tokens_per_batch="many"),
        "tokens_per_batch = 'many', it must be a whole number of at least 1"),
    "check_fit: model": (lambda: check_fit("demo", TASK, splits_of(TWO)), "the model is of type str"),
    # the rooms behind the door
    "evaluate_calibrated: one text": (lambda: evaluate_calibrated(HELD["model"], TASK, PRIVATE, f"the {SECRET}"),
        "are of type str: give a list of texts"),
    "evaluate_calibrated: rows": (lambda: evaluate_calibrated(HELD["model"], TASK, PRIVATE, PRIVATE),
        "hold something of type dict: give a list of texts"),
    "generate_texts: model": (lambda: generated(model="demo"), "the model is of type str"),
    "generate_texts: n": (lambda: generated(n_per_class=1.5),
        "n_per_class = 1.5, it must be a whole number of at least 1"),
    "generate_texts: sampling": (lambda: generated(sampling={}), "sampling is of type dict: give a Sampling"),
    "generate_texts: shots": (lambda: generated(shots=[row["text"] for row in PRIVATE]),
        "shot 1 is str: give an object"),
    "generate_texts: seed": (lambda: generated(seed="0"), "seed = '0', it must be a whole number"),
    "compare: splits": (lambda: compared(splits={"train": PRIVATE}),
        "of type dict: give what gradmm.load_data returns"),
    "compare: config": (lambda: compared(config=SMALL),
        "the config is of type SynthesisConfig: give a ComparisonConfig"),
    "compare: methods": (lambda: compared(methods="gradmm"), "methods are of type str: give a list"),
    "compare: a method of a list": (lambda: compared(methods=[["gradmm"]]), "are not known: use some of"),
    "compare: seeds": (lambda: compared(seeds=3), "seeds are of type int: give a list"),
    "ComparisonConfig: pools": (lambda: ComparisonConfig(pools=PRIVATE), "the pools is of type list: give a mapping"),
    "ComparisonConfig: learners": (lambda: ComparisonConfig(learners=["demo"]), "the model is of type str"),
    "compare: output": (lambda: compared(output=1.5), "the output folder is 1.5: give a path"),
    "ComparisonConfig: synthesis": (lambda: ComparisonConfig(synthesis="pool"),
        "a comparison's synthesis is of type str: give a SynthesisConfig"),
    "audit_mechanism: entry": (lambda: audit.audit_mechanism("x.json"), "the entry is of type str: give an entry"),
    "attack_texts: rows": (lambda: audit.attack_texts(PRIVATE, ["a"], ["b"]),
        "the synthetic texts hold something of type dict"),
    "loss_scores: frame": (lambda: audit.loss_scores(HELD["model"], TASK, FRAME),
        "of type DataFrame: give a list of objects"),
    "select_coresets: n": (lambda: select_coresets(HELD["model"], TASK, PRIVATE, 2.5, ["herding"]),
        "n = 2.5, it must be a whole number"),
    "distinct_n: n true": (lambda: distinct_n(["a b"], True), "n = True, it must be a whole number of at least 1"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_it_is_one_sentence_before_any_work_without_a_real_text(case, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for pass_of_the_model in ("body", "read"):
        monkeypatch.setattr(Model, pass_of_the_model, lambda *given, **more: pytest.fail("the model ran"))
    act, words = CASES[case]
    with pytest.raises(UserError) as caught:
        act()
    message = str(caught.value)
    assert words in message and "\n" not in message and len(message) < 400
    assert ": " in message and SECRET not in message
    assert not list(tmp_path.rglob("*"))


def test_every_public_name_is_in_the_table():
    named = {case.split(":")[0] for case in CASES}
    carriers = {"DataWarning", "UserError"}  # what is raised and said, and takes nothing of a user
    assert set(gradmm.__all__) - carriers <= named and len(CASES) >= 60


# ---------------------------------------------------------------- numpy's numbers


def test_numpy_s_numbers_are_numbers_and_its_bools_are_none():
    assert all(map(is_whole, (numpy.int64(3), numpy.int8(-1), numpy.uint64(7), 3)))
    assert not any(map(is_whole, (numpy.bool_(True), numpy.float64(3.0), numpy.str_("3"), numpy.array([1]))))
    assert all(map(is_number, (numpy.float32(0.5), numpy.float64(-1), numpy.int16(2))))
    assert not any(map(is_number, (numpy.bool_(False), numpy.float32(INF), numpy.float64(NAN), "1", None, 10**400)))


def test_settings_of_numpy_are_settings_of_python():
    ours, theirs = replace(SMALL, seed=3, rho=0.5), replace(SMALL, seed=numpy.int64(3), rho=numpy.float64(0.5))
    assert ours == theirs and (type(theirs.seed), type(theirs.rho)) == (int, float)
    assert type(replace(QUICK, steps=numpy.int32(12)).steps) is int
    assert type(Sampling(shots=numpy.int64(2)).shots) is int
    assert type(ComparisonConfig(n_real=numpy.int64(4)).n_real) is int
    assert type(replace(TASK, min_words=numpy.int64(2)).min_words) is int


def test_arguments_of_numpy_do_what_python_s_do():
    assert drawn(n=numpy.int64(2), seed=numpy.int64(1)) == drawn(n=2, seed=1)
    given = {"epsilon": 1.0, "delta": 1e-5, "clip": 0.5, "length": 5, "noise_seed": 1}
    numbers = {name: numpy.asarray([value])[0] for name, value in given.items()}
    assert private(**numbers).fingerprint == private(**given).fingerprint
    assert released(length=numpy.int64(5)).fingerprint == released(length=5).fingerprint
    assert generated(n_per_class=numpy.int64(1), seed=numpy.int64(2)) == generated(n_per_class=1, seed=2)


def test_seeds_of_numpy_name_the_same_records(tmp_path):
    compared(seeds=numpy.arange(2), output=tmp_path)
    assert sorted(path.name for path in (tmp_path / "records").iterdir()) == ["none-seed0.json", "none-seed1.json"]
    compared(seeds=[0, 1], output=tmp_path)


# ---------------------------------------------------------------- what one function returns, every other takes

WORDS = [{"text": example.text, "label": example.label} for example in toy(TWO, 0, 3)]
KINDS = {
    "dicts": WORDS,
    "Examples": [gradmm.Example(**row) for row in WORDS],
    "a Dataset": datasets.Dataset.from_list(WORDS),
    "a Dataset of classes": datasets.Dataset.from_list(WORDS).cast_column(
        "label", datasets.ClassLabel(names=list(TWO.labels))
    ),
    "an iterator": WORDS,
    "numpy's labels": [{**row, "label": numpy.int64(row["label"])} for row in WORDS],
    "names": [{**row, "label": TWO.labels[row["label"]]} for row in WORDS],
    "a frame's records": pandas.DataFrame(WORDS).to_dict("records"),
    "candidates": [
        *WORDS,
        {"text": "", "label": 0, "kept": False},
        {"text": "a rejected text", "label": 1, "kept": False},
    ],
}
TAKERS = {
    "check_examples": lambda model, rows: check_examples(rows, TWO),
    "release": lambda model, rows: gradmm.release(model, TWO, rows, space="head").fingerprint,
    "evaluate": lambda model, rows: gradmm.evaluate(model, TWO, rows),
    "evaluate_calibrated": lambda model, rows: evaluate_calibrated(model, TWO, rows, ["some words", "a dog"]),
    "sample_examples": lambda model, rows: gradmm.sample_examples(rows, 4, TWO, 0),
    "finetune": lambda model, rows: gradmm.finetune(
        model, TWO, rows, toy(TWO, 20, 2), toy(TWO, 30, 2), replace(QUICK, steps=2), progress=False).test,
    "validation": lambda model, rows: gradmm.finetune(
        model, TWO, toy(TWO, 20, 2), rows, toy(TWO, 30, 2), replace(QUICK, steps=2), progress=False).curve,
    "test": lambda model, rows: gradmm.finetune(
        model, TWO, toy(TWO, 20, 2), toy(TWO, 30, 2), rows, replace(QUICK, steps=2), progress=False).test,
    "loss_scores": lambda model, rows: audit.loss_scores(model, TWO, rows),
    "select_coresets": lambda model, rows: select_coresets(model, TWO, rows, 2, ["herding"]),
}  # fmt: skip


@functools.cache
def of_examples(taker):
    return TAKERS[taker](HELD["model"], KINDS["Examples"])


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "Examples"])
@pytest.mark.parametrize("taker", TAKERS)
def test_rows_of_every_kind_go_in_alike(taker, kind):
    rows = iter(KINDS[kind]) if kind == "an iterator" else KINDS[kind]
    assert TAKERS[taker](HELD["model"], rows) == of_examples(taker)


def test_what_a_synthesis_returns_every_other_function_takes(tmp_path):
    model, result = HELD["model"], written(output=tmp_path / "run")
    assert gradmm.load_task(tmp_path / "run").labels == TASK.labels  # as the folder's card says
    rejected = len(result.candidates) - len(result.kept)
    assert rejected > 0 and all(result.kept["kept"]) and result.kept.column_names == result.candidates.column_names
    loaded = datasets.load_dataset(str(tmp_path / "run"), split="train", cache_dir=str(tmp_path / "cache"))
    everything = datasets.load_dataset(
        str(tmp_path / "run"), "candidates", split="train", cache_dir=str(tmp_path / "cache")
    )
    assert loaded["text"] == result.kept["text"] and everything["text"] == result.candidates["text"]
    for rows in (result.kept, result.candidates, result.kept.to_list(), loaded, everything):
        assert [example.text for example in check_examples(rows, TASK)] == result.kept["text"]
        gradmm.release(model, TASK, rows, space="head")
        gradmm.evaluate(model, TASK, rows)
        gradmm.sample_examples(rows, 2, TASK, 0)
        gradmm.finetune(model, TASK, rows, toy(TWO, 20, 2), toy(TWO, 30, 2), replace(QUICK, steps=2), progress=False)


def test_labels_keep_their_names_in_the_folder_and_on_the_hub(tmp_path, monkeypatch):
    result, cache = written(output=tmp_path / "run"), str(tmp_path / "cache")
    loaded = datasets.load_dataset(str(tmp_path / "run"), split="train", cache_dir=cache)
    assert result.kept.features["label"].names == list(TASK.labels) and loaded.features == result.kept.features
    assert loaded.to_list() == result.kept.to_list()
    seen = {}

    def upload(api, folder_path, **asked):
        seen.update(asked, files={path.name: path.read_bytes() for path in folder_path.iterdir()})
        return "https://hub/commit"

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", lambda api, repo_id, **asked: seen.update(made=asked))
    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", upload)
    assert written().push_to_hub("me/reviews") == "https://hub/commit"
    assert (
        seen["made"] == {"repo_type": "dataset", "private": True, "exist_ok": True} and seen["repo_id"] == "me/reviews"
    )
    same = ("train.jsonl", "synthetic.jsonl", "README.md")
    assert all(seen["files"][name] == (tmp_path / "run" / name).read_bytes() for name in same)


def test_a_hub_that_refuses_is_one_sentence(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="could not be put on the hub as 'me/reviews' .*check the name, the network"):
        written().push_to_hub("me/reviews")


def test_prompts_and_completions_are_read_back_as_a_trainer_reads_them(tmp_path):
    result = written(output=tmp_path / "run")
    gradmm.prompt_completion(TASK, result.kept).to_json(tmp_path / "sft.jsonl")
    read = datasets.load_dataset("json", data_files=str(tmp_path / "sft.jsonl"), cache_dir=str(tmp_path / "cache"))
    for row, ours in zip(read["train"], result.kept, strict=True):
        assert row == {
            "prompt": TASK.template.replace("{text}", ours["text"]),
            "completion": TASK.verbalizers[ours["label"]],
        }


def test_the_pools_of_a_comparison_are_all_candidates(tmp_path):
    result = written()
    full = [text for text in result.candidates["text"] if text]
    for rows in (
        result.candidates,
        result.candidates.to_list(),
        [gradmm.Example(r["text"], r["label"]) for r in result.candidates if r["text"]],
    ):
        assert [example.text for example in candidates(rows, TASK)] == full


def test_kept_texts_are_taken_without_a_bar(capfd):
    result = written()
    assert len(result.kept) == sum(result.candidates["kept"]) > 0
    assert capfd.readouterr() == ("", "")


def test_what_is_shown_of_data_a_release_and_a_model_holds_no_text_and_no_number():
    splits = gradmm.Splits(toy(TWO, 4, 0), toy(TWO, 4, 1), toy(TWO, 4, 2), "reviews")
    assert repr(splits) == "Splits('reviews')"
    assert repr(HELD["model"]) == "Model('tiny-llama', torch.float32, cpu)"
    shown = repr(HELD["release"])
    assert shown.startswith("Release('") and "tensor" not in shown and HELD["release"].statement in shown
