"""How strongly each channel of the last maps answers to images, in three norms, and switching channels off wholly.

H. Cheng, K. Xu, S. Liu, P.-Y. Chen, P. Zhao, X. Lin, "Defending against Backdoor Attack on Deep Neural Networks", 2020,
https://arxiv.org/abs/2002.12162: a trigger is said to shift the l-infinity norm of a channel's activation map far more
than its l1 and l2 norms.

Differs from the paper: only its abstract could be read; that a channel's norm is averaged over images before two kinds
of images are compared is fedbd's reading.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fedbd.defenses.own_weights import need_own_weights
from fedbd.errors import MethodRefused
from fedbd.metrics import Stamp
from fedbd.models.taps import declared, prunable, readings
from fedbd.types import Notes, Samples

NORMS = ("linf", "l1", "l2")
"""The order in which ties between norms and printed columns stand."""

Switch = nn.BatchNorm2d | nn.GroupNorm | nn.Conv2d | nn.Linear
"""What has a scale (or filter) and mostly a shift (or bias) per channel, which switch one off."""

Norms = Mapping[str, NDArray[np.float64]]
"""Per norm of ``NORMS``: (C,) float64, one value per channel of the model's last maps."""


def _norms_of_maps(maps: Tensor) -> Tensor:
    """Return (B, 3, C) float64 norms over the positions of (B, C, H, W) maps; (B, C) features have one position."""
    flat = maps.to(torch.float64).reshape(*maps.shape[:2], -1).abs()
    return torch.stack([flat.amax(2), flat.sum(2), flat.square().sum(2).sqrt()], dim=1)


def channel_norms(
    model: nn.Module, images: Tensor | Samples, *, stamp: Stamp | None = None, method: str = "channel_norms"
) -> dict[str, NDArray[np.float64]]:
    """Return the norms of every channel's activation map at the model's last prunable maps, averaged over images.

    Args:
        model: Declares ``maps`` (or ``prunable``), which are activated already; left in the mode it was in.
        images: (N, C, H, W), uint8 or float in [0, 1], at least one.
        stamp: Rewrites float images first (``Trigger.stamp``).
        method: Who asks, for the message.

    Returns:
        By ``linf`` (the largest absolute value), ``l1`` (the sum of absolute values) and ``l2`` over the positions of
        the map: (C,) float64, >= 0.

    Raises:
        MethodRefused: If the model declares no ``maps``.
        ValueError: If there are no images.
    """
    if len(images) == 0:
        raise ValueError("norms of no images")
    found = readings(model, prunable(model, method), images, read=_norms_of_maps, stamp=stamp).mean(0)
    return {name: found[row].numpy() for row, name in enumerate(NORMS)}


def norm_ratios(clean: Norms, triggered: Norms) -> dict[str, NDArray[np.float64]]:
    """Return by how much triggered images raise each channel's norm.

    Args:
        clean: ``channel_norms`` of clean images.
        triggered: That of triggered ones.

    Returns:
        Per norm, (C,) float64 triggered / clean: 1 is no change. A channel silent on both is 1, one that is silent on
        clean images alone is infinite.
    """
    ratios = {}
    for name in NORMS:
        silent = clean[name] == 0
        silent_ratio = np.where(triggered[name] == 0, 1.0, np.inf)
        ratios[name] = np.where(silent, silent_ratio, triggered[name] / np.where(silent, 1.0, clean[name]))
    return ratios


def bias_claim(ratios: Norms) -> Notes:
    """Return what the paper's claim comes to on one model, as plain values.

    Args:
        ratios: Of ``norm_ratios``.

    Returns:
        Per norm ``max`` and ``median`` over the channels with a finite ratio (null without one) and ``channel`` (where
        the maximum is); ``silent_on_clean`` (channels with an infinite ratio, which are in no statistic), and
        ``linf_shifts_most``: whether the largest l-infinity ratio is above the largest l1 and l2 ratios. How far above
        is the reader's to judge: the abstract gives no bound for "far more".
    """
    notes: Notes = {name: _spread(ratios[name]) for name in NORMS}
    highest = {name: -math.inf if notes[name]["max"] is None else notes[name]["max"] for name in NORMS}
    notes["silent_on_clean"] = int(np.isinf(ratios["linf"]).sum())
    notes["linf_shifts_most"] = highest["linf"] > max(highest["l1"], highest["l2"])
    return notes


def _spread(ratio: NDArray[np.float64]) -> dict[str, float | int | None]:
    finite = np.flatnonzero(np.isfinite(ratio))
    if not finite.size:
        return {"max": None, "median": None, "channel": None}
    top = int(finite[ratio[finite].argmax()])
    return {"max": float(ratio[top]), "median": float(np.median(ratio[finite])), "channel": top}


def channels_module(model: nn.Module, method: str) -> tuple[str, Switch]:
    """Return the name and the module of the model's ``channels``, whose parameters switch one of the last maps off.

    Args:
        model: Any model.
        method: Who asks, for the message.

    Raises:
        MethodRefused: If the model declares none, or one without a scale or filter per channel, or with one that is
            computed from other parameters.
    """
    name = str(declared(model, "channels", method))
    module = model.get_submodule(name)
    need_own_weights(name, module, method)
    if isinstance(module, nn.Conv2d | nn.Linear):
        return name, module
    if isinstance(module, nn.BatchNorm2d | nn.GroupNorm) and module.affine:
        return name, module
    raise MethodRefused(
        f"{method} switches channels off and the model's `channels`, {name}, is a {type(module).__name__} without a "
        "scale or filter per channel; let it name the affine BatchNorm2d, Conv2d or Linear before the last activation"
    )


def need_same_layer(model: nn.Module, count: int, method: str) -> None:
    """Check that the model's ``channels`` are so many as its maps have.

    Raises:
        MethodRefused: If not.
    """
    name, module = channels_module(model, method)
    if count != len(module.weight):
        raise MethodRefused(
            f"{method}: the model's `maps` have {count} channels and its `channels`, {name}, {len(module.weight)}; set "
            "both to the same layer"
        )


def silence(model: nn.Module, off: Mapping[str, NDArray[np.bool_]]) -> None:
    """Make channels exactly 0, in place: scale and shift of a normalization, else filter (or weights) and bias.

    Args:
        model: Changed.
        off: By module name, (C,) bool.

    Raises:
        MethodRefused: If scale, filter or shift of one are computed from other parameters.
    """
    with torch.no_grad():
        for name, channels in off.items():
            module = model.get_submodule(name)
            need_own_weights(name, module, "pruning")
            for entry in (module.weight, module.bias):
                if isinstance(entry, Tensor):
                    entry[torch.from_numpy(channels).to(entry.device)] = 0.0
