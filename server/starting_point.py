"""A model of a run to go on from, and the one that a run came from."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from fedbd.config.scenario import Scenario
from fedbd.types import Notes, Vector

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


def started_from(scenario: Scenario, warmed: Path | None) -> Notes | None:
    """Return the file that a run started from, its content's hash and the clean rounds behind it; None: a fresh model.

    Args:
        scenario: The run's.
        warmed: What its warm-up left, where it starts from one.
    """
    start = scenario.start
    if start is None:
        return None
    file = warmed if start.checkpoint is None else Path(start.checkpoint).expanduser()
    there = file is not None and file.is_file()
    return {
        "file": None if file is None else str(file),
        "sha256": hashlib.sha256(file.read_bytes()).hexdigest() if there and file is not None else None,
        "warm_up": start.warm_up,
    }
