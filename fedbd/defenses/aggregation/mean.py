"""The weighted mean of all updates: federated averaging without a defense.

H. B. McMahan et al., "Communication-Efficient Learning of Deep Networks from Decentralized Data", AISTATS 2017,
https://arxiv.org/abs/1602.05629, algorithm 1.

Differs from the paper: it averages updates instead of weights, which is the same for a server rate of 1.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from fedbd.defenses.aggregation.rows import norms, to_vector
from fedbd.method_fields import checks_fields
from fedbd.types import Aggregate, Cohort, Memory, Need, Notes


@dataclass(frozen=True, kw_only=True)
@checks_fields
class Mean:
    """Federated averaging; all that one full sum allows without help from the clients."""

    @property
    def needs(self) -> frozenset[Need]:
        """Only the sum."""
        return frozenset({Need.SUM})

    @property
    def minimum_rows(self) -> int:
        """One row is its own mean."""
        return 1

    def aggregate(self, cohort: Cohort, memory: Memory, rng: torch.Generator) -> tuple[Aggregate, Memory, Notes]:
        """Return the cohort's weighted mean; the notes hold its norm.

        Args:
            cohort: Only ``mean`` is read.
            memory: Passed on.
            rng: Not drawn from.
        """
        del rng
        delta = to_vector(cohort.mean)
        return Aggregate(delta=delta), memory, {"norm": float(norms(delta[np.newaxis])[0])}
