"""The label filter and the ranking: who is kept, and the reason that every text carries."""

import json
import math

import pytest
import torch

from gradmm.readability import flaw
from gradmm.selection import (
    DUPLICATE,
    EMPTY,
    FILTERS,
    LABEL,
    PERPLEXED,
    RANK,
    calibrate,
    count_dropped,
    label_probabilities,
    select,
    unreadable,
)
from gradmm.tasks import Task, tokenize_task

LABELS = ("bad", "good")


def chosen(texts, classes, scores, misread, per_class):
    probabilities = torch.full((len(texts), len(per_class)), 1 / len(per_class))
    barred = unreadable(texts, [""] * len(texts), [50.0] * len(texts))
    return select(barred, classes, scores, misread, probabilities, per_class, LABELS)


def test_the_lowest_scores_of_each_class_are_kept_and_every_text_has_a_reason():
    verdicts = chosen(["a", "b", "c", "d"], [0, 0, 1, 1], [0.2, 0.1, 0.4, 0.3], [None] * 4, (1, 1))
    assert [v.kept for v in verdicts] == [False, True, False, True]
    assert verdicts[0].reason == "dropped: rank 2 of 2, 1 were asked for"
    assert verdicts[1].reason == "kept: rank 1 of 2 by matching loss"


def test_misread_empty_and_repeated_texts_are_dropped_for_what_they_are():
    verdicts = chosen(
        ["a", " ", "a", "b", "c"], [0, 0, 0, 0, 1], [0.1, 0.0, 0.1, 0.3, 0.1], [None, None, None, 1, None], (1, 1)
    )
    assert [v.kept for v in verdicts] == [True, False, False, False, True]
    assert "empty" in verdicts[1].reason and "earlier" in verdicts[2].reason
    assert "reads it as good, 50% sure" in verdicts[3].reason


def test_misread_texts_fill_up_where_too_few_pass_and_say_so():
    verdicts = chosen(["a", "b", "c"], [0, 0, 0], [0.3, 0.2, 0.1], [None, 1, 1], (2, 0))
    assert [v.kept for v in verdicts] == [True, False, True]
    assert verdicts[2].reason == "kept to fill: the model reads it as another label, but only 1 of 2 passed"


def test_ties_are_broken_by_position():
    verdicts = chosen(["a", "b", "c"], [0, 0, 0], [0.5, 0.5, 0.5], [None] * 3, (2, 0))
    assert [v.kept for v in verdicts] == [True, True, False]


def test_the_filter_reads_the_verbalizer_in_the_tasks_own_template(tiny_model, kind):
    """The trap: scoring a token that the prompt never ends in throws most texts of a class away."""
    model = tiny_model(kind)
    tokens = tokenize_task(Task("toy", LABELS, (" bad", " good"), "{text} it was"), model.tokenizer)
    texts = ["a fine movie", "one dull and long story about music"]
    found = label_probabilities(model, tokens, texts)
    for row, text in zip(found, texts, strict=True):
        ids = torch.tensor([[*tokens.start, *tokens.encode(text), *tokens.suffix]])
        logits = model.lm(input_ids=ids).logits[0, -1, list(tokens.labels)]
        torch.testing.assert_close(row.double(), logits.softmax(-1), rtol=1e-4, atol=1e-6)


