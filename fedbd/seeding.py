"""One generator per (purpose, round, client), all from the scenario's seed.

Nothing depends on the order in which clients run, on how many workers there are or on which process asks: the seed of a
generator is a hash of what it is for. What draws from PyTorch's global state by itself, as Dropout does, is led to such
a generator where a model is trained (``layers_draw_from``).
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator

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


def peek(rng: torch.Generator) -> int:
    """Return a 62-bit number that a generator decides, without a draw from it."""
    ahead = torch.Generator(rng.device)
    ahead.set_state(rng.get_state())
    return int(torch.randint(2**62, (), generator=ahead, device=rng.device))


@contextlib.contextmanager
def layers_draw_from(rng: torch.Generator) -> Iterator[None]:
    """Within the block, what draws from PyTorch's global state (Dropout, stochastic depth) draws what ``rng`` decides.

    Nothing is drawn from ``rng``, so that other layers' results stay what they are without the block. Afterwards the
    global states, of the CPU and of GPUs that are in use, are what they were before.
    """
    seed = derive(peek(rng), "layers")
    gpus = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()  # type: ignore[no-untyped-call]
    with torch.random.fork_rng(devices=gpus):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would start GPUs that nobody uses, too
        if gpus:
            torch.cuda.manual_seed_all(seed)
        yield
