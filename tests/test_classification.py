"""Data, task and model are checked against each other when they meet, before the model's first pass."""

from dataclasses import replace

import pytest
from test_protocol import CONFIG, TWO, splits_of, toy

import gradmm
from gradmm.classification import check_fit, evaluate
from gradmm.data import SPLITS, Example, Splits, split_by_content
from gradmm.errors import UserError
from gradmm.experiments.protocol import compare
from gradmm.finetuning import finetune

SECRET = "zanzibar"
LONG = f"{SECRET} " * 40


@pytest.fixture
def learner(tiny_model):
    """A model of 4 tokens' context."""
    model = tiny_model("phi")
    model.lm.config.max_position_embeddings = 4
    return model


@pytest.fixture
def still(tiny_model, learner, monkeypatch):
    """A model that fails the test when it runs."""
    model = tiny_model("llama")
    for name in ("last_hidden", "embed"):
        monkeypatch.setattr(type(model), name, lambda *_: pytest.fail("the model ran"))
    return model


def refused(act) -> str:
    with pytest.raises(UserError) as caught:
        act()
    assert "\n" not in str(caught.value) and SECRET not in str(caught.value)
    return str(caught.value)


def with_long(split: str, places: list[int]) -> Splits:
    """Splits in whose split some lines are too long."""
    splits = splits_of(TWO)
    rows = [
        replace(example, origin=f"mine/{split}.jsonl, line {n}") for n, example in enumerate(getattr(splits, split), 1)
    ]
    rows = [replace(example, text=f"{LONG} {n}") if n in places else example for n, example in enumerate(rows, 1)]
    return replace(splits, **{split: rows})


@pytest.mark.parametrize("places", [[4], [1, 3], [2, 3, 12]])
@pytest.mark.parametrize("split", SPLITS)
def test_a_text_longer_than_the_context_is_named_by_file_and_line(still, split, places):
    splits = with_long(split, places)
    words = f"mine/{split}.jsonl, line {places[0]} has "
    for act in (
        lambda: check_fit(still, TWO, splits, SPLITS),
        lambda: compare(still, TWO, splits, replace(CONFIG, max_test=None), ("real",), progress=False),
        lambda: finetune(still, TWO, splits.train, splits.validation, splits.test),
    ):
        message = refused(act)
        assert message.startswith(words) and "tokens with its template, tiny-llama reads 64" in message
        assert (f"and {len(places) - 1} more of the" in message) == (len(places) > 1)
    if split == "train":
        check_fit(still, TWO, splits)  # of train those that are drawn count


def test_learners_are_checked_too(learner, still):
    assert "tokens with its template, tiny-phi reads 4" in refused(
        lambda: compare(still, TWO, splits_of(TWO), replace(CONFIG, learners=[learner]), ("real",), progress=False)
    )


SAME = {
    # rows of each split -> which is needed, what is said
    "validation is test": (
        {"train": (0, 4), "validation": (20, 2), "test": (20, 2)},
        "validation",
        "all 4 validation rows are left out, since their texts are in test too",
    ),
    "validation within test": (
        {"train": (0, 4), "validation": (20, 1), "test": (20, 3)},
        "validation",
        "all 2 validation rows are left out",
    ),
    "train is validation": (
        {"train": (0, 4), "validation": (0, 4), "test": (20, 2)},
        "train",
        "all 8 train rows are left out, since their texts are in validation too",
    ),
    "train is test": (
        {"train": (0, 4), "validation": (20, 2), "test": (0, 4)},
        "train",
        "all 8 train rows are left out, since their texts are in test too",
    ),
    "one row a class": ({"train": (0, 1)}, "validation", "toy has no validation text"),
}


@pytest.mark.parametrize("case", SAME)
def test_an_empty_split_says_why(still, case):
    ranges, needed, words = SAME[case]
    splits = split_by_content({name: toy(TWO, *some) for name, some in ranges.items()}, "toy")
    message = refused(lambda: check_fit(still, TWO, splits, (needed,)))
    assert f"toy has no {needed} text" in message and words in message and f"put others into {needed}.jsonl" in message
    assert refused(lambda: compare(still, TWO, splits, CONFIG, ("real",), progress=False))


@pytest.mark.parametrize("split", ["train", "validation"])
def test_texts_too_short_for_the_task_are_none(still, split):
    short, splits = replace(TWO, min_words=5), splits_of(TWO)
    check_fit(still, short, splits, SPLITS)
    splits = replace(splits, **{split: [Example("cat", 0), Example("a dog", 1)]})
    assert f"toy has no {split} text of the 5 words that task 'two' asks for" in refused(
        lambda: check_fit(still, short, splits, SPLITS)
    )
    check_fit(still, short, replace(splits_of(TWO), test=[Example("cat", 0)]), SPLITS)


def test_a_verbalizer_and_a_split_that_are_none_are_refused(still):
    assert "the verbalizer ' zebra' of label 'positive' is" in refused(
        lambda: check_fit(still, replace(TWO, verbalizers=(" bad", " zebra")), splits_of(TWO))
    )
    assert "the splits ['dev'] are not known" in refused(lambda: check_fit(still, TWO, splits_of(TWO), ("dev",)))
    assert gradmm.check_fit is check_fit


@pytest.mark.parametrize("place", [1, 2, 3])
def test_rows_are_counted_as_they_were_given(still, place):
    def rows(what):
        some = [
            {"text": example.text, "label": example.label}
            for example in toy(TWO, {"train": 0, "validation": 20, "test": 30}[what], 3)
        ]
        return some[: place - 1] + [{"text": LONG, "label": 0}] + some[place - 1 :]

    assert f"test example {place} has " in refused(lambda: evaluate(still, TWO, rows("test")))
    for what in SPLITS:
        sets = {name: toy(TWO, start, 3) for name, start in zip(SPLITS, (0, 20, 30), strict=True)} | {what: rows(what)}
        assert refused(lambda sets=sets: finetune(still, TWO, **sets)).startswith(f"{what} example {place} has ")
        sets[what][place - 1] = {"text": "a word", "label": 7}
        assert f"{what} example {place} has the label 7" in refused(lambda sets=sets: finetune(still, TWO, **sets))
