"""The matching problem of a language model: prompts around x, and their distance to the released gradients.

Knows no private text and no solver. Letters: K groups, B examples of a group, L positions, D width, N texts, C classes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from gradmm.device import enough_memory
from gradmm.errors import UserError
from gradmm.gradients import Factors, Head, Space, Target, greedy_order, losses_as_added, match_groups
from gradmm.models import Model
from gradmm.projection import text_mask
from gradmm.spaces import BodySketch
from gradmm.tasks import TaskTokens

ROWS_PER_BLOCK = 256  # texts whose (V,) deltas are held at once


@dataclass(frozen=True)
class Matching:
    """f(X) = dist(G_target, G(X)) for groups of one class each.

    Attributes:
        model, tokens: the language model and the task in its tokens.
        targets: one per class.
        space: the coordinates of the targets: of the head, or a sketch of the body.
        distance: "cosine" or "l2".
        end: the token from which on a text is empty, or None.
    """

    model: Model
    tokens: TaskTokens
    targets: Sequence[Target]
    space: Space | BodySketch
    distance: str = "cosine"
    end: int | None = None

    @property
    def head(self) -> Head:
        """The model's own, from which the space takes the rows of its loss."""
        return Head(self.model.head_weight, self.model.head_bias)

    def of_vectors(self, x: Tensor, ids: Tensor, classes: Tensor) -> Tensor:
        """f of each group, with one pass of the body; differentiable in x alone; for targets of the head.

        Args:
            x: (K, B, L, D) continuous texts; the template around them is constant.
            ids: (K, B, L) tokens that say where each text ends (if `end` is set).
            classes: (K,) each group's class, on the CPU: a GPU is not waited for.

        Returns:
            (K,).

        Raises:
            UserError: targets of the body.
        """
        if isinstance(self.space, BodySketch):
            raise UserError("continuous texts have no sketch of the body: release in a space of the head")
        groups, count, _, _ = x.shape
        hidden = self.model.last_hidden(self._around(x.flatten(0, 1)), self._mask(ids.flatten(0, 1)))
        labels = self._labels(classes)[:, None].expand(groups, count)
        factors = self.space.factors(hidden.view(groups, count, -1), labels, self.head)
        return match_groups(factors, classes, self.targets, self.distance)

    @torch.no_grad()
    def of_texts(self, texts: Sequence[str], classes: Sequence[int]) -> Tensor:
        """f of each text as a group of one, read from the text itself: (N,)."""
        blocks = _blocks(len(texts))
        parts = [self._own(self.factors(texts[block], classes[block]), classes[block]) for block in blocks]
        return torch.cat(parts) if parts else torch.empty(0)

    @torch.no_grad()
    def of_sets(self, texts: Sequence[str], classes: Sequence[int]) -> list[float]:
        """f of all texts of a class as one group, for each class; NaN for a class without texts."""
        values = []
        for number in range(len(self.targets)):
            members = [text for text, label in zip(texts, classes, strict=True) if label == number]
            if not members:
                values.append(float("nan"))
                continue
            factors = self.factors(members, [number] * len(members))
            which = torch.tensor([number])
            values.append(match_groups(factors.unsqueeze(0), which, self.targets, self.distance).item())
        return values

    def greedy(self, texts: Sequence[str], number: int, count: int) -> list[int]:
        """Which texts of class `number` to take, so that together they match its target (`greedy_order`)."""
        return self.alone_and_together(texts, number, count, range(len(texts)), [0.0] * len(texts))[1]

    @torch.no_grad()
    @enough_memory("the gradients of all texts of a class", "take space = 'label_rows' or ranking = 'text'")
    def alone_and_together(
        self, texts: Sequence[str], number: int, count: int, usable: Sequence[int], penalties: Sequence[float]
    ) -> tuple[list[float], list[int]]:
        """`of_texts` and `greedy` for N texts of class `number`, which are read once.

        Args:
            usable: numbers of the texts that may be taken.
            penalties: of each text; the mean of a group's is added to its loss.

        Returns:
            f of each text as a group of one, and the numbers of the texts taken, the first first.

        Raises:
            UserError: the device's memory does not hold the gradients of all of them.
        """
        if not texts:
            return [], []
        classes = [number] * len(texts)
        factors = self.factors(texts, classes)
        whole = list(usable) == list(range(len(texts)))  # a copy of (N, V) is left out then
        some, extra = factors if whole else factors[list(usable)], [penalties[place] for place in usable]
        order = greedy_order(some, self.targets[number], count, self.distance, extra) if len(usable) else []
        return self._own(factors, classes).tolist(), [usable[place] for place in order]

    @torch.no_grad()
    def losses_in_order(self, texts: Sequence[str], number: int, order: Sequence[int]) -> list[float]:
        """f of the first text of class `number`, of the first two together, and so on to all N.

        Args:
            order: the texts' numbers, the first first.
        """
        factors = self.factors(texts, [number] * len(texts))
        return losses_as_added(factors[list(order)], self.targets[number], self.distance).tolist()

    def _own(self, factors: Factors, classes: Sequence[int]) -> Tensor:
        """f of each text as a group of one, from its factors: (N,)."""
        which = torch.tensor(list(classes))
        parts = [
            match_groups(factors[block].unsqueeze(1), which[block], self.targets, self.distance)
            for block in _blocks(len(which))
        ]
        return torch.cat(parts)

    def factors(self, texts: Sequence[str], classes: Sequence[int]) -> Factors:
        """The gradients of texts as factor pairs in the targets' coordinates, see `factors_of`.

        Those of a few texts, such as the kept ones of a class, are remembered until all classes have been asked for.
        """
        key = (tuple(texts), tuple(classes))
        if key in self._remembered:
            return self._remembered[key]
        sequences = [self.tokens.sequence(text) for text in texts]
        found = factors_of(self.model, self.tokens, self.space, sequences, classes)
        if len(texts) <= ROWS_PER_BLOCK:
            while len(self._remembered) >= max(1, len(self.targets)):
                del self._remembered[next(iter(self._remembered))]
            self._remembered[key] = found
        return found

    @cached_property
    def _remembered(self) -> dict[tuple, Factors]:
        return {}

    def _around(self, x: Tensor) -> Tensor:
        """The template's embeddings, constants, around x: (N, L, D) -> (N, T, D)."""
        before, after = (side.expand(len(x), -1, -1) for side in self._template)
        return torch.cat([before, x.to(before.dtype), after], dim=1)

    @cached_property
    def _template(self) -> tuple[Tensor, Tensor]:
        """The embeddings before and behind a text, (T, D) each."""
        tokens, device, dtype = self.tokens, self.model.device, self.model.dtype
        before = torch.tensor([*tokens.start, *tokens.prefix], dtype=torch.long, device=device)
        after = torch.tensor(list(tokens.suffix), dtype=torch.long, device=device)
        return self.model.embed(before).to(dtype), self.model.embed(after).to(dtype)

    def _labels(self, classes: Tensor) -> Tensor:
        """The label tokens of groups of these classes, on the device: (K,), looked up once."""
        key = tuple(classes.tolist())
        if key not in self._found:
            self._found[key] = torch.tensor([self.tokens.labels[number] for number in key], device=self.model.device)
        return self._found[key]

    @cached_property
    def _found(self) -> dict[tuple[int, ...], Tensor]:
        return {}

    def _mask(self, ids: Tensor) -> Tensor | None:
        if self.end is None:
            return None
        before, after = len(self.tokens.start + self.tokens.prefix), len(self.tokens.suffix)
        return torch.nn.functional.pad(text_mask(ids, self.end), (before, after), value=1)


def _blocks(count: int) -> list[slice]:
    return [slice(first, first + ROWS_PER_BLOCK) for first in range(0, count, ROWS_PER_BLOCK)]


def factors_of(
    model: Model,
    tokens: TaskTokens,
    space: Space | BodySketch,
    sequences: Sequence[Sequence[int]],
    classes: Sequence[int],
) -> Factors:
    """Gradients of single examples in the coordinates of a release.

    Args:
        sequences: N prompts in tokens, template included.
        classes: N class numbers.

    Returns:
        Factors: delta (N, R) and hidden (N, r) of the head, or delta (N, 1) and hidden (N, `space.size`) of a sketch of
            the body.
    """
    if isinstance(space, BodySketch):
        return space.factors(model, tokens, sequences, classes)
    hidden = model.hidden_of(sequences)
    labels = torch.tensor([tokens.labels[number] for number in classes], device=hidden.device)
    head, blocks = Head(model.head_weight, model.head_bias), _blocks(len(sequences)) or [slice(0)]
    parts = [space.factors(hidden[block], labels[block], head) for block in blocks]  # a few rows of (V,) at a time
    return Factors(torch.cat([p.delta for p in parts]), torch.cat([p.hidden for p in parts]), parts[0].bias)
