"""The German Traffic Sign Recognition Benchmark, in the files that torchvision leaves.

Source: J. Stallkamp, M. Schlipsing, J. Salmen, C. Igel, "Man vs. Computer: Benchmarking Machine Learning Algorithms for
Traffic Sign Recognition", Neural Networks 32, 2012 (https://doi.org/10.1016/j.neunet.2012.02.016), section 2: 43
classes, pictures of 15x15 to 250x250, cut out of video; the up to 30 frames of a track show one sign and are near
copies.
"""

from __future__ import annotations

import csv
import re
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, ClassVar

import numpy as np
from annotated_types import Ge

from fedbd.data.cache import cached
from fedbd.data.checks import Arrays, check_values, shorten, to_dataset
from fedbd.data.download import Origin, obtain
from fedbd.data.groups import group_numbers
from fedbd.data.picture_files import read_pictures, stamp_of
from fedbd.errors import DataError, Problem
from fedbd.method_fields import checks_fields
from fedbd.types import Dataset

TRAIN, TEST, TRUTH = "gtsrb/GTSRB/Training", "gtsrb/GTSRB/Final_Test/Images", "gtsrb/GT-final_test.csv"
FRAME = re.compile(r"(\d{5})/(\d{5})_\d{5}\.ppm")
"""Class and track of a training picture, by its path."""


@dataclass(frozen=True, kw_only=True)
@checks_fields
class Gtsrb:
    """GTSRB, from ``gtsrb/`` in the data folder, whole pictures brought to one size; its groups are the tracks.

    Partition ``natural`` gives every track to one client; other partitions split tracks, whose frames are near copies.

    Attributes:
        size: Height and width that every picture is brought to, bilinearly.
        download: Let torchvision fetch it (276 MB) where it is not there.
    """

    size: Annotated[int, Ge(8)] = 32
    download: bool = False
    has_groups: ClassVar[bool] = True

    def load(self, root: Path | None) -> Dataset:
        """Return the decoded data set (see ``types.DataSource``).

        Raises:
            DataError: If a file is missing or damaged.
        """
        base = obtain(_origin(), root, self.download)
        train, test = _training(base), _test(base)
        stamp = stamp_of(base, [*(name for name, _, _ in train), *(name for name, _ in test), TRUTH])
        fields = {"size": self.size, "pillow": version("pillow"), "files": stamp}
        return to_dataset(cached("gtsrb", fields, [], lambda: self._decode(base, train, test)))

    def _decode(self, base: Path, train: list[tuple[str, int, int]], test: list[tuple[str, int]]) -> Arrays:
        pictures, problems = read_pictures(base, [name for name, _, _ in train], TRAIN, self.size, 3)
        seen, others = read_pictures(base, [name for name, _ in test], TEST, self.size, 3)
        if problems or others:
            raise DataError(problems + others)
        labels = np.array([label for _, label, _ in train], dtype=np.int64)
        arrays: Arrays = {
            "train_images": pictures,
            "train_labels": labels,
            "test_images": seen,
            "test_labels": np.array([label for _, label in test], dtype=np.int64),
            "train_groups": group_numbers(np.array([track for _, _, track in train]), labels, per_class=True),
        }
        check_values(arrays, {"train_labels": TRAIN, "test_labels": TRUTH, "test_images": TEST})
        return arrays


def _origin() -> Origin:
    return Origin(
        name="gtsrb",
        made_by="torchvision.datasets.GTSRB (both splits)",
        needed=[TRAIN, TEST, TRUTH],
        address=lambda: "https://sid.erda.dk/public/archives/daaeac0d7ce1152aea9b61d9f1e19370/",
        fetch=_fetch,
    )


def _fetch(base: Path) -> None:
    from torchvision.datasets import GTSRB  # noqa: PLC0415 - takes seconds, and only a download needs it

    for split in ("train", "test"):
        made: Any = GTSRB
        made(root=str(base), split=split, download=True)


def _training(base: Path) -> list[tuple[str, int, int]]:
    """Return name, class and track of each training picture, sorted."""
    found, problems = [], []
    for path in sorted((base / TRAIN).glob("*/*.ppm")):
        name = f"{path.parent.name}/{path.name}"
        match = FRAME.fullmatch(name)
        if match is None:
            expected = "must be named CLASS/TRACK_FRAME.ppm, five digits each"
            problems.append(Problem(path=f"{TRAIN}/{name}", expected=expected))
        else:
            found.append((f"{TRAIN}/{name}", int(match[1]), int(match[2])))
    if not found and not problems:
        problems.append(Problem(path=TRAIN, expected="must hold pictures CLASS/TRACK_FRAME.ppm", got="none"))
    if problems:
        raise DataError(shorten(TRAIN, problems, "pictures"))
    return found


def _test(base: Path) -> list[tuple[str, int]]:
    """Return name and class of each test picture, in the order of the list of labels."""
    found, problems = [], []
    try:
        with (base / TRUTH).open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file, delimiter=";", skipinitialspace=True))
    except (OSError, ValueError, csv.Error) as error:
        expected = f"must be the list of test labels ({error})"
        raise DataError([Problem(path=TRUTH, expected=expected, remedy="copy the file again")]) from None
    for number, row in enumerate(rows, start=2):
        name, label = row.get("Filename") or "", row.get("ClassId") or ""
        where = f"{TRUTH}, line {number}"
        if not re.fullmatch(r"[\w-]+\.ppm", name) or not re.fullmatch(r"\d{1,4}", label):
            problems.append(Problem(path=where, expected="must name a .ppm file and its ClassId"))
        elif not (base / TEST / name).is_file():
            problems.append(Problem(path=where, expected=f"must name a picture in {TEST}", got=name))
        else:
            found.append((f"{TEST}/{name}", int(label)))
    if not rows:
        problems.append(Problem(path=TRUTH, expected="must list the test pictures", got="none"))
    if problems:
        raise DataError(shorten(TRUTH, problems, "lines"))
    return found
