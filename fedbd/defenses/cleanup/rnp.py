"""Reconstructive neuron pruning: unlearn clean data, recover them with masks, prune what the recovery dimmed.

Y. Li, X. Lyu, X. Ma, N. Koren, L. Lyu, B. Li, Y. Jiang, "Reconstructive Neuron Pruning for Backdoor Defense", ICML
2023, https://arxiv.org/abs/2305.14876; code https://github.com/bboylyg/RNP.

Differs from the paper:

- Defaults and the stop of the unlearning (0.20) are those of the code, but for augmentation, which is off, and for the
  most epochs of the ascent (20; the code has one more, at a hundredth of the rate). The paper is said to unlearn to
  chance; its text could not be read.
- A model whose accuracy on the trusted set is under twice the stop (above a stop of 1/3: nearer to the stop than to 1)
  is not unlearned: it is not trained yet (``unlearning.fewest``). The code starts from any.
- The code prints a curve over thresholds and leaves the choice to the reader; here the threshold is fixed, or chosen on
  the trusted set's validation part, never by attack success.
- Images are not normalized by mean and deviation, as nowhere in fedbd.
- Not copied from the code: the gradient clip that stands before the backward pass and so does nothing; pruning with a
  stale unlearned model where the stop is never reached (here nothing is pruned and the notes say so); masks rounded to
  four decimals on their way through a file; running statistics that drift during the recovery (they are thrown away).
- A model without BatchNorm has its masks on the convolutions' output channels, filter and bias (``channel_masks``).
- The recovered model that is handed on is the unlearned one with its masks multiplied into the parameters and the
  BatchNorm statistics of the trusted set's fit part under them. The authors' own has the drifted ones.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Literal

import numpy as np
import torch
from annotated_types import Ge, Gt, Le, Lt
from numpy.typing import NDArray
from torch import nn

from fedbd.defenses.cleanup.channel_masks import (
    Masks,
    at_most,
    both,
    maskable,
    multiplied,
    recalibrate,
    recover_masks,
    switch_off,
)
from fedbd.defenses.cleanup.unlearning import ascent_plan, modal_prediction, unlearn
from fedbd.defenses.sound_model import need_sound
from fedbd.defenses.trusted_data import required
from fedbd.errors import refusal
from fedbd.method_fields import checks_fields
from fedbd.metrics import right
from fedbd.types import Clues, Notes, Samples, TrustedData

Off = Mapping[str, NDArray[np.bool_]]

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
@checks_fields
class RNP:
    """Prunes channels that clean data do not need: BatchNorm scales or, in a model without, convolutions' channels.

    Attributes:
        unlearn_lr: Learning rate of the ascent on all weights; a tenth of it every ten epochs.
        unlearn_epochs: Most epochs of ascent.
        unlearn_stop: Running accuracy on the trusted set at which the ascent ends. 0.20 is twice chance for ten
            classes. It is not scaled: with two classes it is below chance (still reached, as ascent goes on to 0), with
            a hundred it is twenty times chance (set it lower). A model must have twice as much before (above 1/3: be
            nearer to 1 than to the stop), or nothing is unlearned.
        batch_size: Of ascent and recovery.
        momentum: Of ascent and recovery.
        weight_decay: Of the ascent; masks have none.
        augment: Of ascent and recovery. ``crop_flip`` is the authors' choice on CIFAR-10. Where the model does not know
            mirrored images (digits, signs) it brings the accuracy to the stop before anything is unlearned.
        recover_lr: Learning rate of the masks. 0.2 is for the 4,800 channels of a ResNet-18; the fewer there are, the
            lower. On a WRN-16-1 (464 channels, CIFAR-10, one backdoored network, 250 images to fit) 0.2 leaves 20 masks
            at 0, which cost 9 points of accuracy and the whole attack; with 0.05 thresholds can weigh one against the
            other (8 channels for 5 points leave half of the attack, 11 for 6 a tenth), so that ``keep_within: 0.05``
            has a choice. On digits with 112 channels 0.01 to 0.02 does better than 0.2, and little. In neither network
            do the masks bring the unlearned model back (``validation_recovered``): it is their order that counts.
            Without BatchNorm the unlearned model's logits are large, and 0.001 is a start.
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

    @property
    def gives_clues(self) -> frozenset[str]:
        """What later methods may use."""
        return frozenset({"unlearned", "recovered", "target"})

    @property
    def reads_batch_norm(self) -> bool:
        """Its masks are on BatchNorm scales, or weigh them."""
        return True

    @property
    def prunes(self) -> bool:
        """What it switches off stands in ``Clues.pruned``."""
        return True

    def refusal(self, model: nn.Module) -> str | None:
        """Return why a model cannot be repaired, None if it can: a run asks before it starts."""
        return refusal(lambda: maskable(model, "rnp"))

    def clean(
        self, model: nn.Module, trusted: TrustedData | None, clues: Clues, rng: torch.Generator
    ) -> tuple[nn.Module, Clues, Notes]:
        """Return a pruned copy of a model.

        Args:
            model: Has trainable BatchNorm2d scales, or convolutions and no normalization; left untouched.
            trusted: Unlearning and recovery use ``fit``, threshold and target label ``validate``.
            clues: Passed on with the unlearned and the recovered model, ``pruned`` (what was switched off before
                stays in it) and, as ``target``, the class that the unlearned model predicts most often.
            rng: Draws orders and augmentation.

        Returns:
            The copy in the model's mode, the clues, and notes: ``acted``, ``reason`` (why not), ``masked``
            (``batchnorm`` or ``convolution``), ``unlearning``, ``target`` and ``target_share``, ``channels``,
            ``validation_before``, ``validation_recovered`` (of the recovered model) and ``validation_after``
            (accuracies), ``threshold``, ``pruned`` and the whole ``curve``. Where the unlearning fails or no channel
            qualifies, the copy is unchanged, ``acted`` is false and ``reason`` says why.

        Raises:
            MethodRefused: Without trusted data, or if the model has nothing to mask (``channel_masks.maskable``).
        """
        trusted = required(trusted, "rnp", "unlearns")
        need_sound(model, "rnp", trusted.fit, trusted.classes)
        masked, _ = maskable(model, "rnp")
        plan = ascent_plan(self)
        unlearned = unlearn(model, trusted.fit, plan, self.unlearn_stop, rng)
        notes: Notes = {"masked": masked, "unlearning": unlearned.as_notes()}
        if not unlearned.reached:
            return copy.deepcopy(model), clues, {"acted": False, "reason": unlearned.reason, **notes}
        target, share = modal_prediction(unlearned.model, trusted.validate)
        recovery = replace(plan, epochs=self.recover_epochs, lr=self.recover_lr, lr_step=None)
        masks = recover_masks(unlearned.model, trusted.fit, recovery, self.alpha, rng, "rnp")
        recovered = multiplied(unlearned.model, masks)
        recalibrate(recovered, trusted.fit)
        off, outcome = self._choose(model, masks, trusted.validate)
        found = replace(
            clues,
            target=target,
            unlearned=unlearned.model,
            recovered=recovered,
            pruned=both(clues.pruned, off),
        )
        notes |= {"target": target, "target_share": share}
        notes["validation_recovered"] = right(recovered, trusted.validate) / len(trusted.validate)
        return switch_off(model, off), found, {**outcome, **notes}

    def _choose(self, model: nn.Module, masks: Masks, validate: Samples) -> tuple[Off, Notes]:
        """Measure the curve; return what to switch off at the fixed or the chosen threshold, and notes."""
        before = right(model, validate)
        curve = self._curve(model, masks, validate, before)
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
            reason = (
                f"every threshold costs more than {self.keep_within:g} of validation accuracy: raise keep_within, or "
                "lower recover_lr"
            )
            return {}, {"acted": False, "reason": reason, **notes}
        if chosen.pruned == 0:
            reason = f"the recovery left no mask at or below {chosen.threshold:g}: raise recover_epochs or recover_lr"
            return {}, {"acted": False, "reason": reason, **notes}
        return at_most(masks, chosen.threshold), {"acted": True, **notes}

    def _curve(self, model: nn.Module, masks: Masks, validate: Samples, before: int) -> list[Point]:
        """Return every threshold's outcome; masks are nested, so what prunes as many prunes the same."""
        fixed = () if self.threshold is None else (self.threshold,)
        rights, curve = {0: before}, []
        for threshold in sorted({*GRID, *fixed}):
            off = at_most(masks, threshold)
            count = sum(int(channels.sum()) for channels in off.values())
            if count not in rights:
                rights[count] = right(switch_off(model, off), validate)
            curve.append(Point(threshold, count, rights[count]))
        return curve


def _as_notes(point: Point, samples: int) -> dict[str, float | int]:
    return {"threshold": point.threshold, "pruned": point.pruned, "accuracy": point.right / samples}
