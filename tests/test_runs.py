"""A run's folder: continued with the same settings, refused with others, whole files only."""

import json
from pathlib import Path

import datasets
import pandas
import pytest
import torch

from gradmm import admm, runs
from gradmm.errors import UserError

IDENTITY = {"config": {"seed": 0, "rho": 0.1}, "length": 5}


def some_result(seed: int = 0) -> admm.Result:
    config = admm.Config(outer_steps=3, inner_steps=2)
    x = torch.randn(2, 1, 3, 2, generator=torch.Generator().manual_seed(seed))
    held = []
    admm.solve(
        lambda x, ids, groups: x.square().sum((1, 2, 3)),
        lambda v, groups: (v.round(), v.round().long()[..., 0]),
        admm.start(x),
        config,
        held.append,
    )
    return held[0]


def test_a_saved_result_is_read_back_to_the_last_bit(tmp_path):
    folder, result = runs.RunFolder.open(tmp_path / "run", IDENTITY), some_result()
    assert folder.load_result(0, torch.device("cpu")) is None
    folder.save_result(0, result)
    again = runs.RunFolder.open(tmp_path / "run", IDENTITY).load_result(0, torch.device("cpu"))
    for name in ("x", "lam", "ids", "active"):
        assert torch.equal(getattr(again.state, name), getattr(result.state, name))
    assert torch.equal(again.value, result.value) and torch.equal(again.match_loss, result.match_loss)
    assert (again.history, again.reason, again.state.step) == (result.history, result.reason, result.state.step)


def test_another_runs_settings_are_named_and_its_files_kept(tmp_path):
    runs.RunFolder.open(tmp_path, IDENTITY).save_result(0, some_result())
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(
        UserError, match=r"other settings: config\.seed \(0 there, 1 now\).*choose another output folder"
    ):
        runs.RunFolder.open(tmp_path, {**IDENTITY, "config": {"seed": 1, "rho": 0.1}})
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_another_draw_of_noise_is_named_as_what_differs(tmp_path):
    runs.RunFolder.open(tmp_path, {"release": {"fingerprint": "ab"}})
    with pytest.raises(UserError, match=r'fingerprint \("ab" there, "cd" now, with noise drawn anew, or'):
        runs.RunFolder.open(tmp_path, {"release": {"fingerprint": "cd"}})


@pytest.mark.parametrize("name", runs.RUN_FILES)
def test_foreign_files_are_not_overwritten(tmp_path, name):
    (tmp_path / name).write_text("mine")
    with pytest.raises(UserError, match=rf"holds {name} but no manifest"):
        runs.RunFolder.open(tmp_path, IDENTITY)
    assert (tmp_path / name).read_text() == "mine"
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file: give a folder"):
        runs.RunFolder.open(tmp_path / "file", IDENTITY)


def test_a_damaged_batch_is_named(tmp_path):
    folder = runs.RunFolder.open(tmp_path, IDENTITY)
    (tmp_path / "batch-0000.safetensors").write_bytes(b"half a file")
    with pytest.raises(UserError, match=r"batch-0000\.safetensors.*remove it and run again"):
        folder.load_result(0, torch.device("cpu"))


def test_the_end_of_a_run_leaves_results_without_clocks_and_no_unfinished_work(tmp_path):
    folder = runs.RunFolder.open(tmp_path, IDENTITY)
    folder.save_result(0, some_result())
    history = pandas.DataFrame([{"step": 1, "group": 0, "match_z": float("nan"), "seconds": 0.5}])
    rows = [{"text": "a", "match_loss": float("inf"), "kept": True}, {"text": "b", "match_loss": 0.5, "kept": False}]
    folder.finish(rows, history, dict(folder.manifest), "# card\n")
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"README.md", "manifest.json", "train.jsonl", "synthetic.jsonl", "history.jsonl", "timings.jsonl"}
    written = [json.loads(line) for line in (tmp_path / "synthetic.jsonl").read_text().splitlines()]
    assert written == [{**rows[0], "match_loss": None}, rows[1]]
    assert json.loads((tmp_path / "train.jsonl").read_text()) == {"text": "a", "match_loss": None, "kept": True}
    assert json.loads((tmp_path / "history.jsonl").read_text()) == {"step": 1, "group": 0, "match_z": None}
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["status"] == "complete" and manifest["clock"]["seconds"] >= 0 and manifest["versions"]["torch"]


