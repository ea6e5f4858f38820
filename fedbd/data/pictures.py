"""Encoded pictures to arrays. Only the formats named here are opened, whatever else Pillow knows."""

from __future__ import annotations

import io

import numpy as np
from numpy.typing import NDArray

from fedbd.data.checks import describe

Picture = NDArray[np.uint8]
"""A decoded picture: (H, W), or (H, W, 3) if it has color."""

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "PPM")


def decode_all(encoded: list[bytes | None]) -> list[Picture | str]:
    """Return ``decode`` of each."""
    return [decode(data) for data in encoded]


def decode(data: bytes | None, size: int | None = None, channels: int | None = None) -> Picture | str:
    """Decode one picture, or say what it is instead.

    Args:
        data: The encoded picture.
        size: Bring it to size x size, bilinearly; None: leave it as it is.
        channels: 1: gray, 3: color, whatever it is; None: as it is.

    Returns:
        (H, W) or (H, W, 3) uint8.
    """
    from PIL import Image, UnidentifiedImageError  # noqa: PLC0415

    if not data:
        return "no bytes"
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            if image.mode not in {"1", "L", "RGB", "P", "YCbCr"}:
                return f"one of mode {image.mode}"
            gray = image.mode in {"1", "L"} if channels is None else channels == 1
            picture = image.convert("L" if gray else "RGB")
            if size is not None and picture.size != (size, size):
                picture = picture.resize((size, size), Image.Resampling.BILINEAR)
            return np.asarray(picture)
    except UnidentifiedImageError:
        return "bytes that are no picture"
    except Exception:  # Pillow's readers raise whatever damaged bytes lead them to
        return "a damaged one"


def shape_of(picture: Picture) -> tuple[int, int, int]:
    """Return the (C, H, W) of a decoded picture."""
    return 1 if picture.ndim == 2 else 3, picture.shape[0], picture.shape[1]


def place(picture: Picture, target: Picture) -> str:
    """Copy a picture into its (C, H, W) place, gray into color if need be, or say why it does not fit."""
    channels, height, width = shape_of(picture)
    if (height, width) != target.shape[1:] or channels > target.shape[0]:
        return describe((channels, height, width))
    target[:] = picture[None] if channels == 1 else picture.transpose(2, 0, 1)
    return ""
