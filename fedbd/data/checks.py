"""What the arrays of a data set must be, whatever file they came from."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray

from fedbd.errors import DataError, Problem
from fedbd.types import Dataset, Samples

Arrays = dict[str, NDArray[np.generic]]
"""A decoded data set: ``{train,test}_images`` (N, C, H, W) uint8 and ``{train,test}_labels`` (N,) int64; where the
source has them, ``train_groups`` (N,) int64."""

LISTED = 5
SHOWN = 3
"""Bad rows or pictures that a message names one by one."""


def image_form_problems(where: str, shape: tuple[int, ...], dtype: np.dtype[np.generic], layout: str) -> list[Problem]:
    """Return what is wrong with shape and type of an array of images.

    Args:
        where: Where it stands, for the message.
        shape: Right if (N, H, W), or four dimensions with 1 or 3 channels where the layout says.
        dtype: Right if uint8.
        layout: ``nhwc`` or ``nchw``.
    """
    problems: list[Problem] = []
    if dtype.hasobject:
        problems.append(_pickled(where, "uint8"))
    elif dtype != np.uint8:
        scale = "images in [0, 1]: save np.rint(255 * x).astype(np.uint8)" if dtype.kind == "f" else "save it as uint8"
        problems.append(Problem(path=where, expected="must be uint8", got=str(dtype), remedy=scale))
    forms = "(N, H, W) or " + ("(N, H, W, C)" if layout == "nhwc" else "(N, C, H, W)")
    if len(shape) not in {3, 4}:
        problems.append(Problem(path=where, expected=f"must have shape {forms}", got=str(shape)))
    elif 0 in shape:
        problems.append(Problem(path=where, expected="must not be empty", got=f"shape {shape}"))
    elif len(shape) == 4 and shape[3 if layout == "nhwc" else 1] not in {1, 3}:
        other = "nchw" if layout == "nhwc" else "nhwc"
        expected = f"must have shape {forms} with 1 or 3 channels"
        remedy = f"set data.layout to {other} if the channels stand elsewhere"
        problems.append(Problem(path=where, expected=expected, got=str(shape), remedy=remedy))
    return problems


def label_form_problems(where: str, shape: tuple[int, ...], dtype: np.dtype[np.generic]) -> list[Problem]:
    """Return what is wrong with shape and type of an array of labels: right are integers, (N,) or (N, 1)."""
    problems: list[Problem] = []
    if dtype.hasobject:
        problems.append(_pickled(where, "integers"))
    elif dtype.kind not in "iu":
        problems.append(Problem(path=where, expected="must be integers", got=str(dtype)))
    if len(shape) == 2 and shape[1] > 1:
        remedy = "class numbers, not one-hot rows: save y.argmax(axis=1)"
        problems.append(Problem(path=where, expected="must have shape (N,)", got=str(shape), remedy=remedy))
    elif len(shape) != 1 and (len(shape) != 2 or shape[1] != 1):
        problems.append(Problem(path=where, expected="must have shape (N,)", got=str(shape)))
    elif shape[0] == 0:
        problems.append(Problem(path=where, expected="must not be empty", got=f"shape {shape}"))
    return problems


def _pickled(where: str, wanted: str) -> Problem:
    remedy = "fedbd opens no pickles: save a plain array"
    return Problem(path=where, expected=f"must be {wanted}", got="Python objects", remedy=remedy)


def problems_of_train_labels(path: str, labels: NDArray[np.int64]) -> list[Problem]:
    """Return what is wrong with the values of the training labels.

    Args:
        path: Where they stand, for the message.
        labels: (N,) int64, N >= 1; right if they are 0 .. C - 1, each at least once, C >= 2.
    """
    lowest, highest = int(labels.min()), int(labels.max())
    if lowest < 0:
        return [_negative(path, lowest)]
    present = np.unique(labels)
    if len(present) < 2:
        got = f"only class {lowest}"
        return [Problem(path=path, expected="must hold at least 2 classes", got=got)]
    absent = highest + 1 - len(present)
    if absent:
        first = np.setdiff1d(np.arange(len(present) + LISTED), present)[: min(LISTED, absent)]
        more = f" and {absent - len(first)} more" if absent > len(first) else ""
        got = f"no sample of class {', '.join(map(str, first))}{more}"
        expected = f"must hold every class from 0 to {highest}"
        return [Problem(path=path, expected=expected, got=got, remedy="number the classes from 0 without gaps")]
    return []


def problems_of_test_labels(path: str, labels: NDArray[np.int64], classes: int) -> list[Problem]:
    """Return what is wrong with the values of the test labels.

    Args:
        path: Where they stand, for the message.
        labels: (N,) int64, N >= 1; right if they are 0 .. classes - 1.
        classes: Number of classes in the training set.
    """
    if int(labels.min()) < 0:
        return [_negative(path, int(labels.min()))]
    if int(labels.max()) >= classes:
        expected = f"must be classes of the training set, 0 to {classes - 1}"
        return [Problem(path=path, expected=expected, got=str(int(labels.max())))]
    return []


def _negative(path: str, label: int) -> Problem:
    return Problem(path=path, expected="must be class numbers from 0", got=str(label))


def check_values(arrays: Arrays, paths: Mapping[str, str]) -> None:
    """Check labels and shapes of decoded arrays that each have the right type and length.

    Args:
        arrays: See ``Arrays``.
        paths: Where each of them stands, for the messages.

    Raises:
        DataError: With every problem found.
    """
    train, test = arrays["train_labels"].astype(np.int64), arrays["test_labels"].astype(np.int64)
    problems = problems_of_train_labels(paths["train_labels"], train)
    if not problems:
        problems += problems_of_test_labels(paths["test_labels"], test, int(train.max()) + 1)
    shapes = [arrays[f"{part}_images"].shape[1:] for part in ("train", "test")]
    if shapes[0] != shapes[1]:
        expected = f"must hold pictures like the training set's, {describe(shapes[0])}"
        problems.append(Problem(path=paths["test_images"], expected=expected, got=describe(shapes[1])))
    if problems:
        raise DataError(problems)


def describe(shape: tuple[int, ...]) -> str:
    """Return a (C, H, W) shape in words: ``28x28 with 1 channel``."""
    channels, height, width = shape
    return f"{height}x{width} with {channels} channel{'s' if channels > 1 else ''}"


def shorten(name: str, problems: list[Problem], what: str = "rows") -> list[Problem]:
    """Return the first few problems of a file's rows, or of a folder's pictures, and count the others."""
    if len(problems) <= SHOWN:
        return problems
    more = f"{len(problems) - SHOWN} more"
    return [*problems[:SHOWN], Problem(path=name, expected=f"must hold no such {what}", got=more)]


def to_dataset(arrays: Arrays) -> Dataset:
    """Return checked arrays as a data set of tensors over the same memory."""
    groups = arrays.get("train_groups")
    tensors = {name: torch.from_numpy(np.asarray(array)) for name, array in arrays.items() if name != "train_groups"}
    return Dataset(
        train=Samples(tensors["train_images"], tensors["train_labels"]),
        test=Samples(tensors["test_images"], tensors["test_labels"]),
        classes=int(tensors["train_labels"].max()) + 1,
        groups=None if groups is None else groups.astype(np.int64, copy=False),
    )
