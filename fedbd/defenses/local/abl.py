"""Anti-backdoor learning, in a federation: isolate what is learned too fast, then unlearn it.

Y. Li, X. Lyu, N. Koren, L. Lyu, B. Li, X. Ma, "Anti-Backdoor Learning: Training Clean Models on Poisoned Data",
NeurIPS 2021, https://arxiv.org/abs/2110.11571; code https://github.com/bboylyg/ABL.

Differs from the paper:

- The schedule counts a client's participations, not epochs of one training: ``isolate_after`` of them train under the
  loss control, each later one fine-tunes and, if the isolated samples stand out, unlearns.
- Fine-tuning on the rest and ascent on the isolated samples follow each other, as in the authors' code; the paper
  writes one objective (``objective: joint``). The ascent has an optimizer of its own (the authors' carries momentum
  over: ``unlearn_optimizer: carry``), with the plan's momentum and weight decay, in train mode, without augmentation.
  The authors' five epochs ascend in four, the first only tests.
- Fine-tuning augments as the plan says (by default not at all; theirs crops, flips and cuts out, which only
  ``abl_central`` can).
- The loss control trains without augmentation, as theirs, but in a fresh order every epoch.
- The ascent waits for a test that the paper does not have (``confidence``), as clean and skewed clients have lowest
  losses, too.
- Losses are ranked in float64; float32 cross-entropy ties at 0.

Only the code was read; that the paper writes one objective is from memory.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - the name that every PyTorch user reads
from annotated_types import Ge, Gt, Le
from numpy.typing import NDArray
from torch import nn

from fedbd.defenses.local.isolate import Score, most_suspicious, sample_losses, sample_odds
from fedbd.defenses.local.isolation import Confidence, isolation_count, mixture_confidence
from fedbd.defenses.local.objectives import AUGMENTS, CONTROLS, ascent, joint_epoch
from fedbd.defenses.losses import cross_entropy
from fedbd.errors import MethodRefused
from fedbd.method_fields import checks_fields
from fedbd.metrics import is_finite
from fedbd.training import Objective, TrainingPlan, sgd, train, train_epoch
from fedbd.types import Memory, Notes, Samples


@dataclass(frozen=True)
class _Isolation:
    """Isolated indices, all samples' losses, and the test's outcome."""

    indices: NDArray[np.int64]
    losses: NDArray[np.float64]
    confidence: Confidence

    def means(self) -> tuple[float, float]:
        """Return the mean losses of isolated and other samples; 0 where nothing is isolated."""
        if len(self.indices) == 0:
            return 0.0, float(self.losses.mean())
        return float(self.losses[self.indices].mean()), float(np.delete(self.losses, self.indices).mean())

    def as_memory(self) -> dict[str, NDArray[Any]]:
        return {
            "isolated": self.indices,
            "isolation_loss": np.array(self.means(), dtype=np.float64),
            "confident": np.array([self.confidence.passed], dtype=np.bool_),
        }

    def as_notes(self) -> Notes:
        isolated, other = self.means()
        return {
            "isolated": len(self.indices),
            "isolated_loss": isolated if len(self.indices) else None,
            "other_loss": other,
            "confidence": self.confidence.as_notes(),
        }


@dataclass(frozen=True, kw_only=True)
@checks_fields
class ABL:
    """Loss-controlled training, isolation, then fine-tuning with unlearning, counted in a client's participations.

    Attributes:
        control: ``lga`` or ``flooding``, both on the mean loss of a batch; with the same ``gamma`` they give the same
            weights.
        gamma: The loss that the control holds a batch at.
        isolate_after: Participations under the loss control; the isolation follows the last of them (5 of 2 epochs are
            the authors' 10).
        isolation: ``keep``: isolated once. ``renew``: again in each later participation, by a copy of the received
            model trained under the loss control first (twice the work).
        ratio: Share of the client's samples to isolate, rounded down.
        minimum: Fewest samples to isolate (never more than half).
        score: What the lowest of is isolated. ``loss``: cross-entropy after the loss control, as in the paper.
            ``class_rank``: its rank within the given label. ``drop``: by how much it fell since the received model.
        confidence: ``mixture``: unlearn only if the isolated samples are a mode of their own, by the mean log odds over
            the participations under the loss control (``isolation.mixture_confidence``). It needs clean samples of
            the target label beside the poisoned ones: a client that has none is not unlearned. null: always unlearn.
        separation: Ashman's D from which two modes count as apart. Measured on digits with 600 images a client: at 3.5
            the test passes on 3 of 100 clean IID clients and 2 of 180 clean skewed ones (Dirichlet 0.5 and 0.1), and on
            8 of 17 and 11 of 20 IID clients with 10 % and 20 % poison; at 2 on 13 of the 180. On MNIST, with as
            many images, it passes on 2 of 20 clean skewed clients and on none of 10 IID ones with 10 % poison.
        coverage: Share of the isolated samples that must lie in such a mode.
        unlearn_epochs: Epochs of gradient ascent on the isolated samples, in each participation after the isolation.
        unlearn_lr: Learning rate of the ascent.
        unlearn_optimizer: ``fresh``: the ascent starts without momentum. ``carry``: it goes on with the fine-tuning's,
            as the authors' does.
        objective: ``sequential``: fine-tuning, then ascent, as in the authors' code. ``joint``: the loss of kept minus
            that of isolated samples (``objectives.joint_epoch``), as in the paper, for the plan's epochs and at its
            rate; of the ``unlearn_`` fields only the weight is then read. Samples that do not stand out are not
            unlearned either way.
        unlearn_weight: ``joint``: factor on the isolated samples' mean loss. null: their number over that of the kept,
            so that every sample counts once. 1: each set counts once, the paper's difference of expectations as it
            reads; it has no lower bound and diverges (on a backdoored WRN-16-1 within two epochs of 20 steps at a rate
            of 0.01, where 0.1 and the null of 2 % isolated samples did not).
    """

    control: Literal["lga", "flooding"] = "lga"
    gamma: Annotated[float, Gt(0)] = 0.5
    isolate_after: Annotated[int, Ge(1)] = 5
    isolation: Literal["keep", "renew"] = "keep"
    ratio: Annotated[float, Gt(0), Le(0.5)] = 0.01
    minimum: Annotated[int, Ge(1)] = 5
    score: Score = "loss"
    confidence: Literal["mixture"] | None = "mixture"
    separation: Annotated[float, Ge(0)] = 3.5
    coverage: Annotated[float, Gt(0), Le(1)] = 0.8
    unlearn_epochs: Annotated[int, Ge(1)] = 5
    unlearn_lr: Annotated[float, Gt(0)] = 5e-4
    unlearn_optimizer: Literal["fresh", "carry"] = "fresh"
    objective: Literal["sequential", "joint"] = "sequential"
    unlearn_weight: Annotated[float, Gt(0)] | None = None

    def fit(
        self, model: nn.Module, data: Samples, plan: TrainingPlan, memory: Memory, rng: torch.Generator
    ) -> tuple[Memory, Notes]:
        """Train ``model`` in place for one participation.

        Args:
            model: The received model; left in train mode.
            data: The client's samples, the same in every participation.
            plan: Rates and batches; under the loss control and in the ascent without augmentation.
            memory: Empty at first.
            rng: Draws the orders and the augmentation.

        Returns:
            The memory: ``participations`` and ``samples``, (1,) int64; until the isolation ``odds``, (N,) float64, mean
            log odds against the labels so far; from then on ``isolated``, (k,) int64, most suspicious first,
            ``isolation_loss``, (2,) float64, means of isolated and other samples, and ``confident``, (1,) bool. And
            notes: ``participation``, ``stage`` (``control``, ``finetune``, ``unlearn`` or ``joint``), the notes of
            plain training (``loss``: the stage's objective), and what was isolated in this participation with its test.

        Raises:
            MethodRefused: If the number of samples is not that of the participation before, or the model diverged.
        """
        participation = int(memory["participations"][0]) + 1 if "participations" in memory else 1
        _refuse_other_data(memory, len(data))
        kept: Memory = {
            **memory,
            "participations": np.array([participation], dtype=np.int64),
            "samples": np.array([len(data)], dtype=np.int64),
        }
        stage = self._early if participation <= self.isolate_after else self._late
        kept, notes = stage(model, data, plan, kept, rng)
        if not is_finite(model):
            raise MethodRefused("abl: the model diverged; lower the rate of the training (training.lr) or unlearn_lr")
        return kept, {"participation": participation, **notes}

    def _early(
        self, model: nn.Module, data: Samples, plan: TrainingPlan, memory: Memory, rng: torch.Generator
    ) -> tuple[Memory, Notes]:
        """Train under the loss control; after the last such participation isolate what the model learned best."""
        participation = int(memory["participations"][0])
        isolating = participation == self.isolate_after
        received = sample_losses(model, data) if isolating and self.score == "drop" else None
        notes: Notes = {"stage": "control", **self._control(model, data, plan, rng)}
        odds, classes = sample_odds(model, data)
        before = memory.get("odds", odds)
        mean = before + (odds - before) / participation
        if not isolating:
            return {**memory, "odds": mean}, notes
        found = self._isolate(odds, mean, data.labels.cpu().numpy(), classes, received)
        rest = {name: array for name, array in memory.items() if name != "odds"}
        return {**rest, **found.as_memory()}, {**notes, **found.as_notes()}

    def _late(
        self, model: nn.Module, data: Samples, plan: TrainingPlan, memory: Memory, rng: torch.Generator
    ) -> tuple[Memory, Notes]:
        """Fine-tune on all but the isolated samples; unlearn these, afterwards or at once, if they stand out."""
        found: Notes = {}
        if self.isolation == "renew" or "isolated" not in memory:
            isolation = self._renew(copy.deepcopy(model), data, plan, rng)
            memory, found = {**memory, **isolation.as_memory()}, isolation.as_notes()
        isolated = np.array(memory["isolated"], dtype=np.int64)
        kept = data.subset(np.setdiff1d(np.arange(len(data), dtype=np.int64), isolated))
        confident = len(isolated) > 0 and bool(memory["confident"][0])
        optimizer = sgd(model, plan)
        if confident and self.objective == "joint":
            notes = self._jointly(model, optimizer, kept, data.subset(isolated), plan, rng)
            return memory, {"stage": "joint", **notes, **found}
        notes = {"stage": "finetune", **_train_with(model, optimizer, kept, plan, rng, F.cross_entropy), **found}
        if confident:
            climb = replace(
                plan, epochs=self.unlearn_epochs, lr=self.unlearn_lr, lr_step=None, lr_decay=1.0, augment="none"
            )
            optimizer = optimizer if self.unlearn_optimizer == "carry" else sgd(model, climb)
            after = _train_with(model, optimizer, data.subset(isolated), climb, rng, ascent)
            notes |= {"stage": "unlearn", "unlearned_loss": -after["loss"]}
        return memory, notes

    def _jointly(
        self,
        model: nn.Module,
        optimizer: torch.optim.SGD,
        kept: Samples,
        isolated: Samples,
        plan: TrainingPlan,
        rng: torch.Generator,
    ) -> Notes:
        """Train on the joint objective."""
        augment, weight, losses = AUGMENTS[plan.augment], self.unlearn_weight, torch.zeros(1)
        for epoch in range(plan.epochs):
            losses = joint_epoch(model, optimizer, kept, isolated, plan, epoch, rng, augment, weight)
        return {"loss": float(losses.mean()), "images": plan.epochs * len(kept)}

    def _control(self, model: nn.Module, data: Samples, plan: TrainingPlan, rng: torch.Generator) -> Notes:
        """Train under the loss control."""
        loss = CONTROLS[self.control]
        plain = replace(plan, augment="none")
        return train(model, data, plain, rng, objective=lambda out, y: loss(out, y, self.gamma))

    def _renew(self, model: nn.Module, data: Samples, plan: TrainingPlan, rng: torch.Generator) -> _Isolation:
        """Isolate anew with a model that is trained under the loss control for it (and spent)."""
        received = sample_losses(model, data) if self.score == "drop" else None
        self._control(model, data, plan, rng)
        odds, classes = sample_odds(model, data)
        return self._isolate(odds, odds, data.labels.cpu().numpy(), classes, received)

    def _isolate(
        self,
        odds: NDArray[np.float64],
        mean_odds: NDArray[np.float64],
        labels: NDArray[np.int64],
        classes: int,
        received: NDArray[np.float64] | None,
    ) -> _Isolation:
        """Isolate by the odds after the last training; test by their mean over participations, which is less noisy."""
        losses = cross_entropy(odds)
        count = isolation_count(len(labels), self.ratio, self.minimum)
        isolated = most_suspicious(losses, labels, count, self.score, received)
        confidence = Confidence(passed=True, coverage=1.0)
        if self.confidence == "mixture":
            confidence = mixture_confidence(
                mean_odds, labels, isolated, classes=classes, separation=self.separation, coverage=self.coverage
            )
        return _Isolation(isolated, losses, confidence)


def _train_with(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    data: Samples,
    plan: TrainingPlan,
    rng: torch.Generator,
    objective: Objective,
) -> Notes:
    """Do what ``training.train`` does, with an optimizer that may have a past."""
    losses = torch.zeros(1)
    for epoch in range(plan.epochs):
        losses = train_epoch(model, optimizer, data, plan, epoch, rng, objective=objective)
    return {"loss": float(losses.mean()), "images": plan.epochs * len(data)}


def _refuse_other_data(memory: Memory, samples: int) -> None:
    before = int(memory["samples"][0]) if "samples" in memory else samples
    if before != samples:
        raise MethodRefused(
            f"abl: the client had {before} samples and has {samples} now, so that isolated indices mean nothing; "
            "give it the same samples in every round"
        )
