"""Plain functions over a cohort's rows that several aggregation rules share."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fedbd.errors import MethodRefused
from fedbd.types import Cohort, Vector


def rows_of(cohort: Cohort, rule: str) -> NDArray[np.float32]:
    """Return the cohort's rows, (n, D) float32.

    Args:
        cohort: What the server sees.
        rule: The rule's name, for the message.

    Raises:
        MethodRefused: If the server sees only one sum.
    """
    if cohort.updates is None:
        raise MethodRefused(
            f"{rule} needs single updates or bucket means and the server sees one sum; "
            "set bucket_size to a number, or take a rule that works on a sum"
        )
    return cohort.updates


def norms(rows: NDArray[np.float32]) -> NDArray[np.float64]:
    """Return each row's Euclidean norm, (n,), summed in float64 (row by row: no float64 copy of all rows)."""
    return np.array([np.sqrt(np.sum(np.square(row, dtype=np.float64))) for row in rows], dtype=np.float64)


def weighted_sum(rows: NDArray[np.float32], weights: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return ``sum_i weights_i rows_i``, (D,) float64, added in row order."""
    total = np.zeros(rows.shape[1], dtype=np.float64)
    for row, weight in zip(rows, weights, strict=True):
        total += weight * row.astype(np.float64)
    return total


def to_vector(values: NDArray[np.floating]) -> Vector:
    """Return values as a contiguous (D,) float32 vector."""
    return np.ascontiguousarray(values, dtype=np.float32)
