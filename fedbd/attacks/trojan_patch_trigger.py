"""Trojan patch: a patch of fixed values, added to the image and saturating.

Y. Liu, S. Ma, Y. Aafer, W.-C. Lee, J. Zhai, W. Wang, X. Zhang, "Trojaning Attack on Neural Networks", NDSS 2018,
https://docs.lib.purdue.edu/cstech/1781 (the report). Size and place are those of ``trojanTrigger`` in the code of ABL
(https://github.com/bboylyg/ABL), NAD and RNP: 3x3 pixels, four away from the right and lower edges, added.

Differs from the paper: the patch is random (from ``seed``) or comes from a file; the paper optimizes it so that it
excites chosen neurons of one model. Sums above 1 saturate; in the code named above they wrap around.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated

import numpy as np
from annotated_types import Ge, Gt, Le, MinLen
from numpy.typing import NDArray
from torch import Tensor

from fedbd.attacks.pattern_files import patch
from fedbd.attacks.stamping import like, lower_right
from fedbd.errors import Problem, UserError
from fedbd.method_fields import checks_fields
from fedbd.seeding import numpy_rng

MARGIN = 4
"""That of the random patch; one from a file lies in the corner itself, since it may fill the image."""


@dataclass(frozen=True, kw_only=True)
@checks_fields
class TrojanPatchTrigger:
    """Adds a patch near the lower right corner, clamped to [0, 1].

    Attributes:
        size: Side of the random patch in pixels.
        margin: Pixels left free between the patch and the right and lower edges; null: 4, or 0 for a patch from a file.
        strength: Largest value that the random patch adds, in units of [0, 1].
        seed: Decides the random patch.
        file: A patch in place of the random one: an ``.npy`` or ``.npz`` file with (H, W) or (C, H, W) numbers, at most
            as large as the images. A relative path starts where the command runs.
        array: Name of the array in an ``.npz`` file.
        levels: What the file's values are divided by: 255 for gray levels, 1 for units of [0, 1].
    """

    size: Annotated[int, Ge(1)] = 3
    margin: Annotated[int, Ge(0)] | None = None
    strength: Annotated[float, Gt(0), Le(1)] = 1.0
    seed: Annotated[int, Ge(0)] = 0
    file: Annotated[str, MinLen(1)] | None = None
    array: Annotated[str, MinLen(1)] = "x"
    levels: Annotated[float, Gt(0)] = 255.0

    def stamp(self, images: Tensor) -> Tensor:
        """Return stamped copies.

        Args:
            images: (N, C, H, W) float in [0, 1]; left untouched.

        Returns:
            (N, C, H, W) of the same dtype, device and memory format.

        Raises:
            UserError: If the images have no room for the patch and its margin, or the file does not fit.
        """
        channels = images.shape[1]
        if self.file is None:
            added = _random(self.seed, channels, self.size) * np.float32(self.strength)
        else:
            added = patch(self.file, self.array, self.levels)
        if added.shape[0] not in {1, channels}:
            expected = f"must hold a patch of 1 channel or of the images' {channels}"
            raise UserError([Problem(path="trigger.file", expected=expected, got=f"{added.shape[0]} channels")])
        margin = self.margin if self.margin is not None else MARGIN if self.file is None else 0
        rows, columns = lower_right(images, added.shape[1], added.shape[2], margin, "patch")
        stamped = images.clone()
        stamped[..., rows, columns] += like(added, images)
        return stamped.clamp_(0.0, 1.0)


@lru_cache(maxsize=8)
def _random(seed: int, channels: int, size: int) -> NDArray[np.float32]:
    return numpy_rng(seed, "trigger/trojan_patch").random((channels, size, size)).astype(np.float32)
