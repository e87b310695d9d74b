"""Notebooks executed by papermill, several at a time; what has not changed since the last time is not executed again.

    python -m gradmm.experiments.batch --preset demo notebooks/*.ipynb

Knows nothing of what a notebook computes. A notebook's parameters come from `params/<preset>/<notebook>.yaml` beside
it; a `sweep` (parameter -> list of values) executes it once for each combination. Beside each executed notebook stands
a stamp, `<notebook>.json`: what it depends on (its cells, its parameters and the local files that they name, the
package, the versions), how it ended and how long it took.
"""

import argparse
import ast
import glob
import importlib
import itertools
import json
import math
import os
import re
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import yaml
from tqdm.auto import tqdm

from gradmm import files, runs
from gradmm.errors import UserError, first_line, near, require
from gradmm.experiments.records import cores
from gradmm.files import lock
from gradmm.progress import ticking
from gradmm.runs import package_digest

LONGEST_NAME = 80
LONGEST_NOTE = 300
KERNEL_SECONDS = 600  # a busy machine takes more than papermill's minute to start a kernel


@dataclass(frozen=True)
class Job:
    """One notebook to be executed with one set of parameters.

    Attributes:
        notebook: as it is stored.
        parameters: those that are set; the notebook's defaults hold for the others.
        target: where the executed notebook goes.
        parts: what the result depends on: name -> digest.
    """

    notebook: Path
    parameters: dict[str, Any]
    target: Path
    parts: dict[str, str]

    @property
    def stamp(self) -> Path:
        """The JSON file beside the executed notebook."""
        return self.target.with_suffix(".json")


@dataclass(frozen=True)
class Outcome:
    """How a job ended.

    Attributes:
        name: of the executed notebook, without its ending.
        state: "executed", "unchanged" or "failed".
        seconds: of the execution, wall clock.
        note: what failed, or why it was executed again.
    """

    name: str
    state: str
    seconds: float
    note: str = ""


def plan(
    notebooks: Sequence[str | Path],
    output: str | Path,
    preset: str | None = None,
    parameters: Mapping[str, Any] | None = None,
    sweep: Mapping[str, Sequence] | None = None,
    fresh: bool = False,
) -> list[Job]:
    """Decide what is to be executed, with which parameters, into which files; nothing is written.

    Args:
        notebooks: paths; without a file for it in the preset a notebook is left out.
        output: the folder of the executed notebooks.
        preset: a folder's name in `params` beside the notebook; None keeps the defaults.
        parameters: further parameters, over those of the preset.
        sweep: parameter -> values, over the preset's own `sweep`; one job for each combination.
        fresh: whether each job's parameter `output` ends in a folder named after all that it depends on, so that
            nothing that other code or settings have finished there is read back; but for private releases, which are
            drawn once.

    Returns:
        The jobs, in the order of the notebooks.

    Raises:
        UserError: no such notebook or preset, a parameter that a notebook does not have, or two jobs for one file.
    """
    require(len(notebooks) > 0, "no notebook is given: name at least one, such as notebooks/00-quickstart.ipynb")
    folder, jobs = files.as_path(output, "the output folder"), []
    for notebook in (files.as_path(one, "the notebook") for one in notebooks):
        there = notebook.suffix == ".ipynb" and notebook.is_file()
        require(there, f"{notebook} is no notebook: give the path of an .ipynb file")
        values = {} if preset is None else _preset(notebook, preset)
        if values is not None:
            grid = _grid([values.pop("sweep", None) or {}, sweep or {}], notebook)
            jobs += _jobs(notebook, [{**values, **(parameters or {}), **one} for one in grid], grid, folder, fresh)
    lacking = ", ".join(Path(notebook).stem for notebook in notebooks)
    mend = "write one, or name another notebook"
    require(bool(jobs), f"the preset {preset!r} has no file for {lacking}: {mend}")
    twice = sorted(str(target) for target, count in Counter(job.target for job in jobs).items() if count > 1)
    require(not twice, f"{', '.join(twice)} would be written twice: give each notebook once, and a sweep's values once")
    return jobs


def _preset(notebook: Path, preset: str) -> dict[str, Any] | None:
    """The preset's parameters of a notebook, or None where it has none."""
    folder = notebook.parent / "params"
    known = sorted(path.name for path in folder.glob("*") if path.is_dir())
    require(preset in known, f"there is no preset {preset!r} in {folder}: {near(preset, known, 'the presets are')}")
    path = folder / preset / f"{notebook.stem}.yaml"
    return files.read_parameters(path) if path.is_file() else None


