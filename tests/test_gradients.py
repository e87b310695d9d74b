"""The closed form against the literal head gradient with a graph behind it, in float64, for every family of model."""

import pytest
import torch
from conftest import ORACLE_KINDS

from gradmm.errors import UserError
from gradmm.experiments import reference
from gradmm.gradients import (
    DenseTarget,
    Factors,
    FactorTarget,
    Head,
    Space,
    combine,
    greedy_order,
    group_norms,
    head_factors,
    losses_as_added,
    match_groups,
)
from gradmm.matching import Matching
from gradmm.spaces import BodySketch
from gradmm.tasks import Task, tokenize_task

TASK = Task("toy", ("bad", "good"), (" bad", " great"), "{text} it was")
CLASSES = (0, 1)


def make(tiny_model, kind, space=None, distance="cosine"):
    """A Matching with factor targets of 5 and 3 real prompts, and the explicit targets of the reference."""
    model = tiny_model(kind)
    tokens = tokenize_task(TASK, model.tokenizer)
    real = [
        ["a fine movie", "this was one dull plot", "the cat", "music and fear", "red"],
        ["i like it", "not made", "all time"],
    ]
    targets, explicit = [], []
    for number, texts in enumerate(real):
        sequences = [tokens.sequence(text) for text in texts]
        labels = torch.full((len(texts),), tokens.labels[number])
        factors = head_factors(model.hidden_of(sequences), labels, Head(model.head_weight, model.head_bias))
        targets.append(FactorTarget((space or Space()).restrict(factors)))
        explicit.append(reference.real_gradient(model.lm, sequences, labels.tolist()))
    return Matching(model, tokens, targets, space or Space(), distance), explicit


def oracle(matching, explicit, x, classes, distance):
    model, tokens = matching.model, matching.tokens
    before, after = (
        model.embed(torch.tensor(ids, dtype=torch.long)) for ids in (tokens.start + tokens.prefix, tokens.suffix)
    )
    return torch.stack(
        [
            reference.match_loss(
                model.lm, x[k], before, after, torch.full((x.shape[1],), tokens.labels[c]), explicit[c], distance
            )
            for k, c in enumerate(classes)
        ]
    )


def draw_x(model, groups, count, length=4):
    source = torch.Generator().manual_seed(groups * 100 + count)
    return torch.randn(groups, count, length, model.embedding.shape[1], generator=source, dtype=torch.float64)


def draw_factors(source, *shape, sizes=(7, 4), bias=False):
    """Random pairs: delta (*shape, V) and hidden (*shape, D) of these sizes."""
    return Factors(*(torch.randn(*shape, size, generator=source, dtype=torch.float64) for size in sizes), bias)


@pytest.mark.parametrize("kind", ORACLE_KINDS)
@pytest.mark.parametrize("distance", ["cosine", "l2"])
@pytest.mark.parametrize("count", [1, 2, 10])
def test_value_and_input_gradient_equal_the_reference(tiny_model, kind, count, distance):
    matching, explicit = make(tiny_model, kind, distance=distance)
    classes = torch.tensor([1, 0, 0, 1])
    fast = draw_x(matching.model, 4, count).requires_grad_(True)
    slow = fast.detach().clone().requires_grad_(True)
    value = matching.of_vectors(fast, torch.zeros(4, count, 4, dtype=torch.long), classes)
    expected = oracle(matching, explicit, slow, classes.tolist(), distance)
    torch.testing.assert_close(value, expected, rtol=1e-10, atol=1e-12)
    found, wanted = torch.autograd.grad(value.sum(), fast)[0], torch.autograd.grad(expected.sum(), slow)[0]
    assert float((found - wanted).norm() / wanted.norm()) < 1e-10


