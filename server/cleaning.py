"""When to clean, on what data and with which knowledge, and whether to keep the result."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
from torch import nn

from fedbd.central.repair import Truth, repair, stamped_inputs
from fedbd.config.plans import CleanupPlan
from fedbd.metrics import accuracy
from fedbd.prepared import Prepared
from fedbd.roles import assignment
from fedbd.seeding import torch_rng
from fedbd.types import Clues, Notes

from .masking import Mask, apply_mask


@dataclass(frozen=True, kw_only=True)
class Cleaned:
    """What one cleanup made of a model.

    Attributes:
        plan: The cleanup.
        model: The repaired model; the received one where the method could not act or was rolled back.
        kept: Whether the repaired model stands.
        seconds: Wall seconds of the cleanup.
        notes: The method's notes, or why it did not act.
        clues: What it found, for the next method; ``pruned`` is its own.
    """

    plan: CleanupPlan
    model: nn.Module
    kept: bool
    seconds: float
    notes: Notes
    clues: Clues

    @property
    def repairs(self) -> bool:
        """Whether the method is one that repairs, or one that only finds clues."""
        return bool(getattr(self.plan.method.impl, "repairs", True))

    @property
    def acted(self) -> bool:
        """Whether the repaired model stands and the method did something to it."""
        return bool(self.notes.get("acted", True)) and self.kept


def clean(
    prepared: Prepared, plan: CleanupPlan, model: nn.Module, round_: int, clues: Clues, held: Mask | None = None
) -> Cleaned:
    """Run one cleanup on a model, which is left untouched.

    A repair in the loop is rolled back when accuracy on the trusted validation part falls by more than ``rollback``.
    What ``held`` switches off stays so in a repair in the loop, also where the method trained it: that is what would be
    served.
    """
    trusted, method = prepared.federation.trusted, plan.method.impl
    rng = torch_rng(prepared.scenario.seed, "cleanup", round_)
    truth = truth_of(prepared) if getattr(method, "oracle", False) else None
    started = time.perf_counter()
    result = repair(model, method, trusted, clues, rng, truth)
    kept, notes = not result.refused, result.notes
    if kept and plan.mode == "in_loop":
        apply_mask(result.model, held or {})
    if kept and plan.mode == "in_loop" and plan.rollback is not None and trusted is not None:
        loss = accuracy(model, trusted.validate) - accuracy(result.model, trusted.validate)
        kept = loss <= plan.rollback
        notes = {**notes, "validation_loss": loss, "rolled_back": not kept}
    return Cleaned(
        plan=plan,
        model=result.model if kept else model,
        kept=kept,
        seconds=time.perf_counter() - started,
        notes=notes,
        clues=result.clues,
    )


def truth_of(prepared: Prepared) -> Truth | None:
    """Return the first attack's trigger, target and some triggered inputs (of its clients), None without one."""
    if not prepared.scenario.attacks:
        return None
    attack = prepared.scenario.attacks[0]
    owners = sorted(client for client, plan in assignment(prepared.scenario).items() if plan is attack)
    rows = np.concatenate([prepared.federation.partitions[client] for client in owners])
    trigger = attack.trigger.impl
    triggered = stamped_inputs(prepared.dataset.train.subset(rows), trigger, attack.target)
    return Truth(trigger=trigger, target=attack.target, triggered=triggered)
