"""Whether what a method writes into a weight stays there: a computed one is computed anew at the next forward pass."""

from __future__ import annotations

from torch import nn

from fedbd.errors import MethodRefused

REMEDY = (
    "make it an ordinary parameter first (torch.nn.utils.parametrize.remove_parametrizations, for older hooks "
    "remove_weight_norm, remove_spectral_norm or prune.remove)"
)


def need_own_weights(name: str, module: nn.Module, method: str) -> None:
    """Check that weight and bias of a module are parameters of its own (or none), so that they can be changed in place.

    Those of a parametrized module (weight_norm, spectral_norm, prune) are computed from others: what is written into
    them is lost without a word.

    Args:
        name: The module's, for the message.
        module: Any module.
        method: Who asks, for the message.

    Raises:
        MethodRefused: If one of them is computed.
    """
    for entry in ("weight", "bias"):
        if hasattr(module, entry) and entry not in module._parameters:
            raise MethodRefused(
                f"{method} changes weights in place, and the {entry} of {name} is computed from other parameters, so "
                f"that a change would be lost; {REMEDY}"
            )
