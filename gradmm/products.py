"""x W^T + b with frozen weights, also in bfloat16 on a processor that has no instructions for it. Knows no model.

There the framework multiplies bfloat16 several times as slowly as float32, and for a gradient tens of times. Here a part of
W at a time is widened to float32, and each result is rounded once, as those instructions do.
Letters: O rows of W, I its columns.
"""

import os
from functools import reduce
from operator import iadd

import torch
from torch import Tensor

WIDENED_AT_ONCE = 1 << 20  # numbers of W
FAST = ("amx_bf16", "avx512_bf16")  # what the framework calls a processor's instructions for bfloat16
INSTRUCTIONS = (*FAST, "bf16")  # and ARM's, about whose speed nothing is known here
COMPILED = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")  # oneDNN's and PyTorch's cache of compiled products
KEPT = "64"  # of each: a step has some twenty shapes of product


def fast_dtype(device: torch.device | str) -> torch.dtype:
    """The type in which a device multiplies matrices fastest without losing what the method needs.

    bfloat16 on a GPU that computes in it and on a processor with AMX or AVX-512 instructions for it; float32 elsewhere. The
    solver's state, the matching sums and every training stay in float32.
    """
    if torch.device(device).type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    return torch.bfloat16 if torch.device(device).type == "cpu" and _has_any(FAST) else torch.float32


def lacks_instructions(weight: Tensor) -> bool:
    """Whether a matrix is in bfloat16 on a processor that has no instructions for it."""
    return (weight.device.type, weight.dtype) == ("cpu", torch.bfloat16) and not _has_any(INSTRUCTIONS)


def keep_few_compiled() -> None:
    """Bound the memory of compiled products on a CPU; works before the process's first product in bfloat16.

    The framework compiles one for each shape, and texts of many lengths have many. It would keep 1024 in each of two caches,
    at half a megabyte; what is not there is compiled again in a millisecond. A capacity in the environment is left as it is.
    """
    for name in COMPILED:
        os.environ.setdefault(name, KEPT)


def _has_any(names: tuple[str, ...]) -> bool:
    found = torch.cpu.get_capabilities()
    return any(found.get(name) for name in names)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + b: (..., I), (O, I), (O,) -> (..., O); differentiable, in bfloat16 without instructions for it in x alone."""
    if lacks_instructions(weight) and not weight.requires_grad:
        return _Widened.apply(x, weight, bias)
    return torch.nn.functional.linear(x, weight, bias)


class _Widened(torch.autograd.Function):
    """`linear` in float32, rounded to x's type: the values O blocks of rows at a time, the gradient likewise."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        wide, value = x.float(), x.new_empty(*x.shape[:-1], len(weight))
        for rows in _blocks(weight):
            value[..., rows] = torch.nn.functional.linear(wide, weight[rows].float(), None if bias is None else bias[rows].float())
        return value

    @staticmethod
    def backward(ctx, slope: Tensor) -> tuple[Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        parts = (slope[..., rows].float() @ weight[rows].float() for rows in _blocks(weight))
        return reduce(iadd, parts).to(slope.dtype), None, None


def _blocks(weight: Tensor) -> list[slice]:
    """Rows of W that are widened together."""
    size = max(1, WIDENED_AT_ONCE // weight.shape[1])
    return [slice(first, first + size) for first in range(0, len(weight), size)]
