"""Anti-backdoor learning, in a federation: isolate what is learned too fast, then unlearn it.

Y. Li, X. Lyu, N. Koren, L. Lyu, B. Li, X. Ma, "Anti-Backdoor Learning: Training Clean Models on Poisoned Data",
NeurIPS 2021, https://arxiv.org/abs/2110.11571; code https://github.com/bboylyg/ABL.

Differs from the paper:

- The schedule counts a client's participations, not epochs of one training: ``isolate_after`` of them train under the
  loss control, each later one fine-tunes and, if the isolated samples stand out, unlearns.
- Fine-tuning on the rest and ascent on the isolated samples follow each other, as in the authors' code; the paper
  writes one objective. The ascent has an optimizer of its own (the authors' carries momentum over), with the plan's
  momentum and weight decay, in train mode, without augmentation. The authors' five epochs ascend in four, the first
  only tests.
- The loss control trains without augmentation, as theirs, but in a fresh order every epoch.
- The ascent waits for a test that the paper does not have (``confidence``), as clean and skewed clients have lowest
  losses, too.
- Losses are ranked in float64; float32 cross-entropy ties at 0.
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
from torch import Tensor, nn

from fedbd.defenses.local.isolation import Confidence, class_rank, isolation_count, lowest, mixture_confidence
from fedbd.defenses.losses import cross_entropy, log_odds_against
from fedbd.errors import MethodRefused
from fedbd.metrics import logits
from fedbd.training import TrainingPlan, train
from fedbd.types import Memory, Notes, Samples


def gradient_ascent_below(logits_: Tensor, labels: Tensor, gamma: float) -> Tensor:
    """Return the paper's local gradient ascent, ``sign(L - gamma) * L`` with L the mean cross-entropy of the batch."""
    loss = F.cross_entropy(logits_, labels)
    return torch.sign(loss.detach() - gamma) * loss


def flooding(logits_: Tensor, labels: Tensor, gamma: float) -> Tensor:
    """Return ``|L - gamma| + gamma`` with L the mean cross-entropy of the batch: the same gradient.

    T. Ishida et al., "Do We Need Zero Training Loss After Achieving Zero Training Error?", ICML 2020,
    https://arxiv.org/abs/2002.08709.
    """
    return (F.cross_entropy(logits_, labels) - gamma).abs() + gamma


CONTROLS = {"lga": gradient_ascent_below, "flooding": flooding}


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
            8 of 17 and 11 of 20 IID clients with 10 % and 20 % poison; at 2 on 13 of the 180.
        coverage: Share of the isolated samples that must lie in such a mode.
        unlearn_epochs: Epochs of gradient ascent on the isolated samples, in each participation after the isolation.
        unlearn_lr: Learning rate of the ascent.
    """

    control: Literal["lga", "flooding"] = "lga"
    gamma: Annotated[float, Gt(0)] = 0.5
    isolate_after: Annotated[int, Ge(1)] = 5
    isolation: Literal["keep", "renew"] = "keep"
    ratio: Annotated[float, Gt(0), Le(0.5)] = 0.01
    minimum: Annotated[int, Ge(1)] = 5
    score: Literal["loss", "class_rank", "drop"] = "loss"
    confidence: Literal["mixture"] | None = "mixture"
    separation: Annotated[float, Ge(0)] = 3.5
    coverage: Annotated[float, Gt(0), Le(1)] = 0.8
    unlearn_epochs: Annotated[int, Ge(1)] = 5
    unlearn_lr: Annotated[float, Gt(0)] = 5e-4

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
            notes: ``participation``, ``stage`` (``control``, ``finetune`` or ``unlearn``), the notes of plain training,
            and what was isolated in this participation with its test.

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
        return kept, {"participation": participation, **notes}

    def _early(
        self, model: nn.Module, data: Samples, plan: TrainingPlan, memory: Memory, rng: torch.Generator
    ) -> tuple[Memory, Notes]:
        """Train under the loss control; after the last such participation isolate what the model learned best."""
        participation = int(memory["participations"][0])
        isolating = participation == self.isolate_after
        received = cross_entropy(_odds(model, data)[0]) if isolating and self.score == "drop" else None
        notes: Notes = {"stage": "control", **self._control(model, data, plan, rng)}
        odds, classes = _odds(model, data)
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
        """Fine-tune on all but the isolated samples, then ascend on these if they stand out."""
        found: Notes = {}
        if self.isolation == "renew" or "isolated" not in memory:
            isolation = self._renew(copy.deepcopy(model), data, plan, rng)
            memory, found = {**memory, **isolation.as_memory()}, isolation.as_notes()
        isolated = np.array(memory["isolated"], dtype=np.int64)
        rest = np.setdiff1d(np.arange(len(data), dtype=np.int64), isolated)
        notes: Notes = {"stage": "finetune", **train(model, data.subset(rest), plan, rng), **found}
        if len(isolated) and bool(memory["confident"][0]):
            ascent = replace(
                plan, epochs=self.unlearn_epochs, lr=self.unlearn_lr, lr_step=None, lr_decay=1.0, augment="none"
            )
            after = train(model, data.subset(isolated), ascent, rng, objective=_ascent)
            notes |= {"stage": "unlearn", "unlearned_loss": -after["loss"]}
        return memory, notes

    def _control(self, model: nn.Module, data: Samples, plan: TrainingPlan, rng: torch.Generator) -> Notes:
        """Train under the loss control."""
        loss = CONTROLS[self.control]
        plain = replace(plan, augment="none")
        return train(model, data, plain, rng, objective=lambda out, y: loss(out, y, self.gamma))

    def _renew(self, model: nn.Module, data: Samples, plan: TrainingPlan, rng: torch.Generator) -> _Isolation:
        """Isolate anew with a model that is trained under the loss control for it (and spent)."""
        received = cross_entropy(_odds(model, data)[0]) if self.score == "drop" else None
        self._control(model, data, plan, rng)
        odds, classes = _odds(model, data)
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
        scores = losses if received is None else losses - received
        if self.score == "class_rank":
            scores = class_rank(losses, labels)
        isolated = lowest(scores, losses, isolation_count(len(labels), self.ratio, self.minimum))
        confidence = Confidence(passed=True, coverage=1.0)
        if self.confidence == "mixture":
            confidence = mixture_confidence(
                mean_odds, labels, isolated, classes=classes, separation=self.separation, coverage=self.coverage
            )
        return _Isolation(isolated, losses, confidence)


def _ascent(out: Tensor, labels: Tensor) -> Tensor:
    return -F.cross_entropy(out, labels)


def _odds(model: nn.Module, data: Samples) -> tuple[NDArray[np.float64], int]:
    """Return the samples' log odds against their labels, in eval mode, and the number of classes."""
    out = logits(model, data, threads=1)
    if not bool(torch.isfinite(out).all()):
        raise MethodRefused(
            "abl: the model's outputs are not finite, so that losses cannot be ranked; lower training.lr"
        )
    return log_odds_against(out, data.labels), int(out.shape[1])


def _refuse_other_data(memory: Memory, samples: int) -> None:
    before = int(memory["samples"][0]) if "samples" in memory else samples
    if before != samples:
        raise MethodRefused(
            f"abl: the client had {before} samples and has {samples} now, so that isolated indices mean nothing; "
            "give it the same samples in every round"
        )
