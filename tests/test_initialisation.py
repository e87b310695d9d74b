"""Where x starts: named draws that depend on seed and group alone, and the best of several."""

import torch

from gradmm.gradients import Factors, FactorTarget, Space
from gradmm.initialisation import INITIALISATIONS, Shape, best_of
from gradmm.matching import Matching
from gradmm.projection import DecodingConfig, text_mask
from gradmm.seeds import generator
from gradmm.tasks import Task, tokenize_task

TASK = Task("toy", ("bad", "good"), (" bad", " great"), "{text} it was", ("the movie was", "a"))


def setting(model):
    source = torch.Generator().manual_seed(0)
    target = FactorTarget(Factors(torch.randn(3, 97, generator=source), torch.randn(3, 32, generator=source)))
    reading = DecodingConfig("lm_then_nearest", 5, model.vocabulary, end=0, min_tokens=2)
    return Matching(model, tokenize_task(TASK, model.tokenizer), [target, target], Space(), end=0), reading


def start(model, name, groups, count=1):
    matching, reading = setting(model)
    sources = [generator(7, "x", group) for group in groups]
    return best_of(name, count, matching, reading, Shape(2, 6), torch.tensor([group % 2 for group in groups]), sources)


def test_a_groups_start_does_not_depend_on_the_other_groups(tiny_model):
    model = tiny_model("llama", dtype=torch.float32)
    for name in INITIALISATIONS:
        together, alone = start(model, name, [0, 1, 2], 3), start(model, name, [1], 3)
        torch.testing.assert_close(together[1], alone[0])


def test_random_starts_have_the_published_norm(tiny_model):
    torch.testing.assert_close(
        start(tiny_model("gpt2", dtype=torch.float32), "normal", [0]).norm(dim=-1), torch.full((1, 2, 6), 1.4)
    )


def test_generated_starts_are_allowed_tokens_that_end_once(tiny_model):
    model = tiny_model("opt", dtype=torch.float32)
    matching, reading = setting(model)
    x, ids = INITIALISATIONS["generated"](
        matching, reading, Shape(8, 6), [0, 1], [generator(1, "x", g) for g in range(2)]
    )
    torch.testing.assert_close(x, model.embed(ids))
    mask = text_mask(ids, 0)
    assert bool(reading.vocabulary.whole[ids[mask == 1]].all()) and bool((mask.sum(-1) >= 2).all())
    assert bool((ids[mask == 0] == 0).all())


def test_more_candidates_never_start_worse(tiny_model):
    model = tiny_model("llama", dtype=torch.float32)
    matching, _ = setting(model)
    classes, nowhere = torch.tensor([0, 1]), torch.full((2, 2, 6), -1)
    losses = [matching.of_vectors(start(model, "normal", [0, 1], n), nowhere, classes) for n in (1, 4, 8)]
    assert bool((losses[1] <= losses[0] + 1e-6).all()) and bool((losses[2] <= losses[1] + 1e-6).all())
