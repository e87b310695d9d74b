"""The presets name parameters that exist, with values of the kind that is expected, and the paper's name all."""

from pathlib import Path

import pytest

from gradmm import files
from gradmm.experiments.batch import parameters_of
from gradmm.runs import output_folder

ROOT = Path(__file__).resolve().parents[1]
PARAMS = ROOT / "notebooks" / "params"
PRESETS = sorted(PARAMS.glob("*/*.yaml"))
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_a_preset_names_parameters_of_its_notebook_with_values_of_their_kind(path):
    known, given = parameters_of(ROOT / "notebooks" / f"{path.stem}.ipynb"), files.read_parameters(path)
    assert set(given) <= set(known)
    for name, value in given.items():
        kinds = {type(known[name]), float} if type(known[name]) in (int, float) else {type(known[name])}
        assert value is None or known[name] is None or type(value) in kinds, (
            f"{name} = {value!r}, the default is {known[name]!r}"
        )


@pytest.mark.parametrize(
    "path",
    [path for path in PRESETS if path.parent.name.startswith("paper-")],
    ids=lambda path: f"{path.parent.name}/{path.stem}",
)
def test_a_paper_preset_names_every_parameter_and_says_what_it_takes(path):
    assert set(files.read_parameters(path)) == set(parameters_of(ROOT / "notebooks" / f"{path.stem}.ipynb"))
    comment = [line for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("#")]
    assert "Machine:" in " ".join(comment) and "GB" in " ".join(comment) and "hour" in " ".join(comment)


def test_results_of_one_preset_do_not_meet_those_of_another(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert [path for path in PRESETS if files.read_parameters(path).get("output") is not None] == []
    whole = [parameters_of(ROOT / "notebooks" / f"{path.stem}.ipynb") | files.read_parameters(path) for path in PRESETS]
    folders = [
        output_folder(path.stem, values.pop("output"), **values) for path, values in zip(PRESETS, whole, strict=True)
    ]
    assert len(set(folders)) == len(folders)


@pytest.mark.parametrize("preset", ["smoke", "demo"])
def test_every_notebook_has_a_preset(preset):
    held = {path.stem for path in (PARAMS / preset).glob("*.yaml")}
    missing = [path.stem for path in NOTEBOOKS if path.stem not in held]
    assert not missing, (
        f"write notebooks/params/{preset}/{missing[0]}.yaml: the book and the tests run every notebook with a "
        "preset of its own"
    )


@pytest.mark.parametrize("path", sorted(PARAMS.glob("*.yaml")), ids=lambda path: path.stem)
def test_a_sweep_goes_over_parameters_that_exist(path):
    assert set(files.read_parameters(path)) <= set().union(*map(parameters_of, NOTEBOOKS))


def test_the_readme_names_every_preset():
    text = (PARAMS / "README.md").read_text(encoding="utf-8")
    assert not [path.name for path in PARAMS.iterdir() if path.is_dir() and f"`{path.name}`" not in text]
