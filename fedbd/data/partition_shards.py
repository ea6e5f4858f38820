"""Clients of a few classes each, by shards: the training samples, sorted by label, cut into shards and dealt.

Reference: McMahan et al., "Communication-Efficient Learning of Deep Networks from Decentralized Data", AISTATS 2017
(https://arxiv.org/abs/1602.05629), section 3, "Non-IID": MNIST sorted by digit label, 200 shards of 300, two for each
of 100 clients.

Differs from the paper: where the samples are no multiple of the shards, the first shards hold one sample more.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import numpy as np
from annotated_types import Ge
from numpy.typing import NDArray

from fedbd.errors import Problem, UserError
from fedbd.method_fields import checks_fields


@dataclass(frozen=True, kw_only=True)
@checks_fields
class Shards:
    """Equal shards of label-sorted samples, so many for each client, at random.

    A client holds about ``per_client`` classes, fewer where its shards are of one class, more where a shard lies across
    the border of two: ``pathological`` gives exactly so many.

    Attributes:
        per_client: Shards of each client.
    """

    per_client: Annotated[int, Ge(1)] = 2

    def split(self, labels: NDArray[np.int64], clients: int, rng: np.random.Generator) -> list[NDArray[np.int64]]:
        """Return one ascending index array per client (see ``types.Partitioner``).

        Raises:
            UserError: If there are more shards than samples.
        """
        shards = clients * self.per_client
        if shards > len(labels):
            expected = f"cannot cut {len(labels)} samples into {shards} shards, {self.per_client} for each client"
            remedy = f"use at most {len(labels) // self.per_client} clients"
            if len(labels) < self.per_client:
                remedy = f"set partition.per_client to {max(1, len(labels) // clients)} or less"
            raise UserError([Problem(path="partition", expected=expected, remedy=remedy)])
        shuffled = rng.permutation(len(labels)).astype(np.int64)  # which samples of a class share a shard is chance
        ordered = shuffled[np.argsort(labels[shuffled], kind="stable")]
        pieces = np.array_split(ordered, shards)
        dealt = rng.permutation(shards).reshape(clients, self.per_client)
        return [np.sort(np.concatenate([pieces[shard] for shard in hand])) for hand in dealt]
