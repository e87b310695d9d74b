"""Labelled real texts: from files, a `datasets.Dataset` or the hub, split once by content, drawn with a seed.

Train, validation and test never share a text: where the source lacks a split it is carved from train by a hash of the
text, and a text that occurs in several splits stays in the last of train < validation < test.
"""

import hashlib
import re
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from gradmm import files
from gradmm.errors import DataWarning, UserError, first_line, is_whole, require, require_type, short_repr
from gradmm.markup import plain_name
from gradmm.readability import count_words
from gradmm.rows import (
    COLUMNS,
    SPLITS,
    Row,
    check_row,
    class_name,
    class_names,
    composed,
    is_reject,
    label_names_file,
    names_by_label,
    read_file,
    read_label_names,
    read_rows,
    read_table,
)
from gradmm.seeds import generator
from gradmm.tasks import DEMO, SLOT, TASKS, HubSource, Task, implied_task, load_task, require_task, written_task

CARVED_SHARE = 0.1
LARGE_SHARE = 1 / 3  # of the train rows: more of them in carved splits is said


@dataclass(frozen=True)
class Example:
    """One labelled text; `label` counts from 0.

    Attributes:
        origin: where it was read, such as "reviews/train.jsonl, line 4", for errors; no part of equality.
    """

    text: str
    label: int
    origin: str = field(default="", compare=False, repr=False)


@dataclass(frozen=True, repr=False)
class Splits:
    """Disjoint train, validation and test examples.

    Attributes:
        source: the folder's name, or the hub id with the commit read; never a path.
        dropped: how many rows were left out: another row holds the same text.
        notes: a sentence on each kind of row left out or moved: how many and where the first stands, never a text.
        place: 8 digits that follow from the whole path and from the columns' names; none of data in memory.
    """

    train: list[Example]
    validation: list[Example]
    test: list[Example]
    source: str
    dropped: int = 0
    notes: tuple[str, ...] = ()
    place: str = ""

    def __repr__(self) -> str:
        """Without the texts, which may be private and are many."""
        return f"Splits({self.source!r})"


def content_hash(text: str) -> str:
    """A hash of the text's words, blind to case and spacing: the identity of a text in splits and overlap checks."""
    return hashlib.sha256(" ".join(text.lower().split()).encode()).hexdigest()


@dataclass(frozen=True)
class _Given:
    """Rows as they were given.

    Attributes:
        rows: by split.
        names: what the data call each label, see `rows.read_label_names`.
        source: see `Splits`.
        folder: where they lie, if in a folder.
        path: of the file or folder, whole.
        notes: what was left out.
        names_file: where a file could name the labels; None where a data set's ClassLabel does.
    """

    rows: dict[str, list[Row]]
    names: Mapping[str, str]
    source: str
    folder: Path | None = None
    path: str = ""
    notes: tuple[str, ...] = ()
    names_file: Path | None = None

    def task(self) -> Task:
        """The task that they imply."""
        written = None if self.folder is None else written_task(self.folder)
        in_memory = self.names_file is None
        return written or implied_task(self.source.split("@")[0], lambda: self.rows["train"], self.names, in_memory)


def load_data(
    data: Any, task: Task | str | Path | Mapping | None = None, *, text: str = "text", label: str = "label"
) -> tuple[Task, Splits]:
    """Load a task's examples; a `DataWarning` says once what was left out or moved.

    Args:
        data: a folder of files that are named after train, validation (or dev) and test, or one file, as JSON lines,
            CSV or Parquet; a `datasets.Dataset` or `DatasetDict`, or the folder of its `save_to_disk`; a data set's id
            on the hub or a `tasks.HubSource`; a registered name with a hub source; or "demo". What is missing of
            validation and test is carved from train.
        task: whatever `load_task` takes; None takes the one that the data imply.
        text, label: the columns' names. Labels are names, or numbers from 0, or numbers that the data name themselves
            (`labels.json`, ClassLabel, the card of a synthesis).

    Returns:
        (task, splits).

    Raises:
        UserError: no such data, a broken row (file and line), an empty text, an unknown label, or a class without a
            train example (and why).

    Example:
        >>> import gradmm
        >>> task, data = gradmm.load_data("demo")
        >>> task.labels, task.verbalizers
        (('negative', 'positive'), (' bad', ' great'))
        >>> gradmm.load_data("nowhere")
        Traceback (most recent call last):
        gradmm.errors.UserError: there is no data 'nowhere': give a folder with train.jsonl, demo, or one of ...
    """
    _check_columns(text, label)
    task = None if task is None else load_task(task)
    named, hub = _on_hub(data, task, (text, label))
    given = _given(data, hub, (text, label))
    task = task or named or given.task()
    splits = split_by_content(_examples(given, task), given.source)
    _check_classes(splits, task)
    lies = given.folder is not None or hub is not None
    place, notes = files.digest([given.path or given.source, text, label])[:8], (*given.notes, *splits.notes)
    splits = replace(splits, place=place if lies else "", notes=notes)
    for note in notes:
        warnings.warn(f"{given.source}: {note}", DataWarning, stacklevel=2)
    return task, splits


