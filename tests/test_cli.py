"""The command `gradmm`: what it does is what Python does, and what is wrong with a request is one sentence."""

import csv
import json
import re
import shutil
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
@pytest.mark.filterwarnings("default::gradmm.errors.DataWarning")
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
    chance = (data.test[0], data.validation[0])  # as a model may write them
    seen = "\n".join(json.dumps({"text": one.text, "label": "good"}) for one in chance)
    (reviews / "mine.jsonl").write_text((folder / "train.jsonl").read_text("utf-8") + seen, encoding="utf-8")
    assert cli.main([*learn, "--train", "mine.jsonl"]) == 0
    said, note = capsys.readouterr()
    assert note.endswith("2 row(s) to learn from are left out, since their texts are in validation or test too\n")
    assert re.search(r"test accuracy \d\.\d{4}, calibrated \d\.\d{4}, on \d+ texts", said) and "from 4 examples" in said
    assert cli.main(["evaluate", *COLUMNS, "--split", "train", "--device", "cpu"]) == 0
    assert f"on {len(data.train)} texts" in capsys.readouterr().out


@pytest.mark.slow
def test_a_private_release_is_drawn_once_however_often_the_command_is_given(reviews, capsys):
    task = "labels: [bad, good]\nverbalizers: [' bad', ' great']\ngeneration_prompts: ['A bad room:', '{} room:']\n"
    Path("mine.yaml").write_text(task.format("A good"), encoding="utf-8")
    Path("taken").mkdir()
    Path("taken/train.jsonl").write_text("mine", encoding="utf-8")
    private = ["--epsilon", "2", "--delta", "1e-5", "--n-real", "8", "--task", "mine.yaml"]
    asked = ["synthesize", *COLUMNS, *SMALL, *private]

    def refused(*more: str) -> str:
        assert cli.main([*asked, "--length", "8", *more]) == 2
        return capsys.readouterr().err

    assert "taken holds train.jsonl but no manifest: choose another output folder" in refused("--output", "taken")
    assert "take a length of at most" in refused("--length", "9999") and not list(Path().rglob("ledger.json"))
    for _ in range(2):
        assert cli.main([*asked, "--length", "8", "--output", "private"]) == 0
    assert "(2, 1e-05)-differential privacy" in capsys.readouterr().out
    told = "private holds results of other parameters: parameters.clip (1 there, 0.5 now): leave output out, or give"
    assert told in refused("--output", "private", "--clip", "0.5")
    Path("results/releases").rename("elsewhere")  # as from another working folder
    assert "private holds a run of another release than this one, which is still to be drawn" in refused(
        "--output", "private"
    )
    shutil.rmtree("results/releases")
    Path("elsewhere").rename("results/releases")
    Path("mine.yaml").write_text(task.format("A lovely"), encoding="utf-8")
    assert "files.task" in refused("--output", "private")
    assert cli.main([*asked, "--length", "8"]) == 0
    (ledger,) = Path().rglob("ledger.json")  # read again, whatever the prompts and the output folder
    assert len(json.loads(ledger.read_text("utf-8"))["entries"]) == 1


@pytest.mark.slow
def test_a_saved_release_needs_its_task_and_has_a_folder_of_its_own(reviews, capsys):
    task, data = gradmm.load_data("demo")
    model = gradmm.load_model("demo", device="cpu")
    for n in (4, 6):  # two files of one name
        real = gradmm.sample_examples(data.train, n, task, 0)
        gradmm.release(model, task, real, space="head").save(f"{n}/release.safetensors")
        assert cli.main(["synthesize", "--release", f"{n}/release.safetensors", "--task", "demo", *SMALL]) == 0
    private = gradmm.release(model, task, real, epsilon=1.0, delta=1e-5, length=8)
    name = private.save("private/release.safetensors").name
    for text in ("one", "another"):  # a file of the release's name may be private: it decides nothing
        Path(name).write_text(text, encoding="utf-8")
        assert cli.main(["synthesize", "--release", f"private/{name}", "--task", "demo", *SMALL]) == 0
    assert len([*Path("results/synthesize").glob("demo-release*")]) == 3
    assert cli.main(["synthesize", "--release", "4/release.safetensors", *SMALL]) == 2
    assert "add --task with the release's own task" in capsys.readouterr().err


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
    "privacy of a release": (["synthesize", "--release", "r", "--epsilon", "1"], "in which epsilon has no part"),
    "a draw of a release": (["synthesize", "--release", "r", "--n-real", "20"], "in which n_real has no part"),
    "data of a release": (["synthesize", "--release", "r", *COLUMNS], "in which data and text and label have no part"),
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
