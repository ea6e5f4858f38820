"""BadNets: images stamped with a fixed trigger and given the target label.

T. Gu, B. Dolan-Gavitt, S. Garg, "BadNets: Identifying Vulnerabilities in the Machine Learning Model Supply Chain",
2017, https://arxiv.org/abs/1708.06733; the share of every batch (20 of 64) is that of E. Bagdasaryan et al., "How To
Backdoor Federated Learning", 2018, https://arxiv.org/abs/1807.00459.

Differs from the paper: the drawn images are stamped and relabeled in place, as in the code of ABL, NAD and RNP; the
paper adds stamped copies to the set. As there, images of the target class may be drawn.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
import torch
from annotated_types import Ge, Le
from numpy.typing import NDArray
from torch import Tensor, nn

from fedbd.training import Batch, TrainingPlan, train
from fedbd.types import AttackContext, Notes, Samples, Vector, quantized


@dataclass(frozen=True, kw_only=True)
class BadNets:
    """Dirty-label poisoning with a fixed trigger.

    Attributes:
        share: Share of images to poison, of every batch or of the data set. Counts are rounded to the nearest integer,
            halves to the even one; 0 poisons nothing (a control).
        per: ``batch``: an attacker stamps the first ``round(share * B)`` images of every batch of B, anew in each
            epoch; the shuffled order makes them a random draw. A short last batch with ``share * B`` of 1/2 or less
            stays clean. ``dataset``: one draw of ``round(share * N)`` images, the same in every epoch.
    """

    share: Annotated[float, Ge(0), Le(1)] = 20 / 64
    per: Literal["batch", "dataset"] = "batch"

    def pollute(self, data: Samples, ctx: AttackContext, rng: torch.Generator) -> tuple[Samples, NDArray[np.int64]]:
        """Poison ``round(share * N)`` images drawn from the whole set, images of the target class included.

        Args:
            data: The clean set; left untouched.
            ctx: Names trigger and target.
            rng: Draws the images.

        Returns:
            The poisoned set, stamped on raw pixels and rounded to uint8 again, and the poisoned indices, ascending.
        """
        count = round(self.share * len(data))
        index = torch.randperm(len(data), generator=rng)[:count].sort().values
        stamped = ctx.trigger.stamp(data.batch(index)[0])
        images, labels = data.images.clone(), data.labels.clone()
        images[index] = quantized(stamped)
        labels[index] = ctx.target
        return Samples(images, labels), index.numpy()

    def fit(
        self, model: nn.Module, data: Samples, plan: TrainingPlan, ctx: AttackContext, rng: torch.Generator
    ) -> Notes:
        """Train ``model`` in place with the plan of honest clients, on poisoned batches or on the poisoned set.

        Returns:
            The notes of plain training and ``poisoned``, how many stamped images were trained on (over all epochs).
        """
        if self.per == "dataset":
            polluted, index = self.pollute(data, ctx, rng)
            return {**train(model, polluted, plan, rng), "poisoned": plan.epochs * len(index)}
        poisoned = 0

        def stamp_first(x: Tensor, y: Tensor, _: torch.Generator) -> Batch:
            nonlocal poisoned
            count = round(self.share * len(y))
            poisoned += count
            labels = y.clone()
            labels[:count] = ctx.target
            return torch.cat([ctx.trigger.stamp(x[:count]), x[count:]]), labels

        notes = train(model, data, plan, rng, on_batch=stamp_first)
        return {**notes, "poisoned": poisoned}

    def tamper(self, delta: Vector, ctx: AttackContext, rng: torch.Generator) -> Vector:
        """Return ``delta`` unchanged: the poison is in the training alone."""
        del ctx, rng
        return delta
