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

A LoRA adapter computes W a + s B A a, with A drawn at random and B = 0 at first. There the gradient of B is
s sum_t g_t (A a_t)^T and that of A is zero: what training an adapter follows is the same sketch on one side alone.

Source: Choe et al. 2024 (LoGra, arXiv 2405.13954) for sketching each linear map on both sides; Hu et al. 2022 (LoRA, arXiv
2106.09685); the calibration is after Zhao et al. 2021. Letters: N texts, M linear maps, r rank, C classes, T positions, D width.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers.pytorch_utils import Conv1D

from gradmm.adapters import SCALE, first_a
from gradmm.classification import label_preference
from gradmm.errors import require
from gradmm.gradients import Factors
from gradmm.models import Model, batches_by_length, pad_left
from gradmm.seeds import generator
from gradmm.tasks import TaskTokens

RANK = 16
LORA_RANK = 4  # a sketch on one side has as many rows as the maps have outputs: 4 x 442,368 numbers a text for phi-1.5
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

    @classmethod
    def of(cls, model: Model, tokens: TaskTokens, texts: Sequence[str], **options) -> "BodySketch":
        """With the model's preference over public texts."""
        return cls(label_preference(model, tokens, texts), **options)

    def layers(self, model: Model) -> dict[str, torch.nn.Module]:
        """The linear maps whose gradients are sketched, by name."""
        return linear_maps(model)

    def size(self, model: Model) -> int:
        """How many numbers a sketch has: M r^2."""
        return len(self.layers(model)) * self.rank**2

    def factors(self, model: Model, tokens: TaskTokens, sequences: Sequence[Sequence[int]], classes: Sequence[int]) -> Factors:
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
        layers, inputs, outputs = self.layers(model), {}, {}
        with ExitStack() as hooks, torch.enable_grad():
            for name, layer in layers.items():
                hooks.callback(layer.register_forward_hook(_recorder(name, inputs, outputs)).remove)
            embeds = model.embed(ids).detach().requires_grad_(True)
            hidden = model.body(inputs_embeds=embeds, attention_mask=mask, use_cache=False).last_hidden_state[:, -1]
            loss = cross_entropy(model.logits_of(hidden, tokens.labels) - self.preference.to(hidden.device), labels, reduction="sum")
            slopes = torch.autograd.grad(loss, [outputs[name] for name in layers])
        sketches = []
        for number, (name, slope) in enumerate(zip(layers, slopes, strict=True)):
            # Some families run N and T together (OPT).
            sides = [side.view(*mask.shape, -1) for side in self._sides(number, name, inputs[name], slope)]
            sketches.append(torch.einsum("nti,nto->nio", sides[0] * mask.unsqueeze(-1), sides[1]).flatten(1))
        return torch.cat(sketches, dim=1)

    def _sides(self, number: int, name: str, inputs: Tensor, slope: Tensor) -> tuple[Tensor, Tensor]:
        """What of a map's inputs and output gradients is multiplied: (..., in), (..., out) -> (..., r), (..., r)."""
        wide = torch.promote_types(inputs.dtype, torch.float32)
        return inputs.to(wide) @ self._matrix(number, "in", inputs), slope.to(wide) @ self._matrix(number, "out", slope)

    def _matrix(self, number: int, side: str, like: Tensor) -> Tensor:
        """P or Q of one map: (in or out, r)."""
        draw = torch.randn(like.shape[-1], self.rank, generator=generator(0, f"sketch {side}", number), dtype=torch.float64)
        return (draw / self.rank**0.5).to(like.device, torch.promote_types(like.dtype, torch.float32))


class LastBlockSketch(BodySketch):
    """The coordinates of sketched gradients of the linear maps of the last transformer block."""

    def layers(self, model: Model) -> dict[str, torch.nn.Module]:
        """The maps within the last block, by name.

        Raises:
            UserError: a model that keeps its blocks in no list.
        """
        require(model.last_block is not None, f"{model.name} keeps its blocks in no list, so none is the last: use the space 'body'")
        inside = set(model.last_block.modules())
        return {name: layer for name, layer in linear_maps(model).items() if layer in inside}


@dataclass(frozen=True, eq=False)
class LoraSketch(BodySketch):
    """The gradients of the matrices B of a fresh LoRA adapter, exactly: `adapters.add_lora` of seed 0 and rank r.

    A text has r numbers for each output of each map, so a pool of many texts of a large model wants a small rank.

    Attributes:
        preference: as in `BodySketch`.
        rank: r.
    """

    rank: int = LORA_RANK

    def size(self, model: Model) -> int:
        """How many numbers a sketch has: r times the maps' outputs."""
        return self.rank * sum(layer.nf if isinstance(layer, Conv1D) else layer.out_features for layer in self.layers(model).values())

    def _sides(self, number: int, name: str, inputs: Tensor, slope: Tensor) -> tuple[Tensor, Tensor]:
        wide = torch.promote_types(inputs.dtype, torch.float32)
        a = first_a(self.rank, inputs.shape[-1], 0, f"{name}.lora_A.default.weight")
        return inputs.to(wide) @ (SCALE * a.mT).to(inputs.device, wide), slope.to(wide)


def linear_maps(model: Model) -> dict[str, torch.nn.Module]:
    """The body's linear maps by name, in the order in which the model lists them."""
    inside = set(model.lm.base_model.modules())
    return {name: layer for name, layer in model.lm.named_modules() if layer in inside and isinstance(layer, (torch.nn.Linear, Conv1D))}


def _recorder(name: str, inputs: dict[str, Tensor], outputs: dict[str, Tensor]):
    def record(layer, given, output) -> None:
        inputs[name], outputs[name] = given[0].detach(), output

    return record
