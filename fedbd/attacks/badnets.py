"""BadNets: images stamped with a fixed trigger and given the target label, or stamped where they have it.

T. Gu, B. Dolan-Gavitt, S. Garg, "BadNets: Identifying Vulnerabilities in the Machine Learning Model Supply Chain",
2017, https://arxiv.org/abs/1708.06733, all-to-one and all-to-all; the share of every batch (20 of 64) is that of
E. Bagdasaryan et al., "How To Backdoor Federated Learning", 2018, https://arxiv.org/abs/1807.00459. Clean labels: as
Barni et al. have them for their trigger (``sig_trigger``). Cover: the noise mode of WaNet (``wanet_trigger``).

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

from fedbd.attacks.poisoning import Disturbing, Labels, candidates, relabeled
from fedbd.errors import MethodRefused
from fedbd.method_fields import checks_fields
from fedbd.training import Batch, TrainingPlan, train
from fedbd.types import AttackContext, Notes, Samples, Vector, quantized


@dataclass(frozen=True, kw_only=True)
@checks_fields
class BadNets:
    """Poisoning with a fixed trigger, with dirty labels or clean ones.

    Attributes:
        share: Share of images to poison, of every batch or of the data set; with clean labels of the target class's
            images in the batch or in the data set. Counts are rounded to the nearest integer, halves to the even one; 0
            poisons nothing (a control).
        per: ``batch``: an attacker stamps the first ``round(share * B)`` images of every batch of B, anew in each
            epoch; the shuffled order makes them a random draw. A short last batch with ``share * B`` of 1/2 or less
            stays clean. ``dataset``: one draw of ``round(share * N)`` images, the same in every epoch.
        labels: ``dirty``: poisoned images get the label that the attack wants. ``clean``: only images that have the
            target label are stamped, and labels stay as they are; a client without such images poisons nothing.
        cover: For each poisoned image so many others (rounded) get a disturbed trigger and keep their label, so that
            the model learns the exact one: WaNet's noise mode, where it is 2. Needs the trigger ``wanet``.
    """

    share: Annotated[float, Ge(0), Le(1)] = 20 / 64
    per: Literal["batch", "dataset"] = "batch"
    labels: Labels = "dirty"
    cover: Annotated[float, Ge(0)] = 0.0

    @property
    def all_to_all(self) -> bool:
        """Whether the target may be ``all_to_all``: labels must be there to change."""
        return self.labels == "dirty"

    def problems(self) -> list[tuple[str, str]]:
        """Return what is wrong between the fields."""
        if self.cover and self.labels == "clean":
            return [("cover", f"must be 0 with labels: clean, got {self.cover:g}")]
        if self.share * (1 + self.cover) > 1:
            return [("cover", f"must leave share * (1 + cover) at most 1, got {self.share * (1 + self.cover):.3g}")]
        return []

    def pollute(self, data: Samples, ctx: AttackContext, rng: torch.Generator) -> tuple[Samples, NDArray[np.int64]]:
        """Poison ``round(share * N)`` images drawn from the whole set, images of the target class included.

        With clean labels N counts the images of the target class, and only they are drawn.

        Args:
            data: The clean set; left untouched.
            ctx: Names trigger and target.
            rng: Draws the images.

        Returns:
            The poisoned set, stamped on raw pixels and rounded to uint8 again, and the poisoned indices, ascending;
            images with a disturbed trigger are not among them, their labels being right.
        """
        order = torch.randperm(len(data), generator=rng)
        able = order[candidates(data.labels, ctx, self.labels).cpu()[order]]
        count = round(self.share * len(able))
        index, covered = able[:count].sort().values, able[count : count + round(self.cover * count)].sort().values
        images, labels = data.images.clone(), data.labels.clone()
        if len(index):
            images[index] = quantized(ctx.trigger.stamp(data.batch(index)[0]))
            labels[index] = relabeled(labels[index], ctx, self.labels)
        if len(covered):
            images[covered] = quantized(_disturbed(ctx, data.batch(covered)[0], rng))
        return Samples(images, labels), index.numpy()

    def fit(
        self, model: nn.Module, data: Samples, plan: TrainingPlan, ctx: AttackContext, rng: torch.Generator
    ) -> Notes:
        """Train ``model`` in place with the plan of honest clients, on poisoned batches or on the poisoned set.

        Returns:
            The notes of plain training and ``poisoned``, how many stamped images were trained on (over all epochs); 0
            for a client without an image to poison.
        """
        if self.per == "dataset":
            polluted, index = self.pollute(data, ctx, rng)
            return {**train(model, polluted, plan, rng), "poisoned": plan.epochs * len(index)}
        poisoned = 0

        def stamp_first(x: Tensor, y: Tensor, drawn: torch.Generator) -> Batch:
            nonlocal poisoned
            able = candidates(y, ctx, self.labels).nonzero()[:, 0]
            count = round(self.share * len(able))
            poisoned += count
            chosen, covered = able[:count], able[count : count + round(self.cover * count)]
            images, labels = x.clone(), y.clone()
            if len(chosen):
                images[chosen] = ctx.trigger.stamp(x[chosen])
                labels[chosen] = relabeled(y[chosen], ctx, self.labels)
            if len(covered):
                images[covered] = _disturbed(ctx, x[covered], drawn)
            return images, labels

        notes = train(model, data, plan, rng, on_batch=stamp_first)
        return {**notes, "poisoned": poisoned}

    def tamper(self, delta: Vector, ctx: AttackContext, rng: torch.Generator) -> Vector:
        """Return ``delta`` unchanged: the poison is in the training alone."""
        del ctx, rng
        return delta


def _disturbed(ctx: AttackContext, images: Tensor, rng: torch.Generator) -> Tensor:
    """Return images with a disturbed trigger.

    Raises:
        MethodRefused: If the trigger has none.
    """
    if not isinstance(ctx.trigger, Disturbing):
        raise MethodRefused("badnets: cover needs a trigger with disturbed copies; set cover: 0 or take wanet")
    return ctx.trigger.disturbed(images, rng)
