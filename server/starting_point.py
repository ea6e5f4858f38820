"""A model of a run to go on from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

from fedbd.types import Vector

from .masking import Mask, mask_from, mask_state


@dataclass(frozen=True, kw_only=True)
class StartingPoint:
    """A model to go on from.

    Attributes:
        round: The round after which it stood.
        weights: (D,) float32.
        mask: What stays switched off; empty for none.
    """

    round: int
    weights: Vector
    mask: Mask = field(default_factory=dict)

    def state(self) -> dict[str, Any]:
        """Return it as values and arrays for a checkpoint."""
        return {"round": self.round, "weights": self.weights, "mask": mask_state(self.mask)}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Self:
        """Return what ``state`` described."""
        return cls(round=state["round"], weights=state["weights"], mask=mask_from(state["mask"]))
