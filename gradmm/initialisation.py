"""Where x starts: random vectors as published, or texts that the model writes from the public prompts.

Knows public inputs only. Letters: K groups, B examples of a group, L positions, D width.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from gradmm.generation import Sampling, continue_prompts
from gradmm.matching import Matching
from gradmm.projection import DecodingConfig

NORM = 1.4  # of a random vector, as published


@dataclass(frozen=True)
class Shape:
    """What a start looks like: B examples of L tokens a group, written at a temperature."""

    count: int
    length: int
    temperature: float = 1.0


def normal(
    matching: Matching,
    decoding: DecodingConfig,
    shape: Shape,
    classes: Sequence[int],
    sources: Sequence[torch.Generator],
):
    """Random vectors of norm NORM.

    Args:
        classes, sources: the class and the generator of each of K groups.

    Returns:
        x (K, B, L, D) and tokens (K, B, L), all -1: there is no text yet.
    """
    model = matching.model
    wide = torch.promote_types(model.dtype, torch.float32)
    size = (shape.count, shape.length, model.embedding_shape[1])
    draw = torch.stack([torch.randn(size, generator=source, dtype=wide) for source in sources]).to(model.device)
    return draw * (NORM / draw.norm(dim=-1, keepdim=True)), torch.full(draw.shape[:3], -1, device=model.device)


def generated(
    matching: Matching,
    decoding: DecodingConfig,
    shape: Shape,
    classes: Sequence[int],
    sources: Sequence[torch.Generator],
):
    """The embeddings of sampled texts, as `normal`; tokens after a text's end are the end token."""
    model, tokens = matching.model, matching.tokens
    uniform = torch.cat([torch.rand(shape.count, shape.length, generator=source) for source in sources])
    rows = [label for label in classes for _ in range(shape.count)]
    sampling = Sampling(shape.temperature, max_tokens=shape.length, min_tokens=decoding.min_tokens)
    ids = continue_prompts(model, tokens, rows, uniform, sampling, decoding.vocabulary)
    end = cast(int, decoding.end)  # generated starts need an early end, see `SynthesisConfig`
    ids = ids.masked_fill(ids < 0, end).view(len(classes), shape.count, shape.length)
    return model.embed(ids).to(torch.promote_types(model.dtype, torch.float32)), ids


INITIALISATIONS = {"generated": generated, "normal": normal}


@torch.no_grad()
def best_of(
    name: str,
    candidates: int,
    matching: Matching,
    decoding: DecodingConfig,
    shape: Shape,
    classes: Tensor,
    sources,
    groups_per_pass: int | None = None,
) -> Tensor:
    """Each group's best of several draws by matching loss: (K, B, L, D).

    Args:
        name: one of INITIALISATIONS.
        candidates: number of draws; one alone is not evaluated.
        classes: (K,) each group's class, on the CPU.
        sources: K generators.
        groups_per_pass: groups whose loss is taken at once; None: all.
    """

    draw = INITIALISATIONS[name]
    best, ids = draw(matching, decoding, shape, classes.tolist(), sources)
    if candidates == 1:
        return best
    together = groups_per_pass or len(classes)

    def losses(x: Tensor, ids: Tensor) -> Tensor:
        passes = zip(x.split(together), ids.split(together), classes.split(together), strict=True)
        return torch.cat([matching.of_vectors(*some) for some in passes])

    lowest = losses(best, ids)
    for _ in range(candidates - 1):
        x, ids = draw(matching, decoding, shape, classes.tolist(), sources)
        value = losses(x, ids)
        best = torch.where((value < lowest).view(-1, 1, 1, 1), x, best)
        lowest = torch.minimum(value, lowest)
    return best
