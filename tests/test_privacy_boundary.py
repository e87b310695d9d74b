"""What is not in the Release is in nothing that is written: two private sets, one Release, the same bytes."""

import json
import logging
import re
from dataclasses import replace
from itertools import chain
from pathlib import Path

import pytest
import torch
from conftest import in_tiers
from huggingface_hub import DatasetCard

import gradmm
from gradmm.card import LEDGER_COLUMNS, dataset_card
from gradmm.config import SynthesisConfig
from gradmm.errors import UserError
from gradmm.gradients import DenseTarget
from gradmm.models import Model
from gradmm.spaces import own_texts
from gradmm.synthesis import synthesize
from gradmm.tasks import Task, tokenize_task

TASK = Task("toy", ("bad", "good"), (" bad", " great"), "{text} it was", ("the movie was:", "a:"))
CONFIG = SynthesisConfig(
    search="admm", ranking="text", oversample=2.0, n_synthetic=4, group_size=2, outer_steps=2, inner_steps=2, top_k=5,
    init_candidates=2,
)  # fmt: skip
CONFIGS = {"admm": CONFIG, "pool": SynthesisConfig(n_synthetic=4, oversample=2.0, length=12)}
PRIVATE = {"epsilon": 1.0, "delta": 1e-5, "length": 5}
CLOCKS = {"clock"}
# Counts and mean lengths that nothing else in a run comes to: 31 + 47 and 59 + 43 texts.
FIRST = [{"text": f"zebra number {n} quarrelled with miss oquendo", "label": n >= 31} for n in range(78)]
SECOND = [{"text": f"doctor valkyrie {n} prescribes violet tablets on tuesdays", "label": n >= 59} for n in range(102)]
PRIVATE_SETS = [[{**row, "label": int(row["label"])} for row in rows] for rows in (FIRST, SECOND)]


@pytest.fixture(scope="module")
def model(tiny_model):
    return tiny_model("phi", dtype=torch.float32)


@pytest.fixture(scope="module")
def released(model, tmp_path_factory) -> tuple[gradmm.Release, Path]:
    """A private release, and the folder of its synthesis."""
    folder = tmp_path_factory.mktemp("released")
    return run(model, PRIVATE_SETS[0], folder), folder / "run"


@pytest.fixture
def manifest(released) -> dict:
    """That of the synthesis."""
    return json.loads((released[1] / "manifest.json").read_text())


def run(model: Model, private: list[dict], output: Path, search: str = "admm", **options) -> gradmm.Release:
    """The whole road from private texts to a folder."""
    found = gradmm.release(model, TASK, private, **{**PRIVATE, "space": CONFIGS[search].private_space, **options})
    found.save(output / "release.safetensors")
    synthesize(model, TASK, found, CONFIGS[search], output / "run", progress=True)
    return found


def written(folder: Path) -> dict[str, bytes]:
    """Every file but the clock readings."""
    held = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    manifest = {k: v for k, v in json.loads(held["run/manifest.json"]).items() if k not in CLOCKS}
    return {**held, "run/manifest.json": json.dumps(manifest).encode(), "run/timings.jsonl": b""}


def word_runs(rows: list[dict], length: int) -> set[str]:
    """Every run of `length` words of the texts, as it stands in them."""
    texts = [row["text"].split() for row in rows]
    return {" ".join(words[i : i + length]) for words in texts for i in range(len(words) - length + 1)}


def numbers_in(value) -> set[float]:
    if isinstance(value, dict | list):
        return set(
            chain.from_iterable(numbers_in(part) for part in (value.values() if isinstance(value, dict) else value))
        )
    return {float(value)} if isinstance(value, int | float) and not isinstance(value, bool) else set()


def private_statistics(model: Model, rows: list[dict]) -> set[float]:
    tokens = tokenize_task(TASK, model.tokenizer)
    lengths = [len(tokens.encode(row["text"])) for row in rows]
    counts = [sum(row["label"] == label for row in rows) for label in (0, 1)]
    mean = sum(lengths) / len(lengths)
    return {float(value) for value in (*counts, len(rows), mean, round(mean), sum(lengths))}


def same_release(classes, entry, bits):
    """A mechanism whose draw happens to give the same numbers whatever the examples are."""
    draw = torch.Generator().manual_seed(5)
    return tuple(
        DenseTarget(
            torch.randn(factors.delta.shape[1], factors.hidden.shape[1], generator=draw),
            torch.randn(factors.delta.shape[1], generator=draw) if factors.bias else None,
        )
        for factors in classes
    )


# ---------------------------------------------------------------- taint


@pytest.mark.parametrize("search", CONFIGS)
def test_two_private_sets_with_the_same_release_leave_the_same_bytes(
    model, tmp_path, monkeypatch, capfd, caplog, search
):
    monkeypatch.setattr("gradmm.privacy.noised_sums", same_release)
    own_texts(model, tokenize_task(TASK, model.tokenizer))  # both runs find them at hand
    caplog.set_level(logging.DEBUG)
    found = []
    for number, rows in enumerate(PRIVATE_SETS):
        caplog.clear()
        run(model, rows, tmp_path / str(number), search)
        out, progress = capfd.readouterr()
        logs = [(record.levelname, record.getMessage()) for record in caplog.records]
        bars = set(
            re.findall(r"match_loss=[\d.]+", progress)
        )  # how often the bar is drawn, and its other figures, are clock readings
        found.append((written(tmp_path / str(number)), out, logs, bars, {row["text"] in progress for row in rows}))
    assert found[0] == found[1] and bool(found[0][3]) == (search == "admm") and found[0][4] == {False}


