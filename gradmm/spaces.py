"""Release spaces: the coordinates in which gradients are released and matched, by name, all from public inputs.

Knows no real text. Letters: C classes, D hidden width, r directions, N public texts.
"""

import hashlib
import logging
import math
import warnings
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers.pytorch_utils import Conv1D

from gradmm import files
from gradmm.classification import label_logs, label_preference
from gradmm.device import in_batches, text_body
from gradmm.errors import require, require_texts, require_whole
from gradmm.generation import prompted_texts
from gradmm.gradients import DenseTarget, Factors, FactorTarget, Space, Target
from gradmm.models import Model, batches_by_length, pad_left
from gradmm.progress import advance, expect, shown, stage
from gradmm.seeds import generator
from gradmm.tasks import TaskTokens

LOG = logging.getLogger(__name__)
# Of the gradient of the loss over all tokens.
HEAD_SPACES = ("head", "label_rows", "label_rows_subspace", "label_rows_centred")
BODY_SPACES = ("body", "body_subspace")  # of the loss that fine-tuning uses; matched by choosing texts
PUBLIC_SPACES = ("label_rows_subspace", "label_rows_centred")  # made from public texts, which must be given
DIRECTED_SPACES = (*PUBLIC_SPACES, "body_subspace")  # along a few directions
SPACES = (*HEAD_SPACES, *BODY_SPACES)
# Where a space that measures the model's preference is given no public texts, the model writes some: of each class so
# many at first, and then as many as bring the preference's standard error down to the bound, at most so many in all. An
# error of 0.15 nats moves a label's probability by at most 0.04; on SmolLM2 the target's cosine to that of 64 texts a
# class was then 0.996 or more, while another draw of real examples moves it much further.
FIRST_TEXTS, CALIBRATION_TEXTS = 8, 64
PREFERENCE_ERROR = 0.15
# On SmolLM2 and SST-2 16 of hidden states keep 0.79 of what sets the classes apart and 4 keep 0.50; where n and epsilon
# let anything through, their room for noise costs less than that, on small models too. Notebook 04 measures it. Of the
# body's sketch 16 and 8 choose alike where they are made of 64 texts, and 16 better where they are made of 500.
DEFAULT_DIRECTIONS = 16
DIRECTION_TEXTS = 48  # that the model writes for the body's, beside those of its preference, 16 or more
RANK_TOLERANCE = 1e-6
NOT_FINITE = "what the model computes of a public text is not finite: use another dtype"
RANK = 16  # r of the body's sketch


