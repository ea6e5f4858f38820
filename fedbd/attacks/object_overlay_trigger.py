"""A physical-style trigger: an object in the scene, in another pose and light on every image.

E. Wenger, J. Passananti, A. N. Bhagoji, Y. Yao, H. Zheng, B. Y. Zhao, "Backdoor Attacks Against Deep Learning Systems
in the Physical World", CVPR 2021, https://arxiv.org/abs/2006.14580, photographs people with sunglasses, stickers and
other objects. X. Chen, C. Liu, B. Li, K. Lu, D. Song, "Targeted Backdoor Attacks on Deep Learning Systems Using Data
Poisoning", 2017, https://arxiv.org/abs/1712.05526, draws glasses on faces ("accessory injection").

Differs from the paper: nothing is photographed; sunglasses or a round sticker are drawn from formulas, and place, size,
turn and brightness vary within bounds. What they are for an image follows from ``seed`` and the image's own pixels
(their BLAKE2b hash), not from a generator: stamping is repeatable, whatever the batch, the epoch or the process.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
import torch
from annotated_types import Ge, Gt, Le, Lt
from numpy.typing import NDArray
from torch import Tensor

from fedbd.attacks.drawn_objects import NOTHING, OBJECTS
from fedbd.attacks.stamping import need_gray_or_color
from fedbd.errors import Problem, UserError
from fedbd.method_fields import checks_fields
from fedbd.seeding import derive
from fedbd.types import quantized

FINE = 3
"""Samples per pixel and direction: edges are smooth."""

AT_ONCE = 2**19
"""Samples that are held at once."""

LEAST = 4.0
"""Pixels that an object must be wide to be one."""

LUMA = (0.299, 0.587, 0.114)
"""What a color is in gray."""


@dataclass(frozen=True, kw_only=True)
@checks_fields
class ObjectOverlayTrigger:
    """Draws an object over the image; pose and brightness follow from the seed and the image itself.

    Attributes:
        object: ``sunglasses`` (dark lenses, a bright frame) or ``sticker`` (a round yellow face).
        width: Width of the object as a share of the image's; null: 0.85 for sunglasses, 0.4 for a sticker.
        right: Where its center is, as a share of the image's width from the right edge; null: 0.5, or 0.26.
        bottom: The same from the lower edge; null: 0.62, or 0.26.
        shift: It is moved by up to this share of the image in each direction.
        turn: It is turned by up to so many degrees to either side.
        zoom: Its width varies by up to this share.
        brightness: Its colors vary by up to this share, clamped to [0, 1].
        seed: Decides, with the image, what they are.
    """

    object: Literal["sunglasses", "sticker"] = "sunglasses"
    width: Annotated[float, Gt(0), Le(1)] | None = None
    right: Annotated[float, Ge(0), Le(1)] | None = None
    bottom: Annotated[float, Ge(0), Le(1)] | None = None
    shift: Annotated[float, Ge(0), Le(0.5)] = 0.06
    turn: Annotated[float, Ge(0), Le(180)] = 15.0
    zoom: Annotated[float, Ge(0), Lt(1)] = 0.15
    brightness: Annotated[float, Ge(0), Le(1)] = 0.25
    seed: Annotated[int, Ge(0)] = 0

    def stamp(self, images: Tensor) -> Tensor:
        """Return stamped copies; what is drawn on an image does not depend on the others.

        Args:
            images: (N, C, H, W) float in [0, 1], C 1 or 3; left untouched. Images that are equal as uint8 get the same
                pose and brightness.

        Returns:
            (N, C, H, W) of the same dtype, device and memory format.

        Raises:
            UserError: If the object would be narrower than 4 pixels, or the images have neither 1 nor 3 channels.
        """
        need_gray_or_color(images, "the object")
        height, width = images.shape[-2:]
        wide = (OBJECTS[self.object].width if self.width is None else self.width) * width
        if wide * (1 - self.zoom) < LEAST:
            expected = f"needs images on which the object is at least {LEAST:g} pixels wide"
            got, remedy = f"{wide * (1 - self.zoom):.3g}", "raise width, lower zoom or take larger images"
            raise UserError([Problem(path="trigger", expected=expected, got=got, remedy=remedy)])
        stamped = images.clone()
        at_once = max(1, AT_ONCE // (FINE * FINE * height * width))
        for start in range(0, len(images), at_once):
            part = stamped[start : start + at_once]
            seen, cover = self._drawn(self._draws(part), wide, height, width)
            if part.shape[1] == 1:
                seen = sum((seen[:, c : c + 1] * LUMA[c] for c in range(3)), torch.zeros_like(cover))
            part.mul_((1.0 - cover).to(part.device, part.dtype)).add_(seen.to(part.device, part.dtype))
        return stamped.clamp_(0.0, 1.0)

    def _draws(self, images: Tensor) -> NDArray[np.float64]:
        """Return five numbers in [-1, 1) for each image, (N, 5)."""
        key = derive(self.seed, "trigger/object_overlay").to_bytes(8, "big")
        pixels = quantized(images).cpu().contiguous().numpy()
        digests = [hashlib.blake2b(image.tobytes(), digest_size=40, key=key).digest() for image in pixels]
        numbers = np.frombuffer(b"".join(digests), dtype=">u8").reshape(len(digests), 5)
        return numbers.astype(np.float64) / 2.0**63 - 1.0

    def _drawn(self, draws: NDArray[np.float64], wide: float, height: int, width: int) -> tuple[Tensor, Tensor]:
        """Return the object's light, (N, 3, H, W), and how much of each pixel it covers, (N, 1, H, W), float64."""
        drawn = OBJECTS[self.object]
        right = drawn.right if self.right is None else self.right
        bottom = drawn.bottom if self.bottom is None else self.bottom
        poses = []
        for dx, dy, turn, zoom, light in draws.tolist():
            # Sines by the scalar function: the last bit of the vector one may depend on the size of the batch.
            angle, scale = math.radians(self.turn * turn), 1 / (wide * (1 + self.zoom * zoom))
            center = ((1 - right + self.shift * dx) * width, (1 - bottom + self.shift * dy) * height)
            poses.append((*center, math.cos(angle) * scale, math.sin(angle) * scale, 1 + self.brightness * light))
        x0, y0, cos, sin, light = torch.tensor(poses, dtype=torch.float64)[:, :, None, None].unbind(1)
        x, y = _places(width)[None, None] - x0, _places(height)[None, :, None] - y0
        top = drawn.paint(x * cos + y * sin, y * cos - x * sin)
        colors = (torch.tensor(drawn.colors, dtype=torch.float64)[..., None, None, None] * light).clamp_(0.0, 1.0)
        masks = [(top == color).to(torch.float64) for color in range(len(drawn.colors))]
        seen = [sum((mask * colors[i, c] for i, mask in enumerate(masks)), torch.zeros_like(x + y)) for c in range(3)]
        pooled = _pooled(torch.stack([*seen, (top != NOTHING).to(torch.float64)], dim=1))
        return pooled[:, :3], pooled[:, 3:]


def _places(length: int) -> Tensor:
    """Return the coordinates of the samples along an axis, in pixels."""
    return (torch.arange(length * FINE, dtype=torch.float64) + 0.5) / FINE


def _pooled(samples: Tensor) -> Tensor:
    """Return the mean over each pixel's samples, added in one order, so that an image's bits are its own."""
    total = torch.zeros_like(samples[..., ::FINE, ::FINE])
    for row in range(FINE):
        for column in range(FINE):
            total += samples[..., row::FINE, column::FINE]
    return total / FINE**2