def read_examples(data: Any, task: Task, *, text: str = "text", label: str = "label") -> list[Example]:
    """All train rows of any data that `load_data` takes: nothing is carved or left out, as what is to be learnt."""
    require_task(task)
    _check_columns(text, label)
    return _examples(_given(data, _on_hub(data, task, (text, label))[1], (text, label)), task)["train"]


def _check_columns(*columns: str) -> None:
    for name in columns:
        require_type(name, str, "a column's name", "give text such as 'sentence'")


def _on_hub(data: Any, task: Task | None, columns: tuple[str, str]) -> tuple[Task | None, HubSource | None]:
    """The task that has data of this name or hub id, and where on the hub they are; neither for what lies here."""
    named, source = None, data if isinstance(data, HubSource) else None
    if isinstance(data, str) and data != "demo" and not files.as_path(data, "the data").exists():
        tasks = (one for one in (task, *TASKS.values()) if one is not None and one.hub is not None)
        named = next((one for one in tasks if data in (one.name, one.hub and one.hub.path)), None)
        is_id = re.fullmatch(r"[\w.-]+/[\w.-]+", data) and not data.startswith(".") and not _is_local(data)
        source = named.hub if named is not None else HubSource(data) if is_id else None
    asked: dict[str, Any] = {name: column for name, column in zip(COLUMNS, columns, strict=True) if column != name}
    return named, None if source is None else replace(source, **asked)


def _is_local(name: str) -> bool:
    """Whether a name that nothing here has is meant as a file's."""
    return name.lower().endswith(files.ENDINGS)


def _given(data: Any, hub: HubSource | None, columns: tuple[str, str]) -> _Given:
    """The rows of any source."""
    for kind, call in (("iterrows", "from_pandas"), ("append", "from_list")):
        require(
            not hasattr(data, kind),
            f"the data is of type {type(data).__name__}: give a path or a name as text, or "
            f"datasets.Dataset.{call}(...)",
        )
    if hasattr(data, "column_names"):  # what `datasets` gives; streams have the same attribute
        return _of_tables(data, "the data set", HubSource("", *columns))
    if hub is not None:
        return _of_hub(hub, f"there is no file or folder {data} here, and " if data == hub.path else "")
    path = DEMO if isinstance(data, str) and data == "demo" else files.as_path(data, "the data")
    if path.is_dir():
        return _of_folder(path, columns)
    if path.is_file():
        require(
            path.suffix.lower() in files.ENDINGS,
            f"{path} is no file of rows: give JSON lines, CSV or Parquet ({', '.join(files.ENDINGS)})",
        )
        names, names_file = read_label_names(path.parent, columns[1]), label_names_file(path.parent)
        rows, whole = {"train": read_file(path, columns)}, path.resolve().as_posix()
        return _Given(rows, names, plain_name(path.stem), path.parent, whole, names_file=names_file)
    kind = "" if len(path.parts) == 1 else "file or folder"
    kind = "file" if path.suffix.lower() in files.ENDINGS else kind
    require(not kind, f"there is no {kind} {path} here: check the name and the folder that you are in")
    raise UserError(
        f"there is no data {short_repr(str(data))}: give a folder with train.jsonl, demo, or one of "
        f"{', '.join(TASKS)}; or a file, or an id on the hub such as stanfordnlp/imdb"
    )


