"""Every command line of the README, the book and the presets' README, in a reader's order and in one folder."""

import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import executing
import papermill.cli
import pytest
import yaml

import gradmm
from gradmm import cli, files
from gradmm.experiments import batch, demo

ROOT = Path(__file__).resolve().parents[1]
PAGES = [
    ROOT / "README.md",
    *sorted((ROOT / "book").glob("*.md")),
    *sorted((ROOT / "book" / "api").glob("*.md")),
    ROOT / "notebooks" / "params" / "README.md",
]
# What a command of the documentation names and this machine lacks or has no hours for -> what stands for it here.
SUBSTITUTES = {
    "HuggingFaceTB/SmolLM2-135M": "demo",  # a model of the hub
    "path/to/model": str(demo.DATA / "model"),  # a local folder, as it says
    "microsoft/phi-1_5": "demo",  # a model of the hub
    "-p data sst2": "-p data path/to/films",  # data of the hub
    "--task sst2": "--task demo",
    "n_synthetic 100": "n_synthetic 6",  # minutes
}
SMALL = (
    "-f notebooks/params/smoke/00-quickstart.yaml"  # ends a papermill line; what the line sets with -p stands above it
)
# By how a command begins: how it is checked, with the reason where it is not run in full.
CHECKED = {
    "papermill": "its parameters are looked up; the quickstart and one on a reader's own files are run",
    "make": "its recipe is looked up with make -n: it installs an environment of its own; the notebook that "
    "quickstart runs is run here",
    "python -m gradmm.experiments.batch": "planned and not executed, which takes from minutes to days; "
    "tests/test_batch.py executes",
    "gradmm ": "run on the embedded model, small",
    "accelerate launch": "run by one process, on the demo, small; tests/test_sharding.py launches several",
    "pip install": "its extras are looked up: it wants a registry; tests/test_packaging.py builds the wheel",
    "python tests/benchmarks/": "its options are looked up: it wants a quiet machine; tests/test_benchmarks.py "
    "runs it small",
}


