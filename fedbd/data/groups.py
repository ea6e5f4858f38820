"""Whose a training sample is: a column of ids beside images and labels (see ``types.Dataset.groups``)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fedbd.errors import Problem


def group_form_problems(where: str, shape: tuple[int, ...], dtype: np.dtype[np.generic], samples: int) -> list[Problem]:
    """Return what is wrong with shape and type of a column of groups: right are integers or text, (N,) or (N, 1).

    Args:
        where: Where it stands, for the message.
        shape: Of the column.
        dtype: Of the column.
        samples: N, the number of training images.
    """
    problems = []
    if dtype.hasobject:
        remedy = "fedbd opens no pickles: save a plain array"
        problems.append(Problem(path=where, expected="must be integers or text", got="Python objects", remedy=remedy))
    elif dtype.kind not in "iuUS":
        problems.append(Problem(path=where, expected="must be integers or text", got=str(dtype)))
    if shape not in {(samples,), (samples, 1)}:
        expected = f"must hold one id per training image, shape ({samples},)"
        remedy = "name the training part's column" if len(shape) == 1 else ""
        problems.append(Problem(path=where, expected=expected, got=str(shape), remedy=remedy))
    return problems


def group_numbers(column: NDArray[np.generic], labels: NDArray[np.generic], per_class: bool) -> NDArray[np.int64]:
    """Return a column of groups as numbers.

    Args:
        column: (N,) or (N, 1), integers (kept as they are) or text (numbered in the order of its bytes).
        labels: (N,) int64.
        per_class: The same id in two classes is two groups; they are then numbered by class and id.
    """
    flat = column.reshape(len(column))
    numbers = flat.astype(np.int64) if flat.dtype.kind in "iu" else _inverse(flat)
    if not per_class:
        return numbers
    places = _inverse(numbers)
    return _inverse(labels.astype(np.int64) * (int(places.max()) + 1) + places)


def _inverse(values: NDArray[np.generic]) -> NDArray[np.int64]:
    places: NDArray[np.int64] = np.unique(values, return_inverse=True)[1].reshape(-1).astype(np.int64)
    return places


def per_class_problems(groups: str | None, per_class: bool) -> list[tuple[str, str]]:
    """Return what is wrong between the two fields that name a column of groups."""
    alone = per_class and groups is None
    return [("groups_per_class", "must be false where groups names no column")] if alone else []
