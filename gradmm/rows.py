"""Rows as their owner gives them: one text and one label each, checked before anything is inferred from them.

They stand in JSON lines, CSV, Parquet or a `datasets.Dataset`. Knows files and folders but no task. Messages name file,
line and label, never a text.
"""

import csv
import io
import json
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from gradmm import files
from gradmm.errors import UserError, first_line, is_whole, require, short_json
from gradmm.markup import plain_name

if TYPE_CHECKING:
    from datasets import Dataset

SPLITS = ("train", "validation", "test")
COLUMNS = ("text", "label")
LINE = '{"text": "...", "label": 0}'
HEADING = re.compile(r"(?:[a-z]\w{0,30}|unnamed: \d+)?", re.ASCII | re.IGNORECASE)  # what no text is: a word, or none
WHICH = (
    "which holds the texts and which the labels, as in load_data(..., text='sentence', label='sentiment') (--text and "
    "--label on the command line, text_column and label_column of a notebook, TEXT= and LABEL= of make real)"
)
LONGEST_LABEL = 100


class Row(NamedTuple):
    """A text without outer spaces, its label as it was given (a number or a `composed` name), and where it stands."""

    text: str
    label: int | str
    origin: str


def check_row(row: Any, where: str, columns: Sequence[str] = COLUMNS) -> Row:
    """A mapping with `text` and `label` as a Row.

    Args:
        where: the row as an error names it, such as "train.jsonl, line 4".
        columns: what the row calls its text and its label.

    Raises:
        UserError: no mapping, no text or an empty one, or a label that is neither a whole number nor a short name.
    """
    require(
        isinstance(row, Mapping),
        f"{where} is {type(row).__name__}: give an object with text and label, one a line, such as {LINE}",
    )
    for name in columns:
        require(name in row, f"{where} has no {name}: give an object with text and label, such as {LINE}")
    text, label = (row[name] for name in columns)
    require(isinstance(text, str), f"{where} has a text of type {type(text).__name__}: give a string, such as {LINE}")
    require(bool(text.strip()), f"{where} has an empty text: every row needs at least one word")
    _check_characters(text, f"{where} has half a surrogate pair in its text")
    return Row(text.strip(), _check_label(label, where), where)


def _check_characters(text: str, fault: str) -> None:
    halved = any("\ud800" <= mark <= "\udfff" for mark in text)
    require(not halved, f"{fault}, which is no character: mend or remove that row")


def _check_label(label: Any, where: str) -> int | str:
    if isinstance(label, Integral) and not isinstance(label, bool):
        return int(label)
    if not isinstance(label, str):
        better = _meant(label)
        line = LINE.replace("0", json.dumps(better, ensure_ascii=False))
        said = f"{where} has the label {short_json(label)}, which is no whole number and no name"
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
    return composed(label)


def composed(name: str) -> str:
    """A name in Unicode's composed form: one that was typed on a Mac may write é as e and an accent."""
    return unicodedata.normalize("NFC", name)


def _meant(label: Any) -> int | str:
    """The label that a row of another type most likely means; 0 where nobody can say."""
    if isinstance(label, list | tuple) and len(label) == 1:
        label = label[0]
    if isinstance(label, str) and 0 < len(label.strip()) <= LONGEST_LABEL:
        return label.strip()
    return int(label) if isinstance(label, int | float) and label % 1 == 0 else 0


# ---------------------------------------------------------------- files and tables


def read_file(path: Path, columns: Sequence[str] = COLUMNS) -> list[Row]:
    """The rows of one file: JSON lines, CSV (commas, semicolons or tabs, a header) or Parquet.

    Args:
        columns: what it calls the text and the label.

    Raises:
        UserError: a file of another kind, one without rows or without these columns, or a broken row.
    """
    called = f"{plain_name(path.resolve().parent.name)}/{path.name}"
    if path.suffix.lower() == ".parquet":
        rows = read_table(_parquet(path), called, columns)
    elif path.suffix.lower() in (".csv", ".tsv"):
        rows = _kept(_csv(path, columns), called, columns)
    else:
        rows = _kept(enumerate(files.read_json_lines(path), 1), called, columns)
    instead = "" if path.stem not in SPLITS[1:] else ", or remove the file"
    require(len(rows) > 0, f"{path} is empty: put rows such as {LINE} there, one a line{instead}")
    return rows