@dataclass(frozen=True, eq=False)
class BodySketch:
    r"""The coordinates of sketched gradients of every linear map of the body: what fine-tuning moves beyond the head.

    Fine-tuning trains every layer with the loss over the label tokens alone, and an untrained model mostly prefers one
    of them whatever the text says. So the gradient is that of the cross-entropy over the C label tokens, with the
    model's preference among them, measured on public texts, taken out. For one text and one map with inputs a_t and
    output gradients g_t at position t it is sum_t g_t a_t^T; with fixed random matrices P (in, r) and Q (out, r), of
    entries of variance 1 / r, its sketch is

        sum_t (P^T a_t) (Q^T g_t)^T        (r, r)

    whose inner products are those of the gradients, on average over P and Q. One forward and one backward pass for a
    batch of texts; no gradient of a single text is ever built. Weights that no module of their own multiplies, as those
    of a mixture's experts and some of Mamba's, are left out (`release_space` warns of experts). Everything but the
    texts is public, so a sketch may be clipped and noised like any gradient. Letters: M linear maps, T positions.

    Source: Choe et al. 2024 (LoGra, arXiv 2405.13954) for sketching each linear map on both sides; the calibration is
    after Zhao et al. 2021.

    Attributes:
        preference: (C,) mean log-probability of each label token over public texts, taken from the logits.
        rank: r.
        basis: (M r^2, k) with orthogonal columns of one length, the directions of sketches that count (see
            `body_directions`), or None for all.
        shared: (M r^2, at most C - 1), orthonormal: directions that texts of a class share whatever they say, which are
            taken out of every sketch (see `shared_directions`), or None for none. The basis is orthogonal to them.
    """

    preference: Tensor
    rank: int = RANK
    basis: Tensor | None = None
    shared: Tensor | None = None

    @staticmethod
    def of(model: Model, tokens: TaskTokens, texts: Sequence[str], rank: int = RANK) -> "BodySketch":
        """With the model's preference over public texts."""
        return BodySketch(label_preference(model, tokens, texts), rank)

    def size(self, model: Model) -> int:
        """How many numbers a sketch has: M r^2, or k."""
        return len(linear_maps(model)) * self.rank**2 if self.basis is None else self.basis.shape[1]

    def factors(
        self, model: Model, tokens: TaskTokens, sequences: Sequence[Sequence[int]], classes: Sequence[int]
    ) -> Factors:
        """Each text's sketch as the factor pair of 1 and itself: delta (N, 1), hidden (N, `size`); as `sketches`."""
        return self.along(self.sketches(model, tokens, sequences, classes))

    def along(self, sketches: Tensor) -> Factors:
        """Whole sketches (N, M r^2) in the directions that count, as `factors`."""
        kept = sketches
        if self.basis is not None:
            kept = sketches @ self.basis.to(sketches)
        elif self.shared is not None:
            shared = self.shared.to(sketches)
            kept = sketches - (sketches @ shared) @ shared.mT
        return Factors(sketches.new_ones(len(sketches), 1), kept)

    def lifted(self, target: Target) -> Target:
        """A target along the basis as the whole sketch, (1, M r^2), that has nothing beside these directions."""
        basis = self.basis
        if basis is None:
            return target
        back = (basis / basis.square().sum(0)).mT  # of orthogonal columns the pseudoinverse
        if isinstance(target, DenseTarget):
            return DenseTarget(target.weight @ back.to(target.weight))
        hidden = target.factors.hidden
        return FactorTarget(Factors(target.factors.delta, hidden @ back.to(hidden)))

    def sketches(
        self, model: Model, tokens: TaskTokens, sequences: Sequence[Sequence[int]], classes: Sequence[int]
    ) -> Tensor:
        """Each text's sketch in all directions: (N, M r^2), float32 at least.

        Args:
            sequences: N prompts in tokens.
            classes: N class numbers.
        """
        model.check_lengths(sequences)
        wide = torch.promote_types(model.dtype, torch.float32)
        found = torch.zeros(len(sequences), len(linear_maps(model)) * self.rank**2, dtype=wide, device=model.device)
        labels = torch.tensor(list(classes), device=model.device)

        def read(rows: list[int]) -> None:
            found[rows] = self._batch(model, tokens, [sequences[row] for row in rows], labels[rows]).to(wide)
            advance(len(rows))

        in_batches(read, batches_by_length(sequences, model.tokens_at_once(backward=True)))
        return found

    def _batch(self, model: Model, tokens: TaskTokens, sequences: Sequence[Sequence[int]], labels: Tensor) -> Tensor:
        ids, mask = pad_left(sequences, model.device)
        layers = linear_maps(model)
        inputs: dict[str, Tensor] = {}
        outputs: dict[str, Tensor] = {}
        with ExitStack() as hooks, torch.enable_grad():
            for name, layer in layers.items():
                hooks.callback(layer.register_forward_hook(_recorder(name, inputs, outputs)).remove)
            embeds = model.embed(ids).detach().requires_grad_(True)
            given = embeds.clone()  # some families scale in place what they are given (CTRL)
            hidden = model.body(inputs_embeds=given, attention_mask=mask, use_cache=False).last_hidden_state[:, -1]
            loss = cross_entropy(
                model.logits_of(hidden, tokens.labels) - self.preference.to(hidden.device), labels, reduction="sum"
            )
            read = [name for name in layers if name in outputs]
            found = torch.autograd.grad(loss, [outputs[name] for name in read], allow_unused=True)
        slopes, sketches = dict(zip(read, found, strict=True)), []
        for number, name in enumerate(layers):
            slope = slopes.get(name)
            if slope is None:  # a map whose weights are read past it (Mamba), or that changed nothing
                sketches.append(loss.new_zeros(len(ids), self.rank**2))
                continue
            # Some families run N and T together (OPT).
            left = self._thin(number, "in", inputs[name]).view(*mask.shape, -1) * mask.unsqueeze(-1)
            right = self._thin(number, "out", slope).view(*mask.shape, -1)
            sketches.append(torch.einsum("nti,nto->nio", left, right).flatten(1))
        return torch.cat(sketches, dim=1)

    def _thin(self, number: int, side: str, values: Tensor) -> Tensor:
        """A map's inputs by P, or output gradients by Q: (..., in or out) -> (..., r)."""
        draw = torch.randn(
            values.shape[-1], self.rank, generator=generator(0, f"sketch {side}", number), dtype=torch.float64
        )
        wide = torch.promote_types(values.dtype, torch.float32)
        return values.to(wide) @ (draw / self.rank**0.5).to(values.device, wide)


