"""Reconstructive neuron pruning: unlearn clean data, recover them with masks, prune what the recovery dimmed.

Y. Li, X. Lyu, X. Ma, N. Koren, L. Lyu, B. Li, Y. Jiang, "Reconstructive Neuron Pruning for Backdoor Defense", ICML
2023, https://arxiv.org/abs/2305.14876; code https://github.com/bboylyg/RNP.

Differs from the paper:

- Defaults and the stop of the unlearning (0.20) are those of the code, but for augmentation, which is off; the paper
  unlearns to chance.
- The paper and the code leave the threshold to the reader; here it is fixed, or chosen on the trusted set's validation
  part, never by attack success.
- Images are not normalized by mean and deviation, as nowhere in fedbd.
- Not copied from the code: the gradient clip that stands before the backward pass and so does nothing; pruning with a
  stale unlearned model where the stop is never reached (here nothing is pruned and the notes say so); masks rounded to
  four decimals on their way through a file; running statistics that drift during the recovery (they are thrown away).
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Annotated, Literal

import numpy as np
import torch
from annotated_types import Ge, Gt, Le, Lt
from torch import nn

from fedbd.defenses.cleanup.masked_batchnorm import Masks, batchnorms, prune, recover_masks
from fedbd.defenses.cleanup.unlearning import STEP, modal_prediction, unlearn
from fedbd.errors import MethodRefused
from fedbd.metrics import predict
from fedbd.training import TrainingPlan
from fedbd.types import Clues, Notes, Samples, TrustedData

GRID = tuple(round(0.05 * step, 2) for step in range(19))
"""The code's thresholds: 0, 0.05 ... 0.9."""


@dataclass(frozen=True)
class Point:
    """One threshold's outcome: channels pruned and images of the validation part that are right."""

    threshold: float
    pruned: int
    right: int


def largest_kept(curve: list[Point], before: int, allowed: float) -> Point | None:
    """Return the point with the largest threshold that loses at most ``allowed`` right images, or None.

    Args:
        curve: In any order; it need not fall steadily.
        before: Right images of the model before pruning.
        allowed: Right images that may be lost, not necessarily an integer.
    """
    kept = [point for point in curve if before - point.right <= allowed + 1e-9]
    return max(kept, key=lambda point: point.threshold, default=None)


