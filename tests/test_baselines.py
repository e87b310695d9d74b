"""The coreset against brute force on points small enough to try everything."""

import itertools
from collections import Counter
from dataclasses import replace

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gradmm.data import Example
from gradmm.errors import UserError
from gradmm.experiments.baselines import herding_order, select_herding
from gradmm.tasks import Task, tokenize_task

FOUR = Task("four", ("a", "b", "c", "d"), (" world", " sports", " business", " text"), template="{text} this is")
WORDS = ("the", "cat", "dog", "sat", "on", "red", "blue", "we", "saw", "actor")
EXAMPLES = [
    Example(f"{first} {second}{' movie' * (number % 3)}", number % 4)
    for number, (first, second) in enumerate(itertools.permutations(WORDS, 2))
]


def points_of(seed: int, count: int, width: int = 3) -> torch.Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 9), st.data())
def test_herding_takes_distinct_points_in_a_fixed_order(seed, count, data):
    points = points_of(seed, count)
    n = data.draw(st.integers(1, count))
    rows = herding_order(points, n)
    assert len(rows) == len(set(rows)) == n
    assert herding_order(points, n) == rows
    assert sorted(herding_order(points, count)) == list(range(count))


@pytest.mark.parametrize("seed", range(20))
def test_herding_takes_the_best_next_point_by_brute_force(seed):
    points = points_of(seed, 8).numpy()
    taken: list[int] = []
    for _ in range(5):
        rest = [row for row in range(8) if row not in taken]
        taken.append(min(rest, key=lambda row: numpy.linalg.norm(points[[*taken, row]].mean(0) - points.mean(0))))
    assert herding_order(torch.tensor(points), 5) == taken


def test_coinciding_points_are_taken_once():
    assert herding_order(torch.zeros(4, 2), 4) == [0, 1, 2, 3]


def test_a_coreset_is_balanced_and_draws_nothing(tiny_model):
    model = tiny_model("opt")
    chosen = select_herding(model, FOUR, EXAMPLES, 10)
    assert Counter(example.label for example in chosen) == {0: 3, 1: 3, 2: 2, 3: 2}
    assert set(chosen) <= set(EXAMPLES) and len(set(chosen)) == 10
    assert chosen == select_herding(model, FOUR, EXAMPLES, 10)


def test_points_are_hidden_states_under_the_prompt_and_classes_do_not_mix(tiny_model, kind):
    model = tiny_model(kind)
    tokens = tokenize_task(FOUR, model.tokenizer)
    pool = [example for example in EXAMPLES if example.label == 2]
    whole = [model.lm.base_model(torch.tensor([tokens.sequence(e.text)])).last_hidden_state[0, -1] for e in pool]
    expected = [pool[row] for row in herding_order(torch.stack(whole), 3)]
    assert select_herding(model, FOUR, EXAMPLES, 12)[6:9] == expected


def test_short_texts_are_left_out(tiny_model):
    chosen = select_herding(tiny_model(), replace(FOUR, min_words=4), EXAMPLES, 20)
    assert all(len(example.text.split()) >= 4 for example in chosen)


@pytest.mark.parametrize(("n", "match"), [(3, "at least 4"), (400, "lower n"), (2.5, "it must be a whole number")])
def test_unusable_requests_are_refused(tiny_model, n, match):
    with pytest.raises(UserError, match=match):
        select_herding(tiny_model(), FOUR, EXAMPLES, n)
