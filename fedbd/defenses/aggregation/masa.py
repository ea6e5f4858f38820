"""MASA: unlearn clean data in every client's model and leave out those whose loss grows most.

J. Xu, Z. Zhang, R. Hu, "Identify Backdoored Model in Federated Learning via Individual Unlearning", WACV 2025,
https://arxiv.org/abs/2411.01040; code https://github.com/JiiahaoXU/MASA.

Differs from the paper:

- Only its abstract and the authors' code could be read. The fusion, the ascent, the score and the defaults are the
  code's; whether the paper says the same could not be verified. How much data the server holds there is not known.
- All models of a round see the same batches in the same order, so that equal updates get equal losses; the code
  shuffles anew for each, and the scores, which divide by the spread, then tell apart what is the same.
- A model whose loss or weights stop being finite is left out and does not enter median and spread; the code would
  compute with it. A spread below a millionth of the median is rounding and rejects nobody. If every model diverges, the
  round's update is zero, and the notes say so.

The score has no scale: where all clients are honest, too, those more than ``threshold`` spreads above the median are
left out (about one in six if losses are normal and ``threshold`` is 1).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - the name that every PyTorch user reads
from annotated_types import Ge, Gt, Le, Lt
from numpy.typing import NDArray
from torch import Tensor, nn

from fedbd.defenses.aggregation.rows import rows_of, to_vector, weighted_sum
from fedbd.defenses.trusted_data import SEVERAL, SOME, several_classes
from fedbd.errors import MethodRefused
from fedbd.method_fields import checks_fields
from fedbd.params import flatten
from fedbd.training import TrainingPlan, learning, memory_format_of, sgd
from fedbd.types import Aggregate, Cohort, Memory, Need, Notes, Samples, Vector

_ROUNDING = 1e-6
"""Share of the median below which a spread of losses says nothing."""


def median_deviation_scores(losses: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return ``(loss - median) / standard deviation``, (n,) float64; NaN for losses that are not finite.

    Args:
        losses: (n,) float64. Median and (population) deviation are those of the finite ones; where these do not differ
            by more than rounding, all scores are 0.
    """
    finite = np.isfinite(losses)
    scores = np.full(len(losses), np.nan)
    if finite.any():
        median, spread = np.median(losses[finite]), np.std(losses[finite])
        flat = spread <= _ROUNDING * abs(median)
        scores[finite] = 0.0 if flat else (losses[finite] - median) / spread
    return scores


