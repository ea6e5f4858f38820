"""Which label an attack wants of an image: one class for all (all-to-one), or the next class of each (all-to-all)."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import torch
from annotated_types import Ge
from torch import Tensor

from fedbd.errors import Problem

Target = int | Literal["all_to_all"]
"""One class, or (true label + 1) modulo the number of classes."""

TargetField = Annotated[int, Ge(0)] | Literal["all_to_all"]
"""A ``Target`` as a scenario's field, with its bound."""

ALL_TO_ALL: Literal["all_to_all"] = "all_to_all"


def wanted_labels(labels: Tensor, target: Target, classes: int) -> Tensor:
    """Return the label that an attack wants of each image.

    Args:
        labels: (N,) int64, the true labels.
        target: What the attack wants.
        classes: Number of classes of the task.

    Returns:
        (N,) int64, a new tensor on the same device.
    """
    return (labels + 1) % classes if target == ALL_TO_ALL else torch.full_like(labels, target)


def victims(labels: Tensor, target: Target | None) -> Tensor:
    """Return which images do not have the wanted label anyway, (N,) bool; all of them all-to-all, or for None."""
    return torch.ones_like(labels, dtype=torch.bool) if target in (None, ALL_TO_ALL) else labels != target


def one_label(target: Target) -> int | None:
    """Return the one label that an attack wants, None all-to-all."""
    return None if target == ALL_TO_ALL else target


def target_problem(target: Target, name: str, attack: Any, path: str) -> Problem | None:
    """Return why an attack cannot have its target, None if it can.

    Args:
        target: What it shall want.
        name: The attack's name.
        attack: The attack; one that can carry out all-to-all says so (``all_to_all`` is true).
        path: Where the target stands.
    """
    if target != ALL_TO_ALL or getattr(attack, "all_to_all", False):
        return None
    clean = getattr(attack, "labels", "dirty") == "clean"
    reason = (
        "with labels: clean an attack stamps the images of one class" if clean else f"'{name}' has one target class"
    )
    remedy = "set labels: dirty, or name a class" if clean else "name a class, or take badnets"
    return Problem(path=path, expected=f"must be a label: {reason}", got=f"'{ALL_TO_ALL}'", remedy=remedy)


def class_problem(target: Target | None, classes: int, path: str) -> Problem | None:
    """Return what is wrong with a target that is no class of the data, None if it is one, or several."""
    label = None if target is None else one_label(target)
    if label is None or 0 <= label < classes:
        return None
    return Problem(path=path, expected=f"must be a class of the data, 0 to {classes - 1}", got=str(label))
