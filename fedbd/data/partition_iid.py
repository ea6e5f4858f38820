"""Independent, identically distributed clients: the training samples, shuffled and cut into equal parts."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedbd.errors import Problem, UserError
from fedbd.method_fields import checks_fields


@dataclass(frozen=True, kw_only=True)
@checks_fields
class Iid:
    """Equal parts at random; where N is not a multiple of the clients, the first ones hold one sample more.

    Reference: McMahan et al., "Communication-Efficient Learning of Deep Networks from Decentralized Data", AISTATS 2017
    (https://arxiv.org/abs/1602.05629), section 3, "IID".
    """

    def split(self, labels: NDArray[np.int64], clients: int, rng: np.random.Generator) -> list[NDArray[np.int64]]:
        """Return one ascending index array per client (see ``types.Partitioner``).

        Raises:
            UserError: If there are fewer samples than clients.
        """
        if len(labels) < clients:
            expected = f"must be at most the number of training samples, {len(labels)}"
            raise UserError([Problem(path="partition.clients", expected=expected, got=str(clients))])
        return [np.sort(part) for part in np.array_split(rng.permutation(len(labels)).astype(np.int64), clients)]
