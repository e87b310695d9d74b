"""Real examples: folders and the hub's layout, split once by content, drawn by seed, refused in one sentence."""

import json
from collections import Counter
from contextlib import nullcontext
from pathlib import Path

import datasets
import huggingface_hub.constants
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradmm.data import (
    SPLITS,
    Example,
    check_examples,
    content_hash,
    load_data,
    refuse_overlap,
    sample_examples,
    split_by_content,
    without_overlap,
)
from gradmm.errors import DataWarning, UserError
from gradmm.tasks import HubSource, Task, load_task

TWO = Task("two", ("negative", "positive"), (" bad", " great"))
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def rows_of(count: int, classes: int = 2, word: str = "text", start: int = 0) -> list[dict]:
    return [
        {"text": f"{word} number {i} of some more words", "label": i % classes} for i in range(start, start + count)
    ]


def write_rows(path: Path, rows) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), encoding="utf-8"
    )
    return path


@pytest.fixture
def folder(tmp_path) -> Path:
    """A folder of 40 train, 10 validation and 10 test rows in two classes."""
    for number, (split, count) in enumerate(zip(SPLITS, (40, 10, 10), strict=True)):
        write_rows(tmp_path / "mine" / f"{split}.jsonl", rows_of(count, start=100 * number))
    return tmp_path / "mine"


def texts(examples) -> set[str]:
    return {example.text for example in examples}


# ---------------------------------------------------------------- folders


