"""A run's folder: its manifest, unfinished batches, and what it leaves at the end.

Knows the solver's Result and no language model. Clock readings go to `manifest.json` ("clock") and `timings.jsonl`
alone, so that every other file is a function of the settings. A notebook's folder follows from its parameters
(`output_folder`).
"""

import json
import math
import platform
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas
import torch

from gradmm import admm, files
from gradmm.errors import UserError, require, short_json

PACKAGE = Path(__file__).parent
PACKAGES = ("gradmm", "torch", "transformers", "datasets", "tokenizers", "numpy")
SNAPSHOT_SECONDS = 10.0
CLOCK_COLUMNS = ["seconds"]
RUN_FILES = ("README.md", "train.jsonl", "synthetic.jsonl", "history.jsonl", "timings.jsonl")
RESULTS = Path("results")
FITTED = "groups-at-once.json"
NOT_FOR_RELEASE = "not-for-release"
UNIT = re.compile(r"batch-\d{4,}\.safetensors|texts-\d{4,}\.json")  # unfinished work, see `RunFolder.place`
LARGE_BYTES = 1 << 26  # of larger files, such as weights, only size and time of change tell whether they are the same
LONGEST_NAME = 40
TASK_FILES = ("task.yaml", "labels.json", "README.md")  # beside a file of rows they decide its task


@cache
def package_digest() -> str:
    """A digest of the package's code and data."""
    data = [path for path in (PACKAGE / "data").rglob("*") if path.is_file()]
    paths = sorted([*PACKAGE.rglob("*.py"), *data])
    return files.digest([(path.relative_to(PACKAGE).as_posix(), files.file_digest(path)) for path in paths])


def versions() -> dict[str, str]:
    """The versions that a result depends on; gradmm's with digits that follow from its code and data."""
    found = {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}}
    return {**found, "gradmm": f"{found['gradmm']}+{package_digest()[:8]}"}


def peak_memory() -> dict[str, int]:
    """Peak bytes so far: of this process, but on Windows, which has no such count, and of a GPU's allocator."""
    found = {}
    with suppress(ImportError):
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        found["process"] = peak if sys.platform == "darwin" else 1024 * peak
    if torch.cuda.is_available():
        found["cuda"] = max(map(torch.cuda.max_memory_allocated, range(torch.cuda.device_count())))
    return found


# ---------------------------------------------------------------- a notebook's folder


def output_folder(notebook: str, output: str | Path | None, *, private: bool = False, **parameters) -> Path:
    """The folder of a notebook's results; one of your own is claimed for these parameters before any work is done.

    The default follows from everything that decides the results: results/<notebook>/<model>-<data>-<8 hexadecimal
    digits>. The digits are a digest of the parameters, of the versions and of what the local files that parameters name
    hold. Of a private folder these are the task's public files alone (YAML, `labels.json`): nothing that is written may
    depend on private text. So a default folder is nobody else's, and
    nothing is written yet; a folder of your own gets `parameters.json`, which is written anew as long as there are no
    results beside it.

    Args:
        notebook: its name, without ending.
        output: a folder of your own; None takes the default.
        private: whether the folder holds a private release.
        parameters: every parameter of the notebook that a result depends on, `model` and `data` among them.

    Raises:
        UserError: the folder holds data or results of other parameters (each that differs is named), or cannot be
            written.
    """
    named = {f"{name} {i}": value for name, given in parameters.items() for i, value in enumerate(_listed(given))}
    claim = {
        "notebook": notebook,
        "parameters": {name: _leaf(value) for name, value in parameters.items()},
        "files": {name: content for name, value in named.items() if (content := _content(value, private))},
        "versions": versions(),
    }
    claim = json.loads(json.dumps(claim, default=str))
    if output is None:
        names = (
            re.sub(r"[^\w.+]+", "-", Path(str(parameters[name])).name)[:LONGEST_NAME].strip("-.")
            for name in ("model", "data")
        )
        return RESULTS / notebook / "-".join([*filter(None, names), files.digest(claim)[:8]])
    folder = files.as_path(output, "the output folder")
    place = folder / "parameters.json"
    if any(path != place for path in folder.glob("*")) and place.exists():
        said = f"{folder} holds results of other parameters"
        refuse_other(claim, files.read_json(place), said, "leave output out, or give another folder")
    elif not place.exists():
        refuse_foreign(folder)
    files.write_json(place, claim)
    return folder


