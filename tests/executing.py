"""Notebooks executed and the book built for the tests: once, whoever and however many ask."""

import atexit
import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from unittest import mock

import filelock
import papermill
import yaml

from gradmm.experiments import batch

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
SMOKE = ROOT / "notebooks" / "params" / "smoke"
RECORDS = ROOT / "book" / "records"
RECORDED = ("03-finetuning", "04-privacy", "05-ablations")  # their smoke runs show what is recorded, as the book does
BUILT = ROOT / "book" / "_build" / "html"
QUIET = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def execute(notebook: Path, preset: dict, folder: Path):
    """Run a notebook in an empty folder; a parameter that it does not have, which papermill lets pass, is an error."""
    unknown = set(preset) - set(papermill.inspect_notebook(str(notebook)))
    if unknown:
        raise ValueError(f"{notebook.name} has no parameter {', '.join(sorted(unknown))}")
    return papermill.execute_notebook(
        str(notebook), str(folder / notebook.name), preset, cwd=str(folder), kernel_name="python3", progress_bar=False,
        start_timeout=batch.KERNEL_SECONDS,
    )  # fmt: skip


def quiet(folder: Path) -> AbstractContextManager:
    """While it lasts, kernels need no network, take one core and leave nothing in the user's home."""
    return mock.patch.dict(os.environ, {**QUIET, "IPYTHONDIR": str(folder / ".ipython")})


@contextmanager
def forked_kernels(shared: Path) -> Iterator[None]:
    """While it lasts, kernels are forked from a process that has the heavy packages already: see kernels.py.

    The process is started the first time that any worker asks, and ends with that worker; a kernel that finds it gone
    starts as usual. So do all while coverage is measured, which follows no fork.
    """
    place = shared / "kernels" / "socket"
    with filelock.FileLock(shared / "kernels.lock"):
        if forks() and not listening(place):
            serve_kernels(place)
    with mock.patch.dict(os.environ, {"JUPYTER_PATH": str(shared)}):
        yield


def forks() -> bool:
    """Whether kernels can be forked here."""
    return sys.platform == "linux"


def listening(place: Path) -> bool:
    """Whether a process accepts connections at a socket."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as asking, suppress(OSError):
        asking.connect(str(place))
        return True
    return False


def serve_kernels(place: Path) -> None:
    """Start the process that forks kernels, and name it as Jupyter's own kernel in the folder of the socket."""
    (place.parent / "python3").mkdir(parents=True, exist_ok=True)
    place.unlink(missing_ok=True)
    script = [sys.executable, "-P", str(ROOT / "tests" / "kernels.py"), str(place)]
    specification = {"argv": [*script, "-f", "{connection_file}"], "display_name": "Python 3", "language": "python"}
    (place.parent / "python3" / "kernel.json").write_text(json.dumps(specification), encoding="utf-8")
    environment = {**os.environ, **QUIET, "MPLBACKEND": "module://matplotlib_inline.backend_inline"}
    server = subprocess.Popen(script, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    atexit.register(server.kill)
    while server.poll() is None and not listening(place):
        time.sleep(0.1)


def once(shared: Path, name: str, make: Callable[[Path], object]) -> Path:
    """The folder `shared/name`, filled by `make` the first time that anyone asks for it.

    Args:
        shared: a folder that all workers see; who comes second waits for the first and takes what is there.
        name: of the folder.
        make: fills the empty folder that it is given.
    """
    folder = shared / name
    with filelock.FileLock(shared / f"{name}.lock"):
        if not (shared / f"{name}.whole").exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            make(folder)
            (shared / f"{name}.whole").touch()
    return folder


def smoke_run(name: str, shared: Path) -> Path:
    """The folder of the one run of a notebook at its smoke preset: the executed copy and what it wrote."""

    def run(folder: Path) -> None:
        preset = yaml.safe_load((SMOKE / f"{name}.yaml").read_text(encoding="utf-8"))
        preset |= {"records": str(RECORDS)} if name in RECORDED else {}
        with quiet(folder), forked_kernels(shared):
            execute(ROOT / "notebooks" / f"{name}.ipynb", preset, folder)

    return once(shared, name, run)


def pages() -> list[str]:
    """The pages of the book, in the order of its table of contents: paths from the root, without endings."""
    toc = yaml.safe_load((ROOT / "book" / "_toc.yml").read_text(encoding="utf-8"))
    chapters = [chapter for part in toc["parts"] for chapter in part["chapters"]]
    return [toc["root"], *(page["file"] for one in chapters for page in (one, *one.get("sections", [])))]


def is_current(built: Path = BUILT) -> bool:
    """Whether the pages that `make book` built are newer than all that they are made of."""
    if not (built / "index.html").is_file():
        return False
    sources = [
        *(ROOT / "gradmm").rglob("*.py"),
        *(ROOT / "notebooks").rglob("*.*"),
        *(path for path in (ROOT / "book").rglob("*.*") if "_build" not in path.parts and path.suffix != ".pyc"),
    ]
    return max(path.stat().st_mtime for path in built.rglob("*.html")) > max(path.stat().st_mtime for path in sources)


def stage(root: Path, executed: Iterable[Path]) -> None:
    """Lay out what the book is built from, with these executed notebooks, in a folder of its own."""
    shutil.copytree(ROOT / "book", root / "book", ignore=shutil.ignore_patterns("_build", "executed", "__pycache__"))
    (root / "notebooks" / "params").mkdir(parents=True)
    shutil.copy(ROOT / "notebooks" / "params" / "README.md", root / "notebooks" / "params")
    (root / "book" / "executed").mkdir()
    for notebook in executed:
        shutil.copy(notebook, root / "book" / "executed")


def can_build() -> bool:
    """Whether jupyter-book is installed."""
    return importlib.util.find_spec("jupyter_book") is not None


def build(root: Path) -> Path:
    """Build the book that is laid out in a folder, as `make book` does, and give the folder of its pages.

    A warning is an error: RuntimeError with the build's last lines.
    """
    command = [sys.executable, "-c", "from jupyter_book.cli.main import main; main()", "build", str(root)]
    command += ["--path-output", str(root / "book"), "--config", str(root / "book" / "_config.yml")]
    command += ["--toc", str(root / "book" / "_toc.yml"), "-W", "--keep-going", "-n"]
    environment = {**os.environ, **QUIET, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=600, check=False)
    if done.returncode:
        raise RuntimeError(f"the book does not build:\n{done.stdout[-3000:]}\n{done.stderr[-6000:]}")
    return root / "book" / "_build" / "html"


def smoke_book(shared: Path) -> Path:
    """The folder of the built pages: those of `make book` where they are current, else of the smoke runs."""
    if is_current():
        return BUILT

    def make(root: Path) -> None:
        stage(root, [smoke_run(path.stem, shared) / path.name for path in NOTEBOOKS])
        build(root)

    return once(shared, "book", make) / "book" / "_build" / "html"
