"""Splits that keep the classes' shares."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Index = NDArray[np.int64]


def apportion(counts: Index, total: int) -> Index:
    """Split ``total`` in proportion to ``counts`` by largest remainders (ties go to the lower index).

    Args:
        counts: (C,) non-negative int64.
        total: At most the sum of ``counts``.

    Returns:
        (C,) int64, summing to ``total``, each at most the count's share rounded up.
    """
    exact = counts * total
    whole, rest = np.divmod(exact, max(int(counts.sum()), 1))
    shares = whole.astype(np.int64)
    order = np.argsort(-rest, kind="stable")
    shares[order[: total - int(shares.sum())]] += 1
    return shares


def stratified(labels: Index, total: int, rng: np.random.Generator) -> tuple[Index, Index]:
    """Draw ``total`` positions so that each class has its share of them (see ``apportion``).

    Args:
        labels: (N,) int64.
        total: How many to draw, 0 .. N.
        rng: Draws within the classes, in ascending order of class.

    Returns:
        The drawn positions and the rest, both ascending int64.
    """
    classes, counts = np.unique(labels, return_counts=True)
    takes = apportion(counts.astype(np.int64), total)
    drawn = np.zeros(len(labels), dtype=bool)
    for label, take in zip(classes, takes, strict=True):
        drawn[rng.permutation(np.flatnonzero(labels == label))[:take]] = True
    return np.flatnonzero(drawn), np.flatnonzero(~drawn)
