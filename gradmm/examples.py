"""Labelled real texts: from a folder of JSON lines or the hub, split once by content, drawn with a seed.

Train, validation and test never share a text: where the source lacks a split it is carved from train by a hash of the
text, and a text that occurs in several splits stays in the last of train < validation < test.
"""

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from gradmm import files
from gradmm.errors import UserError, first_line, require, shown
from gradmm.markup import check_name
from gradmm.seeds import generator
from gradmm.tasks import DEMO, TASKS, HubSource, Task, load_task

SPLITS = ("train", "validation", "test")
CARVED_SHARE = 0.1


@dataclass(frozen=True)
class Example:
    """One labelled text; `label` counts from 0."""

    text: str
    label: int


@dataclass(frozen=True)
class Splits:
    """Disjoint train, validation and test examples.

    Attributes:
        source: the folder's name, or the hub id with the commit read; never a path.
        dropped: how many texts were left out because a later split or an earlier row holds the same text.
    """

    train: list[Example]
    validation: list[Example]
    test: list[Example]
    source: str
    dropped: int = 0


def content_hash(text: str) -> str:
    """A hash of the text's words, blind to case and spacing: the identity of a text in splits and overlap checks."""
    return hashlib.sha256(" ".join(text.lower().split()).encode()).hexdigest()


def load_data(data: str | Path, task: Task | None = None) -> tuple[Task, Splits]:
    """Load a task's examples.

    Args:
        data: a folder of `{train,validation,test}.jsonl` (`text`, `label`), "demo", or a registered name with a hub source.
        task: the task; None takes the one that the folder or name implies.

    Returns:
        (task, splits).

    Raises:
        UserError: no such data, a broken row (file and line), an empty text, an unknown label, or one class only.

    Example:
        >>> import gradmm
        >>> task, data = gradmm.load_data("demo")
        >>> task.labels, task.verbalizers
        (('negative', 'positive'), (' bad', ' great'))
        >>> gradmm.load_data("nowhere")
        Traceback (most recent call last):
        gradmm.errors.UserError: there is no data 'nowhere': give a folder with train.jsonl, demo, or one of ...
    """
    folder = DEMO if str(data) == "demo" else files.as_path(data, "the data")
    if folder.is_dir():
        task = load_task(folder) if task is None else task
        rows, source = _folder_rows(folder, task), check_name(folder.resolve().name, "the data's folder")
    else:
        require(
            str(data) in TASKS or (task is not None and task.hub is not None),
            f"there is no data {shown(str(data))}: give a folder with train.jsonl, demo, or one of {', '.join(TASKS)}",
        )
        task = load_task(str(data)) if task is None else task
        rows, source = _hub_rows(TASKS[str(data)] if str(data) in TASKS else task, task)
    splits = split_by_content(rows, source)
    _check_classes(splits, task)
    return task, splits


def split_by_content(rows: Mapping[str, list[Example]], source: str) -> Splits:
    """Make the three splits disjoint by content hash; carve a missing validation or test split from train."""
    held: dict[str, tuple[str, Example]] = {}
    total = 0
    for split in SPLITS:
        for example in rows.get(split, ()):
            total += 1
            held[content_hash(example.text)] = (split, example)
    parts: dict[str, list[Example]] = {split: [] for split in SPLITS}
    for digest, (split, example) in held.items():
        parts[_carve(digest, rows) if split == "train" else split].append(example)
    return Splits(**parts, source=source, dropped=total - len(held))


def _carve(digest: str, rows: Mapping[str, list[Example]]) -> str:
    """Where a train text goes: a fixed tenth of the hashes for each split that the source lacks."""
    place = int(digest[:12], 16) / 16**12
    for split in ("validation", "test"):
        if not rows.get(split):
            if place < CARVED_SHARE:
                return split
            place -= CARVED_SHARE
    return "train"


def sample_examples(examples: Sequence[Example], n: int, task: Task, seed: int) -> list[Example]:
    """Draw `n` examples in all, as equal a number of each class as `n` allows, of at least `task.min_words` words.

    Raises:
        UserError: n below the number of classes, or more than some class has.
    """
    count = len(task.labels)
    require(type(n) is int, f"n_real = {shown(n)} is not a whole number: give how many real examples to draw in all")
    require(n >= count, f"n_real = {n}, but {count} classes need at least {count}: ask for more examples")
    drawn = []
    for label in range(count):
        pool = [e for e in examples if e.label == label and len(e.text.split()) >= task.min_words]
        want = n // count + (label < n % count)
        require(
            want <= len(pool),
            f"n_real = {n} needs {want} examples of {task.labels[label]!r}, but {len(pool)} of at least {task.min_words} "
            "word(s) exist: lower n_real",
        )
        order = torch.randperm(len(pool), generator=generator(seed, "real examples", label))[:want]
        drawn += [pool[i] for i in order.tolist()]
    return drawn


