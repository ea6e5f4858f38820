"""Clients that differ in how much they hold, not in what.

References: sizes from a Dirichlet distribution: Li, Diao, Chen, He, "Federated Learning on Non-IID Data Silos: An
Experimental Study", ICDE 2022 (https://arxiv.org/abs/2102.02079), section 4.3, "Quantity skew". Sizes by a power law:
Li et al., "Federated Optimization in Heterogeneous Networks", MLSys 2020 (https://arxiv.org/abs/1812.06127), section
5.1.

Differs from the papers: every client gets ``minimum`` samples first, and the law shares out the others; NIID-Bench
draws again until the smallest client has ten. The power law is the deterministic one (the client of rank r has a share
in proportion to r ** -alpha); the paper does not say how its sizes were drawn.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
from annotated_types import Ge, Gt
from numpy.typing import NDArray

from fedbd.errors import Problem, UserError
from fedbd.method_fields import checks_fields


@dataclass(frozen=True, kw_only=True)
@checks_fields
class Quantity:
    """Random samples, in parts of very different size.

    Attributes:
        law: ``dirichlet``: the clients' shares are one draw from a symmetric Dirichlet distribution; ``power``: the
            client of rank r has a share in proportion to ``r ** -alpha``, and ranks are dealt at random.
        alpha: ``dirichlet``: concentration, smaller is more skewed; ``power``: exponent, larger is more skewed.
        minimum: Samples that every client gets before the law shares out the others.
    """

    law: Literal["dirichlet", "power"] = "dirichlet"
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
        order = rng.permutation(len(labels)).astype(np.int64)
        if self.law == "dirichlet":
            shares = rng.dirichlet(np.full(clients, self.alpha))
        else:
            weights = rng.permutation(np.arange(1, clients + 1, dtype=np.float64) ** -self.alpha)
            shares = weights / weights.sum()
        spare = len(labels) - clients * self.minimum
        cuts = np.rint(np.cumsum(shares)[:-1] * spare).astype(np.int64) + self.minimum * np.arange(1, clients)
        return [np.sort(part) for part in np.split(order, cuts)]


def minimum_problem(samples: int, clients: int, minimum: int) -> Problem | None:
    """Return the problem of so many samples that cannot give each client its minimum, or None."""
    if samples >= clients * minimum:
        return None
    expected = f"must leave each of {clients} clients its minimum of {minimum} of {samples} samples"
    lower = f"set partition.minimum to {samples // clients} or less, or " if samples >= clients else ""
    return Problem(path="partition", expected=expected, remedy=f"{lower}use at most {samples // minimum} clients")