def test_dense_and_factor_targets_are_the_same_target(tiny_model, kind):
    matching, explicit = make(tiny_model, kind)
    dense = [DenseTarget(*gradient) for gradient in explicit]
    factors = head_factors(torch.randn(4, 3, 32, dtype=torch.float64), torch.full((4, 3), 7), matching.head)
    which = torch.tensor([1, 0, 0, 1])
    for distance in ("cosine", "l2"):
        left, right = (match_groups(factors, which, targets, distance) for targets in (matching.targets, dense))
        torch.testing.assert_close(left, right, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("bias", [False, True])
def test_a_space_of_rows_and_directions_equals_the_explicit_projection(bias):
    source = torch.Generator().manual_seed(0)
    delta, hidden = (torch.randn(2, 3, n, generator=source, dtype=torch.float64) for n in (11, 6))
    basis = torch.linalg.qr(torch.randn(6, 2, generator=source, dtype=torch.float64)).Q
    rows = torch.tensor([2, 9, 4])
    space = Space(rows, basis)
    weight = torch.einsum("kbv,kbd->kvd", delta, hidden) / 3
    small = weight[:, rows] @ basis
    target = torch.randn(3, 2, generator=source, dtype=torch.float64)
    target_bias = torch.randn(3, generator=source, dtype=torch.float64) if bias else None
    value = match_groups(
        space.restrict(Factors(delta, hidden, bias)),
        torch.zeros(2, dtype=torch.long),
        [DenseTarget(target, target_bias)],
    )
    pairs = [(small, target)] + ([(delta.mean(1)[:, rows], target_bias)] if bias else [])
    expected = sum(1 - torch.nn.functional.cosine_similarity(a.flatten(1), b.flatten()[None]) for a, b in pairs) / len(
        pairs
    )
    torch.testing.assert_close(value, expected, rtol=1e-10, atol=1e-12)


def test_a_space_of_double_precision_takes_single_precision_pairs():
    basis = torch.linalg.qr(torch.randn(6, 2, dtype=torch.float64)).Q
    factors = Factors(torch.randn(3, 11), torch.randn(3, 6))
    found = Space(None, basis).restrict(factors)
    assert found.hidden.dtype == torch.float32
    torch.testing.assert_close(found.hidden, (factors.hidden.double() @ basis).float())


def test_gradients_with_other_tensors_than_their_targets_are_an_error():
    """A head with a bias against a target without one would else be matched by its weight alone, without a word."""
    with_bias, without = (
        Factors(torch.ones(1, 2, 5), torch.ones(1, 2, 3), True),
        FactorTarget(Factors(torch.ones(1, 5), torch.ones(1, 3))),
    )
    one = torch.ones(1)
    for wrong in (
        lambda: match_groups(with_bias, torch.tensor([0]), [without]),
        lambda: combine([one], [one, one], [one, one], "cosine"),
        lambda: combine([one], [one, one], [one, one], "l2"),
    ):
        with pytest.raises(ValueError, match="zip"):
            wrong()


def test_single_precision_is_close_to_double(tiny_model):
    matching, _ = make(tiny_model, "llama")
    single = Matching(tiny_model("llama", dtype=torch.float32), matching.tokens, matching.targets, matching.space)
    targets = [FactorTarget(Factors(t.factors.delta.float(), t.factors.hidden.float())) for t in matching.targets]
    single = Matching(single.model, single.tokens, targets, single.space)
    x, ids, classes = draw_x(matching.model, 2, 5), torch.zeros(2, 5, 4, dtype=torch.long), torch.tensor([0, 1])
    torch.testing.assert_close(
        single.of_vectors(x.float(), ids, classes).double(), matching.of_vectors(x, ids, classes), rtol=1e-4, atol=1e-5
    )


def test_bfloat16_moves_the_loss_and_its_gradient_little(tiny_model, kind):
    exact, _ = make(tiny_model, kind)
    rough, _ = make(lambda kind: tiny_model(kind, dtype=torch.bfloat16), kind)
    ids, classes = torch.zeros(2, 5, 4, dtype=torch.long), torch.tensor([0, 1])
    starts = [draw_x(exact.model, 2, 5).to(dtype).requires_grad_(True) for dtype in (torch.float64, torch.float32)]
    values = [matching.of_vectors(x, ids, classes) for matching, x in zip((exact, rough), starts, strict=True)]
    slopes = [torch.autograd.grad(value.sum(), x)[0] for value, x in zip(values, starts, strict=True)]
    assert values[1].dtype == slopes[1].dtype == torch.float32  # x, the sums and what moves x stay wide
    assert float((values[1] - values[0]).detach().abs().max()) < 0.01
    assert float((slopes[1] - slopes[0]).norm() / slopes[0].norm()) < 0.2


def test_a_text_that_ends_early_matches_as_the_shorter_text(tiny_model, kind):
    matching, _ = make(tiny_model, kind)
    short = Matching(matching.model, matching.tokens, matching.targets, matching.space, end=0)
    ids = torch.tensor([[[5, 6, 0, 0], [7, 8, 9, 10]]])
    x = matching.model.embed(ids)
    alone = [
        matching.model.hidden_of([[*matching.tokens.start, *row, *matching.tokens.suffix]])
        for row in ([5, 6], [7, 8, 9, 10])
    ]
    hidden = torch.stack([h[0] for h in alone])[None]
    factors = head_factors(hidden, torch.full((1, 2), matching.tokens.labels[1]), matching.head)
    which = torch.tensor([1])
    torch.testing.assert_close(
        short.of_vectors(x, ids, which), match_groups(factors, which, matching.targets), rtol=1e-9, atol=1e-12
    )


def test_degenerate_gradients_have_a_defined_distance():
    source, wide = torch.Generator().manual_seed(10), torch.float64
    zero = FactorTarget(Factors(torch.zeros(1, 5, dtype=wide), torch.zeros(1, 3, dtype=wide)))
    some = Factors(*(torch.randn(1, 2, size, generator=source, dtype=wide) for size in (5, 3)))
    which = torch.tensor([0])
    assert match_groups(some, which, [zero]).item() == 1.0
    same = FactorTarget(some[0])
    assert match_groups(some, which, [same]).item() == pytest.approx(0, abs=1e-12)
    assert match_groups(some, which, [same], "l2").item() == pytest.approx(0, abs=1e-12)
    nothing = Factors(torch.zeros(1, 2, 5, dtype=wide), torch.zeros(1, 2, 3, dtype=wide))
    assert match_groups(nothing, which, [same]).item() == 1.0
    x = torch.zeros(1, 2, 3, dtype=wide, requires_grad=True)
    match_groups(Factors(some.delta, x), which, [same]).sum().backward()
    assert bool(torch.isfinite(x.grad).all())


def test_norms_are_those_of_the_mean_gradient():
    delta, hidden = torch.randn(3, 4, 7, dtype=torch.float64), torch.randn(3, 4, 5, dtype=torch.float64)
    weight, bias = group_norms(Factors(delta, hidden, True))
    explicit = torch.einsum("kbv,kbd->kvd", delta, hidden) / 4
    torch.testing.assert_close(weight, explicit.square().sum((1, 2)))
    torch.testing.assert_close(bias, delta.mean(1).square().sum(-1))


def test_an_unknown_distance_is_refused():
    factors = Factors(torch.ones(1, 1, 2), torch.ones(1, 1, 2))
    with pytest.raises(UserError, match="distance 'l1' is not known: use one of cosine, l2"):
        match_groups(factors, torch.tensor([0]), [FactorTarget(factors[0])], "l1")


PENALTIES = [0.3, 0.1, 0.0, 0.6, 0.2, 0.5, 0.0, 0.4, 0.1]


@pytest.mark.parametrize("distance", ["cosine", "l2"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("penalties", [None, PENALTIES], ids=["alone", "penalties"])
def test_greedy_order_equals_a_search_with_explicit_gradients(distance, bias, penalties):
    source = torch.Generator().manual_seed(3)
    delta, hidden = (torch.randn(9, size, generator=source, dtype=torch.float64) for size in (7, 4))
    target = FactorTarget(draw_factors(source, 3, bias=bias))
    goal = [(target.factors.delta.mT @ target.factors.hidden) / 3, target.factors.delta.mean(0)][: 1 + bias]

    def loss(rows):
        mean = [(delta[rows].mT @ hidden[rows]) / len(rows), delta[rows].mean(0)][: 1 + bias]
        extra = sum((penalties or [0.0] * 9)[row] for row in rows) / len(rows)
        return float(reference.distance(mean, goal, distance)) + extra

    slow = []
    for _ in range(5):
        slow.append(min((row for row in range(9) if row not in slow), key=lambda row: loss([*slow, row])))
    factors = Factors(delta, hidden, bias)
    for one in (target, DenseTarget(*goal)):
        assert greedy_order(factors, one, 5, distance, penalties) == slow
    assert sorted(greedy_order(factors, target, 50, distance, penalties)) == list(range(9))


@pytest.mark.parametrize("distance", ["cosine", "l2"])
@pytest.mark.parametrize("bias", [False, True])
def test_losses_as_added_are_those_of_the_groups_that_begin_the_order(distance, bias):
    source = torch.Generator().manual_seed(6)
    factors = draw_factors(source, 5, bias=bias)
    target = FactorTarget(draw_factors(source, 3, bias=bias))
    groups = [
        match_groups(factors[list(range(n))].unsqueeze(0), torch.tensor([0]), [target], distance).item()
        for n in range(1, 6)
    ]
    assert losses_as_added(factors, target, distance).tolist() == pytest.approx(groups, abs=1e-12)
    if distance == "cosine":
        assert torch.equal(losses_as_added(factors, target), losses_as_added(factors, target, distance))


def test_greedy_order_against_nothing_is_the_order_of_the_examples():
    factors = Factors(torch.randn(4, 7), torch.randn(4, 3))
    assert greedy_order(factors, DenseTarget(torch.zeros(7, 3)), 3) == [0, 1, 2]


def gradient_of(factors: Factors, rows: list[int]) -> list[torch.Tensor]:
    """The explicit mean gradient of some examples, weight and bias."""
    delta, hidden = factors.delta[rows], factors.hidden[rows]
    return [delta.mT @ hidden / len(rows), delta.mean(0)][: 1 + factors.bias]


def test_a_targets_inner_products_have_the_shape_of_the_examples():
    source = torch.Generator().manual_seed(8)
    target = FactorTarget(draw_factors(source, 4, sizes=(5, 3), bias=True))
    factors = draw_factors(source, 2, 6, sizes=(5, 3), bias=True)
    weight, bias = gradient_of(target.factors, [0, 1, 2, 3])
    expected = [torch.einsum("kbv,vd,kbd->kb", factors.delta, weight, factors.hidden), factors.delta @ bias]
    for found, wanted in zip(target.inner(factors), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)


def test_what_is_made_lies_where_the_gradients_lie():
    """The default device is another one, as it is for everything that should be on a GPU."""
    factors = Factors(torch.eye(4), torch.eye(4))
    target = FactorTarget(factors[[1]])
    with torch.device("meta"):
        assert greedy_order(factors, target, 2, penalties=[0.0] * 4)[0] == 1
        assert losses_as_added(factors, target).device == factors.delta.device


def test_continuous_texts_have_no_sketch_of_the_body(tiny_model):
    model = tiny_model("llama")
    tokens = tokenize_task(TASK, model.tokenizer)
    matching = Matching(model, tokens, (), BodySketch(torch.zeros(2)))
    with pytest.raises(UserError, match="no sketch of the body: release in a space of the head"):
        matching.of_vectors(draw_x(model, 1, 1), torch.zeros(1, 1, 4, dtype=torch.long), torch.tensor([0]))
