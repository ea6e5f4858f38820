"""Clients as the data name them: whoever wrote, owned or filmed the samples.

Reference: Caldas et al., "LEAF: A Benchmark for Federated Settings", 2018 (https://arxiv.org/abs/1812.01097), section
2: the data set's own key (the writer of a character) decides whose a sample is.

Differs from the paper: with fewer clients than ids a client gets several of them, each whole. So the same rule also
splits data whose samples come in near copies, as the frames of one track in GTSRB do.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from fedbd.errors import Problem, UserError
from fedbd.method_fields import checks_fields


@dataclass(frozen=True, kw_only=True)
@checks_fields
class Natural:
    """One client for each id in the data set's column of groups, or several whole ids for each client.

    With as many clients as ids, client 0 is the lowest id, and so on. No id is ever split between clients, nor between
    them and the trusted set (see ``trusted.groups``).

    Attributes:
        deal: Where there are fewer clients than ids. ``random``: equally many ids for each client, give or take one,
            at random; ``even``: the largest id first, each to the client that holds least so far, for equal sizes.
    """

    deal: Literal["random", "even"] = "random"
    takes_groups: ClassVar[bool] = True
    keeps_groups: ClassVar[bool] = True

    def split(
        self,
        labels: NDArray[np.int64],
        clients: int,
        rng: np.random.Generator,
        groups: NDArray[np.int64] | None = None,
    ) -> list[NDArray[np.int64]]:
        """Return one ascending index array per client (see ``types.Partitioner``).

        Raises:
            UserError: If the data name no groups, or fewer than there are clients.
        """
        if groups is None:
            remedy = "name the column in data.groups (npz, image_parquet), or take data that have one (gtsrb)"
            expected = "'natural' splits by the data's own ids, and these data have none"
            raise UserError([Problem(path="partition", expected=expected, remedy=remedy)])
        ids, owner, sizes = np.unique(groups, return_inverse=True, return_counts=True)
        if clients > len(ids):
            expected = f"must be at most the number of ids that are left for clients, {len(ids)}"
            remedy = "" if len(ids) == 0 else f"set it to {len(ids)} for one client per id"
            raise UserError([Problem(path="partition.clients", expected=expected, got=str(clients), remedy=remedy)])
        client_of = self._deal(sizes, clients, rng)
        holder = client_of[owner.reshape(-1)]
        order = np.argsort(holder, kind="stable").astype(np.int64)
        return np.split(order, np.cumsum(np.bincount(holder, minlength=clients))[:-1])

    def _deal(self, sizes: NDArray[np.int64], clients: int, rng: np.random.Generator) -> NDArray[np.int64]:
        """Return the client of each id, (ids,) int64."""
        if clients == len(sizes):
            return np.arange(clients, dtype=np.int64)
        dealt = np.empty(len(sizes), dtype=np.int64)
        chance = rng.permutation(len(sizes))
        if self.deal == "random":
            dealt[chance] = np.arange(len(sizes)) % clients
            return dealt
        held = np.zeros(clients, dtype=np.int64)
        for place in chance[np.argsort(-sizes[chance], kind="stable")]:
            dealt[place] = client = int(held.argmin())
            held[client] += sizes[place]
        return dealt
