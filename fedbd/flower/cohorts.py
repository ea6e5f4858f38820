"""From folded sums to what an aggregation rule sees, and from its verdict back to clients."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
from torch import nn

from fedbd.flower.folding import Fold
from fedbd.sums import Row, mean_of
from fedbd.types import Aggregate, Cohort, TrustedData, Vector

Sums = tuple[tuple[int, ...], ...]


def cohort_of(
    fold: Fold,
    totals: Mapping[int, Row],
    *,
    rows: bool,
    ids: bool,
    trusted: TrustedData | None,
    build: Callable[[Vector], nn.Module] | None = None,
) -> Cohort:
    """Return the cohort as the rule sees it.

    Args:
        fold: The round's replies.
        totals: Bucket -> opened sum.
        rows: Whether the rule compares rows (updates or bucket means).
        ids: Whether each row is one client with a stable id.
        trusted: The server's trusted data.
        build: Makes a model of flat weights; see ``Cohort.build``.
    """
    means = [mean_of(total, fold.bits) for total in totals.values()]
    mean, _ = mean_of(np.sum(list(totals.values()), axis=0), fold.bits)
    holder = {fold.bucket[client]: client for client in fold.accepted}
    return Cohort(
        updates=np.stack([row for row, _ in means]) if rows else None,
        mean=mean,
        weights=np.array([weight for _, weight in means]),
        clients=len(fold.accepted),
        ids=tuple(holder[bucket] for bucket in totals) if ids else None,
        global_weights=fold.start,
        trusted=trusted,
        build=build,
    )


def verdict(
    fold: Fold, totals: Mapping[int, Row], aggregate: Aggregate
) -> tuple[tuple[int, ...], tuple[int, ...] | None]:
    """Return the clients that count, and those that the rule left out (None for a rule that rejects nobody)."""
    clients = sorted(fold.accepted)
    if aggregate.accepted is None:
        return tuple(clients), None
    counted = dict(zip(totals, aggregate.accepted, strict=True))
    accepted = tuple(client for client in clients if counted[fold.bucket[client]])
    return accepted, tuple(client for client in clients if not counted[fold.bucket[client]])


def sums_seen(fold: Fold) -> Sums:
    """Return the clients of each sum that the server saw; in the clear it sees every single update."""
    accepted = sorted(fold.accepted)
    if fold.evaluator is None:
        return tuple((client,) for client in accepted)
    groups: dict[int, list[int]] = {}
    for client in accepted:
        groups.setdefault(fold.bucket[client], []).append(client)
    return tuple(tuple(groups[bucket]) for bucket in sorted(groups))
