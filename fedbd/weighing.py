"""How much a client counts in a sum; the same rule in the clear and, at the client, before encryption."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Weighing:
    """How much a client counts.

    Attributes:
        weighting: ``equal``, or ``examples``: claimed examples over ``average_examples``.
        average_examples: Training samples per client on average: a public number that keeps weights near 1.
        largest: Cap on a weight. Under encryption the client's own side applies it: an attacker need not.
    """

    weighting: str = "equal"
    average_examples: float = 1.0
    largest: float = 10.0

    def weight(self, claimed: float) -> float:
        """Return the weight of a client that claims so many examples.

        Raises:
            ValueError: If the claim is not a positive finite number.
        """
        if self.weighting == "equal":
            return 1.0
        if not (math.isfinite(claimed) and claimed > 0):
            raise ValueError(f"num-examples must be a positive number, got {claimed!r}")
        return min(claimed / self.average_examples, self.largest)
