"""The batch of notebooks: what is executed, with which parameters, what is skipped, and how failures are told."""

import json
import os
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
import yaml

from gradmm import files
from gradmm.errors import UserError
from gradmm.experiments import batch

ROOT = Path(__file__).resolve().parents[1]
PARAMETERS = "seed = 0\nrho = 0.1\ndata = 'demo'\noutput = 'results'"
WRITE = "import json, pathlib\nfolder = pathlib.Path(output)\nfolder.mkdir(parents=True, exist_ok=True)\n"
WRITE += "(folder / 'numbers.json').write_text(json.dumps({'seed': seed, 'rho': rho}))\nseed"


def store(path: Path, *cells: str) -> Path:
    """A notebook whose first code cell holds the parameters."""
    book = nbformat.v4.new_notebook(
        metadata={"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    )
    book.cells = [nbformat.v4.new_markdown_cell("# A title"), *map(nbformat.v4.new_code_cell, cells)]
    book.cells[1].metadata["tags"] = ["parameters"]
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(book, path)
    return path


def set_preset(notebook: Path, preset: str, values: dict) -> None:
    path = notebook.parent / "params" / preset / f"{notebook.stem}.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(values, sort_keys=False))


def outputs(path: Path) -> list[dict]:
    return [
        output
        for cell in nbformat.read(path, as_version=4).cells
        if cell.cell_type == "code"
        for output in cell.outputs
    ]


@pytest.fixture
def here(monkeypatch, tmp_path) -> Path:
    """An empty current folder, and kernels that leave nothing in the user's home."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / ".ipython"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return tmp_path


def test_a_preset_sets_the_parameters_and_other_notebooks_are_left_out(here):
    first, second = store(here / "one.ipynb", PARAMETERS), store(here / "two.ipynb", PARAMETERS)
    set_preset(first, "demo", {"seed": 7})
    (job,) = batch.plan([first, second], here / "executed", "demo", {"rho": 0.5})
    assert job.parameters == {"seed": 7, "rho": 0.5} and job.target == here / "executed" / "one.ipynb"
    assert [job.parameters for job in batch.plan([first, second], "executed")] == [{}, {}]


def test_a_notebook_that_is_executed_alone_again_has_the_threads_that_it_had_beside_others(here, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS")
    said = "import os\nprint(os.environ.get('OMP_NUM_THREADS'))"
    books = [store(here / name, PARAMETERS, said) for name in ("one.ipynb", "two.ipynb")]
    seen = []
    for _ in range(2):
        batch.run(batch.plan(books, here / "executed"), 2, progress=False)
        seen.append(outputs(here / "executed" / "one.ipynb")[-1]["text"])
        store(books[0], PARAMETERS, f"{said}\nprint()")
    assert seen[0].strip().isdigit() and seen[1].strip() == seen[0].strip()


def test_an_unknown_parameter_names_the_notebook_and_the_near_ones(here):
    notebook = store(here / "one.ipynb", PARAMETERS)
    with pytest.raises(UserError, match=r"one\.ipynb has no parameter 'sed': did you mean seed\?"):
        batch.plan([notebook], "executed", parameters={"sed": 1})
    with pytest.raises(UserError, match=r"no parameter 'zzzz': it has seed, rho, data, output"):
        batch.plan([notebook], "executed", parameters={"zzzz": 1})
    set_preset(notebook, "demo", {"rhoo": 1})
    with pytest.raises(UserError, match=r"no parameter 'rhoo': did you mean rho\?"):
        batch.plan([notebook], "executed", "demo")


def test_a_wrong_request_is_refused_in_a_sentence(here):
    notebook = store(here / "one.ipynb", PARAMETERS)
    set_preset(notebook, "demo", {"seed": 1})
    (here / "broken.ipynb").write_text("{")
    for message, request in {
        r"there is no preset 'demmo' in .*: did you mean demo\?": lambda: batch.plan([notebook], "x", "demmo"),
        r"none\.ipynb is no notebook": lambda: batch.plan([here / "none.ipynb"], "x"),
        r"would be written twice": lambda: batch.plan([notebook, notebook], "x"),
        r"could not be read as a notebook|is not JSON": lambda: batch.plan([here / "broken.ipynb"], "x"),
        r"the sweep of \S+ is \['seed'\]: give": lambda: batch.plan([notebook], "x", sweep=["seed"]),
        r"the sweep over seed has the values 3": lambda: batch.plan([notebook], "x", sweep={"seed": 3}),
        r"cannot go over output": lambda: batch.plan([notebook], "x", sweep={"output": ["a"]}),
        r"it must be at least 1": lambda: batch.run([], processes=0),
        r"no notebook is given": lambda: batch.plan([], "x"),
    }.items():
        with pytest.raises(UserError, match=message):
            request()


NUMBERS = {"1e-5": 1e-5, "-2E3": -2000.0, "3e+2": 300.0, "[1e1, 1.5e-3]": [10.0, 1.5e-3], "e5": "e5", "1e": "1e"}


@pytest.mark.parametrize(("written", "value"), NUMBERS.items())
def test_a_number_of_parameters_needs_no_point(here, written, value):
    (here / "p.yaml").write_text(f"delta: {written}\n")
    assert files.read_parameters(here / "p.yaml") == {"delta": value}


def test_what_holds_no_parameters_is_refused(here):
    (here / "p.yaml").write_text("- 1\n")
    with pytest.raises(UserError, match="holds no parameters"):
        files.read_parameters(here / "p.yaml")
    (here / "p.yaml").write_text("# nothing set\n")
    assert files.read_parameters(here / "p.yaml") == {}


def test_a_sweep_gives_each_combination_its_own_files(here):
    notebook = store(here / "one.ipynb", PARAMETERS)
    set_preset(notebook, "demo", {"output": "results/one", "sweep": {"seed": [1, 2], "rho": [0.1, 0.5]}})
    jobs = batch.plan([notebook], "executed", "demo")
    assert [job.target.name for job in jobs][:2] == ["one--seed=1,rho=0.1.ipynb", "one--seed=1,rho=0.5.ipynb"]
    assert len(jobs) == 4
    assert [job.parameters["output"] for job in jobs][2:] == [
        "results/one/seed=2,rho=0.1",
        "results/one/seed=2,rho=0.5",
    ]
    names = [job.target.name for job in batch.plan([notebook], "executed", sweep={"data": ["a/b", "a b", "x" * 200]})]
    assert len(set(names)) == 3 and not [name for name in names if "/" in name or " " in name or len(name) > 120]


def test_a_fresh_folder_follows_what_the_result_depends_on(here):
    notebook = store(here / "one.ipynb", PARAMETERS)
    folders = [
        batch.plan([notebook], "x", parameters={"seed": s}, fresh=True)[0].parameters["output"] for s in (1, 1, 2)
    ]
    assert folders[0] == folders[1] != folders[2] and all(folder.startswith("results/") for folder in folders)


def test_without_an_output_a_sweep_leaves_it_to_the_notebook_and_a_fresh_run_has_a_folder_of_its_own(here):
    notebook = store(here / "one.ipynb", PARAMETERS.replace("'results'", "None"))
    plain = batch.plan([notebook], "x", sweep={"seed": [1, 2]})
    assert [job.parameters for job in plain] == [{"seed": 1}, {"seed": 2}]
    fresh = [job.parameters["output"] for job in batch.plan([notebook], "x", sweep={"seed": [1, 2]}, fresh=True)]
    assert [folder.rsplit("/", 1)[0] for folder in fresh] == ["results/one/seed=1", "results/one/seed=2"]
    asked = [batch.requested([str(notebook), "-p", "output", text])[1] for text in ("None", "null", "mine")]
    assert [job.parameters["output"] for (job,) in asked] == [None, None, "mine"]


def test_what_a_result_depends_on(here, monkeypatch):
    notebook = store(here / "one.ipynb", PARAMETERS, "1")
    data = here / "rows" / "train.jsonl"
    data.parent.mkdir()
    data.write_text("{}\n")
    parts = [batch.plan([notebook], "x", parameters={"data": "rows"})[0].parts]
    data.write_text("{}\n{}\n")
    parts.append(batch.plan([notebook], "x", parameters={"data": "rows"})[0].parts)
    beside = [batch.plan([notebook], "x", parameters={"data": "rows/train.jsonl"})[0].parts]
    (data.parent / "task.yaml").write_text("labels: [low, high]\n")
    beside.append(batch.plan([notebook], "x", parameters={"data": "rows/train.jsonl"})[0].parts)
    assert [name for name in beside[0] if beside[0][name] != beside[1][name]] == ["the files that parameters name"]
    (data.parent / "task.yaml").unlink()
    store(notebook, PARAMETERS, "2")
    monkeypatch.setattr(batch, "package_digest", lambda: "other code")
    parts.append(batch.plan([notebook], "x", parameters={"data": "rows", "seed": 1})[0].parts)
    differing = [{name for name in old if old[name] != new[name]} for old, new in zip(parts, parts[1:], strict=False)]
    assert differing == [{"the files that parameters name"}, {"notebook", "parameters", "package"}]


def test_what_an_editor_leaves_in_a_notebook_changes_nothing(here):
    notebook = store(here / "one.ipynb", PARAMETERS, "1")
    before = batch.plan([notebook], "x")[0].parts
    book = nbformat.read(notebook, as_version=4)
    book.cells[2].execution_count = 3
    book.cells[2].metadata["collapsed"] = True
    nbformat.write(book, notebook)
    assert batch.plan([notebook], "x")[0].parts == before


@pytest.mark.slow
def test_notebooks_run_in_parallel_are_skipped_when_unchanged_and_fail_alone(here):
    good, other = store(here / "good.ipynb", PARAMETERS, WRITE), store(here / "other.ipynb", PARAMETERS, WRITE)
    bad = store(here / "bad.ipynb", PARAMETERS, "1 / 0", "'never reached'")

    def again(**parameters):
        jobs = batch.plan([good, bad, other], "executed", parameters=parameters)
        return {outcome.name: outcome for outcome in batch.run(jobs, 2, progress=False)}

    first = again(output="a")
    assert [outcome.state for outcome in first.values()] == ["executed", "failed", "executed"]
    assert first["bad"].note == "In [3]: ZeroDivisionError: division by zero"
    assert "ZeroDivisionError" in [output.get("ename") for output in outputs(here / "executed" / "bad.ipynb")]
    assert json.loads((here / "a" / "numbers.json").read_text()) == {"seed": 0, "rho": 0.1}
    stamp = json.loads((here / "executed" / "good.json").read_text())
    assert stamp["state"] == "executed" and stamp["parameters"] == {"output": "a"} and stamp["versions"]["papermill"]
    made = sorted(path.name for path in (here / "executed").iterdir())
    assert made == [f"{name}.{kind}" for name in ("bad", "good", "other") for kind in ("ipynb", "json")]

    store(bad, PARAMETERS, "1")
    (here / "executed" / "other.ipynb").write_text("{}")  # not what the stamp speaks of
    second = again(output="a")
    assert [outcome.state for outcome in second.values()] == ["unchanged", "executed", "executed"]
    assert batch.changes(*batch.plan([good], "executed", parameters={"output": "a", "seed": 1})) == ["parameters"]


@pytest.mark.slow
def test_the_command_line_s_exit_codes_and_table(here, capsys):
    good, bad = (
        store(here / "good.ipynb", PARAMETERS, WRITE),
        store(here / "bad.ipynb", PARAMETERS, "raise ValueError('no such thing')"),
    )
    (here / "sweep.yaml").write_text("sweep:\n  seed: [1, 2]\n")

    command = [sys.executable, "-m", "gradmm.experiments.batch", "--output", "out", "--jobs", "2", good, bad]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    failed = subprocess.run(
        command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL, env=environment
    )
    assert failed.returncode == 1 and "1 of 2 failed; the failing cells are in out" in failed.stdout
    assert "In [2]: ValueError: no such thing" in failed.stdout and "Traceback" not in failed.stdout + failed.stderr

    assert batch.main([str(good), "-p", "sede", "1"]) == 2
    assert "did you mean seed?" in capsys.readouterr().err
    swept = [
        str(good), "--output", "out", "--jobs", "1", "--sweep", "sweep.yaml", "-p", "rho", "1e-5", "-p", "output",
        "swept",
    ]  # fmt: skip
    assert batch.main(swept) == 0
    found = {path.parent.name: json.loads(path.read_text()) for path in here.glob("swept/*/numbers.json")}
    assert found == {"seed=1": {"seed": 1, "rho": 1e-5}, "seed=2": {"seed": 2, "rho": 1e-5}}
    capsys.readouterr()
    assert batch.main(swept) == 0 and capsys.readouterr().out.count("unchanged") == 2


def test_without_the_extra_the_mend_is_named(here, monkeypatch):
    notebook = store(here / "one.ipynb", PARAMETERS)
    monkeypatch.setitem(sys.modules, "papermill", None)
    with pytest.raises(UserError, match=r"papermill is not installed: .*gradmm\[notebooks\]"):
        batch.plan([notebook], "x")
    monkeypatch.setitem(sys.modules, "joblib", None)
    with pytest.raises(UserError, match=r"joblib is not installed: .*gradmm\[notebooks\]"):
        batch.run([])


@pytest.mark.slow
def test_a_sweep_is_shared_between_two_processes(here):
    parent = "import os\n(folder / 'parent').write_text(str(os.getppid()))"
    notebook = store(here / "one.ipynb", PARAMETERS, WRITE, parent)
    given = {"output": str(here / "out")}
    jobs = batch.plan([notebook], here / "executed", parameters=given, sweep={"seed": [1, 2, 3]})
    outcomes = batch.run(jobs, 2, progress=False)
    assert [(one.name, one.state) for one in outcomes] == [(f"one--seed={seed}", "executed") for seed in (1, 2, 3)]
    assert [outcome.state for outcome in batch.run(jobs, 2, progress=False)] == ["unchanged"] * 3
    found = {path.parent.name: json.loads(path.read_text()) for path in here.glob("out/*/numbers.json")}
    assert found == {f"seed={seed}": {"seed": seed, "rho": 0.1} for seed in (1, 2, 3)}
    parents = {path.read_text() for path in here.glob("out/*/parent")}
    assert len(parents) == 2 and str(os.getpid()) not in parents  # each kernel was started by one of two workers


def test_a_pattern_that_no_shell_has_filled_in_is(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    given, jobs = batch.requested(["--preset", "smoke", "--output", str(tmp_path), "notebooks/0[01]*.ipynb"])
    assert [Path(one).stem for one in given.notebooks] == ["00-quickstart", "01-theory"] and len(jobs) == 2
    with pytest.raises(UserError, match=r"nothing\*\.ipynb is no notebook"):
        batch.requested(["--output", str(tmp_path), "notebooks/nothing*.ipynb"])
