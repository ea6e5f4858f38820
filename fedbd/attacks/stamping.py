"""Plain functions that triggers share: room in an image, numbers in an image's own form, the refusals."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedbd.errors import Problem, UserError


def lower_right(images: Tensor, height: int, width: int, margin: int, what: str = "pattern") -> tuple[slice, slice]:
    """Return the rows and columns of a patch near the lower right corner.

    Args:
        images: (N, C, H, W).
        height: Of the patch, in pixels.
        width: Of the patch, in pixels.
        margin: Pixels left free between it and the right and lower edges.
        what: The patch, for the message.

    Raises:
        UserError: If the images have no room for the patch and its margin.
    """
    detail = f"{height}x{width} {what}, margin {margin}"
    need_room(images, height + margin, width + margin, detail, "lower the margin or take larger images")
    bottom, right = images.shape[-2] - margin, images.shape[-1] - margin
    return slice(bottom - height, bottom), slice(right - width, right)


def need_room(images: Tensor, height: int, width: int, detail: str, remedy: str) -> None:
    """Refuse images that are smaller than a trigger needs.

    Args:
        images: (N, C, H, W).
        height: The least H.
        width: The least W.
        detail: What needs the room, for the message.
        remedy: What to do about it.

    Raises:
        UserError: If they are.
    """
    if images.shape[-2] < height or images.shape[-1] < width:
        expected = f"needs images of at least {height}x{width} pixels ({detail})"
        got = f"{images.shape[-2]}x{images.shape[-1]}"
        raise UserError([Problem(path="trigger", expected=expected, got=got, remedy=remedy)])


def need_gray_or_color(images: Tensor, what: str) -> None:
    """Refuse images that have neither 1 nor 3 channels.

    Args:
        images: (N, C, H, W).
        what: What has a color, for the message.

    Raises:
        UserError: If they have.
    """
    channels = images.shape[1]
    if channels not in {1, 3}:
        expected = f"needs images of 1 channel (gray) or 3 (red, green, blue): {what} has a color"
        raise UserError([Problem(path="trigger", expected=expected, got=f"{channels} channels")])


def like(array: NDArray[np.floating[Any]], images: Tensor) -> Tensor:
    """Return an array as a tensor of the images' dtype on their device."""
    return torch.from_numpy(array).to(images.device, images.dtype)
