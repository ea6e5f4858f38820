"""Norm clipping: no update counts with more than a fixed length.

Z. Sun, P. Kairouz, A. T. Suresh, H. B. McMahan, "Can You Really Backdoor Federated Learning?", 2019,
https://arxiv.org/abs/1911.07963 ("norm thresholding of updates").

Differs from the paper: without its Gaussian noise; the mean keeps the cohort's weights (the paper's clients weigh the
same); ``where: client`` moves the clip to the clients, so that it works under one encrypted sum.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
import torch
from annotated_types import Gt
from numpy.typing import NDArray

from fedbd.defenses.aggregation.rows import norms, rows_of, to_vector, weighted_sum
from fedbd.method_fields import checks_fields
from fedbd.types import Aggregate, Cohort, Memory, Need, Notes, Vector


@dataclass(frozen=True, kw_only=True)
@checks_fields
class NormClip:
    """The weighted mean of ``delta_i * min(1, bound / ||delta_i||)``.

    Attributes:
        bound: Largest Euclidean norm with which a row counts, over all float entries of the model (the field uses 2 to
            5). On bucket means it bounds the bucket, not each client in it.
        where: ``server``: the server clips the rows that it sees. ``client``: honest clients clip their own update
            before it is encrypted, and the server takes the mean as it comes. That is advisory: an attacker ignores it.
    """

    bound: Annotated[float, Gt(0)] = 3.0
    where: Literal["server", "client"] = "server"

    @property
    def needs(self) -> frozenset[Need]:
        """Single rows for a clip at the server, the sum for a clip at the clients."""
        return frozenset({Need.INDIVIDUAL if self.where == "server" else Need.SUM})

    @property
    def minimum_rows(self) -> int:
        """The clip of a single row is defined."""
        return 1

    def clip_local(self, delta: Vector) -> Vector:
        """Return what an honest client sends: its clipped update, or ``delta`` itself under ``where: server``.

        Args:
            delta: (D,) float32; left untouched.
        """
        if self.where == "server":
            return delta
        return to_vector(delta * self._factors(norms(delta[np.newaxis]))[0])

    def aggregate(self, cohort: Cohort, memory: Memory, rng: torch.Generator) -> tuple[Aggregate, Memory, Notes]:
        """Return the mean of the clipped rows.

        Args:
            cohort: ``updates`` and ``weights`` are read, or ``mean`` under ``where: client``.
            memory: Passed on.
            rng: Not drawn from.

        Returns:
            The aggregate, ``memory``, and notes: ``norms`` (of the rows before the clip) and ``clipped`` (how many rows
            were shortened), both None under ``where: client``, and ``advisory`` (whether clients clip).

        Raises:
            MethodRefused: If ``where`` is ``server`` and the server sees only one sum.
        """
        del rng
        if self.where == "client":
            return Aggregate(delta=to_vector(cohort.mean)), memory, {"norms": None, "clipped": None, "advisory": True}
        rows = rows_of(cohort, "norm_clip")
        lengths = norms(rows)
        total = weighted_sum(rows, cohort.weights * self._factors(lengths))
        notes: Notes = {
            "norms": lengths.tolist(),
            "clipped": int(np.count_nonzero(lengths > self.bound)),
            "advisory": False,
        }
        return Aggregate(delta=to_vector(total / cohort.weights.sum())), memory, notes

    def _factors(self, lengths: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return ``min(1, bound / length)``, 1 for a length of 0."""
        return self.bound / np.maximum(lengths, self.bound)
