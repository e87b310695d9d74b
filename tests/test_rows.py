"""Rows of every kind that users bring: read, or refused by file, line and value with a line that works."""

import csv
import io
import json
import re
from pathlib import Path

import datasets
import numpy
import pandas
import pytest
import torch

from gradmm.data import Example, check_examples, load_data, read_examples
from gradmm.errors import DataWarning, UserError
from gradmm.rows import check_row, composed, read_label_names, read_rows
from gradmm.tasks import Task, load_task

TWO = Task("two", ("negative", "positive"), (" bad", " great"))
SECRET = "zanzibar"
GOOD = [{"text": f"{SECRET} number {i}", "label": i % 2} for i in range(40)]


def folder_of(root: Path, train, **others) -> Path:
    """A folder of these files: text as it stands, rows as JSON lines."""
    folder = root / "mine"
    folder.mkdir(exist_ok=True)
    for name, rows in {"train.jsonl": train, **others}.items():
        text = rows if isinstance(rows, str) else "".join(json.dumps(row) + "\n" for row in rows)
        (folder / name).write_text(text, encoding="utf-8")
    return folder


def refused(act) -> str:
    with pytest.raises(UserError) as caught:
        act()
    message = str(caught.value)
    assert "\n" not in message and SECRET not in message and "class(es)" not in message
    return message


def labelled(label) -> dict:
    return {"text": f"{SECRET} and more", "label": label}


# kind -> what stands in row 3, what the message says of it
WRONG_LABELS = {
    "a float": {
        1.0: '1.0, .*"label": 1}', 0.0: '0.0, .*"label": 0}', 2.5: '2.5, .*"label": 0}', float("nan"): "NaN, ",
        float("inf"): "Infinity, ", -1.0: '-1.0, .*"label": -1}',
    },
    "true or false": {True: 'true, .*"label": 1}', False: 'false, .*"label": 0}'},
    "nothing": {None: "null, "},
    "a list": {
        "[1]": r'\[1\], .*"label": 1}',
        '["good"]': r'\["good"\], .*"label": "good"}',
        "[]": r"\[\], ", "[true]": r'\[true\], .*"label": 1}', "[0, 1]": r"\[0, 1\], ",
    },
    "an object": {'{"a": 1}': '{"a": 1}, ', "{}": "{}, "},
    "spaces around a name": {
        '"positive "': "'positive ', with spaces around the name: write 'positive'", '" a"': "' a', with",
        '"a\\n"': "'a.n', with",
    },
    "an empty name": {'""': "an empty label", '" "': "an empty label", '"\\t"': "an empty label"},
    "a whole text": {
        json.dumps("words " * 50): "a label of 300 characters, more than 100",
        json.dumps(SECRET * 20): "a label of 160", json.dumps("x" * 101): "a label of 101",
    },
}  # fmt: skip
LABELS = [(kind, label, words) for kind, some in WRONG_LABELS.items() for label, words in some.items()]


@pytest.mark.parametrize(
    ("kind", "label", "words"), LABELS, ids=[f"{kind}, {str(label)[:12]}" for kind, label, _ in LABELS]
)
def test_a_wrong_label_is_named_before_any_class_is_inferred(tmp_path, kind, label, words):
    row = labelled(json.loads(label) if isinstance(label, str) else label)
    folder = folder_of(tmp_path, [*GOOD[:2], row, *GOOD])
    for task in (None, TWO):
        message = refused(lambda task=task: load_data(folder, task))
        assert re.search(f"mine/train.jsonl, line 3 has (the label )?{words}", message), message
        for line in re.findall(r"write it as in (\{.*\})$", message):
            assert check_row(json.loads(line), "here").label == json.loads(line)["label"]
    assert "row 1 has " in refused(lambda: check_examples([row], TWO))


def test_every_label_of_such_a_kind_is_refused_not_counted_as_no_class(tmp_path):
    for labels in ([1.0, 0.0], [True, False], [None, None], [[1], [0]], ["a ", "b "]):
        folder = folder_of(tmp_path, [labelled(label) for label in labels] * 6)
        assert "train.jsonl, line 1 has the label " in refused(lambda folder=folder: load_data(folder))


