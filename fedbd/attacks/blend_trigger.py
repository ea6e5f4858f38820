"""Blended injection: one fixed pattern, mixed into the whole image.

X. Chen, C. Liu, B. Li, K. Lu, D. Song, "Targeted Backdoor Attacks on Deep Learning Systems Using Data Poisoning", 2017,
https://arxiv.org/abs/1712.05526, the "blended injection strategy": alpha x pattern + (1 - alpha) x image, with a random
pattern that is drawn once.

Differs from the paper: alpha is 0.2 in training and test alike (the paper compares several); its cartoon image does not
come along, ``file`` takes any picture. The code of ABL, NAD and RNP draws new noise for every image, so that
there is no pattern to learn; here it is drawn once from ``seed``.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated

import numpy as np
from annotated_types import Ge, Gt, Le, MinLen
from numpy.typing import NDArray
from torch import Tensor

from fedbd.attacks.pattern_files import picture
from fedbd.attacks.stamping import like, need_gray_or_color
from fedbd.method_fields import checks_fields
from fedbd.seeding import numpy_rng


@dataclass(frozen=True, kw_only=True)
@checks_fields
class BlendTrigger:
    """Mixes a fixed pattern into the image: seeded noise, or a picture.

    Attributes:
        alpha: Share of the pattern in the mixture.
        seed: Decides the noise; the same for all images of a size, whatever the scenario's seed.
        file: A picture in place of the noise (PNG, JPEG, BMP, GIF, TIFF, WEBP), scaled to the images' size and made
            gray for gray ones. A relative path starts where the command runs.
    """

    alpha: Annotated[float, Gt(0), Le(1)] = 0.2
    seed: Annotated[int, Ge(0)] = 0
    file: Annotated[str, MinLen(1)] | None = None

    def stamp(self, images: Tensor) -> Tensor:
        """Return stamped copies.

        Args:
            images: (N, C, H, W) float in [0, 1]; left untouched.

        Returns:
            (N, C, H, W) of the same dtype, device and memory format.

        Raises:
            UserError: If the picture cannot be read, or has to go on images that are neither gray nor in color.
        """
        channels, height, width = images.shape[1:]
        if self.file is None:
            pattern = _noise(self.seed, channels, height, width)
        else:
            need_gray_or_color(images, "the picture")
            pattern = picture(self.file, channels, height, width)
        mixed = images.mul(1.0 - self.alpha).add_(like(pattern, images), alpha=self.alpha)
        return mixed.clamp_(0.0, 1.0)


@lru_cache(maxsize=8)
def _noise(seed: int, channels: int, height: int, width: int) -> NDArray[np.float32]:
    drawn = numpy_rng(seed, "trigger/blend").random((channels, height, width))
    return drawn.astype(np.float32)
