"""A run's folder: its manifest, unfinished batches, and what it leaves at the end.

Knows the solver's Result and no language model. Clock readings go to `manifest.json` ("clock") and `timings.jsonl` alone,
so that every other file is a function of the settings.
"""

import json
import platform
import resource
import time
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pandas
import torch

from gradmm import admm, files
from gradmm.errors import UserError, require

PACKAGES = ("gradmm", "torch", "transformers", "datasets", "tokenizers", "numpy")
SNAPSHOT_SECONDS = 10.0
CLOCK_COLUMNS = ["seconds"]


def versions() -> dict[str, str]:
    """The versions that a result depends on."""
    return {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}}


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def peak_memory() -> dict[str, int]:
    """Peak bytes so far: of this process and, with a GPU, of its allocator."""
    found = {"process": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}
    if torch.cuda.is_available():
        found["cuda"] = torch.cuda.max_memory_allocated()
    return found


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
            folder._claim()
        return folder

    @property
    def finished(self) -> bool:
        """Whether the folder holds the whole results of this run."""
        return self.path is not None and self._held().get("status") == "complete"

    def load(self) -> tuple[list[dict], pandas.DataFrame, dict]:
        """The rows, history and manifest of a finished run."""
        rows, history, clocks = (
            [_numbers(row) for row in files.read_json_lines(self.path / name)]
            for name in ("synthetic.jsonl", "history.jsonl", "timings.jsonl")
        )
        joined = [{**row, **clock} for row, clock in zip(history, clocks, strict=True)]
        self._remove_leftovers()
        return rows, pandas.DataFrame(joined), self._held()

    def _held(self) -> dict:
        """The manifest that the folder holds; the groups of a finished run may make it long."""
        return files.read_json(self.path / "manifest.json", files.MAX_TEXT_BYTES)

    def _remove_leftovers(self) -> None:
        """Take unfinished work away: a run killed at its very end leaves it beside its results."""
        with suppress(OSError):  # results on a read-only disk are read all the same
            for leftover in (*self.path.glob("batch-*.safetensors"), *self.path.glob("texts-*.json")):
                leftover.unlink(missing_ok=True)

    def _claim(self) -> None:
        place = self.path / "manifest.json"
        require(not self.path.exists() or self.path.is_dir(), f"{self.path} is a file: give a folder for the output")
        if place.exists():
            self._compare(self._held())
            return
        held = sorted(path.name for path in self.path.glob("*")) if self.path.exists() else []
        clash = [name for name in held if name in ("README.md", "synthetic.jsonl", "history.jsonl", "timings.jsonl")]
        require(not clash, f"{self.path} holds {', '.join(clash)} but no manifest: choose another output folder or empty this one")
        files.write_json(place, {**self.manifest, "status": "running"})

    def _compare(self, held: dict) -> None:
        differing = [
            f"{name} ({_short(theirs)} there, {_short(ours)} now)"
            for name, ours, theirs in _differences(self.manifest, held)
        ]
        require(
            not differing,
            f"{self.path} holds a run with other settings: {'; '.join(differing[:3])}: choose another output folder, "
            "or the same settings to continue it",
        )

    def load_result(self, batch: int, device: torch.device) -> admm.Result | None:
        """A batch's last saved result, or None.

        Raises:
            UserError: the file there is no saved batch.
        """
        place = self.place(batch)
        if place is None or not place.exists():
            return None
        tensors, metadata = files.read_tensors(place)
        try:
            return _result_from(tensors, metadata, device)
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{place} is no saved batch ({error!r}): remove it and run again") from error

    def snapshot(self, batch: int, result: admm.Result) -> None:
        """Save an unfinished batch, at most every few seconds."""
        if time.monotonic() - self._saved >= SNAPSHOT_SECONDS:
            self.save_result(batch, result)

    def save_result(self, batch: int, result: admm.Result) -> None:
        """Save a batch as it stands."""
        place = self.place(batch)
        if place is not None:
            files.write_tensors(place, *_tensors_of(result))
            self._saved = time.monotonic()

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
        if self.path is None:
            return
        files.write_json_lines(self.path / "synthetic.jsonl", ({k: finite_or_none(v) for k, v in row.items()} for row in rows))
        files.write_json_lines(self.path / "history.jsonl", plain_rows(history.drop(columns=CLOCK_COLUMNS, errors="ignore")))
        files.write_json_lines(self.path / "timings.jsonl", plain_rows(history.filter(["step", "group", *CLOCK_COLUMNS])))
        files.write_text(self.path / "README.md", card)
        files.write_json(self.path / "manifest.json", manifest)
        self._remove_leftovers()

    def place(self, batch: int) -> Path | None:
        """Where a batch is saved."""
        return None if self.path is None else self.path / f"batch-{batch:04d}.safetensors"

    def texts_place(self, unit: int) -> Path | None:
        """Where a unit of written texts is saved."""
        return None if self.path is None else self.path / f"texts-{unit:04d}.json"


def _numbers(row: dict) -> dict:
    """The inverse of `finite_or_none`: measurements that were not finite read as infinity."""
    return {name: float("inf") if value is None else value for name, value in row.items()}


def plain_rows(frame: pandas.DataFrame) -> list[dict]:
    """The rows of a table as JSON can hold them, see `finite_or_none`."""
    return [{name: finite_or_none(value) for name, value in row.items()} for row in frame.to_dict("records")]


def finite_or_none(value):
    """The value as JSON can hold it: infinity and NaN become None, written as null; all else stays as it is."""
    return None if isinstance(value, float) and not (abs(value) < float("inf")) else value


def _differences(ours: dict, theirs: dict, name: str = "") -> list[tuple[str, object, object]]:
    """The leaves of `ours` that `theirs` holds otherwise."""
    found = []
    for key, value in ours.items():
        other, full = theirs.get(key) if isinstance(theirs, dict) else None, f"{name}.{key}" if name else key
        if isinstance(value, dict):
            found += _differences(value, other if isinstance(other, dict) else {}, full)
        elif value != other:
            found.append((full, value, other))
    return found


def _short(value) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 40 else text[:37] + "..."


def _tensors_of(result: admm.Result) -> tuple[dict, dict[str, str]]:
    state = result.state
    tensors = {name: getattr(state, name) for name in ("x", "lam", "ids", "active")}
    tensors |= {"value": result.value, "match": result.match}
    kept = {"step": state.step, "reason": result.reason, "history": result.history}
    return tensors, {"result": json.dumps(kept)}


def _result_from(tensors: dict, metadata: dict[str, str], device: torch.device) -> admm.Result:
    tensors = {name: tensor.to(device) for name, tensor in tensors.items()}
    kept = json.loads(metadata["result"])
    state = admm.State(**{name: tensors[name] for name in ("x", "lam", "ids", "active")}, step=kept["step"])
    return admm.Result(tensors["value"], tensors["match"], tuple(kept["reason"]), kept["history"], state)
