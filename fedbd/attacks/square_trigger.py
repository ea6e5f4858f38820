"""The square trigger: a white square near the lower right corner.

T. Gu, B. Dolan-Gavitt, S. Garg, "BadNets: Identifying Vulnerabilities in the Machine Learning Model Supply Chain",
2017, https://arxiv.org/abs/1708.06733, names squares among its triggers. 3x3 white pixels, one away from the edge, are
``squareTrigger`` in the code of ABL (https://github.com/bboylyg/ABL), NAD and RNP; K. Jin et al.
(https://arxiv.org/abs/2006.14871) take 4x4 in the same place: ``size: 4``.

Differs from the paper: the paper's square is yellow and lies on a traffic sign; here it is white and near the lower
right corner of every image.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from annotated_types import Ge, Le
from torch import Tensor

from fedbd.attacks.stamping import lower_right
from fedbd.method_fields import checks_fields


@dataclass(frozen=True, kw_only=True)
@checks_fields
class SquareTrigger:
    """Overwrites a square near the lower right corner with one value, in every channel.

    Attributes:
        size: Side of the square in pixels.
        margin: Pixels left free between the square and the right and lower edges.
        value: Its brightness, 0 black and 1 white.
    """

    size: Annotated[int, Ge(1)] = 3
    margin: Annotated[int, Ge(0)] = 1
    value: Annotated[float, Ge(0), Le(1)] = 1.0

    def stamp(self, images: Tensor) -> Tensor:
        """Return stamped copies.

        Args:
            images: (N, C, H, W) float in [0, 1]; left untouched.

        Returns:
            (N, C, H, W) of the same dtype, device and memory format.

        Raises:
            UserError: If the images have no room for the square and its margin.
        """
        rows, columns = lower_right(images, self.size, self.size, self.margin, "square")
        stamped = images.clone()
        stamped[..., rows, columns] = self.value
        return stamped
