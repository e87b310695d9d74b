"""One run at a time in an output folder: the second is refused, a killed one keeps nobody out, nothing is left."""

import errno
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from executing import ROOT
from test_protocol import CONFIG, TWO, splits_of
from test_synthesis import REAL, SMALL, TASK

import gradmm
from gradmm import files
from gradmm.errors import UserError
from gradmm.experiments import batch
from gradmm.experiments.protocol import compare
from gradmm.tasks import DEMO

HOLDER = """
import sys, time
from gradmm.files import lock
with lock(sys.argv[1]):
    print("held", flush=True)
    time.sleep(600)
"""
ELSEWHERE = """
import pkgutil, socket, sys
import transformers.optimization  # it needs what the system's name promises: it stays that of a Unix
sys.modules |= {"fcntl": None, "resource": None}
import torch.distributed
for name in ("HashStore", "Store"):
    vars(torch.distributed).pop(name, None)
def refuse(self, address, *rest):
    if self.family != getattr(socket, "AF_UNIX", None):
        raise AssertionError(f"a call to {address}")
def look_up(*where, **how):
    raise AssertionError(f"a look-up of {where}")
socket.socket.connect = socket.socket.connect_ex = refuse
socket.getaddrinfo = socket.gethostbyname = look_up
import gradmm, gradmm.experiments
from importlib import import_module
from gradmm import files
from gradmm.errors import UserError
from gradmm.evaluation import perplexity
from gradmm.generation import Sampling, generate_texts
for package in (gradmm, gradmm.experiments):
    for room in pkgutil.iter_modules(package.__path__, package.__name__ + "."):
        import_module(room.name)
task, data = gradmm.load_data(sys.argv[2])
model = gradmm.load_model(sys.argv[2] + "/model", device="cpu")
real = gradmm.sample_examples(data.train, 4, task, seed=0)
target = gradmm.release(model, task, real, epsilon=1.0, delta=1e-5, length=8)
config = gradmm.SynthesisConfig(n_synthetic=2, oversample=2)
result = gradmm.synthesize(model, task, target, config, sys.argv[1], progress=False)
tuning = gradmm.FinetuneConfig(steps=1, learning_rates=[2e-4], max_validation=4)
gradmm.finetune(model, task, real, data.validation, data.test[:4], tuning)
perplexity(model, [one.text for one in generate_texts(model, task, 1, 0, Sampling(max_tokens=24))])
assert result.manifest["clock"]["peak_memory"].keys() <= {"cuda"}, result.manifest["clock"]
with files.lock(sys.argv[1]):
    try:
        with files.lock(sys.argv[1]):
            print("two hold one folder")
    except UserError as error:
        print(error)
print(len(result.kept))
"""
IN_USE = "is in use by another run: wait for its end, or choose another output folder"


@pytest.fixture(scope="module")
def setting(tiny_model):
    model = tiny_model("llama", dtype=torch.float32)
    return model, TASK, gradmm.release(model, TASK, REAL, space="head")


def test_a_held_folder_is_refused_and_free_again_afterwards(tmp_path):
    with files.lock(tmp_path / "run"):
        with pytest.raises(UserError, match=f"run {IN_USE}"), files.lock(tmp_path / "run"):
            pytest.fail("two runs hold one folder")
        with files.lock(tmp_path / "other"), files.lock(None):
            pass
    with files.lock(tmp_path / "run"):
        pass
    assert os.listdir(tmp_path / "run") == []


def test_an_error_lets_go(tmp_path):
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt), files.lock(tmp_path):
            raise KeyboardInterrupt


