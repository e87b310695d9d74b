"""The presets name parameters that exist, with values of the kind that is expected, and the paper's name all."""

import re
from pathlib import Path

import pytest

import gradmm
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
    said = " ".join(comment)
    assert "Machine:" in said and "GB" in said and ("hour" in said or "minutes" in said)
    assert files.read_parameters(path)["dtype"] == "bfloat16"


CARDS = {"gpu-16gb": 16, "gpu-24gb": 24}
WEIGHTS = {"HuggingFaceTB/SmolLM2-135M": 134_515_008, "HuggingFaceTB/SmolLM2-360M": 361_821_120}


@pytest.mark.parametrize(
    "path",
    [path for path in PRESETS if path.parent.name in CARDS],
    ids=lambda path: f"{path.parent.name}/{path.stem}",
)
def test_a_preset_for_a_card_fits_it_and_says_what_it_takes(path):
    comment = " ".join(line[1:] for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("#"))
    card = CARDS[path.parent.name]
    assert f"Machine: one GPU of {card} GB" in comment and "minutes" in comment and "not measured" in comment
    stated = max(int(size) for size in re.findall(r"(\d+) GB", comment.replace(f"one GPU of {card} GB", "")))
    given = files.read_parameters(path)
    assert (given["data"], given["dtype"]) == ("sst2", "auto")
    if path.stem == "02-synthesis":
        published = gradmm.PRESETS["admm"]
        names = ("n_synthetic", "outer_steps", "inner_steps", "rho", "top_k")
        assert all(given[name] == getattr(published, name) for name in names)
        widest = 4 if card == 16 else 2  # a T4 computes in float32
        needed = widest * WEIGHTS[given["model"]] / 1e9  # the weights at least
    else:
        needed = (6 * 4 + 4) * WEIGHTS[given["model"]] / 1e9 + 0.2 * card  # a training, and batches by tokens
    assert needed < stated < 0.9 * card


def test_the_expected_times_follow_from_the_measured_step():
    """Minutes on an H100 by the tables of the README, and what the presets round them to."""
    large, small, training = 3, 2, 20 / 60
    minutes = {
        "03-finetuning": 3 * (2 * large + 3 * small + 21 * 3 * training),
        "06-transfer": 3 * (large + 5 * 3 * 3 * training),
        "04-privacy": 9 * 2.5 + 12 * 1.25 * training,
        "00-quickstart": large + 18 * 60 * 0.085 / 60,
        "02-synthesis": 3 * 1.8,
    }
    for path in PRESETS:
        if path.parent.name.startswith("paper-"):
            text = " ".join(path.read_text(encoding="utf-8").replace("\n#", "").split())
            found = re.search(r"about (\d+) (hours?|minutes) on an A100, (\d+) on an H100", text)
            unit = 60 if found[2].startswith("hour") else 1
            assert int(found[3]) * unit == pytest.approx(minutes[path.stem], rel=0.3)
            assert int(found[1]) * unit == pytest.approx(3.2 * minutes[path.stem], rel=0.1)


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