def _of_folder(path: Path, columns: tuple[str, str]) -> _Given:
    """The rows of a folder: of files that are named after splits, or else of a data set that was saved to it."""
    called, whole = plain_name(path.resolve().name), "" if path == DEMO else path.resolve().as_posix()
    if any((path / name).is_file() for name in files.SAVED) and not any(map(files.split_meant, path.glob("*"))):
        import datasets

        try:
            tables = datasets.load_from_disk(str(path))
        except Exception as error:  # as many kinds as damages
            raise UserError(
                f"{path} is no data set that can be read ({first_line(error)}): write it again with save_to_disk, "
                "or put a train.jsonl there"
            ) from error
        return replace(_of_tables(tables, called, HubSource("", *columns)), folder=path, path=whole)
    names, names_file = read_label_names(path, columns[1]), label_names_file(path)
    return _Given(read_rows(path, columns), names, called, path, whole, names_file=names_file)


def _examples(given: _Given, task: Task) -> dict[str, list[Example]]:
    """Rows as examples, their labels as the data call them."""
    names = given.names
    if not names and all(label.isdecimal() for label in task.labels):
        names = names_by_label(task.labels)
    apart = not set(_as_called(names, task)) & set(task.labels)
    if given.names_file is None and len(names) == len(task.labels) and apart:
        names = dict(zip(names, task.labels, strict=True))  # a ClassLabel of other names: the same numbers
    names = dict(zip(names, _as_called(names.values(), task), strict=True))
    known, shared = set(names.values()) <= set(task.labels), set(names.values()) & set(task.labels)
    where = given.names_file or f"the ClassLabel of {given.source}" if given.names else f"task {task.name!r}"
    require(
        known or (not shared and list(names) == [str(number) for number in range(len(task.labels))]),
        f"{where} names {', '.join(map(repr, dict.fromkeys(names.values())))}, and task {task.name!r} knows "
        f"{', '.join(map(repr, task.labels))}: write the same names in both",
    )
    return {
        split: [_of_task(_renamed(row, names, where) if known else row, task) for row in rows]
        for split, rows in given.rows.items()
    }


def split_by_content(rows: Mapping[str, list[Example]], source: str) -> Splits:
    """Make the three splits disjoint by content hash; carve a missing validation or test split from train.

    A text that several splits hold stays in the last of them. One that stands in that split under several labels is
    left out, since nobody can say which is right; of several rows with one label the last stays.
    """
    groups: dict[str, list[tuple[str, Example]]] = defaultdict(list)
    for split in SPLITS:
        for example in rows.get(split, ()):
            groups[content_hash(example.text)].append((split, example))
    kept: dict[str, tuple[str, Example]] = {}
    repeated, contradicted, elsewhere = [], [], defaultdict(list)
    for digest, members in groups.items():
        split, last = members[-1]
        within = [example for name, example in members if name == split]
        for name, example in members[: len(members) - len(within)]:
            elsewhere[name, split].append((example, last))
        if len({example.label for example in within}) > 1:
            contradicted.append(within)
        else:
            kept[digest] = (split, last)
            repeated += [(example, last) for example in within[:-1]]
    places = _carve({digest: example.label for digest, (split, example) in kept.items() if split == "train"}, rows)
    parts: dict[str, list[Example]] = {split: [] for split in SPLITS}
    for digest, (split, example) in kept.items():
        parts[places.get(digest, split)].append(example)
    notes = _notes(rows, repeated, contradicted, elsewhere, places)
    dropped = sum(map(len, groups.values())) - len(kept)
    return Splits(parts["train"], parts["validation"], parts["test"], source, dropped, tuple(notes))


