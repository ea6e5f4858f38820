"""The trusted set in whole groups: no track, no client's samples on both sides.

Near copies in a trusted set and at the clients would let a threshold, or a repaired model, be judged on what was
trained on. So groups are taken whole; of the last group of a kind only what is wanted is used, and its other samples
are given to nobody. The part to fit on and the part to validate on share no group either.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fedbd.data.stratify import apportion
from fedbd.errors import Problem, UserError

Index = NDArray[np.int64]
NOBODY = -1
"""The kind of samples that may not be taken."""


def draw_groups(
    kinds: Index, groups: Index, counts: Index, validate: int, rng: np.random.Generator
) -> tuple[Index, Index, Index]:
    """Draw groups in random order until there are enough samples of each kind.

    Args:
        kinds: (N,) int64, what each sample counts as: its class, 0 where classes do not matter, or ``NOBODY``.
        groups: (N,) int64, whose it is.
        counts: (K,) int64, samples wanted of each kind, to fit and to validate on together.
        validate: How many of them to validate on; each kind gives its share.
        rng: Draws the order of the groups, and the samples within a group of which not all are wanted.

    Returns:
        The indices to fit on, to validate on, and of the groups that were not touched; disjoint, ascending int64.

    Raises:
        UserError: If the groups run out, or nothing is left for the clients.
    """
    ids, owner = np.unique(groups, return_inverse=True)
    members = np.split(np.argsort(owner, kind="stable"), np.cumsum(np.bincount(owner))[:-1])
    free = list(rng.permutation(len(ids)))
    for_validation = apportion(counts, validate)
    drawn = []
    for wanted in (for_validation, counts - for_validation):
        taken, free = _gather(kinds, members, free, wanted, rng)
        drawn.append(taken)
    if not free:
        expected = f"must leave whole groups: it takes all {len(ids)}"
        raise UserError([Problem(path="trusted.size", expected=expected, got=str(int(counts.sum())))])
    rest = np.sort(np.concatenate([members[place] for place in free])).astype(np.int64)
    return drawn[1], drawn[0], rest


def _gather(
    kinds: Index, members: list[Index], free: list[int], wanted: Index, rng: np.random.Generator
) -> tuple[Index, list[int]]:
    """Return the samples taken, ascending, and the groups that stay free, in their order."""
    need, taken, left = wanted.copy(), [np.empty(0, np.int64)], []
    for place in free:
        mine = rng.permutation(members[place]) if need.any() else members[place][:0]
        found = [(kind, mine[kinds[mine] == kind]) for kind in np.unique(kinds[mine]) if kind != NOBODY and need[kind]]
        for kind, rows in found:
            taken.append(rows[: need[kind]])
            need[kind] -= len(taken[-1])
        if not found:
            left.append(place)
    if need.any():
        short = int(need.argmax())
        of = f" of class {short}" if len(wanted) > 1 else ""
        expected = f"cannot be taken in whole groups: {need[short]} samples{of} are lacking when all groups are used"
        remedy = "lower trusted.size, or set trusted.groups to split"
        raise UserError([Problem(path="trusted.size", expected=expected, remedy=remedy)])
    return np.sort(np.concatenate(taken)).astype(np.int64), left
