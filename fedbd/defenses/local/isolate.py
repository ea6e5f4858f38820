"""ABL's isolation by itself: which samples of a data set a model, trained under a loss control, learned best.

Y. Li, X. Lyu, N. Koren, L. Lyu, B. Li, X. Ma, "Anti-Backdoor Learning: Training Clean Models on Poisoned Data",
NeurIPS 2021, https://arxiv.org/abs/2110.11571.

Differs from the paper: losses are ranked in float64 (``defenses.losses``), where float32 cross-entropy ties at 0, and
besides the loss itself there are two other scores.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from fedbd.defenses.local.isolation import class_rank, isolation_count, lowest
from fedbd.defenses.losses import cross_entropy, log_odds_against
from fedbd.errors import MethodRefused
from fedbd.metrics import logits
from fedbd.types import Samples

Score = Literal["loss", "class_rank", "drop"]
"""What the lowest of is isolated: cross-entropy as in the paper, its rank within the given label, or its fall."""


def isolate(
    model: nn.Module,
    data: Samples,
    ratio: float = 0.01,
    score: Score = "loss",
    *,
    minimum: int = 1,
    received: NDArray[np.float64] | None = None,
) -> NDArray[np.int64]:
    """Return the samples that a model learned best: ``floor(N * ratio)`` of them.

    Args:
        model: Best after a few epochs under a loss control; evaluated in eval mode and left untouched.
        data: The samples with their labels as given, N of them.
        ratio: Share to isolate, in (0, 0.5].
        score: See ``Score``.
        minimum: Fewest samples to isolate (never more than half).
        received: (N,) float64, ``sample_losses`` of the model before it was trained; ``drop`` needs it.

    Returns:
        (k,) int64 indices, most suspicious first; ties by loss, then by index.

    Raises:
        MethodRefused: If the model's outputs are not finite, or ``drop`` lacks ``received``.
    """
    losses = sample_losses(model, data)
    labels = data.labels.cpu().numpy()
    return most_suspicious(losses, labels, isolation_count(len(data), ratio, minimum), score, received)


def most_suspicious(
    losses: NDArray[np.float64],
    labels: NDArray[np.int64],
    count: int,
    score: Score,
    received: NDArray[np.float64] | None = None,
) -> NDArray[np.int64]:
    """Return ``count`` indices by ascending score, (count,) int64; arguments as in ``isolate``."""
    if score == "drop" and received is None:
        raise MethodRefused("abl: the score drop needs the losses before the training; give received, or take loss")
    scores = losses
    if score == "drop" and received is not None:
        scores = losses - received
    elif score == "class_rank":
        scores = class_rank(losses, labels)
    return lowest(scores, losses, count)


def sample_losses(model: nn.Module, data: Samples) -> NDArray[np.float64]:
    """Return each sample's cross-entropy with its given label in eval mode, (N,) float64, apart down to 1e-300.

    Raises:
        MethodRefused: If the model's outputs are not finite.
    """
    return cross_entropy(sample_odds(model, data)[0])


def sample_odds(model: nn.Module, data: Samples) -> tuple[NDArray[np.float64], int]:
    """Return the samples' log odds against their labels, (N,) float64, in eval mode, and the number of classes.

    Raises:
        MethodRefused: If the model's outputs are not finite.
    """
    out = logits(model, data, threads=1)
    if not bool(torch.isfinite(out).all()):
        raise MethodRefused(
            "abl: the model's outputs are not finite, so that losses cannot be ranked; lower training.lr"
        )
    return log_odds_against(out, data.labels), int(out.shape[1])