def _kept(lines: Iterable[tuple[int, Any]], called: str, columns: Sequence[str]) -> list[Row]:
    return [check_row(row, f"{called}, line {line}", columns) for line, row in lines if not is_reject(row)]


def read_table(table: "Dataset", called: str, columns: Sequence[str] = COLUMNS) -> list[Row]:
    """The rows of a data set; numbers that its ClassLabel names become these names.

    Raises:
        UserError: no such columns, or a broken row.
    """
    _check_columns(table.column_names, columns, called)
    names = class_names(table, columns[1])
    kept = table["kept"] if "kept" in table.column_names else [None] * len(table)
    rows = zip(kept, *(table[name] for name in columns), strict=True)
    found = []
    for number, (keep, text, label) in enumerate(rows, 1):
        if is_reject({"kept": keep}):
            continue
        row = dict(zip(columns, (text, class_name(label, names)), strict=True))
        found.append(check_row(row, f"{called}, row {number}", columns))
    return found


def is_reject(row: Any) -> bool:
    """Whether a row is one that a synthesis wrote and did not keep; a CSV file spells False out."""
    return isinstance(row, Mapping) and str(row.get("kept")).casefold() == "false"


def class_names(table: Any, column: str = "label") -> list[str]:
    """The names that a data set's ClassLabel gives its label numbers; none where it has no such column."""
    feature = (getattr(table, "features", None) or {}).get(column)
    return [composed(name) for name in getattr(feature, "names", None) or []]


def class_name(label: Any, names: Sequence[str]) -> Any:
    """What a ClassLabel with these names calls a label; a label that it does not number stays as it is."""
    return names[label] if is_whole(label) and 0 <= label < len(names) else label


def _check_columns(there: Sequence[str], columns: Sequence[str], called: str, mends: str = "") -> None:
    absent = [name for name in columns if name not in there]
    mends = mends or f"it has {', '.join(map(repr, there))}; say {WHICH}"
    require(not absent, f"{called} has no column {' and no column '.join(map(repr, absent))}: {mends}")


def _check_header(names: Sequence[str], columns: Sequence[str], path: Path, mark: str) -> None:
    """`_check_columns` for a first line that may be no header: what may be text of a row is not shown."""
    header = f"write one above it, such as {mark.join(columns)}"
    if all(HEADING.fullmatch(name) for name in names):
        mends = f"it has {', '.join(map(repr, names))}; say {WHICH}; or, if that is no header, {header}"
    else:
        mends = (
            f"if its first line, of {len(names)} cells, is no header (text in it isn't shown), {header}; if it is one, "
            f"say {WHICH}"
        )
    _check_columns(names, columns, str(path), mends)


def _names(text: str, mark: str) -> list[str]:
    """The cells of a CSV file's first line, without outer spaces."""
    return [name.strip() for name in next(csv.reader(io.StringIO(text), delimiter=mark, skipinitialspace=True), [])]


def _parquet(path: Path) -> "Dataset":
    import pyarrow.parquet
    from datasets import Dataset

    try:
        return Dataset(pyarrow.parquet.read_table(path))
    except (pyarrow.ArrowException, OSError, ValueError, TypeError) as error:
        raise UserError(f"{path} is no Parquet file that can be read ({first_line(error)}): write it again") from error


def _csv(path: Path, columns: Sequence[str]) -> Iterator[tuple[int, dict]]:
    """The rows of a CSV file with the line on which each begins; whole numbers in the label's column become numbers."""
    text = files.read_text(path)
    heads = {mark: _names(text, mark) for mark in ",;\t"}
    mark = max(heads, key=lambda mark: (set(columns) <= set(heads[mark]), len(heads[mark])))
    if text.strip():
        require(bool(text.splitlines()[0].strip()), f"{path} has an empty first line: remove it")
        _check_header(heads[mark], columns, path, mark)
    spaced = f"{mark} " in text.split("\n", 1)[0]
    rows, begins = csv.reader(io.StringIO(text), delimiter=mark, skipinitialspace=spaced, strict=True), 1
    try:
        for cells in rows:
            if begins > 1 and cells:
                require(
                    len(cells) == len(heads[mark]),
                    f"{path}, line {begins} has {len(cells)} cells and the header {len(heads[mark])}: put a text that "
                    f'holds {mark!r} or a line break in double quotes, and double those within it ("")',
                )
                row = dict(zip(heads[mark], cells, strict=True))
                label = row[columns[1]].strip()
                yield begins, {**row, columns[1]: int(label) if re.fullmatch(r"-?\d+", label) else row[columns[1]]}
            begins = rows.line_num + 1
    except csv.Error as error:
        raise UserError(
            f"{path}, line {begins} is no row of a CSV file ({error}): put texts in double quotes, and double those "
            'within them ("")'
        ) from error