WRONG_FILES = {
    "an empty file": (["", "\n", "  \n\n"], "train.jsonl is empty: put rows such as {"),
    "an array on one line": (
        [json.dumps(GOOD), "[]", "[1, 2]", json.dumps([[row] for row in GOOD])],
        "mine/train.jsonl, line 1 is list: give an object with text and label, one a line, such as {",
    ),
    "one value over several lines": (
        [json.dumps(GOOD, indent=1), json.dumps(GOOD, indent=4), json.dumps({"data": GOOD}, indent=2)],
        "train.jsonl is one JSON value over several lines: write one object a line",
    ),
    "lines that are no objects": (['"text"', "1", "null"], "mine/train.jsonl, line 1 is "),
    "other columns": (
        ['{"sentence": "a", "label": 1}', '{"Text": "a", "label": 1}', "{}"],
        "mine/train.jsonl, line 1 has no text: give",
    ),
    "no label": (
        ['{"text": "a"}', '{"text": "a", "class": 1}', '{"text": "a", "Label": 1}'],
        "mine/train.jsonl, line 1 has no label: give",
    ),
    "a text that is none": (
        ['{"text": " ", "label": 1}', '{"text": null, "label": 1}', '{"text": ["a"], "label": 1}'],
        "mine/train.jsonl, line 1 has a",
    ),
}
FILES = [
    (kind, number, content, words) for kind, (some, words) in WRONG_FILES.items() for number, content in enumerate(some)
]


@pytest.mark.parametrize(
    ("kind", "number", "content", "words"), FILES, ids=[f"{kind} {number}" for kind, number, *_ in FILES]
)
def test_a_wrong_file_is_named_before_any_class_is_inferred(tmp_path, kind, number, content, words):
    folder = folder_of(tmp_path, content)
    for act in (lambda: load_data(folder), lambda: load_data(folder, TWO), lambda: load_task(folder)):
        assert words in refused(act)
    folder_of(tmp_path, GOOD, **{"test.jsonl": content})
    assert words.replace("train", "test") in refused(lambda: load_data(folder))


OTHER_NAMES = {
    "dev.jsonl": "validation", "val.json": "validation", "valid.jsonl": "validation", "Dev_Set.ndjson": "validation",
    "eval.csv": "validation", "development.tsv": "validation", "training.jsonl": "train", "Test.jsonl": "test",
    "test-00000-of-00001.jsonl": "test", "testing.ndjson": "test", "train-00001-of-00002.csv": "train",
}  # fmt: skip


@pytest.mark.parametrize("name", OTHER_NAMES)
def test_a_file_of_another_usual_name_is_its_split_or_a_part_of_it(tmp_path, name):
    mark = {".csv": ",", ".tsv": "\t"}.get(Path(name).suffix)
    rows = [{"text": f"another {n}", "label": n % 2} for n in range(4)]
    folder = folder_of(tmp_path, GOOD, **{name: csv_text(rows, mark) if mark else rows})
    found = read_rows(folder)
    assert set(found) == {"train", OTHER_NAMES[name]}
    assert {row.text for row in found[OTHER_NAMES[name]]} >= {row["text"] for row in rows}
    assert [row.text for row in found["train"] if SECRET in row.text] == [row["text"] for row in GOOD]
    (folder / "train.jsonl").unlink()
    (folder / name).rename(folder / f"part-1-{name}")
    assert (
        set(read_rows(folder)) == {"train"}
        if OTHER_NAMES[name] == "train"
        else "has no train.jsonl" in refused(lambda: read_rows(folder))
    )


@pytest.mark.parametrize(
    "name", ["labels.json", "notes.txt", "test_results.json", "manifest.json", "latest.csv", "README.md"]
)
def test_other_files_may_stand_beside_the_splits(tmp_path, name):
    assert list(read_rows(folder_of(tmp_path, GOOD, **{name: "[]"}))) == ["train"]


def test_a_run_is_data_by_itself_and_not_beside_other_train_files(tmp_path):
    folder = folder_of(tmp_path, GOOD, **{"manifest.json": "{}", "synthetic.jsonl": GOOD, "dev.jsonl": GOOD[:4]})
    assert len(read_rows(folder)["train"]) == len(GOOD)
    (folder / "train.csv").write_text(csv_text(GOOD))
    message = refused(lambda: load_data(folder))
    assert "holds a run (manifest.json), whose train.jsonl is synthetic, beside train.csv: move" in message
    (folder / "train.jsonl").unlink()
    assert len(read_rows(folder)["train"]) == len(GOOD)


# ---------------------------------------------------------------- labels.json


def test_labels_json_names_numbers_from_0_or_any_labels(tmp_path):
    for labels, names in (
        (["low", "high"], {"0": "low", "1": "high"}),
        (["1", "2"], {"1": "1", "2": "2"}),
        ({"1": "low", "2": "high"}, {"1": "low", "2": "high"}),
        ({"neg": "low", "pos": "high", "ok": "high"}, {"neg": "low", "pos": "high", "ok": "high"}),
    ):
        folder = folder_of(tmp_path, GOOD, **{"labels.json": json.dumps({"labels": labels})})
        assert read_label_names(folder) == names
        assert load_task(folder).labels == tuple(dict.fromkeys(names.values()))
    (folder / "labels.json").unlink()
    assert read_label_names(folder) == {}