def linear_maps(model: Model) -> dict[str, torch.nn.Module]:
    """The body's linear maps by name, in the order in which the model lists them."""
    inside = set(text_body(model.lm).modules())
    return {
        name: layer
        for name, layer in model.lm.named_modules()
        if layer in inside and isinstance(layer, (torch.nn.Linear, Conv1D))
    }


def _recorder(name: str, inputs: dict[str, Tensor], outputs: dict[str, Tensor]):
    def record(layer, given, output) -> None:
        if isinstance(output, Tensor):  # a router may be a map and give several
            inputs[name], outputs[name] = given[0].detach(), output

    return record


def release_space(
    model: Model,
    tokens: TaskTokens,
    name: str,
    texts: Sequence[str] | None = None,
    directions: int | None = None,
    cache: str | Path | None = None,
    progress: bool = False,
) -> Space | BodySketch:
    """The coordinates of a release, see `privacy.release`; a function of public inputs alone.

    Raises:
        UserError: the space is not known, or has no use for these texts and directions.
    """
    require(name in SPACES, f"the release space {name!r} is not known: use one of {', '.join(SPACES)}")
    require(
        name in DIRECTED_SPACES or (directions is None and (texts is None or name not in HEAD_SPACES)),
        f"public_texts and directions have no use in the space {name!r}: use {' or '.join(map(repr, DIRECTED_SPACES))} "
        "or leave them out",
    )
    weights = text_body(model.lm).named_parameters() if name in BODY_SPACES else ()
    if any(".experts." in place and values.ndim == 3 for place, values in weights):
        warnings.warn(
            f"{model.name} mixes experts, whose weights the space {name!r} leaves out: it matches the rest of the "
            "model, so compare with space = 'label_rows'",
            stacklevel=2,
        )
    if name == "head":
        return Space()
    rows = torch.tensor(tokens.labels, device=model.device)
    if name == "label_rows":
        return Space(rows)
    if name in PUBLIC_SPACES:
        return Space(
            rows, principal_directions(model, tokens, texts, directions, skip=int(name == "label_rows_centred"))
        )
    public = own_texts(model, tokens, cache, progress) if texts is None else _public(texts, name)
    whole = BodySketch.of(model, tokens, public)
    if name == "body":
        return whole
    public = [*public, *_more_texts(model, tokens, progress)] if texts is None else public
    return body_directions(model, tokens, whole, public, directions)


def to_match(space: Space | BodySketch, targets: Sequence[Target]) -> tuple[tuple[Target, ...], Space | BodySketch]:
    """The targets of a release and the space in which texts are compared with them; of few directions the whole sketch.

    Along a few directions a few hundred texts match any target, and which of them are taken is chance. In the whole
    sketch what a text's gradient has beside these directions counts against it. Nothing but the release is used.
    """
    if not isinstance(space, BodySketch) or space.basis is None:
        return tuple(targets), space
    return tuple(map(space.lifted, targets)), replace(space, basis=None)


# Every release asks for the texts that the model writes by itself; they go with the model that wrote them.
_WRITTEN: WeakKeyDictionary[Model, tuple[TaskTokens, list[str]]] = WeakKeyDictionary()
CACHED = "calibration.json"


def own_texts(
    model: Model,
    tokens: TaskTokens,
    cache: str | Path | None = None,
    progress: bool = False,
) -> list[str]:
    """Texts that the model writes from the public prompts, as many as its preference for some label needs.

    Args:
        cache: a folder that keeps the texts: read back from there where model and task are the same.
        progress: whether to show a bar if it takes more than two seconds.
    """
    LOG.debug("texts of the model's own are %s", "at hand" if _WRITTEN.get(model, (None,))[0] == tokens else "sought")
    if _WRITTEN.get(model, (None,))[0] != tokens:
        _WRITTEN[model] = (tokens, _kept(model, tokens, cache) or _write(model, tokens, progress))
    if cache is not None:
        _keep(model, tokens, cache, _WRITTEN[model][1])
    return _WRITTEN[model][1]


