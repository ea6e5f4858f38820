"""Masks on channels: to learn which channels matter, and to switch off those that do not.

Where a model has BatchNorm, a mask multiplies the BatchNorm's scale (RNP, https://arxiv.org/abs/2305.14876, as its code
has it): a channel that is off is the constant shift, which later layers are used to. Where it has none, a mask
multiplies a convolution's output, which is the same as its filter and bias: a channel that is off is 0 everywhere. The
bias goes with the filter because without BatchNorm it is no mean of the channel, and because switching off must do
what a mask of 0 did while the masks were learned.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - the name that every PyTorch user reads
from numpy.typing import NDArray
from torch import Tensor, nn

from fedbd.defenses.own_weights import need_own_weights
from fedbd.errors import MethodRefused
from fedbd.models.norms import replace_modules
from fedbd.training import TrainingPlan, crop_flip, learning, memory_format_of
from fedbd.types import Samples

Masks = Mapping[str, NDArray[np.float32]]
"""Per BatchNorm2d (or Conv2d), by its name in the model: (C,) float32 in [0, 1]."""

Masked = Literal["batchnorm", "convolution"]
"""What masks multiply: BatchNorm scales, or convolutions' filters and biases."""

REMEDY = (
    "take a model with trainable BatchNorm2d scales (cnn, wrn16-1, resnet18), or with convolutions and no normalization"
)


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


class MaskedConv2d(nn.Module):
    """``mask * conv(x)``: a mask on filter and bias, so that a channel with mask 0 is 0."""

    def __init__(self, conv: nn.Conv2d) -> None:
        """Wrap ``conv``; the mask, (C,), starts at 1."""
        super().__init__()
        self.conv = conv
        self.mask = nn.Parameter(conv.weight.new_ones(conv.out_channels))

    def forward(self, x: Tensor) -> Tensor:
        """Return (N, C, H', W') of (N, C', H, W)."""
        out: Tensor = self.conv(x)
        return out * self.mask[:, None, None]


def maskable(model: nn.Module, method: str) -> tuple[Masked, dict[str, nn.Module]]:
    """Return what masks multiply in a model, and the modules by name, in the model's order.

    BatchNorm2d with trainable scales where there is one; the convolutions of a model with no normalization at all else.

    Args:
        model: Any model.
        method: Who asks, for the message.

    Raises:
        MethodRefused: If masks would mean nothing. BatchNorm with frozen scales: the model's owner does not let them
            change. Convolutions in front of another normalization (GroupNorm, LayerNorm, a BatchNorm without scales):
            it divides the mask out again. Neither: there is no channel to mask. Scales or filters that are computed
            from other parameters: a mask on them would be lost.
    """
    named = list(model.named_modules())
    norms = [(name, module) for name, module in named if isinstance(module, nn.BatchNorm2d) and module.affine]
    trainable = {name: module for name, module in norms if module.weight.requires_grad}
    for name, scaled in trainable.items():
        need_own_weights(name, scaled, method)
    if trainable:
        return "batchnorm", dict(trainable)
    if norms:
        raise MethodRefused(
            f"{method} masks BatchNorm2d scales and all of the model's are frozen; call model.requires_grad_(True) or "
            "take a model that trains them"
        )
    convolutions: dict[str, nn.Module] = {name: module for name, module in named if isinstance(module, nn.Conv2d)}
    for name, module in convolutions.items():  # first: a weight norm's own module has a normalization's name
        need_own_weights(name, module, method)
    # A parametrization of another layer's weight (weight_norm) has a normalization's name and is none.
    layers = [module for name, module in named if ".parametrizations." not in f".{name}."]
    other = next((type(module).__name__ for module in layers if _normalizes(module)), None)
    if other is not None:
        raise MethodRefused(
            f"{method} cannot mask the channels of a model with {other} and without BatchNorm2d scales: the "
            f"normalization takes a mask on the convolution back; {REMEDY}"
        )
    if not convolutions:
        raise MethodRefused(f"{method} masks channels and the model has neither BatchNorm2d nor Conv2d; {REMEDY}")
    return "convolution", convolutions


