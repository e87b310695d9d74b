"""Reading and writing JSON, JSON lines, YAML, safetensors: whole files or none, bounded sizes, clear errors; locks.

Also which files of a folder are data, by their names.
"""

import hashlib
import json
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from gradmm.errors import UserError, first_line, require, short_repr

MAX_TEXT_BYTES = 1 << 30
UMASK = os.umask(0o077)  # asked for by setting one; put back at once
os.umask(UMASK)
MAX_SETTINGS_BYTES = 1 << 20
UNFINISHED = ".unfinished"


def as_path(value: Any, what: str) -> Path:
    """The path that a user gave; what no file can be called is refused, whether or not there is such a file.

    Args:
        what: what the path is for, as an error names it.

    Raises:
        UserError: no text, or a path that is too long, holds a null character or may not be looked at.
    """
    if not isinstance(value, str | Path):  # of other values only the type is shown: they may hold private text
        said = (
            short_repr(value) if value is None or isinstance(value, int | float) else f"of type {type(value).__name__}"
        )
        raise UserError(f"{what} is {said}: give a path or a name as text")
    try:
        os.lstat(value)
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (OSError, ValueError) as error:
        problem = getattr(error, "strerror", None) or error
        raise UserError(f"{what} {short_repr(str(value))} is no usable path ({problem}): give another one") from error
    return Path(value)


def digest(value: Any) -> str:
    """SHA-256 of a value as JSON; what JSON cannot hold counts as its text."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def file_digest(path: Path) -> str:
    """SHA-256 of what a file holds."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def replace_file(path: Path, write: Callable[[Path], object]) -> Path:
    """Let `write` fill a temporary file beside `path`, then rename it: readers see the old file or the new one.

    Raises:
        UserError: when the folder cannot be written or the disk is full.
    """
    path = Path(path)
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=UNFINISHED)
        os.close(handle)
        temporary = Path(name)
        write(temporary)
        with open(temporary, "rb+") as whole:  # Windows syncs what may be written alone
            os.fsync(whole.fileno())
        with suppress(OSError):  # some mounted folders know no modes
            os.chmod(temporary, 0o666 & ~UMASK)
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{path} could not be written ({getattr(error, 'strerror', None) or error}): free space or choose another "
            "output folder; what was finished before is kept"
        ) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
    return path


def remove_unfinished(folder: Path) -> None:
    """Take away the temporary files and folders that killed processes left in a folder that nobody writes into now."""
    for left in Path(folder).glob(f".*{UNFINISHED}"):
        if left.is_dir() and not left.is_symlink():
            shutil.rmtree(left, ignore_errors=True)
        else:
            left.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> Path:
    """Write UTF-8 text as a whole file."""
    return replace_file(path, lambda temporary: temporary.write_text(text, encoding="utf-8", newline="\n"))


def write_json(path: Path, value: Any) -> Path:
    """Write a value as indented JSON; numbers that JSON cannot hold (NaN, infinity) are refused."""
    return write_text(path, json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def write_json_lines(path: Path, rows: Iterable[dict]) -> Path:
    """Write one JSON object a line."""
    return write_text(path, "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows))


def write_tensors(path: Path, tensors: dict, metadata: dict[str, str]) -> Path:
    """Write tensors and string metadata as one safetensors file."""
    held = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    return replace_file(path, lambda temporary: save_file(held, str(temporary), metadata))


def read_tensors(path: Path, mend: str = "give a file that Release.save or a run wrote") -> tuple[dict, dict[str, str]]:
    """Read a safetensors file: (tensors, metadata); each tensor in memory of its own, so that no place in a file
    decides on last bits.

    Args:
        mend: what an error advises; only a run's own unfinished work may be removed.

    Raises:
        UserError: no such file, or not a whole safetensors file.
    """
    require(Path(path).is_file(), f"{path} does not exist: give the path of a readable file")
    try:
        with safe_open(str(path), framework="pt") as file:
            return {name: file.get_tensor(name).clone() for name in file.keys()}, dict(file.metadata() or {})
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} is no whole safetensors file ({error}): {mend}") from error


def read_text(path: Path, limit: int = MAX_TEXT_BYTES) -> str:
    """Read a UTF-8 text file of at most `limit` bytes; a byte order mark at its start is left out.

    Raises:
        UserError: no such file, more bytes, not UTF-8, or not readable.
    """
    path = Path(path)
    require(path.is_file(), f"{path} does not exist: give the path of a readable file")
    size = path.stat().st_size
    require(size <= limit, f"{path} has {size} bytes, more than the {limit} allowed: split it or take fewer rows")
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text (byte {error.start}): save it as UTF-8") from error
    except OSError as error:
        raise UserError(
            f"{path} could not be read ({error.strerror or error}): give the path of a readable file"
        ) from error


def read_json(path: Path, limit: int = MAX_SETTINGS_BYTES) -> Any:
    """Read one JSON value; a syntax error names file and line."""
    return _parse_json(read_text(path, limit), path, 1)


def read_json_lines(path: Path) -> list[Any]:
    """Read one JSON value a line, so that value i stands on line i + 1.

    Raises:
        UserError: a syntax error or blank line (file and line are named), or one value that stands over several lines.
    """
    text = read_text(path).rstrip()
    try:
        return [_parse_json(line, path, number) for number, line in enumerate(text.split("\n"), 1)] if text else []
    except UserError as error:
        try:
            _parse_json(text, path, 1)
        except UserError:
            raise error from None
        raise UserError(
            f"{path} is one JSON value over several lines: write one object a line, with no commas between them"
        ) from error


class YamlLoader(yaml.SafeLoader):
    """YAML of plain values, without aliases: a few lines of them stand for more values than a memory holds.

    As in JSON, 1e-5 is a number, which YAML 1.1 takes for text, and no, yes, off and on are text, which it takes for
    false and true.
    """

    def compose_node(self, parent, index):
        """The next value; an alias is refused."""
        if self.check_event(yaml.AliasEvent):
            alias = self.peek_event()
            problem = f"it has the alias *{alias.anchor}, where the value itself belongs"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=alias.start_mark)
        return super().compose_node(parent, index)