def test_calibration_takes_out_a_constant_preference_and_keeps_the_order():
    logits = torch.tensor([[1.0, 0.0], [3.0, 0.0], [0.2, 0.0], [2.0, 0.0]])
    classes = [0, 0, 1, 1]
    assert FILTERS["label"](logits.softmax(-1), classes) == [None, None, 0, 0]
    assert FILTERS["calibrated_label"](logits.softmax(-1), classes) == [1, None, None, 0]
    shifted = calibrate((logits + torch.tensor([5.0, 0.0])).softmax(-1), classes)
    torch.testing.assert_close(shifted, calibrate(logits.softmax(-1), classes), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", FILTERS)
def test_no_texts_are_no_verdicts(name):
    assert FILTERS[name](torch.empty(0, 2), []) == []


# ---------------------------------------------------------------- what is readable

PROMPT = "A bad review."
FLAWS = {
    "it repeats": (
        "nighttime nighttime nighttime",
        "It was Good, good, GOOD.",
        "the cat sat. the cat sat. the cat sat.",
        "it was a lovely film. it was a lovely film.",
        "ha ha ha ha",
        "很好很好很好",
        "哈哈哈哈哈哈哈",
        "loooooooooooooooong",
        "कमरा कमरा कमरा",
    ),
    "it begins with the fragment": (
        ", and that was it.", "- a film", ") they said", "'s a fine film", "n't work", ". the end", "，很好。",
        "/ from me",
        "\u0301a", "-- so", "-alone again",
    ),
    "it holds": ("<|im_start|>user", "hi <start_of_turn> you", "half a char\ufffd", "good.</s>", "[INST] go", "a<|im",
        "a \u202eb", "private \ue000", "line<br />break"),
    "it spells": ("a librated pi+m+k+m+k!!", "the mOoRaNgE", "it is a1b2c3d", "M*A*S*h*m", "very " + "long" * 12),
    "it echoes its prompt": ("A bad review.", "bad review", "a BAD review: the room was cold.", "Review"),
    "it has no word": ("...", "?!", "\"\"", "'"),
}  # fmt: skip
READABLE = (
    "a very, very good film", "so so", "no no no", "ha ha ha", "2001: a space odyssey", '"a gem," she said', "“A gem.”",
    "...and then it ended",
    ". . . a weak film", "'tis good", "’twas fine", "it 's n't bad , is it ?", "这家酒店很好，服务也很好。", "哈哈哈",
    "とても良いです。",
    "ดีมาก", "कमरा साफ है।",
    "-5 degrees", "$1,000,000,000,000 later", "10 - 10 - 10", ":) nice", "#1 film", "@you well", "(un)likely", "«bon»",
    "»gut«", "¿qué?", "i <3 it", "a < b > c",
    "it goes on and on and on", "sooooo good", "hahahaha", "a copy of a copy of a copy", "bad reviews are fun",
    "http://www.aaa.com/aBcDeFgH", "s1m0ne", "H2O2", "x+y=z", "McDonald's iPhone", "Donaudampfschifffahrtskapitän",
    "it was good. it was bad.", "酒店于2024年3月5日开业。", "公司2023年营收增长15个百分点至200亿元。",
    "好吃~推薦~再來~讚",
    "M*A*S*H was better", "”Det var bra”, sa hon.", "'s Avonds was het stil.", "'s-Hertogenbosch is mooi.",
)  # fmt: skip


@pytest.mark.parametrize(("words", "text"), [(words, text) for words, texts in FLAWS.items() for text in texts])
def test_a_text_that_cannot_be_read_is_dropped_and_says_why(words, text):
    (reason,) = unreadable([text], [PROMPT], [50.0])
    assert reason.startswith(f"dropped: {words}") and len(count_dropped([reason])) == 1


def test_ordinary_texts_pass_in_any_script():
    assert unreadable(READABLE, [PROMPT] * len(READABLE), [50.0] * len(READABLE)) == [None] * len(READABLE)


@pytest.mark.parametrize(
    ("prompt", "echo", "text"),
    [
        ("A message full of joy: i feel", "a message full of joy", "i feel joy today."),
        ("i feel so sad because", None, "i feel so sad because of the rain."),
        ("A sad story. Once upon a time", "A sad story.", "Once upon a time there was a king."),
        ("这家酒店很差。我", "这家酒店很差。", "我不喜欢。"),
    ],
)
def test_a_part_of_the_prompt_that_belongs_to_the_text_is_no_echo(prompt, echo, text):
    task = Task("t", ("no", "yes"), (" no", " yes"), generation_prompts=(prompt, "x"))
    assert unreadable([text], task.instructions[:1], [50.0]) == [None]
    if echo:
        assert unreadable([echo], task.instructions[:1], [50.0]) == ["dropped: it echoes its prompt"]
    chat = Task("t", ("no", "yes"), (" no", " yes"), generation_prompts=(prompt, "x"), prompt_style="chat")
    assert unreadable([prompt], chat.instructions[:1], [50.0]) == ["dropped: it echoes its prompt"]


def test_real_reviews_pass(bench):
    rows = [
        json.loads(line)["text"]
        for line in (bench / "data" / "rotten_tomatoes" / "train.jsonl").read_text().splitlines()
    ]
    assert sum(flaw(text) is not None for text in rows) <= len(rows) / 1000


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e6])
@pytest.mark.parametrize("extreme", [1956.0, 3632.0, math.inf, math.nan])
def test_extreme_perplexity_is_dropped_on_any_scale(scale, extreme):
    pool = [100.0, 120.0, 140.0, 160.0, 180.0, 200.0, 90.0, 300.0]
    reasons = unreadable([*"abcdefghi"], [""] * 9, [scale * value for value in (*pool, extreme)])
    assert reasons[:8] == [None] * 8 and reasons[8].startswith("dropped: its perplexity of ")


def test_texts_nearly_alike_few_texts_and_a_wide_pool_lose_none():
    for values in (
        [97.0] * 20,
        [97.0 + 0.1 * i for i in range(20)],
        [50.0, 3632.0, 90.0],
        [10.0 * 2**i for i in range(8)],
        [],
    ):
        assert unreadable([str(i) + "a" for i in range(len(values))], [""] * len(values), values) == [None] * len(
            values
        )
    assert (
        unreadable(["a", "b"], ["", ""], [50.0, math.inf])[1]
        == "dropped: its perplexity of inf is far above the 50 of the middle text"
    )


def test_barred_texts_never_fill_up():
    verdicts = chosen(["a", "b b b b b b b", "c"], [0, 0, 0], [0.3, 0.1, 0.2], [None, None, 1], (3, 0))
    assert [v.kept for v in verdicts] == [True, False, True]
    assert verdicts[1].reason == "dropped: it repeats 'b'" and verdicts[2].reason.startswith("kept to fill")
    assert count_dropped([v.reason for v in verdicts]) == {"loop": 1}


def test_every_reason_has_its_kind():
    reasons = [
        EMPTY, DUPLICATE, LABEL.format("bad", 0.7), RANK.format(3, 4, 2), PERPLEXED.format(900, 100),
        "kept: rank 1 of 1 by x",
    ]  # fmt: skip
    assert count_dropped(reasons) == {"empty": 1, "duplicate": 1, "label": 1, "rank": 1, "perplexity": 1}


@pytest.mark.parametrize(
    ("asked", "text"), [("a:", "a dog sat on it"), ("The", "the cat sat"), ("Great film.", "great film, and so long")]
)
def test_a_text_may_begin_as_a_prompt_of_few_words(asked, text):
    assert unreadable([text], [asked], [50.0]) == [None]