@dataclass(frozen=True, kw_only=True)
@checks_fields
class MASA:
    """The weighted mean of the rows whose models, unlearned on trusted data, keep a loss near the median.

    The models of malicious rows are expected to lose clean data faster. The rule trains one model per row and round:
    its cost is ``rows * unlearn_epochs`` passes over the trusted data, as training so many clients on them.

    Attributes:
        fusion: Share of a row itself in the model that is unlearned; the rest is the mean of all rows, which evens out
            what clients with unlike data learned. 1: no fusion.
        unlearn_lr: Rate of the gradient ascent.
        unlearn_epochs: Passes over the trusted data.
        batch_size: Of the ascent.
        momentum: Of the ascent.
        max_norm: Longest gradient of a step, shortened to this; null: any.
        threshold: Rows with a median deviation score below this count.
    """

    fusion: Annotated[float, Gt(0), Le(1)] = 0.7
    unlearn_lr: Annotated[float, Gt(0)] = 0.001
    unlearn_epochs: Annotated[int, Ge(1)] = 5
    batch_size: Annotated[int, Ge(1)] = 64
    momentum: Annotated[float, Ge(0), Lt(1)] = 0.9
    max_norm: Annotated[float, Gt(0)] | None = 20.0
    threshold: Annotated[float, Gt(0)] = 1.0

    @property
    def needs(self) -> frozenset[Need]:
        """Single rows and trusted data."""
        return frozenset({Need.INDIVIDUAL, Need.TRUSTED})

    @property
    def builds_models(self) -> bool:
        """It trains the model of each row."""
        return True

    @property
    def minimum_rows(self) -> int:
        """Three: two always lie one deviation from their median."""
        return 3

    def aggregate(self, cohort: Cohort, memory: Memory, rng: torch.Generator) -> tuple[Aggregate, Memory, Notes]:
        """Return the weighted mean of the rows that are not suspect.

        Args:
            cohort: ``updates``, ``weights``, ``global_weights``, ``build`` and the ``fit`` part of ``trusted`` are
                read. One model is in memory at a time.
            memory: Passed on.
            rng: Draws the order of the trusted samples, the same for every row.

        Returns:
            The aggregate with the rows that count, ``memory``, and notes: ``ids`` (the rows' clients, or null),
            ``losses`` (accumulated over the epochs) and ``scores`` per row (null where the model diverged),
            ``diverged`` (how many), ``rejected`` (how many rows do not count), ``images`` (how many images the rule
            trained on, its cost) and, if no row is left, ``reason``.

        Raises:
            MethodRefused: If the server sees only one sum, there are no trusted data of several classes or no model at
                hand.
        """
        rows = rows_of(cohort, "masa")
        if cohort.trusted is None or len(cohort.trusted.fit) == 0:
            raise MethodRefused(f"masa unlearns trusted data and there are none; {SOME}")
        if not several_classes(cohort.trusted.fit):
            raise MethodRefused(f"masa unlearns trusted data and all of them are of one class; {SEVERAL}")
        if cohort.build is None:
            raise MethodRefused("masa trains every client's model and there is no model at hand; give the cohort build")
        losses, images = self._losses(rows, cohort, cohort.trusted.fit, cohort.build, rng)
        scores = median_deviation_scores(losses)
        accepted = np.nan_to_num(scores, nan=np.inf) < self.threshold
        notes: Notes = {
            "ids": None if cohort.ids is None else [int(client) for client in cohort.ids],
            "losses": _plain(losses),
            "scores": _plain(scores),
            "diverged": int(np.isnan(scores).sum()),
            "rejected": int((~accepted).sum()),
            "images": images,
        }
        if not accepted.any():
            notes["reason"] = "every model diverged and no update counts: lower unlearn_lr, or look for a huge update"
        delta = _mean(rows, cohort.weights, accepted)
        return Aggregate(delta=delta, accepted=tuple(accepted.tolist())), memory, notes

    def _losses(
        self,
        rows: NDArray[np.float32],
        cohort: Cohort,
        data: Samples,
        build: Callable[[Vector], nn.Module],
        rng: torch.Generator,
    ) -> tuple[NDArray[np.float64], int]:
        """Fuse and unlearn each row's model; return the accumulated losses, (n,), NaN if diverged, and images seen."""
        orders = [torch.randperm(len(data), generator=rng) for _ in range(self.unlearn_epochs)]
        sound: NDArray[np.bool_] = np.array([np.isfinite(row).all() for row in rows], dtype=np.bool_)
        mean = _mean(rows, cohort.weights, sound)
        losses, images = np.full(len(rows), np.nan), 0
        for i in np.flatnonzero(sound):
            with np.errstate(over="ignore"):  # a model with infinite weights is one that diverged
                fused = to_vector(cohort.global_weights + self.fusion * rows[i] + (1 - self.fusion) * mean)
            with learning(rng):  # every row's Dropout drops the same
                losses[i], seen = self._unlearned(build(fused), data, orders)
            images += seen
        return losses, images

    def _unlearned(self, model: nn.Module, data: Samples, orders: Sequence[Tensor]) -> tuple[float, int]:
        """Unlearn in place; return the sum over epochs of the mean batch loss, NaN if it diverged, and images seen."""
        plan = TrainingPlan(lr=self.unlearn_lr, momentum=self.momentum, weight_decay=0.0)
        model.train()
        optimizer, layout = sgd(model, plan), memory_format_of(model)
        total, seen = 0.0, 0
        for order in orders:
            batches = torch.split(order, self.batch_size)
            for index in batches:
                x, y = data.batch(index)
                optimizer.zero_grad(set_to_none=True)
                loss = F.cross_entropy(model(x.contiguous(memory_format=layout)), y)
                (-loss).backward()  # type: ignore[no-untyped-call]
                if self.max_norm is not None:
                    nn.utils.clip_grad_norm_(model.parameters(), self.max_norm)
                optimizer.step()
                total += float(loss.detach()) / len(batches)
                seen += len(index)
                if not np.isfinite(total):
                    return float("nan"), seen
        return (total if np.isfinite(flatten(model)).all() else float("nan")), seen


def _mean(rows: NDArray[np.float32], weights: NDArray[np.float64], counted: NDArray[np.bool_]) -> Vector:
    """Return the weighted mean of the rows that count, zeros where none does."""
    if not counted.any():
        return np.zeros(rows.shape[1], dtype=np.float32)
    return to_vector(weighted_sum(rows[counted], weights[counted]) / weights[counted].sum())


def _plain(values: NDArray[np.float64]) -> list[float | None]:
    return [float(value) if np.isfinite(value) else None for value in values]