# ---------------------------------------------------------------- folders


def read_rows(folder: Path, columns: Sequence[str] = COLUMNS) -> dict[str, list[Row]]:
    """The rows of each split, from all files that are named after it: `train.jsonl`, `dev.csv`, `test-00000.parquet`.

    Raises:
        UserError: no train file, an empty file, a broken row, or other train files beside those of a run.
    """
    given = {path: split for path in sorted(folder.glob("*")) if (split := files.split_meant(path))}
    train = [path.name for path, split in given.items() if split == "train"]
    others = [name for name in train if name != "train.jsonl"]
    is_run = all((folder / name).is_file() for name in ("manifest.json", "synthetic.jsonl"))
    require(
        len(others) in (0, len(train)) or not is_run,
        f"{folder} holds a run (manifest.json), whose train.jsonl is synthetic, beside {', '.join(others[:3])}: move "
        "one of them to another folder",
    )
    parts: dict[str, list[Row]] = {}
    for path, split in given.items():
        parts[split] = [*parts.get(split, ()), *read_file(path, columns)]
    require(
        "train" in parts,
        f"{folder} has no train.jsonl: put rows such as {LINE} there, one a line, or a train.csv or train.parquet",
    )
    return {split: parts[split] for split in SPLITS if split in parts}


def label_names_file(folder: Path) -> Path:
    """The file that `read_label_names` reads."""
    path = folder / "labels.json"
    return path if path.is_file() else folder / "README.md"


def read_label_names(folder: Path, column: str = "label") -> dict[str, str]:
    """What `labels.json` calls each label of the rows: label as text -> name, in the order of the classes.

    `{"labels": ["negative", "positive"]}` names the numbers from 0 (or, if all its names are numbers, these numbers);
    `{"labels": {"1": "negative", "2": "positive"}}` names any labels, and several may have one name. Without the file
    it is what a data set's card in `README.md`, such as that of a synthesis, calls the numbers of this column; or else
    empty.

    Raises:
        UserError: neither of these forms.
    """
    path = label_names_file(folder)
    if path.name == "README.md":
        return _card_names(path, column)
    value = files.read_json(path)
    names: Any = value.get("labels") if isinstance(value, Mapping) else value
    known: Any = list(names.values()) if isinstance(names, Mapping) else names
    require(
        isinstance(known, list) and len(known) > 0 and all(isinstance(name, str) for name in known),
        f'{path} holds no list of label names: write {{"labels": ["negative", "positive"]}}, or '
        '{"labels": {"1": "negative", "2": "positive"}} for rows with the labels 1 and 2',
    )
    named = names if isinstance(names, Mapping) else names_by_label(known)
    return {composed(label): composed(name) for label, name in named.items()}


def _card_names(card: Path, column: str) -> dict[str, str]:
    from huggingface_hub import metadata_load

    with suppress(Exception):  # a README of another kind, which says nothing of labels
        infos = (metadata_load(card) or {})["dataset_info"]
        features = (infos[0] if isinstance(infos, list) else infos)["features"]
        names = next(one["dtype"]["class_label"]["names"] for one in features if one["name"] == column)
        return {str(number): composed(name) for number, name in names.items() if isinstance(name, str)}
    return {}


def names_by_label(names: list[str] | tuple[str, ...]) -> dict[str, str]:
    """Label as text -> name: names that are all numbers stand for these numbers, others are counted from 0."""
    if all(name.isdecimal() for name in names):
        return {name: name for name in names}
    return {str(number): name for number, name in enumerate(names)}