def test_without_a_folder_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = runs.RunFolder.open(None, IDENTITY)
    folder.save_result(0, some_result())
    folder.finish([], pandas.DataFrame([{"step": 1, "group": 0, "seconds": 1.0}]), {}, "")
    assert folder.load_result(0, torch.device("cpu")) is None and not list(tmp_path.iterdir())


def test_a_run_that_was_finished_without_a_file_of_kept_texts_is_read_back(tmp_path):
    folder = runs.RunFolder.open(tmp_path, IDENTITY)
    history = pandas.DataFrame([{"step": 1, "group": 0, "match_z": 0.5}])
    folder.finish([{"text": "a", "match_loss": 1.0, "kept": True}], history, dict(folder.manifest), "# card\n")
    (tmp_path / "train.jsonl").unlink()
    again = runs.RunFolder.open(tmp_path, IDENTITY)
    assert again.finished and again.load()[0] == [{"text": "a", "match_loss": 1.0, "kept": True}]


# ---------------------------------------------------------------- a notebook's folder

GIVEN = {"model": "demo", "data": "demo", "seed": 0, "rho": None}
PRIVATE = {**GIVEN, "epsilon": 1.0, "private": True}


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """An empty current folder with data in it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my reviews").mkdir()
    (tmp_path / "my reviews" / "train.jsonl").write_text('{"text": "fine", "label": 0}\n')
    return tmp_path


@pytest.mark.parametrize(
    "change", [{"seed": 1}, {"rho": 0.1}, {"model": "other/model"}, {"data": "my reviews"}, {"epsilon": 1.0}]
)
def test_a_default_folder_follows_from_the_parameters(here, change):
    usual, other = (runs.output_folder("00-quickstart", None, **values) for values in (GIVEN, GIVEN | change))
    assert usual == runs.output_folder("00-quickstart", None, **GIVEN) != other
    assert usual != runs.output_folder("02-synthesis", None, **GIVEN)
    assert usual.parent == other.parent == Path("results/00-quickstart") and usual.name.startswith("demo-demo-")
    assert len(usual.name) == 18


def test_a_default_folder_has_a_readable_name_whatever_the_parameters_are_called(here):
    for model, data, start in (
        ("org/Some_Model-1.5", "my reviews", "Some_Model-1.5-my-reviews-"),
        ("../..", "[v2]", "v2-"),
        ("é" * 90, "x/", f"{'é' * 40}-x-"),
    ):
        folder = runs.output_folder("a", None, model=model, data=data)
        assert folder.name.startswith(start) and folder.parent == Path("results/a") and not folder.exists()


def test_a_default_folder_follows_local_files_and_versions_but_a_private_one_public_files_alone(here, monkeypatch):
    given = [one | {"data": "my reviews"} for one in (GIVEN, PRIVATE, PRIVATE | {"private": False})]
    before = [runs.output_folder("a", None, **values) for values in given]
    (here / "my reviews" / "train.jsonl").write_text('{"text": "dull", "label": 0}\n')
    changed = [runs.output_folder("a", None, **values) for values in given]
    assert before[1] == changed[1] and all(before[place] != changed[place] for place in (0, 2))  # epsilon alone: public
    with monkeypatch.context() as other:
        other.setattr(runs, "versions", lambda: {"torch": "0"})
        for place in range(3):
            assert runs.output_folder("a", None, **given[place]) != changed[place]
    (here / "my reviews" / "task.yaml").write_text("labels: [low, high]\n")
    assert before[1] != runs.output_folder("a", None, **given[1])  # public, and decides what is written
    (here / "my reviews" / "task.yaml").unlink()
    own = runs.output_folder("a", "mine", **PRIVATE | {"data": "my reviews"})
    assert json.loads((own / "parameters.json").read_text())["files"] == {}
    assert before[1] == runs.output_folder("a", None, **given[1] | {"epsilon": 1})


@pytest.mark.parametrize("name", runs.TASK_FILES)
@pytest.mark.parametrize("private", [False, True])
def test_a_default_folder_follows_what_decides_the_task_of_a_single_file(here, name, private):
    given = GIVEN | {"data": "my reviews/train.jsonl", "private": private}
    before = runs.output_folder("a", None, **given)
    (here / "my reviews" / name).write_text("a")
    assert (before == runs.output_folder("a", None, **given)) == (private and name == "README.md")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"seed": 1},
            r"mine holds results of other parameters: parameters.seed \(0 there, 1 now\): leave output out, or "
            r"give another folder",
        ),
        ({"more": {"a": 1}}, r"parameters.more \(null there, "),
        ({"data": "my reviews"}, r"parameters.data \(\"demo\" there, \"my reviews\" now\); files.data"),
    ],
)
def test_a_folder_of_ones_own_is_refused_where_it_holds_other_results_and_continued_else(here, change, message):
    assert runs.output_folder("a", "mine", **GIVEN) == runs.output_folder("a", "mine", **GIVEN) == Path("mine")
    (here / "mine" / "a.json").write_text("{}")
    with pytest.raises(UserError, match=message):
        runs.output_folder("a", "mine", **GIVEN | change)
    with pytest.raises(UserError, match=r"notebook \(\"a\" there, \"b\" now\)"):
        runs.output_folder("b", "mine", **GIVEN)
    (here / "file").touch()
    for place in ("file", 3, "x\0"):
        with pytest.raises(UserError, match="output"):
            runs.output_folder("a", place, **GIVEN)


@pytest.mark.parametrize("mended", [{"model": "demo"}, {"data": "my reviews"}, {"seed": 3}])
def test_a_folder_without_results_is_given_to_the_next_parameters(here, mended):
    runs.output_folder("a", "mine", **GIVEN | {"model": "no/such/model"})
    folder = runs.output_folder("a", "mine", **GIVEN | mended)
    (folder / "a.json").write_text("{}")
    assert runs.output_folder("a", "mine", **GIVEN | mended) == folder
    with pytest.raises(UserError, match="mine holds results of other parameters"):
        runs.output_folder("a", "mine", **GIVEN | {"model": "no/such/model"})


def test_what_is_not_for_release_says_so_first_and_lies_apart(tmp_path):
    place = runs.write_not_for_release(tmp_path, "a", {"accuracy": 0.5})
    assert place == tmp_path / "not-for-release" / "a.json"
    assert list(json.loads(place.read_text())) == ["not for release", "accuracy"]


def test_a_run_neither_takes_nor_removes_files_that_are_named_nearly_as_its_own(tmp_path):
    own = [tmp_path / name for name in ("texts-interviews.json", "batch-2024.json", "batch-1.safetensors")]
    for path in own:
        path.write_text("mine")
    folder = runs.RunFolder.open(tmp_path, {"seed": 0})
    assert folder.texts_place(0).name == "texts-0000.json"
    folder.finish([], pandas.DataFrame({"step": [], "group": []}), {}, "card")
    assert all(path.read_text() == "mine" for path in own)


@pytest.mark.parametrize("name", ["texts-0000.json", "batch-0003.safetensors", "groups-at-once.json"])
def test_unfinished_work_without_its_manifest_is_nobody_s(tmp_path, name):
    (tmp_path / name).write_text("[]")
    with pytest.raises(UserError, match=f"holds {name} but no manifest: choose another output folder or empty this"):
        runs.RunFolder.open(tmp_path, {"seed": 1})


def test_gradmm_s_version_follows_its_code():
    found = runs.versions()
    assert found["gradmm"].startswith("0.1.0+") and found["gradmm"].endswith(runs.package_digest()[:8])


def test_a_default_folder_follows_each_file_of_a_list(here, monkeypatch):
    (here / "other").mkdir()
    (here / "other" / "weights.bin").write_bytes(b"one")
    before = runs.output_folder("a", None, **GIVEN, other_models=["demo", "other"])
    (here / "other" / "weights.bin").write_bytes(b"two")
    assert runs.output_folder("a", None, **GIVEN, other_models=["demo", "other"]) != before


@pytest.mark.parametrize(
    "name", ["train.csv", "dev.jsonl", "task.yaml", "labels.json", "state.json", "dataset_dict.json"]
)
def test_a_folder_of_data_is_no_output_folder(tmp_path, name):
    (tmp_path / name).write_text("mine")
    for claim in (lambda: runs.RunFolder.open(tmp_path, IDENTITY), lambda: runs.output_folder("a", tmp_path, **GIVEN)):
        with pytest.raises(UserError, match=rf"holds data \({name}\): choose another output folder"):
            claim()
    assert [path.name for path in tmp_path.iterdir()] == [name]
    (tmp_path / "manifest.json").write_text("{}")
    runs.refuse_foreign(tmp_path)


def test_a_default_folder_follows_the_splits_that_datasets_saved(here):
    def folder(text):
        rows = datasets.Dataset.from_dict({"text": [text, "dull"], "label": [1, 0]})
        datasets.DatasetDict(train=rows).save_to_disk(here / "saved")
        return runs.output_folder("a", None, **GIVEN | {"data": "saved"})

    assert folder("fine") != folder("good")
