"""Neural attention distillation: fine-tuning towards where a fine-tuned copy looks.

Y. Li, X. Lyu, N. Koren, L. Lyu, B. Li, X. Ma, "Neural Attention Distillation: Erasing Backdoor Triggers from Deep
Neural Networks", ICLR 2021, https://arxiv.org/abs/2101.05930; code https://github.com/bboylyg/NAD.

Differs from the paper:

- Defaults are the code's since 2022-01: mean squared distance, 20 epochs, weights 500, 1000, 1000. The paper's distance
  is ``distance: l2``; with the same weights it presses far harder, as it divides by no number of pixels.
- The teacher: the code has no script for it. The authors' advice is the same loop without attention for 5 to 10 epochs,
  which is done here, with the student's drop of the rate (once, after two epochs). The paper, as it is remembered,
  divides the teacher's rate by ten after every two and stops where validation stops improving.
- Augmentation is crop and flip, as the code's table says; its script adds cut-out (``augment: crop_flip_cutout``).
- Not copied from the code: before 2022-01 the attention loss was detached and had no gradient. Nor from its
  successors: a map of one pixel, whose term is always 0, is refused.
- Images are not normalized by mean and deviation, as nowhere in fedbd (nor in the code).

Only the code was read; what the paper says of its distance and of the teacher's end is from memory.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Annotated

import torch
from annotated_types import Ge, Gt, Le, Lt, MinLen
from torch import Tensor, nn

from fedbd.defenses.cleanup.attention import Distance, apart, attention, check_betas, map_sizes, unfit
from fedbd.defenses.cleanup.finetune import (
    Augment,
    FineTune,
    Start,
    Tuning,
    finished,
    outcome,
    starting_point,
    tune,
)
from fedbd.defenses.sound_model import need_sound
from fedbd.defenses.trusted_data import required
from fedbd.errors import MethodRefused, refusal
from fedbd.method_fields import checks_fields
from fedbd.metrics import accuracy
from fedbd.models.taps import declared, outputs
from fedbd.seeding import peek
from fedbd.training import momentum_problems
from fedbd.types import Clues, Notes, Samples, TrustedData

TOGETHER = {"start", "batch_size", "momentum", "nesterov", "weight_decay", "augment"}
"""Fields that teacher and student share."""


@dataclass(frozen=True, kw_only=True)
@checks_fields
class NAD:
    """Fine-tunes a copy, the teacher; then fine-tunes the model with its attention drawn to the teacher's.

    Attributes:
        start: Where teacher and student begin. ``model``: the model itself. ``unlearned`` or ``recovered``: what an
            earlier cleanup (``rnp``) found.
        betas: Weight of the attention term of each of the model's taps, in their order. With all of them 0 the student
            is that of ``finetune``.
        power: Exponent of the features in the attention.
        distance: ``mse``: mean over samples and pixels of the squared difference of the maps (the code's); ``l2``: mean
            over samples of the l2 norm of the difference (the paper's).
        teacher_epochs: Epochs of the teacher's fine-tuning.
        teacher_lr: Its learning rate.
        teacher_lr_drop_epoch: Its epochs at ``teacher_lr``; null: a constant rate.
        teacher_lr_gamma: Factor of the rate of its other epochs.
        epochs: Epochs of the student.
        batch_size: Of both, as are the fields below it that do not begin with ``lr``.
        lr: Learning rate of the student. 0.1 is for a few thousand images: on digits (a ``cnn`` of width 8, 98.9 %
            accuracy, 50 images to fit) the defaults leave 9.8 %, with ``augment: none`` 35.4 %, and with 0.01 here and
            as ``teacher_lr``, too, 98.4 %.
        lr_drop_epoch: Its epochs at ``lr``; the others are at ``lr * lr_gamma``. Null: a constant rate.
        lr_gamma: See ``lr_drop_epoch``.
        momentum: Momentum of SGD.
        nesterov: Nesterov's form of momentum.
        weight_decay: L2 penalty.
        augment: See ``finetune``; teacher and student see the same augmented image.
    """

    start: Start = "model"
    betas: Annotated[tuple[Annotated[float, Ge(0)], ...], MinLen(1)] = (500.0, 1000.0, 1000.0)
    power: Annotated[float, Ge(1)] = 2.0
    distance: Distance = "mse"
    teacher_epochs: Annotated[int, Ge(1)] = 10
    teacher_lr: Annotated[float, Gt(0)] = 0.1
    teacher_lr_drop_epoch: Annotated[int, Ge(1)] | None = 2
    teacher_lr_gamma: Annotated[float, Gt(0), Le(1)] = 0.1
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

    @property
    def student_tuning(self) -> FineTune:
        """The student's fine-tuning without its attention terms: the control to compare with."""
        own = {"epochs", "lr", "lr_drop_epoch", "lr_gamma"}
        return FineTune(**{name: getattr(self, name) for name in TOGETHER | own})

    @property
    def teacher_tuning(self) -> FineTune:
        """The fine-tuning that makes the teacher."""
        return FineTune(
            epochs=self.teacher_epochs,
            lr=self.teacher_lr,
            lr_drop_epoch=self.teacher_lr_drop_epoch,
            lr_gamma=self.teacher_lr_gamma,
            **{name: getattr(self, name) for name in TOGETHER},
        )

    def problems(self) -> list[tuple[str, str]]:
        """Return what is wrong between the fields."""
        return momentum_problems(self.nesterov, self.momentum)

    def refusal(self, model: nn.Module) -> str | None:
        """Return why a model cannot be repaired, None if it can: a run asks before it starts."""
        return unfit(model, self.betas, "nad")

    def refusal_on(self, model: nn.Module, trusted: TrustedData) -> str | None:
        """Return why a model cannot be repaired with images of this size, None if it can: asked as ``refusal`` is."""

        def look() -> None:
            need_sound(model, "nad", trusted.fit, trusted.classes)
            map_sizes(model, trusted.fit.images[:1], "nad")

        return refusal(look)

    def clean(
        self, model: nn.Module, trusted: TrustedData | None, clues: Clues, rng: torch.Generator
    ) -> tuple[nn.Module, Clues, Notes]:
        """Return a distilled copy of a model.

        Args:
            model: Has taps; left untouched.
            trusted: Teacher and student train on ``fit``; ``validate`` is only measured.
            clues: Passed on as they are; ``start`` may name one of them. Channels that an earlier cleanup switched off
                are trained, too, and may grow back.
            rng: Draws the student's orders and augmentation, as in ``finetune``; the teacher draws from a generator
                of its own that is derived from it.

        Returns:
            The copy in the model's mode, the clues, and notes: ``acted``, ``reason`` (why not), ``start``, ``teacher``
            (its ``epochs`` and its accuracy ``validation``), and of the student ``epochs`` with ``lr``,
            ``cross_entropy`` and ``attention`` (each tap's term before its beta), ``validation_before`` (of ``model``),
            ``validation_start`` and ``validation_after``. Where a training diverges, the copy is unchanged.

        Raises:
            MethodRefused: Without trusted data of two classes, if the clues lack what ``start`` names, or if the model
                has no taps, taps without maps, or another number of them than ``betas``.
        """
        clean = required(trusted, "nad", "trains on")
        need_sound(model, "nad", clean.fit, clean.classes)
        begin = starting_point(model, clues, self.start, "nad")
        check_betas(begin, self.betas, "nad")
        map_sizes(begin, clean.fit.images[:1], "nad")
        teacher = copy.deepcopy(begin)
        taught = tune(teacher, clean.fit, self.teacher_tuning, _derived(rng))
        lesson: Notes = {"epochs": list(taught.epochs)}
        if not taught.finite:
            reason = f"the teacher's fine-tuning diverged in epoch {len(taught.epochs)}: lower teacher_lr"
            return copy.deepcopy(model), clues, {"acted": False, "reason": reason, "teacher": lesson}
        lesson["validation"] = accuracy(teacher, clean.validate)
        student = copy.deepcopy(begin)
        tuning = distill(student, teacher, clean.fit, self, rng)
        notes: Notes = {"start": self.start, "teacher": lesson}
        return (
            finished(model, student, tuning),
            clues,
            {**notes, **outcome(model, begin, student, tuning, clean.validate)},
        )


def _derived(rng: torch.Generator) -> torch.Generator:
    """Return a generator that the given one decides, without a draw from it."""
    return torch.Generator().manual_seed(peek(rng))


def distill(student: nn.Module, teacher: nn.Module, data: Samples, how: NAD, rng: torch.Generator) -> Tuning:
    """Train a student in place, its attention drawn to a teacher's, and leave it in train mode.

    Args:
        student: What to train.
        teacher: Of any architecture with as many taps; left untouched. Where its maps have another size than the
            student's, both are averaged to the smaller.
        data: Clean samples.
        how: All but the teacher's fields and ``start``.
        rng: Draws orders and augmentation.

    Raises:
        MethodRefused: If either has no taps, taps without maps, or another number of them than ``how.betas``.
    """
    guide = copy.deepcopy(teacher).eval().requires_grad_(False)
    for net in (student, guide):
        check_betas(net, how.betas, "nad")
    pairs = zip(*(map_sizes(net, data.images[:1], "nad") for net in (student, guide)), strict=True)
    sizes = [(min(mine[0], other[0]), min(mine[1], other[1])) for mine, other in pairs]
    if (1, 1) in sizes:
        raise MethodRefused("nad compares maps, and a teacher's 1xn map and a student's nx1 have one pixel in common")
    own_taps, guide_taps = declared(student, "taps", "nad"), declared(guide, "taps", "nad")
    with outputs(student, own_taps) as mine, outputs(guide, guide_taps) as theirs:

        def penalty(x: Tensor) -> list[tuple[float, Tensor]]:
            with torch.no_grad():
                guide(x)
                aims = [attention(theirs[name], how.power, size) for name, size in zip(guide_taps, sizes, strict=True)]
            maps = [attention(mine[name], how.power, size) for name, size in zip(own_taps, sizes, strict=True)]
            terms = [apart(own, aim, how.distance) for own, aim in zip(maps, aims, strict=True)]
            return list(zip(how.betas, terms, strict=True))

        return tune(student, data, how.student_tuning, rng, penalty=penalty)
