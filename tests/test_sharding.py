"""Several processes give the bytes of one, whichever dies; none waits for one that is gone."""

import json
import os
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import yaml
from executing import once

import gradmm
from gradmm import cli, models, sharding
from gradmm.config import SynthesisConfig
from gradmm.errors import UserError
from gradmm.sharding import ProcessGroup
from gradmm.synthesis import synthesize

ROOT = Path(__file__).resolve().parents[1]
TINY = {
    "n_synthetic": 8, "oversample": 1.5, "group_size": 2, "outer_steps": 3, "inner_steps": 2, "top_k": 10,
    "init_candidates": 2,
}  # fmt: skip
CONFIGS = {
    "admm": SynthesisConfig(search="admm", ranking="text", **TINY, groups_per_batch=1, length=8),
    "pool": SynthesisConfig(
        **TINY | {"n_synthetic": 140}, search="pool", ranking="group", length=12
    ),  # 105 a class: two batches each
}
SIZE = {"n": 8, "seed": 0}


def problem():
    """The embedded model and task with a Release of a few examples."""
    task, data = gradmm.load_data("demo")
    model = gradmm.load_model("demo", device="cpu")
    return model, task, gradmm.release(model, task, gradmm.sample_examples(data.train, task=task, **SIZE), space="head")


def files_of(folder: Path) -> dict[str, object]:
    """Every file but the clock readings."""
    held = {
        path.name: path.read_bytes() for path in folder.iterdir() if path.name not in ("timings.jsonl", "manifest.json")
    }
    manifest = json.loads((folder / "manifest.json").read_text())
    return {**held, "manifest.json": {name: value for name, value in manifest.items() if name != "clock"}}


@pytest.fixture(scope="module")
def alone(shared_folder) -> Path:
    """Every search by one process."""

    def run(folder: Path) -> None:
        for name, config in CONFIGS.items():
            synthesize(*problem(), config, folder / name, progress=False)

    return once(shared_folder, "alone", run)


# ---------------------------------------------------------------- one process