def _grid(sweeps: Sequence[Mapping[str, Sequence]], notebook: Path) -> list[dict[str, Any]]:
    """Every combination of the values, the last sweep's over those before; one empty combination without a sweep."""
    for sweep in sweeps:
        mend = "give each parameter a list of values"
        require(isinstance(sweep, Mapping), f"the sweep of {notebook} is {sweep!r}: {mend}")
    sweep = {name: values for one in sweeps for name, values in one.items()}
    for name, values in sweep.items():
        listed = isinstance(values, list) and bool(values)
        require(listed, f"the sweep over {name} has the values {values!r}: give a list of at least one")
        require(name != "output", "a sweep cannot go over output: each of its runs has its own")
    return [dict(zip(sweep, values, strict=True)) for values in itertools.product(*sweep.values())]


def _jobs(notebook: Path, chosen: list[dict], grid: list[dict], folder: Path, fresh: bool) -> list[Job]:
    """One notebook's jobs: one for each combination of the grid, each with results of its own."""
    known, jobs = parameters_of(notebook), []
    for values, combination in zip(chosen, grid, strict=True):
        for name in values:
            require(name in known, f"{notebook} has no parameter {name!r}: {near(name, known, 'it has')}")
        label, parts = _label(combination), _parts(notebook, values, known)
        own = [part for part in (label, files.digest(parts)[:8] if fresh else "") if part]
        given = values.get("output", known.get("output"))  # None: a folder that follows from the parameters
        if own and (given or (fresh and "output" in known)):
            base = str(given or runs.RESULTS / notebook.stem).rstrip("/")
            values = {**values, "output": "/".join([base, *own])}
        jobs.append(Job(notebook, values, folder / f"{notebook.stem}{'--' * bool(label)}{label}.ipynb", parts))
    return jobs


def _label(combination: Mapping[str, Any]) -> str:
    """A file name that tells the combinations of a grid apart."""
    whole = ",".join(f"{name}={value}" for name, value in combination.items())
    plain = re.sub(r"[^\w.,=+-]+", "-", whole)
    fits = plain == whole and len(whole) <= LONGEST_NAME
    return plain if fits else f"{plain[:LONGEST_NAME]}-{files.digest(whole)[:8]}"


def parameters_of(notebook: Path) -> dict[str, Any]:
    """The notebook's parameters with their defaults; a default that is no plain value stays text.

    Raises:
        UserError: a file that is no notebook, or papermill is not installed.
    """
    papermill = _extra("papermill")
    try:
        found = papermill.inspect_notebook(str(notebook))
    except Exception as error:  # whatever a broken file makes nbformat or papermill raise
        cause = f"{notebook} could not be read as a notebook ({first_line(error)})"
        raise UserError(f"{cause}: open and save it in JupyterLab") from error
    return {name: _literal(item["default"]) for name, item in found.items()}


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _extra(name: str) -> Any:
    """A package of the notebooks' extra."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        mend = "install the extra with pip install 'gradmm[notebooks]'"
        raise UserError(f"{name} is not installed: {mend}") from error


def _parts(notebook: Path, parameters: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, str]:
    """All that a result depends on; outputs and the metadata that an editor leaves in a notebook are not part of it."""
    cells = files.read_json(notebook, files.MAX_TEXT_BYTES)["cells"]
    kept = [(cell["cell_type"], "".join(cell["source"]), cell.get("metadata", {}).get("tags")) for cell in cells]
    every = {**defaults, **parameters}
    texts = [(name, text) for name, value in every.items() if name != "output"
             for text in (value if isinstance(value, list) else [value]) if isinstance(text, str)]  # fmt: skip
    return {
        "notebook": files.digest(kept),
        "parameters": files.digest(parameters),
        "the files that parameters name": files.digest([(name, _state_of(text)) for name, text in texts]),
        "package": package_digest(),
        "versions": files.digest(_versions()),
    }


def _state_of(name: str) -> list[tuple]:
    """Path and time of change of a local file and of what decides its task, or of each file in a folder; not what it
    holds, which may be private.
    """
    path, there = Path(name), []
    # os.path answers for a text that can be no path; pathlib raises where it is too long.
    if os.path.isfile(name):
        there = runs.beside(path)
    elif os.path.isdir(name):
        there = [one for one in sorted(path.rglob("*")) if not _apart(one.relative_to(path))]
    return [(str(one), one.stat().st_mtime_ns) for one in there if one.is_file()]


def _apart(path: Path) -> bool:
    """Whether a file is no part of data or records: hidden, or results."""
    return any(part.startswith(".") or part == runs.RESULTS.name for part in path.parts)


@cache
def _versions() -> dict[str, str]:
    """Of what computes and of what runs and draws."""
    return {**runs.versions(), **{name: metadata.version(name) for name in ("ipykernel", "matplotlib", "papermill")}}


def changes(job: Job) -> list[str] | None:
    """What differs from the job's last execution: names of parts, or None where there is no whole one."""
    stamp = _read_stamp(job) if job.target.is_file() else {}
    if stamp.get("state") != "executed" or stamp.get("executed") != files.file_digest(job.target):
        return None
    return [name for name, digest in job.parts.items() if stamp.get("parts", {}).get(name) != digest]