NAMED = [
    # labels of the rows, labels.json -> number of each class
    ([2, 1], ["1", "2"], [1, 0]),
    ([2, 1], {"1": "low", "2": "high"}, [1, 0]),
    ([1, 2, 4, 5], {"1": "low", "2": "low", "4": "high", "5": "high"}, [0, 0, 1, 1]),
    (["neg", "pos"], {"pos": "good", "neg": "bad"}, [1, 0]),
    ([0, "high"], {"0": "low", "1": "high"}, [0, 1]),
    (["0", "1"], {"0": "low", "1": "high"}, [0, 1]),
]


@pytest.mark.parametrize(("labels", "named", "numbers"), NAMED)
def test_rows_get_the_names_of_labels_json(tmp_path, labels, named, numbers):
    rows = [{"text": f"some words {number}", "label": labels[number % len(labels)]} for number in range(40)]
    task, splits = load_data(folder_of(tmp_path, rows, **{"labels.json": json.dumps({"labels": named})}))
    found = [example for split in (splits.train, splits.validation, splits.test) for example in split]
    assert len(found) == 40 and all(numbers[int(e.text.split()[-1]) % len(labels)] == e.label for e in found)


def test_a_given_task_takes_the_names_of_labels_json_whatever_their_order(tmp_path):
    folder = folder_of(tmp_path, GOOD, **{"labels.json": '["positive", "negative"]'})
    assert {e.label for e in load_data(folder, TWO)[1].train if int(e.text.split()[-1]) % 2 == 0} == {1}
    folder_of(tmp_path, GOOD, **{"labels.json": '["low", "high"]'})
    assert {e.label for e in load_data(folder, TWO)[1].train if int(e.text.split()[-1]) % 2 == 0} == {0}
    folder_of(
        tmp_path,
        GOOD,
        **{"labels.json": '{"0": "low", "2": "high"}', "task.yaml": 'labels: [low, top]\nverbalizers: [" a", " b"]\n'},
    )
    assert "labels.json holds no list of label names" in refused(lambda: load_data(folder))
    folder_of(tmp_path, GOOD, **{"labels.json": '{"labels": {"0": "low", "2": "high"}}'})
    assert (
        "labels.json names 'low', 'high', and task 'mine' knows 'low', 'top': write the same names in both"
        in refused(lambda: load_data(folder))
    )


def test_a_label_without_a_name_is_refused_by_line(tmp_path):
    for named in ({"1": "low", "2": "high"}, {"0": "low", "2": "high"}, ["1", "2"], ["low", "high"]):
        rows = [*GOOD, labelled(7)]
        message = refused(
            lambda rows=rows, named=named: load_data(
                folder_of(tmp_path, rows, **{"labels.json": json.dumps({"labels": named})})
            )
        )
        assert re.search("mine/train.jsonl, line [0-9]+ has the label [017], and those with a name are ", message)


def test_the_example_of_the_readme_works_as_it_stands(tmp_path):
    page = (Path(__file__).resolve().parents[1] / "README.md").read_text(encoding="utf-8")
    line = json.loads(re.search(r"reviews/train.jsonl +(\{.*\})", page).group(1))
    rows = [{**line, "text": f"{line['text']} {number}", "label": (line["label"] + number) % 2} for number in range(24)]
    task, splits = load_data(folder_of(tmp_path, rows))
    assert task.labels == ("0", "1") and all(len(part) >= 2 for part in (splits.train, splits.validation, splits.test))
    named = re.search(r"reviews/labels.json +optional: (\{.*\})", page).group(1)
    assert load_data(folder_of(tmp_path, rows, **{"labels.json": named}))[0].verbalizers == (" bad", " great")
    stars = re.search(r'`(\{"labels": \{.*\}\})`', page).group(1)
    rows = [{**row, "label": (1, 2, 5)[number % 3]} for number, row in enumerate(rows)]
    assert load_data(folder_of(tmp_path, rows, **{"labels.json": stars}))[0].labels == ("negative", "positive")
    (tmp_path / "mine" / "labels.json").unlink()
    rows = [{**row, "label": number % 2} for number, row in enumerate(rows)]
    task = load_data(
        folder_of(tmp_path, rows, **{"task.yaml": re.search("```yaml\n(.*?)```", page, re.DOTALL).group(1)})
    )[0]
    assert task.verbalizers == (" bad", " great") and all(task.generation_prompts)