def _listed(value: Any) -> Sequence:
    return value if isinstance(value, list | tuple) else [value]


def _leaf(value: Any) -> Any:
    """A parameter's value as it is compared: a mapping as a whole, and 1.0 as 1."""
    if isinstance(value, Mapping):
        return str(value)
    return int(value) if isinstance(value, float) and value.is_integer() else value


def beside(path: Path) -> list[Path]:
    """A file, and those beside it that decide the task of its rows; a task's own file stands alone."""
    return [path, *(path.with_name(name) for name in TASK_FILES if path.suffix != ".yaml")]


def _content(value: Any, private: bool) -> str | None:
    """A digest of what the local file or folder that a parameter names holds; None where it names none.

    Of what may be private it counts the task's public files alone.
    """
    try:
        path = Path(value) if value and isinstance(value, str | Path) else None
        held = beside(path) if path and path.is_file() else []
        if path and path.is_dir():
            held = sorted([*path.iterdir(), *path.glob("*/state.json")])  # which holds the state of a saved split
        public = [one for one in held if not private or one.suffix == ".yaml" or one.name == "labels.json"]
        states = [(one.relative_to(path.parent).as_posix(), _state(one)) for one in public if path and one.is_file()]
    except (OSError, ValueError):  # what cannot be looked at is refused where it is read
        return None
    return files.digest(states) if states else None


def _state(path: Path) -> Any:
    status = path.stat()
    if status.st_size > LARGE_BYTES:
        return status.st_size, status.st_mtime_ns
    return files.file_digest(path)


def write_not_for_release(folder: str | Path, name: str, results: Mapping[str, Any]) -> Path:
    """Write results that private text went into, outside of every guarantee, where nobody shares them by accident:
    `not-for-release/<name>.json` in the run's folder, with a first field that says so.
    """
    reason = "computed from private text without the noise that a guarantee needs: do not share this file"
    return files.write_json(Path(folder) / NOT_FOR_RELEASE / f"{name}.json", {"not for release": reason, **results})


# ---------------------------------------------------------------- a run's folder


