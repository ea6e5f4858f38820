"""Unlearning of clean data by gradient ascent: what a backdoored model keeps is its backdoor.

Y. Li, X. Lyu, X. Ma, N. Koren, L. Lyu, B. Li, Y. Jiang, "Reconstructive Neuron Pruning for Backdoor Defense", ICML
2023, https://arxiv.org/abs/2305.14876; code https://github.com/bboylyg/RNP.

Differs from the paper: the stop is the code's (running accuracy of an epoch in train mode, 0.20 by default; the paper
is said to go to chance, its text could not be read). The code clips gradients before it computes them, which does
nothing; here nothing is clipped. A model whose accuracy is near the stop before the ascent is not unlearned
(``fewest``); the code has no such bar.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - the name that every PyTorch user reads
from torch import nn

from fedbd.metrics import is_finite, predict
from fedbd.training import TrainingPlan, crop_flip, learning, memory_format_of, sgd
from fedbd.types import Samples

STEP = 10
"""Epochs after which the code takes a tenth of the learning rate."""

HALVED = 2.0
"""How many times the stop the accuracy must be at the start, so that reaching the stop means something."""


def fewest(stop: float) -> float:
    """Return the accuracy that a model must have for an ascent to ``stop`` to mean something.

    ``HALVED`` times the stop, but never more than half the way from the stop to 1: above a stop of 1/3 that is less,
    and any stop can be reached.
    """
    return min(HALVED * stop, (1 + stop) / 2)


@dataclass(frozen=True)
class Unlearned:
    """The outcome of an unlearning.

    Attributes:
        model: The copy that was trained, in eval mode.
        reached: Whether the accuracy fell to the stop; only then is ``model`` of use.
        accuracy: Running accuracy of each epoch, fractions of 1.
        reason: Why the stop was not reached; empty where it was.
    """

    model: nn.Module
    reached: bool
    accuracy: tuple[float, ...]
    reason: str = ""

    def as_notes(self) -> dict[str, Any]:
        """Return plain values for the record."""
        return {"reached": self.reached, "epochs": len(self.accuracy), "accuracy": list(self.accuracy)}


class AscentFields(Protocol):
    """The fields that every method with an unlearning of its own has (see ``rnp.RNP`` for what they mean)."""

    @property
    def unlearn_lr(self) -> float: ...  # noqa: D102

    @property
    def unlearn_epochs(self) -> int: ...  # noqa: D102

    @property
    def unlearn_stop(self) -> float: ...  # noqa: D102

    @property
    def batch_size(self) -> int: ...  # noqa: D102

    @property
    def momentum(self) -> float: ...  # noqa: D102

    @property
    def weight_decay(self) -> float: ...  # noqa: D102

    @property
    def augment(self) -> Literal["none", "crop_flip"]: ...  # noqa: D102


def ascent_plan(fields: AscentFields) -> TrainingPlan:
    """Return how a method unlearns, from its fields; the rate falls to a tenth every ``STEP`` epochs."""
    return TrainingPlan(
        epochs=fields.unlearn_epochs,
        batch_size=fields.batch_size,
        lr=fields.unlearn_lr,
        momentum=fields.momentum,
        weight_decay=fields.weight_decay,
        lr_step=STEP,
        augment=fields.augment,
    )


def unlearn(model: nn.Module, data: Samples, plan: TrainingPlan, stop: float, rng: torch.Generator) -> Unlearned:
    """Maximize the cross-entropy of clean data until the model gets few of them right.

    Args:
        model: Left untouched.
        data: Clean samples.
        plan: Most epochs, rates, batches and augmentation.
        stop: Training ends after the first epoch whose running accuracy (each batch judged in train mode before its
            step) is at most this. Ascent passes chance on its way to 0: values below 1 / classes are reached, too. A
            model that gets less than ``fewest(stop)`` right before the ascent has nothing to unlearn.
        rng: Draws orders and augmentation; decides what Dropout drops.
    """
    start = _accuracy(model, data, plan, rng)
    if start < fewest(stop):
        reason = (
            f"accuracy on the trusted set is {start:.3f} before the unlearning, too close to the stop of {stop:g} (at "
            f"least {fewest(stop):g}): the model is not trained yet, or augment shows it images that it does not know "
            "(set augment: none, or lower unlearn_stop)"
        )
        return Unlearned(copy.deepcopy(model).eval(), False, (), reason)
    trained = copy.deepcopy(model).train()
    if not any(entry.requires_grad for entry in trained.parameters()):
        return Unlearned(trained.eval(), False, (), "all weights are frozen: call model.requires_grad_(True)")
    optimizer = sgd(trained, plan)
    accuracy: list[float] = []
    with learning(rng):
        for epoch in range(plan.epochs):
            for group in optimizer.param_groups:
                group["lr"] = plan.rate(epoch)
            right, finite = _ascend(trained, optimizer, data, plan, rng)
            accuracy.append(right / len(data))
            # The argmax of NaN is class 0: a diverged model would pass for one that unlearned.
            if not finite or not is_finite(trained):
                return Unlearned(trained.eval(), False, tuple(accuracy), "the ascent diverged: lower unlearn_lr")
            if accuracy[-1] <= stop:
                return Unlearned(trained.eval(), True, tuple(accuracy))
    return Unlearned(trained.eval(), False, tuple(accuracy), _short_of(stop, plan, accuracy[-1]))


def _short_of(stop: float, plan: TrainingPlan, reached: float) -> str:
    """Return that an ascent did not reach its stop, and what to do, the likeliest first."""
    more = ", raise unlearn_epochs" if plan.epochs < 2 * STEP else ""  # later epochs hardly move: a hundredth's rate
    return (
        f"accuracy on the trusted set is {reached:.3f} after {plan.epochs} epochs of unlearning, above the stop of "
        f"{stop:g}: raise unlearn_lr, lower batch_size{more} or raise unlearn_stop"
    )


def _ascend(
    model: nn.Module, optimizer: torch.optim.SGD, data: Samples, plan: TrainingPlan, rng: torch.Generator
) -> tuple[int, bool]:
    """Do one epoch in place; return how many samples were right before their step, and whether losses were finite."""
    layout = memory_format_of(model)
    right, finite = 0, True
    for index in torch.split(torch.randperm(len(data), generator=rng), plan.batch_size):
        x, y = data.batch(index)
        x = crop_flip(x, rng) if plan.augment == "crop_flip" else x
        optimizer.zero_grad(set_to_none=True)
        out = model(x.contiguous(memory_format=layout))
        loss = F.cross_entropy(out, y)
        (-loss).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        right += int((out.argmax(1) == y).sum())
        finite = finite and bool(torch.isfinite(loss))
    return right, finite


def _accuracy(model: nn.Module, data: Samples, plan: TrainingPlan, rng: torch.Generator) -> float:
    """Return accuracy in eval mode on images augmented as in the ascent."""
    stamp = (lambda x: crop_flip(x, rng)) if plan.augment == "crop_flip" else None
    return float(np.mean(predict(model, data, stamp=stamp, threads=1) == data.labels.cpu().numpy()))


def modal_prediction(model: nn.Module, data: Samples) -> tuple[int, float]:
    """Return the class that a model predicts most often, ties to the lowest, and its share of the predictions.

    On clean data the unlearned model of a backdoored one predicts the target label nearly always.
    """
    predicted = predict(model, data)
    counts = np.bincount(predicted[predicted >= 0], minlength=1)
    return int(counts.argmax()), float(counts.max() / len(predicted))
