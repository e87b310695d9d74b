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
from gradmm import cli, commands, files, plan, privacy
from gradmm.errors import UserError

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
    "a folder for a release": (
        ["synthesize", "--release", "r", "--release-folder", "x"],
        "which release_folder has no",
    ),
    "a folder for no release": (
        ["synthesize", *COLUMNS, "--release-folder", "x"],
        "--release-folder without --epsilon",
    ),
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


PRIVATE = ["--epsilon", "2", "--delta", "1e-3", "--length", "15"]
IMPOSSIBLE = {
    "a space": (["--space", "heads"], "the space 'heads' is not known: use one of head, "),
    "a search": (["--space", "body", "--search", "admm"], "targets in the space 'body' are matched by choosing texts"),
    "a count": (["--n-synthetic", "1"], "n_synthetic = 1, but 2 classes need one text each"),
    "a distance": (["--distance", "l2"], "distance = 'l2' compares lengths"),
    "a draw": (["--n-real", "999"], "n_real = 999 needs 500 examples of 'bad'"),
    "the data's folder": (["--output", "."], ". holds the data: choose another output folder"),
    "a file": (["--output", "reviews.csv"], "reviews.csv is a file: give a folder for the output"),
    "a folder in use": (["--output", "busy"], "busy is in use by another run"),
}


@pytest.fixture
def no_model(monkeypatch):
    """Commands that must not load a model."""
    monkeypatch.setattr(commands, "load_model", lambda *_, **__: pytest.fail("the model was loaded"))


@pytest.mark.parametrize("kind", IMPOSSIBLE)
def test_what_no_model_could_make_possible_is_refused_before_one_is_loaded(reviews, capsys, no_model, kind):
    more, message = IMPOSSIBLE[kind]
    Path("busy").mkdir()
    with files.lock("busy"):
        assert cli.main(["synthesize", *COLUMNS, *PRIVATE, *more, "--quiet"]) == 2
    assert message in capsys.readouterr().err and not list(Path().rglob("ledger.json"))


@pytest.mark.filterwarnings("default:task .* has the same generation prompt")
def test_prompts_that_tell_no_classes_apart_are_spoken_of_once_and_before_a_model_is_loaded(
    reviews, capsys, monkeypatch
):
    def unloaded(*_, **__):
        raise UserError("there is no model")

    monkeypatch.setattr(commands, "load_model", unloaded)
    rows = (reviews / "reviews.csv").read_text("utf-8").replace(",bad\n", ",0\n").replace(",good\n", ",1\n")
    (reviews / "reviews.csv").write_text(rows, encoding="utf-8")
    assert cli.main(["synthesize", *COLUMNS, "--quiet"]) == 2
    said = capsys.readouterr().err
    assert said.count("has the same generation prompt for the labels '0', '1'") == 1 and "there is no model" in said


def test_results_never_lie_where_the_data_do(reviews, capsys, no_model):
    for data, output in (("reviews.csv", reviews), ("../" + reviews.name, "."), ("me/reviews", "me/reviews")):
        for command in ("synthesize", "finetune"):
            assert cli.main([command, "--data", str(data), "--output", str(output)]) == 2
            assert f"{output} holds the data: choose another output folder" in capsys.readouterr().err
    Path("demo").mkdir()  # the package's own data lie elsewhere
    assert cli.main(["synthesize", "--data", "demo", "--output", "demo", "--n-synthetic", "1"]) == 2
    assert "n_synthetic = 1" in capsys.readouterr().err


def test_a_synthesis_is_checked_without_a_release(tiny_model, toy_tokenizer):
    model, task = tiny_model("llama"), gradmm.Task("toy", ("no", "yes"), (" bad", " great"), "{text} it was")
    admm = gradmm.preset("admm", n_synthetic=2, top_k=5)
    for private in (True, False):
        plan.check_request(task, "head", admm, private, model, 5)
        plan.check_request(task, "head", admm, private, model)
    for changes, message in (({"top_k": 10**6}, "top_k = 1000000"), ({"length": 999}, "take a length of at most")):
        with pytest.raises(UserError, match=message):
            plan.check_request(task, "head", gradmm.preset("admm", **changes), True, model, 5)
        plan.check_request(task, "head", gradmm.preset("admm", **changes), True)
    with pytest.raises(UserError, match="take a length of at most"):
        plan.check_request(task, "head", admm, True, model, 999)


