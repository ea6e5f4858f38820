"""WaNet: the image is bent, along one fixed smooth field, by less than the eye notices.

A. Nguyen, A. Tran, "WaNet - Imperceptible Warping-based Backdoor Attack", ICLR 2021, https://arxiv.org/abs/2102.10369,
the warping field: a k x k grid of random offsets, divided by their mean absolute value and scaled by s, made smooth by
bicubic interpolation, clipped to the image; code https://github.com/VinAIResearch/Warping-based_Backdoor_Attack-release.

Differs from the paper: the field is drawn from ``seed``, once for all images of a size (the code of RNP draws another
one for every image, which no model can learn). In images that are not square, offsets are scaled by the length of their
own axis. The noise mode is the attack's ``cover``.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - the name that every PyTorch user reads
from annotated_types import Ge, Gt
from torch import Tensor

from fedbd.method_fields import checks_fields
from fedbd.seeding import numpy_rng


@dataclass(frozen=True, kw_only=True)
@checks_fields
class WaNetTrigger:
    """Warps the image along a fixed smooth field.

    Attributes:
        k: Control points of the field in each direction.
        s: Strength: the mean offset of the control points is s / 2 pixels along each axis.
        seed: Decides the field.
    """

    k: Annotated[int, Ge(2)] = 4
    s: Annotated[float, Gt(0)] = 0.5
    seed: Annotated[int, Ge(0)] = 0

    def stamp(self, images: Tensor) -> Tensor:
        """Return stamped copies.

        Args:
            images: (N, C, H, W) float in [0, 1]; left untouched.

        Returns:
            (N, C, H, W) of the same dtype, device and memory format.
        """
        grid = _field(self.k, self.s, self.seed, *images.shape[-2:]).to(images.device, images.dtype)
        return _sampled(images, grid.expand(len(images), -1, -1, -1))

    def disturbed(self, images: Tensor, rng: torch.Generator) -> Tensor:
        """Return copies warped along the field and, on top, by noise that is drawn anew for each image and pixel.

        Args:
            images: As in ``stamp``.
            rng: Draws the noise, on the CPU: up to half a pixel along each axis.
        """
        height, width = images.shape[-2:]
        grid = _field(self.k, self.s, self.seed, height, width).to(images.device, images.dtype)
        noise = torch.rand(len(images), height, width, 2, generator=rng).to(images.device, images.dtype)
        step = torch.tensor([width, height], device=images.device, dtype=images.dtype)
        return _sampled(images, (grid + (2 * noise - 1) / step).clamp_(-1.0, 1.0))


def _sampled(images: Tensor, grid: Tensor) -> Tensor:
    warped = F.grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=True)
    return torch.empty_like(images).copy_(warped.clamp_(0.0, 1.0))


@lru_cache(maxsize=8)
def _field(k: int, s: float, seed: int, height: int, width: int) -> Tensor:
    """Return where each pixel is taken from, (1, H, W, 2) float32 in [-1, 1], x before y."""
    drawn = 2 * numpy_rng(seed, "trigger/wanet").random((1, 2, k, k)) - 1
    control = torch.from_numpy(drawn / np.abs(drawn).mean())
    smooth = F.interpolate(control, size=(height, width), mode="bicubic", align_corners=True)
    offsets = s * smooth.permute(0, 2, 3, 1) / torch.tensor([width, height], dtype=torch.float64)
    y, x = torch.meshgrid(_axis(height), _axis(width), indexing="ij")
    return (torch.stack([x, y], dim=-1)[None] + offsets).clamp_(-1.0, 1.0).to(torch.float32)


def _axis(length: int) -> Tensor:
    return torch.linspace(-1.0, 1.0, length, dtype=torch.float64)
