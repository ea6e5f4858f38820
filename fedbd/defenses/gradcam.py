"""Grad-CAM: which parts of an image a class's logit rests on.

R. R. Selvaraju, M. Cogswell, A. Das, R. Vedantam, D. Parikh, D. Batra, "Grad-CAM: Visual Explanations from Deep
Networks via Gradient-based Localization", ICCV 2017, https://arxiv.org/abs/1610.02391, section 3.

Differs from the paper: each map is divided by its largest value, so that maps can be compared by shape, not by
strength; one without any positive part stays zero.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - the name that every PyTorch user reads
from torch import Tensor, nn

from fedbd.errors import MethodRefused
from fedbd.models.taps import declared
from fedbd.training import evaluating, memory_format_of, need_gradients

CHUNK = 250


def gradcam(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """Return the Grad-CAM map of each image for one class.

    The weight of a channel is the mean over positions of the logit's gradient there (equation 1); the map is the
    positive part of the weighted sum of channels (equation 2), brought to the image's size bilinearly.

    Args:
        model: Declares ``maps``, the module whose (N, C, h, w) output is looked at; left untouched, and in its mode.
        images: (N, C, H, W) uint8, or float in [0, 1].
        labels: (N,) int64, the class whose logit is explained, per image.

    Returns:
        (N, H, W) float32 in [0, 1] on the CPU.

    Raises:
        MethodRefused: If the model declares no ``maps``, or they have no positions (a model without convolutions), or
            under ``torch.inference_mode()``.
    """
    need_gradients("gradcam cannot compute gradients")
    layer = model.get_submodule(declared(model, "maps", "gradcam"))
    with evaluating(model):
        parts = zip(torch.split(images, CHUNK), torch.split(labels, CHUNK), strict=True)
        return torch.cat([_maps(model, layer, x, y) for x, y in parts])


def _maps(model: nn.Module, layer: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    x = images.to(torch.float32).div(255.0) if images.dtype == torch.uint8 else images
    seen: list[Tensor] = []

    def cut(_: nn.Module, __: Any, out: Tensor) -> Tensor:
        seen.append(out.detach().clone().requires_grad_())  # the gradient need not go further back than this
        return seen[-1].clone()  # what follows may work in place

    handle = layer.register_forward_hook(cut)
    try:
        with torch.enable_grad():
            logits = model(x.contiguous(memory_format=memory_format_of(model)))
    finally:
        handle.remove()
    if not seen or seen[0].dim() != 4:
        raise MethodRefused("gradcam needs maps with positions, (N, C, h, w); take a model with convolutions")
    wanted = logits.gather(1, labels[:, None].to(logits.device)).sum()  # in eval mode images do not mix
    gradient = torch.autograd.grad(wanted, seen[0])[0]
    weights = gradient.mean((2, 3), keepdim=True)
    maps = F.relu((weights * seen[0].detach()).sum(1, keepdim=True))
    full = F.interpolate(maps, size=x.shape[-2:], mode="bilinear", align_corners=False)[:, 0]
    largest = full.amax((1, 2), keepdim=True)
    return torch.where(largest > 0, full / largest.clamp_min(torch.finfo(full.dtype).tiny), full).float().cpu()
