"""Fine-tuning on trusted data: the control beside every distillation and pruning, and the loop that these share.

Y. Li, X. Lyu, N. Koren, L. Lyu, B. Li, X. Ma, "Neural Attention Distillation: Erasing Backdoor Triggers from Deep
Neural Networks", ICLR 2021, https://arxiv.org/abs/2101.05930, which measures it beside its own method; code
https://github.com/bboylyg/NAD, whose loop this is with every weight of the attention at 0.

Differs from the paper: the defaults are those of the code's student (20 epochs, the rate falls after two), so that the
pair differs in the attention alone; the paper stops the fine-tuning where validation stops improving. Augmentation is
crop and flip, as the code's table says; its script adds cut-out (``augment: crop_flip_cutout``). Images are not
normalized by mean and deviation, as nowhere in fedbd (nor in the code).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
import torch.nn.functional as F  # noqa: N812 - the name that every PyTorch user reads
from annotated_types import Ge, Gt, Le, Lt
from torch import Tensor, nn

from fedbd.defenses.local.cutout import cutout
from fedbd.defenses.sound_model import need_sound
from fedbd.defenses.trusted_data import required
from fedbd.errors import MethodRefused
from fedbd.method_fields import checks_fields
from fedbd.metrics import accuracy, is_finite
from fedbd.training import TrainingPlan, crop_flip, learning, memory_format_of, momentum_problems, sgd
from fedbd.types import Clues, Notes, Samples, TrustedData

Start = Literal["model", "unlearned", "recovered"]
Augment = Literal["none", "crop_flip", "crop_flip_cutout"]
Penalty = Callable[[Tensor], Sequence[tuple[float, Tensor]]]
"""Called after the network's own forward pass with the same (B, C, H, W) batch: weights and scalar terms."""


@dataclass(frozen=True)
class Tuning:
    """The outcome of a fine-tuning.

    Attributes:
        epochs: Of each epoch ``lr``, ``cross_entropy`` and, with a penalty, ``attention`` (each term before its
            weight); means over batches, None where they are not finite.
        finite: Whether loss and weights stayed finite; training ends with the epoch in which they did not.
    """

    epochs: tuple[Notes, ...]
    finite: bool


@dataclass(frozen=True, kw_only=True)
@checks_fields
class FineTune:
    """Trains all layers on the trusted set with cross-entropy.

    Attributes:
        start: ``model``: the model itself. ``unlearned`` or ``recovered``: what an earlier cleanup (``rnp``) found.
        epochs: Passes over the trusted set's fit part.
        batch_size: Images per step.
        lr: Learning rate of SGD. 0.1 is for a few thousand images and more steps than a small set gives: on digits (a
            ``cnn`` of width 8, 98.9 % accuracy, 50 images to fit) the defaults leave 78.4 %, with ``augment: none``
            98.7 %.
        lr_drop_epoch: Epochs at ``lr``; the others are at ``lr * lr_gamma``. Null: a constant rate.
        lr_gamma: See ``lr_drop_epoch``.
        momentum: Momentum of SGD.
        nesterov: Nesterov's form of momentum.
        weight_decay: L2 penalty.
        augment: ``crop_flip``: crop with 4 pixels of padding and mirror, per image; ``crop_flip_cutout``: then blacken
            a square of 2x2, too; ``none`` where mirrored images are other classes (digits, signs).
    """

    start: Start = "model"
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
        """It trains on clean data."""
        return True

    @property
    def needs_clue(self) -> str | None:
        """What an earlier method must have found: where it starts, unless that is the model itself."""
        return None if self.start == "model" else self.start

    def problems(self) -> list[tuple[str, str]]:
        """Return what is wrong between the fields."""
        return momentum_problems(self.nesterov, self.momentum)

    def rate(self, epoch: int) -> float:
        """Return the learning rate of an epoch (0-based)."""
        dropped = self.lr_drop_epoch is not None and epoch >= self.lr_drop_epoch
        return self.lr * self.lr_gamma if dropped else self.lr

    def clean(
        self, model: nn.Module, trusted: TrustedData | None, clues: Clues, rng: torch.Generator
    ) -> tuple[nn.Module, Clues, Notes]:
        """Return a fine-tuned copy of a model.

        Args:
            model: Left untouched.
            trusted: ``fit`` is trained on, ``validate`` only measured.
            clues: Passed on as they are; ``start`` may name one of them. Channels that an earlier cleanup switched off
                are trained, too, and may grow back.
            rng: Draws orders and augmentation.

        Returns:
            The copy in the model's mode, the clues, and notes: ``acted``, ``reason`` (why not), ``start``, ``epochs``
            (see ``Tuning``), and accuracies on the validation part: ``validation_before`` (of ``model``),
            ``validation_start`` (of what was trained), ``validation_after``. Where the training diverges, the copy is
            unchanged.

        Raises:
            MethodRefused: Without trusted data of two classes, or if the clues lack what ``start`` names.
        """
        clean = required(trusted, "finetune", "trains on")
        need_sound(model, "finetune", clean.fit, clean.classes)
        begin = starting_point(model, clues, self.start, "finetune")
        student = copy.deepcopy(begin)
        tuning = tune(student, clean.fit, self, rng)
        notes: Notes = {"start": self.start, **outcome(model, begin, student, tuning, clean.validate)}
        return finished(model, student, tuning), clues, notes