def _read_stamp(job: Job) -> dict:
    try:
        stamp = files.read_json(job.stamp) if job.stamp.is_file() else {}
    except UserError:  # a broken stamp says nothing: execute again
        return {}
    return stamp if isinstance(stamp, dict) else {}


def execute(job: Job) -> Outcome:
    """Execute one notebook; the result and its stamp are replaced as whole files, whether it fails or not.

    A cell that fails ends the notebook, which keeps that cell with its error. Nothing is raised.
    """
    begun, note = time.monotonic(), ""
    try:
        job.target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".running-", suffix=files.UNFINISHED, dir=job.target.parent) as folder:
            draft = Path(folder) / job.target.name
            note = _run_papermill(job, draft)
            if draft.is_file():
                files.replace_file(job.target, lambda temporary: temporary.write_bytes(draft.read_bytes()))
        outcome = Outcome(job.target.stem, "failed" if note else "executed", time.monotonic() - begun, note)
        _write_stamp(job, outcome)
    except Exception as error:  # one job's trouble, such as a full disk, is not the others'
        return Outcome(job.target.stem, "failed", time.monotonic() - begun, first_line(error))
    return outcome


def _run_papermill(job: Job, draft: Path) -> str:
    """What went wrong, in one line; empty if nothing."""
    papermill = _extra("papermill")
    options = {"kernel_name": "python3", "progress_bar": False, "start_timeout": KERNEL_SECONDS}
    try:
        papermill.execute_notebook(str(job.notebook), str(draft), job.parameters, **options)
    except papermill.exceptions.PapermillExecutionError as error:
        lines = str(error.evalue).strip().splitlines() or [""]
        return f"In [{error.exec_count}]: {error.ename}: {lines[0]}"[:LONGEST_NOTE]
    except Exception as error:  # a kernel that cannot start or dies
        return first_line(error)[:LONGEST_NOTE]
    return ""


def _write_stamp(job: Job, outcome: Outcome) -> None:
    stamp = {
        "notebook": job.notebook.as_posix(),
        "parameters": job.parameters,
        "state": outcome.state,
        "note": outcome.note,
        "seconds": round(outcome.seconds, 3),
        "versions": _versions(),
        "parts": job.parts,
        "executed": files.file_digest(job.target) if job.target.is_file() else None,
    }
    files.write_json(job.stamp, json.loads(json.dumps(stamp, default=str)))


def run(jobs: Sequence[Job], processes: int | None = None, progress: bool = True) -> list[Outcome]:
    """Execute those of the jobs that have changed, several at a time, what took longest the last time first.

    Args:
        jobs: from `plan`.
        processes: how many at a time; None takes the number of cores, one where there is a GPU.
        progress: whether to show a progress bar.

    Returns:
        One outcome for each job, in their order.

    Raises:
        UserError: joblib is not installed, or another batch is at work in the same output folder.
    """
    require(processes is None or processes >= 1, f"jobs = {processes}, it must be at least 1")
    joblib = _extra("joblib")
    with ExitStack() as locked:
        for folder in sorted({job.target.parent for job in jobs}):
            locked.enter_context(lock(folder))
        return _run_changed(jobs, processes, joblib, progress)


def _run_changed(jobs: Sequence[Job], processes: int | None, joblib: Any, progress: bool) -> list[Outcome]:
    changed = {job.target: changes(job) for job in jobs}
    found = {job.target: Outcome(job.target.stem, "unchanged", 0.0) for job in jobs if changed[job.target] == []}
    pending = [job for job in jobs if job.target not in found]
    pending.sort(key=lambda job: -_read_stamp(job).get("seconds", math.inf))
    # Not fewer where few are pending: the last digits of a result depend on the threads, and these on the processes.
    count = min(processes or (1 if torch.cuda.is_available() else cores() or 1), max(len(jobs), 1))
    parallel = joblib.Parallel(count, return_as="generator_unordered", batch_size=1)
    with tqdm(total=len(jobs), initial=len(found), unit="notebook", disable=not progress) as bar, ticking(bar):
        for target, outcome in parallel(joblib.delayed(_executed)(job) for job in pending):
            why = f"changed: {', '.join(changed[target] or ())}" if changed[target] else ""
            found[target] = replace(outcome, note=outcome.note or why)
            bar.set_postfix_str(f"{outcome.name} {outcome.state}")
            bar.update()
    return [found[job.target] for job in jobs]


