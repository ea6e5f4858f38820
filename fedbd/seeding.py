"""One generator per (purpose, round, client), all from the scenario's seed.

Nothing depends on the order in which clients run, on how many workers there are or on which process asks: the seed of a
generator is a hash of what it is for.
"""

from __future__ import annotations

import hashlib

import numpy as np
import torch


def derive(seed: int, purpose: str, *where: int) -> int:
    """Return a 63-bit seed for one purpose.

    Args:
        seed: The scenario's seed, any int.
        purpose: What the numbers are for (``"cohort"``, ``"train"``); different purposes give unrelated streams.
        where: Round, client and the like, in an order that belongs to the purpose.
    """
    text = "/".join([str(seed), purpose, *map(str, where)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def torch_rng(seed: int, purpose: str, *where: int) -> torch.Generator:
    """Return a CPU ``torch.Generator`` for one purpose (see ``derive``)."""
    return torch.Generator().manual_seed(derive(seed, purpose, *where))


def numpy_rng(seed: int, purpose: str, *where: int) -> np.random.Generator:
    """Return a ``numpy.random.Generator`` (PCG64) for one purpose (see ``derive``)."""
    return np.random.Generator(np.random.PCG64(derive(seed, purpose, *where)))
