"""Fine-pruning: switch off the last channels that clean data hardly excite, then fine-tune.

K. Liu, B. Dolan-Gavitt, S. Garg, "Fine-Pruning: Defending Against Backdooring Attacks on Deep Neural Networks", RAID
2018, https://arxiv.org/abs/1805.12185.

Differs from the paper:

- Activations are averaged over the trusted set's fit part and the accuracy is judged on its validation part; the paper
  uses one validation set for both.
- The layer is the one that the model declares as ``maps``, or, in a residual network whose last map is a shortcut's
  sum, as ``prunable``: the last one of which a single module switches channels off. A channel is switched off by the
  scale (or the filter) and the bias of the module that it declares as ``channels``, and stays off during the
  fine-tuning.
- The paper leaves the fall of accuracy to the defender; the default of ``keep_within`` is that of ``rnp``. The defaults
  of the fine-tuning are those of ``finetune``, so that the pair differs in the pruning alone.
- The trainable weights and the running statistics of the switched-off channels remain in the model: nothing shrinks.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Annotated

import numpy as np
import torch
from annotated_types import Ge, Gt, Le, Lt
from numpy.typing import NDArray
from torch import Tensor, nn

from fedbd.defenses.cleanup.channel_curve import pruning_curve
from fedbd.defenses.cleanup.channel_masks import both
from fedbd.defenses.cleanup.channel_norms import channels_module, need_same_layer, silence
from fedbd.defenses.cleanup.finetune import Augment, FineTune, finished, outcome, tune
from fedbd.defenses.sound_model import need_sound
from fedbd.defenses.trusted_data import required
from fedbd.errors import refusal
from fedbd.method_fields import checks_fields
from fedbd.models.taps import prunable, readings
from fedbd.training import momentum_problems
from fedbd.types import Clues, Notes, Samples, TrustedData

METHOD = "fine_pruning"


@dataclass(frozen=True, kw_only=True)
@checks_fields
class FinePruning:
    """Prunes channels in increasing order of their mean activation on clean data, then fine-tunes the others.

    Attributes:
        keep_within: Pruning ends before accuracy on the validation part falls by more than this (fraction of 1).
        epochs: Epochs of the fine-tuning; this and the fields below as in ``finetune``.
        batch_size: Images per step.
        lr: Learning rate of SGD.
        lr_drop_epoch: Epochs at ``lr``; the others are at ``lr * lr_gamma``. Null: a constant rate.
        lr_gamma: See ``lr_drop_epoch``.
        momentum: Momentum of SGD.
        nesterov: Nesterov's form of momentum.
        weight_decay: L2 penalty.
        augment: See ``finetune``.
    """

    keep_within: Annotated[float, Ge(0), Le(1)] = 0.02
    epochs: Annotated[int, Ge(1)] = 20
    batch_size: Annotated[int, Ge(1)] = 64
    lr: Annotated[float, Gt(0)] = 0.1
    lr_drop_epoch: Annotated[int, Ge(1)] | None = 2
    lr_gamma: Annotated[float, Gt(0), Le(1)] = 0.1
    momentum: Annotated[float, Ge(0), Lt(1)] = 0.9
    nesterov: bool = True
    weight_decay: Annotated[float, Ge(0)] = 1e-4
    augment: Augment = "crop_flip"

    @property
    def needs_trusted(self) -> bool:
        """It measures and trains on clean data."""
        return True

    @property
    def prunes(self) -> bool:
        """What it switches off is in ``Clues.pruned``."""
        return True

    @property
    def tuning(self) -> FineTune:
        """The fine-tuning that follows: the control to compare with."""
        return FineTune(
            epochs=self.epochs,
            batch_size=self.batch_size,
            lr=self.lr,
            lr_drop_epoch=self.lr_drop_epoch,
            lr_gamma=self.lr_gamma,
            momentum=self.momentum,
            nesterov=self.nesterov,
            weight_decay=self.weight_decay,
            augment=self.augment,
        )

    def problems(self) -> list[tuple[str, str]]:
        """Return what is wrong between the fields."""
        return momentum_problems(self.nesterov, self.momentum)

    def refusal(self, model: nn.Module) -> str | None:
        """Return why a model cannot be repaired, None if it can: a run asks before it starts."""
        return refusal(lambda: (prunable(model, METHOD), channels_module(model, METHOD)))

    def clean(
        self, model: nn.Module, trusted: TrustedData | None, clues: Clues, rng: torch.Generator
    ) -> tuple[nn.Module, Clues, Notes]:
        """Return a pruned and fine-tuned copy of a model.

        Args:
            model: Declares ``maps`` and ``channels``; left untouched.
            trusted: Activations and fine-tuning use ``fit``, the number of pruned channels ``validate``.
            clues: Passed on with the switched-off channels in ``pruned``.
            rng: Draws orders and augmentation.

        Returns:
            The copy in the model's mode, the clues, and notes: ``acted``, ``reason`` (why not), ``channels``,
            ``pruned``, ``pruned_share``, ``order`` (channels, least active first), ``activation`` (of each channel, in
            the model's order), ``curve`` (accuracy on the validation part with the first 0, 1, 2 ... channels of
            ``order`` off, all but the last), ``validation_pruned`` (before the fine-tuning), and those of ``finetune``.
            Where the training diverges, the copy is unchanged and nothing counts as pruned.

        Raises:
            MethodRefused: Without trusted data of two classes, or if the model declares no such layer.
        """
        clean = required(trusted, METHOD, "trains on")
        need_sound(model, METHOD, clean.fit, clean.classes)
        activation = mean_activation(model, clean.fit)
        order = np.argsort(activation, kind="stable")
        right = pruning_curve(model, order[:-1], clean.validate)  # without its last channel a layer is nothing
        count = affordable(right, self.keep_within * len(clean.validate))
        off = {channels_module(model, METHOD)[0]: np.isin(np.arange(len(order)), order[:count])}
        student = copy.deepcopy(model)
        silence(student, off)
        tuning = tune(student, clean.fit, self.tuning, rng, after_step=lambda: silence(student, off))
        notes: Notes = {
            "channels": len(order),
            "pruned": count if tuning.finite else 0,
            "pruned_share": count / len(order) if tuning.finite else 0.0,
            "order": order.tolist(),
            "activation": activation.tolist(),
            "curve": [hits / len(clean.validate) for hits in right],
            "validation_pruned": right[count] / len(clean.validate),
            **outcome(model, model, student, tuning, clean.validate),
        }
        if tuning.finite and count:
            clues = replace(clues, pruned=both(clues.pruned, off))
        return finished(model, student, tuning), clues, notes


def affordable(right: list[int], allowed: float) -> int:
    """Return the most channels that can go one after the other without the loss ever being too large.

    Args:
        right: Samples that are right with the first 0, 1, 2 ... channels off.
        allowed: Samples that may be lost, not necessarily an integer.
    """
    costly = (count for count, hits in enumerate(right) if right[0] - hits > allowed + 1e-9)
    return next(costly, len(right)) - 1


def mean_activation(model: nn.Module, data: Samples) -> NDArray[np.float64]:
    """Return each channel's mean output at the model's prunable maps, (C,) float64, over samples and pixels.

    Raises:
        MethodRefused: If the model does not declare the layer, or its channels are not those of ``channels``.
    """

    def per_sample(out: Tensor) -> Tensor:
        return out.to(torch.float64).reshape(*out.shape[:2], -1).mean(2)

    values = readings(model, prunable(model, METHOD), data, read=per_sample)
    need_same_layer(model, values.shape[1], METHOD)
    return values.mean(0).numpy()
