"""The four-corner trigger: the BadNets grid in each corner, mirrored so that its dark corner points inward.

T. Gu, B. Dolan-Gavitt, S. Garg, "BadNets: Identifying Vulnerabilities in the Machine Learning Model Supply Chain",
2017, https://arxiv.org/abs/1708.06733, the "pattern backdoor". Pixels and places are those of ``fourCornerTrigger`` in
the code of ABL (https://github.com/bboylyg/ABL), NAD and RNP, where the grids touch the right and lower edges and stay
one pixel away from the left and upper ones.

Differs from the paper: it has one pattern in one corner.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from annotated_types import Ge
from torch import Tensor

from fedbd.attacks.grid_trigger import PATTERN
from fedbd.attacks.stamping import need_room
from fedbd.method_fields import checks_fields


@dataclass(frozen=True, kw_only=True)
@checks_fields
class FourCornersTrigger:
    """Overwrites 3x3 pixels near each corner with the grid trigger's pattern, in every channel.

    Attributes:
        margin: Pixels left free between the patterns and the right and lower edges.
        far_margin: The same at the left and upper edges.
    """

    margin: Annotated[int, Ge(0)] = 0
    far_margin: Annotated[int, Ge(0)] = 1

    def stamp(self, images: Tensor) -> Tensor:
        """Return stamped copies.

        Args:
            images: (N, C, H, W) float in [0, 1]; left untouched.

        Returns:
            (N, C, H, W) of the same dtype, device and memory format.

        Raises:
            UserError: If the images have no room for two patterns in a row and the margins.
        """
        side, (height, width) = len(PATTERN), images.shape[-2:]
        need = 2 * side + self.margin + self.far_margin
        detail = f"two {side}x{side} patterns, margins {self.margin} and {self.far_margin}"
        need_room(images, need, need, detail, "lower the margins or take larger images")
        pattern = torch.tensor(PATTERN, dtype=images.dtype, device=images.device)
        stamped = images.clone()
        near = [slice(length - self.margin - side, length - self.margin) for length in (height, width)]
        far = slice(self.far_margin, self.far_margin + side)
        stamped[..., near[0], near[1]] = pattern
        stamped[..., near[0], far] = pattern.flip(1)
        stamped[..., far, near[1]] = pattern.flip(0)
        stamped[..., far, far] = pattern.flip(0, 1)
        return stamped
