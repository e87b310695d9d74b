"""Rows as their owner gives them: one text and one label each, checked before anything is inferred from them.

Knows files and folders but no task. Messages name file, line and label, never a text.
"""

import json
import re
import shlex
from collections.abc import Mapping
from numbers import Integral
from pathlib import Path
from typing import Any, NamedTuple

from gradmm import files
from gradmm.errors import UserError, require
from gradmm.markup import plain_name

SPLITS = ("train", "validation", "test")
LINES, TABLES = (".jsonl", ".ndjson"), (".json", ".csv", ".tsv", ".parquet", ".arrow")
NAMED = {"train": "train", "training": "train", "test": "test", "testing": "test"}
NAMED |= dict.fromkeys(("validation", "validate", "valid", "val", "development", "devel", "dev", "eval"), "validation")
FILLERS = {"of", "part", "shard", "data", "set", "split"}
LINE = '{"text": "...", "label": 0}'
LONGEST_LABEL = 100


class Row(NamedTuple):
    """A text without outer spaces, its label as it was given (a number or a name), and where it stands."""

    text: str
    label: int | str
    origin: str


def check_row(row: Any, where: str) -> Row:
    """A mapping with `text` and `label` as a Row.

    Args:
        where: the row as an error names it, such as "train.jsonl, line 4".

    Raises:
        UserError: no mapping, no text or an empty one, or a label that is neither a whole number nor a short name.
    """
    require(
        isinstance(row, Mapping),
        f"{where} is {type(row).__name__}: give an object with text and label, one a line, such as {LINE}",
    )
    for name in ("text", "label"):
        require(name in row, f"{where} has no {name}: give an object with text and label, such as {LINE}")
    text = row["text"]
    require(isinstance(text, str), f"{where} has a text of type {type(text).__name__}: give a string, such as {LINE}")
    require(bool(text.strip()), f"{where} has an empty text: every row needs at least one word")
    _check_characters(text, f"{where} has half a surrogate pair in its text")
    return Row(text.strip(), _check_label(row["label"], where), where)


def _check_characters(text: str, fault: str) -> None:
    halved = any("\ud800" <= mark <= "\udfff" for mark in text)
    require(not halved, f"{fault}, which is no character: mend or remove that row")


def _check_label(label: Any, where: str) -> int | str:
    if isinstance(label, Integral) and not isinstance(label, bool):
        return int(label)
    if not isinstance(label, str):
        better = _meant(label)
        line = LINE.replace("0", json.dumps(better, ensure_ascii=False))
        said = f"{where} has the label {_as_json(label)}, which is no whole number and no name"
        raise UserError(f"{said}: write it as in {line}")
    require(
        len(label) <= LONGEST_LABEL,
        f"{where} has a label of {len(label)} characters, more than {LONGEST_LABEL}: give the name of a class, such "
        f"as {LINE}",
    )
    _check_characters(label, f"{where} has half a surrogate pair in its label")
    require(bool(label.strip()), f"{where} has an empty label: give a whole number or a name, such as {LINE}")
    require(
        label == label.strip(),
        f"{where} has the label {label!r}, with spaces around the name: write {label.strip()!r}, as in every row of "
        "its class",
    )
    return str(label)


def _meant(label: Any) -> int | str:
    """The label that a row of another type most likely means; 0 where nobody can say."""
    if isinstance(label, list | tuple) and len(label) == 1:
        label = label[0]
    if isinstance(label, str) and 0 < len(label.strip()) <= LONGEST_LABEL:
        return label.strip()
    return int(label) if isinstance(label, int | float) and label % 1 == 0 else 0


def _as_json(label: Any) -> str:
    """A label as it stands in a file, cut short."""
    try:
        text = json.dumps(label, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError):
        return f"of type {type(label).__name__}"
    return text if len(text) <= 40 else f"{text[:37]}..."


# ---------------------------------------------------------------- folders