def _carve(labels: Mapping[str, int], rows: Mapping[str, list[Example]]) -> dict[str, str]:
    """Where each train text goes, by its hash: a fixed tenth of the hashes for each split that the source lacks.

    Where that leaves train or a carved split without a text of some class, one moves there: the lowest hash of the
    split that has most texts of the class and keeps some, or else of a split after it.
    """
    missing = [split for split in SPLITS[1:] if not rows.get(split)]
    places = {}
    for digest in labels:
        place = int(digest[:12], 16) / 16**12 / CARVED_SHARE
        places[digest] = missing[int(place)] if place < len(missing) else "train"
    for label in set(labels.values()) if missing else ():
        held: dict[str, list[str]] = {split: [] for split in ("train", *missing)}
        for digest in sorted(digest for digest, its in labels.items() if its == label):
            held[places[digest]].append(digest)
        for number, (split, members) in enumerate(held.items()):
            later = [*held.values()][number + 1 :]
            givers = [some for some in held.values() if len(some) > 1] or [some for some in later if some]
            if not members and givers:
                members.append(max(givers, key=len).pop(0))
                places[members[0]] = split
    return places


def _notes(rows: Mapping, repeated: list, contradicted: list, elsewhere: Mapping, places: Mapping) -> list[str]:
    """A sentence on each kind of row that was left out or moved."""
    notes = []
    if repeated:
        said = f"{len(repeated)} row(s) repeat another row's text and label, of which the last stays"
        notes.append(said + _first(*repeated[0]))
    if contradicted:
        first = contradicted[0][0]
        notes.append(
            f"{len(contradicted)} text(s) stand under several labels in {sum(map(len, contradicted))} rows, which are "
            f"left out{_first(first, next(other for other in contradicted[0] if other.label != first.label))}"
        )
    for (split, later), pairs in elsewhere.items():
        share = f"all {len(pairs)}" if len(pairs) == len(rows[split]) else f"{len(pairs)} of {len(rows[split])}"
        other = sum(one.label != two.label for one, two in pairs)
        under = f", {other} of them under another label" if other else ""
        said = f"{share} {split} rows are left out, since their texts are in {later} too"
        notes.append(said + under + _first(*pairs[0]))
    carved = [split for split in places.values() if split != "train"]
    if len(carved) > LARGE_SHARE * len(places):
        there = " and ".join(sorted(set(carved), key=SPLITS.index))
        notes.append(f"{len(carved)} of {len(places)} train texts serve as {there}, so that every class has some there")
    return notes


def _first(one: Example, two: Example) -> str:
    return f" (first: {one.origin} and {two.origin})" if one.origin and two.origin else ""


