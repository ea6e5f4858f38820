"""Pruned channels that stay pruned: clients would train them on, so the server switches them off after every round."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import nn

FILE = "mask.safetensors"
"""Name in a run's folder of what is switched off in its last model, where anything is."""

Mask = Mapping[str, torch.Tensor]
"""Parameter name -> (C,) bool: entries along its first dimension that are zero and stay so."""


def mask_of(model: nn.Module, pruned: Mapping[str, NDArray[np.bool_]]) -> Mask:
    """Return what a cleanup set to zero in its pruned channels: of a BatchNorm the scale alone, or its shift, too.

    Args:
        model: The repaired model.
        pruned: Per module, (C,) bool (``Clues.pruned``).
    """
    found = {}
    for module, off in pruned.items():
        for kind in ("weight", "bias"):
            name = f"{module}.{kind}" if module else kind
            parameter = dict(model.named_parameters()).get(name)
            if parameter is not None:
                zero = (parameter.detach().reshape(parameter.shape[0], -1) == 0).all(1).cpu()
                found[name] = zero & torch.from_numpy(np.asarray(off))
    return found


def joined(mask: Mask, more: Mask) -> Mask:
    """Return what one of two masks switches off."""
    return {**mask, **{name: off | mask[name] if name in mask else off for name, off in more.items()}}


def apply_mask(model: nn.Module, mask: Mask) -> None:
    """Switch the masked entries of a model off, in place."""
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, off in mask.items():
            parameters[name][off.to(parameters[name].device)] = 0.0


def mask_state(mask: Mask) -> dict[str, NDArray[np.bool_]]:
    """Return a mask as arrays for a checkpoint."""
    return {name: off.numpy() for name, off in mask.items()}


def mask_from(state: Mapping[str, NDArray[np.bool_]]) -> Mask:
    """Return the mask that ``mask_state`` took apart."""
    return {name: torch.from_numpy(off.copy()) for name, off in state.items()}


def save_mask(folder: Path, mask: Mask) -> None:
    """Write what stays switched off into a run's folder; nothing where nothing does."""
    if mask:
        save_file({name: off.contiguous() for name, off in mask.items()}, folder / FILE)


def load_mask(folder: Path) -> Mask:
    """Return what stays switched off in a run's last model; empty where nothing does."""
    found: Mask = load_file(folder / FILE) if (folder / FILE).is_file() else {}
    return found
