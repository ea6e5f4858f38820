"""Accuracy against the number of channels of the last maps that are switched off, one after the other.

What comes before the last maps is the same for every number of channels and is computed once. The pruning is that of
H. Cheng et al., 2020, https://arxiv.org/abs/2002.12162 (see ``linf_pruning``), whose authors say nothing of a curve.
"""

from __future__ import annotations

import copy

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fedbd.defenses.cleanup.channel_norms import silence
from fedbd.metrics import logits
from fedbd.models.taps import prunable, readings
from fedbd.types import Samples

METHOD = "pruning_curve"


def right(model: nn.Module, data: Samples) -> int:
    """Return how many samples a model gets right."""
    return _right(logits(model, data), data)


def pruning_curve(model: nn.Module, order: NDArray[np.int64], validate: Samples) -> list[int]:
    """Return how many samples are right with the first 0, 1, 2 ... channels of an order switched off.

    Args:
        model: Declares ``maps`` (or ``prunable``) and ``channels``; left untouched.
        order: (K,) channels, all different.
        validate: At least one sample.

    Returns:
        K + 1 counts; the first is the model's own.
    """
    stages = _quick_logits(model, order, validate)
    # Something that reads `channels` or the images past `maps` shows at one of the ends.
    if (
        stages is not None
        and _close(stages[0], model, validate)
        and _close(stages[-1], _without(model, order), validate)
    ):
        return [_right(stage, validate) for stage in stages]
    return [right(_without(model, order[:count]), validate) for count in range(len(order) + 1)]


def _without(model: nn.Module, channels: NDArray[np.int64]) -> nn.Module:
    """Return a copy with some of the channels switched off."""
    pruned, name = copy.deepcopy(model), str(model.channels)
    everything = np.arange(len(pruned.get_parameter(f"{name}.weight")))
    silence(pruned, {name: np.isin(everything, channels)})
    return pruned


class _Tail(nn.Module):
    """What a model makes of what was computed before: it runs on one image, and goes on from given values.

    In a plain network these are the last maps, channels already off. Where a shortcut leads past the prunable maps,
    they are what the block around both takes in, and the channels are switched off inside.
    """

    def __init__(self, model: nn.Module, image: Tensor) -> None:
        super().__init__()
        self.model, self.image = model, image
        self.maps = prunable(model, METHOD)
        self.block = self.maps.rpartition(".")[0] if getattr(model, "prunable", "") else ""
        self.off = torch.empty(0, dtype=torch.int64)

    def computed_before(self, validate: Samples) -> Tensor:
        """Return the values to go on from, (N, ...)."""
        return readings(self.model, self.block or self.maps, validate, inputs=bool(self.block))

    def forward(self, values: Tensor) -> Tensor:
        maps = self.model.get_submodule(self.maps)
        if self.block:
            block = self.model.get_submodule(self.block)
            handles = [
                block.register_forward_pre_hook(lambda *_: (values,)),
                maps.register_forward_hook(lambda _, __, out: out.index_fill(1, self.off, 0.0)),
            ]
        else:
            handles = [maps.register_forward_hook(lambda *_: values.index_fill(1, self.off, 0.0))]
        try:
            out: Tensor = self.model(self.image.to(values.device))
            return out
        finally:
            for handle in handles:
                handle.remove()


def _quick_logits(model: nn.Module, order: NDArray[np.int64], validate: Samples) -> list[Tensor] | None:
    """Return the logits of each stage with what comes before computed once, None if the tail takes more than that."""
    tail = _Tail(model, validate.batch(torch.tensor([0]))[0])
    values = tail.computed_before(validate)
    stages = []
    try:
        for count in range(len(order) + 1):
            tail.off = torch.from_numpy(order[:count])
            stages.append(logits(tail, values, threads=1))  # one model, one hook
    except RuntimeError:  # shapes that do not fit: a way past the maps
        return None
    return stages


def _close(quick: Tensor, model: nn.Module, data: Samples) -> bool:
    whole = logits(model, data)
    return quick.shape == whole.shape and torch.allclose(quick, whole, rtol=1e-4, atol=1e-5, equal_nan=True)


def _right(found: Tensor, data: Samples) -> int:
    """Count as ``metrics.predict`` does: logits with a NaN are right nowhere."""
    labels = found.argmax(1).masked_fill(found.isnan().any(1), -1)
    return int((labels == data.labels.cpu()).sum())