def test_without_a_launcher_there_is_one_process(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    assert sharding.launched() == (0, 1, 0)
    with sharding.processes(None) as processes:
        assert processes.leads and processes.share("x", range(3), lambda unit: unit**2, None) == [0, 1, 4]
        assert processes.main_first("y", lambda: 5) == 5


def launch(monkeypatch, rank: int, count: int, local: int = 0) -> None:
    for name, value in (("RANK", rank), ("WORLD_SIZE", count), ("LOCAL_RANK", local)):
        monkeypatch.setenv(name, str(value))


def test_the_launcher_s_variables_decide_on_number_and_gpu(monkeypatch):
    launch(monkeypatch, 3, 4, 1)
    assert sharding.launched() == (3, 4, 1)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    assert models.find_device("auto") == torch.device("cuda:1")
    launch(monkeypatch, 4, 4)
    with pytest.raises(UserError, match=r"RANK, WORLD_SIZE, LOCAL_RANK = 4, 4, 0 do not say which of how many"):
        sharding.launched()


@pytest.mark.parametrize(("address", "port"), [("", ""), ("here", ""), ("", "29500"), ("here", "x"), ("here", "99999")])
def test_processes_that_are_not_told_where_to_meet_are_refused(monkeypatch, tmp_path, address, port):
    launch(monkeypatch, 0, 2)
    monkeypatch.setenv("MASTER_ADDR", address)
    monkeypatch.setenv("MASTER_PORT", port)
    said = f"MASTER_ADDR, MASTER_PORT = '{address}', '{port}' do not say where the 2 processes meet: unset RANK and"
    with pytest.raises(UserError, match=said), sharding.processes(tmp_path):
        pass


def test_what_several_processes_cannot_do_is_refused_before_anything_is_written(monkeypatch, tmp_path):
    model, task, release = problem()
    launch(monkeypatch, 0, 2)
    with pytest.raises(
        UserError, match="2 processes were launched and share one synthesis through its folder: give output"
    ):
        synthesize(model, task, release, CONFIGS["admm"], progress=False)
    launch(monkeypatch, 0, 9)
    with pytest.raises(
        UserError,
        match="9 processes would share 6 units of work of up to 1 groups: set groups_per_batch .* or launch 6 at most",
    ):
        synthesize(model, task, release, CONFIGS["admm"], tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_the_command_line_gives_what_python_gives(alone, tmp_path, capsys):
    release = problem()[2].save(tmp_path / "release.safetensors")
    (tmp_path / "settings.yaml").write_text(
        yaml.safe_dump(TINY | {"search": "admm", "ranking": "text", "groups_per_batch": 1, "length": 8})
    )
    options = f"--task demo --device cpu --quiet --release {release} --output {tmp_path / 'run'} --settings"
    given = ["synthesize", *options.split()]
    assert cli.main([*given, str(tmp_path / "settings.yaml")]) == 0
    assert files_of(tmp_path / "run") == files_of(alone / "admm")
    assert "8 of 12 texts are kept in" in capsys.readouterr().out
    (tmp_path / "other.yaml").write_text("sede: 1\n")
    assert cli.main([*given, str(tmp_path / "other.yaml")]) == 2
    assert "unknown setting 'sede'" in capsys.readouterr().err
    assert cli.main([*given, str(tmp_path / "settings.yaml"), "--search", "Paper"]) == 2
    assert capsys.readouterr().err == "search = 'Paper' is not known: did you mean paper?\n"


# ---------------------------------------------------------------- a group of threads


def together(*tasks) -> list:
    """Each task's result or exception, called with a processes member of its own, side by side."""
    store = torch.distributed.HashStore()

    def one(rank: int):
        processes = ProcessGroup(rank, len(tasks), store)
        try:
            with processes.at_work():
                return tasks[rank](processes)
        except (UserError, ArithmeticError) as error:
            return error

    with ThreadPoolExecutor(len(tasks)) as pool:
        return list(pool.map(one, range(len(tasks))))


def test_units_are_shared_out_and_everyone_has_all_results():
    done: dict[int, int] = {}

    def task(processes):
        def work(unit):
            done[unit] = processes.rank
            return unit**2

        return processes.share("squares", range(5), work, lambda unit: unit**2 if unit in done else None)

    assert together(task, task, task) == [[0, 1, 4, 9, 16]] * 3
    assert done == {0: 0, 1: 1, 2: 2, 3: 0, 4: 1}


def test_the_leader_goes_first():
    calls = []

    def task(processes):
        return processes.main_first(
            "open", lambda: time.sleep(0.2 if processes.leads else 0) or calls.append(processes.rank)
        )

    together(task, task, task)
    assert len(calls) == 3 and calls[0] == 0


def test_a_failure_ends_the_others_with_its_reason():
    def failing(processes):
        raise ZeroDivisionError("no such thing")

    first, second = together(lambda processes: processes.meet("end"), failing)
    assert isinstance(second, ZeroDivisionError)
    assert str(first).startswith("process 1 of 2 ended (ZeroDivisionError: no such thing): what was finished is kept")
    first, second = together(
        failing, lambda processes: processes.share("x", range(4), lambda unit: time.sleep(0.1), None)
    )
    assert isinstance(first, ZeroDivisionError) and "process 0 of 2 ended" in str(second)


def test_a_process_without_a_sign_of_life_is_not_waited_for(monkeypatch):
    monkeypatch.setattr(sharding, "SILENCE", 0.3)
    store = torch.distributed.HashStore()
    store.set("alive/1", "7")
    with pytest.raises(UserError, match="process 1 of 2 gave no sign of life for 0 seconds: what was finished is kept"):
        ProcessGroup(0, 2, store).meet("end")
    monkeypatch.setattr(sharding, "ARRIVAL", 0.2)
    with pytest.raises(UserError, match="process 1 of 2 gave no sign of life"):
        ProcessGroup(0, 2, torch.distributed.HashStore()).meet("end")


def test_a_slow_process_is_waited_for(monkeypatch):
    monkeypatch.setattr(sharding, "SILENCE", 0.4)
    monkeypatch.setattr(sharding, "BEAT", 0.05)
    assert together(
        lambda processes: processes.meet("end"), lambda processes: time.sleep(1.0) or processes.meet("end")
    ) == [None, None]


def test_a_folder_that_is_not_shared_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(sharding, "VISIBLE", 0.2)
    with pytest.raises(
        UserError, match=r"batch was written by another process and cannot be seen by process 1 of 2 .*share"
    ):
        ProcessGroup(1, 2, torch.distributed.HashStore()).find(tmp_path / "batch")


# ---------------------------------------------------------------- two processes

PROGRAM = """
import os, signal, sys
import torch
sys.path.insert(0, sys.argv[1])
torch.set_num_threads(1)
import gradmm.runs, test_sharding
gradmm.runs.SNAPSHOT_SECONDS = 0.0
mode, output = sys.argv[2], sys.argv[3]
if mode == "whole":
    import accelerate
    state = accelerate.PartialState(cpu=True)
    assert (state.backend, state.num_processes) == ("gloo", 2)
steps = []
def on_step(batch, result):
    steps.append(batch)
    if mode != "whole" and os.environ["RANK"] == "1" and len(steps) == 5:  # in the second of three batches
        if mode == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        raise ArithmeticError("something broke")
for name in test_sharding.CONFIGS if mode == "whole" else ["admm"]:
    config = test_sharding.CONFIGS[name]
    result = test_sharding.synthesize(*test_sharding.problem(), config, f"{output}/{name}", False, on_step)
    assert len(result.kept) == config.n_synthetic
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def program(folder: Path) -> Path:
    (folder / "program.py").write_text(PROGRAM)
    return folder / "program.py"


def environment() -> dict[str, str]:
    return {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def accelerated(folder: Path, mode: str) -> subprocess.CompletedProcess:
    """Two processes on the CPU; `--multi_gpu` is accelerate's launcher of several processes (`--cpu` starts one)."""
    command = [
        sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines",
        "1",
    ]  # fmt: skip
    command += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", str(free_port())]
    command += [program(folder), Path(__file__).parent, mode, folder]
    return subprocess.run(
        command, capture_output=True, text=True, check=False, env=environment(), timeout=240, stdin=subprocess.DEVNULL
    )


@pytest.mark.slow
def test_two_processes_give_the_bytes_of_one(alone, tmp_path):
    ended = accelerated(tmp_path, "whole")
    assert ended.returncode == 0, ended.stderr
    for name in CONFIGS:
        assert files_of(tmp_path / name) == files_of(alone / name)


@pytest.mark.slow
def test_a_killed_process_ends_the_other_and_one_process_continues_to_the_same_bytes(alone, tmp_path):
    ended = accelerated(tmp_path, "kill")
    assert ended.returncode != 0 and "SIGKILL" in ended.stderr
    held = {path.name for path in (tmp_path / "admm").iterdir()}
    assert json.loads((tmp_path / "admm" / "manifest.json").read_text())["status"] == "running"
    assert "batch-0001.safetensors" in held
    steps = []
    synthesize(*problem(), CONFIGS["admm"], tmp_path / "admm", False, lambda batch, result: steps.append(batch))
    assert 0 < steps.count(3) < 3 and 1 not in steps  # batch 1 was whole, batch 3 begun
    assert files_of(tmp_path / "admm") == files_of(alone / "admm")


VISITS = """
import sys
from gradmm import sharding
for visit in range(4):
    with sharding.processes(sys.argv[1]) as group:
        group.meet("here")
print("through")
"""


def test_without_a_launcher_s_agent_one_visit_may_follow_another_at_once(tmp_path):
    started = [
        subprocess.Popen(
            [sys.executable, "-c", VISITS, tmp_path],
            env=environment() | meeting, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for port in [str(free_port())]
        for meeting in (
            {"RANK": rank, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port} for rank in "01"
        )
    ]  # fmt: skip
    assert [one.communicate(timeout=120)[0].strip().splitlines()[-1] for one in started] == ["through"] * 2


@pytest.mark.slow
def test_without_accelerate_a_failure_ends_the_other_process_too(tmp_path):
    port = str(free_port())
    running = [
        subprocess.Popen(
            [sys.executable, program(tmp_path), Path(__file__).parent, "fail", tmp_path], stderr=subprocess.PIPE,
                text=True, stdin=subprocess.DEVNULL,
            env={**environment(), "RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port},
        )
        for rank in range(2)
    ]  # fmt: skip
    errors = [process.communicate(timeout=240)[1] for process in running]
    assert [process.returncode for process in running] == [1, 1]
    assert "UserError: process 1 of 2 ended (ArithmeticError: something broke): what was finished is kept" in errors[0]
    assert errors[1].rstrip().endswith("ArithmeticError: something broke")
