"""Release spaces: the coordinates in which gradients are released and matched, by name; each made of public inputs alone.

Knows no real text. Letters: C classes, D hidden width, r directions, N public texts.
"""

from collections.abc import Sequence
from dataclasses import fields
from weakref import WeakKeyDictionary

import torch
from sklearn.covariance import ledoit_wolf
from torch import Tensor

from gradmm.classification import label_preference
from gradmm.errors import require
from gradmm.generation import prompted_texts
from gradmm.gradients import HeadSpace, LabelSpace, Space
from gradmm.models import Model
from gradmm.sketch import BodySketch
from gradmm.tasks import TaskTokens

HEAD_SPACES = ("head", "label_rows", "label_rows_subspace", "label_rows_centred")  # of the gradient of the loss over all tokens
PUBLIC_SPACES = ("label_rows_subspace", "label_rows_centred")  # made from public texts, which must be given
LABEL_SPACES = ("label_rows_calibrated", "label_rows_whitened")
SPACES = (*HEAD_SPACES, *LABEL_SPACES, "body")
CALIBRATION_TEXTS = 64  # of each class, where a space that measures the model's preference is given no public texts
DEFAULT_DIRECTIONS = 4  # keeps most of what sets the classes apart and little room for noise; notebook 04 measures it
RANK_TOLERANCE = 1e-6


def release_space(
    model: Model, tokens: TaskTokens, name: str, texts: Sequence[str] | None = None, directions: int | None = None
) -> HeadSpace | BodySketch:
    """The coordinates of a release, see `privacy.release`; a function of public inputs alone.

    Raises:
        UserError: the space is not known, or has no use for these texts and directions.
    """
    require(name in SPACES, f"the release space {name!r} is not known: use one of {', '.join(SPACES)}")
    require(
        name in PUBLIC_SPACES or (directions is None and (texts is None or name not in HEAD_SPACES)),
        f"public_texts and directions have no use in the space {name!r}: use {' or '.join(map(repr, PUBLIC_SPACES))} or leave them out",
    )
    if name == "head":
        return Space()
    rows = torch.tensor(tokens.labels, device=model.device)
    if name == "label_rows":
        return Space(rows)
    if name in PUBLIC_SPACES:
        return Space(rows, principal_directions(model, tokens, texts, directions, skip=int(name == "label_rows_centred")))
    texts = _own_texts(model, tokens) if texts is None else _public(texts, name)
    if name == "body":
        return BodySketch.of(model, tokens, texts)
    whitened = whitening(model.hidden_of([tokens.sequence(text) for text in texts])) if name == "label_rows_whitened" else ()
    return LabelSpace(rows, label_preference(model, tokens, texts), *whitened)


# Every release asks for the texts that the model writes by itself; they go with the model that wrote them.
_WRITTEN: WeakKeyDictionary[Model, tuple[TaskTokens, list[str]]] = WeakKeyDictionary()


def _own_texts(model: Model, tokens: TaskTokens) -> list[str]:
    if _WRITTEN.get(model, (None,))[0] != tokens:
        _WRITTEN[model] = (tokens, prompted_texts(model, tokens, CALIBRATION_TEXTS))
    return _WRITTEN[model][1]


def principal_directions(
    model: Model, tokens: TaskTokens, texts: Sequence[str] | None, directions: int | None, skip: int = 0
) -> Tensor:
    """The directions that hold most of the hidden states of public texts, mean included (a gradient holds h, not h - mean).

    Returns:
        (D, r), float64, orthonormal columns, most important first after the first `skip`; each column's largest entry is
        positive.

    Raises:
        UserError: no texts, or texts that span fewer than `skip + directions` directions.
    """
    texts = _public(texts, " and ".join(PUBLIC_SPACES))
    hidden = model.hidden_of([tokens.sequence(text) for text in texts]).double()
    count = max(1, min(DEFAULT_DIRECTIONS, *(size - skip for size in hidden.shape))) if directions is None else directions
    require(isinstance(count, int) and count >= 1, f"directions = {directions!r}, it must be a whole number of at least 1: give such as 4")
    _, sizes, basis = torch.linalg.svd(hidden, full_matrices=False)
    rank = int((sizes > RANK_TOLERANCE * sizes[0]).sum()) - skip
    require(count <= rank, f"directions = {count}, but the {len(texts)} public texts span {rank}: give more texts or fewer directions")
    basis = basis[skip : skip + count].mT
    return basis * basis.gather(0, basis.abs().argmax(0, keepdim=True)).sign()


def _public(texts: Sequence[str] | None, name: str) -> list[str]:
    texts = [] if texts is None else list(texts)
    require(
        bool(texts) and all(isinstance(text, str) and text.strip() for text in texts),
        f"the space {name} needs public texts: give public_texts, a list of strings that are not private",
    )
    return texts


def whitening(hidden: Tensor) -> tuple[Tensor, Tensor]:
    """What takes hidden states of public texts to mean zero and, but for shrinkage, to covariance one.

    The covariance is (1 - a) S + a tr(S)/D I with S that of the texts and the a that is expected to bring it nearest to the
    truth (Ledoit and Wolf 2004), so it can be inverted though there be fewer texts than directions.

    Args:
        hidden: (N, D).

    Returns:
        The mean (D,) and the covariance to the power -1/2 (D, D), symmetric; float64.

    Raises:
        UserError: states that do not differ or are not finite.
    """
    states = hidden.double()
    require(
        float((states - states[0]).abs().max()) > 0,  # false for what is not a number, too
        f"the {len(hidden)} public texts have all the same hidden state, or one that is not finite: give public_texts that differ",
    )
    covariance, _ = ledoit_wolf(states.cpu().numpy())
    sizes, directions = torch.linalg.eigh(torch.from_numpy(covariance))
    return states.mean(0), ((directions * sizes.rsqrt()) @ directions.mT).to(hidden.device)


def coordinates(model: Model, space: HeadSpace | BodySketch) -> int:
    """How many numbers one class's target has."""
    if isinstance(space, BodySketch):
        return space.size(model)
    rows, width = model.head_weight.shape
    rows = rows if space.rows is None else len(space.rows)
    width = width if space.basis is None else space.basis.shape[1]
    return rows * (width + (model.head_bias is not None))


# ---------------------------------------------------------------- files


def tensors_of(space: HeadSpace | BodySketch) -> dict[str, Tensor]:
    """All that a space holds, by name."""
    held = {item.name: getattr(space, item.name) for item in fields(space)}
    return {name: torch.tensor([value]) if isinstance(value, int) else value for name, value in held.items() if value is not None}


def space_from(name: str, tensors: dict[str, Tensor], classes: int) -> HeadSpace | BodySketch:
    """The inverse of `tensors_of` for the space of this name.

    Raises:
        ValueError, TypeError: tensors that are no such space of a task with this many classes.
    """
    if name not in SPACES:
        raise ValueError(f"no space is called {name!r}")
    preference = tensors.get("preference")
    if preference is not None and preference.shape != (classes,):
        raise ValueError(f"a preference of shape {tuple(preference.shape)} for {classes} classes")
    if name != "body":
        return (LabelSpace if name in LABEL_SPACES else Space)(**tensors)
    space = BodySketch(**{**tensors, "rank": int(*tensors["rank"].tolist())})
    if space.rank < 1:
        raise ValueError(f"a sketch of rank {space.rank}")
    return space
