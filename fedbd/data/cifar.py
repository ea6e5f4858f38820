"""CIFAR-10 and CIFAR-100, in the files that torchvision leaves.

Source: A. Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009
(https://www.cs.toronto.edu/~kriz/learning-features-2009-TR.pdf), chapter 3: 50,000 training and 10,000 test images of
32x32, in 10 classes, or in 100 classes of 20 superclasses.

The files are pickles, which fedbd does not load: their opcodes are read as data (see ``plain_pickle``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from fedbd.data.cache import cached
from fedbd.data.checks import Arrays, check_values, to_dataset
from fedbd.data.download import Origin, obtain
from fedbd.data.plain_pickle import NotPlainError, byte_array, read_plain
from fedbd.errors import DataError, Problem
from fedbd.method_fields import checks_fields
from fedbd.types import Dataset

SHAPE = (3, 32, 32)
TEN = ("cifar-10-batches-py", [f"data_batch_{i}" for i in range(1, 6)], ["test_batch"])
HUNDRED = ("cifar-100-python", ["train"], ["test"])


@dataclass(frozen=True, kw_only=True)
@checks_fields
class Cifar10:
    """CIFAR-10, from ``cifar-10-batches-py/`` in the data folder.

    Attributes:
        download: Let torchvision fetch it (170 MB) where it is not there.
    """

    download: bool = False
    has_groups: ClassVar[bool] = False

    def load(self, root: Path | None) -> Dataset:
        """Return the decoded data set (see ``types.DataSource``).

        Raises:
            DataError: If a file is missing or damaged.
        """
        return _load("cifar10", "CIFAR10", TEN, b"labels", root, self.download)


@dataclass(frozen=True, kw_only=True)
@checks_fields
class Cifar100:
    """CIFAR-100, from ``cifar-100-python/`` in the data folder.

    Attributes:
        labels: The 100 ``fine`` classes, or the 20 ``coarse`` ones.
        download: Let torchvision fetch it (169 MB) where it is not there.
    """

    labels: Literal["fine", "coarse"] = "fine"
    download: bool = False
    has_groups: ClassVar[bool] = False

    def load(self, root: Path | None) -> Dataset:
        """Return the decoded data set (see ``types.DataSource``).

        Raises:
            DataError: If a file is missing or damaged.
        """
        return _load("cifar100", "CIFAR100", HUNDRED, f"{self.labels}_labels".encode(), root, self.download)


Layout = tuple[str, list[str], list[str]]
"""The folder, its training files and its test files."""


def _load(name: str, made_by: str, layout: Layout, key: bytes, root: Path | None, download: bool) -> Dataset:
    folder, train, test = layout
    origin = Origin(
        name=name,
        made_by=f"torchvision.datasets.{made_by}",
        needed=[f"{folder}/{file}" for file in train + test],
        address=lambda: str(_torchvisions(made_by).url),
        fetch=lambda base: _fetch(made_by, base),
    )
    base = obtain(origin, root, download)
    parts = {part: [base / folder / file for file in files] for part, files in (("train", train), ("test", test))}
    fields = {"labels": key.decode(), "train_files": len(train)}
    return to_dataset(cached(name, fields, parts["train"] + parts["test"], lambda: _decode(parts, key)))


def _torchvisions(name: str) -> Any:
    from torchvision import datasets  # noqa: PLC0415 - takes seconds, and only a download needs it

    return getattr(datasets, name)


def _fetch(name: str, base: Path) -> None:
    """Download and unpack; the class itself would go on to unpickle."""
    from torchvision.datasets.utils import download_and_extract_archive  # noqa: PLC0415 - see _torchvisions

    known = _torchvisions(name)
    download_and_extract_archive(known.url, str(base), filename=known.filename, md5=known.tgz_md5)


def _decode(parts: dict[str, list[Path]], key: bytes) -> Arrays:
    arrays: Arrays = {}
    problems: list[Problem] = []
    for part, files in parts.items():
        images, labels = _read(files, key, problems)
        if not problems:
            arrays |= {f"{part}_images": np.concatenate(images), f"{part}_labels": np.concatenate(labels)}
    if problems:
        raise DataError(problems)
    names = {f"{part}_{what}": files[0].name for part, files in parts.items() for what in ("images", "labels")}
    check_values(arrays, names)
    return arrays


def _read(
    files: Sequence[Path], key: bytes, problems: list[Problem]
) -> tuple[list[NDArray[np.uint8]], list[NDArray[np.int64]]]:
    """Read the batches of a part; what is wrong with one is appended."""
    images, labels = [], []
    for path in files:
        try:
            pixels, classes = _batch(read_plain(path), key)
            images.append(pixels)
            labels.append(classes)
        except NotPlainError as refused:
            remedy = "copy the file again"
            expected = f"must be a batch of CIFAR as torchvision leaves it ({refused})"
            problems.append(Problem(path=path.name, expected=expected, remedy=remedy))
    return images, labels


def _batch(content: Any, key: bytes) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    if not isinstance(content, dict):
        raise NotPlainError("it holds no mapping")
    held = {name.encode() if isinstance(name, str) else name: value for name, value in content.items()}
    if b"data" not in held or key not in held:
        raise NotPlainError(f"it lacks data or {key.decode()}")
    pixels, classes = byte_array(held[b"data"]), held[key]
    if pixels.ndim != 2 or pixels.shape[1] != 3 * 32 * 32 or len(pixels) == 0:
        raise NotPlainError(f"its data have shape {pixels.shape}, not (N, 3072)")
    if not isinstance(classes, list) or len(classes) != len(pixels) or not all(type(c) is int for c in classes):
        raise NotPlainError(f"{key.decode()} is not a list of {len(pixels)} integers")
    try:
        return pixels.reshape(-1, *SHAPE), np.array(classes, dtype=np.int64)
    except OverflowError:
        raise NotPlainError(f"{key.decode()} holds a number that is no class") from None