def _executed(job: Job) -> tuple[Path, Outcome]:
    return job.target, execute(job)


def summary(outcomes: Sequence[Outcome]) -> str:
    """The outcomes as a table of plain text.

    >>> summary([Outcome("00-quickstart", "executed", 12.34), Outcome("01-theory", "unchanged", 0.0)]).splitlines()[1]
    '00-quickstart executed  12.3'
    """
    rows = [(one.name, one.state, f"{one.seconds:.1f}" if one.seconds else "", one.note) for one in outcomes]
    table = [("notebook", "state", "seconds", "note"), *rows]
    name, state, seconds = (max(len(row[column]) for row in table) for column in range(3))
    return "\n".join(f"{n:<{name}} {s:<{state}} {t:>{seconds}} {note}".rstrip() for n, s, t, note in table)


def requested(arguments: Sequence[str] | None = None) -> tuple[argparse.Namespace, list[Job]]:
    """What a command line asks for: its options, and the jobs, which are planned and not executed.

    Raises:
        UserError: as `plan`, and a sweep that cannot be read.
    """
    given = _parser().parse_args(arguments)
    given.notebooks = [path for one in given.notebooks for path in (sorted(glob.glob(one)) or [one])]  # as a shell does
    sweep = None if given.sweep is None else files.read_parameters(given.sweep)
    sweep = sweep if sweep is None else sweep.get("sweep", sweep)
    values = {name: _from_command_line(text) for name, text in given.parameter}
    return given, plan(given.notebooks, given.output, given.preset, values, sweep, given.fresh)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line: 0 all well, 1 a notebook failed, 2 the request cannot be met."""
    try:
        given, jobs = requested(arguments)
        outcomes = run(jobs, given.jobs)
    except UserError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write("Stopped; what was executed is kept, and the same command continues.\n")
        return 130
    left = sorted({Path(name).stem for name in given.notebooks} - {job.notebook.stem for job in jobs})
    sys.stdout.write(f"\n{summary(outcomes)}\n")
    if left:
        sys.stdout.write(f"Not in the preset {given.preset}: {', '.join(left)}\n")
    failed = [outcome for outcome in outcomes if outcome.state == "failed"]
    if failed:
        sys.stdout.write(f"{len(failed)} of {len(outcomes)} failed; the failing cells are in {given.output}\n")
    return 1 if failed else 0


def _from_command_line(text: str) -> Any:
    """A value as YAML reads it; 1e-5 is a number here, and None is what papermill takes it for."""
    if text == "None":
        return None
    try:
        return files.parse_yaml(text)
    except (yaml.YAMLError, ValueError, RecursionError):  # ValueError: a date such as 2020-13-45
        return text


def _parser() -> argparse.ArgumentParser:
    description = "Execute notebooks with papermill, several at a time."
    parser = argparse.ArgumentParser(prog="gradmm batch", description=description)
    add, shown = parser.add_argument, "(default: %(default)s)"
    add("notebooks", nargs="+", help="paths of notebooks")
    folder = "a folder in params/ beside the notebooks, such as smoke or demo; without it the defaults hold"
    add("--preset", help=folder)
    several: dict[str, Any] = {"nargs": 2, "action": "append", "default": [], "metavar": ("NAME", "VALUE")}
    add("-p", "--parameter", **several, help="set one parameter, over the preset")
    grid = "a YAML file: parameter -> list of values; one executed notebook for each combination"
    add("--sweep", metavar="FILE", help=grid)
    add("--output", default="book/executed", help=f"folder of the executed notebooks {shown}")
    add("--jobs", type=int, help="notebooks at a time (default: the number of cores, 1 with a GPU)")
    apart = "each notebook's results in a folder named after all that they depend on"
    add("--fresh", action="store_true", help=apart)
    return parser


if __name__ == "__main__":
    # By its name, so that worker processes find the same functions and classes and not those of `__main__`.
    sys.exit(importlib.import_module("gradmm.experiments.batch").main())
