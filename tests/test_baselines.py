"""Coresets against brute force on points small enough to try everything."""

import itertools
from collections import Counter
from dataclasses import replace

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import pairwise_distances_argmin_min

from gradmm.data import Example
from gradmm.errors import UserError
from gradmm.experiments.baselines import CORESETS, herding_order, k_center_order, select_coresets
from gradmm.tasks import Task, tokenize_task

FOUR = Task("four", ("a", "b", "c", "d"), (" world", " sports", " business", " text"), template="{text} this is")
WORDS = ("the", "cat", "dog", "sat", "on", "red", "blue", "we", "saw", "actor")
EXAMPLES = [
    Example(f"{first} {second}{' movie' * (number % 3)}", number % 4)
    for number, (first, second) in enumerate(itertools.permutations(WORDS, 2))
]


def points_of(seed: int, count: int, width: int = 3) -> torch.Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def radius(points: torch.Tensor, centres: list[int]) -> float:
    """The largest distance of a point to its nearest centre, by scikit-learn."""
    return float(pairwise_distances_argmin_min(points.numpy(), points[centres].numpy())[1].max())


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 9), st.data())
def test_every_method_takes_distinct_points_in_a_fixed_order(seed, count, data):
    points = points_of(seed, count)
    n = data.draw(st.integers(1, count))
    for choose in CORESETS.values():
        rows = choose(points, n)
        assert len(rows) == len(set(rows)) == n
        assert choose(points, n) == rows
        assert sorted(choose(points, count)) == list(range(count))


@pytest.mark.parametrize("seed", range(20))
def test_herding_takes_the_best_next_point_by_brute_force(seed):
    points = points_of(seed, 8).numpy()
    taken: list[int] = []
    for _ in range(5):
        rest = [row for row in range(8) if row not in taken]
        taken.append(min(rest, key=lambda row: numpy.linalg.norm(points[[*taken, row]].mean(0) - points.mean(0))))
    assert herding_order(torch.tensor(points), 5) == taken


@pytest.mark.parametrize("seed", range(20))
def test_greedy_centres_are_within_twice_the_best_radius(seed):
    points = points_of(seed, 9)
    for count in (1, 2, 3, 4):
        best = min(radius(points, list(centres)) for centres in itertools.combinations(range(9), count))
        found = k_center_order(points, count)
        assert radius(points, found) <= 2 * best + 1e-12
        farthest = pairwise_distances_argmin_min(points.numpy(), points[found].numpy())[1].argmax()
        assert k_center_order(points, count + 1) == [*found, farthest]


def test_coinciding_points_are_taken_once():
    points = torch.zeros(4, 2)
    for choose in (herding_order, k_center_order):
        assert choose(points, 4) == [0, 1, 2, 3]


def test_a_coreset_is_balanced_and_draws_nothing(tiny_model):
    model = tiny_model("opt")
    found = select_coresets(model, FOUR, EXAMPLES, 10, list(CORESETS))
    for chosen in found.values():
        assert Counter(example.label for example in chosen) == {0: 3, 1: 3, 2: 2, 3: 2}
        assert set(chosen) <= set(EXAMPLES) and len(set(chosen)) == 10
    assert found == select_coresets(model, FOUR, EXAMPLES, 10, list(CORESETS))


@pytest.mark.parametrize("method", ["herding", "k_center"])
def test_points_are_hidden_states_under_the_prompt_and_classes_do_not_mix(tiny_model, method, kind):
    model = tiny_model(kind)
    tokens = tokenize_task(FOUR, model.tokenizer)
    pool = [example for example in EXAMPLES if example.label == 2]
    whole = [model.lm.base_model(torch.tensor([tokens.sequence(e.text)])).last_hidden_state[0, -1] for e in pool]
    expected = [pool[row] for row in CORESETS[method](torch.stack(whole), 3)]
    assert select_coresets(model, FOUR, EXAMPLES, 12, [method])[method][6:9] == expected


def test_several_methods_choose_as_each_alone_and_texts_are_read_once(tiny_model, monkeypatch):
    model, read = tiny_model(), []
    whole = type(model).hidden_of
    monkeypatch.setattr(
        type(model), "hidden_of", lambda self, some, *rest: read.append(len(some)) or whole(self, some, *rest)
    )
    found = select_coresets(model, FOUR, EXAMPLES, 10, list(CORESETS))
    assert sum(read) == len(EXAMPLES) and len(read) == 4
    assert found == {method: select_coresets(model, FOUR, EXAMPLES, 10, [method])[method] for method in CORESETS}


def test_short_texts_are_left_out(tiny_model):
    chosen = select_coresets(tiny_model(), replace(FOUR, min_words=4), EXAMPLES, 20, ["k_center"])["k_center"]
    assert all(len(example.text.split()) >= 4 for example in chosen)


@pytest.mark.parametrize(
    ("n", "method", "match"),
    [(3, "herding", "at least 4"), (400, "herding", "lower n"), (8, "best", "'best'"), (8, "gradmm", "'gradmm'")],
)
def test_unusable_requests_are_refused(tiny_model, n, method, match):
    with pytest.raises(UserError, match=match):
        select_coresets(tiny_model(), FOUR, EXAMPLES, n, [method])
