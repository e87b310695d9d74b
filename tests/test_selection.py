"""The label filter and the ranking: who is kept, and the reason that every text carries."""

import pytest
import torch

from gradmm.selection import FILTERS, calibrate, label_probabilities, select, unreadable
from gradmm.tasks import Task, tokenize_task

LABELS = ("bad", "good")


def chosen(texts, classes, scores, misread, per_class):
    probabilities = torch.full((len(texts), len(per_class)), 1 / len(per_class))
    barred = unreadable(texts, [""] * len(texts), [50.0] * len(texts))
    return select(barred, classes, scores, misread, probabilities, per_class, LABELS)


def test_the_lowest_scores_of_each_class_are_kept_and_every_text_has_a_reason():
    verdicts = chosen(["a", "b", "c", "d"], [0, 0, 1, 1], [0.2, 0.1, 0.4, 0.3], [None] * 4, (1, 1))
    assert [v.kept for v in verdicts] == [False, True, False, True]
    assert verdicts[0].reason == "dropped: rank 2 of 2, 1 were asked for" and verdicts[1].reason == "kept: rank 1 of 2 by matching loss"


def test_misread_empty_and_repeated_texts_are_dropped_for_what_they_are():
    verdicts = chosen(["a", " ", "a", "b", "c"], [0, 0, 0, 0, 1], [0.1, 0.0, 0.1, 0.3, 0.1], [None, None, None, 1, None], (1, 1))
    assert [v.kept for v in verdicts] == [True, False, False, False, True]
    assert "empty" in verdicts[1].reason and "earlier" in verdicts[2].reason and "reads it as good, 50% sure" in verdicts[3].reason


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
        ids = torch.tensor([[*tokens.start, *tokens.encode(text), *tokens.tail]])
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
