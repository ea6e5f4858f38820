"""Image sets in one ``.npz`` file, in the layout that Keras made common: x_train, y_train, x_test, y_test."""

from __future__ import annotations

import math
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from annotated_types import MinLen

from fedbd.data.cache import cached
from fedbd.data.checks import Arrays, check_values, image_form_problems, label_form_problems, to_dataset
from fedbd.data.files import locate
from fedbd.data.groups import group_form_problems, group_numbers, per_class_problems
from fedbd.errors import DataError, Problem
from fedbd.method_fields import checks_fields
from fedbd.types import Dataset

Header = tuple[tuple[int, ...], np.dtype[np.generic]]
DAMAGE = (zipfile.BadZipFile, zlib.error, EOFError, ValueError, OSError, RuntimeError, MemoryError)
"""What zipfile and NumPy raise on damaged files (NotImplementedError and UnicodeDecodeError are among them)."""


@dataclass(frozen=True, kw_only=True)
@checks_fields
class Npz:
    """Arrays of images and labels in a ``.npz`` file.

    Images are uint8. Floats are refused rather than rounded: whether they mean 0 .. 1 or 0 .. 255 is their owner's to
    say. Labels are integers of any width, (N,) or (N, 1), that number the classes from 0 without gaps. No pickle is
    opened.

    Attributes:
        file: The file, relative to the data folder, or absolute.
        train_images: Name of the array of training images.
        train_labels: Name of the array of training labels.
        test_images: Name of the array of test images.
        test_labels: Name of the array of test labels.
        layout: Order of (N, H, W, C) or (N, C, H, W) images; images of one channel may also be (N, H, W).
        groups: Name of the array that says whose each training image is, integers or text: client ids, tracks of near
            copies. Partition ``natural`` splits by it.
        groups_per_class: The ids are counted anew in each class, as GTSRB's tracks are.
    """

    file: str
    train_images: str = "x_train"
    train_labels: str = "y_train"
    test_images: str = "x_test"
    test_labels: str = "y_test"
    layout: Literal["nhwc", "nchw"] = "nhwc"
    groups: Annotated[str, MinLen(1)] | None = None
    groups_per_class: bool = False

    @property
    def has_groups(self) -> bool:
        """Whether the data set gets a column of groups."""
        return self.groups is not None

    def problems(self) -> list[tuple[str, str]]:
        """Return what is wrong between the fields."""
        return per_class_problems(self.groups, self.groups_per_class)

    def load(self, root: Path | None) -> Dataset:
        """Return the decoded data set (see ``types.DataSource``).

        Raises:
            DataError: With every problem of the file.
        """
        files, problems = locate(self.file, root)
        if problems:
            raise DataError(problems)
        if len(files) > 1:
            got = ", ".join(path.name for path in files)
            raise DataError([Problem(path=self.file, expected="must name one file", got=got)])
        fields: dict[str, str | bool] = {**self._members(), "layout": self.layout}
        if self.groups is not None:
            fields["groups_per_class"] = self.groups_per_class
        return to_dataset(cached("npz", fields, files, lambda: self._decode(files[0])))

    def _members(self) -> dict[str, str]:
        """Return which array of the file plays which part."""
        groups = {} if self.groups is None else {"groups": self.groups}
        return groups | {
            "train_images": self.train_images,
            "train_labels": self.train_labels,
            "test_images": self.test_images,
            "test_labels": self.test_labels,
        }

    def _decode(self, path: Path) -> Arrays:
        """Read and check the file: first the arrays' headers, then the arrays."""
        try:
            archive = zipfile.ZipFile(path)
        except DAMAGE:
            raise DataError([_no_archive(self.file, path)]) from None
        with archive:
            headers, problems = self._headers(archive)
            problems += self._form_problems(headers)
            if problems:
                raise DataError(problems)
            arrays = self._arrays(archive)
        check_values(arrays, {part: f"{self.file}:{name}" for part, name in self._members().items()})
        return arrays

    def _headers(self, archive: zipfile.ZipFile) -> tuple[dict[str, Header], list[Problem]]:
        """Return shape and type of each array that can be read, and the problems of the others."""
        held = [name.removesuffix(".npy") for name in archive.namelist() if name.endswith(".npy")]
        headers, problems = {}, []
        for part, name in self._members().items():
            where = f"{self.file}:{name}"
            if name not in held:
                remedy = f"the file holds {', '.join(held) or 'no array'}; name the right one in data.{part}"
                problems.append(Problem(path=where, expected="must be there", got="no such array", remedy=remedy))
                continue
            try:
                headers[part] = _header(archive, name)
            except DAMAGE as error:
                problems.append(_damaged(where, error))
        return headers, problems

    def _form_problems(self, headers: dict[str, Header]) -> list[Problem]:
        """Return what is wrong with shapes and types."""
        problems = []
        for part, name in self._members().items():
            if part not in headers:
                continue
            shape, dtype = headers[part]
            where = f"{self.file}:{name}"
            if part == "groups":
                count = headers["train_images"][0][:1] if "train_images" in headers else shape[:1]
                problems += group_form_problems(where, shape, dtype, count[0] if count else 0)
                continue
            if part.endswith("_images"):
                problems += image_form_problems(where, shape, dtype, self.layout)
                continue
            problems += label_form_problems(where, shape, dtype)
            images = headers.get(part.replace("_labels", "_images"))
            if images and shape and images[0] and shape[0] != images[0][0]:
                expected = f"must hold one label per image, {images[0][0]}"
                problems.append(Problem(path=where, expected=expected, got=str(shape[0])))
        return problems

    def _arrays(self, archive: zipfile.ZipFile) -> Arrays:
        """Read the arrays and bring them to (N, C, H, W) uint8 and (N,) int64."""
        arrays: Arrays = {}
        problems, column = [], None
        for part, name in self._members().items():
            try:
                with archive.open(f"{name}.npy") as file:
                    array = np.lib.format.read_array(file, allow_pickle=False)
            except DAMAGE as error:
                problems.append(_damaged(f"{self.file}:{name}", error))
                continue
            if part == "groups":
                column = array
            elif part.endswith("_labels"):
                arrays[part] = array.reshape(len(array)).astype(np.int64)
            elif array.ndim == 3:
                arrays[part] = array[:, None]
            else:
                arrays[part] = array.transpose(0, 3, 1, 2) if self.layout == "nhwc" else array
        if problems:
            raise DataError(problems)
        if column is not None:
            arrays["train_groups"] = group_numbers(column, arrays["train_labels"], self.groups_per_class)
        return arrays


