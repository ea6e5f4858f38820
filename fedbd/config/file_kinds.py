"""Whether a YAML file is a scenario (``fedbd run``) or a central training (``fedbd train``), told by its fields."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fedbd.errors import Problem, ScenarioError

CENTRAL_ONLY = frozenset({"poison", "held_out", "defense"})
FEDERATED_ONLY = frozenset({"rounds", "partition", "cohort", "attacks", "local_defense", "secure_sum", "aggregation"})


def is_central(values: Any) -> bool:
    """Return whether plain values are meant for a central training (``fedbd train``): by fields that only that has."""
    return isinstance(values, dict) and bool(CENTRAL_ONLY & values.keys()) and not FEDERATED_ONLY & values.keys()


def refuse_central(values: Any, path: Path) -> None:
    """Refuse a file for ``fedbd train`` where a scenario is wanted: every field would be told as wrong.

    Raises:
        ScenarioError: With the command for it.
    """
    if is_central(values):
        got, remedy = "a central training (one model on one data set)", f"use fedbd train {path}"
        raise ScenarioError([Problem(path=str(path), expected="must be a scenario", got=got, remedy=remedy)])


def refuse_federated(values: Any, path: Path) -> None:
    """Refuse a file for ``fedbd run`` where a central training is wanted.

    Raises:
        ScenarioError: With the command for it.
    """
    if isinstance(values, dict) and FEDERATED_ONLY & values.keys() and not CENTRAL_ONLY & values.keys():
        got, remedy = "a scenario (rounds of clients)", f"use fedbd run {path}"
        raise ScenarioError([Problem(path=str(path), expected="must be a central training", got=got, remedy=remedy)])