def test_a_place_tells_data_of_one_name_apart(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    table = datasets.Dataset.from_list([{**row, "sentence": row["text"] + " too"} for row in rows_of(40)])
    Path("data").mkdir()
    table.to_csv("data/data.csv"), table.to_json("data/data.jsonl"), table.to_csv("data/train.csv")
    asked = [("data", "text"), ("data/data.csv", "text"), ("data/data.jsonl", "text"), ("data/data.csv", "sentence")]
    places = [load_data(data, text=text)[1].place for data, text in asked]
    assert len(set(places)) == 4
    assert load_data("./data/data.csv")[1].place == load_data(tmp_path / "data" / "data.csv")[1].place == places[1]


def test_a_folder_comes_in_as_it_is(folder):
    task, splits = load_data(folder)
    assert task.labels == ("0", "1")
    assert [len(getattr(splits, split)) for split in SPLITS] == [40, 10, 10]
    assert splits.train[3] == Example("text number 3 of some more words", 1)
    assert (splits.source, splits.dropped) == ("mine", 0)
    assert load_data(str(folder), TWO) == (TWO, splits)


def test_labels_may_be_names_or_numbers(folder):
    named = [{**row, "label": TWO.labels[row["label"]]} for row in rows_of(40)]
    _, numbers = load_data(folder, TWO)
    write_rows(folder / "train.jsonl", named[:20] + rows_of(20, start=20))
    assert load_data(folder, TWO)[1] == numbers


def test_four_classes_by_name_without_a_labels_file(tmp_path):
    names = ("west", "south", "east", "north")
    rows = [{**row, "label": names[row["label"]]} for row in rows_of(80, classes=4)]
    write_rows(tmp_path / "winds" / "train.jsonl", rows)
    task, splits = load_data(tmp_path / "winds")
    assert task.labels == ("east", "north", "south", "west")
    assert Counter(e.label for split in SPLITS for e in getattr(splits, split)) == dict.fromkeys(range(4), 20)
    assert all(names.index(task.labels[e.label]) == int(e.text.split()[2]) % 4 for e in splits.train)


def test_a_folder_named_as_a_registered_task_takes_its_template(tmp_path):
    write_rows(tmp_path / "sst2" / "train.jsonl", rows_of(60))
    task, splits = load_data(tmp_path / "sst2")
    assert (task.template, task.min_words, splits.source) == (load_task("sst2").template, 6, "sst2")


def test_train_alone_is_carved_the_same_way_whatever_else_is_there(tmp_path):
    write_rows(tmp_path / "few" / "train.jsonl", rows_of(300))
    write_rows(tmp_path / "more" / "train.jsonl", [*rows_of(200, start=300)[::-1], *rows_of(300)])
    few, more = load_data(tmp_path / "few")[1], load_data(tmp_path / "more")[1]
    for split in SPLITS:
        assert texts(getattr(few, split)) <= texts(getattr(more, split))
    assert 30 < len(more.validation) < 75 and 30 < len(more.test) < 75


def test_a_split_that_is_there_is_not_carved(tmp_path):
    write_rows(tmp_path / "d" / "train.jsonl", rows_of(200))
    write_rows(tmp_path / "d" / "test.jsonl", rows_of(4, start=1000))
    splits = load_data(tmp_path / "d")[1]
    assert len(splits.test) == 4 and 5 < len(splits.validation) < 40
    write_rows(tmp_path / "d" / "validation.jsonl", rows_of(2, start=2000))
    splits = load_data(tmp_path / "d")[1]
    assert (len(splits.train), len(splits.validation)) == (200, 2)


def test_a_text_in_several_splits_stays_in_the_last(folder):
    twin = {"text": "  TEXT number 3   of some more words ", "label": 1}
    write_rows(folder / "validation.jsonl", [*rows_of(10, start=100), twin])
    write_rows(folder / "test.jsonl", [*rows_of(10, start=200), twin, twin])
    with pytest.warns(DataWarning) as said:
        splits = load_data(folder)[1]
    assert [len(getattr(splits, split)) for split in SPLITS] == [39, 10, 11]
    assert splits.dropped == 3
    assert splits.notes == (
        "1 row(s) repeat another row's text and label, of which the last stays (first: mine/test.jsonl, line 11 "
        "and mine/test.jsonl, line 12)",
        "1 of 40 train rows are left out, since their texts are in test too (first: mine/train.jsonl, line 4 and "
        "mine/test.jsonl, line 12)",
        "1 of 11 validation rows are left out, since their texts are in test too (first: mine/validation.jsonl, "
        "line 11 and mine/test.jsonl, line 12)",
    )
    assert [str(one.message) for one in said] == [f"mine: {note}" for note in splits.notes]
    assert content_hash(twin["text"]) in {content_hash(e.text) for e in splits.test}


@pytest.mark.parametrize(("count", "held"), [(1, 1), (2, 2), (3, 3), (4, 3), (6, 3)])
@pytest.mark.parametrize("word", ["text", "room", "film", "plot"])
def test_few_rows_are_carved_so_that_each_split_has_every_class(count, held, word):
    splits = split_by_content({"train": check_examples(rows_of(2 * count, word=word), TWO)}, "few")
    found = {split: Counter(example.label for example in getattr(splits, split)) for split in SPLITS}
    assert sum(map(Counter.total, found.values())) == 2 * count
    assert [set(found[split]) for split in SPLITS] == [{0, 1}] * held + [set()] * (3 - held)
    if 1 < count < 4:
        assert splits.notes == (
            f"{2 * count - 2} of {2 * count} train texts serve as "
            f"{'validation' if count == 2 else 'validation and test'}, so that every class has some there",
        )
    elif count == 6:
        assert splits.notes == () or len(splits.train) < 8


@pytest.mark.parametrize("rare", [0, 1, 2])
def test_a_rare_class_has_some_in_every_split(rare):
    rows = [
        Example(f"{e.text} {i}", rare if i % 40 == 0 else (rare + 1 + i % 2) % 3)
        for i, e in enumerate(check_examples(rows_of(240), TWO))
    ]
    splits = split_by_content({"train": rows}, "rare")
    assert all({example.label for example in getattr(splits, split)} == {0, 1, 2} for split in SPLITS)
    by_hash = split_by_content({"train": [e for e in rows if e.label != rare]}, "rare")
    for split in SPLITS:  # the other classes lie where their hashes put them
        assert [e for e in getattr(splits, split) if e.label != rare] == getattr(by_hash, split)


LABELLED_TWICE = {
    # rows as (text, label) of each split -> texts that stay in train, texts left out, first lines named
    "far apart": ({"train": [("one", 0), ("two", 1), ("three", 0), ("one", 1)]}, {"two", "three"}, 1, (1, 4)),
    "in other words": ({"train": [("One", 0), ("two", 1), (" one ", 1), ("three", 0)]}, {"two", "three"}, 1, (1, 3)),
    "thrice": (
        {"train": [("two", 1), ("one", 0), ("one", 0), ("one", 1), ("three", 0), ("four", 0), ("four", 1)]},
        {"two", "three"},
        2,
        (2, 4),
    ),
}


@pytest.mark.parametrize("case", LABELLED_TWICE)
def test_a_text_under_several_labels_is_left_out_and_said_once(tmp_path, case):
    rows, kept, count, lines = LABELLED_TWICE[case]
    spare = [{"text": f"spare {n}", "label": n % 2} for n in range(4)]
    folder = write_rows(
        tmp_path / "mine" / "train.jsonl", [{"text": text, "label": label} for text, label in rows["train"]]
    ).parent
    for split, some in (("validation", spare[:2]), ("test", spare[2:])):
        write_rows(folder / f"{split}.jsonl", some)
    with pytest.warns(DataWarning) as said:
        splits = load_data(folder, TWO)[1]
    assert texts(splits.train) == kept and splits.dropped == len(rows["train"]) - 2
    (warned,) = said
    assert str(warned.message) == (
        f"mine: {count} text(s) stand under several labels in {splits.dropped} rows, which are left out "
        f"(first: mine/train.jsonl, line {lines[0]} and mine/train.jsonl, line {lines[1]})"
    )
    assert warned.filename == __file__


def test_a_text_labelled_otherwise_in_a_later_split_is_said(folder):
    write_rows(
        folder / "test.jsonl", [*rows_of(10, start=200), {"text": "text number 3 of some more words", "label": 0}]
    )
    with pytest.warns(
        DataWarning,
        match="1 of 40 train rows are left out, since their texts are in test too, 1 of them under another label",
    ):
        splits = load_data(folder)[1]
    assert Example("text number 3 of some more words", 0) in splits.test


TRAIN_IS_LATER = [("test", 40), ("validation", 40), ("test", 39)]


@pytest.mark.parametrize(("split", "count"), TRAIN_IS_LATER)
def test_no_train_example_says_why(folder, split, count):
    write_rows(folder / f"{split}.jsonl", rows_of(40))
    write_rows(folder / "train.jsonl", rows_of(count))
    with pytest.raises(
        UserError,
        match=f"no train example of '0', '1' .all {count} train rows are left out, since their texts are in "
        f"{split} too",
    ):
        load_data(folder)


def test_the_bench_loads(bench):
    for name, sizes in {"sst2": (67349, 872), "rotten_tomatoes": (10662, 1066)}.items():
        with pytest.warns(DataWarning) if name == "sst2" else nullcontext():
            task, splits = load_data(bench / "data" / name)
        assert task.labels == ("negative", "positive") and task.verbalizers == (" bad", " great")
        assert len(splits.test) <= sizes[1]
        drawn = sample_examples(splits.train, 50, task, seed=0)
        assert Counter(e.label for e in drawn) == {0: 25, 1: 25}
        refuse_overlap(drawn, splits.test)


LINE = '{"text": "fine words", "label": 0}'
BROKEN_FOLDERS = {  # tests/test_rows.py has the rows that are wrong whatever the task is
    "a syntax error": ([LINE, '{"text": "x", "label": 0'], "train.jsonl, line 2 is not JSON"),
    "half a character": (['{"text": "a \\ud83d b", "label": 0}'], "line 1 has half a surrogate pair"),
    "an unknown number": ([LINE, {"text": "words", "label": 2}],
        "line 2 has the label 2: task 'two' knows 0 to 1 or negative, positive"),
    "a negative number": ([{"text": "words", "label": -1}], "line 1 has the label -1"),
    "a long list": ([{"text": "words", "label": [0] * 999}], "line 1 has the label .0, 0, 0"),
    "a name but for its case": ([LINE, {"text": "words", "label": "Positive"}],
        "line 2 has the label 'Positive': .* write 'positive'"),
    "one class": ([LINE], "mine has no train example of 'positive': every one of the 2 classes needs some"),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN_FOLDERS)
def test_a_broken_folder_is_one_sentence(folder, case):
    rows, words = BROKEN_FOLDERS[case]
    write_rows(folder / "train.jsonl", rows)
    with pytest.raises(UserError, match=words) as caught:
        load_data(folder, TWO)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300 + len(str(folder))


def test_a_file_that_is_not_utf8_is_named(folder):
    (folder / "test.jsonl").write_bytes('{"text": "caf\xe9", "label": 0}'.encode("latin-1"))
    with pytest.raises(UserError, match="test.jsonl is not UTF-8 text .byte 13.: save it as UTF-8"):
        load_data(folder, TWO)


def test_a_folder_without_train_and_an_unknown_name_are_refused(tmp_path):
    write_rows(tmp_path / "test.jsonl", rows_of(4))
    with pytest.raises(UserError, match="has no train.jsonl: put rows such as"):
        load_data(tmp_path, TWO)
    with pytest.raises(UserError, match="no data 'absent': give a folder with train.jsonl, demo, or one of sst2"):
        load_data("absent")


# ---------------------------------------------------------------- splits, draws, overlap

words = st.text(st.sampled_from("ab \té"), max_size=4) | st.text(max_size=4)
some_rows = st.lists(st.builds(Example, words, st.integers(0, 1)), max_size=12)
some_splits = st.fixed_dictionaries({}, optional={split: some_rows for split in SPLITS})


def hashes(splits) -> dict[str, set[str]]:
    return {split: {content_hash(example.text) for example in getattr(splits, split)} for split in SPLITS}


@given(some_splits)
def test_splits_share_nothing_and_lose_nothing(rows):
    splits = split_by_content(rows, "here")
    held, labels = hashes(splits), {}
    for split in SPLITS:  # of each text, the labels in the last split that holds it
        own = {}
        for example in rows.get(split, []):
            own.setdefault(content_hash(example.text), set()).add(example.label)
        labels |= own
    given_hashes = {digest for digest, some in labels.items() if len(some) == 1}
    assert sum(map(len, held.values())) == len(set().union(*held.values())) == len(given_hashes)
    assert set().union(*held.values()) == given_hashes
    kept = [example for split in SPLITS for example in getattr(splits, split)]
    assert len(kept) + splits.dropped == sum(map(len, rows.values()))
    assert all(example in [e for some in rows.values() for e in some] for example in kept)
    for split in SPLITS[1:]:
        if rows.get(split):
            later = {content_hash(e.text) for other in SPLITS[SPLITS.index(split) + 1 :] for e in rows.get(other, [])}
            assert held[split] == ({content_hash(e.text) for e in rows[split]} - later) & given_hashes


@given(some_splits, st.randoms(use_true_random=False))
def test_the_order_of_rows_decides_nothing(rows, random):
    mixed = {split: random.sample(rows[split], len(rows[split])) for split in random.sample(list(rows), len(rows))}
    assert hashes(split_by_content(mixed, "here")) == hashes(split_by_content(rows, "here"))


POOL = check_examples(rows_of(40), TWO)


@given(st.integers(2, 40), st.integers(0, 5))
def test_a_draw_is_balanced_without_repeats_and_set_by_its_seed(n, seed):
    drawn = sample_examples(POOL, n, TWO, seed)
    counts = Counter(example.label for example in drawn)
    assert len(set(drawn)) == len(drawn) == n
    assert counts[0] - counts[1] == n % 2
    assert drawn == sample_examples(POOL, n, TWO, seed)
    larger = sample_examples(POOL, min(n + 2, 40), TWO, seed)
    assert set(drawn) <= set(larger)


def test_other_seeds_draw_others():
    assert sample_examples(POOL, 10, TWO, 0) != sample_examples(POOL, 10, TWO, 1)


WRONG_DRAWS = {
    "none": (0, "n_real = 0, but 2 classes need at least 2: ask for more"),
    "fewer than classes": (1, "n_real = 1, but 2 classes"),
    "negative": (-3, "n_real = -3"),
    "more than there are": (42, "n_real = 42 needs 21 examples of 'negative', but 20 of at least 1"),
    "a fraction": (4.0, "n_real = 4.0 is not a whole number"),
    "words": ("ten", "n_real = 'ten' is not a whole number"),
    "true": (True, "n_real = True is not a whole number"),
}


@pytest.mark.parametrize("case", WRONG_DRAWS)
def test_a_draw_that_cannot_be_made_is_one_sentence(case):
    n, message = WRONG_DRAWS[case]
    with pytest.raises(UserError, match=message):
        sample_examples(POOL, n, TWO, 0)


def test_short_texts_are_not_drawn():
    long = Task("long", ("negative", "positive"), (" bad", " great"), min_words=8)
    with pytest.raises(UserError, match="but 0 of at least 8 word.s. exist: lower n_real"):
        sample_examples(POOL, 4, long, 0)
    longer = [Example(f"{e.text} and more", e.label) for e in POOL[:8]]
    assert set(sample_examples([*POOL, *longer], 8, long, 0)) == set(longer)


def test_overlap_is_refused_without_showing_the_text():
    test = [Example("A Secret  text", 0), Example("another", 1)]
    refuse_overlap([Example("no overlap", 0)], test)
    written = [Example("fine", 0), Example("a secret text", 1)]
    with pytest.raises(
        UserError, match="1 text.s. are in the test set too, such as number 2: split once .*data.without_overlap"
    ) as caught:
        refuse_overlap(written, test)
    assert "secret" not in str(caught.value)
    assert without_overlap(written, test) == written[:1]
    rows = [{"text": example.text, "label": example.label} for example in written]  # as `result.kept` has them
    assert without_overlap(datasets.Dataset.from_list(rows), test) == rows[:1]


def test_examples_and_rows_are_checked_alike():
    rows = [{"text": " one ", "label": "positive"}, Example("two", 0), {"text": "three", "label": 1, "more": None}]
    assert check_examples(rows, TWO) == [Example("one", 1), Example("two", 0), Example("three", 1)]
    with pytest.raises(UserError, match="given 2 has the label 3"):
        check_examples([Example("one", 0), Example("two", 3)], TWO, "given")


# ---------------------------------------------------------------- the hub


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A local copy of the hub's cache; `hub(id)` makes a data set's snapshot folder. Nothing else can be reached."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    datasets.disable_progress_bars()

    def add(name: str) -> Path:
        home = tmp_path / "hub" / f"datasets--{name.replace('/', '--')}"
        (home / "refs").mkdir(parents=True)
        (home / "refs" / "main").write_text(COMMIT)
        snapshot = home / "snapshots" / COMMIT
        snapshot.mkdir(parents=True)
        return snapshot

    yield add
    datasets.enable_progress_bars()


def write_parquet(path: Path, rows: list[dict], names: list[str] | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    table = datasets.Dataset.from_list(rows)
    if names:
        table = table.cast_column("label", datasets.ClassLabel(names=names))
    table.to_parquet(str(path))


def test_sst2_uses_the_labelled_splits_alone(hub):
    snapshot = hub("stanfordnlp/sst2")
    for split, count, start in (("train", 80, 0), ("validation", 10, 200), ("test", 10, 300)):
        rows = [
            {"idx": i, "sentence": f"{row['text']} ", "label": -1 if split == "test" else row["label"]}
            for i, row in enumerate(rows_of(count, start=start))
        ]
        write_parquet(snapshot / "data" / f"{split}-00000-of-00001.parquet", rows, ["negative", "positive"])
    task, splits = load_data("sst2")
    assert task == load_task("sst2")
    assert splits.source == f"stanfordnlp/sst2@{COMMIT}"
    assert texts(splits.test) == {row["text"] for row in rows_of(10, start=200)}
    assert len(splits.train) + len(splits.validation) == 80 and 0 < len(splits.validation) < 20


CONFIGS = """---
configs:
- config_name: split
  default: true
  data_files:
  - {split: train, path: split/train-*}
  - {split: validation, path: split/validation-*}
  - {split: test, path: split/test-*}
- config_name: unsplit
  data_files:
  - {split: train, path: unsplit/train-*}
---
# Emotion
"""


@pytest.mark.parametrize(("name", "classes"), [("emotion", 6), ("emotion2", 2)])
def test_emotion_is_read_by_its_configuration(hub, name, classes):
    snapshot = hub("dair-ai/emotion")
    (snapshot / "README.md").write_text(CONFIGS)
    sizes = {"train": 60, "validation": 12, "test": 12}
    for number, (split, count) in enumerate(sizes.items()):
        rows = rows_of(count, classes=6, start=100 * number)
        write_parquet(snapshot / "split" / f"{split}-00000-of-00001.parquet", rows, list(load_task("emotion").labels))
    write_parquet(snapshot / "unsplit" / "train-00000-of-00001.parquet", rows_of(9, classes=6, start=900))
    task, splits = load_data(name)
    assert (task.name, len(task.labels)) == (name, classes)
    assert [len(getattr(splits, split)) for split in SPLITS] == [count * classes // 6 for count in sizes.values()]
    assert {e.label for e in splits.train} == set(range(classes))
    assert not texts(splits.train) & {row["text"] for row in rows_of(9, start=900)}


def test_ag_news_has_four_classes_and_json_lines_will_do(hub):
    snapshot = hub("fancyzhx/ag_news")
    for split, count, start in (("train", 80, 0), ("test", 8, 200)):
        write_rows(snapshot / f"{split}.jsonl", rows_of(count, classes=4, start=start))
    task, splits = load_data("ag_news")
    assert len(task.labels) == 4 and len(splits.test) == 8
    assert {e.label for e in splits.train} == {0, 1, 2, 3}


def test_ag_news_is_read_by_its_numbers_whatever_the_hub_calls_them(hub):
    snapshot = hub("fancyzhx/ag_news")
    for split, count, start in (("train", 80, 0), ("test", 8, 200)):
        rows = rows_of(count, classes=4, start=start)
        names = ["World", "Sports", "Business", "Sci/Tech"]
        write_parquet(snapshot / "data" / f"{split}-00000-of-00001.parquet", rows, names)
    task, splits = load_data("ag_news")
    assert task == load_task("ag_news") and len(splits.test) == 8
    assert {(e.label, int(e.text.split()[2]) % 4) for e in splits.train} == {(n, n) for n in range(4)}


def test_a_task_brings_its_own_source_with_named_labels(hub):
    snapshot = hub("someone/moods")
    rows = [{"words": row["text"], "mood": TWO.labels[row["label"]]} for row in rows_of(40)]
    write_rows(snapshot / "train.jsonl", rows)
    source = HubSource("someone/moods", "words", "mood", {"train": "train"}, revision=COMMIT)
    task = Task("moods", TWO.labels, TWO.verbalizers, hub=source)
    found, splits = load_data("moods", task)
    assert found == task and splits.source == f"someone/moods@{COMMIT}"
    assert sum(len(getattr(splits, split)) for split in SPLITS) == 40


def test_the_classes_of_a_source_count_in_the_order_of_the_labels(hub):
    write_rows(hub("someone/moods") / "train.jsonl", rows_of(60, classes=4))
    source = HubSource("someone/moods", splits={"train": "train"}, classes=(3, 1))
    _, splits = load_data("moods", Task("moods", TWO.labels, TWO.verbalizers, hub=source))
    assert {(e.label, int(e.text.split()[2]) % 4) for e in splits.train} == {(0, 3), (1, 1)}


def test_a_loading_script_is_never_run(hub, tmp_path):
    snapshot = hub("stanfordnlp/sst2")
    (snapshot / "sst2.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(UserError, match="'stanfordnlp/sst2' could not be loaded"):
        load_data("sst2")
    assert not (tmp_path / "ran").exists()


def test_what_the_hub_lacks_is_named(hub):
    with pytest.raises(
        UserError, match="'cornell-movie-review-data/rotten_tomatoes' could not be loaded .*check the name"
    ) as caught:
        load_data("rotten_tomatoes")
    assert "\n" not in str(caught.value)
    snapshot = hub("cornell-movie-review-data/rotten_tomatoes")
    write_rows(snapshot / "train.jsonl", rows_of(20))
    with pytest.raises(UserError, match="has no split 'validation', 'test': it has train"):
        load_data("rotten_tomatoes")
    task = Task(
        "t",
        TWO.labels,
        TWO.verbalizers,
        hub=HubSource("cornell-movie-review-data/rotten_tomatoes", "sentence", splits={"train": "train"}),
    )
    with pytest.raises(UserError, match="has no column 'sentence': it has 'text', 'label'; say which"):
        load_data("t", task)


@pytest.mark.parametrize("name", ["stanfordnlp/sst2", "sst2"])
def test_columns_that_are_named_are_read_from_a_registered_source_too(hub, name):
    rows = [{"sentence": "none", "review": row["text"], "label": 0, "verdict": row["label"]} for row in rows_of(40)]
    snapshot = hub("stanfordnlp/sst2")
    for split, some in (("train", rows[:30]), ("validation", rows[30:])):
        write_rows(snapshot / f"{split}.jsonl", some)
    task, splits = load_data(name, text="review", label="verdict")
    assert task.name == "sst2" and texts(splits.test) == {row["review"] for row in rows[30:]}
    assert {int(e.text.split()[2]) % 2 == e.label for e in splits.test} == {True}
    with pytest.raises(UserError, match="has no column 'words': it has 'sentence', 'review'"):
        load_data(name, text="words")


def test_another_id_than_the_tasks_own_is_read(hub):
    write_rows(hub("someone/reviews") / "train.jsonl", rows_of(40))
    assert load_data("someone/reviews", "sst2")[1].source == f"someone/reviews@{COMMIT}"


def test_data_in_memory_have_no_place_and_a_mac_s_hidden_file_is_no_data(tmp_path):
    rows = {"text": ["a good film", "a bad one"] * 20, "label": [1, 0] * 20}
    made = datasets.Dataset.from_dict(
        {"text": [f"{text} {i}" for i, text in enumerate(rows["text"])], **{"label": rows["label"]}}
    )
    assert load_data(made)[1].place == ""
    made.to_json(tmp_path / "train.jsonl")
    expected = load_data(tmp_path)[1]
    (tmp_path / "._train.jsonl").write_bytes(b"\x00\x05\x16\xb7")
    assert load_data(tmp_path)[1].train == expected.train and expected.place


def test_a_file_that_is_missing_is_no_id_on_the_hub(hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("data").mkdir()
    for name, kind in (
        ("data/nope.csv", "file"), ("other/nope.jsonl", "file"), ("nope.csv", "file"), ("a/b/c", "file or folder"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=f"^there is no {kind} {name} here: check the name"):
            load_data(name)
    for name in ("some/one", "data/nope"):  # a folder may have an owner's name
        with pytest.raises(
            UserError, match=f"^there is no file or folder {name} here, and the hub's data set '{name}'"
        ):
            load_data(name)
    with pytest.raises(UserError, match="^the hub's data set 'stanfordnlp/sst2' could"):
        load_data("sst2")


# ---------------------------------------------------------------- save_to_disk


def test_a_data_set_that_was_saved_to_disk_is_read_as_in_memory(tmp_path):
    names = datasets.ClassLabel(names=["low", "high"])
    table = datasets.Dataset.from_list(rows_of(40)).cast_column("label", names)
    parts = datasets.DatasetDict(train=table, dev=datasets.Dataset.from_list(rows_of(4, start=90)).cast(table.features))
    for name, saved in (("one", table), ("several", parts)):
        saved.save_to_disk(tmp_path / name)
        (task, splits), (expected, held) = load_data(tmp_path / name), load_data(saved)
        assert task.labels == expected.labels == ("low", "high") and task.name == splits.source == name
        assert (splits.train, splits.validation, splits.test) == (held.train, held.validation, held.test)
        assert len(splits.place) == 8 and splits.train[0].origin.startswith(f"{name}, train, row ")
        assert all(one.label == int(one.text.split()[2]) % 2 for one in load_data(tmp_path / name, TWO)[1].train)
    (tmp_path / "one" / "task.yaml").write_text('labels: [low, high]\nverbalizers: [" bad", " great"]\n')
    assert load_data(tmp_path / "one")[0].verbalizers == (" bad", " great")
    with pytest.raises(UserError, match="one, train has no column 'words': it has 'text', 'label'; say which"):
        load_data(tmp_path / "one", text="words")
    (tmp_path / "one" / "state.json").write_text("{}")
    with pytest.raises(UserError, match="one is no data set that can be read .*: write it again with save_to_disk"):
        load_data(tmp_path / "one")
    write_rows(tmp_path / "one" / "train.jsonl", rows_of(40))
    assert load_data(tmp_path / "one")[0].labels == ("low", "high")