@pytest.mark.slow
def test_a_killed_process_keeps_nobody_out_and_its_unfinished_files_go(tmp_path):
    command = [sys.executable, "-c", HOLDER, str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as holder:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(UserError, match=IN_USE), files.lock(tmp_path):
            pytest.fail("two processes hold one folder")
        (tmp_path / f".rows.jsonl.x7{files.UNFINISHED}").write_text("half a li")
        (tmp_path / f".running-x7{files.UNFINISHED}").mkdir()
        (tmp_path / "mine.unfinished").write_text("kept")
        holder.send_signal(signal.SIGKILL)
    assert (tmp_path / files.LOCK).exists()
    with files.lock(tmp_path):
        assert sorted(os.listdir(tmp_path)) == [files.LOCK, "mine.unfinished"]


@pytest.mark.slow
def test_without_fcntl_resource_and_a_network_all_rooms_are_imported_and_a_local_model_and_data_do(tmp_path):
    command = [sys.executable, "-c", ELSEWHERE, str(tmp_path / "run"), str(DEMO)]
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "TRANSFORMERS_"))}
    environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HOME": str(tmp_path / "hub")}
    ended = subprocess.run(command, capture_output=True, text=True, env=environment, stdin=subprocess.DEVNULL)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout == f"{tmp_path / 'run'} {IN_USE}\n2\n"
    assert files.LOCK not in os.listdir(tmp_path)


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES, errno.ENOSPC])
def test_what_cannot_be_written_is_used_unheld(tmp_path, monkeypatch, code):
    monkeypatch.setattr(os, "open", lambda *_: (_ for _ in ()).throw(OSError(code, os.strerror(code))))
    with files.lock(tmp_path), files.lock(tmp_path):
        pass


def test_a_file_system_without_locks_is_used_unheld(tmp_path, monkeypatch):
    fcntl = pytest.importorskip("fcntl", exc_type=ImportError)

    def no_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with files.lock(tmp_path):
        assert os.listdir(tmp_path) == [files.LOCK]


def test_no_two_threads_are_ever_inside_together(tmp_path):
    """The file's name comes and goes with its holder, which is where two holders could slip in."""
    inside, most, held = [0], [0], [0]
    start = threading.Barrier(4)

    def work():
        start.wait()
        for _ in range(200):
            try:
                with files.lock(tmp_path):
                    inside[0] += 1
                    most[0], held[0] = max(most[0], inside[0]), held[0] + 1
                    os.stat(tmp_path)
                    inside[0] -= 1
            except UserError:
                continue

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1] and held[0] >= 1


def test_a_second_synthesis_comparison_and_batch_are_refused_and_change_nothing(setting, tmp_path, monkeypatch):
    model, task, release = setting
    notebook = tmp_path / "one.ipynb"
    notebook.write_text("{}")
    job = batch.Job(notebook, {}, tmp_path / "run" / "one.ipynb", {})
    second = {
        "synthesis": lambda: gradmm.synthesize(model, task, release, SMALL, tmp_path / "run", progress=False),
        "comparison": lambda: compare(
            model, TWO, splits_of(TWO), CONFIG, ["none"], (0,), tmp_path / "run", progress=False
        ),
        "batch": lambda: batch.run([job], 1, progress=False),
    }
    with files.lock(tmp_path / "run"):
        for run in second.values():
            with pytest.raises(UserError, match=IN_USE):
                run()
        assert os.listdir(tmp_path / "run") == [files.LOCK]


def test_a_finished_run_on_a_read_only_disk_is_read_back(setting, tmp_path, monkeypatch):
    model, task, release = setting
    first = gradmm.synthesize(model, task, release, SMALL, tmp_path / "a", progress=False)
    compared = compare(model, TWO, splits_of(TWO), CONFIG, ["none"], (0,), tmp_path / "b", progress=False)

    def read_only(*args, **named):
        raise OSError(errno.EROFS, "Read-only file system")

    for module, name in ((os, "open"), (files.tempfile, "mkstemp"), (files.os, "replace"), (Path, "unlink")):
        monkeypatch.setattr(module, name, read_only)
    again = gradmm.synthesize(model, task, release, SMALL, tmp_path / "a", progress=False)
    assert again.candidates.to_list() == first.candidates.to_list() and again.manifest == first.manifest
    read = compare(model, TWO, splits_of(TWO), CONFIG, ["none"], (0,), tmp_path / "b", progress=False)
    assert read.records == compared.records
    message = r"manifest\.json could not be written .Read-only file system.: free space or choose another output folder"
    with pytest.raises(UserError, match=message):
        gradmm.synthesize(model, task, release, SMALL, tmp_path / "c", progress=False)