@dataclass
class RunFolder:
    """One run's folder, or nothing but memory when `path` is None.

    Attributes:
        path: the folder.
        manifest: what identifies the run: settings, model, task, release, versions.
    """

    path: Path | None
    manifest: dict
    _begun: float = field(default_factory=time.time)
    _saved: float = field(default_factory=time.monotonic)

    @staticmethod
    def open(path: str | Path | None, identity: dict) -> "RunFolder":
        """Start a run, or continue one of the same identity.

        Raises:
            UserError: the folder holds a run with other settings (each that differs is named), or cannot be written.
        """
        manifest = json.loads(json.dumps({**identity, "versions": versions()}))
        folder = RunFolder(None if path is None else Path(path), manifest)
        if folder.path is not None:
            folder._claim(folder.path)
        return folder

    @property
    def finished(self) -> bool:
        """Whether the folder holds the whole results of this run."""
        return self.path is not None and _held(self.path).get("status") == "complete"

    def load(self) -> tuple[list[dict], pandas.DataFrame, dict]:
        """The rows, history and manifest of a finished run.

        Raises:
            UserError: the folder holds no such run.
        """
        if self.path is None:
            raise UserError("a run in memory cannot be read back: give it an output folder")
        rows, history, clocks = (
            [numbers(row, *row) for row in files.read_json_lines(self.path / name)]
            for name in ("synthetic.jsonl", "history.jsonl", "timings.jsonl")
        )
        joined = [{**row, **clock} for row, clock in zip(history, clocks, strict=True)]
        _remove_leftovers(self.path)
        return rows, pandas.DataFrame(joined), _held(self.path)

    def _claim(self, path: Path) -> None:
        place = path / "manifest.json"
        if place.exists():
            mend = "choose another output folder, or the same settings to continue it"
            refuse_other(self.manifest, _held(path), f"{path} holds a run with other settings", mend)
            return
        refuse_foreign(path)
        files.write_json(place, {**self.manifest, "status": "running"})

    def load_result(self, batch: int, device: torch.device) -> admm.Result | None:
        """A batch's last saved result, or None.

        Raises:
            UserError: the file there is no saved batch.
        """
        place = self.place(batch)
        if place is None or not place.exists():
            return None
        tensors, metadata = files.read_tensors(place, "remove it and run again")
        tensors = {name: tensor if name == "active" else tensor.to(device) for name, tensor in tensors.items()}
        try:
            rest = json.loads(metadata["result"])
            state = admm.State(**{name: tensors.pop(name) for name in ("x", "lam", "ids", "active")}, step=rest["step"])
            return admm.Result(**tensors, reason=tuple(rest["reason"]), history=rest["history"], state=state)
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{place} is no saved batch ({error!r}): remove it and run again") from error

    def snapshot(self, batch: int, result: admm.Result) -> None:
        """Save an unfinished batch, at most every few seconds."""
        if time.monotonic() - self._saved >= SNAPSHOT_SECONDS:
            self.save_result(batch, result)

    def save_result(self, batch: int, result: admm.Result) -> None:
        """Save a batch as it stands."""
        place, state = self.place(batch), result.state
        if place is not None:
            tensors = {name: getattr(state, name) for name in ("x", "lam", "ids", "active")}
            tensors |= {"value": result.value, "match_loss": result.match_loss}
            rest = {"step": state.step, "reason": result.reason, "history": result.history}
            files.write_tensors(place, tensors, {"result": json.dumps(rest)})
            self._saved = time.monotonic()

    def fitted(self, device: torch.device, find: Callable[[], int]) -> int:
        """How many groups a card's memory holds in one pass: found once a run, so that a resumed one goes on alike."""
        held, place = self.manifest.setdefault("groups_at_once", {}), self.path and self.path / FITTED
        if _card(device) not in held and place and place.exists():
            held.update(files.read_json(place))
        if _card(device) not in held:
            self.keep_fitted(device, find())
        return held[_card(device)]

    def keep_fitted(self, device: torch.device, number: int) -> None:
        """Record how many groups a card's memory held in one pass."""
        held = self.manifest.setdefault("groups_at_once", {})
        if held.get(_card(device)) != number:
            held[_card(device)] = number
            if self.path is not None:
                files.write_json(self.path / FITTED, held)

    def load_texts(self, unit: int) -> list[str] | None:
        """A unit of written texts, or None."""
        place = self.texts_place(unit)
        return None if place is None or not place.exists() else files.read_json(place, files.MAX_TEXT_BYTES)

    def save_texts(self, unit: int, texts: list[str]) -> None:
        """Save a unit of written texts."""
        place = self.texts_place(unit)
        if place is not None:
            files.write_json(place, texts)

    def finish(self, rows: list[dict], history: pandas.DataFrame, manifest: dict, card: str) -> None:
        """Write the results with their README and take the unfinished batches away."""
        manifest["status"] = "complete"
        manifest["clock"] = {
            "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(self._begun)),
            "seconds": round(time.time() - self._begun, 3),
            "peak_memory": peak_memory(),
        }
        if self.path is not None:
            write_results(self.path, rows, history, manifest, card)
            _remove_leftovers(self.path)

    def place(self, batch: int) -> Path | None:
        """Where a batch is saved."""
        return None if self.path is None else self.path / f"batch-{batch:04d}.safetensors"

    def texts_place(self, unit: int) -> Path | None:
        """Where a unit of written texts is saved."""
        return None if self.path is None else self.path / f"texts-{unit:04d}.json"


