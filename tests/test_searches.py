"""The searches: each by its name, and by two processes as by one."""

import json
from dataclasses import replace

import pytest
import torch
from test_sharding import together
from test_synthesis import REAL, SMALL, TASK

import gradmm
from gradmm.matching import Matching
from gradmm.plan import Plan
from gradmm.runs import FITTED, RunFolder
from gradmm.searches import search
from gradmm.sharding import ProcessGroup
from gradmm.synthesis import synthesize


@pytest.fixture(scope="module")
def setting(tiny_model):
    model = tiny_model("llama", dtype=torch.float32)
    return model, TASK, gradmm.release(model, TASK, REAL, space="head")


def plan_of(model, config) -> Plan:
    return Plan.of(model, TASK, gradmm.release(model, TASK, REAL, space="head"), config)


def test_two_processes_write_what_one_writes(tiny_model, tmp_path):
    config = replace(SMALL, groups_per_batch=2)
    plans = [plan_of(tiny_model("llama", dtype=torch.float32), config) for _ in range(3)]
    folders = [
        RunFolder.open(tmp_path / name, plan.identity())
        for name, plan in zip(("one", "two", "two"), plans, strict=True)
    ]
    alone = search(plans[0], folders[0], ProcessGroup(), False, None)
    calls = [lambda processes, i=i: search(plans[i], folders[i], processes, False, None) for i in (1, 2)]
    for found in together(*calls):
        assert (
            found.texts, found.classes, found.groups, found.ended,
        ) == (alone.texts, alone.classes, alone.groups, alone.ended)  # fmt: skip
        assert found.history.drop(columns="seconds").equals(alone.history.drop(columns="seconds"))


def test_the_groups_that_the_memory_held_at_once_are_recorded(setting, tmp_path, monkeypatch):
    model, task, release = setting
    plan, sound = Plan.of(model, task, release, SMALL), Matching.of_vectors
    plan = replace(plan, solver=replace(plan.solver, groups_per_pass=None))

    def short(self, x, ids, classes):
        if len(x) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return sound(self, x, ids, classes)

    monkeypatch.setattr(Matching, "of_vectors", short)
    folder = RunFolder.open(tmp_path, plan.identity())
    seen = []
    search(plan, folder, ProcessGroup(), False, lambda number, result: seen.append(held(tmp_path)))
    assert seen == [{"cpu": 2}] * 2 and folder.manifest["groups_at_once"] == {"cpu": 2}
    again = RunFolder.open(tmp_path, plan.identity())
    assert again.fitted(model.device, lambda: pytest.fail("it is known")) == 2


def held(folder):
    return json.loads((folder / FITTED).read_text())


def test_a_batch_that_has_ended_holds_no_vectors(setting, monkeypatch):
    model, task, release = setting
    held, own = [], ProcessGroup.share
    monkeypatch.setattr(ProcessGroup, "share", lambda self, *asked: held.append(own(self, *asked)) or held[-1])
    ended = synthesize(model, task, release, replace(SMALL, groups_per_batch=1), progress=False).manifest[
        "groups_ended"
    ]
    (results,) = held
    assert len(results) == len(ended) > 1 and all(row["match_loss"] is not None for row in ended)
    assert [state.x.numel() + state.lam.numel() for state in (result.state for result in results)] == [0] * len(results)
