"""Backdoor label detection with RNP's unlearned model: the class that it gives to clean images names the target.

Y. Li, X. Lyu, X. Ma, N. Koren, L. Lyu, B. Li, Y. Jiang, "Reconstructive Neuron Pruning for Backdoor Defense", ICML
2023, https://arxiv.org/abs/2305.14876, whose abstract names this use of the unlearned model.

Differs from the paper: its authors published no code for this use. The rule (the class most often predicted, its share
as the confidence) and the bar above which a backdoor is declared are fedbd's own. So is the accuracy that a model must
have before it is unlearned (``unlearning.fewest``).
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Annotated, Literal

import numpy as np
import torch
from annotated_types import Ge, Gt, Le, Lt
from torch import nn

from fedbd.defenses.cleanup.unlearning import ascent_plan, modal_prediction, unlearn
from fedbd.defenses.sound_model import need_sound
from fedbd.defenses.trusted_data import required
from fedbd.method_fields import checks_fields
from fedbd.metrics import predict
from fedbd.types import Clues, Notes, TrustedData


@dataclass(frozen=True, kw_only=True)
@checks_fields
class RNPLabel:
    """Names the backdoor's target label; the model stays as it is.

    Where there is a backdoor the label is mostly right. Whether there is one, the share tells badly: an unlearned clean
    model settles on one or two classes, too.

    Attributes:
        declare_at: Share of the predictions from which a backdoor is declared, and the label handed on. Known about it:
            on the digits (28 backdoored and 28 clean cnn of width 16, batch_size 32, 200 validation images; the bar
            was set on them) the label was right in 26 of 28, 16 of 28 backdoors were declared, and so were 4 of 28
            clean models.
        unlearn_lr: See ``rnp.RNP``, as for the fields below; none of them counts where an earlier method left its
            unlearned model.
        unlearn_epochs: Most epochs of ascent.
        unlearn_stop: Running accuracy on the trusted set at which the ascent ends.
        batch_size: Of the ascent.
        momentum: Of the ascent.
        weight_decay: Of the ascent.
        augment: Of the ascent.
    """

    declare_at: Annotated[float, Gt(0), Le(1)] = 0.97
    unlearn_lr: Annotated[float, Gt(0)] = 0.01
    unlearn_epochs: Annotated[int, Ge(1)] = 20
    unlearn_stop: Annotated[float, Ge(0), Le(0.5)] = 0.2
    batch_size: Annotated[int, Ge(1)] = 128
    momentum: Annotated[float, Ge(0), Lt(1)] = 0.9
    weight_decay: Annotated[float, Ge(0)] = 5e-4
    augment: Literal["none", "crop_flip"] = "none"

    @property
    def needs_trusted(self) -> bool:
        """It unlearns and judges on clean data."""
        return True

    @property
    def gives_clues(self) -> frozenset[str]:
        """What later methods may use."""
        return frozenset({"unlearned", "target"})

    @property
    def repairs(self) -> bool:
        """The model is returned as it came."""
        return False

    def clean(
        self, model: nn.Module, trusted: TrustedData | None, clues: Clues, rng: torch.Generator
    ) -> tuple[nn.Module, Clues, Notes]:
        """Return an unchanged copy of a model and the suspected label.

        Args:
            model: Left untouched; not read where ``clues`` has an unlearned model.
            trusted: An unlearning uses ``fit``; predictions are counted on ``validate``.
            clues: Its ``unlearned`` is used if there is one.
            rng: Draws orders and augmentation of an unlearning.

        Returns:
            The copy; the clues with the unlearned model and with ``target``: the label if a backdoor is declared, else
            None; and notes: ``acted`` (a label was found), ``target`` (the class most often predicted, declared or
            not), ``target_share``, ``declared``, ``shares`` (per class), ``validation_share`` (how much of the
            validation part has that label anyway), ``unlearning`` (null for a model of an earlier method). Where the
            unlearning fails ``acted`` is false, ``reason`` says why and the clues are passed on as they came.

        Raises:
            MethodRefused: Without trusted data.
        """
        trusted = required(trusted, "rnp_label", "unlearns")
        network, notes = clues.unlearned, Notes(unlearning=None)
        need_sound(model if network is None else network, "rnp_label", trusted.fit, trusted.classes)
        if network is None:
            unlearned = unlearn(model, trusted.fit, ascent_plan(self), self.unlearn_stop, rng)
            network, notes = unlearned.model, {"unlearning": unlearned.as_notes()}
            if not unlearned.reached:
                return copy.deepcopy(model), clues, {"acted": False, "reason": unlearned.reason, **notes}
        target, share = modal_prediction(network, trusted.validate)
        declared = share >= self.declare_at
        predicted = predict(network, trusted.validate)
        counts = np.bincount(predicted[predicted >= 0], minlength=trusted.classes)
        truth = trusted.validate.labels.cpu().numpy()
        notes |= {
            "acted": True,
            "target": target,
            "target_share": share,
            "declared": declared,
            "shares": [float(count) / len(truth) for count in counts],
            "validation_share": float(np.mean(truth == target)),
        }
        found = replace(clues, unlearned=network, target=target if declared else None)
        return copy.deepcopy(model), found, notes