@dataclass(frozen=True, kw_only=True)
class RNP:
    """Prunes BatchNorm channels that clean data do not need.

    Attributes:
        unlearn_lr: Learning rate of the ascent on all weights; a tenth of it every ten epochs.
        unlearn_epochs: Most epochs of ascent.
        unlearn_stop: Running accuracy on the trusted set at which the ascent ends. 0.20 is twice chance for ten
            classes. It is not scaled: with two classes it is below chance (still reached, as ascent goes on to 0), with
            a hundred it is twenty times chance (set it lower).
        batch_size: Of ascent and recovery.
        momentum: Of ascent and recovery.
        weight_decay: Of the ascent; masks have none.
        augment: Of ascent and recovery. ``crop_flip`` is the authors' choice on CIFAR-10. Where the model does not know
            mirrored images (digits, signs) it brings the accuracy to the stop before anything is unlearned.
        recover_lr: Learning rate of the masks. 0.2 is for the 4,800 channels of a ResNet-18; in a small network it
            switches off most channels, and 0.01 to 0.02 does better (measured on digits with 112 to 336 channels).
        recover_epochs: Epochs of the recovery.
        alpha: Factor of the recovery's loss.
        threshold: Prune channels with masks up to this; null: choose by ``keep_within``.
        keep_within: Take the largest threshold of 0, 0.05 ... 0.9 at which accuracy on the validation part falls by no
            more than this (fraction of 1).
    """

    unlearn_lr: Annotated[float, Gt(0)] = 0.01
    unlearn_epochs: Annotated[int, Ge(1)] = 20
    unlearn_stop: Annotated[float, Ge(0), Le(0.5)] = 0.2
    batch_size: Annotated[int, Ge(1)] = 128
    momentum: Annotated[float, Ge(0), Lt(1)] = 0.9
    weight_decay: Annotated[float, Ge(0)] = 5e-4
    augment: Literal["none", "crop_flip"] = "none"
    recover_lr: Annotated[float, Gt(0)] = 0.2
    recover_epochs: Annotated[int, Ge(1)] = 20
    alpha: Annotated[float, Gt(0)] = 0.2
    threshold: Annotated[float, Ge(0), Lt(1)] | None = None
    keep_within: Annotated[float, Ge(0), Le(1)] = 0.02

    @property
    def needs_trusted(self) -> bool:
        """It trains on clean data."""
        return True

    def refusal(self, model: nn.Module) -> str | None:
        """Return why a model cannot be repaired, None if it can: a run asks before it starts."""
        try:
            batchnorms(model, "rnp")
        except MethodRefused as refused:
            return str(refused)
        return None

    def clean(
        self, model: nn.Module, trusted: TrustedData | None, clues: Clues, rng: torch.Generator
    ) -> tuple[nn.Module, Clues, Notes]:
        """Return a pruned copy of a model.

        Args:
            model: Has BatchNorm2d; left untouched.
            trusted: Unlearning and recovery use ``fit``, threshold and target label ``validate``.
            clues: Passed on with the unlearned model and, as ``target``, the class that it predicts most often.
            rng: Draws orders and augmentation.

        Returns:
            The copy in the model's mode, the clues, and notes: ``acted``, ``reason`` (why not), ``unlearning``,
            ``target`` and ``target_share``, ``channels``, ``validation_before`` and ``validation_after`` (accuracies),
            ``threshold``, ``pruned`` and the whole ``curve``. Where the unlearning fails or no channel qualifies, the
            copy is unchanged, ``acted`` is false and ``reason`` says why.

        Raises:
            MethodRefused: Without trusted data, or if the model has no BatchNorm2d.
        """
        if trusted is None or min(len(trusted.fit), len(trusted.validate)) == 0:
            raise MethodRefused("rnp unlearns trusted data and there are none; add trusted: {size: 500}")
        batchnorms(model, "rnp")
        plan = TrainingPlan(
            epochs=self.unlearn_epochs,
            batch_size=self.batch_size,
            lr=self.unlearn_lr,
            momentum=self.momentum,
            weight_decay=self.weight_decay,
            lr_step=STEP,
            augment=self.augment,
        )
        unlearned = unlearn(model, trusted.fit, plan, self.unlearn_stop, rng)
        notes: Notes = {"unlearning": unlearned.as_notes()}
        if not unlearned.reached:
            return copy.deepcopy(model), clues, {"acted": False, "reason": unlearned.reason, **notes}
        target, share = modal_prediction(unlearned.model, trusted.validate)
        recovery = replace(plan, epochs=self.recover_epochs, lr=self.recover_lr, lr_step=None)
        masks = recover_masks(unlearned.model, trusted.fit, recovery, self.alpha, rng, "rnp")
        pruned, outcome = self._prune(model, masks, trusted.validate)
        found = replace(clues, target=target, unlearned=unlearned.model)
        return pruned, found, {**outcome, **notes, "target": target, "target_share": share}

    def _prune(self, model: nn.Module, masks: Masks, validate: Samples) -> tuple[nn.Module, Notes]:
        """Measure the curve and prune at the fixed or the chosen threshold."""
        before = _right(model, validate)
        fixed = () if self.threshold is None else (self.threshold,)
        points: dict[int, Point] = {0: Point(0.0, 0, before)}  # masks are nested: as many pruned, the same pruned
        curve: list[Point] = []
        for threshold in sorted({*GRID, *fixed}):
            pruned, count = prune(model, masks, threshold)
            if count not in points:
                points[count] = Point(threshold, count, _right(pruned, validate))
            curve.append(Point(threshold, count, points[count].right))
        if self.threshold is None:
            chosen = largest_kept(curve, before, self.keep_within * len(validate))
        else:
            chosen = next(point for point in curve if point.threshold == self.threshold)
        notes: Notes = {
            "channels": sum(len(mask) for mask in masks.values()),
            "validation_before": before / len(validate),
            "validation_after": (chosen.right if chosen else before) / len(validate),
            "threshold": chosen.threshold if chosen else None,
            "pruned": chosen.pruned if chosen else 0,
            "curve": [_as_notes(point, len(validate)) for point in curve],
        }
        if chosen is None:
            reason = f"every threshold costs more than {self.keep_within:g} of validation accuracy: raise keep_within"
            return copy.deepcopy(model), {"acted": False, "reason": reason, **notes}
        if chosen.pruned == 0:
            reason = f"the recovery left no mask at or below {chosen.threshold:g}: raise recover_epochs or recover_lr"
            return copy.deepcopy(model), {"acted": False, "reason": reason, **notes}
        return prune(model, masks, chosen.threshold)[0], {"acted": True, **notes}


def _right(model: nn.Module, data: Samples) -> int:
    return int(np.count_nonzero(predict(model, data) == data.labels.cpu().numpy()))


def _as_notes(point: Point, samples: int) -> dict[str, float | int]:
    return {"threshold": point.threshold, "pruned": point.pruned, "accuracy": point.right / samples}