def _normalizes(module: nn.Module) -> bool:
    """Say whether a module is a normalization layer, by its name: third parties have their own (FrozenBatchNorm2d)."""
    return re.search(r"Norm([123]d)?$", type(module).__name__) is not None


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
        rng: Draws orders and augmentation; decides what Dropout drops.
        method: Who asks, for the message.

    Raises:
        MethodRefused: If the model has nothing to mask (``maskable``).
    """
    network = copy.deepcopy(model)
    layout = memory_format_of(network)
    found = maskable(network, method)[1]
    masked = {name: _wrapped(module) for name, module in found.items()}
    network.requires_grad_(False)
    replace_modules(network, {module: masked[name] for name, module in found.items()})
    network.train()
    masks = [module.mask for module in masked.values()]
    optimizer = torch.optim.SGD(masks, lr=plan.lr, momentum=plan.momentum)
    with learning(rng):
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


def _wrapped(module: nn.Module) -> MaskedBatchNorm2d | MaskedConv2d:
    if isinstance(module, nn.BatchNorm2d):
        return MaskedBatchNorm2d(module)
    assert isinstance(module, nn.Conv2d)
    return MaskedConv2d(module)


def multiplied(model: nn.Module, masks: Masks) -> nn.Module:
    """Return a copy with masks multiplied into its parameters: BatchNorm scales, or filters and biases.

    Args:
        model: Left untouched; the copy is in its mode and keeps its running statistics, which fit the model without
            the masks (``recalibrate``).
        masks: By module name, (C,) in [0, 1].
    """
    changed = copy.deepcopy(model)
    with torch.no_grad():
        for name, mask in masks.items():
            module = changed.get_submodule(name)
            factor = torch.from_numpy(mask)
            if isinstance(module, nn.BatchNorm2d):
                module.weight.mul_(factor.to(module.weight))
                continue
            assert isinstance(module, nn.Conv2d)
            module.weight.mul_(factor.to(module.weight)[:, None, None, None])
            if module.bias is not None:
                module.bias.mul_(factor.to(module.bias))
    return changed


def at_most(masks: Masks, threshold: float) -> dict[str, NDArray[np.bool_]]:
    """Return per module which channels have a mask at or below ``threshold`` (compared in float64), (C,) bool."""
    return {name: mask.astype(np.float64) <= threshold for name, mask in masks.items()}


def switch_off(model: nn.Module, off: Mapping[str, NDArray[np.bool_]]) -> nn.Module:
    """Return a copy with channels switched off.

    Args:
        model: Left untouched; the copy is in its mode.
        off: By module name, (C,) bool. Of a BatchNorm2d the scale becomes 0 and the shift stays; of a Conv2d filter and
            bias become 0.

    Raises:
        MethodRefused: If scale, filter or bias of one are computed from other parameters.
    """
    changed = copy.deepcopy(model)
    with torch.no_grad():
        for name, channels in off.items():
            module = changed.get_submodule(name)
            need_own_weights(name, module, "pruning")
            entries = [module.weight] if isinstance(module, nn.BatchNorm2d) else [module.weight, module.bias]
            for entry in entries:
                if isinstance(entry, Tensor):
                    entry[torch.from_numpy(channels).to(entry.device)] = 0.0
    return changed


def both(
    earlier: Mapping[str, NDArray[np.bool_]], later: Mapping[str, NDArray[np.bool_]]
) -> dict[str, NDArray[np.bool_]]:
    """Return the channels that either of two prunings switched off: a chain of them hands on what all have done."""
    return {
        name: np.logical_or(earlier.get(name, False), later.get(name, False))
        for name in dict.fromkeys([*earlier, *later])
    }


def recalibrate(model: nn.Module, data: Samples, batch_size: int = 256) -> None:
    """Set the running statistics of every BatchNorm2d to those of clean data, in place.

    Args:
        model: Ends in eval mode.
        data: Clean samples, not augmented, in their order.
        batch_size: Images per pass at most. Passes are of near-equal size and the statistics are their plain mean.
    """
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d) and m.track_running_stats]
    momenta = [norm.momentum for norm in norms]
    model.eval()
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # PyTorch's word for a plain mean over passes
        norm.train()
    layout = memory_format_of(model)
    with torch.no_grad():
        for index in torch.tensor_split(torch.arange(len(data)), -(-len(data) // batch_size)) if norms else ():
            model(data.batch(index)[0].contiguous(memory_format=layout))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        norm.eval()