def refuse_foreign(folder: Path) -> None:
    """Raise where a folder holds data, or files of the names that a run writes, and no run; or is a file."""
    require(not folder.exists() or folder.is_dir(), f"{folder} is a file: give a folder for the output")
    held = {path.name for path in folder.glob("*")}
    if "manifest.json" in held:
        return
    clash = sorted(name for name in held if name in (*RUN_FILES, FITTED) or UNIT.fullmatch(name))
    require(
        not clash, f"{folder} holds {', '.join(clash)} but no manifest: choose another output folder or empty this one"
    )
    data = files.data_files(folder)
    require(not data, f"{folder} holds data ({', '.join(data[:3])}): choose another output folder")


def write_results(folder: Path, rows: list[dict], history: pandas.DataFrame, manifest: dict, card: str) -> None:
    """The files of a finished run; the manifest, which says that it is, comes last."""
    rows = [finite_row(row) for row in rows]
    files.write_json_lines(folder / "synthetic.jsonl", rows)
    files.write_json_lines(folder / "train.jsonl", [row for row in rows if row.get("kept")])
    timeless = history.drop(columns=CLOCK_COLUMNS, errors="ignore")
    files.write_json_lines(folder / "history.jsonl", plain_rows(timeless))
    files.write_json_lines(folder / "timings.jsonl", plain_rows(history.filter(["step", "group", *CLOCK_COLUMNS])))
    files.write_text(folder / "README.md", card)
    files.write_json(folder / "manifest.json", manifest)


def _card(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _held(folder: Path) -> dict:
    """The manifest that a folder holds; the groups of a finished run may make it long."""
    return files.read_json(folder / "manifest.json", files.MAX_TEXT_BYTES)


def _remove_leftovers(folder: Path) -> None:
    """Take unfinished work away: a run killed at its very end leaves it beside its results."""
    with suppress(OSError):  # results on a read-only disk are read all the same
        for leftover in [path for path in folder.glob("*") if UNIT.fullmatch(path.name) or path.name == FITTED]:
            leftover.unlink(missing_ok=True)


def plain_rows(frame: pandas.DataFrame) -> list[dict]:
    """The rows of a table as JSON can hold them, see `finite_row`."""
    return [finite_row(row) for row in frame.to_dict("records")]


def finite_row(row: Mapping) -> dict:
    """A row as JSON can hold it: infinity and NaN become None, written as null; all else stays as it is."""
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in row.items()
    }


def numbers(row: Mapping, *names: str) -> dict:
    """The inverse of `finite_row` for measurements of these names: those that were not finite read as infinity."""
    return {name: math.inf if value is None and name in names else value for name, value in row.items()}


WHY = {  # what else than a setting makes a difference
    "release.examples": ", made of other real examples",
    "release.fingerprint": ", with noise drawn anew, or with other targets",
}


def refuse_other(ours: dict, theirs: Any, place: str, mend: str) -> None:
    """Raise where a folder's settings (`theirs`) are other than those asked for; what else it holds may be any."""
    found = list(_differences(ours, theirs))
    require(not found, f"{place}: {'; '.join(found[:3])}: {mend}")


def _differences(ours: dict, theirs: Any, prefix: str = "") -> Iterator[str]:
    for key, value in ours.items():
        other = theirs.get(key) if isinstance(theirs, dict) else None
        if isinstance(value, dict):
            yield from _differences(value, other, f"{prefix}{key}.")
        elif value != other:
            why = WHY.get(f"{prefix}{key}", "")
            yield f"{prefix}{key} ({short_json(other)} there, {short_json(value)} now{why})"