def test_the_taint_test_sees_a_leak(model, tmp_path, monkeypatch):
    monkeypatch.setattr("gradmm.privacy.noised_sums", same_release)
    leaking = gradmm.privacy.release

    def leaks(model, task, rows, **options):
        return replace(leaking(model, task, rows, **options), length=4 + len(rows) // 100)

    monkeypatch.setattr("gradmm.release", leaks)
    for number, rows in enumerate(PRIVATE_SETS):
        run(model, rows, tmp_path / str(number))
    assert written(tmp_path / "0") != written(tmp_path / "1")


@pytest.mark.parametrize("rows", PRIVATE_SETS, ids=["first", "second"])
@pytest.mark.parametrize("space", in_tiers(["head", "label_rows"], "label_rows"))
@pytest.mark.parametrize("search", CONFIGS)
def test_no_private_words_and_no_private_statistic_is_written(model, tmp_path, rows, space, search):
    run(model, rows, tmp_path, search, space=space)
    held = {name: content.decode("utf-8", "replace").lower() for name, content in written(tmp_path).items()}
    assert set(held) == {"release.safetensors", *(f"run/{name}" for name in
        ("README.md", "manifest.json", "train.jsonl", "synthetic.jsonl", "history.jsonl", "timings.jsonl")
    )}  # fmt: skip
    together = "\n".join(held.values())
    assert not [words for words in word_runs(rows, 3) if words in together]
    manifest = json.loads(held["run/manifest.json"])
    lines = [json.loads(line) for name in ("history", "synthetic") for line in held[f"run/{name}.jsonl"].splitlines()]
    card = {float(number) for number in re.findall(r"(?<![\w.-])\d+(?:\.\d+)?(?![\w.])", held["run/README.md"])}
    assert not private_statistics(model, rows) & (numbers_in([manifest, lines]) | card)


def test_the_statistics_test_sees_the_mean_length_of_a_release_without_privacy(model, tmp_path):
    rows = [{"text": "a dull plot we saw one time", "label": n % 2} for n in range(78)]
    released = gradmm.release(model, TASK, rows, space="head")
    synthesize(model, TASK, released, CONFIG, tmp_path, progress=False)
    assert private_statistics(model, rows) & numbers_in(json.loads((tmp_path / "manifest.json").read_text()))


# ---------------------------------------------------------------- what is refused, and what is said


@pytest.mark.parametrize("given", [PRIVATE_SETS[0], PRIVATE_SETS[0][0]["text"], [r["text"] for r in PRIVATE_SETS[0]]])
def test_private_text_in_any_form_is_refused_and_not_repeated(model, given, tmp_path):
    with pytest.raises(UserError, match="where a Release belongs") as caught:
        synthesize(model, TASK, given, CONFIG, tmp_path / "run")
    assert not [words for words in word_runs(PRIVATE_SETS[0], 2) if words in str(caught.value)]
    assert not (tmp_path / "run").exists()


def test_manifest_and_card_hold_the_ledger(released, manifest):
    target, folder = released
    (entry,) = target.ledger
    assert manifest["release"]["private"] is True and manifest["release"]["statement"] == target.statement
    assert [row[name] for row in manifest["release"]["ledger"] for name in LEDGER_COLUMNS] == [
        getattr(entry, n) for n in LEDGER_COLUMNS
    ]
    card = (folder / "README.md").read_text()
    assert target.statement in card and "not private" not in card and f"| {entry.sigma} |" in card
    assert card == dataset_card(manifest)


@pytest.mark.parametrize(
    "options",
    [{"epsilon": None, "delta": None, "space": "head"}, {"noise_seed": 3}],
    ids=["no epsilon", "fixed noise seed"],
)
def test_manifest_and_card_say_plainly_what_is_not_private(model, tmp_path, options):
    released = run(model, PRIVATE_SETS[0], tmp_path, **options)
    card, manifest = ((tmp_path / "run" / name).read_text() for name in ("README.md", "manifest.json"))
    assert "**This data set is not private.**" in card and json.loads(manifest)["release"]["private"] is False
    assert ("fixed at 3" in card) == bool(released.ledger) == ("Planned, but not granted" in card)


def test_a_card_is_one_table_whatever_the_task_is_called(manifest):
    manifest["task"] |= {"name": "a | b\n# c", "labels": ["x|y", "z"]}
    card = dataset_card(manifest)
    assert "# Synthetic texts for a \\| b \\# c\n" in card and "x\\|y" in card


@pytest.mark.parametrize("name", ["a: b", "- x #y", "wörter \"zwei\" 'drei'", "true", "{a: [b}"])
def test_a_cards_header_names_the_task_and_its_files_whatever_the_task_is_called(manifest, name):
    manifest["task"]["name"] = name
    header = DatasetCard(dataset_card(manifest)).data
    assert header.pretty_name == f"Synthetic texts for {name}" and header.task_categories == ["text-classification"]
    assert {one["config_name"]: one["data_files"] for one in header.configs} == {
        "default": "train.jsonl",
        "candidates": "synthetic.jsonl",
    }
