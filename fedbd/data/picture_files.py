"""Many picture files to one array, decoded by several threads."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fedbd.data.checks import describe, shorten
from fedbd.data.pictures import Picture, decode, place, shape_of
from fedbd.errors import Problem

SUFFIXES = {".png", ".jpg", ".jpeg", ".ppm", ".pgm", ".bmp", ".webp", ".tif", ".tiff", ".gif"}
MOST_THREADS = 8


def read_pictures(
    base: Path, names: Sequence[str], where: str, size: int | None = None, channels: int | None = None
) -> tuple[NDArray[np.uint8], list[Problem]]:
    """Read picture files.

    Args:
        base: The folder that the names are relative to.
        names: At least one; the first one that can be read decides the shape of all.
        where: What the folder is called in a message that counts bad pictures.
        size: See ``pictures.decode``.
        channels: See ``pictures.decode``.

    Returns:
        (N, C, H, W) uint8 and no problem, or what is wrong, picture by picture.
    """

    def read(name: str) -> Picture | str:
        try:
            return decode((base / name).read_bytes(), size, channels)
        except OSError as error:
            return error.strerror or type(error).__name__

    problems: list[Problem] = []
    images = np.empty((0, 0, 0, 0), np.uint8)
    # Pillow lets go of the interpreter while it decodes.
    with ThreadPoolExecutor(min(MOST_THREADS, os.cpu_count() or 1)) as pool:
        for row, picture in enumerate(pool.map(read, names)):
            if not isinstance(picture, str) and not images.size:
                images = np.zeros((len(names), *shape_of(picture)), np.uint8)
            reason = picture if isinstance(picture, str) else place(picture, images[row])
            if reason:
                expected = f"must be a picture{f' of {describe(images.shape[1:])}' if images.size else ''}"
                remedy = "set data.size to bring all pictures to one size" if reason[:1].isdigit() else ""
                problems.append(Problem(path=names[row], expected=expected, got=reason, remedy=remedy))
    return images, shorten(where, problems, "pictures")


def stamp_of(base: Path, names: Sequence[str]) -> str:
    """Return a hash of names, sizes and times of files: what a cached reading of them is valid for.

    Hashing the contents of a hundred thousand small files would cost every worker process more than it saves.
    """
    digest = hashlib.sha256()
    for name in names:
        with suppress(OSError):  # reading it will say what is wrong
            found = (base / name).stat()
            digest.update(f"{name}\0{found.st_size}\0{found.st_mtime_ns}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()
