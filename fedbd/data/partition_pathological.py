"""Clients that hold exactly k classes each.

Reference: Li, Diao, Chen, He, "Federated Learning on Non-IID Data Silos: An Experimental Study", ICDE 2022
(https://arxiv.org/abs/2102.02079), section 4.1, "Quantity-based label imbalance" (#C = k): k different labels are
assigned to each party; the samples of a label are divided at random and equally among the parties that own it.

Differs from the paper: labels are not assigned independently, but so that each is owned by equally many clients, give
or take one; so no class is left without an owner.
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
class Pathological:
    """Exactly ``classes`` classes for each client; a class's samples are shared equally by its owners.

    Attributes:
        classes: Classes of each client.
    """

    classes: Annotated[int, Ge(1)] = 2

    def split(self, labels: NDArray[np.int64], clients: int, rng: np.random.Generator) -> list[NDArray[np.int64]]:
        """Return one ascending index array per client (see ``types.Partitioner``).

        Raises:
            UserError: If there are fewer classes than that, too few clients to own them all, or a class has fewer
                samples than owners.
        """
        present = np.unique(labels)
        problem = self._impossible(len(present), clients)
        if problem is not None:
            raise UserError([problem])
        owned = _assign(len(present), clients, self.classes, rng)
        hands: list[list[NDArray[np.int64]]] = [[] for _ in range(clients)]
        for place, label in enumerate(present):
            members = rng.permutation(np.flatnonzero(labels == label))
            owners = np.flatnonzero(owned[:, place])
            if len(members) < len(owners):
                expected = f"gives class {label} to {len(owners)} clients, and it has {len(members)} samples"
                remedy = "use fewer clients or fewer classes a client"
                raise UserError([Problem(path="partition", expected=expected, remedy=remedy)])
            for client, part in zip(owners, np.array_split(members, len(owners)), strict=True):
                hands[client].append(part)
        return [np.sort(np.concatenate(hand)) for hand in hands]

    def _impossible(self, present: int, clients: int) -> Problem | None:
        """Return why no assignment exists, or None."""
        if self.classes > present:
            expected = f"must be at most the number of classes in the data, {present}"
            return Problem(path="partition.classes", expected=expected, got=str(self.classes))
        if clients * self.classes < present:
            expected = (
                f"leaves classes without a client: {clients} clients own {self.classes} each, and there are {present}"
            )
            remedy = f"set partition.classes to {-(-present // clients)} or more, or use more clients"
            return Problem(path="partition", expected=expected, remedy=remedy)
        return None


def _assign(present: int, clients: int, each: int, rng: np.random.Generator) -> NDArray[np.bool_]:
    """Return who owns which class, (clients, present): ``each`` per row, columns equal but for one."""
    owned = np.zeros((clients, present), dtype=bool)
    holders = np.zeros(present, dtype=np.int64)
    for client in range(clients):
        chance = rng.permutation(present)
        fewest = chance[np.argsort(holders[chance], kind="stable")][:each]  # ties in random order
        owned[client, fewest] = True
        holders[fewest] += 1
    return owned