BOOLEAN = "tag:yaml.org,2002:bool"
YamlLoader.yaml_implicit_resolvers = {
    first: [(tag, form) for tag, form in known if tag != BOOLEAN]
    for first, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
YamlLoader.add_implicit_resolver(BOOLEAN, re.compile("(?i:true|false)$"), list("tTfF"))
YamlLoader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"[-+]?\d+[eE][-+]?\d+$"), list("-+0123456789"))


def parse_yaml(text: str) -> Any:
    """One YAML value, see `YamlLoader`; raises yaml.YAMLError, ValueError or RecursionError where there is none."""
    return YamlLoader(text).get_single_data()


def read_yaml(path: Path) -> Any:
    """Read one YAML value, see `YamlLoader`; a syntax error names file and line.

    Raises:
        UserError: not YAML, an alias, or more than `MAX_SETTINGS_BYTES`.
    """
    text = read_text(path, MAX_SETTINGS_BYTES)
    try:
        return parse_yaml(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: a date such as 2020-13-45
        mark = getattr(error, "problem_mark", None)
        line, problem = mark.line + 1 if mark else 1, getattr(error, "problem", None) or first_line(error)
        raise UserError(f"{path}, line {line} is not YAML ({problem}): mend that line") from error


def _parse_json(text: str, path: Path, number: int) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # ValueError: bad syntax, or a number of thousands of digits
        line, problem = number + getattr(error, "lineno", 1) - 1, getattr(error, "msg", None) or first_line(error)
        raise UserError(f"{path}, line {line} is not JSON ({problem}): mend that line") from error


def read_parameters(path: str | Path) -> dict[str, Any]:
    """Read a YAML file of parameters.

    Raises:
        UserError: no mapping.
    """
    values = read_yaml(as_path(path, "the parameter file"))
    values = {} if values is None else values
    require(
        isinstance(values, dict) and all(isinstance(name, str) for name in values),
        f"{path} holds no parameters: write lines such as `seed: 1`",
    )
    return values


# ---------------------------------------------------------------- which files are data

ENDINGS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
NAMED = {"train": "train", "training": "train", "test": "test", "testing": "test"}
NAMED |= dict.fromkeys(("validation", "validate", "valid", "val", "development", "devel", "dev", "eval"), "validation")
FILLERS = {"of", "part", "shard", "data", "set", "split"}
SAVED = ("state.json", "dataset_dict.json")  # of a Dataset and a DatasetDict, as their save_to_disk writes them


def split_meant(path: Path) -> str | None:
    """The split that a data file is named after, or None."""
    if path.name.startswith(".") or path.suffix.lower() not in ENDINGS or not path.is_file():  # ._train of a Mac
        return None
    words = set(re.findall("[a-z]+", path.stem.lower())) - FILLERS
    return NAMED.get(words.pop()) if len(words) == 1 else None


def data_files(folder: Path) -> list[str]:
    """The names of the files by which a folder is one of data."""
    marks = ("task.yaml", "labels.json", *SAVED)
    return sorted(path.name for path in folder.glob("*") if path.name in marks or split_meant(path))


# ---------------------------------------------------------------- one run in a folder at a time

LOCK = ".lock"
logging.getLogger("filelock").setLevel(logging.INFO)  # below, it logs addresses in memory, which differ from run to run


@contextmanager
def lock(folder: str | Path | None, wait: bool = False) -> Iterator[bool]:
    """Hold a folder for as long as this context lasts, and take away what runs that were killed in it left unfinished.

    A folder that does not exist is made. One that cannot be written, such as finished results on a read-only disk, and
    one on a file system without locks are used unheld: reading needs no lock, and a write says itself what is wrong.

    Args:
        folder: None, a run in memory, holds nothing.
        wait: for the end of another run that holds the folder, instead of an error.

    Yields:
        Whether the folder is held, so that nobody else is at work there; of None, too.

    Raises:
        UserError: another run holds the folder.
    """
    path = None if folder is None else as_path(folder, "the output folder")
    held = None if path is None else _acquire(path, -1 if wait else 0)
    if path is None or held is None:
        yield path is None
        return
    with held:
        try:
            remove_unfinished(path)
            yield True
        finally:
            with suppress(OSError):  # while it is held: a later run takes no lock on a file without a name
                (path / LOCK).unlink()


def _acquire(folder: Path, seconds: float) -> AbstractContextManager | None:
    """The lock, already held, to be let go at the end of the context; None where there can be none."""
    try:
        return FileLock(folder / LOCK).acquire(timeout=seconds)
    except Timeout as error:
        raise UserError(
            f"{folder} is in use by another run: wait for its end, or choose another output folder"
        ) from error
    except OSError:
        return None
