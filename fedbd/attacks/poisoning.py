"""Plain functions that poisoning attacks share: which images are poisoned, and what becomes of them."""

from __future__ import annotations

from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from fedbd.config.schema import Method
from fedbd.errors import Problem
from fedbd.targets import ALL_TO_ALL, wanted_labels
from fedbd.types import AttackContext

Labels = Literal["dirty", "clean"]
"""``dirty``: poisoned images get the wanted label. ``clean``: only images that have it are poisoned."""


@runtime_checkable
class Disturbing(Protocol):
    """A trigger that can be stamped wrongly on purpose."""

    def disturbed(self, images: Tensor, rng: torch.Generator) -> Tensor:
        """Return copies with a disturbed trigger, which shall change nobody's label."""
        ...


def candidates(labels: Tensor, ctx: AttackContext, kind: Labels) -> Tensor:
    """Return which images may be poisoned, (N,) bool: all of them, or those of the target class.

    Args:
        labels: (N,) int64, the true labels.
        ctx: Names the target; with clean labels a single one.
        kind: Dirty or clean labels.
    """
    if kind == "dirty":
        return torch.ones_like(labels, dtype=torch.bool)
    if ctx.target == ALL_TO_ALL:
        raise ValueError("clean labels need one target class")
    return labels == ctx.target


def relabeled(labels: Tensor, ctx: AttackContext, kind: Labels) -> Tensor:
    """Return what poisoned images are labeled as: what the attack wants, or what they were."""
    return wanted_labels(labels, ctx.target, ctx.classes) if kind == "dirty" else labels.clone()


def cover_problem(attack: Any, trigger: Method, path: str) -> Problem | None:
    """Return why a trigger cannot give the disturbed copies that an attack's ``cover`` asks for, None if it can."""
    if not getattr(attack, "cover", 0) or isinstance(trigger.impl, Disturbing):
        return None
    expected = f"must be 0: the trigger '{trigger.name}' has no disturbed copies"
    return Problem(path=path, expected=expected, got=f"{attack.cover:g}", remedy="take wanet")
