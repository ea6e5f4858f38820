"""Exact sums: updates are rounded to a grid of 2^-24, weighted, and added as integers.

Integer sums do not depend on the order in which clients finish, on their number of workers or on encryption, so plain
and encrypted runs give the same bits. One row is ``[w * delta, w]`` on the grid: whoever sums rows can divide.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fedbd.crypto.grid import GRID_BITS, dequantize, quantize
from fedbd.types import Vector

Row = NDArray[np.int64]
LARGEST = 2.0**28
"""Largest magnitude of a value in the clear, where the grid is still exact in float64."""


def to_row(delta: Vector, weight: float, largest: float = LARGEST, bits: int = GRID_BITS) -> Row:
    """Return one client's row, (D + 1,) int64 on the grid.

    Args:
        delta: (D,) float32, local minus global weights.
        weight: The client's weight, > 0.
        largest: Values above it in magnitude are refused.
        bits: The grid's step is 2^-bits.

    Raises:
        SecureSumFailed: If a value is not finite or too large.
    """
    values = np.empty(delta.size + 1, dtype=np.float64)
    np.multiply(delta, weight, out=values[:-1], dtype=np.float64)
    values[-1] = weight
    return quantize(values, bits, limit=largest)


def mean_of(total: Row, bits: int = GRID_BITS) -> tuple[Vector, float]:
    """Return the weighted mean, (D,) float32, and the weight, of a sum of rows on the grid of 2^-bits.

    Raises:
        ValueError: If the total weight is not positive.
    """
    values = dequantize(total, bits)
    weight = float(values[-1])
    if weight <= 0:
        raise ValueError(f"the total weight must be > 0, got {weight:g}")
    return (values[:-1] / weight).astype(np.float32), weight


def bucket_of(position: int, count: int, bucket_size: int | None, order: NDArray[np.int64]) -> int:
    """Return the bucket of the client at a position of the cohort.

    Args:
        position: Index into the ascending cohort.
        count: Clients in the cohort.
        bucket_size: Clients per bucket; a short last bucket joins the one before; None: one bucket.
        order: (count,) a seeded permutation: place of each position in the cut.
    """
    if bucket_size is None:
        return 0
    buckets = max(1, count // bucket_size)
    return min(int(order[position]) // bucket_size, buckets - 1)