def refuse_overlap(seen: Iterable[Example], test: Iterable[Example]) -> None:
    """Raise if any example that training or generation saw is in the test set; its text may be private and is not shown.

    Raises:
        UserError: there is one.
    """
    hashes = {content_hash(example.text) for example in test}
    shared = [number for number, example in enumerate(seen, 1) if content_hash(example.text) in hashes]
    require(
        not shared,
        f"{len(shared)} text(s) are in the test set too, such as number {shared[:1]}: split once and keep the test set unseen",
    )


def without_overlap(written: Iterable[Example], test: Iterable[Example]) -> list[Example]:
    """The examples whose text is not in the test set: a model may by chance write a text that stands there word for word."""
    hashes = {content_hash(example.text) for example in test}
    return [example for example in written if content_hash(example.text) not in hashes]


def check_examples(rows: Iterable, task: Task, where: str = "row") -> list[Example]:
    """Rows with `text` and `label` (dicts or Examples) as Examples.

    Raises:
        UserError: a row without text, with an empty text, or with a label that the task does not know.
    """
    return [_example(row, task, f"{where} {number}") for number, row in enumerate(rows, 1)]


def _example(row, task: Task, where: str) -> Example:
    if isinstance(row, Example):
        row = {"text": row.text, "label": row.label}
    require(isinstance(row, Mapping), f"{where} is {type(row).__name__}: give an object with text and label")
    for name in ("text", "label"):
        require(name in row, f"{where} has no {name}: give an object with text and label")
    text = row["text"]
    require(isinstance(text, str), f"{where} has a text of type {type(text).__name__}: give a string")
    require(bool(text.strip()), f"{where} has an empty text: every row needs at least one word")
    require(
        not any("\ud800" <= mark <= "\udfff" for mark in text),
        f"{where} has half a surrogate pair in its text, which is no character: mend or remove that row",
    )
    return Example(text.strip(), _label_number(row["label"], task, where))


def _label_number(label, task: Task, where: str) -> int:
    if isinstance(label, str) and label in task.labels:
        return task.labels.index(label)
    if type(label) is int and 0 <= label < len(task.labels):
        return label
    raise UserError(
        f"{where} has the label {shown(label)}: task {task.name!r} knows 0 to {len(task.labels) - 1} or {', '.join(task.labels)}"
    )


def _folder_rows(folder: Path, task: Task) -> dict[str, list[Example]]:
    paths = {split: folder / f"{split}.jsonl" for split in SPLITS}
    require(
        paths["train"].is_file(),
        f'{folder} has no train.jsonl: put rows such as {{"text": "...", "label": 0}} there, one a line',
    )
    return {
        split: check_examples(files.read_json_lines(path), task, f"{path}, line")
        for split, path in paths.items()
        if path.is_file()
    }


def _hub_rows(origin: Task, task: Task) -> tuple[dict[str, list[Example]], str]:
    """Read a data set's snapshot with the hub's client: data files only, no loading script."""
    import datasets
    from huggingface_hub import snapshot_download

    hub = task.hub or origin.hub
    patterns = ["*.parquet", "*.json", "*.jsonl", "*.csv", "README.md"]
    try:
        folder = snapshot_download(hub.path, repo_type="dataset", revision=hub.revision, allow_patterns=patterns)
        read = datasets.load_dataset(folder, hub.config)
    except Exception as error:  # the hub's client raises many kinds, all of them about reaching or reading the data
        raise UserError(
            f"the hub's data set {hub.path!r} could not be loaded ({first_line(error)}): "
            "check the name and the network, or give a folder with train.jsonl"
        ) from error
    rows = {ours: _hub_split(read, theirs, hub, task) for ours, theirs in hub.splits.items()}
    return rows, f"{hub.path}@{Path(folder).name}"


def _hub_split(read: Mapping, split: str, hub: HubSource, task: Task) -> list[Example]:
    require(split in read, f"the hub's data set {hub.path!r} has no split {split!r}: it has {', '.join(read)}")
    table, columns = read[split], (hub.text, hub.label)
    absent = [column for column in columns if column not in table.column_names]
    require(not absent, f"the hub's data set {hub.path!r} has no column {absent[:1]}: it has {', '.join(table.column_names)}")
    pairs = zip(table[hub.text], table[hub.label], strict=True)
    if hub.classes is not None:
        pairs = ((text, hub.classes.index(label)) for text, label in pairs if label in hub.classes)
    return check_examples(({"text": text, "label": label} for text, label in pairs), task, f"{hub.path}, {split}, row")


def _check_classes(splits: Splits, task: Task) -> None:
    counts = Counter(example.label for example in splits.train)
    absent = [name for number, name in enumerate(task.labels) if not counts[number]]
    require(
        not absent,
        f"{splits.source} has no train example of {', '.join(map(repr, absent))}: every one of the {len(task.labels)} "
        "classes needs some, so add rows or take the label out of the task",
    )
