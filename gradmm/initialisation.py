"""Where x starts: random vectors as published, or texts that the model writes from the public prompts.

Knows public inputs only. Letters: K groups, B examples of a group, L positions, D width.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gradmm.generation import Sampling, continue_prompts
from gradmm.matching import Matching
from gradmm.projection import Reading


@dataclass(frozen=True)
class Shape:
    """What a start looks like: B examples of L tokens a group; `norm` of random vectors, None for the embeddings' mean."""

    count: int
    length: int
    norm: float | None = None


def normal(matching: Matching, reading: Reading, shape: Shape, classes: Sequence[int], sources: Sequence[torch.Generator]):
    """Random vectors of one norm.

    Args:
        classes, sources: the class and the generator of each of K groups.

    Returns:
        x (K, B, L, D) and tokens (K, B, L), all -1: there is no text yet.
    """
    table = matching.model.embedding
    wide = torch.promote_types(table.dtype, torch.float32)
    norm = shape.norm or float(table.to(wide).norm(dim=-1).mean())
    size = (shape.count, shape.length, table.shape[1])
    draw = torch.stack([torch.randn(size, generator=source, dtype=wide) for source in sources]).to(table.device)
    return draw * (norm / draw.norm(dim=-1, keepdim=True)), torch.full(draw.shape[:3], -1, device=table.device)


def generated(matching: Matching, reading: Reading, shape: Shape, classes: Sequence[int], sources: Sequence[torch.Generator]):
    """The embeddings of sampled texts, as `normal`; tokens after a text's end are the end token."""
    model, tokens = matching.model, matching.tokens
    uniform = torch.cat([torch.rand(shape.count, shape.length, generator=source) for source in sources])
    rows = [label for label in classes for _ in range(shape.count)]
    sampling = Sampling(max_tokens=shape.length, min_tokens=reading.min_tokens)
    ids = continue_prompts(model, tokens, rows, uniform, sampling, reading.allowed)
    ids = ids.masked_fill(ids < 0, reading.end).view(len(classes), shape.count, shape.length)
    return model.embed(ids).to(torch.promote_types(model.dtype, torch.float32)), ids


INITIALISATIONS = {"generated": generated, "normal": normal}


@torch.no_grad()
def best_of(
    name: str, candidates: int, matching: Matching, reading: Reading, shape: Shape, classes: Tensor, sources, groups_per_pass: int | None = None
) -> Tensor:
    """Each group's best of several draws by matching loss: (K, B, L, D).

    Args:
        name: one of INITIALISATIONS.
        candidates: number of draws; one alone is not evaluated.
        classes: (K,) each group's class.
        sources: K generators.
        groups_per_pass: groups whose loss is taken at once; None: all.
    """

    def values(x: Tensor, ids: Tensor) -> Tensor:
        passes = torch.arange(len(classes), device=classes.device).split(groups_per_pass or len(classes))
        return torch.cat([matching.of_vectors(x[some], ids[some], classes[some]) for some in passes])

    best, ids = INITIALISATIONS[name](matching, reading, shape, classes.tolist(), sources)
    if candidates == 1:
        return best
    lowest = values(best, ids)
    for _ in range(candidates - 1):
        x, ids = INITIALISATIONS[name](matching, reading, shape, classes.tolist(), sources)
        value = values(x, ids)
        best = torch.where((value < lowest).view(-1, 1, 1, 1), x, best)
        lowest = torch.minimum(value, lowest)
    return best


@torch.no_grad()
def greedy(
    name: str, candidates: int, matching: Matching, reading: Reading, shape: Shape, classes: Tensor, sources, groups_per_pass: int | None = None
) -> Tensor:
    """Each group put together from the texts of all its draws, so that they match best together: (K, B, L, D).

    The gradients of candidates * B texts are taken once, without a backward pass, and `gradients.greedy_order` adds one text
    after the other in closed form. So it costs `candidates` evaluations of a group, as `best_of` does, and chooses among far
    more groups than these. Measured on the embedded model with random vectors (groups of 4 texts of 8 tokens): the best of
    500 starts at 0.100, 10 draws put together at 0.071, 25 at 0.047. `tests/benchmarks/initialisation.py` measures other
    sizes and generated starts. Arguments as `best_of`.
    """
    at_once, many = shape.count * (groups_per_pass or len(classes)), replace(shape, count=shape.count * candidates)
    starts = []
    for label, source in zip(classes.tolist(), sources, strict=True):
        x, ids = INITIALISATIONS[name](matching, reading, many, [label], [source])
        rows = matching.greedy_of_vectors(x[0], ids[0], label, shape.count, at_once)
        starts.append(x[0, rows])
    return torch.stack(starts)


CHOICES = {"best": best_of, "greedy": greedy}
