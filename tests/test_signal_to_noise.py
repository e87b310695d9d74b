"""The expected cosines against many real releases, and the control without examples."""

import pytest
import torch
from conftest import in_tiers

from gradmm import privacy
from gradmm.data import Example
from gradmm.errors import UserError
from gradmm.experiments.audit import expected_cosine, signal_to_noise
from gradmm.experiments.baselines import noise_only
from gradmm.gradients import Head, head_factors
from gradmm.tasks import Task, tokenize_task

TASK = Task("toy", ("negative", "positive"), (" bad", " great"), "{text} it was")
WORDS = "the a movie film story dull fine actors plot music we saw like cat dog red blue".split()
TEXTS = [" ".join(WORDS[(i * step) % len(WORDS)] for step in range(1, 6)) for i in range(1, 61)]
EXAMPLES = [Example(text, number % 2) for number, text in enumerate(TEXTS)]
PUBLIC = ["some words", "a dog sat on the cat", "two red words", "this text is about sports", "they made time"]


@pytest.fixture(scope="module", params=in_tiers(["llama", "phi"], "phi"))
def model(request, tiny_model):
    return tiny_model(request.param)


def spaces(model) -> dict:
    tokens = tokenize_task(TASK, model.tokenizer)
    return {
        "head": privacy.release_space(model, tokens, "head"),
        "label_rows": privacy.release_space(model, tokens, "label_rows"),
        "label_rows_subspace": privacy.release_space(model, tokens, "label_rows_subspace", PUBLIC, 4),
    }


@pytest.mark.parametrize("coordinates", [8, 64, 1000])
@pytest.mark.parametrize("sigma", [0.05, 0.3, 2.0])
def test_the_expected_cosine_is_that_of_many_draws(coordinates, sigma):
    draw = torch.Generator().manual_seed(0)
    signal = torch.nn.functional.normalize(torch.randn(coordinates, generator=draw), dim=0)
    noised = signal + sigma * torch.randn(4000, coordinates, generator=draw)
    mean = torch.nn.functional.cosine_similarity(noised, signal, dim=1).mean().item()
    assert expected_cosine(1.0, coordinates, sigma) == pytest.approx(mean, abs=0.03)


@pytest.mark.parametrize("space", [pytest.param("head", marks=pytest.mark.slow), "label_rows"])
def test_the_target_figure_is_the_cosine_of_real_releases(model, space):
    options = {"epsilon": 20.0, "delta": 1e-3, "space": space, "length": 5}
    (row,) = signal_to_noise(model, TASK, EXAMPLES, [60], {space: spaces(model)[space]}, [20.0], 1e-3)
    clean = privacy.release(model, TASK, EXAMPLES, **{**options, "epsilon": 1e6}, noise_seed=0)

    def flat(release) -> torch.Tensor:
        return torch.stack(
            [torch.cat([p.flatten() for p in (t.weight, t.bias) if p is not None]) for t in release.targets]
        )

    cosines = [
        torch.nn.functional.cosine_similarity(
            flat(privacy.release(model, TASK, EXAMPLES, **options, noise_seed=s)), flat(clean)
        ).mean()
        for s in range(6)
    ]
    assert row["target"] == pytest.approx(torch.stack(cosines).mean().item(), abs=0.05)
    assert row["signal"] == pytest.approx(flat(clean).norm(dim=1).mean().item(), rel=0.01)
    assert row["noise"] == pytest.approx(row["sigma"] * row["coordinates"] ** 0.5)


def test_the_whole_label_rows_keep_the_whole_contrast_and_fewer_directions_less(model):
    rows = {
        row["space"]: row for row in signal_to_noise(model, TASK, EXAMPLES, [60], spaces(model), [1.0], 1e-5, clip=1e6)
    }
    assert rows["label_rows"]["kept"] == pytest.approx(1.0)
    assert 0 < rows["label_rows_subspace"]["kept"] < 1
    assert rows["head"]["coordinates"] > rows["label_rows"]["coordinates"] > rows["label_rows_subspace"]["coordinates"]