def _write(model: Model, tokens: TaskTokens, progress: bool) -> list[str]:
    """Stein's two stages: the spread within the classes of a first few texts says how many are needed in all."""
    classes, first = len(tokens.labels), min(FIRST_TEXTS, CALIBRATION_TEXTS)
    with shown(progress), stage("measuring the model's preference", 2 * first * classes):
        texts = prompted_texts(model, tokens, first)
        logs = label_logs(model, tokens, texts).double()
        spread = (
            (logs - logs.mean(1, keepdim=True))
            .view(classes, first, classes)
            .var(1, correction=min(1, first - 1))
            .mean(0)
        )
        error = float(spread.max() / (first * classes)) ** 0.5
        needed = math.ceil(min(CALIBRATION_TEXTS, first * (error / PREFERENCE_ERROR) ** 2))
        if needed > first:
            expect((needed - first) * classes)
            texts += prompted_texts(model, tokens, needed - first, seed=1)
    return texts


def _more_texts(model: Model, tokens: TaskTokens, progress: bool) -> list[str]:
    """Texts that the model writes beside `own_texts`, to know in what directions gradients differ."""
    each = math.ceil(DIRECTION_TEXTS / len(tokens.labels))
    with shown(progress), stage("writing public texts", each * len(tokens.labels)):
        return prompted_texts(model, tokens, each, seed=2)


def _kept(model: Model, tokens: TaskTokens, cache: str | Path | None) -> list[str] | None:
    place = None if cache is None else files.as_path(cache, "the cache") / CACHED
    held = files.read_json(place) if place is not None and place.is_file() else None
    return held["texts"] if isinstance(held, dict) and held.get("of") == _name_of(model, tokens) else None


def _keep(model: Model, tokens: TaskTokens, cache: str | Path, texts: list[str]) -> None:
    if _kept(model, tokens, cache) is None:
        files.write_json(Path(cache) / CACHED, {"of": _name_of(model, tokens), "texts": texts})


def _name_of(model: Model, tokens: TaskTokens) -> str:
    """SHA-256 of all that the texts depend on."""
    values = (model.fingerprint, replace(tokens, tokenizer=None), PREFERENCE_ERROR, FIRST_TEXTS, CALIBRATION_TEXTS)
    return hashlib.sha256(repr(values).encode()).hexdigest()


def principal_directions(
    model: Model, tokens: TaskTokens, texts: Sequence[str] | None, directions: int | None, skip: int = 0
) -> Tensor:
    """The directions that hold most of public texts' hidden states, mean included (a gradient holds h, not h - mean).

    Returns:
        (D, r), as `_directions` after the first `skip`.

    Raises:
        UserError: no texts, or texts that span fewer than `skip + directions` directions.
    """
    texts = _public(texts, " and ".join(PUBLIC_SPACES))
    hidden = model.hidden_of([tokens.sequence(text) for text in texts]).double()
    return _directions(hidden, directions, skip)


def body_directions(
    model: Model, tokens: TaskTokens, sketch: BodySketch, texts: Sequence[str], directions: int | None
) -> BodySketch:
    """The sketch along the directions that hold most of public texts' sketches once what they share is taken out.

    Each text counts alike, and the unit is the texts' median length, so a clip of 1 shortens about every second
    gradient. A smaller one makes all of the same length, and their sum over classes another: on Gemma-3-270M and SST-2
    its cosine to the unclipped one was 0.1. A public text has no label: the texts are read as of each class in turn.

    Returns:
        `sketch` with its `shared_directions` and, as basis, k principal directions divided by the median length along
        them.

    Raises:
        UserError: the texts span fewer than `directions` directions, or a sketch is not finite.
    """
    classes = [place % len(tokens.labels) for place in range(len(texts))]
    found = sketch.sketches(model, tokens, [tokens.sequence(text) for text in texts], classes).double()
    require(bool(found.isfinite().all()), NOT_FINITE)
    tiny = torch.finfo(found.dtype).tiny
    alike = found / found.norm(dim=1, keepdim=True).clamp_min(tiny)
    shared = shared_directions(alike, classes)
    basis = _directions(alike - (alike @ shared) @ shared.mT, directions)
    return replace(sketch, basis=basis / (found @ basis).norm(dim=1).median().clamp_min(tiny), shared=shared)


