"""The whole fast method against the whole literal one: same start, same texts, same losses, in float64."""

import pytest
import torch
from conftest import LONG_KINDS

from gradmm import admm
from gradmm.experiments import reference
from gradmm.gradients import FactorTarget, Head, Space, head_factors
from gradmm.initialisation import Shape, best_of
from gradmm.matching import Matching
from gradmm.projection import DecodingConfig, TokenTables, project
from gradmm.seeds import generator
from gradmm.tasks import Task, tokenize_task
from gradmm.vocabulary import Vocabulary

TASK = Task("toy", ("bad", "good"), (" bad", " great"), "a {text} it was", ("the movie was", "a"))
REAL = (["a dull plot", "the actors sat all time"], ["a fine film", "we like the music", "red and blue"])


@pytest.mark.parametrize("kind", [*LONG_KINDS, "gemma"])
@pytest.mark.parametrize("order", ["lm_then_nearest", "nearest_then_lm"])
def test_the_fast_method_takes_the_same_steps_as_the_literal_one(tiny_model, kind, order):
    model = tiny_model(kind)
    tokens = tokenize_task(TASK, model.tokenizer)
    sequences = [[tokens.sequence(text) for text in texts] for texts in REAL]
    head = Head(model.head_weight, model.head_bias)
    labels = [torch.full((len(part),), token) for part, token in zip(sequences, tokens.labels, strict=True)]
    targets = [FactorTarget(head_factors(model.hidden_of(s), y, head)) for s, y in zip(sequences, labels, strict=True)]
    explicit = [reference.real_gradient(model.lm, s, y.tolist()) for s, y in zip(sequences, labels, strict=True)]
    matching, classes = Matching(model, tokens, targets, Space()), torch.tensor([0, 1])
    allowed = torch.ones(97, dtype=torch.bool)
    reading, tables = DecodingConfig(order, 6, Vocabulary.free(allowed)), TokenTables.of(model)
    config = admm.Config(rho=0.3, outer_steps=3, inner_steps=4, lr=0.05)
    x = best_of("normal", 3, matching, reading, Shape(2, 4), classes, [generator(0, "x", k) for k in range(2)])

    def projected(v, which):
        ids = project(model, tables, v.flatten(0, 1), tokens.prompts, which.repeat_interleave(2), reading).view(
            v.shape[:3]
        )
        return model.embed(ids), ids

    fast = admm.solve(
        lambda x, ids, which: matching.of_vectors(x, ids, classes[which]), projected, admm.start(x), config
    )
    before, after = (
        model.embed(torch.tensor(part, dtype=torch.long)) for part in (tokens.start + tokens.prefix, tokens.suffix)
    )
    for k in range(2):
        ids, value = reference.solve(
            lambda x, k=k: reference.match_loss(model.lm, x, before, after, torch.full((2,), tokens.labels[k]),
                explicit[k], "cosine"),
            lambda v, k=k: reference.project(model.lm, v, tokens.prompts[k], order, 6, allowed),
            model.embedding,
            x[k],
            config,
        )  # fmt: skip
        assert torch.equal(fast.value[k], ids)
        assert float(fast.match_loss[k]) == pytest.approx(value, rel=1e-9)