def test_sizes_are_prefixes_and_signal_grows_with_them(model):
    many = signal_to_noise(
        model, TASK, EXAMPLES, [10, 60], {"label_rows": spaces(model)["label_rows"]}, [1.0, 8.0], 1e-5
    )
    first = [e for label in (0, 1) for e in [e for e in EXAMPLES if e.label == label][:5]]
    few = signal_to_noise(model, TASK, first, [10], {"label_rows": spaces(model)["label_rows"]}, [1.0, 8.0], 1e-5)
    assert [row["target"] for row in many[:2]] == pytest.approx([row["target"] for row in few])
    assert many[0]["target"] < many[2]["target"] and many[0]["target"] < many[1]["target"]


@pytest.mark.parametrize("sizes", [[], [1], [20, 10], [62]])
def test_sizes_that_do_not_fit_are_refused(model, sizes):
    with pytest.raises(UserError, match="give ascending sizes that the classes allow"):
        signal_to_noise(model, TASK, EXAMPLES, sizes, {}, [1.0], 1e-5)


def test_noise_alone_has_the_shape_and_scale_of_a_release_and_nothing_of_the_examples(model):
    one = privacy.release(model, TASK, EXAMPLES, epsilon=1.0, delta=1e-5, length=5, space="head")
    other = privacy.release(model, TASK, EXAMPLES[:10], epsilon=1.0, delta=1e-5, length=5, space="head")
    found = noise_only(one, 3)
    assert found.fingerprint == noise_only(other, 3).fingerprint != noise_only(one, 4).fingerprint
    assert not found.private and found.statement.startswith("not private: a control")
    for target, noised in zip(found.targets, one.targets, strict=True):
        assert target.weight.shape == noised.weight.shape and target.weight.dtype == noised.weight.dtype
        assert target.weight.std().item() == pytest.approx(one.ledger[0].sigma, rel=0.05)
    with pytest.raises(UserError, match="holds no noise"):
        noise_only(privacy.release(model, TASK, EXAMPLES, space="head"), 0)


def test_the_contrast_is_the_balanced_gradient_of_centred_hidden_states(model):
    space = spaces(model)["label_rows"]
    (row,) = signal_to_noise(model, TASK, EXAMPLES, [60], {"label_rows": space}, [1.0], 1e-5, clip=1e6)
    tokens = tokenize_task(TASK, model.tokenizer)
    hidden = model.hidden_of([tokens.sequence(example.text) for example in EXAMPLES])
    right = torch.tensor([tokens.labels[example.label] for example in EXAMPLES])
    factors = space.restrict(head_factors(hidden, right, Head(model.head_weight, model.head_bias)))
    clean = factors.delta.mT @ (factors.hidden - factors.hidden.mean(0))
    assert row["contrast"] == pytest.approx(
        expected_cosine(clean.norm().item(), clean.numel(), row["sigma"] * 2**0.5), rel=1e-5
    )


def test_the_contrast_of_a_sketch_is_the_sum_over_classes_beside_the_whole_and_unclipped_one(model):
    tokens = tokenize_task(TASK, model.tokenizer)
    few = privacy.release_space(model, tokens, "body_subspace", PUBLIC, 2)
    (row,) = signal_to_noise(model, TASK, EXAMPLES, [60], {"body_subspace": few}, [1.0], 1e-5, clip=0.01)
    sequences, labels = [tokens.sequence(e.text) for e in EXAMPLES], [e.label for e in EXAMPLES]
    whole = few.sketches(model, tokens, sequences, labels).double()
    own = whole @ few.basis
    clean = (own * (0.01 / own.norm(dim=1, keepdim=True)).clamp(max=1)).sum(0)
    rest = whole - whole @ few.shared @ few.shared.mT
    kept = torch.nn.functional.cosine_similarity(few.basis @ clean, rest.sum(0), dim=0)  # a cosine knows no scale
    assert row["kept"] == pytest.approx(kept.item(), rel=1e-4)
    assert row["contrast"] == pytest.approx(expected_cosine(clean.norm().item(), 2, row["sigma"] * 2**0.5), rel=1e-4)
    assert row["coordinates"] == 2