def equal_counts(n: int, classes: int) -> list[int]:
    """`n` examples over the classes, as equal a number of each as `n` allows: the first ones have one more."""
    return [n // classes + (label < n % classes) for label in range(classes)]


def sample_examples(examples: Iterable, n: int, task: Task, seed: int) -> list[Example]:
    """Draw `n` examples in all, as equal a number of each class as `n` allows, of at least `task.min_words` words.

    Args:
        examples: whatever `check_examples` takes.

    Raises:
        UserError: as `check_examples`; n below the number of classes, or more than some class has.
    """
    examples, count = check_examples(examples, task, "example"), len(task.labels)
    require(is_whole(n), f"n_real = {short_repr(n)} is not a whole number: give how many real examples to draw in all")
    require(n >= count, f"n_real = {n}, but {count} classes need at least {count}: ask for more examples")
    drawn = []
    for label, want in enumerate(equal_counts(n, count)):
        pool = [e for e in examples if e.label == label and count_words(e.text) >= task.min_words]
        require(
            want <= len(pool),
            f"n_real = {n} needs {want} examples of {task.labels[label]!r}, but {len(pool)} of at least "
            f"{task.min_words} word(s) exist: lower n_real",
        )
        order = torch.randperm(len(pool), generator=generator(seed, "real examples", label))[:want]
        drawn += [pool[i] for i in order.tolist()]
    return drawn


def refuse_overlap(seen: Iterable[Example], test: Iterable[Example]) -> None:
    """Raise if an example that training or generation saw is in the test set; no text is shown."""
    hashes = {content_hash(example.text) for example in test}
    shared = [
        example.origin or f"number {number}"
        for number, example in enumerate(seen, 1)
        if content_hash(example.text) in hashes
    ]
    require(
        not shared,
        f"{len(shared)} text(s) are in the test set too, such as {', '.join(shared[:1])}: split once and keep the "
        "test set unseen, or leave out what a model wrote by chance, as gradmm.data.without_overlap(texts, test) does",
    )


def without_overlap(written: Iterable, test: Iterable[Example]) -> list:
    """The examples or rows whose text isn't in the test set: a model may by chance write one that stands there."""
    hashes = {content_hash(example.text) for example in test}
    texts = ((row, row["text"] if isinstance(row, Mapping) else row.text) for row in written)
    return [row for row, text in texts if content_hash(text) not in hashes]


def check_examples(rows: Iterable, task: Task, where: str = "row") -> list[Example]:
    """Rows with `text` and `label` as Examples: what every public function does first with the examples it is given.

    Args:
        rows: Examples or mappings: lists of them, a `datasets.Dataset`, what a synthesis wrote. Labels are numbers,
            numpy's included, or names. A row whose `kept` is False, as a synthesis marks its rejects, is left out.
        where: what an error calls a row, with its number; an Example with an origin is called by that.

    Raises:
        UserError: no rows, a row without text, with an empty text, or with a label that the task does not know.
    """
    require_task(task)
    if isinstance(rows, Mapping) and hasattr(rows, "column_names"):
        raise UserError(f"the rows are {len(rows)} splits, {', '.join(map(repr, rows))}: give one of them")
    require(
        isinstance(rows, Iterable) and not isinstance(rows, str | bytes | Mapping) and not hasattr(rows, "iterrows"),
        f"the rows are of type {type(rows).__name__}: give a list of objects with text and label, which a data frame's "
        'to_dict("records") is',
    )
    rows = rows.with_format(None) if hasattr(rows, "with_format") else rows  # numbers are Python's then
    names = _as_called(class_names(rows), task)
    if not set(names) & set(task.labels):  # numbers then count as the task's own
        names = []
    return [_example(row, names, task, f"{where} {number}") for number, row in enumerate(rows, 1) if not is_reject(row)]


def _as_called(names: Iterable[str], task: Task) -> list[str]:
    """Names as the task writes them, where case or Unicode's form alone tells them apart."""
    own = {composed(label).casefold(): label for label in task.labels}
    return [own.get(composed(name).casefold(), name) if len(own) == len(task.labels) else name for name in names]


def prompt_completion(task: Task, rows: Iterable) -> Any:
    """Examples as a `datasets.Dataset` of prompts and completions, as trainers of language models such as TRL's take.

    Args:
        rows: whatever `check_examples` takes, such as the `kept` of a synthesis.

    Raises:
        UserError: as `check_examples`.

    >>> task = Task("reviews", ("negative", "positive"), (" bad", " great"))
    >>> prompt_completion(task, [{"text": "A treat.", "label": "positive"}])[0]
    {'prompt': 'A treat. It was', 'completion': ' great'}
    """
    import datasets

    examples = check_examples(rows, task)
    prompts = [task.template.replace(SLOT, example.text) for example in examples]
    return datasets.Dataset.from_dict({"prompt": prompts, "completion": [task.verbalizers[e.label] for e in examples]})


def _example(row: Any, names: Sequence[str], task: Task, where: str) -> Example:
    if isinstance(row, Example):
        row, where = {"text": row.text, "label": row.label}, row.origin or where
    elif names and isinstance(row, Mapping) and "label" in row:
        row = {**row, "label": class_name(row["label"], names)}
    return _of_task(check_row(row, where), task)


def _of_task(row: Row, task: Task) -> Example:
    """A row as an example: its label by the task's names, or else as a number from 0."""
    label, names = row.label, ", ".join(task.labels)
    own = [composed(name) for name in task.labels]
    if isinstance(label, str) and composed(label) in own:
        return Example(row.text, own.index(composed(label)), row.origin)
    if isinstance(label, int) and 0 <= label < len(task.labels):
        return Example(row.text, label, row.origin)
    twins = [name for name in own if isinstance(label, str) and name.casefold() == composed(label).casefold()]
    mend = f": write {twins[0]!r}" if twins else ""
    known = f"task {task.name!r} knows 0 to {len(task.labels) - 1} or {names}"
    raise UserError(f"{row.origin} has the label {short_repr(label)}: {known}{mend}")


def _renamed(row: Row, names: Mapping[str, str], where: str | Path) -> Row:
    named = names.get(str(row.label))
    such = f', as in {{"labels": {{"{row.label}": "..."}}}}' if str(where).endswith("labels.json") else ""
    require(
        named is not None or not names or isinstance(row.label, str),
        f"{row.origin} has the label {row.label}, and those with a name are {', '.join(names)}: name it in {where} "
        f"too{such}",
    )
    return row if named is None else row._replace(label=named)


# ---------------------------------------------------------------- data sets and the hub


def _of_tables(tables: Any, called: str, source: HubSource) -> _Given:
    """A `Dataset`, or a `DatasetDict` whose splits are named as usual or as the source says."""
    import datasets

    if isinstance(tables, datasets.Dataset):
        tables = {"train": tables}
    require(
        isinstance(tables, Mapping) and all(isinstance(table, datasets.Dataset) for table in tables.values()),
        f"{called} is of type {type(tables).__name__}: give a datasets.Dataset or DatasetDict that isn't streamed",
    )
    tables = {name: table.with_format(None) for name, table in tables.items()}  # numbers are Python's then
    # The first of two names of one split wins.
    usual = {files.NAMED[name.lower()]: name for name in reversed([*map(str, tables)]) if name.lower() in files.NAMED}
    theirs = source.splits or usual
    absent = [name for name in theirs.values() if name not in tables]
    require(not absent, f"{called} has no split {', '.join(map(repr, absent))}: it has {', '.join(tables)}")
    require("train" in theirs, f"{called} has no split that is called train: it has {', '.join(map(repr, tables))}")
    rows, notes = {}, []
    for split, name in theirs.items():
        labels = tables[name][source.label] if source.label in tables[name].column_names else ["?"]
        if split != "train" and all(label in (None, -1) for label in labels):  # as in public benchmarks' test splits
            notes.append(f"the split {name!r} has no labels and is left out")
            continue
        rows[split] = read_table(tables[name], f"{called}, {name}", (source.text, source.label))
        require(len(rows[split]) > 0, f"the split {name!r} of {called} has no rows: leave it out, or add some")
        if source.classes is not None:  # by number: the names, if there are any, may be other than the task's
            numbered = zip(rows[split], tables[name][source.label], strict=True)
            places = {number: place for place, number in enumerate(source.classes)}
            rows[split] = [row._replace(label=places[number]) for row, number in numbered if number in places]
    names = class_names(tables[theirs["train"]], source.label) if source.classes is None else []
    return _Given(rows, {name: name for name in names}, called.removeprefix("the "), notes=tuple(notes))


def _of_hub(hub: HubSource, absent: str) -> _Given:
    """Read a data set's snapshot with the hub's client: data files only, no loading script.

    Args:
        absent: what an error says first of a name that may have been meant for a file.
    """
    import datasets
    from huggingface_hub import snapshot_download

    patterns = ["*.parquet", "*.json", "*.jsonl", "*.csv", "README.md"]
    try:
        folder = snapshot_download(hub.path, repo_type="dataset", revision=hub.revision, allow_patterns=patterns)
        tables = datasets.load_dataset(folder, hub.config)
    except Exception as error:  # the hub's client raises many kinds, all of them about reaching or reading the data
        raise UserError(
            f"{absent}the hub's data set {hub.path!r} could not be loaded ({first_line(error)}): check the name and "
            "the network, or give a folder or file that is here, such as a folder with train.jsonl"
        ) from error
    return replace(_of_tables(tables, hub.path, hub), source=f"{hub.path}@{Path(folder).name}")


def _check_classes(splits: Splits, task: Task) -> None:
    counts = Counter(example.label for example in splits.train)
    absent = [name for number, name in enumerate(task.labels) if not counts[number]]
    because = f" ({'; '.join(splits.notes)})" if splits.notes else ""
    mend = "take such rows out of one file" if because else "add rows or take the label out of the task"
    require(
        not absent,
        f"{splits.source} has no train example of {', '.join(map(repr, absent))}{because}: every one of the "
        f"{len(task.labels)} classes needs some, so {mend}",
    )
