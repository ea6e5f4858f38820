"""Patterns of triggers that come from a user's file: pictures, and arrays without any pickle."""

from __future__ import annotations

import zipfile
import zlib
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedbd.data.pictures import FORMATS, decode
from fedbd.errors import Problem, UserError

PATH = "trigger.file"
LARGEST = 64 * 2**20
"""Bytes of a file; a pattern is an image, not a data set."""

DAMAGE = (zipfile.BadZipFile, zlib.error, EOFError, ValueError, OSError, RuntimeError)
"""What zipfile and NumPy raise on damaged files."""


def picture(file: str, channels: int, height: int, width: int) -> NDArray[np.float32]:
    """Return a picture as a pattern, (channels, height, width) float32 in [0, 1].

    Args:
        file: Its path.
        channels: 1 or 3.
        height: It is scaled to this height,
        width: and to this width.

    Raises:
        UserError: If the file cannot be read, or is no picture.
    """
    return _picture(*_stamp_of(file), channels, height, width)


def patch(file: str, array: str, levels: float) -> NDArray[np.float32]:
    """Return a patch, (C, H, W) float32 in [-1, 1], C being 1 for an array of two dimensions.

    Args:
        file: An ``.npy`` or ``.npz`` file.
        array: Which array of an ``.npz`` file.
        levels: What its values are divided by.

    Raises:
        UserError: If the file cannot be read or holds something else.
    """
    return _patch(*_stamp_of(file), array, levels)


def _stamp_of(file: str) -> tuple[Path, int, int]:
    """Return a file's path, and its size and age: a file that changed is read again."""
    path = Path(file).expanduser()
    try:
        found = path.stat()
    except OSError:
        raise _refused("must be a file", str(path), "") from None
    if not path.is_file() or found.st_size > LARGEST:
        raise _refused(f"must be a file of at most {LARGEST >> 20} MiB", str(path), "")
    return path, found.st_size, found.st_mtime_ns


@lru_cache(maxsize=8)
def _picture(path: Path, _size: int, _age: int, channels: int, height: int, width: int) -> NDArray[np.float32]:
    from PIL import Image  # noqa: PLC0415

    found = decode(_read(path))
    if isinstance(found, str):
        remedy = f"save it as RGB or gray in one of {', '.join(FORMATS)}"
        raise _refused("must be a picture", f"{found} ({path.name})", remedy)
    image = Image.fromarray(found).convert("L" if channels == 1 else "RGB")
    pixels = np.asarray(image.resize((width, height), Image.Resampling.BILINEAR), dtype=np.float32) / 255
    return np.ascontiguousarray(pixels[None] if channels == 1 else pixels.transpose(2, 0, 1))


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise _refused("must be readable", str(error), "") from None


@lru_cache(maxsize=8)
def _patch(path: Path, _size: int, _age: int, array: str, levels: float) -> NDArray[np.float32]:
    values = _array(path, array)
    if values.dtype.kind not in "iuf" or values.ndim not in {2, 3} or 0 in values.shape:
        expected = "must hold (H, W) or (C, H, W) numbers"
        raise _refused(expected, f"shape {values.shape} of {values.dtype} in {path.name}", "")
    added = (values.astype(np.float64) / levels).astype(np.float32)
    largest = float(np.abs(added).max())
    if not largest <= 1:  # NaN, too
        remedy = "set levels to 255 if the file is in gray levels, 1 if it is in units of [0, 1]"
        raise _refused("must add at most 1 after the division by levels", f"{largest:g}", remedy)
    if largest < 0.5 / 255:
        remedy = "set levels to 1 if the file is in units of [0, 1]"
        raise _refused("must add at least half a gray level", f"{largest:g} after the division by levels", remedy)
    return added[None] if added.ndim == 2 else added


def _array(path: Path, name: str) -> NDArray[Any]:
    try:
        opened = np.load(path, allow_pickle=False)
        if isinstance(opened, np.ndarray):
            return opened
        with opened:
            if name in opened.files:
                found: NDArray[Any] = opened[name]
                return found
            held = ", ".join(opened.files) or "none"
    except DAMAGE as error:
        remedy = "save it with np.save or np.savez; pickled objects are not opened"
        raise _refused("must be a readable .npy or .npz file", str(error) or type(error).__name__, remedy) from None
    raise _refused(f"must hold an array '{name}'", f"arrays {held}", "name the right one in array")


def _refused(expected: str, got: str, remedy: str) -> UserError:
    return UserError([Problem(path=PATH, expected=expected, got=got, remedy=remedy)])
