"""Repairs of one model outside of any federation: run methods on it, measure what they made of it, row by row.

``repair`` runs one method; ``repair_all`` runs several, each on the original or each on what the one before it left,
and measures model and attack-free twin before and after.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from fedbd.errors import MethodRefused
from fedbd.metrics import BRIEF, evaluate
from fedbd.seeding import torch_rng
from fedbd.summary import gave_up_target
from fedbd.targets import Target, one_label, victims
from fedbd.types import Cleanup, Clues, Notes, Samples, Trigger, TrustedData, quantized


@dataclass(frozen=True, kw_only=True)
class Repaired:
    """What one method made of a model.

    Attributes:
        model: The repaired copy; an unchanged model where the method did not act.
        clues: What it found, for the next method.
        notes: Its notes; ``acted`` is always there, ``reason`` where it did not act.
        seconds: Wall seconds.
        acted: Whether it changed the model, or, of a method that only finds clues, found some.
        refused: It could not act at all (``errors.MethodRefused``).
    """

    model: nn.Module
    clues: Clues
    notes: Notes
    seconds: float
    acted: bool
    refused: bool = False


@dataclass(frozen=True, kw_only=True)
class Truth:
    """What no defender knows; only a method with ``oracle: true`` is told.

    Attributes:
        trigger: The real trigger.
        target: The real target label, or ``all_to_all``.
        triggered: (N, C, H, W) uint8, triggered inputs that are no test images.
    """

    trigger: Trigger
    target: Target
    triggered: Tensor


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of a table of repairs.

    Attributes:
        method: Its label.
        oracle: It, or in a chain one before it, was told the truth.
        repairs: Whether the method is one that repairs, or one that only finds clues.
        repaired: What came out.
        before: ``judge`` of the model that the method was given.
        after: ``judge`` of what it left.
        twin_before: The same of the attack-free twin; None without one.
        twin_after: The twin after the same method with the same data and seed; None without one.
    """

    method: str
    oracle: bool
    repairs: bool
    repaired: Repaired
    before: Notes
    after: Notes
    twin_before: Notes | None = None
    twin_after: Notes | None = None

    @property
    def floor(self) -> float | None:
        """What the trigger gets from the twin after the same method; None without a (sound) twin."""
        twin = self.twin_after
        return None if twin is None or twin["collapsed"] else twin["attack_success"]

    @property
    def gave_up_target(self) -> bool:
        """Whether it bought its low attack success with the target class (``summary.gave_up_target``)."""
        return gave_up_target(self.before, self.after)

    @property
    def price(self) -> float | None:
        """Clean accuracy that the method costs on the twin, which has no backdoor to repair."""
        if self.twin_before is None or self.twin_after is None:
            return None
        return float(self.twin_before["clean_accuracy"] - self.twin_after["clean_accuracy"])

    def flat(self) -> dict[str, Any]:
        """Return the row as plain values, shares as fractions of 1, for a file."""
        plain: dict[str, Any] = {
            "method": self.method,
            "oracle": self.oracle,
            "acted": self.repaired.acted,
            "reason": self.repaired.notes.get("reason"),
            "seconds": self.repaired.seconds,
        }
        for name in BRIEF:
            plain |= {f"{name}_before": self.before[name], f"{name}_after": self.after[name]}
        return plain | {"attack_success_floor": self.floor, "clean_accuracy_price": self.price}


Judge = Callable[[nn.Module], Notes]


