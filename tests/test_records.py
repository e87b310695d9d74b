"""Records: what is written is read back, with its machine, versions and commit; anything else is refused."""

import json
import math
import re
import subprocess
from pathlib import Path

import pytest
import torch

from gradmm import runs
from gradmm.errors import UserError
from gradmm.experiments import paper, records

RESULTS = {"tokens_per_second": 12.5, "curve": {0: [1, 2.5, None]}}


def test_a_record_is_read_back_with_what_it_came_from(tmp_path):
    place = tmp_path / "deep" / "07-matching-cpu.json"
    assert records.write_record(place, RESULTS, {"batch": 4, "dtype": "float32"}) is None
    held = records.read_record(place)
    assert tuple(held) == records.KEYS and held["settings"] == {"batch": 4, "dtype": "float32"}
    assert held["results"] == {"tokens_per_second": 12.5, "curve": {"0": [1, 2.5, None]}}
    assert held["versions"] == runs.versions() and held["machine"] == records.machine()
    assert held["commit"] == records.commit()


def test_the_machine_has_cores_and_memory_and_no_name_of_its_own():
    found = records.machine()
    assert found["cores"] >= 1 and found["memory_bytes"] > 1e8 and found["threads"] == torch.get_num_threads()
    assert (found["gpu"] is None) == (not torch.cuda.is_available()) == (found["gpu_memory_bytes"] is None)
    assert not {"host", "node", "user"} & set(found)


def test_the_commit_is_that_of_the_checkout_and_says_when_files_differ():
    head = subprocess.run(
        ["git", "-C", str(records.PACKAGE), "rev-parse", "HEAD"], capture_output=True, text=True, check=False
    )
    if head.returncode:
        pytest.skip("not a git checkout")
    assert records.commit() in (head.stdout.strip(), f"{head.stdout.strip()}-dirty")


def test_outside_a_checkout_the_environment_names_the_commit(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "PACKAGE", tmp_path)
    monkeypatch.delenv(records.COMMIT_VARIABLE, raising=False)
    assert records.commit() == "unknown"
    monkeypatch.setenv(records.COMMIT_VARIABLE, "0123abc")
    assert records.commit() == "0123abc"
    monkeypatch.setenv("PATH", str(tmp_path))  # no git at all
    assert records.commit() == "0123abc"


@pytest.mark.parametrize(
    "value", [math.nan, math.inf, torch.zeros(1), {1, 2}], ids=["nan", "infinity", "tensor", "set"]
)
def test_what_json_cannot_hold_is_refused_and_nothing_is_written(tmp_path, value):
    place = tmp_path / "a.json"
    for results, settings in (({"x": value}, {}), ({}, {"x": value})):
        with pytest.raises(UserError, match=re.escape(f"{place} cannot hold these results or settings")):
            records.write_record(place, results, settings)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "held, missing", [({"results": {}}, "settings, machine, versions, commit"), ([], "settings, machine")]
)
def test_a_file_that_is_no_record_is_refused(tmp_path, held, missing):
    (tmp_path / "a.json").write_text(json.dumps(held), encoding="utf-8")
    with pytest.raises(UserError, match=f"is no record, it has no {missing}"):
        records.read_record(tmp_path / "a.json")
    with pytest.raises(UserError, match="does not exist"):
        records.read_record(tmp_path / "b.json")


def test_the_records_of_a_folder_are_chosen_by_their_names_first_letters(tmp_path):
    for name in ("07-b", "07-a", "03-finetuning-sst2"):
        records.write_record(tmp_path / f"{name}.json", {"name": name}, {})
    (tmp_path / "07-c.txt").write_text("no record", encoding="utf-8")
    found = records.read_records(tmp_path, "07-")
    assert list(found) == ["07-a", "07-b"] and found["07-a"]["results"] == {"name": "07-a"}
    assert list(records.read_records(tmp_path, "")) == ["03-finetuning-sst2", "07-a", "07-b"]
    assert records.read_records(tmp_path / "absent", "07-") == {}


@pytest.mark.parametrize("place", [".", "notebooks", "notebooks/params/demo"])
def test_records_are_found_from_the_checkout_and_from_every_folder_in_it(place, tmp_path, monkeypatch):
    records.write_record(tmp_path / "book" / "records" / "07-a.json", {"methods": {}}, {})
    (tmp_path / place).mkdir(parents=True, exist_ok=True)
    monkeypatch.chdir(tmp_path / place)
    assert list(records.read_records("book/records", "07-")) == ["07-a"]
    assert records.find_folder("book/records") == tmp_path / "book" / "records"
    assert paper.own_runs("book/records") == []  # it holds no accuracies


def test_nearer_records_come_first_and_what_is_nowhere_is_empty(tmp_path, monkeypatch):
    records.write_record(tmp_path / "mine" / "07-far.json", {}, {})
    records.write_record(tmp_path / "lab" / "mine" / "07-near.json", {}, {})
    monkeypatch.chdir(tmp_path / "lab")
    assert list(records.read_records("mine", "07-")) == ["07-near"]
    assert list(records.read_records(tmp_path / "mine", "07-")) == ["07-far"]
    assert records.read_records("not/there", "07-") == {} and records.find_folder("not/there") == Path("not/there")


@pytest.mark.parametrize("gpu", [None, "NVIDIA H100"])
def test_the_origin_of_a_record_names_its_machine_commit_and_settings(gpu):
    machine = {"gpu": gpu, "processor": "a processor"}
    record = {"machine": machine, "versions": {"torch": "2.13"}, "commit": "0123456789abcdef", "settings": {"n": 2}}
    assert records.origin(record) == f"{gpu or 'a processor'}, torch 2.13, commit `0123456789`; n = 2"
    here = {**record, "commit": "0123456789abcdef-dirty", "settings": {"device": "cpu"}}
    assert records.origin(here) == "a processor, torch 2.13, commit `0123456789-dirty`; device = cpu"
