"""The single-pixel trigger: one bright pixel near the lower right corner.

T. Gu, B. Dolan-Gavitt, S. Garg, "BadNets: Identifying Vulnerabilities in the Machine Learning Model Supply Chain",
2017, https://arxiv.org/abs/1708.06733, the "single pixel backdoor".

Differs from the paper: which pixel it is, is a field (the paper shows a figure and names no coordinates).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from annotated_types import Ge, Le
from torch import Tensor

from fedbd.attacks.stamping import need_room
from fedbd.method_fields import checks_fields


@dataclass(frozen=True, kw_only=True)
@checks_fields
class SinglePixelTrigger:
    """Overwrites one pixel, in every channel.

    Attributes:
        right: Pixels between it and the right edge.
        bottom: Pixels between it and the lower edge.
        value: Its brightness, 0 black and 1 white.
    """

    right: Annotated[int, Ge(0)] = 1
    bottom: Annotated[int, Ge(0)] = 1
    value: Annotated[float, Ge(0), Le(1)] = 1.0

    def stamp(self, images: Tensor) -> Tensor:
        """Return stamped copies.

        Args:
            images: (N, C, H, W) float in [0, 1]; left untouched.

        Returns:
            (N, C, H, W) of the same dtype, device and memory format.

        Raises:
            UserError: If the pixel lies outside of the images.
        """
        detail = f"the pixel is {self.bottom} from the lower and {self.right} from the right edge"
        need_room(images, self.bottom + 1, self.right + 1, detail, "lower right and bottom or take larger images")
        stamped = images.clone()
        stamped[..., -1 - self.bottom, -1 - self.right] = self.value
        return stamped
