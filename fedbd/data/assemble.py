"""From a data set to a federation: the trusted set is taken out, the rest is split among the clients."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedbd import seeding
from fedbd.data.trusted import Trusted, hold_out
from fedbd.errors import Problem, UserError
from fedbd.types import Dataset, Partitioner, Samples, TrustedData


@dataclass(frozen=True)
class Federation:
    """Who holds which data.

    Attributes:
        dataset: The whole data set; its training part is shared, no client's samples are copied until asked for.
        partitions: One ascending int64 index array into ``dataset.train`` per client, pairwise disjoint, none empty.
        trusted: What the server holds, or None.
    """

    dataset: Dataset
    partitions: list[NDArray[np.int64]]
    trusted: TrustedData | None

    def client(self, client: int) -> Samples:
        """Return a copy of a client's samples (0 <= client < number of clients)."""
        return self.dataset.train.subset(self.partitions[client])

    @property
    def sizes(self) -> tuple[int, ...]:
        """Number of samples of each client."""
        return tuple(len(part) for part in self.partitions)


def assemble(
    dataset: Dataset, partitioner: Partitioner, clients: int, trusted: Trusted | None, seed: int
) -> Federation:
    """Split a data set among the server and the clients; the same arguments give the same federation.

    Args:
        dataset: The data set.
        partitioner: Splits what the trusted set leaves.
        clients: Number of clients, at least 1.
        trusted: The trusted set, or None for none.
        seed: The scenario's seed.

    Raises:
        UserError: If there are too few samples, or the partitioner does not keep its contract.
    """
    labels = dataset.train.labels.numpy()
    fit, validate, rest = held_by_server(dataset, trusted, partitioner, seed)
    split: Any = partitioner.split
    if getattr(partitioner, "takes_groups", False):
        split = partial(split, groups=None if dataset.groups is None else dataset.groups[rest])
    parts = split(labels[rest], clients, seeding.numpy_rng(seed, "partition"))
    _check(parts, clients, len(rest), type(partitioner).__name__)
    held = None
    if trusted is not None:
        held = TrustedData(dataset.train.subset(fit), dataset.train.subset(validate), dataset.classes)
    return Federation(dataset, [rest[part] for part in parts], held)


def held_by_server(
    dataset: Dataset, trusted: Trusted | None, partitioner: Partitioner | None, seed: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Return what a run's trusted set is, and what it leaves for the clients.

    Args:
        dataset: The data set.
        trusted: The trusted set, or None for none.
        partitioner: One that keeps groups whole keeps the trusted set apart from them, too, unless ``trusted.groups``
            says otherwise.
        seed: The scenario's seed.

    Returns:
        The indices to fit on, to validate on and left for the clients; disjoint, ascending int64.

    Raises:
        UserError: If the data cannot give such a set.
    """
    whole = False
    if trusted is not None:
        kept = dataset.groups is not None and getattr(partitioner, "keeps_groups", False)
        whole = kept if trusted.groups is None else trusted.groups == "whole"
    if whole and dataset.groups is None:
        remedy = "name the column in data.groups (npz, image_parquet), or leave the field out"
        expected = "cannot be whole: these data have no groups"
        raise UserError([Problem(path="trusted.groups", expected=expected, remedy=remedy)])
    groups = dataset.groups if whole else None
    return hold_out(dataset.train.labels.numpy(), trusted, seeding.numpy_rng(seed, "trusted"), groups)


def _check(parts: list[NDArray[np.int64]], clients: int, samples: int, name: str) -> None:
    """Hold a partitioner, which may be a third party's, to its contract."""
    faults = []
    if len(parts) != clients:
        faults.append(f"{len(parts)} parts for {clients} clients")
    if any(len(part) == 0 for part in parts):
        faults.append("an empty part")
    if any((np.diff(part) <= 0).any() for part in parts):
        faults.append("a part out of order")
    together = np.concatenate(parts) if parts else np.empty(0, np.int64)
    if len(np.unique(together)) != len(together):
        faults.append("a sample given twice")
    if len(together) and (together.min() < 0 or together.max() >= samples):
        faults.append("an index outside the data")
    if faults:
        expected = f"{name}.split must return one ascending index array per client, disjoint, none empty"
        raise UserError([Problem(path="partition", expected=expected, got=", ".join(faults))])