# ---------------------------------------------------------------- values from Python


@pytest.mark.parametrize("kind", [numpy.int64, numpy.int32, numpy.uint8, int])
def test_whole_numbers_of_other_libraries_are_labels(kind):
    (found,) = check_examples([{"text": "words", "label": kind(1)}], TWO)
    assert found == Example("words", 1) and type(found.label) is int
    assert check_examples(pandas.DataFrame({"text": ["a", "b"], "label": [0, 1]}).to_dict("records"), TWO) == [
        Example("a", 0),
        Example("b", 1),
    ]


@pytest.mark.parametrize(
    "label", [numpy.float64(1.0), numpy.bool_(True), numpy.array([1]), torch.tensor(1.0), object()]
)
def test_other_values_of_other_libraries_are_not(label):
    assert "row 1 has the label " in refused(lambda: check_examples([labelled(label)], TWO))


FRAME = pandas.DataFrame(GOOD)
WRONG_TYPES = [
    FRAME, FRAME["text"], GOOD, {"train": GOOD}, numpy.array([SECRET]), (SECRET,), SECRET.encode(), {SECRET},
    lambda: SECRET,
]  # fmt: skip


@pytest.mark.parametrize("value", WRONG_TYPES, ids=lambda value: type(value).__name__)
def test_a_value_of_another_type_is_refused_without_what_it_holds(tmp_path, value):
    assert f"the data is of type {type(value).__name__}: give a path or a name as text" in refused(
        lambda: load_data(value)
    )
    message = refused(lambda: load_data(folder_of(tmp_path, GOOD), value))
    assert "the task is of type" in message or "unknown field 'train'" in message
    assert refused(lambda: load_task(value))


@pytest.mark.parametrize(
    "rows", [FRAME, "words", {"text": "a", "label": 0}, 3, None, b"words"], ids=lambda rows: type(rows).__name__
)
def test_what_is_no_list_of_rows_is_refused(rows):
    assert f"the rows are of type {type(rows).__name__}: give a list of objects" in refused(
        lambda: check_examples(rows, TWO)
    )


def test_a_task_may_be_given_in_every_form(tmp_path):
    folder = folder_of(tmp_path, GOOD)
    (tmp_path / "t.yaml").write_text('labels: [negative, positive]\nverbalizers: [" bad", " great"]\n')
    for task in (
        TWO,
        "sst2",
        tmp_path / "t.yaml",
        str(tmp_path / "t.yaml"),
        {"labels": ["negative", "positive"], "verbalizers": [" a", " b"]},
    ):
        found, splits = load_data(folder, task)
        assert found == load_task(task) and len(splits.train) >= 2


def test_a_row_says_where_it_stands():
    assert check_row({"text": " a ", "label": "b"}, "here, line 3") == ("a", "b", "here, line 3")
    (one, two) = check_examples([{"text": "a", "label": 0}, Example("b", 1, "there, line 9")], TWO, "given")
    assert (one.origin, two.origin) == ("given 1", "there, line 9")
    assert one == Example("a", 0) and hash(one) == hash(Example("a", 0)) and repr(one) == "Example(text='a', label=0)"
    assert "there, line 9 has the label 5" in refused(lambda: check_examples([Example("b", 5, "there, line 9")], TWO))


# ---------------------------------------------------------------- tables

REVIEWS = [('fine, really; "good"', "good"), ("dull\nand long", "bad"), ("  a treat ", "good"), ("très mauvais", "bad")]
MANY = [{"text": f"{text} {number}", "label": label} for number in range(40) for text, label in REVIEWS]
MARKS = {"a.csv": ",", "b.csv": ";", "c.tsv": "\t", "d.csv": "\t"}


def csv_text(rows, mark=",", columns=("text", "label"), ends="\r\n") -> str:
    stream = io.StringIO()
    writer = csv.writer(stream, delimiter=mark, lineterminator=ends)
    writer.writerows([columns, *(tuple(row.values()) for row in rows)])
    return stream.getvalue()


def texts_of(splits) -> set[tuple[str, int]]:
    return {(e.text, e.label) for part in (splits.train, splits.validation, splits.test) for e in part}


WANTED = {(row["text"].strip(), int(row["label"] == "good")) for row in MANY}


