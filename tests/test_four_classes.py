"""A task of four classes, a folder of JSON lines alone, goes through every stage from the release to the notebooks."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from executing import ROOT, execute, forked_kernels, quiet

import gradmm
from gradmm import files
from gradmm.config import FinetuneConfig, SynthesisConfig
from gradmm.data import check_examples
from gradmm.experiments import baselines
from gradmm.experiments.protocol import compare
from gradmm.experiments.seed_run import ComparisonConfig
from gradmm.generation import Sampling, generate_texts

LABELS = ("a", "b", "c", "d")
CLUES = ("cat sat", "dog sat", "red movie", "blue film")
FILLERS = ("the", "a", "i feel", "we saw the", "you like a", "they made the", "you like the", "i saw a")
SIZES = {"train": range(0, 24), "validation": range(24, 34), "test": range(34, 44)}
TASK = """\
name: four
template: "{text} this is"
labels: [a, b, c, d]
verbalizers: [" world", " sports", " business", " text"]
generation_prompts: ["", "a", "one cat", "in"]
min_words: 1
"""
SYNTHESIS = SynthesisConfig(
    search="admm", ranking="text", oversample=2.0, n_synthetic=8, group_size=2, outer_steps=2, inner_steps=2, top_k=5,
    init_candidates=2, length=6,
)  # fmt: skip
TUNING = FinetuneConfig(steps=4, batch_size=8, learning_rates=(1e-2,), eval_every=2, warmup=1)


def text_of(number: int, label: int) -> str:
    words = ("one", "two", "three")
    return f"{FILLERS[number % 8]} {CLUES[label]} {words[number // 8 % 3]} {words[number // 24 % 3]}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("four")
    for split, numbers in SIZES.items():
        files.write_json_lines(
            place / f"{split}.jsonl", [{"text": text_of(n, c), "label": c} for n in numbers for c in range(4)]
        )
    files.write_text(place / "task.yaml", TASK)
    return place


@pytest.fixture(scope="module")
def model(tiny_model):
    return tiny_model("llama", dtype=torch.float32)


@pytest.mark.parametrize(
    ("choices", "epsilon"),
    [
        ({}, 2.0),
        ({"search": "pool"}, None),
        *(
            pytest.param(choices, epsilon, marks=pytest.mark.slow)
            for choices in ({}, {"ranking": "group"}, {"filter": "label"}, {"search": "pool"})
            for epsilon in (None, 2.0)
            if (choices, epsilon) not in [({}, 2.0), ({"search": "pool"}, None)]
        ),
    ],
    ids=str,
)
def test_release_synthesize_and_fine_tune(model, folder, epsilon, choices):
    task, data = gradmm.load_data(folder)
    assert task.labels == LABELS and {e.label for e in data.test} == {0, 1, 2, 3}
    real = gradmm.sample_examples(data.train, 12, task, 0)
    config = replace(SYNTHESIS, **choices)
    noised = {"epsilon": epsilon, "delta": 1e-5, "length": 6, "noise_seed": 0, "space": config.private_space}
    private = {"space": config.space} if epsilon is None else noised
    target = gradmm.release(model, task, real, **private)
    assert len(target.targets) == 4
    made = gradmm.synthesize(model, task, target, config, progress=False)
    counts = [made.kept["label"].count(label) for label in range(4)]
    assert made.candidates.to_list() and {row["label_name"] for row in made.candidates.to_list()} == set(LABELS)
    assert counts == [2, 2, 2, 2]
    rows = check_examples(made.kept.to_list(), task)
    found = gradmm.finetune(model, task, rows, data.validation, data.test, TUNING)
    assert set(found.test.predictions) <= {0, 1, 2, 3} and set(found.test.labels) == {0, 1, 2, 3}


def test_generation_writes_every_class(model, folder):
    task, data = gradmm.load_data(folder)
    sampling = Sampling(temperature=4.0, max_tokens=16, min_tokens=4, shots=1, rounds=40)
    for shots in ((), gradmm.sample_examples(data.train, 8, task, 0)):
        assert sorted(e.label for e in generate_texts(model, task, 2, 0, sampling, shots)) == [0, 0, 1, 1, 2, 2, 3, 3]


@pytest.mark.slow
def test_a_comparison_with_a_learner_a_second_model_and_a_head_with_bias(model, tiny_model, folder):
    task, data = gradmm.load_data(folder)
    sampling = Sampling(temperature=4.0, max_tokens=16, min_tokens=4, shots=1, rounds=40)
    phi, learner = (tiny_model(kind, dtype=torch.float32) for kind in ("phi", "gpt2"))
    few, models = {"n_real": 8, "similarity_steps": (0,)}, {"learners": [learner], "second": model}
    config = ComparisonConfig(synthesis=SYNTHESIS, finetuning=TUNING, sampling=sampling, **few, **models)
    found = compare(phi, task, data, config, seeds=(0,), progress=False)
    sizes = {"none": 0, "all_real": len(data.train)}
    assert {name: row["n"] for name, row in found.methods.items()} == {n: sizes.get(n, 8) for n in baselines.METHODS}
    assert all(row["second_perplexity"] > 1 for name, row in found.methods.items() if name != "none")
    assert {label for record in found.records for label in record["predictions"]} <= {0, 1, 2, 3}
    for view in (found, found.on(learner.name)):
        assert set(view.methods) == set(baselines.METHODS)
        assert all(0 <= m["macro_f1"] <= 1 for m in view.methods.values())
        assert view.methods["real"]["match_loss"] == pytest.approx(0, abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "few"),
    [
        ("00-quickstart", {"search": "admm", "n_real": 8, "n_synthetic": 8, "outer_steps": 2, "inner_steps": 2,
        "fine_tuning_seeds": 1, "fine_tuning_steps": 2}),
        ("03-finetuning", {"methods": ["none", "real", "random", "prompt_only", "shuffled", "gradmm"], "budgets": [1],
                           "budget_methods": ["random", "gradmm"], "fine_tuning_steps": 2, "similarity_steps": [0, 2],
                               "seeds": 1,
                           "search": "admm", "n_real": 8, "n_synthetic": 8, "outer_steps": 1, "inner_steps": 1}),
    ],
    ids=["quickstart", "finetuning"],
)  # fmt: skip
def test_a_notebook(name, few, model, folder, tmp_path, shared_folder):
    model.lm.save_pretrained(tmp_path / "tiny")
    model.tokenizer.save_pretrained(tmp_path / "tiny")
    preset = {"model": str(tmp_path / "tiny"), "data": str(folder), "top_k": 5, "output": str(tmp_path / "out"), **few}
    with quiet(tmp_path), forked_kernels(shared_folder):
        execute(ROOT / "notebooks" / f"{name}.ipynb", preset, tmp_path)
    results = json.loads((tmp_path / "out" / f"{name}.json").read_text(encoding="utf-8"))
    assert 0 <= results["methods"]["gradmm"]["accuracy"]["mean"] <= 1 and results["methods"]["gradmm"]["n"] == 8
