"""When to clean, on what data, and whether to keep the result."""

from __future__ import annotations

import time
from dataclasses import dataclass

from torch import nn

from fedbd.errors import MethodRefused
from fedbd.metrics import predict
from fedbd.plans import CleanupPlan
from fedbd.prepared import Prepared
from fedbd.seeding import torch_rng
from fedbd.types import Clues, Notes


@dataclass(frozen=True, kw_only=True)
class Cleaned:
    """What one cleanup made of a model.

    Attributes:
        plan: The cleanup.
        model: The repaired model; the received one where the method could not act or was rolled back.
        kept: Whether the repaired model stands.
        seconds: Wall seconds of the cleanup.
        notes: The method's notes, or why it did not act.
    """

    plan: CleanupPlan
    model: nn.Module
    kept: bool
    seconds: float
    notes: Notes


def clean(prepared: Prepared, plan: CleanupPlan, model: nn.Module, round_: int, clues: Clues) -> tuple[Cleaned, Clues]:
    """Run one cleanup on a model, which is left untouched.

    A repair in the loop is rolled back when accuracy on the trusted validation part falls by more than ``rollback``.
    """
    trusted = prepared.federation.trusted
    rng = torch_rng(prepared.scenario.seed, f"cleanup/{plan.key}", round_)
    started = time.perf_counter()
    try:
        repaired, clues, notes = plan.method.impl.clean(model, trusted, clues, rng)
    except MethodRefused as refusal:
        seconds = time.perf_counter() - started
        return Cleaned(
            plan=plan, model=model, kept=False, seconds=seconds, notes={"acted": False, "reason": str(refusal)}
        ), clues
    kept = True
    if plan.mode == "in_loop" and plan.rollback is not None and trusted is not None:
        loss = accuracy(model, prepared) - accuracy(repaired, prepared)
        kept = loss <= plan.rollback
        notes = {**notes, "validation_loss": loss, "rolled_back": not kept}
    seconds = time.perf_counter() - started
    return Cleaned(plan=plan, model=repaired if kept else model, kept=kept, seconds=seconds, notes=notes), clues


def accuracy(model: nn.Module, prepared: Prepared) -> float:
    """Return accuracy on the trusted validation part."""
    trusted = prepared.federation.trusted
    if trusted is None:
        raise ValueError("there is no trusted data to validate on")
    return float((predict(model, trusted.validate) == trusted.validate.labels.cpu().numpy()).mean())
