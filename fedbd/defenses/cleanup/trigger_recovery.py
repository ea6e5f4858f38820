"""Trigger recovery: the smallest patch that sends clean images to one label.

B. Wang, Y. Yao, S. Shan, H. Li, B. Viswanath, H. Zheng, B. Y. Zhao, "Neural Cleanse: Identifying and Mitigating
Backdoor Attacks in Neural Networks", IEEE S&P 2019, https://doi.org/10.1109/SP.2019.00031, sections IV-B and V; code
https://github.com/bolunwang/backdoor. On RNP's unlearned model as in https://arxiv.org/abs/2305.14876 (abstract).

Differs from the paper:

- One pass over the trusted set's fit part stands for the code's step of 1,000 drawn images, and there are ``passes``
  of them at most (the code: 1,000). Cost, patience, multipliers and early stop count passes as the code counts steps.
- Images that have the label anyway are left out: they need no trigger.
- What a pass achieves is counted while the mask moves, as in the code; the success that is reported is measured on
  the validation part, never on images that the trigger was fitted to.
- The loss of a batch is the cross-entropy and the l1 norm of the mask with the adaptive cost, by Adam with the code's
  rates, over the code's tanh parameters (a sigmoid of twice their value).
- Where nothing is reached, no trigger is handed on; the code keeps the last one.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Literal

import numpy as np
import torch
from annotated_types import Ge, Gt, Le
from torch import Tensor, nn

from fedbd.defenses.cleanup.trigger_search import Search, anomaly_indices, outliers, search
from fedbd.defenses.sound_model import need_sound
from fedbd.defenses.trusted_data import required
from fedbd.errors import MethodRefused
from fedbd.method_fields import checks_fields
from fedbd.metrics import predict
from fedbd.types import Clues, Notes, Samples, TrustedData

FEWEST_CLASSES = 3
"""Of two sizes both lie one median deviation from their median, whatever they are: neither is an outlier."""

HALF = 0.5
"""Share of the images that a trigger found on the unlearned model must move in the given one to be handed on."""


@dataclass(frozen=True, kw_only=True)
@checks_fields
class TriggerRecovery:
    """Recovers a trigger; the model stays as it is.

    Every label of every model has some trigger: one of a clean model is natural, and larger. Compare ``size`` with that
    of the attack-free twin, or take ``labels: all``, where a model's other labels stand for a clean one.
    Measured: 2 of 1,024 pixels for the target of a WRN-16-1 with a 3x3 grid on CIFAR-10, and not where the grid was
    stamped (its training shifted and mirrored images); on 8x8 digits 5 to 7 pixels for the target of three backdoored
    networks against 8 to 11 for a label of three clean ones, too close for the index to tell.

    Attributes:
        on: What the trigger is fitted to. ``model``: the given model, as Neural Cleanse does. ``unlearned``: RNP's
            unlearned model, from an earlier method. It gives most clean images the target label without any trigger,
            and the fewer images are left to win, the less its trigger says: on the digits (6 networks) it had one or
            two pixels and did nothing to the given model. ``success_without`` and ``success_on_model`` tell.
        labels: ``detected``: ``target``, or the label that an earlier method found. ``all``: every label, and those
            whose trigger is much smaller than the others' are declared.
        target: A label to search; null takes the detected one.
        declare_at: Anomaly index from which ``labels: all`` declares a label. 2 is the paper's: 5 % of a normal
            distribution's values lie beyond it on both sides.
        passes: Most passes over the trusted set's fit part per label.
        batch_size: Images per step of Adam.
        recover_lr: Adam's rate.
        success: Share of a pass's images that must get the label for its trigger to count.
    """

    on: Literal["model", "unlearned"] = "model"
    labels: Literal["detected", "all"] = "detected"
    target: Annotated[int, Ge(0)] | None = None
    declare_at: Annotated[float, Gt(0)] = 2.0
    passes: Annotated[int, Ge(1)] = 80
    batch_size: Annotated[int, Ge(1)] = 32
    recover_lr: Annotated[float, Gt(0)] = 0.1
    success: Annotated[float, Gt(0), Le(1)] = 0.99

    @property
    def needs_trusted(self) -> bool:
        """It fits the trigger to clean data."""
        return True

    @property
    def needs_clue(self) -> str | None:
        """What an earlier method must have found: an unlearned model comes with its label."""
        if self.on == "unlearned":
            return "unlearned"
        return "target" if self.labels == "detected" and self.target is None else None

    @property
    def gives_clues(self) -> frozenset[str]:
        """What later methods may use."""
        return frozenset({"trigger", "target"})

    @property
    def repairs(self) -> bool:
        """The model is returned as it came."""
        return False

    def problems(self) -> list[tuple[str, str]]:
        """Return what is wrong between the fields."""
        clash = self.labels == "all" and self.target is not None
        return [("target", "must be null where labels is all")] if clash else []

    def refusal_on(self, model: nn.Module, trusted: TrustedData) -> str | None:
        """Return why a task of so many classes cannot be searched, None if it can: a run asks before it starts."""
        return self._outside(trusted.classes, self.target)

    def _outside(self, classes: int, target: int | None) -> str | None:
        if target is not None and not 0 <= target < classes:
            return f"trigger_recovery searches target {target} and the labels are 0 to {classes - 1}; set one of them"
        if self.labels == "all" and classes < FEWEST_CLASSES:
            return (
                f"trigger_recovery with labels: all looks for a trigger smaller than those of the other labels, and "
                f"of {classes} classes none can be; set labels: detected, or target"
            )
        return None

    def clean(
        self, model: nn.Module, trusted: TrustedData | None, clues: Clues, rng: torch.Generator
    ) -> tuple[nn.Module, Clues, Notes]:
        """Return an unchanged copy of a model and a recovered trigger.

        Args:
            model: Left untouched.
            trusted: The trigger is fitted to ``fit``; its success is measured on ``validate``.
            clues: Its ``target`` and ``unlearned`` are used where the fields say so.
            rng: Draws starts and orders.

        Returns:
            The copy; the clues with ``trigger`` and ``target``; and notes: ``acted`` (a trigger was found), ``on``,
            ``target``, ``size`` (l1 norm of the mask in pixels), ``size_share`` (of the image), ``success`` and
            ``success_without`` the trigger (shares of the validation images of other labels that get the label from
            what ``on`` names), ``success_on_model`` (the same from the given model), ``anomaly_index`` (``labels:
            all``), and ``searched``: label, size, reached, passes, anomaly index of each. Where nothing is found, the
            clues are passed on as they came, ``acted`` is false and ``reason`` says why. That is also so where ``on:
            unlearned`` finds a trigger that moves less than half of the images in the given model, or that no
            validation image can try.

        Raises:
            MethodRefused: Without trusted data, for a target outside the classes, for ``labels: all`` of two classes,
                if no image has another label, or if the outputs of the model are not finite.
        """
        trusted = required(trusted, "trigger_recovery", "fits a trigger to")
        need_sound(model, "trigger_recovery", trusted.fit, trusted.classes)
        chosen = self.target if self.target is not None else clues.target
        outside = self._outside(trusted.classes, None if self.labels == "all" else chosen)
        if outside is not None:
            raise MethodRefused(outside)
        network, reason = model if self.on == "model" else clues.unlearned, ""
        if network is None:
            reason = "no earlier method left its unlearned model: put rnp_label or rnp before it, or set on: model"
        elif self.labels == "detected" and chosen is None:
            reason = "no label was detected: put rnp_label or rnp before it, set target, or labels: all"
        if network is None or reason:
            return copy.deepcopy(model), clues, {"acted": False, "reason": reason, "on": self.on}
        wanted = range(trusted.classes) if self.labels == "all" or chosen is None else (chosen,)
        found, notes = self._search(network, trusted, wanted, rng)
        notes = {"acted": found is not None, "on": self.on, **notes}
        if found is not None:
            notes |= _measured(model, network, found, trusted.validate)
            moved = notes["success_on_model"]
            if self.on == "unlearned" and moved is None:
                reason = f"no validation image has another label than {found.label}: trust images of several classes"
                notes |= {"acted": False, "reason": reason}
            elif self.on == "unlearned" and moved < HALF:
                notes |= {"acted": False, "reason": "the trigger does nothing to the model itself: set on: model"}
        if not notes["acted"] or found is None:
            return copy.deepcopy(model), clues, notes
        return copy.deepcopy(model), replace(clues, trigger=found.trigger, target=found.label), notes

    def _search(
        self, network: nn.Module, trusted: TrustedData, wanted: Sequence[int], rng: torch.Generator
    ) -> tuple[Search | None, Notes]:
        """Search labels; return the one that counts, and notes."""
        searches = [
            search(
                network,
                trusted.fit,
                label,
                passes=self.passes,
                batch_size=self.batch_size,
                lr=self.recover_lr,
                success=self.success,
                rng=rng,
            )
            for label in wanted
        ]
        indices = anomaly_indices([one.trigger.size for one in searches])
        notes: Notes = {"searched": [_as_notes(*pair) for pair in zip(searches, indices, strict=True)]}
        if self.labels == "all":
            small = outliers(searches, self.declare_at)
            notes |= {"declared": [one.label for _, one in small], "anomaly_index": small[0][0] if small else None}
            if not small:
                notes["reason"] = f"no label's trigger is an outlier (anomaly index above {self.declare_at:g})"
            return (small[0][1] if small else None), notes
        if searches[0].reached:
            return searches[0], notes
        notes["reason"] = (
            f"no trigger sends {self.success:g} of the images to {searches[0].label} after {self.passes} passes: raise "
            "passes or recover_lr, or lower success"
        )
        return None, notes


def _as_notes(found: Search, index: float) -> Notes:
    return {
        "label": found.label,
        "size": found.trigger.size,
        "reached": found.reached,
        "passes": found.passes,
        "anomaly_index": float(index) if math.isfinite(index) else None,
    }


def _measured(model: nn.Module, network: nn.Module, found: Search, validate: Samples) -> Notes:
    """Return what a found trigger does to validation images of other labels."""
    others = validate.subset(torch.nonzero(validate.labels != found.label)[:, 0])

    def share(judge: nn.Module, stamp: Callable[[Tensor], Tensor] | None) -> float | None:
        return float(np.mean(predict(judge, others, stamp=stamp) == found.label)) if len(others) else None

    with_trigger = share(network, found.trigger.stamp)
    return {
        "target": found.label,
        "size": found.trigger.size,
        "size_share": found.trigger.size / found.trigger.mask.numel(),
        "success": with_trigger,
        "success_without": share(network, None),
        "success_on_model": with_trigger if network is model else share(model, found.trigger.stamp),
    }
