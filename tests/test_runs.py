"""A run's folder: continued with the same settings, refused with others, whole files only."""

import json

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
    assert torch.equal(again.value, result.value) and torch.equal(again.match, result.match)
    assert (again.history, again.reason, again.state.step) == (result.history, result.reason, result.state.step)


def test_another_runs_settings_are_named_and_its_files_kept(tmp_path):
    runs.RunFolder.open(tmp_path, IDENTITY).save_result(0, some_result())
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(UserError, match=r"other settings: config\.seed \(0 there, 1 now\).*choose another output folder"):
        runs.RunFolder.open(tmp_path, {**IDENTITY, "config": {"seed": 1, "rho": 0.1}})
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_foreign_files_are_not_overwritten(tmp_path):
    (tmp_path / "synthetic.jsonl").write_text("mine")
    with pytest.raises(UserError, match=r"holds synthetic\.jsonl but no manifest"):
        runs.RunFolder.open(tmp_path, IDENTITY)
    assert (tmp_path / "synthetic.jsonl").read_text() == "mine"
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
    folder.finish([{"text": "a", "match": float("inf")}], history, dict(folder.manifest), "# card\n")
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"README.md", "manifest.json", "synthetic.jsonl", "history.jsonl", "timings.jsonl"}
    assert json.loads((tmp_path / "synthetic.jsonl").read_text()) == {"text": "a", "match": None}
    assert json.loads((tmp_path / "history.jsonl").read_text()) == {"step": 1, "group": 0, "match_z": None}
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["status"] == "complete" and manifest["clock"]["seconds"] >= 0 and manifest["versions"]["torch"]


def test_without_a_folder_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = runs.RunFolder.open(None, IDENTITY)
    folder.save_result(0, some_result())
    folder.finish([], pandas.DataFrame([{"step": 1, "group": 0, "seconds": 1.0}]), {}, "")
    assert folder.load_result(0, torch.device("cpu")) is None and not list(tmp_path.iterdir())
