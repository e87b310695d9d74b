"""LoRA through `peft`: train small matrices beside a frozen model's own, and fold them into it afterwards.

Knows no examples and no training. `peft` is the optional extra `lora`. Letters: r rank.
"""

import math

import torch
from transformers.pytorch_utils import Conv1D

from gradmm.errors import UserError
from gradmm.seeds import generator

ADAPTERS = ("lora",)
SCALE = 2  # peft's lora_alpha over r


def add_lora(lm: torch.nn.Module, rank: int, seed: int) -> None:
    """Put a pair of matrices A (r, inputs) and B (outputs, r) beside every linear layer but the head; only these learn.

    Source: Hu et al. 2022, arXiv 2106.09685. The model's outputs stay as they were until B has learnt something.

    Raises:
        UserError: `peft` is not installed.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise UserError(
            "adapter = 'lora' needs the package peft: install it with pip install 'gradmm[lora]'"
        ) from error
    transposed = any(isinstance(module, Conv1D) for module in lm.modules())  # GPT-2's layers hold W the other way round
    config = LoraConfig(r=rank, lora_alpha=SCALE * rank, target_modules="all-linear", fan_in_fan_out=transposed)
    with torch.random.fork_rng(devices=[]):  # peft draws from the global generator; what counts is drawn below
        inject_adapter_in_model(config, lm)
    start_lora(lm, seed)


@torch.no_grad()
def start_lora(lm: torch.nn.Module, seed: int) -> None:
    """Give the adapter the weights of step 0: B zero, A uniform as in a linear layer, by its name and the seed."""
    for name, weights in lm.named_parameters():
        if ".lora_A." in name:
            drawn = torch.rand(weights.shape, generator=generator(seed, "LoRA", name), dtype=torch.float64)
            weights.copy_(math.sqrt(1 / weights.shape[1]) * (2 * drawn - 1))
        elif ".lora_B." in name:
            weights.zero_()


def fold_lora(lm: torch.nn.Module) -> None:
    """Add B A to the weights beside which they stand and take the adapter away: what is left is a model like any other.

    By peft's own `merge` of each layer: its `merge_and_unload` belongs to a wrapper that nothing else here needs.
    """
    from peft.tuners.lora import LoraLayer

    for name, layer in [(name, module) for name, module in lm.named_modules() if isinstance(module, LoraLayer)]:
        layer.merge()
        lm.set_submodule(name, layer.get_base_layer())
