"""The command `gradmm`: what it does is what Python does, and what is wrong with a request is one sentence."""

import csv
import json
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import datasets
import pytest

import gradmm
from gradmm import cli, commands

WORDS = {"good": ("lovely", "great", "fine", "superb"), "bad": ("dull", "awful", "poor", "weak")}
SMALL = ["--n-synthetic", "4", "--oversample", "3", "--device", "cpu", "--quiet"]


@pytest.fixture
def reviews(tmp_path, monkeypatch) -> Path:
    """An empty folder to work in but for a CSV of 40 rows with names as labels."""
    monkeypatch.chdir(tmp_path)
    with open("reviews.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["review", "verdict"])
        for number in range(20):
            for label, words in WORDS.items():
                word, other = words[number % 4], words[number // 4 % 4]
                writer.writerow([f"The room was {word}, and the staff {other}, number {number}.", label])
    return tmp_path


COLUMNS = ["--data", "reviews.csv", "--text", "review", "--label", "verdict"]


@pytest.mark.slow
def test_one_command_from_a_csv_file_to_a_folder_that_loads_into_what_was_kept(reviews, capsys):
    assert cli.main(["synthesize", *COLUMNS, *SMALL]) == 0
    said = capsys.readouterr()
    assert "4 of 12 texts are kept in results/synthesize/" in said.out and "not private" in said.out and said.err == ""
    (folder,) = Path("results/synthesize").iterdir()
    kept = datasets.load_dataset(str(folder), split="train", cache_dir=str(reviews / "cache"))
    written = [json.loads(line) for line in (folder / "synthetic.jsonl").read_text("utf-8").splitlines()]
    assert kept["text"] == [row["text"] for row in written if row["kept"]] and len(kept) == 4
    assert kept.features["label"].names == ["bad", "good"]
    task, data = gradmm.load_data("reviews.csv", text="review", label="verdict")
    model = gradmm.load_model("demo", device="cpu")
    config = gradmm.SynthesisConfig(n_synthetic=4, oversample=3.0)
    result = gradmm.synthesize(model, task, gradmm.release(model, task, data.train), config, progress=False)
    assert kept["text"] == result.kept["text"]
    learn = ["finetune", *COLUMNS, "--steps", "1", "--learning-rates", "1e-4", "2e-4", "--device", "cpu", "--quiet"]
    (folder / "train.jsonl").rename(reviews / "mine.jsonl")
    assert cli.main([*learn, "--train", "mine.jsonl"]) == 0
    said = capsys.readouterr().out
    assert re.search(r"test accuracy \d\.\d{4}, calibrated \d\.\d{4}, on \d+ texts", said) and "from 4 examples" in said
    assert cli.main(["evaluate", *COLUMNS, "--split", "train", "--device", "cpu"]) == 0
    assert f"on {len(data.train)} texts" in capsys.readouterr().out


@pytest.mark.slow
def test_a_private_release_is_drawn_once_however_often_the_command_is_given(reviews, capsys):
    private = ["--epsilon", "2", "--delta", "1e-5", "--length", "8", "--n-real", "8", "--output", "private"]
    for _ in range(2):
        assert cli.main(["synthesize", *COLUMNS, *SMALL, *private]) == 0
    assert "(2, 1e-05)-differential privacy" in capsys.readouterr().out
    assert len(json.loads(Path("private/release/ledger.json").read_text("utf-8"))["entries"]) == 1
    assert cli.main(["synthesize", *COLUMNS, *SMALL, *private, "--clip", "0.5"]) == 2
    assert "holds a release with other arguments: clip (1.0 there, 0.5 now)" in capsys.readouterr().err
    saved = ["--release", "private/release/release.safetensors"]
    assert cli.main(["synthesize", *saved, *SMALL, "--epsilon", "1"]) == 2
    assert "in which epsilon has no part" in capsys.readouterr().err


WRONG = {
    "no data": (["synthesize"], "no data is given: add --data with a folder or file, or demo"),
    "data that are nowhere": (["evaluate", "--data", "nowhere"], "there is no data 'nowhere'"),
    "columns": (["synthesize", "--data", "reviews.csv"], "has no column 'text' and no column 'label': it has 'review'"),
    "a preset": (["synthesize", *COLUMNS, "--search", "Paper"], "search = 'Paper' is not known: did you mean paper?"),
    "a value": (["synthesize", *COLUMNS, "--top_k", "0"], "top_k = 0, it must be a whole number of at least 1"),
    "epsilon alone": (["synthesize", *COLUMNS, "--epsilon", "1"], "epsilon = 1.0 without a length"),
    "a model": (["evaluate", *COLUMNS, "--model", "./none"], "there is no model folder ./none"),
    "a split": (["evaluate", "--data", "demo", "--split", "dev"], "split = 'dev' is not known"),
    "a release": (["synthesize", "--release", "none.safetensors"], "none.safetensors does not exist"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_what_cannot_be_met_is_one_sentence_and_exit_code_2(reviews, capsys, kind):
    arguments, message = WRONG[kind]
    assert cli.main([*arguments, "--quiet"]) == 2
    said = capsys.readouterr()
    assert message in said.err and said.err.count("\n") == 1 and said.out == ""


@pytest.mark.parametrize(
    "arguments", ["", "synthesise", "synthesize --n_sinthetic 4", "evaluate --rho 1", "finetune --steps x"]
)
def test_an_unknown_word_ends_with_the_usage(arguments, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments.split())
    said = capsys.readouterr().err
    assert ended.value.code == 2 and said.startswith("usage: gradmm") and said.count("\n") == 2


@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        ("synthesize", (gradmm.ReleaseConfig, gradmm.SynthesisConfig)),
        ("finetune", (gradmm.FinetuneConfig,)),
        ("evaluate", (commands.Inputs,)),
    ],
)
def test_every_setting_is_an_option_that_says_what_it_is(name, kinds, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit):
        cli.main([name, "--help"])
    page = capsys.readouterr().out
    for kind in kinds:
        for item in fields(kind):
            if item.init:
                line = next(line for line in page.splitlines() if line.startswith(f"  --{item.name}"))
                assert len(line.split()) > 2 or page.split(line)[1].lstrip("\n").startswith("   "), item.name


def test_the_module_is_the_command_and_imports_nothing_slow_for_its_version():
    code = (
        "import sys; from gradmm import cli\ntry:\n cli.main(['--version'])\nfinally:\n print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.split() == [gradmm.__version__, "False"]
    done = subprocess.run([sys.executable, "-m", "gradmm", "--help"], capture_output=True, text=True, check=True)
    assert all(name in done.stdout for name in ("synthesize", "finetune", "evaluate", "batch"))
