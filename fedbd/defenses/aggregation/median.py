"""The coordinate-wise median.

D. Yin, Y. Chen, K. Ramchandran, P. Bartlett, "Byzantine-Robust Distributed Learning: Towards Optimal Statistical
Rates", ICML 2018, https://arxiv.org/abs/1803.01498, definition 1 and option I of algorithm 1.

Differs from the paper: it takes the median of whole local updates, not of single gradients.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from fedbd.defenses.aggregation.rows import rows_of
from fedbd.method_fields import checks_fields
from fedbd.types import Aggregate, Cohort, Memory, Need, Notes, Vector

_CHUNK = 1 << 18
"""Coordinates sorted at a time: bounds the copy that sorting needs."""


def coordinate_median(rows: NDArray[np.float32]) -> Vector:
    """Return the median of every column, (D,) float32; of an even number of rows the mean of the middle two.

    Args:
        rows: (n, D) float32, n >= 1.
    """
    low, high = (len(rows) - 1) // 2, len(rows) // 2
    median = np.empty(rows.shape[1], dtype=np.float32)
    for start in range(0, rows.shape[1], _CHUNK):
        part = np.sort(rows[:, start : start + _CHUNK], axis=0)
        # In float64 the sum of two large middle values cannot overflow.
        median[start : start + _CHUNK] = (part[low].astype(np.float64) + part[high]) / 2
    return median


@dataclass(frozen=True, kw_only=True)
@checks_fields
class Median:
    """The median of every coordinate over the rows; all rows weigh the same."""

    @property
    def needs(self) -> frozenset[Need]:
        """Single rows."""
        return frozenset({Need.INDIVIDUAL})

    @property
    def minimum_rows(self) -> int:
        """Three: the median of two is their mean."""
        return 3

    def aggregate(self, cohort: Cohort, memory: Memory, rng: torch.Generator) -> tuple[Aggregate, Memory, Notes]:
        """Return the coordinate-wise median.

        Args:
            cohort: ``updates`` is read; ``weights`` only for the notes.
            memory: Passed on.
            rng: Not drawn from.

        Returns:
            The aggregate, ``memory``, and notes: ``rows``, ``degenerate`` (fewer rows than ``minimum_rows``, as clients
            may vanish after the scenario was checked) and ``weights_ignored`` (the rows' weights differ).

        Raises:
            MethodRefused: If the server sees only one sum.
        """
        del rng
        rows = rows_of(cohort, "median")
        notes: Notes = {
            "rows": len(rows),
            "degenerate": len(rows) < self.minimum_rows,
            "weights_ignored": bool(np.ptp(cohort.weights) > 0),
        }
        return Aggregate(delta=coordinate_median(rows)), memory, notes
