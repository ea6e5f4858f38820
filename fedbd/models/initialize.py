"""Building a model without the global random state: empty memory first, then weights from a given generator.

PyTorch's layers draw from the global generator when they are constructed. Constructed on the meta device they draw
nothing; ``materialize`` then gives them memory and ``initialize`` every value in it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, TypeVar

import torch
from torch import Tensor, nn

Model = TypeVar("Model", bound=nn.Module)


def materialize(construct: Callable[[], Model]) -> Model:
    """Return a model with uninitialized memory on the CPU; the global random state is neither read nor changed."""
    with torch.device("meta"):
        model = construct()
    return model.to_empty(device="cpu")


def initialize(model: nn.Module, rng: torch.Generator, *, convolutions: Literal["he", "torch"]) -> None:
    """Set every parameter and buffer, layer by layer in the order of ``model.modules()``, weight before bias.

    Args:
        model: Made of Conv2d, Linear and BatchNorm2d; its memory format must still be the contiguous one, so that the
            order of the draws does not depend on it.
        rng: The only source of the values.
        convolutions: ``torch``: PyTorch's default rule, U(-b, b) with b = 1 / sqrt(fan_in), for weights and biases.
            ``he``: N(0, 2 / fan_out) for convolutions (He et al. 2015), as Wide ResNets have it; linear weights as in
            ``torch``, all biases 0.

    Raises:
        TypeError: If a layer of another kind holds parameters or buffers: it would keep what was in its memory.
    """
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.reset_parameters()  # 1, 0 and empty statistics: nothing is drawn
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
