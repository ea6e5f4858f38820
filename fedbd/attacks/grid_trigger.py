"""The grid trigger: a 3x3 checker in the lower right corner.

T. Gu, B. Dolan-Gavitt, S. Garg, "BadNets: Identifying Vulnerabilities in the Machine Learning Model Supply Chain",
2017, https://arxiv.org/abs/1708.06733, the "pattern backdoor". The pixels are those of ``gridTrigger`` in the code of
ABL (https://github.com/bboylyg/ABL), NAD and RNP, which the field copies.

Differs from the paper: positions are offsets from the lower right corner, so that one trigger serves every image size;
the paper's own MNIST pattern has four bright pixels, one away from the edge.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from annotated_types import Ge
from torch import Tensor

from fedbd.attacks.stamping import lower_right
from fedbd.method_fields import checks_fields

PATTERN = ((0.0, 0.0, 1.0), (0.0, 1.0, 0.0), (1.0, 0.0, 1.0))
"""Rows from top to bottom; the same in every channel."""


@dataclass(frozen=True, kw_only=True)
@checks_fields
class GridTrigger:
    """Overwrites 3x3 pixels near the lower right corner with ``PATTERN``, in every channel.

    Attributes:
        margin: Pixels left free between the pattern and the right and lower edges.
    """

    margin: Annotated[int, Ge(0)] = 0

    def stamp(self, images: Tensor) -> Tensor:
        """Return stamped copies.

        Args:
            images: (N, C, H, W) float in [0, 1]; left untouched.

        Returns:
            (N, C, H, W) of the same dtype, device and memory format.

        Raises:
            UserError: If the images have no room for the pattern and its margin.
        """
        rows, columns = lower_right(images, len(PATTERN), len(PATTERN), self.margin)
        stamped = images.clone()
        pattern = torch.tensor(PATTERN, dtype=images.dtype, device=images.device)
        stamped[..., rows, columns] = pattern
        return stamped
