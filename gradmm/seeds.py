"""Named random generators: every draw is a function of (seed, purpose, unit), never of the order of calls."""

import hashlib

import torch

from gradmm.errors import require, short_repr


def stream(seed: int, purpose: str, unit: int | str = 0) -> int:
    """The 63-bit seed of the named stream; different names give unrelated streams.

    Raises:
        UserError: a seed that is no whole number.
    """
    require(hasattr(seed, "__index__"), f"seed = {short_repr(seed)}, it must be a whole number: give such as 0")
    digest = hashlib.sha256(f"{seed}/{purpose}/{unit}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def generator(seed: int, purpose: str, unit: int | str = 0) -> torch.Generator:
    """A CPU generator for one purpose and one unit (a group, a class, a run).

    Draws are made on the CPU and moved, so that a seed means the same on every device.
    """
    return torch.Generator().manual_seed(stream(seed, purpose, unit))