def test_the_command_says_whether_a_private_release_was_drawn_or_read(reviews, capsys, monkeypatch):
    monkeypatch.setattr(commands.synthesis, "synthesize", lambda *_, **__: (_ for _ in ()).throw(UserError("enough")))
    asked = ["synthesize", *COLUMNS, *PRIVATE, "--device", "cpu", "--release-folder"]
    drawn = "a new private release was drawn and is kept in {}"
    adds = "; 1 other(s) of the same data lie beside it or in results/releases: what they cost adds up"
    for folder, said in (
        ("one", drawn),
        ("one", "the release in {} was read: nothing was spent"),
        ("two", drawn + adds),
    ):
        assert cli.main([*asked, folder]) == 2
        assert said.format(folder) in capsys.readouterr().err and Path(folder, "ledger.json").is_file()
    assert cli.main([*asked, "three", "--quiet"]) == 2 and capsys.readouterr().err == "enough\n"
    assert not privacy.LOG.handlers and not privacy.LOG.level


def test_rows_to_learn_from_are_read_before_the_model_in_their_own_columns_or_the_data_s(reviews, capsys, monkeypatch):
    found = []

    def finetune(model, task, train, *_, **__):
        found.append([(example.text, example.label) for example in train])
        raise UserError("enough")

    Path("own.csv").write_text("text,label\nlovely,good\n", encoding="utf-8")
    Path("same.csv").write_text("review,verdict\nlovely,good\n", encoding="utf-8")
    Path("other.csv").write_text("words,verdict\nlovely,good\n", encoding="utf-8")
    Path("broken.csv").write_text("review,verdict\nlovely,splendid\n", encoding="utf-8")
    with monkeypatch.context() as free:
        free.setattr(commands, "load_model", lambda *_, **__: None)
        free.setattr(commands, "check_fit", lambda *_: None)
        free.setattr(commands.finetuning, "finetune", finetune)
        for name in ("own.csv", "same.csv"):
            assert cli.main(["finetune", *COLUMNS, "--train", name]) == 2
    assert found == [[("lovely", 1)]] * 2
    monkeypatch.setattr(commands, "load_model", lambda *_, **__: pytest.fail("the model was loaded"))
    capsys.readouterr()
    for name, said in (("other.csv", "no column 'text' and no column 'label'"), ("broken.csv", "splendid")):
        assert cli.main(["finetune", *COLUMNS, "--train", name]) == 2
        assert said in capsys.readouterr().err


def test_a_stop_from_the_keyboard_is_one_sentence(capsys, monkeypatch):
    monkeypatch.setattr(commands, "evaluate", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
    assert cli.main(["evaluate", "--quiet"]) == 130
    said = "Stopped. What an output folder holds is kept, and the same command goes on from there; a private release"
    assert capsys.readouterr().err == f"{said} that was charged and not finished is charged again.\n"


def test_help_names_defaults_and_no_code(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "1000")
    pages = {}
    for name in ("synthesize", "finetune"):
        with pytest.raises(SystemExit):
            cli.main([name, "--help"])
        pages[name] = capsys.readouterr().out
    for default in ("pool)", "20.0)", "replace-one)", "no)"):
        assert f"(default: {default}" in pages["synthesize"]
    assert "(default: 5e-05 0.0002)" in pages["finetune"] and "(default: None" not in "".join(pages.values())
    assert not re.search(r"\b(admm|generation|projection|selection|spaces|plan)\.[A-Z_a-z]", pages["synthesize"])
    assert "so that of a private release another seed is another release" in pages["synthesize"]
