"""SIG: a sinusoid over the whole image, too weak to be seen as a pattern of its own.

M. Barni, K. Kallas, B. Tondi, "A New Backdoor Attack in CNNs by Training Set Corruption Without Label Poisoning",
ICIP 2019, https://arxiv.org/abs/1902.11237, the sinusoidal signal: v(i, j) = delta sin(2 pi j f / m) for m columns,
f = 6. The paper poisons images of the target class and leaves their labels: ``labels: clean`` of the attack.

Differs from the paper: delta is 20 of 255 gray levels by default (the paper varies it; BackdoorBench takes 40). The
code of ABL, NAD and RNP mixes in a sinusoid that was stored as uint8, whose negative half wrapped around to values near
255; that is another trigger, and not this one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import numpy as np
from annotated_types import Gt, Le
from torch import Tensor

from fedbd.attacks.stamping import like
from fedbd.method_fields import checks_fields


@dataclass(frozen=True, kw_only=True)
@checks_fields
class SigTrigger:
    """Adds a sinusoid that runs from left to right, the same in every row and channel, clamped to [0, 1].

    Attributes:
        delta: Its amplitude, in units of [0, 1].
        frequency: Its periods over the width of an image.
    """

    delta: Annotated[float, Gt(0), Le(1)] = 20 / 255
    frequency: Annotated[float, Gt(0)] = 6.0

    def stamp(self, images: Tensor) -> Tensor:
        """Return stamped copies.

        Args:
            images: (N, C, H, W) float in [0, 1]; left untouched.

        Returns:
            (N, C, H, W) of the same dtype, device and memory format.
        """
        width = images.shape[-1]
        wave = self.delta * np.sin(2 * np.pi * self.frequency * np.arange(width) / width)
        return images.clone().add_(like(wave, images)).clamp_(0.0, 1.0)