def _header(archive: zipfile.ZipFile, name: str) -> Header:
    """Return shape and type of an array without reading it."""
    with archive.open(f"{name}.npy") as file:
        major, _ = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if major == 1 else np.lib.format.read_array_header_2_0
        shape, _, dtype = read(file)
    if math.prod(shape) * dtype.itemsize > archive.getinfo(f"{name}.npy").file_size and not dtype.hasobject:
        raise ValueError("fewer bytes than its shape takes")  # before so much memory is asked for
    return shape, dtype


def _damaged(where: str, error: Exception) -> Problem:
    remedy = "the file is damaged: copy it again"
    return Problem(path=where, expected="must be readable", got=str(error) or type(error).__name__, remedy=remedy)


def _no_archive(where: str, path: Path) -> Problem:
    """Tell a damaged file from a file of another form."""
    with path.open("rb") as file:
        start = file.read(6)
    if start.startswith(b"PK"):
        got, remedy = "a damaged one", "copy the file again"
    elif start.startswith(b"\x93NUMPY"):
        got, remedy = "a single .npy array", "save images and labels together with np.savez_compressed"
    else:
        got, remedy = "a file of another form", "save the arrays with np.savez_compressed"
    return Problem(path=where, expected="must be a .npz archive", got=got, remedy=remedy)