@pytest.mark.parametrize("name", MARKS)
@pytest.mark.parametrize("ends", ["\n", "\r\n"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_a_csv_file_is_read_whatever_its_mark_ends_and_byte_order_mark(tmp_path, name, ends, encoding):
    (tmp_path / name).write_bytes(csv_text(MANY, MARKS[name], ends=ends).encode(encoding))
    task, splits = load_data(tmp_path / name)
    assert task.labels == ("bad", "good") and task.name == name[0] and texts_of(splits) == WANTED


@pytest.mark.parametrize("labels", [("0", "1"), (0, 1), ("-1", "2")])
def test_numbers_in_a_csv_file_are_numbers(tmp_path, labels):
    rows = [{"text": f"number {i} here", "label": labels[i % 2]} for i in range(40)]
    (tmp_path / "train.csv").write_text(csv_text(rows))
    if labels == ("-1", "2"):
        assert 'name them in labels.json beside it, {"labels": {"-1": "negative"' in refused(
            lambda: load_data(tmp_path)
        )
        (tmp_path / "labels.json").write_text('{"labels": {"-1": "negative", "2": "positive"}}')
    task, splits = load_data(tmp_path)
    assert len(task.labels) == 2 and {label for _, label in texts_of(splits)} == {0, 1}
    assert texts_of(load_data(tmp_path, TWO)[1]) == texts_of(splits)


@pytest.mark.parametrize("ending", ["jsonl", "ndjson", "csv", "tsv", "parquet"])
def test_a_folder_or_file_of_every_kind_and_columns_of_any_name(tmp_path, ending):
    rows = [{"sentence": row["text"], "sentiment": row["label"]} for row in MANY]
    folder, path = tmp_path / "mine", tmp_path / "mine" / f"train.{ending}"
    folder.mkdir()
    if ending == "parquet":
        datasets.Dataset.from_list(rows).to_parquet(str(path))
    elif ending.endswith("sv"):
        path.write_text(csv_text(rows, "\t" if ending == "tsv" else ",", ("sentence", "sentiment")))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for place in (folder, path):
        assert texts_of(load_data(place, text="sentence", label="sentiment")[1]) == WANTED
        message = refused(lambda place=place: load_data(place))
        assert "has no text" in message or (
            "has no column 'text' and no column 'label': it has 'sentence', 'sentiment'; say which" in message
        )
    (folder / "test.csv").write_text(
        csv_text([{"text": "the last one", "label": "good"}], columns=("sentence", "sentiment"))
    )
    assert [e.text for e in load_data(folder, text="sentence", label="sentiment")[1].test] == ["the last one"]


BROKEN_CSV = {
    "a comma without quotes": (
        "text,label\na good one,1\nfine, really,0\n",
        "line 3 has 3 cells and the header 2",
    ),
    "a cell that is missing": ("text,label\na good one,1\n\nfine\n", "line 4 has 1 cells and the header 2"),
    "after a line break": ('text,label\n"one\ntwo",1\nfine\n', "line 4 has 1 cells"),
    "a quote within": ('text,label\n"a "good" one",1\n', "line 2 is no row of a CSV file"),
    "an empty text": ('text,label\n" ",1\n', "line 2 has an empty text"),
    "no header": (
        "My secret is out,1\nfine,0\n",
        "no column 'label': if its first line, of 2 cells, is no header (text in",
    ),
    "no header, of words": ("Great secret,positive\nfine,bad\n", "is no header (text in it isn't shown), write one"),
    "no header, without spaces": ("秘密secret,1\nfine,0\n", "is no header (text in it isn't shown), write one above"),
    "other names": ("review,stars given\na good one,1\n", "write one above it, such as text,label; if it is one, say"),
    "pandas' index": (
        ",sentence,mood\n0,a good one,1\n",
        "no column 'label': it has '', 'sentence', 'mood'; say which",
    ),
    "an index with a name": ("Unnamed: 0,review,stars\n0,fine,1\n", "'label': it has 'Unnamed: 0', 'review', 'stars'"),
    "spaces in the header": ("sentence, mood\nfine, 1\n", "it has 'sentence', 'mood'; say which"),
    "one word a cell": ("fine,good\ndull,bad\n", "or, if that is no header, write one above it, such as text,label"),
    "an empty line above": ("\ntext,label\nfine,1\n", "has an empty first line: remove it"),
    "one column": ("text\na good one\n", "has no column 'label': it has 'text'"),
    "nothing": ("", "is empty"),
    "a header alone": ("text,label\n", "is empty"),
}


@pytest.mark.parametrize("kind", BROKEN_CSV)
def test_a_broken_csv_file_is_named_by_its_line(tmp_path, kind):
    content, words = BROKEN_CSV[kind]
    (tmp_path / "mine.csv").write_text(content)
    for task in (None, TWO):
        said = refused(lambda task=task: load_data(tmp_path / "mine.csv", task))
        assert words in said and "secret" not in said


def test_other_files_are_refused(tmp_path):
    (tmp_path / "x.parquet").write_text("no")
    (tmp_path / "x.json").write_text(json.dumps(GOOD))
    (tmp_path / "x.xlsx").write_text("no")
    for name, words in (
        ("parquet", "is no Parquet file"),
        ("json", "line 1 is list"),
        ("xlsx", "give JSON lines, CSV"),
    ):
        assert words in refused(lambda name=name: load_data(tmp_path / f"x.{name}"))


def as_dataset(names=None, rows=MANY, **columns):
    table = datasets.Dataset.from_list(rows)
    return table.cast_column("label", datasets.ClassLabel(names=names)) if names else table


def test_a_dataset_or_its_splits_are_data():
    for names in (None, ["good", "bad"], ["bad", "good"]):
        task, splits = load_data(as_dataset(names))
        assert set(task.labels) == {"bad", "good"} and task.name == "data set"
        assert {(text, task.labels[label]) for text, label in texts_of(splits)} == {
            (row["text"].strip(), row["label"]) for row in MANY
        }
    parts = datasets.DatasetDict(train=as_dataset(), dev=as_dataset(rows=[{"text": "a last one", "label": "good"}]))
    assert [e.text for e in load_data(parts)[1].validation] == ["a last one"]
    parts["test"] = datasets.Dataset.from_dict({"text": ["a", "b"], "label": [-1, -1]})
    with pytest.warns(DataWarning, match="the split 'test' has no labels and is left out"):
        splits = load_data(parts)[1]
    assert splits.test and splits.notes == ("the split 'test' has no labels and is left out",)
    with pytest.raises(UserError, match="has no split that is called train: it has 'a'"):
        load_data(datasets.DatasetDict(a=as_dataset()))
    with pytest.raises(UserError, match="isn't streamed"):
        load_data(as_dataset().to_iterable_dataset())
    with pytest.raises(UserError, match="has no column 'text': it has 'a', 'label'"):
        load_data(as_dataset().rename_column("text", "a"))


def test_a_dataset_whose_names_are_not_the_task_s_has_its_numbers():
    rows = [{"text": f"number {n}", "label": n % 2} for n in range(200)]
    _, splits = load_data(as_dataset(["neg", "pos"], rows), TWO)
    assert all(label == int(text.split()[1]) % 2 for text, label in texts_of(splits)) and len(texts_of(splits)) == 200
    with pytest.raises(UserError, match="names 'negative', 'bad', and task 'two' knows 'negative', 'positive'"):
        load_data(as_dataset(["negative", "bad"], rows), TWO)
    with pytest.raises(UserError, match="names 'a', 'b', 'c', and task 'two'"):
        load_data(as_dataset(["a", "b", "c"], rows), TWO)


@pytest.mark.parametrize(
    "heading",
    ["text, label", "text ,label", ",text,label", "Unnamed: 0,text,label", "a (b)?,label,text", "text; label"],
)
def test_a_header_may_have_spaces_empty_names_and_marks(tmp_path, heading):
    row = heading.replace(" ,", ",").replace("text", '"a fine, ""quiet"" room {0}"').replace("label", "{1}")
    rows = [row.format(number, number % 2) for number in range(40)]
    (tmp_path / "mine.csv").write_text("\n".join([heading, *rows]), encoding="utf-8")
    assert texts_of(load_data(tmp_path / "mine.csv")[1]) == {(f'a fine, "quiet" room {n}', n % 2) for n in range(40)}


def test_what_a_synthesis_did_not_keep_is_no_row(tmp_path):
    rows = [{"text": f"{word} {n}", "label": word, "kept": n % 2 == 0} for n in range(40) for word in ("bad", "good")]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    table = datasets.Dataset.from_list(rows)
    table.to_parquet(str(tmp_path / "b.parquet"))
    (tmp_path / "c.csv").write_text(csv_text(rows, columns=("text", "label", "kept")))
    words = table.map(lambda row: {"kept": str(row["kept"]).lower()}, remove_columns="kept")
    task = Task("t", ("bad", "good"), (" bad", " great"))
    paths = (tmp_path / name for name in ("a.jsonl", "b.parquet", "c.csv"))
    for data in (*paths, table, table.with_format("numpy"), words):
        found = read_examples(data, task)
        assert len(found) == 40 and all(int(one.text.split()[1]) % 2 == 0 for one in found)
    assert len(check_examples(table.with_format("numpy"), task)) == 40


@pytest.mark.parametrize("names", [["Good", "Bad"], ["good", "bad"]])
def test_names_that_differ_in_case_alone_are_the_task_s(tmp_path, names):
    """And not its numbers, whose order is another."""
    task = Task("t", ("bad", "good"), (" bad", " great"))
    rows = [{"text": f"{names[n % 2]} number {n}", "label": n % 2} for n in range(80)]
    for table in (as_dataset(names, rows), as_dataset(names, rows).with_format("numpy")):
        for found in (load_data(table, task)[1].train, check_examples(table, task)):
            assert all(one.text.lower().startswith(task.labels[one.label]) for one in found)
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (tmp_path / "labels.json").write_text(json.dumps(names), encoding="utf-8")
    assert all(one.text.lower().startswith(task.labels[one.label]) for one in load_data(tmp_path, task)[1].train)
    (tmp_path / "labels.json").write_text(json.dumps(["Good", "low"]), encoding="utf-8")
    with pytest.raises(UserError, match="names 'good', 'low', and task 't' knows 'bad', 'good': write the same"):
        load_data(tmp_path, task)


def test_a_label_that_is_a_list_is_refused_in_a_sentence():
    table = datasets.Dataset.from_list([{"text": "a first one", "label": [3]}, {"text": "a last one", "label": [0, 1]}])
    with pytest.raises(UserError, match=r"row 1 has the label \[3\]"):
        load_data(table)


def test_rows_in_memory_of_another_kind_are_refused_with_the_way_in():
    with pytest.raises(UserError, match=r"of type list: give a path .*, or datasets.Dataset.from_list\(...\)"):
        load_data(MANY)
    with pytest.raises(UserError, match=r"of type DataFrame: give a path .*, or datasets.Dataset.from_pandas\(...\)"):
        load_data(pandas.DataFrame(MANY))


def test_examples_of_a_dataset_have_the_labels_that_its_names_say():
    task = Task("x", ("good", "bad"), (" great", " bad"))
    for names in (None, ["good", "bad"], ["bad", "good"]):
        found = check_examples(as_dataset(names), task)
        assert [e.label for e in found] == [int(row["label"] == "bad") for row in MANY]
    numbered = as_dataset(["neg", "pos"], [{"text": "a", "label": 0}, {"text": "b", "label": 1}])
    assert [e.label for e in check_examples(numbered, task)] == [0, 1]  # other names: the task's numbers
    with pytest.raises(UserError, match="the rows are 1 splits, 'train': give one of them"):
        check_examples(datasets.DatasetDict(train=as_dataset()), task)


@pytest.mark.parametrize("labels", [[1, 2], [0, 2, 5], [-1, 1]])
def test_numbers_of_a_dataset_are_named_as_the_advice_says(labels):
    data = as_dataset(rows=[{"text": f"number {n}", "label": labels[n % len(labels)]} for n in range(90)])
    for given in (data, datasets.DatasetDict(train=data)):
        message = refused(lambda given=given: load_data(given))
        assert "labels.json" not in message and "the labels of the data set, train are [" in message
    rename = eval(re.search(r"data.map\((.*)\), with", message).group(1))
    task, splits = load_data(data.map(rename))
    assert len(task.labels) == len(labels) and len(texts_of(splits)) == 90


@pytest.mark.parametrize("name", ["mine.csv", "mine.jsonl", "train.tsv"])
def test_the_names_beside_a_single_file_are_used_as_the_advice_says(tmp_path, name):
    rows = [{"text": f"number {n}", "label": (1, 2)[n % 2]} for n in range(300)]
    mark = {".csv": ",", ".tsv": "\t"}.get(Path(name).suffix)
    text = csv_text(rows, mark) if mark else "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / name).write_text(text)
    message = refused(lambda: load_data(tmp_path / name))
    (tmp_path / "labels.json").write_text(message[message.index('{"labels"') : message.rindex("}") + 1])
    assert load_data(tmp_path / name)[0].labels == ("negative", "positive")
    (tmp_path / "labels.json").unlink()
    (tmp_path / "task.yaml").write_text('labels: ["1", "2"]\nverbalizers: [" low", " high"]\n')
    assert load_data(tmp_path / name)[0].verbalizers == (" low", " high")


# ---------------------------------------------------------------- a data set's card


def card_of(names, column="label", several=False) -> str:
    info = {"features": [{"name": "text", "dtype": "string"}, {"name": column, "dtype": {"class_label": names}}]}
    header = {"dataset_info": [{"config_name": "a", **info}, {"config_name": "b", **info}] if several else info}
    return f"---\n{json.dumps(header)}\n---\n# A data set\n"


@pytest.mark.parametrize("names", [["low", "high"], ["high", "low"], ["a b", "c"]])
def test_the_card_of_a_folder_names_its_numbers(tmp_path, names):
    by_number = {"names": {str(number): name for number, name in enumerate(names)}}
    for several in (False, True):
        folder = folder_of(tmp_path, GOOD, **{"README.md": card_of(by_number, several=several)})
        task, splits = load_data(folder)
        assert task.labels == tuple(names) == load_task(folder).labels
        assert {int(text.split()[-1]) % 2 == label for text, label in texts_of(splits)} == {True}
    (folder / "labels.json").write_text('["one", "two"]')
    assert load_data(folder)[0].labels == ("one", "two")


@pytest.mark.parametrize(
    "card",
    ["# Notes", "---\n[\n---\n", "---\nlicense: mit\n---\n", card_of({}), card_of({"names": 3}), card_of({}, "x")],
)
def test_a_readme_of_another_kind_names_nothing(tmp_path, card):
    assert load_data(folder_of(tmp_path, GOOD, **{"README.md": card}))[0].labels == ("0", "1")


def test_an_error_on_names_says_which_file_they_are_from(tmp_path):
    card = card_of({"names": {"0": "low", "1": "high"}})
    folder = folder_of(tmp_path, [*GOOD, labelled(7)], **{"README.md": card})
    assert refused(lambda: load_data(folder)).endswith(f"name are 0, 1: name it in {folder / 'README.md'} too")
    folder_of(tmp_path, GOOD, **{"README.md": card_of({"names": {"0": "low", "1": "negative"}})})
    assert refused(lambda: load_data(folder, TWO)).startswith(f"{folder / 'README.md'} names 'low', 'negative', and")
    folder_of(tmp_path, [*GOOD, labelled(7)], **{"labels.json": '["low", "high"]'})
    assert f'in {folder / "labels.json"} too, as in {{"labels": {{"7": "..."}}}}' in refused(lambda: load_data(folder))
    (folder / "labels.json").unlink(), (folder / "README.md").unlink()
    digits = Task("digits", ("0", "1"), (" bad", " great"))
    assert "name it in task 'digits' too" in refused(lambda: load_data(folder, digits))


# ---------------------------------------------------------------- Unicode and columns

CAFE = ("caf\u00e9", "cafe\u0301")  # composed, and decomposed as a Mac writes it


@pytest.mark.parametrize("forms", [CAFE, CAFE[::-1]])
def test_a_label_is_the_same_in_both_forms_of_unicode_and_a_text_stays(tmp_path, forms):
    theirs, own = forms
    rows = [{"text": f"{theirs} {n}", "label": (theirs, "bar")[n % 2]} for n in range(40)]
    numbered = [{**row, "label": n % 2} for n, row in enumerate(rows)]
    task = Task("places", (own, "bar"), (" bad", " great"))
    folder = folder_of(tmp_path, rows)
    found = [load_data(folder, task), load_data(folder), load_data(as_dataset([theirs, "bar"], numbered), task)]
    folder_of(tmp_path, numbered, **{"labels.json": json.dumps([theirs, "bar"])})
    found += [load_data(folder, task), load_data(folder)]
    for known, splits in found:
        assert {composed(label) for label in known.labels} == {CAFE[0], "bar"}
        for text, label in texts_of(splits):
            assert text.startswith(theirs) and (known.labels[label] != "bar") == (int(text.split()[1]) % 2 == 0)
    mixed = folder_of(tmp_path, [*rows, {"text": "one more", "label": own}])
    (mixed / "labels.json").unlink()
    assert load_data(mixed)[0].labels == ("bar", CAFE[0])
    assert [one.label for one in check_examples(rows[:2], task)] == [0, 1]


def test_examples_may_have_other_columns_and_the_advice_says_how(tmp_path):
    rows = [{"sentence": f"number {n}", "verdict": n % 2} for n in range(6)]
    (tmp_path / "mine.csv").write_text(csv_text(rows, columns=("sentence", "verdict")))
    found = read_examples(tmp_path / "mine.csv", TWO, text="sentence", label="verdict")
    assert [one.label for one in found] == [0, 1] * 3
    message = refused(lambda: read_examples(tmp_path / "mine.csv", TWO))
    assert "label='sentiment') (--text and --label on the command line, text_column and label_column of a" in message
    assert "a column's name is of type int" in refused(lambda: read_examples(tmp_path, TWO, text=3))
