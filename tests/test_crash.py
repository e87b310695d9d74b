"""Kill -9 and a full disk lose nothing: what is left reads as whole, and the continued run equals the uninterrupted
one.

`GRADMM_KILLS=50 pytest tests/test_crash.py` tries fifty moments of each kind of run; see `crash.py`.
"""

import errno
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import crash
import papermill
import pytest
import torch
from test_protocol import CONFIG, TWO, splits_of
from test_synthesis import REAL, SMALL, TASK

import gradmm
from gradmm import files
from gradmm.errors import UserError
from gradmm.experiments import batch
from gradmm.experiments.protocol import compare

ROOT = Path(__file__).resolve().parents[1]
MOMENTS = int(os.environ.get("GRADMM_KILLS", "4"))


@pytest.mark.slow
@pytest.mark.parametrize("kind", crash.KINDS)
def test_a_run_killed_at_any_moment_continues_to_the_same_bytes(kind, tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(ROOT / "tests" / "crash.py"), kind, str(tmp_path / "runs"), str(MOMENTS), "0"]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL, env=environment
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    print(json.dumps(found))  # shown with `pytest -rP`
    assert found["differing"] == {} and found["moments"] == MOMENTS
    assert found["killed"] >= MOMENTS / 2 and found["unfinished_seen"] >= 1 and found["files_read"] >= MOMENTS / 2


TWO_BATCHES = replace(SMALL, groups_per_batch=2)
FULL = re.compile(
    r".* could not be written \(No space left on device\): free space or choose another output folder; what was "
    r"finished before is kept"
)


@pytest.fixture(scope="module")
def setting(tiny_model):
    model = tiny_model("llama", dtype=torch.float32)
    return model, gradmm.release(model, TASK, REAL, space="head")


def fill(monkeypatch, after: int) -> None:
    """A disk that takes `after` more files and is full from then on."""
    taken = []

    def fsync(handle: int, own=os.fsync) -> None:
        taken.append(handle)
        if len(taken) > after:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        own(handle)

    monkeypatch.setattr(files.os, "fsync", fsync)


@pytest.fixture(scope="module")
def whole(setting, tmp_path_factory) -> Path:
    """The folder of the same synthesis on a disk with room for it."""
    model, release = setting
    folder = tmp_path_factory.mktemp("whole")
    gradmm.synthesize(model, TASK, release, TWO_BATCHES, folder / "run", progress=False)
    return folder / "run"


# Manifest, 2 batches of 3 writes, results.
@pytest.mark.parametrize(("after", "kept"), [(0, 0), (1, 1), (3, 2), (6, 3), (9, 5)])
def test_a_synthesis_on_a_full_disk_says_so_keeps_what_it_has_and_continues(
    setting, whole, tmp_path, monkeypatch, after, kept
):
    model, release = setting
    monkeypatch.setattr("gradmm.runs.SNAPSHOT_SECONDS", 0.0)
    fill(monkeypatch, after)
    with pytest.raises(UserError) as caught:
        gradmm.synthesize(model, TASK, release, TWO_BATCHES, tmp_path / "cut", progress=False)
    assert FULL.fullmatch(str(caught.value)) and not list((tmp_path / "cut").glob(".*"))
    assert crash.check_whole(tmp_path / "cut") == kept
    monkeypatch.undo()
    gradmm.synthesize(model, TASK, release, TWO_BATCHES, tmp_path / "cut", progress=False)
    assert crash.held(tmp_path / "cut") == crash.held(whole)


def test_a_comparison_on_a_full_disk_keeps_its_finished_records(setting, tmp_path, monkeypatch):
    model, _ = setting
    options = {"methods": ("none", "real"), "seeds": (0,), "progress": False}
    compare(model, TWO, splits_of(TWO), CONFIG, output=tmp_path / "whole", **options)
    fill(monkeypatch, 2)
    with pytest.raises(UserError) as caught:
        compare(model, TWO, splits_of(TWO), CONFIG, output=tmp_path / "cut", **options)
    assert FULL.fullmatch(str(caught.value))
    assert [path.name for path in (tmp_path / "cut" / "records").iterdir()] == ["none-seed0.json"]
    monkeypatch.undo()
    compare(model, TWO, splits_of(TWO), CONFIG, output=tmp_path / "cut", **options)
    assert crash.held(tmp_path / "cut") == crash.held(tmp_path / "whole")


def test_a_batch_on_a_full_disk_ends_with_the_reason_and_keeps_the_old_notebook(tmp_path, monkeypatch):
    stored = crash.store(tmp_path / "stored" / "one.ipynb", crash.PARAMETERS)
    (job,) = batch.plan([stored], tmp_path / "run")
    (tmp_path / "run").mkdir()
    job.target.write_text("old")
    monkeypatch.setattr(papermill, "execute_notebook", lambda stored, draft, *_, **__: Path(draft).write_text("new"))
    fill(monkeypatch, 0)
    (outcome,) = batch.run([job], 1, progress=False)
    assert outcome.state == "failed"
    assert FULL.fullmatch(outcome.note.removeprefix("UserError: ").replace(os.linesep, " "))
    assert job.target.read_text() == "old" and os.listdir(tmp_path / "run") == ["one.ipynb"]
