"""The search behind trigger recovery: Neural Cleanse's optimization of one label, and its outlier test over labels.

B. Wang, Y. Yao, S. Shan, H. Li, B. Viswanath, H. Zheng, B. Y. Zhao, "Neural Cleanse: Identifying and Mitigating
Backdoor Attacks in Neural Networks", IEEE S&P 2019, https://doi.org/10.1109/SP.2019.00031, sections IV-B and V; code
https://github.com/bolunwang/backdoor. ``trigger_recovery`` says what differs.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - the name that every PyTorch user reads
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn

from fedbd.errors import MethodRefused
from fedbd.training import learning, memory_format_of
from fedbd.types import Samples

FIRST_COST = 1e-3
"""The code's cost of the mask, from the pass on that the trigger works."""

PATIENCE, UP, DOWN = 5, 2.0, 2.0**1.5
"""Passes in a row above (below) the wanted success after which the cost grows (falls), and by which factor."""

STALE = 5 * PATIENCE
"""Passes without a smaller mask after which the search ends, once the cost has both grown and fallen."""

NORMAL = 1.4826
"""Factor that turns a median absolute deviation of normal values into their standard deviation."""


@dataclass(frozen=True, eq=False)
class RecoveredTrigger:
    """A trigger as it was found: ``(1 - mask) * x + mask * pattern``.

    Attributes:
        mask: (H, W) float32 in [0, 1], the same for every channel.
        pattern: (C, H, W) float32 in [0, 1].
    """

    mask: Tensor
    pattern: Tensor

    def stamp(self, images: Tensor) -> Tensor:
        """Return stamped copies of (N, C, H, W) float images in [0, 1]; the input is left untouched."""
        mask, pattern = self.mask.to(images), self.pattern.to(images)
        return (1 - mask) * images + mask * pattern

    @property
    def size(self) -> float:
        """The l1 norm of the mask, in pixels."""
        return float(self.mask.sum(dtype=torch.float64))


@dataclass(frozen=True)
class Search:
    """The outcome for one label.

    Attributes:
        label: Where images were sent.
        trigger: The smallest that worked, the last one if none did.
        reached: Whether one worked.
        passes: Passes done.
    """

    label: int
    trigger: RecoveredTrigger
    reached: bool
    passes: int


@dataclass
class _Cost:
    """The adaptive cost of one search (the code's counters)."""

    value: float = 0.0
    good: int = 0
    bad: int = 0
    grew: bool = False
    fell: bool = False

    def update(self, worked: bool) -> None:
        """Count a pass; change the cost after ``PATIENCE`` passes of one kind."""
        self.good, self.bad = (self.good + 1, 0) if worked else (0, self.bad + 1)
        if self.good >= PATIENCE:
            first = self.value == 0
            self.good = int(first)  # the pass that sets the cost is also the first that counts for raising it
            self.grew = not first
            self.value = FIRST_COST if first else self.value * UP
        elif self.bad >= PATIENCE:
            self.bad = 0
            self.fell = self.fell or self.value > 0
            self.value /= DOWN


def search(
    model: nn.Module,
    data: Samples,
    label: int,
    *,
    passes: int,
    batch_size: int,
    lr: float,
    success: float,
    rng: torch.Generator,
) -> Search:
    """Look for the smallest trigger that sends images to a label.

    Args:
        model: Left untouched; judged in eval mode.
        data: Clean samples; those of the label itself are not used.
        label: The label.
        passes: Most passes over the data.
        batch_size: Images per step of Adam.
        lr: Adam's rate.
        success: Share of a pass's images that must get the label for its mask to count.
        rng: Draws the start and the orders.

    Raises:
        MethodRefused: If there is no image of another label, or the model's outputs are not finite.
    """
    rows = torch.nonzero(data.labels != label)[:, 0]
    if len(rows) == 0:
        raise MethodRefused(f"trigger_recovery needs clean images of other labels than {label} and there are none")
    network = copy.deepcopy(model).eval().requires_grad_(False)
    layout, (channels, height, width) = memory_format_of(model), data.images.shape[1:]
    start = torch.rand(1 + channels, height, width, generator=rng).clamp(1e-4, 1 - 1e-4)
    free = torch.logit(start).div_(2).requires_grad_(True)  # sigmoid(2 v) = (tanh(v) + 1) / 2
    optimizer = torch.optim.Adam([free], lr=lr, betas=(0.5, 0.9))
    cost, stale, smallest = _Cost(), 0, math.inf
    best: Tensor | None = None
    done = 0
    with learning(rng):
        while done < passes and not (cost.grew and cost.fell and stale >= STALE):
            hits, sizes = 0, []
            for index in torch.split(rows[torch.randperm(len(rows), generator=rng)], batch_size):
                x, _ = data.batch(index)
                both = torch.sigmoid(2 * free)
                mask, pattern = both[0], both[1:]
                out = network(((1 - mask) * x + mask * pattern).contiguous(memory_format=layout))
                if not bool(torch.isfinite(out).all()):  # the argmax of NaN is class 0: it would count as reached
                    raise MethodRefused("trigger_recovery: the model's outputs are not finite; the model has diverged")
                wanted = torch.full((len(index),), label)
                optimizer.zero_grad(set_to_none=True)
                (F.cross_entropy(out, wanted) + cost.value * mask.sum()).backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                hits += int((out.argmax(1) == label).sum())
                sizes.append(float(mask.detach().sum()))
            worked, size = hits / len(rows) >= success, float(np.mean(sizes))
            stale = 0 if worked and size < smallest else stale + 1
            if worked and size < smallest:
                best, smallest = free.detach().clone(), size
            cost.update(worked)
            done += 1
    both = torch.sigmoid(2 * (free.detach() if best is None else best))
    return Search(label, RecoveredTrigger(both[0].clone(), both[1:].clone()), best is not None, done)


def anomaly_indices(sizes: ArrayLike) -> NDArray[np.float64]:
    """Return how many deviations each size lies from the median: |size - median| / (1.4826 * MAD), (K,) float64.

    Neural Cleanse, section IV-B. NaN where the median absolute deviation (MAD) is 0.
    """
    values = np.asarray(sizes, dtype=np.float64)
    away = np.abs(values - np.median(values))
    spread = NORMAL * np.median(away)
    return away / spread if spread > 0 else np.full_like(away, np.nan)


def outliers(searches: list[Search], bar: float) -> list[tuple[float, Search]]:
    """Return the labels whose trigger works and is small beside the others', with their indices, smallest first."""
    sizes = np.array([found.trigger.size for found in searches])
    indices = anomaly_indices(sizes)
    small = [i for i in np.argsort(sizes, kind="stable") if sizes[i] < np.median(sizes) and indices[i] > bar]
    return [(float(indices[i]), searches[i]) for i in small if searches[i].reached]