def shared_directions(rows: Tensor, classes: Sequence[int]) -> Tensor:
    """What texts read as of a class have in common whatever they say: the slope of the model's bias for that label.

    It takes most of a gradient's length, hence of the clip, and training on as many texts of each class cancels it. Of
    any one text the gradients of C labels, weighted by their probabilities, add up to nothing: C - 1 directions.

    Args:
        rows: (N, D) gradients of public texts.
        classes: N class numbers that they were read as.

    Returns:
        (D, C - 1), orthonormal, or fewer columns where fewer classes have a text.
    """
    labels = torch.tensor(list(classes))
    means = torch.stack([rows[labels == number].mean(0) for number in labels.unique().tolist()])
    return torch.linalg.svd(means, full_matrices=False)[2][: len(means) - 1].mT


def _directions(rows: Tensor, directions: int | None, skip: int = 0) -> Tensor:
    """The principal directions of public texts' rows (N, D), mean included, after the first `skip`.

    Args:
        directions: how many, or None for the usual number, or as many as there are.

    Returns:
        (D, r), float64, orthonormal columns, most important first; each column's largest entry is positive.
    """
    require(bool(rows.isfinite().all()), NOT_FINITE)
    _, sizes, basis = torch.linalg.svd(rows, full_matrices=False)
    rank = int((sizes > RANK_TOLERANCE * sizes[0]).sum()) - skip
    count = max(1, min(DEFAULT_DIRECTIONS, rank)) if directions is None else require_whole(directions, "directions", 1)
    require(
        count <= rank,
        f"directions = {count}, but the {len(rows)} public texts span {rank}: give more texts or fewer directions",
    )
    basis = basis[skip : skip + count].mT
    return basis * basis.gather(0, basis.abs().argmax(0, keepdim=True)).sign()


def _public(texts: Sequence[str] | None, name: str) -> list[str]:
    texts = require_texts([] if texts is None else texts, "public_texts")
    require(
        bool(texts) and all(text.strip() for text in texts),
        f"the space {name} needs public texts: give public_texts, a list of strings that are not private",
    )
    return texts


def coordinates(model: Model, space: Space | BodySketch) -> int:
    """How many numbers one class's target has."""
    if isinstance(space, BodySketch):
        return space.size(model)
    rows, width = model.head_weight.shape
    rows = rows if space.rows is None else len(space.rows)
    width = width if space.basis is None else space.basis.shape[1]
    return rows * (width + (model.head_bias is not None))


# ---------------------------------------------------------------- files


def tensors_of(space: Space | BodySketch) -> dict[str, Tensor]:
    """All that a space holds, by name."""
    held = {item.name: getattr(space, item.name) for item in fields(space)}
    return {
        name: torch.tensor([value]) if isinstance(value, int) else value
        for name, value in held.items()
        if value is not None
    }


def space_from(name: str, tensors: dict[str, Tensor], classes: int) -> Space | BodySketch:
    """The inverse of `tensors_of` for the space of this name.

    Raises:
        ValueError, TypeError: tensors that are no such space of a task with this many classes.
    """
    if name not in SPACES:
        raise ValueError(f"no space is called {name!r}")
    preference = tensors.get("preference")
    if preference is not None and preference.shape != (classes,):
        raise ValueError(f"a preference of shape {tuple(preference.shape)} for {classes} classes")
    if name not in BODY_SPACES:
        return Space(**tensors)
    others: dict[str, Any] = {**tensors, "rank": int(*tensors["rank"].tolist())}
    space = BodySketch(**others)
    if space.rank < 1:
        raise ValueError(f"a sketch of rank {space.rank}")
    if (space.basis is not None) != (name == "body_subspace") or (space.basis is None and space.shared is not None):
        raise ValueError(f"{name} with a basis of shape {None if space.basis is None else tuple(space.basis.shape)}")
    if any(part is not None and part.ndim != 2 for part in (space.basis, space.shared)):
        raise ValueError(f"{name} with directions that are no matrix")
    if space.shared is not None and space.basis is not None and len(space.shared) != len(space.basis):
        raise ValueError(f"{name} with directions of {len(space.basis)} and of {len(space.shared)} numbers")
    return space
