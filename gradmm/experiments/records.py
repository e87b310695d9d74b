"""Records: results worth keeping, each with the settings, the machine, the versions and the commit that they came from.

A record is one JSON object. Knows no model and nothing of what was measured.
"""

import json
import os
import platform
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from gradmm import files, runs
from gradmm.errors import UserError, first_line, require
from gradmm.runs import PACKAGE

KEYS = ("settings", "machine", "versions", "commit", "results")
COMMIT_VARIABLE = "GRADMM_COMMIT"


def write_record(path: str | Path, results: dict[str, Any], settings: dict[str, Any]) -> None:
    """Write results as one whole file, with what they came from.

    Args:
        path: of the JSON file; an older record there is replaced.
        results: numbers, texts, lists and mappings of these; units belong into the names.
        settings: likewise; all that somebody needs in order to get the same results. `run` says what sets it apart
            from an earlier record of the same model and data.

    Raises:
        UserError: something that JSON cannot hold (a tensor, infinity, not a number), or a file that cannot be written.
    """
    whole = dict(zip(KEYS, (settings, machine(), runs.versions(), commit(), results), strict=True))
    try:
        plain = json.loads(json.dumps(whole, allow_nan=False))
    except (TypeError, ValueError) as error:
        cause = f"{path} cannot hold these results or settings ({first_line(error)})"
        raise UserError(f"{cause}: give finite numbers, texts, lists and mappings") from error
    files.write_json(Path(path), plain)


def read_record(path: str | Path) -> dict[str, Any]:
    """Read a record: a mapping with `settings`, `machine`, `versions`, `commit` and `results`, see `write_record`; and
    with `edited` if figures were changed later: a clause that says which.

    Raises:
        UserError: no such file, not JSON, or one of these is missing.
    """
    record = files.read_json(Path(path), files.MAX_TEXT_BYTES)
    missing = ", ".join(key for key in KEYS if not isinstance(record, dict) or key not in record)
    mend = "write it with gradmm.experiments.records.write_record"
    require(not missing, f"{path} is no record, it has no {missing}: {mend}")
    return record


def read_records(folder: str | Path, prefix: str) -> dict[str, dict[str, Any]]:
    """Read every `<prefix>*.json` of a folder: file name without its ending -> record, sorted by name.

    A folder that is not there has no records; see `find_folder` for where it is sought.

    Raises:
        UserError: one of the files is no record.
    """
    found = sorted(find_folder(folder).glob("*.json"))
    return {path.stem: read_record(path) for path in found if path.name.startswith(prefix)}


def find_folder(folder: str | Path) -> Path:
    """A folder of records: a relative path is tried from the working folder, then from each folder above it.

    So `book/records` is found from the checkout and from `notebooks/`, where JupyterLab starts a notebook's kernel.
    What is nowhere is given back as it is.
    """
    above = (place / folder for place in (Path.cwd(), *Path.cwd().parents))
    return next((place for place in above if place.is_dir()), Path(folder))


def origin(record: Mapping[str, Any]) -> str:
    """Where a record comes from, in Markdown: GPU or processor, torch, commit, then every setting."""
    machine, settings = record["machine"], record["settings"]
    on_cpu = settings.get("device") == "cpu" or not machine["gpu"]
    where = f"{machine['processor'] if on_cpu else machine['gpu']}, torch {record['versions']['torch']}"
    made = f"{where}, commit `{short_commit(record)}`; " + ", ".join(f"{k} = {v}" for k, v in settings.items())
    return "; ".join(filter(None, [made, record.get("edited")]))


def short_commit(record: Mapping[str, Any]) -> str:
    """The commit's first digits, and whether there were changes beside it."""
    commit, _, beside = record["commit"].partition("-")
    return "-".join(filter(None, (commit[:10], beside)))


def machine() -> dict[str, Any]:
    """What the program runs on: system, processor, cores it may use, memory in bytes, GPU; no host name.

    What cannot be told is None, and so is `gpu` without one.
    """
    has_gpu = torch.cuda.is_available()
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "cores": cores(),
        "threads": torch.get_num_threads(),
        "memory_bytes": memory_bytes(),
        "gpu": torch.cuda.get_device_name() if has_gpu else None,
        "gpu_memory_bytes": torch.cuda.get_device_properties(0).total_memory if has_gpu else None,
    }


def cores() -> int | None:
    """Cores that the program may use; None where the system does not tell."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def _processor() -> str | None:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:  # no Linux
        return platform.processor() or None
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), None)


def memory_bytes() -> int | None:
    """The machine's memory; None where the system does not tell."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return None


def commit() -> str:
    """The commit that the package was read from, with `-dirty` where tracked files differ from it.

    Outside a git checkout it is what the environment variable GRADMM_COMMIT says, and "unknown" without that.
    """
    if _git("ls-files", "--error-unmatch", "__init__.py") is None:
        return os.environ.get(COMMIT_VARIABLE, "unknown")
    return _git("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*") or "unknown"


def _git(*arguments: str) -> str | None:
    """What a git command about the package's folder says, or None if it fails or there is no git."""
    command = ["git", "-C", str(PACKAGE), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
