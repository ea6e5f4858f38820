"""Building a model without the global random state: empty memory first, then weights from a given generator.

PyTorch's layers draw from the global generator when they are constructed. Constructed on the meta device they draw
nothing; ``materialize`` then gives them memory and ``initialize`` every value in it. ``seeded`` is for models whose
rules of initialization are somebody else's: they draw from the global generator, which is seeded for them and then put
back as it was.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor, nn

Model = TypeVar("Model", bound=nn.Module)


@runtime_checkable
class DrawsItself(Protocol):
    """A module that sets the parameters that it holds itself, not through layers."""

    def draw(self, rng: torch.Generator) -> None:
        """Set them."""
        ...


def materialize(construct: Callable[[], Model]) -> Model:
    """Return a model with uninitialized memory on the CPU; the global random state is neither read nor changed."""
    with torch.device("meta"):
        model = construct()
    return model.to_empty(device="cpu")


def seeded(construct: Callable[[], Model], rng: torch.Generator) -> Model:
    """Return a model that draws its weights when it is constructed, decided by ``rng`` alone (one draw from it).

    The global random state is the same after it as before it.
    """
    seed = int(torch.randint(2**63 - 1, (), generator=rng))
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # of the CPU alone: torch.manual_seed would seed GPUs, too
        return construct()


def initialize(model: nn.Module, rng: torch.Generator, *, convolutions: Literal["he", "torch"]) -> None:
    """Set every parameter and buffer, layer by layer in the order of ``model.modules()``, weight before bias.

    Args:
        model: Made of Conv2d, Linear, BatchNorm2d, LayerNorm and modules with a method ``draw(rng)`` that sets what
            they hold themselves; its memory format must still be the contiguous one, so that the order of the draws
            does not depend on it.
        rng: The only source of the values.
        convolutions: ``torch``: PyTorch's default rule, U(-b, b) with b = 1 / sqrt(fan_in), for weights and biases.
            ``he``: N(0, 2 / fan_out) for convolutions (He et al. 2015), as Wide ResNets have it; linear weights as in
            ``torch``, all biases 0.

    Raises:
        TypeError: If a layer of another kind holds parameters or buffers: it would keep what was in its memory.
    """
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d | nn.LayerNorm):
            layer.reset_parameters()  # 1, 0 and empty statistics: nothing is drawn
        elif isinstance(layer, DrawsItself):
            layer.draw(rng)
        elif isinstance(layer, nn.Conv2d | nn.Linear):
            if convolutions == "he" and isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu", generator=rng)
            else:
                nn.init.kaiming_uniform_(layer.weight, a=math.sqrt(5), generator=rng)
            _set_bias(layer.bias, layer.weight, None if convolutions == "he" else rng)
        elif (
            next(layer.parameters(recurse=False), None) is not None
            or next(layer.buffers(recurse=False), None) is not None
        ):
            raise TypeError(f"initialize: no rule for {type(layer).__name__}")


def _set_bias(bias: Tensor | None, weight: Tensor, rng: torch.Generator | None) -> None:
    """Set a layer's bias, if it has one: 0, or PyTorch's default rule where there is a generator."""
    if bias is None:
        return
    if rng is None:
        nn.init.zeros_(bias)
        return
    bound = 1 / math.sqrt(math.prod(weight.shape[1:]))
    nn.init.uniform_(bias, -bound, bound, generator=rng)
