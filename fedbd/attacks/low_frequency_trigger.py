"""Low-frequency trigger: a fixed smooth pattern, made of the lowest frequencies of the DCT, added to the image.

Y. Zeng, W. Park, Z. M. Mao, R. Jia, "Rethinking the Backdoor Attacks' Triggers: A Frequency Perspective", ICCV 2021,
https://arxiv.org/abs/2104.03413, the smooth trigger: one without the high-frequency traces that other ones leave.

Differs from the paper: its pattern is found by an optimization over a low-pass filter so that a trained model takes it
for the target; here the DCT coefficients are random, from ``seed``, and no model is needed.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated

import numpy as np
from annotated_types import Ge, Gt, Le
from numpy.typing import NDArray
from torch import Tensor

from fedbd.attacks.stamping import like, need_room
from fedbd.method_fields import checks_fields
from fedbd.seeding import numpy_rng


@dataclass(frozen=True, kw_only=True)
@checks_fields
class LowFrequencyTrigger:
    """Adds a fixed pattern of low spatial frequency, another one in each channel, clamped to [0, 1].

    Attributes:
        cutoff: The pattern is made of the DCT-II basis functions with less than so many half periods in each direction,
            without the constant one.
        delta: Largest absolute value of the pattern over all channels, in units of [0, 1].
        seed: Decides the coefficients, which are normal; the same for every size of images.
    """

    cutoff: Annotated[int, Ge(2)] = 4
    delta: Annotated[float, Gt(0), Le(1)] = 20 / 255
    seed: Annotated[int, Ge(0)] = 0

    def stamp(self, images: Tensor) -> Tensor:
        """Return stamped copies.

        Args:
            images: (N, C, H, W) float in [0, 1]; left untouched.

        Returns:
            (N, C, H, W) of the same dtype, device and memory format.

        Raises:
            UserError: If the images have fewer rows or columns than ``cutoff``.
        """
        channels, height, width = images.shape[1:]
        need_room(images, self.cutoff, self.cutoff, f"cutoff {self.cutoff}", "lower the cutoff or take larger images")
        pattern = _pattern(self.seed, self.cutoff, channels, height, width)
        return images.clone().add_(like(pattern, images), alpha=self.delta).clamp_(0.0, 1.0)


@lru_cache(maxsize=8)
def _pattern(seed: int, cutoff: int, channels: int, height: int, width: int) -> NDArray[np.float32]:
    """Return the pattern with a largest absolute value of 1, (channels, height, width)."""
    drawn = numpy_rng(seed, "trigger/low_frequency").standard_normal((channels, cutoff, cutoff))
    drawn[:, 0, 0] = 0.0
    rows, columns = _waves(cutoff, height), _waves(cutoff, width)
    pattern = np.einsum("cuv,uh,vw->chw", drawn, rows, columns)
    scaled: NDArray[np.float32] = (pattern / np.abs(pattern).max()).astype(np.float32)
    return scaled


def _waves(count: int, length: int) -> NDArray[np.float64]:
    """Return the first orthonormal functions of the DCT-II, (count, length)."""
    order, place = np.arange(count)[:, None], np.arange(length)[None]
    waves: NDArray[np.float64] = np.cos(np.pi * order * (place + 0.5) / length) * np.sqrt(2 / length)
    waves[0] /= np.sqrt(2)
    return waves