def starting_point(model: nn.Module, clues: Clues, start: Start, method: str) -> nn.Module:
    """Return the model that a fine-tuning begins with; it must be copied before it is trained.

    Args:
        model: The model to repair.
        clues: What earlier cleanups found.
        start: Which.
        method: Who asks, for the message.

    Raises:
        MethodRefused: If the clues lack it, or if it has other weights than ``model``.
    """
    if start == "model":
        return model
    found = clues.unlearned if start == "unlearned" else clues.recovered
    if found is None:
        raise MethodRefused(
            f"{method} shall start from the {start} model and no earlier cleanup left one; run rnp before it, or set "
            "start: model"
        )
    shapes = [{name: entry.shape for name, entry in net.state_dict().items()} for net in (model, found)]
    if shapes[0] != shapes[1]:
        raise MethodRefused(f"{method} shall start from the {start} model, whose weights are not those of this model")
    return found


def _augmented(images: Tensor, augment: Augment, rng: torch.Generator) -> Tensor:
    if augment == "none":
        return images
    shifted = crop_flip(images, rng)
    return cutout(shifted, rng) if augment == "crop_flip_cutout" else shifted


def tune(
    student: nn.Module,
    data: Samples,
    how: FineTune,
    rng: torch.Generator,
    *,
    penalty: Penalty | None = None,
    after_step: Callable[[], None] | None = None,
) -> Tuning:
    """Train a model in place, all layers of it, and leave it in train mode.

    Args:
        student: What to train.
        data: Clean samples.
        how: Epochs, rates, batches and augmentation; ``start`` is not read.
        rng: Draws orders and augmentation, the same whatever the penalty; decides what Dropout drops.
        penalty: Further terms of the loss. One with weight 0 is noted but adds no gradient, so that the weights come
            out as without it, bit for bit.
        after_step: Called after each step of the optimizer.
    """
    student.requires_grad_(True).train()
    optimizer, layout = sgd(student, _plan(how)), memory_format_of(student)

    def step(index: Tensor) -> Tensor:
        x, y = data.batch(index)
        x = _augmented(x, how.augment, rng).contiguous(memory_format=layout)
        optimizer.zero_grad(set_to_none=True)
        loss = F.cross_entropy(student(x), y)
        terms = [loss.detach()]
        for weight, term in penalty(x) if penalty is not None else ():
            terms.append(term.detach())
            loss = loss + weight * term if weight else loss
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        if after_step is not None:
            after_step()
        return torch.stack(terms)

    epochs: list[Notes] = []
    with learning(rng):
        for epoch in range(how.epochs):
            for group in optimizer.param_groups:
                group["lr"] = how.rate(epoch)
            order = torch.randperm(len(data), generator=rng)
            batches = [step(index) for index in torch.split(order, how.batch_size)]
            epochs.append(_epoch_notes(how.rate(epoch), torch.stack(batches).mean(0), penalty is not None))
            if epochs[-1]["cross_entropy"] is None or not is_finite(student):
                return Tuning(tuple(epochs), finite=False)
    optimizer.zero_grad(set_to_none=True)
    return Tuning(tuple(epochs), finite=True)


def _plan(how: FineTune) -> TrainingPlan:
    return TrainingPlan(lr=how.lr, momentum=how.momentum, nesterov=how.nesterov, weight_decay=how.weight_decay)


def _epoch_notes(lr: float, means: Tensor, penalized: bool) -> Notes:
    values = [float(mean) if bool(torch.isfinite(mean)) else None for mean in means]
    notes: Notes = {"lr": lr, "cross_entropy": values[0]}
    return {**notes, "attention": values[1:]} if penalized else notes


def outcome(model: nn.Module, begin: nn.Module, student: nn.Module, tuning: Tuning, validate: Samples) -> Notes:
    """Return what a fine-tuning's record holds.

    Args:
        model: The model to repair.
        begin: Where the fine-tuning began; may be ``model`` itself.
        student: What came out.
        tuning: How.
        validate: Samples to measure the three on.
    """
    before = accuracy(model, validate)
    notes: Notes = {"acted": tuning.finite}
    if not tuning.finite:
        notes["reason"] = f"the fine-tuning diverged in epoch {len(tuning.epochs)}: lower lr"
    return {
        **notes,
        "epochs": list(tuning.epochs),
        "validation_before": before,
        "validation_start": before if begin is model else accuracy(begin, validate),
        "validation_after": accuracy(student, validate) if tuning.finite else before,
    }


def finished(model: nn.Module, student: nn.Module, tuning: Tuning) -> nn.Module:
    """Return the student with each part in the model's mode and trainable where the model's is, by their names.

    Where the training diverged it is an unchanged copy of the model.
    """
    if not tuning.finite:
        return copy.deepcopy(model)
    modes = {name: module.training for name, module in model.named_modules()}
    for name, module in student.named_modules():
        module.training = modes.get(name, model.training)
    trainable = {name: entry.requires_grad for name, entry in model.named_parameters()}
    for name, entry in student.named_parameters():
        entry.requires_grad_(trainable.get(name, True))
    return student
