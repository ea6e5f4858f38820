"""Pictures in folders, one for each class: the layout of torchvision's ``ImageFolder``."""

from __future__ import annotations

import os
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import numpy as np
from annotated_types import Ge, MinLen

from fedbd.data.cache import cached
from fedbd.data.checks import Arrays, check_values, to_dataset
from fedbd.data.files import VARIABLE
from fedbd.data.picture_files import SUFFIXES, read_pictures, stamp_of
from fedbd.errors import DataError, Problem
from fedbd.method_fields import checks_fields
from fedbd.types import Dataset

LISTED = 5
Listing = dict[str, list[tuple[str, str]]]
"""Part -> (class folder, file relative to the data folder), sorted."""


@dataclass(frozen=True, kw_only=True)
@checks_fields
class ImageFolder:
    """Folders ``train/CLASS/*.png`` and ``test/CLASS/*.png``; classes are numbered in the order of the folders' names.

    Pictures are PNG, JPEG, PPM, BMP, WebP, TIFF or GIF, also in folders below that of their class. Transparency and 16
    bits are refused. Names that begin with a dot are passed over.

    Attributes:
        train: Folder of the training part, relative to the data folder, or absolute.
        test: Folder of the test part, likewise.
        size: Bring every picture to size x size, bilinearly; null: all have one size already.
        channels: 3: color, gray pictures are repeated; 1: gray; null: as the first picture of a part is.
    """

    train: Annotated[str, MinLen(1)] = "train"
    test: Annotated[str, MinLen(1)] = "test"
    size: Annotated[int, Ge(1)] | None = None
    channels: Literal[1, 3] | None = None
    has_groups: ClassVar[bool] = False

    def load(self, root: Path | None) -> Dataset:
        """Return the decoded data set (see ``types.DataSource``).

        Raises:
            DataError: With every problem of the folders.
        """
        base = self._base(root)
        listing = self._listing(base)
        names = [name for files in listing.values() for _, name in files]
        fields = {"size": self.size, "channels": self.channels, "pillow": version("pillow")}
        fields |= {"train": self.train, "test": self.test, "files": stamp_of(base, names)}
        return to_dataset(cached("image_folder", fields, [], lambda: self._decode(base, listing)))

    def _base(self, root: Path | None) -> Path:
        folder = root if root is not None else os.environ.get(VARIABLE) or None
        if folder is None and not (os.path.isabs(self.train) and os.path.isabs(self.test)):
            remedy = f"name it in data.root or in the environment variable {VARIABLE}"
            raise DataError([Problem(path=self.train, expected="needs a folder of data files", remedy=remedy)])
        return Path(folder or "/").expanduser()

    def _listing(self, base: Path) -> Listing:
        """Return all pictures, by part."""
        problems: list[Problem] = []
        listing = {part: _pictures(base, name, problems) for part, name in (("train", self.train), ("test", self.test))}
        known = {folder for folder, _ in listing["train"]}
        strange = sorted({folder for folder, _ in listing["test"]} - known)
        if strange and known:
            more = f" and {len(strange) - LISTED} more" if len(strange) > LISTED else ""
            got, expected = f"{', '.join(strange[:LISTED])}{more}", f"must hold classes of {self.train} only"
            problems.append(Problem(path=self.test, expected=expected, got=got))
        if problems:
            raise DataError(problems)
        return listing

    def _decode(self, base: Path, listing: Listing) -> Arrays:
        number = {folder: i for i, folder in enumerate(sorted({folder for folder, _ in listing["train"]}))}
        arrays: Arrays = {}
        problems: list[Problem] = []
        for part, where in (("train", self.train), ("test", self.test)):
            names = [name for _, name in listing[part]]
            images, bad = read_pictures(base, names, where, self.size, self.channels)
            problems += bad
            labels = np.array([number[folder] for folder, _ in listing[part]], dtype=np.int64)
            arrays |= {f"{part}_images": images, f"{part}_labels": labels}
        if problems:
            raise DataError(problems)
        paths = {"train_labels": self.train, "test_labels": self.test, "test_images": self.test}
        check_values(arrays, paths)
        return arrays


def _pictures(base: Path, part: str, problems: list[Problem]) -> list[tuple[str, str]]:
    """Return class and name of each picture of a part; what is wrong is appended."""
    top = base / part
    if not os.path.isdir(top):
        expected = f"must be a folder in {base}" if not os.path.isabs(part) else "must be a folder"
        remedy = f"pictures lie in {part}/CLASS/; name the folder of data files in data.root or in {VARIABLE}"
        problems.append(Problem(path=part, expected=expected, got="nothing of that name", remedy=remedy))
        return []
    try:
        folders = sorted(name for name in os.listdir(top) if os.path.isdir(top / name) and not name.startswith("."))
    except OSError as error:
        problems.append(Problem(path=part, expected=f"must be readable: {error.strerror}"))
        return []
    found = [(folder, os.path.join(part, folder, name)) for folder in folders for name in _below(top / folder)]
    empty = sorted(set(folders) - {folder for folder, _ in found})
    if not folders:
        expected, got = "must hold a folder for each class", "none"
        problems.append(Problem(path=part, expected=expected, got=got, remedy=f"put pictures into {part}/CLASS/"))
    elif empty:
        more = f" and {len(empty) - LISTED} more" if len(empty) > LISTED else ""
        remedy = f"pictures end in {', '.join(sorted(SUFFIXES))}"
        got = f"none in {', '.join(empty[:LISTED])}{more}"
        problems.append(Problem(path=part, expected="must hold pictures in every class", got=got, remedy=remedy))
    return found


def _below(folder: Path) -> list[str]:
    """Return the pictures in a folder and those below it, sorted, relative to it."""
    names = []
    for place, below, files in os.walk(folder):
        below[:] = [name for name in below if not name.startswith(".")]
        kept = [name for name in files if not name.startswith(".") and Path(name).suffix.lower() in SUFFIXES]
        names += [os.path.relpath(os.path.join(place, name), folder) for name in kept]
    return sorted(names)