def commands() -> list[str]:
    """The lines of every bash block in the order of the pages, with continued lines joined and comments left out."""
    blocks = [
        block
        for page in PAGES
        for block in re.findall(r"^```bash\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    ]
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [line for line in (" ".join(line.split(" #")[0].split()) for line in lines) if line]


def test_every_file_that_a_page_names_is_there():
    named = {
        (path, page.name)
        for page in (*PAGES, ROOT / "CONTRIBUTING.md", *(ROOT / "notebooks").glob("*.ipynb"))
        for path in re.findall(r"`((?:tests|gradmm|book|notebooks)/[\w./-]+\.\w+)`", page.read_text(encoding="utf-8"))
    }
    here = {(path, page) for path, page in named if "NAME" in path or (ROOT / path).is_file()}
    assert len(named) > 20 and not named - here


def of_kind(start: str) -> list[str]:
    return [command for command in commands() if command.startswith(start)]


def substituted(command: str) -> str:
    for name, other in SUBSTITUTES.items():
        command = command.replace(name, other)
    return command


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """A reader's folder: the repository's notebooks, and what the documentation says to bring along."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notebooks").symlink_to(ROOT / "notebooks")
    demo = gradmm.load_data("demo")[1]
    for name, start in (("reviews", 0), ("films", 300)):
        for split, count in (("train", 40), ("validation", 20), ("test", 20)):
            rows = [
                {"text": example.text, "label": example.label}
                for example in getattr(demo, split)[start : start + count]
            ]
            files.write_json_lines(tmp_path / "path" / "to" / name / f"{split}.jsonl", rows)
        (tmp_path / "path" / "to" / name / "task.yaml").write_text(
            yaml.safe_dump(gradmm.load_task("demo").to_dict()), encoding="utf-8"
        )
    return tmp_path


def test_every_command_has_a_way_to_be_checked():
    assert len(commands()) > 15 and not [command for command in commands() if not command.startswith(tuple(CHECKED))]
    assert all(of_kind(start) for start in CHECKED)
    assert not [name for name in SUBSTITUTES if name not in " ".join(commands())]


@pytest.mark.parametrize("command", of_kind("make"))
def test_a_make_target_has_a_recipe(command):
    done = subprocess.run([*shlex.split(command), "-n"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stdout.strip(), done.stderr


def test_the_notebooks_of_the_documentation_get_parameters_that_they_have(here, monkeypatch):
    asked = []
    monkeypatch.setattr("papermill.cli.execute_notebook", lambda **given: asked.append(given))
    for command in of_kind("papermill"):
        papermill.cli.papermill(shlex.split(substituted(command))[1:], standalone_mode=False)
    for given in asked:
        assert set(given["parameters"]) <= set(papermill.inspect_notebook(given["input_path"]))
        assert not [place for place in given["parameters"].values() if "/" in str(place) and not Path(place).is_dir()]
    assert len(asked) == len(of_kind("papermill")) > 1


@pytest.mark.slow
def test_the_quickstart_and_the_notebook_on_one_s_own_files_run_as_they_are_typed(here):
    """The first as `make quickstart` runs it, with fewer texts and one seed; the second smaller still."""
    recipe = subprocess.run(["make", "-n", "quickstart"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    (first,) = re.findall(r"papermill .*", recipe)
    (own,) = (command for command in of_kind("papermill") if "path/to/reviews" in command)
    (here / "results").mkdir()  # the recipe's first line
    kernel = f"--kernel python3 --start-timeout {batch.KERNEL_SECONDS}"
    for command in (f"{first} -p n_synthetic 8 -p fine_tuning_seeds 1", f"{substituted(own)} {SMALL} {kernel}"):
        given = shlex.split(command)[1:]
        with executing.quiet(here):
            environment = {**os.environ, "PYTHONPATH": str(ROOT)}
            done = subprocess.run(
                [sys.executable, "-m", "papermill", *given],
                env=environment,
                capture_output=True,
                text=True,
                check=False,
            )
        assert done.returncode == 0, f"{command}\n{done.stderr[-2000:]}"
    assert len(list(here.glob("results/00-quickstart/*/00-quickstart.json"))) == 2


def test_the_batches_of_the_documentation_can_be_planned(here):
    (here / "grid.yaml").write_text(
        re.search(
            r"```yaml\n(n_real: .*?)```", (ROOT / "book" / "reproduce.md").read_text(encoding="utf-8"), re.DOTALL
        )[1]
    )
    planned = []
    for command in of_kind("python -m gradmm.experiments.batch"):
        words = [sorted(map(str, Path().glob(word))) if "*" in word else [word] for word in shlex.split(command)[3:]]
        _, jobs = batch.requested(sum(words, []))
        assert jobs and all(job.parameters.get("output") is None for job in jobs)
        planned.append(len(jobs))
    assert 9 in planned  # "executes nine notebooks"


@pytest.mark.slow
def test_the_launched_synthesis_of_the_documentation_runs(here, capsys):
    (command,) = of_kind("accelerate launch")
    task, data = gradmm.load_data("demo")
    gradmm.release(gradmm.load_model("demo"), task, gradmm.sample_examples(data.train, 4, task, 0), space="head").save(
        "sst2.safetensors"
    )
    small = {"groups_per_batch": 1, "n_synthetic": 2, "outer_steps": 1, "inner_steps": 1, "init_candidates": 2}
    (here / "settings.yaml").write_text(yaml.safe_dump(small), encoding="utf-8")
    assert cli.main(shlex.split(substituted(command).split("-m gradmm")[1])) == 0
    assert "texts are kept in results/sst2/train.jsonl" in capsys.readouterr().out


@pytest.mark.slow
def test_the_commands_of_the_documentation_run_one_after_the_other(here, capsys):
    words = {"negative": ("dull", "awful", "poor"), "positive": ("lovely", "great", "fine")}
    rows = [f'"A {word} room, number {n}.",{label}' for n in range(10) for label, two in words.items() for word in two]
    (here / "reviews.csv").write_text("\n".join(["text,label", *rows]), encoding="utf-8")
    (here / "task.yaml").symlink_to(ROOT / "notebooks" / "tasks" / "reviews.yaml")  # what one's own might be
    small = {"synthesize": "--n-synthetic 4 --oversample 3", "finetune": "--steps 1 --learning-rates 1e-4"}
    for command in of_kind("gradmm "):
        name, *given = shlex.split(substituted(command))[1:]
        assert cli.main([name, *given, *shlex.split(small.get(name, "")), "--device", "cpu"]) == 0
    said = capsys.readouterr().out
    assert "4 of 12 texts are kept in synthetic/train.jsonl" in said and "learnt from 4 examples" in said


@pytest.mark.parametrize("command", of_kind("pip install"))
def test_what_is_installed_is_this_package_with_extras_that_it_has(command):
    place, _, extras = shlex.split(command)[2].partition("[")
    known = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    assert place == "." and set(filter(None, extras.rstrip("]").split(","))) <= set(known)


@pytest.mark.parametrize("command", of_kind("python tests/benchmarks/"))
def test_a_benchmark_has_the_options_that_are_named(command):
    script, *given = shlex.split(command)[1:]
    shared = ("whole_synthesis.py", "real_models.py")  # others take their options from these
    text = "".join(
        (ROOT / path).read_text(encoding="utf-8") for path in (script, *(f"tests/benchmarks/{name}" for name in shared))
    )
    assert not [option for option in given if option.startswith("--") and f'"{option}"' not in text]
