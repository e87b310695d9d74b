"""Kill -9 a run at many moments, continue it, and compare it with the uninterrupted one.

    python tests/crash.py KIND FOLDER MOMENTS SEED      prints one JSON object

KIND is synthesis, pool, comparison (with fine-tuning) or batch (of notebooks). Every second moment is a point in time,
drawn from most of the uninterrupted run; the others are writes: the run is killed when its n-th file is half written,
before it is renamed. Runs are forked from one process that has imported everything, so that a moment costs no more than
the run.
"""

import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import nbformat
import torch
from conftest import make_tiny_lm, make_toy_tokenizer
from test_batch import PARAMETERS, WRITE, store
from test_protocol import CONFIG, TWO, splits_of
from test_synthesis import REAL, SMALL, TASK

import gradmm
from gradmm import files, runs
from gradmm.experiments import batch
from gradmm.experiments.protocol import compare
from gradmm.models import Model, wrap_model

CLOCKS = ("clock", "seconds", "executed")  # of manifests and stamps; an executed notebook holds its times
WRITES = {"synthesis": 14, "pool": 21, "comparison": 22, "batch": 4}  # of the files that an uninterrupted run writes
METHODS, SEEDS = ("real", "gradmm"), (0, 1)


def tiny() -> Model:
    return wrap_model(make_tiny_lm("llama", dtype=torch.float32), make_toy_tokenizer(), "tiny-llama")


def synthesis() -> None:
    model = tiny()
    config = replace(SMALL, groups_per_batch=2, outer_steps=4)
    gradmm.synthesize(model, TASK, gradmm.release(model, TASK, REAL, space="head"), config, "run", progress=False)


def pool() -> None:
    model = tiny()
    config = replace(SMALL, search="pool", ranking="group", oversample=4.0, length=12)
    gradmm.synthesize(model, TASK, gradmm.release(model, TASK, REAL, space="head"), config, "run", progress=False)


def comparison() -> None:
    compare(tiny(), TWO, splits_of(TWO), CONFIG, METHODS, SEEDS, "run", progress=False)


def notebooks() -> None:
    stored = [store(Path("stored") / f"{name}.ipynb", PARAMETERS, WRITE) for name in ("one", "two")]
    outcomes = batch.run(batch.plan(stored, "run", parameters={"output": "run/results"}), 1, progress=False)
    assert {outcome.state for outcome in outcomes} <= {"executed", "unchanged"}, outcomes


KINDS: dict[str, Callable[[], None]] = {
    "synthesis": synthesis, "pool": pool, "comparison": comparison, "batch": notebooks,
}  # fmt: skip


def start(run: Callable[[], None], folder: Path, dies_at_write: int | None = None) -> int:
    """The process id of a forked run in `folder`, the leader of a group of its own."""
    folder.mkdir(exist_ok=True)
    child = os.fork()
    if child:
        return child
    os.setsid()
    os.chdir(folder)
    runs.SNAPSHOT_SECONDS = 0.0
    if dies_at_write is not None:
        files.replace_file = dying(files.replace_file, dies_at_write)
    try:
        run()
    except BaseException as error:
        sys.stderr.write(f"{type(error).__name__}: {error}\n")
        os._exit(1)
    os._exit(0)


def dying(replace_file, last: int):
    """`replace_file` that kills the process when the last file is half written."""
    written = []

    def replacing(path, write):
        def half(temporary: Path) -> None:
            write(temporary)
            written.append(path)
            if len(written) == last:
                os.truncate(temporary, temporary.stat().st_size // 2)
                os.kill(os.getpid(), signal.SIGKILL)

        return replace_file(path, half)

    return replacing


def finish(child: int) -> None:
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status:
        raise RuntimeError(f"a run that nobody killed ended with {status}")


def kill(child: int, after: float | None) -> bool:
    """Kill a run and all that it started, after some seconds or when it has; whether it had not ended before."""
    if after is not None:
        time.sleep(after)
        os.kill(child, signal.SIGKILL)
    killed = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    try:
        os.killpg(child, signal.SIGKILL)  # kernels
    except ProcessLookupError:
        pass
    return killed


def check_whole(output: Path) -> int:
    """Read every file that has its own name, as whole as it must be; how many there are."""
    readers = {".json": files.read_json, ".jsonl": files.read_json_lines, ".safetensors": files.read_tensors}
    readers |= {".ipynb": lambda path: nbformat.validate(nbformat.read(path, as_version=4))}
    held = [
        path for path in output.rglob("*") if path.is_file() and files.UNFINISHED not in str(path.relative_to(output))
    ]
    for path in held:
        readers.get(path.suffix, Path.read_bytes)(path)
    return len(held)


def held(output: Path) -> dict[str, object]:
    """Every file, clock readings aside, in a form to compare."""
    found = {}
    for path in sorted(path for path in output.rglob("*") if path.is_file() and path.name != "timings.jsonl"):
        value: object = path.read_bytes()
        if path.name == "manifest.json" or path.with_suffix(".ipynb").exists() and path.suffix == ".json":
            value = {key: part for key, part in json.loads(value).items() if key not in CLOCKS}
        elif path.suffix == ".ipynb":
            value = [(cell.source, cell.get("outputs")) for cell in nbformat.read(path, as_version=4).cells]
        found[path.relative_to(output).as_posix()] = value
    return found


def main(kind: str, folder: Path, moments: int, seed: int) -> dict:
    run, draw = KINDS[kind], random.Random(seed)
    torch.set_num_threads(1)
    folder.mkdir(parents=True, exist_ok=True)
    os.environ["IPYTHONDIR"] = str(folder / ".ipython")
    begun = time.monotonic()
    finish(start(run, folder / "whole"))
    seconds, whole = time.monotonic() - begun, held(folder / "whole" / "run")
    found = {
        "kind": kind, "moments": moments, "killed": 0, "unfinished_seen": 0, "files_read": 0, "differing": {},
        "seconds": seconds,
    }  # fmt: skip
    for number in range(moments):
        place = folder / f"cut{number:03d}"
        output, at_write = place / "run", draw.randint(1, WRITES[kind]) if number % 2 else None
        child = start(run, place, at_write)
        found["killed"] += kill(child, None if at_write else draw.uniform(0, 0.8 * seconds))
        found["files_read"] += check_whole(output)
        found["unfinished_seen"] += bool(list(output.rglob(f".*{files.UNFINISHED}")))
        finish(start(run, place))
        again = held(output)
        if again != whole:
            found["differing"][number] = sorted(name for name in {*whole, *again} if whole.get(name) != again.get(name))
    return found


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], Path(sys.argv[2]).resolve(), int(sys.argv[3]), int(sys.argv[4]))))
