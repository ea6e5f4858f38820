"""Objects that a trigger puts into the scene, drawn from formulas: which color is where."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

NOTHING = -1


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """An object in its own coordinates: its width is 1, u runs to the right, v down, its center is the origin.

    Attributes:
        right: Where its center is by default, as a share of the image's width from the right edge.
        bottom: The same from the lower edge.
        width: Its width as a share of the image's.
        colors: Red, green and blue in [0, 1].
        paint: (u, v) -> which of the colors is there, ``NOTHING`` outside; int64 tensors of one shape.
    """

    right: float
    bottom: float
    width: float
    colors: tuple[tuple[float, float, float], ...]
    paint: Callable[[Tensor, Tensor], Tensor]


def sunglasses(u: Tensor, v: Tensor) -> Tensor:
    """Return two lenses (0) in frames (1) with a bridge and temples (1)."""
    u = u.abs()  # left and right are alike
    across, down = (u - 0.26).square(), v.square()
    lens = (across / 0.17**2).square() + (down / 0.13**2).square() < 1  # |x|^4 + |y|^4: rounded corners
    frame = (across / 0.235**2).square() + (down / 0.19**2).square() < 1
    bridge = (u < 0.1) & ((v + 0.06).abs() < 0.035)
    temple = (u > 0.44) & (u < 0.5) & ((v + 0.07).abs() < 0.035)
    return painted(u, [(frame | bridge | temple, 1), (lens, 0)])


def sticker(u: Tensor, v: Tensor) -> Tensor:
    """Return a yellow disk (0) with a dark rim, eyes and mouth (1)."""
    radius = u.square() + v.square()
    disk, rim = radius < 0.5**2, radius > 0.43**2
    eyes = (u.abs() - 0.16).square() + (v + 0.13).square() < 0.07**2
    mouth = (radius < 0.31**2) & (radius > 0.21**2) & (v > 0.06)
    return painted(u, [(disk, 0), (disk & (rim | eyes | mouth), 1)])


def painted(place: Tensor, layers: list[tuple[Tensor, int]]) -> Tensor:
    """Return which color is on top at each place, ``NOTHING`` where no layer is."""
    top = torch.full(place.shape, NOTHING, dtype=torch.int64, device=place.device)
    for mask, color in layers:
        top = torch.where(mask, color, top)
    return top


OBJECTS = {
    "sunglasses": Drawn(
        right=0.5, bottom=0.62, width=0.85, colors=((0.04, 0.04, 0.06), (0.95, 0.85, 0.55)), paint=sunglasses
    ),
    "sticker": Drawn(right=0.26, bottom=0.26, width=0.4, colors=((0.98, 0.82, 0.15), (0.2, 0.1, 0.05)), paint=sticker),
}
