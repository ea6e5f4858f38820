"""Clients with skewed class shares, drawn from a Dirichlet distribution class by class.

Reference: Yurochkin et al., "Bayesian Nonparametric Federated Learning of Neural Networks", ICML 2019
(https://arxiv.org/abs/1905.12022), section 4: for each class c draw p_c ~ Dir(alpha, ..., alpha) over the n clients and
give client i the share p_ci of the class. The backdoor literature's protocol (100 clients, alpha 0.5 or 0.9) is of this
kind (Bagdasaryan et al. 2018, DBA, Neurotoxin, BackFed), and so are NIID-Bench and Flower's ``DirichletPartitioner``.
Hsu et al. 2019 (https://arxiv.org/abs/1909.06335) is another variant: it draws a distribution over classes for each
client and gives all clients equally many samples.

Differs from the paper: nothing in the draw. The suites differ in what comes after it. DBA and its successors take the
size of one class for that of every class and round each client's share by itself, which drops samples or runs out of
them; here the cumulative shares are rounded, so each sample is given exactly once. NIID-Bench and Flower draw again
until every client has 10 samples, which changes the distribution and need not end; here a client below ``minimum`` is
filled up from the largest.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import numpy as np
from annotated_types import Ge, Gt
from numpy.typing import NDArray

from fedbd.data.partition_quantity import minimum_problem
from fedbd.errors import UserError
from fedbd.method_fields import checks_fields


@dataclass(frozen=True, kw_only=True)
@checks_fields
class Dirichlet:
    """Class shares from a symmetric Dirichlet distribution over the clients.

    Attributes:
        alpha: Concentration: 0.1 is strongly skewed, 0.5 the field's usual value, 100 nearly IID.
        minimum: Samples that every client holds at least. A client below it is given random samples of the client that
            holds most (of equals, the one of lowest number), until it is reached.
    """

    alpha: Annotated[float, Gt(0)] = 0.5
    minimum: Annotated[int, Ge(1)] = 1

    def split(self, labels: NDArray[np.int64], clients: int, rng: np.random.Generator) -> list[NDArray[np.int64]]:
        """Return one ascending index array per client (see ``types.Partitioner``).

        Raises:
            UserError: If there are fewer than ``clients * minimum`` samples.
        """
        problem = minimum_problem(len(labels), clients, self.minimum)
        if problem is not None:
            raise UserError([problem])
        owner = np.empty(len(labels), dtype=np.int64)
        for label in np.unique(labels):
            members = rng.permutation(np.flatnonzero(labels == label))
            shares = rng.dirichlet(np.full(clients, self.alpha))
            cuts = np.rint(np.cumsum(shares)[:-1] * len(members)).astype(np.int64)
            for client, part in enumerate(np.split(members, cuts)):
                owner[part] = client
        _fill(owner, clients, self.minimum, rng)
        return [np.flatnonzero(owner == client) for client in range(clients)]


def _fill(owner: NDArray[np.int64], clients: int, minimum: int, rng: np.random.Generator) -> None:
    """Give samples of the largest clients to those below the minimum, in place."""
    sizes = np.bincount(owner, minlength=clients)
    for client in np.flatnonzero(sizes < minimum):
        while sizes[client] < minimum:
            giver = int(sizes.argmax())
            owner[rng.choice(np.flatnonzero(owner == giver))] = client
            sizes[giver] -= 1
            sizes[client] += 1
