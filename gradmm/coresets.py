"""Choosing a few of many real examples: the baselines that write nothing.

Each method chooses from points in space; which space, the last hidden state under the task's prompt, is decided in one
place. Letters: N points, D width, n chosen, C classes.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from gradmm.errors import require, require_whole
from gradmm.examples import Example, check_examples, sample_examples
from gradmm.models import Model, require_model
from gradmm.tasks import Task, tokenize_task


def herding(points: Tensor, count: int) -> list[int]:
    """Points whose running mean stays nearest to the mean of all (Welling 2009): (N, D) -> row numbers in the order taken.

    Each step takes the point that brings the mean of those taken nearest to the whole mean; ties go to the first row.
    """
    mean, total = points.mean(0), torch.zeros_like(points[0])
    open_rows = torch.ones(len(points), dtype=torch.bool, device=points.device)
    taken: list[int] = []
    for size in range(1, count + 1):
        far = ((total + points) / size - mean).square().sum(1).masked_fill(~open_rows, torch.inf)
        taken.append(int(far.argmin()))
        total = total + points[taken[-1]]
        open_rows[taken[-1]] = False
    return taken


def k_center(points: Tensor, count: int) -> list[int]:
    """Greedy k-center (Gonzalez 1985; Sener and Savarese 2018): (N, D) -> row numbers in the order taken.

    The first centre is the point nearest to the mean, each next one the point farthest from all centres so far; the
    largest distance left is at most twice the smallest possible for the first centre given. Ties go to the first row.
    """
    taken = [int((points - points.mean(0)).square().sum(1).argmin())]
    near = torch.full((len(points),), torch.inf, dtype=points.dtype, device=points.device)
    while len(taken) < count:
        near = torch.minimum(near, (points - points[taken[-1]]).square().sum(1))
        near[taken] = -torch.inf  # a point is taken once even where several coincide
        taken.append(int(near.argmax()))
    return taken


CORESETS: dict[str, Callable[[Tensor, int], list[int]]] = {"herding": herding, "k_center": k_center}
METHODS = ("random", *CORESETS)


def select_coreset(
    model: Model, task: Task, examples: Sequence[Example], n: int, method: str, seed: int = 0
) -> list[Example]:
    """Choose `n` real examples, as equal a number of each class as `n` allows, class by class.

    Points are the model's last hidden states at the end of the prompt, where the label is read; each class is chosen
    from alone. Texts of fewer than `task.min_words` words are left out. What is chosen is real text: it is not private.

    Args:
        method: "random" (`sample_examples`, which reads no hidden state) or a name in `CORESETS`.
        seed: for "random"; the others draw nothing.

    Raises:
        UserError: an unknown method, n below the number of classes or above what some class has.
    """
    require_model(model)
    require(method in METHODS, f"the coreset method {method!r} is not known: use one of {', '.join(METHODS)}")
    if method == "random":
        return sample_examples(examples, n, task, seed)
    return select_coresets(model, task, examples, n, [method])[method]


def select_coresets(model: Model, task: Task, examples: Sequence[Example], n: int, methods: Sequence[str]) -> dict[str, list[Example]]:
    """What `select_coreset` chooses by each of several methods in CORESETS; the texts are read once for all.

    Raises:
        UserError: as `select_coreset`.
    """
    require_model(model)
    examples, classes = check_examples(examples, task, "example"), len(task.labels)
    require(
        require_whole(n, "n") >= classes,
        f"n = {n}, but {classes} classes need at least {classes}: ask for more examples",
    )
    tokens = tokenize_task(task, model.tokenizer)
    chosen: dict[str, list[Example]] = {method: [] for method in methods}
    for label, name in enumerate(task.labels):
        pool = [e for e in examples if e.label == label and len(e.text.split()) >= task.min_words]
        count = n // classes + (label < n % classes)
        require(
            count <= len(pool),
            f"n = {n} needs {count} examples of {name!r}, but {len(pool)} of at least {task.min_words} word(s) exist: lower n",
        )
        points = model.hidden_of([tokens.sequence(example.text) for example in pool])
        points = points.to(torch.promote_types(points.dtype, torch.float32))
        for method, taken in chosen.items():
            taken += [pool[row] for row in CORESETS[method](points, count)]
    return chosen