def repair(
    model: nn.Module,
    method: Cleanup,
    trusted: TrustedData | None,
    clues: Clues,
    rng: torch.Generator,
    truth: Truth | None = None,
) -> Repaired:
    """Run one method on a model, which is left untouched.

    Args:
        model: Any classifier that the method takes.
        method: A cleanup.
        trusted: Clean data, or None.
        clues: What earlier methods found.
        rng: The only source of randomness.
        truth: What a method with ``oracle: true`` is told; no other is, and nothing of it gets into its clues.

    Returns:
        Its result; a method that refuses leaves the model itself, ``acted`` False and the refusal as ``reason``.
    """
    told_all = truth is not None and bool(getattr(method, "oracle", False))
    given = replace(clues, pruned={})
    if told_all and truth is not None:
        given = replace(given, trigger=truth.trigger, target=one_label(truth.target), triggered=truth.triggered)
    started = time.perf_counter()
    try:
        fixed, found, notes = method.clean(model, trusted, given, rng)
    except MethodRefused as refusal:
        seconds = time.perf_counter() - started
        reason: Notes = {"acted": False, "reason": str(refusal)}
        return Repaired(model=model, clues=clues, notes=reason, seconds=seconds, acted=False, refused=True)
    seconds = time.perf_counter() - started
    # What an oracle knew must not reach a method that claims to know nothing.
    found = replace(clues, pruned=found.pruned) if told_all else found
    acted = bool(notes.get("acted", True))
    return Repaired(model=fixed, clues=found, notes={"acted": acted, **notes}, seconds=seconds, acted=acted)


def judge(model: nn.Module, test: Samples, classes: int, trigger: Trigger | None, target: Target | None) -> Notes:
    """Return ``metrics.BRIEF`` of a model on a test set; those of an attack are None without a trigger and a target."""
    triggers = {} if trigger is None or target is None else {"trigger": (trigger, target)}
    return evaluate(model, test, triggers, classes).brief()


def stamped_inputs(samples: Samples, trigger: Trigger, target: Target, most: int = 100) -> Tensor:
    """Return up to ``most`` triggered inputs, (N, C, H, W) uint8, of samples that the attack wants another label of."""
    others = torch.nonzero(victims(samples.labels, target))[:most, 0]
    return quantized(trigger.stamp(samples.batch(others)[0]))


def repair_all(
    model: nn.Module,
    methods: Mapping[str, Cleanup],
    trusted: TrustedData | None,
    clues: Clues,
    seed: int,
    judged: Judge,
    *,
    truth: Truth | None = None,
    twin: nn.Module | None = None,
    chain: bool = False,
) -> Iterator[Row]:
    """Run several methods and measure each; a row comes as soon as it is done.

    Args:
        model: Left untouched, as is the twin.
        methods: By label. Of the same seed all draw alike, but for later steps of a chain: two methods that differ in
            one term, as NAD and fine-tuning do, are a pair.
        trusted: Clean data, or None.
        clues: What all methods may know from the start (``reference``).
        seed: Of the methods' randomness.
        judged: Measures a model (see ``judge``).
        truth: What methods with ``oracle: true`` are told.
        twin: The attack-free twin, repaired in the same way.
        chain: Each method starts from the model and the clues that the one before it left; else from the original.
    """
    lanes = [_Lane(model, clues, judged(model))]
    lanes += [] if twin is None else [_Lane(twin, clues, judged(twin))]
    tainted = False
    for number, (label, method) in enumerate(methods.items()):
        oracle = bool(getattr(method, "oracle", False))
        steps = [_step(lane, number if chain else 0, method, trusted, seed, judged, truth) for lane in lanes]
        own, others = steps[0], steps[1:]
        yield Row(
            method=label,
            oracle=oracle or (chain and tainted),
            repairs=bool(getattr(method, "repairs", True)),
            repaired=own[0],
            before=lanes[0].measures,
            after=own[1].measures,
            twin_before=lanes[1].measures if others else None,
            twin_after=others[0][1].measures if others else None,
        )
        tainted = tainted or oracle
        lanes = [lane for _, lane in steps] if chain else lanes


@dataclass(frozen=True)
class _Lane:
    """A model on its way through a chain, what was found on the way, and its measures."""

    model: nn.Module
    clues: Clues
    measures: Notes


def _step(
    lane: _Lane,
    place: int,
    method: Cleanup,
    trusted: TrustedData | None,
    seed: int,
    judged: Judge,
    truth: Truth | None,
) -> tuple[Repaired, _Lane]:
    result = repair(lane.model, method, trusted, lane.clues, torch_rng(seed, f"clean/step {place}"), truth)
    changed = result.acted and bool(getattr(method, "repairs", True))
    return result, _Lane(result.model, result.clues, judged(result.model) if changed else lane.measures)
