"""MNIST, Fashion-MNIST and EMNIST, in the files that torchvision leaves; torchvision's own functions read them.

Sources: Y. LeCun, L. Bottou, Y. Bengio, P. Haffner, "Gradient-Based Learning Applied to Document Recognition", Proc.
IEEE 86(11), 1998 (https://doi.org/10.1109/5.726791); H. Xiao, K. Rasul, R. Vollgraf, "Fashion-MNIST", 2017
(https://arxiv.org/abs/1708.07747); G. Cohen, S. Afshar, J. Tapson, A. van Schaik, "EMNIST: Extending MNIST to
Handwritten Letters", IJCNN 2017 (https://arxiv.org/abs/1702.05373).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np

from fedbd.data.cache import cached
from fedbd.data.checks import Arrays, check_values, to_dataset
from fedbd.data.download import Origin, obtain
from fedbd.errors import DataError, Problem
from fedbd.method_fields import checks_fields
from fedbd.types import Dataset

DAMAGE = (ValueError, TypeError, RuntimeError, AssertionError, KeyError, IndexError, OSError)
"""What torchvision's readers raise on damaged files."""


@dataclass(frozen=True, kw_only=True)
@checks_fields
class Mnist:
    """MNIST, from ``MNIST/raw/`` in the data folder: unpacked idx files, as ``train-images-idx3-ubyte``.

    Attributes:
        download: Let torchvision fetch it (12 MB) where it is not there.
    """

    download: bool = False
    has_groups: ClassVar[bool] = False

    def load(self, root: Path | None) -> Dataset:
        """Return the decoded data set (see ``types.DataSource``).

        Raises:
            DataError: If a file is missing or damaged.
        """
        return _load("mnist", "MNIST", ("train", "t10k"), root, self.download)


@dataclass(frozen=True, kw_only=True)
@checks_fields
class FashionMnist:
    """Fashion-MNIST, from ``FashionMNIST/raw/`` in the data folder: unpacked idx files, as ``train-images-idx3-ubyte``.

    Attributes:
        download: Let torchvision fetch it (31 MB) where it is not there.
    """

    download: bool = False
    has_groups: ClassVar[bool] = False

    def load(self, root: Path | None) -> Dataset:
        """Return the decoded data set (see ``types.DataSource``).

        Raises:
            DataError: If a file is missing or damaged.
        """
        return _load("fashion_mnist", "FashionMNIST", ("train", "t10k"), root, self.download)


@dataclass(frozen=True, kw_only=True)
@checks_fields
class Emnist:
    """EMNIST, from ``EMNIST/raw/`` in the data folder: unpacked idx files, as ``emnist-mnist-train-images-idx3-ubyte``.

    The pictures are turned upright (the files, and torchvision, have them transposed), and the 26 letters are classes 0
    to 25. The files do not say who wrote what: for writers as clients take FEMNIST as ``npz`` or ``image_parquet``.

    Attributes:
        split: Which of the six splits: ``byclass`` (62 classes), ``bymerge`` and ``balanced`` (47), ``letters`` (26),
            ``digits`` and ``mnist`` (10).
        download: Let torchvision fetch all splits (562 MB) where it is not there.
    """

    split: Literal["byclass", "bymerge", "balanced", "letters", "digits", "mnist"] = "balanced"
    download: bool = False
    has_groups: ClassVar[bool] = False

    def load(self, root: Path | None) -> Dataset:
        """Return the decoded data set (see ``types.DataSource``).

        Raises:
            DataError: If a file is missing or damaged.
        """
        first = 1 if self.split == "letters" else 0
        parts = (f"emnist-{self.split}-train", f"emnist-{self.split}-test")
        return _load("emnist", "EMNIST", parts, root, self.download, first=first, transposed=True, split=self.split)


def _load(
    name: str,
    made_by: str,
    parts: tuple[str, str],
    root: Path | None,
    download: bool,
    *,
    first: int = 0,
    transposed: bool = False,
    **more: str,
) -> Dataset:
    """Return one of the sets.

    Args:
        name: The data method's name.
        made_by: Its class in torchvision.
        parts: What the names of training and test files begin with.
        root: See ``types.DataSource``.
        download: Fetch it where it is not there.
        first: The first label in the files.
        transposed: Rows and columns of the pictures are exchanged in the files.
        more: Further arguments of torchvision's class.
    """
    raw = f"{made_by}/raw"
    names = [f"{part}-{kind}-ubyte" for part in parts for kind in ("images-idx3", "labels-idx1")]
    origin = Origin(
        name=name,
        made_by=f"torchvision.datasets.{made_by}",
        needed=[f"{raw}/{file}" for file in names],
        address=lambda: _address(_torchvisions(made_by)),
        fetch=lambda base: _torchvisions(made_by)(root=str(base), download=True, **more),
    )
    files = [obtain(origin, root, download) / raw / file for file in names]
    fields = {"first": first, "transposed": transposed}
    return to_dataset(cached(name, fields, files, lambda: _decode(files, first, transposed)))


def _torchvisions(name: str) -> Any:
    from torchvision import datasets  # noqa: PLC0415 - takes seconds, and a cache hit does not need it

    return getattr(datasets, name)


def _address(known: Any) -> str:
    return str(known.url) if hasattr(known, "url") else str(known.mirrors[0])


def _decode(files: list[Path], first: int, transposed: bool) -> Arrays:
    from torchvision.datasets.mnist import read_image_file, read_label_file  # noqa: PLC0415 - see _torchvisions

    readers: list[tuple[str, Callable[[str], Any]]] = [
        (f"{part}_{what}", reader)
        for part in ("train", "test")
        for what, reader in (("images", read_image_file), ("labels", read_label_file))
    ]
    arrays: Arrays = {}
    problems = []
    for (name, reader), path in zip(readers, files, strict=True):
        try:
            arrays[name] = reader(str(path)).numpy()
        except DAMAGE as error:
            got = (str(error) or type(error).__name__).splitlines()[0]
            remedy = "copy the file again, unpacked"
            problems.append(Problem(path=path.name, expected="must be a whole idx file", got=got, remedy=remedy))
    problems += _count_problems(arrays, files)
    if problems:
        raise DataError(problems)
    for part in ("train", "test"):
        images = arrays[f"{part}_images"][:, None]
        arrays[f"{part}_images"] = np.ascontiguousarray(images.swapaxes(2, 3)) if transposed else images
        arrays[f"{part}_labels"] = arrays[f"{part}_labels"].astype(np.int64) - first
    check_values(arrays, {name: path.name for (name, _), path in zip(readers, files, strict=True)})
    return arrays


def _count_problems(arrays: Arrays, files: list[Path]) -> list[Problem]:
    """Return where images and labels are not equally many, or none."""
    problems = []
    for part, path in (("train", files[1]), ("test", files[3])):
        images, labels = arrays.get(f"{part}_images"), arrays.get(f"{part}_labels")
        if images is not None and labels is not None and (len(images) != len(labels) or images.size == 0):
            expected = f"must hold one label per image, {len(images)}, and at least one"
            problems.append(Problem(path=path.name, expected=expected, got=str(len(labels))))
    return problems
