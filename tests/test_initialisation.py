"""Where x starts: named draws that depend on seed and group alone, and the best of several."""

from dataclasses import replace

import pytest
import torch

from gradmm.gradients import Factors, FactorTarget, Space
from gradmm.initialisation import CHOICES, INITIALISATIONS, Shape
from gradmm.matching import Matching
from gradmm.projection import Reading, allowed_tokens, text_mask
from gradmm.seeds import generator
from gradmm.tasks import Task, tokenize_task

TASK = Task("toy", ("bad", "good"), (" bad", " great"), "{text} it was", ("the movie was", "a"))


def setting(model):
    source = torch.Generator().manual_seed(0)
    target = FactorTarget(Factors(torch.randn(3, 97, generator=source), torch.randn(3, 32, generator=source)))
    reading = Reading("lm_then_nearest", 5, allowed_tokens(model), end=0, min_tokens=2)
    return Matching(model, tokenize_task(TASK, model.tokenizer), [target, target], Space(), end=0), reading


def start(model, name, groups, count=1, choice="best"):
    matching, reading = setting(model)
    sources = [generator(7, "x", group) for group in groups]
    return CHOICES[choice](name, count, matching, reading, Shape(2, 6, 1.4), torch.tensor([group % 2 for group in groups]), sources)


def test_a_groups_start_does_not_depend_on_the_other_groups(tiny_model):
    model = tiny_model("llama", dtype=torch.float32)
    for name in INITIALISATIONS:
        for choice in CHOICES:
            together, alone = start(model, name, [0, 1, 2], 3, choice), start(model, name, [1], 3, choice)
            torch.testing.assert_close(together[1], alone[0])


def test_random_starts_have_the_norm_that_was_asked_for(tiny_model):
    torch.testing.assert_close(start(tiny_model("gpt2", dtype=torch.float32), "normal", [0]).norm(dim=-1), torch.full((1, 2, 6), 1.4))


def test_generated_starts_are_allowed_tokens_that_end_once(tiny_model):
    model = tiny_model("opt", dtype=torch.float32)
    matching, reading = setting(model)
    x, ids = INITIALISATIONS["generated"](matching, reading, Shape(8, 6), [0, 1], [generator(1, "x", g) for g in range(2)])
    torch.testing.assert_close(x, model.embed(ids))
    mask = text_mask(ids, 0)
    assert bool(reading.allowed[ids[mask == 1]].all()) and bool((mask.sum(-1) >= 2).all()) and bool((ids[mask == 0] == 0).all())


def test_more_candidates_never_start_worse(tiny_model):
    model = tiny_model("llama", dtype=torch.float32)
    matching, _ = setting(model)
    classes, nowhere = torch.tensor([0, 1]), torch.full((2, 2, 6), -1)
    losses = [matching.of_vectors(start(model, "normal", [0, 1], n), nowhere, classes) for n in (1, 4, 8)]
    assert bool((losses[1] <= losses[0] + 1e-6).all()) and bool((losses[2] <= losses[1] + 1e-6).all())


def counted(matching) -> tuple[Matching, list[int]]:
    """The same Matching over a model that notes how many texts each pass of its body has."""
    texts = []

    class Counting(type(matching.model)):
        def last_hidden(self, embeds, mask=None):
            texts.append(len(embeds))
            return super().last_hidden(embeds, mask)

    held = matching.model
    return replace(matching, model=Counting(held.lm, held.tokenizer, held.name, held.revision, held.fingerprint)), texts


def test_a_greedy_start_takes_the_texts_that_match_best_together_at_one_evaluation_a_draw(tiny_model):
    matching, reading = setting(tiny_model("llama", dtype=torch.float32))
    matching, texts = counted(matching)
    x = CHOICES["greedy"]("normal", 4, matching, reading, Shape(2, 6, 1.4), torch.tensor([1]), [generator(7, "x", 0)])
    assert sum(texts) == 4 * 2
    draws, _ = INITIALISATIONS["normal"](matching, reading, Shape(8, 6, 1.4), [1], [generator(7, "x", 0)])
    nowhere, label = torch.full((1, 2, 6), -1), torch.tensor([1])
    first = min(range(8), key=lambda row: matching.of_vectors(draws[:, [row]], nowhere[:, :1], label))
    second = min(set(range(8)) - {first}, key=lambda row: matching.of_vectors(draws[:, [first, row]], nowhere, label))
    torch.testing.assert_close(x, draws[:, [first, second]])


@pytest.mark.slow
def test_twenty_five_greedy_draws_start_no_higher_than_the_best_of_five_hundred(benchmark):
    script = benchmark("initialisation")
    rows = {row["choice"]: row for row in script.measure(script.parse(["--groups", "2", "--count", "4", "--length", "8"]))}
    best, few = rows["best of 500"], rows["greedy of 25"]
    assert few["texts evaluated"] * 20 == best["texts evaluated"]
    assert few["mean"] <= best["mean"] + best["standard_error"]
