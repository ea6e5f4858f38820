"""Masks on BatchNorm scales: to learn which channels matter, and to prune those that do not."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - the name that every PyTorch user reads
from numpy.typing import NDArray
from torch import Tensor, nn

from fedbd.errors import MethodRefused
from fedbd.training import TrainingPlan, crop_flip, memory_format_of
from fedbd.types import Samples

Masks = Mapping[str, NDArray[np.float32]]
"""Per BatchNorm2d, by its name in the model: (C,) float32 in [0, 1]."""


class MaskedBatchNorm2d(nn.Module):
    """``BN(x; mask * gamma, beta)``: a mask on the scale alone, so that a channel with mask 0 is the constant beta."""

    def __init__(self, norm: nn.BatchNorm2d) -> None:
        """Wrap an affine ``norm``; the mask, (C,), starts at 1."""
        super().__init__()
        self.norm = norm
        self.mask = nn.Parameter(torch.ones_like(norm.weight))

    def forward(self, x: Tensor) -> Tensor:
        """Return (N, C, H, W) of (N, C, H, W).

        Train mode normalizes by the batch and leaves the running statistics alone: nobody uses this network later.
        """
        norm = self.norm
        running = (None, None) if self.training else (norm.running_mean, norm.running_var)
        batch = self.training or norm.running_mean is None
        return F.batch_norm(x, *running, norm.weight * self.mask, norm.bias, batch, 0.0, norm.eps)


def batchnorms(model: nn.Module, method: str) -> dict[str, nn.BatchNorm2d]:
    """Return a model's affine BatchNorm2d modules by name, in the model's order.

    Args:
        model: Any model.
        method: Who asks, for the message.

    Raises:
        MethodRefused: If there is none.
    """
    found = {name: module for name, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)}
    affine = {name: module for name, module in found.items() if module.affine}
    if not affine:
        raise MethodRefused(
            f"{method} masks BatchNorm2d scales and the model has none; take a model with BatchNorm (cnn, wrn16-1)"
        )
    return affine


def recover_masks(
    model: nn.Module, data: Samples, plan: TrainingPlan, alpha: float, rng: torch.Generator, method: str
) -> Masks:
    """Learn which channels of an unlearned model must be dimmed for it to get clean data right again.

    Only the masks are trained, by SGD on ``alpha`` times the cross-entropy, in train mode, clamped to [0, 1] after
    every step.

    Args:
        model: The unlearned model; left untouched.
        data: Clean samples.
        plan: Epochs, rate, momentum, batches and augmentation; its weight decay is not used.
        alpha: Factor of the loss.
        rng: Draws orders and augmentation.
        method: Who asks, for the message.

    Raises:
        MethodRefused: If the model has no BatchNorm2d.
    """
    network = copy.deepcopy(model).requires_grad_(False)
    layout = memory_format_of(network)
    masked = {name: MaskedBatchNorm2d(norm) for name, norm in batchnorms(network, method).items()}
    for name, module in masked.items():
        parent, _, last = name.rpartition(".")
        setattr(network.get_submodule(parent), last, module)
    network.train()
    masks = [module.mask for module in masked.values()]
    optimizer = torch.optim.SGD(masks, lr=plan.lr, momentum=plan.momentum)
    for epoch in range(plan.epochs):
        for group in optimizer.param_groups:
            group["lr"] = plan.rate(epoch)
        for index in torch.split(torch.randperm(len(data), generator=rng), plan.batch_size):
            x, y = data.batch(index)
            x = crop_flip(x, rng) if plan.augment == "crop_flip" else x
            optimizer.zero_grad(set_to_none=True)
            loss = alpha * F.cross_entropy(network(x.contiguous(memory_format=layout)), y)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            with torch.no_grad():
                for mask in masks:
                    mask.clamp_(0.0, 1.0)
    return {name: module.mask.detach().cpu().numpy() for name, module in masked.items()}


def prune(model: nn.Module, masks: Masks, threshold: float) -> tuple[nn.Module, int]:
    """Set the BatchNorm scale of every channel with a mask at or below ``threshold`` to 0; the shift stays.

    Args:
        model: Left untouched.
        masks: By BatchNorm name.
        threshold: Compared in float64, inclusive.

    Returns:
        A pruned copy in the model's mode, and the number of pruned channels.
    """
    pruned, count = copy.deepcopy(model), 0
    for name, mask in masks.items():
        off = mask.astype(np.float64) <= threshold
        scale = pruned.get_parameter(f"{name}.weight" if name else "weight")
        with torch.no_grad():
            scale[torch.from_numpy(off).to(scale.device)] = 0.0
        count += int(off.sum())
    return pruned, count