def read_rows(folder: Path) -> dict[str, list[Row]]:
    """The rows of `train.jsonl` and, where they are there, of `validation.jsonl` and `test.jsonl`.

    Raises:
        UserError: no train.jsonl, an empty file, a broken row, or a file that looks like a split and is not read.
    """
    _refuse_unread(folder)
    there = [split for split in SPLITS if split == "train" or (folder / f"{split}.jsonl").is_file()]
    return {split: read_split(folder, split) for split in there}


def read_split(folder: Path, split: str = "train") -> list[Row]:
    """The rows of one split.

    Raises:
        UserError: no such file, one without rows, or a broken row.
    """
    path = folder / f"{split}.jsonl"
    if not path.is_file():
        _refuse_unread(folder)
    require(path.is_file(), f"{folder} has no {path.name}: put rows such as {LINE} there, one a line")
    values = files.read_json_lines(path)
    instead = "" if split == "train" else ", or remove the file"
    require(len(values) > 0, f"{path} is empty: put rows such as {LINE} there, one a line{instead}")
    called = f"{plain_name(folder.resolve().name)}/{path.name}"
    return [check_row(value, f"{called}, line {number}") for number, value in enumerate(values, 1)]


def _refuse_unread(folder: Path) -> None:
    """Raise for a file that looks like a split and would be left aside without a word."""
    read = [path for split in SPLITS if (path := folder / f"{split}.jsonl").is_file()]
    for path in sorted(folder.glob("*")):
        split = _split_meant(path)
        if split is None or any(path.samefile(one) for one in read):
            continue
        wanted = folder / f"{split}.jsonl"
        if wanted in read:
            mend = f"add its rows to {wanted.name}"
        elif path.suffix.lower() in LINES:
            mend = f"rename it with `mv {shlex.quote(str(path))} {shlex.quote(str(wanted))}`"
        else:
            mend = f"write its rows into {wanted.name}, one object a line such as {LINE},"
        said = f"{folder} holds {path.name}, which looks like a split and is not read"
        raise UserError(f"{said}: {mend} or move it elsewhere")


def _split_meant(path: Path) -> str | None:
    """The split that a data file such as `dev.jsonl` or `train-00000-of-00002.parquet` is named after, or None."""
    if path.suffix.lower() not in (*LINES, *TABLES) or not path.is_file():
        return None
    words = set(re.findall("[a-z]+", path.stem.lower())) - FILLERS
    name = words.pop() if len(words) == 1 else ""
    return NAMED.get(name)


def read_label_names(folder: Path) -> dict[str, str]:
    """What `labels.json` calls each label of the rows: label as text -> name, in the order of the classes.

    `{"labels": ["negative", "positive"]}` names the numbers from 0 (or, if all its names are numbers, these numbers);
    `{"labels": {"1": "negative", "2": "positive"}}` names any labels, and several may have one name. Without the
    file it is empty.

    Raises:
        UserError: neither of these forms.
    """
    path = folder / "labels.json"
    if not path.is_file():
        return {}
    value = files.read_json(path)
    names: Any = value.get("labels") if isinstance(value, Mapping) else value
    known: Any = list(names.values()) if isinstance(names, Mapping) else names
    require(
        isinstance(known, list) and len(known) > 0 and all(isinstance(name, str) for name in known),
        f'{path} holds no list of label names: write {{"labels": ["negative", "positive"]}}, or '
        '{"labels": {"1": "negative", "2": "positive"}} for rows with the labels 1 and 2',
    )
    return dict(names) if isinstance(names, Mapping) else names_by_label(known)


def names_by_label(names: list[str] | tuple[str, ...]) -> dict[str, str]:
    """Label as text -> name: names that are all numbers stand for these numbers, others are counted from 0."""
    if all(name.isdecimal() for name in names):
        return {name: name for name in names}
    return {str(number): name for number, name in enumerate(names)}
