r"""Gradients of the model's body, sketched: what fine-tuning moves beyond the head, small enough for memory.

Fine-tuning trains every layer with the loss over the label tokens alone, and an untrained model mostly prefers one of
them whatever the text says. So the gradient here is that of the cross-entropy over the C label tokens, with the model's
preference among them, measured on public texts, taken out; of every linear map of the body. For one text and one map
with inputs a_t and output gradients g_t at position t, the gradient is sum_t g_t a_t^T; with fixed random matrices P
(in, r) and Q (out, r) its sketch is

    sum_t (P^T a_t) (Q^T g_t)^T        (r, r)

whose inner products are those of the gradients, on average over P and Q (entries of variance 1 / r). One forward and
one backward pass for a batch of texts; no gradient of a single text is ever built. Everything but the texts is public,
so a sketch may be clipped and noised like any gradient.

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

from gradmm.classification import label_preference
from gradmm.gradients import Factors
from gradmm.models import Model, batches_by_length, pad_left
from gradmm.seeds import generator
from gradmm.tasks import TaskTokens

RANK = 16
TOKENS_PER_BATCH = 2048


@dataclass(frozen=True, eq=False)
class BodySketch:
    """The coordinates of sketched gradients of every linear map of the body.

    Attributes:
        preference: (C,) mean log-probability of each label token over public texts, taken from the logits.
        rank: r.
    """

    preference: Tensor
    rank: int = RANK

    @staticmethod
    def of(model: Model, tokens: TaskTokens, texts: Sequence[str], rank: int = RANK) -> "BodySketch":
        """With the model's preference over public texts."""
        return BodySketch(label_preference(model, tokens, texts), rank)

    def size(self, model: Model) -> int:
        """How many numbers a sketch has: M r^2."""
        return len(linear_maps(model)) * self.rank**2

    def factors(
        self, model: Model, tokens: TaskTokens, sequences: Sequence[Sequence[int]], classes: Sequence[int]
    ) -> Factors:
        """Each text's sketch as the factor pair of 1 and itself: delta (N, 1), hidden (N, `size`), float32 at least.

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
        layers = linear_maps(model)
        inputs: dict[str, Tensor] = {}
        outputs: dict[str, Tensor] = {}
        with ExitStack() as hooks, torch.enable_grad():
            for name, layer in layers.items():
                hooks.callback(layer.register_forward_hook(_recorder(name, inputs, outputs)).remove)
            embeds = model.embed(ids).detach().requires_grad_(True)
            hidden = model.body(inputs_embeds=embeds, attention_mask=mask, use_cache=False).last_hidden_state[:, -1]
            loss = cross_entropy(
                model.logits_of(hidden, tokens.labels) - self.preference.to(hidden.device), labels, reduction="sum"
            )
            slopes = torch.autograd.grad(loss, [outputs[name] for name in layers])
        sketches = []
        for number, (name, slope) in enumerate(zip(layers, slopes, strict=True)):
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
    inside = set(model.lm.base_model.modules())
    return {
        name: layer
        for name, layer in model.lm.named_modules()
        if layer in inside and isinstance(layer, (torch.nn.Linear, Conv1D))
    }


def _recorder(name: str, inputs: dict[str, Tensor], outputs: dict[str, Tensor]):
    def record(layer, given, output) -> None:
        inputs[name], outputs[name] = given[0].detach(), output

    return record
