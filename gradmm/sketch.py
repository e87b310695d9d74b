r"""Gradients of the model's body, sketched: what fine-tuning moves beyond the head, in coordinates that fit into memory.

Fine-tuning trains every layer with the loss over the label tokens alone, and an untrained model mostly prefers one of them
whatever the text says. So the gradient here is that of the cross-entropy over the C label tokens, with the model's preference
among them, measured on public texts, taken out; of every linear map of the body. For one text and one map with inputs a_t
and output gradients g_t at position t, the gradient is sum_t g_t a_t^T; with fixed random matrices P (in, r) and Q (out, r)
its sketch is

    sum_t (P^T a_t) (Q^T g_t)^T        (r, r)

whose inner products are those of the gradients, on average over P and Q (entries of variance 1 / r). One forward and one
backward pass for a batch of texts; no gradient of a single text is ever built. Everything but the texts is public, so a
sketch may be clipped and noised like any gradient.

Source: Choe et al. 2024 (LoGra, arXiv 2405.13954) for sketching each linear map on both sides; the calibration is after
Zhao et al. 2021. Letters: N texts, M linear maps, r rank, C classes, T positions, D width.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers.pytorch_utils import Conv1D

from gradmm.gradients import Factors
from gradmm.models import Model, batches_by_length, pad_left
from gradmm.seeds import generator
from gradmm.tasks import TaskTokens

RANK = 16
TOKENS_PER_BATCH = 2048


@dataclass(frozen=True, eq=False)
class BodySketch:
    """The coordinates of sketched gradients.

    Attributes:
        preference: (C,) mean log-probability of each label token over public texts, taken from the logits.
        rank: r.
    """

    preference: Tensor
    rank: int = RANK

    @staticmethod
    def of(model: Model, tokens: TaskTokens, texts: Sequence[str], rank: int = RANK) -> "BodySketch":
        """With the model's preference over public texts."""
        hidden = model.hidden_of([tokens.sequence(text) for text in texts])
        return BodySketch(model.logits_of(hidden, tokens.labels).log_softmax(-1).mean(0), rank)

    def size(self, model: Model) -> int:
        """How many numbers a sketch has: M r^2."""
        return len(linear_maps(model)) * self.rank**2

    def factors(self, model: Model, tokens: TaskTokens, sequences: Sequence[Sequence[int]], classes: Sequence[int]) -> Factors:
        """Each text's sketch as the factor pair of 1 and itself: delta (N, 1), hidden (N, M r^2), float32 at least.

        Args:
            sequences: N prompts in tokens.
            classes: N class numbers.
        """
        model.check_lengths(sequences)
        wide = torch.promote_types(model.dtype, torch.float32)
        found = torch.zeros(len(sequences), self.size(model), dtype=wide, device=model.device)
        labels = torch.tensor(list(classes), device=model.device)
        for rows in batches_by_length(sequences, TOKENS_PER_BATCH):
            found[rows] = self._batch(model, tokens, [sequences[row] for row in rows], labels[rows])
        return Factors(torch.ones(len(sequences), 1, dtype=wide, device=model.device), found)

    def _batch(self, model: Model, tokens: TaskTokens, sequences: Sequence[Sequence[int]], labels: Tensor) -> Tensor:
        ids, mask = pad_left(sequences, model.device)
        inputs: dict[int, Tensor] = {}
        outputs: dict[int, Tensor] = {}
        with ExitStack() as hooks, torch.enable_grad():
            for number, layer in enumerate(linear_maps(model)):
                hooks.callback(layer.register_forward_hook(_recorder(number, inputs, outputs)).remove)
            embeds = model.embed(ids).detach().requires_grad_(True)
            hidden = model.body(inputs_embeds=embeds, attention_mask=mask, use_cache=False).last_hidden_state[:, -1]
            loss = cross_entropy(model.logits_of(hidden, tokens.labels) - self.preference.to(hidden.device), labels, reduction="sum")
            slopes = torch.autograd.grad(loss, [outputs[number] for number in sorted(outputs)])  # as listed, not as called
        sketches = [self._sketch(number, inputs[number], slope, mask) for number, slope in zip(sorted(outputs), slopes, strict=True)]
        return torch.cat(sketches, dim=1)

    def _sketch(self, number: int, inputs: Tensor, slope: Tensor, mask: Tensor) -> Tensor:
        """One linear map's part: (N, T, in), (N, T, out), (N, T) -> (N, r^2); some families run N and T together (OPT)."""
        wide = torch.promote_types(inputs.dtype, torch.float32)
        sides = [
            (value.to(wide) @ self._matrix(number, side, value)).view(*mask.shape, self.rank)
            for side, value in (("in", inputs), ("out", slope))
        ]
        return torch.einsum("nti,nto->nio", sides[0] * mask.unsqueeze(-1), sides[1]).flatten(1)

    def _matrix(self, number: int, side: str, like: Tensor) -> Tensor:
        """P or Q of one map: (in or out, r)."""
        draw = torch.randn(like.shape[-1], self.rank, generator=generator(0, f"sketch {side}", number), dtype=torch.float64)
        return (draw / self.rank**0.5).to(like.device, torch.promote_types(like.dtype, torch.float32))


def linear_maps(model: Model) -> list[torch.nn.Module]:
    """The body's linear maps in the order in which the model lists them."""
    return [layer for layer in model.lm.base_model.modules() if isinstance(layer, (torch.nn.Linear, Conv1D))]


def _recorder(number: int, inputs: dict[int, Tensor], outputs: dict[int, Tensor]):
    def record(layer, given, output) -> None:
        inputs[number], outputs[number] = given[0].detach(), output

    return record

