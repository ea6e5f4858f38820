"""Per-sample losses in float64, precise where float32 cross-entropy is exactly 0 and all ties."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedbd.errors import MethodRefused


def log_odds_against(logits: Tensor, labels: Tensor) -> NDArray[np.float64]:
    """Return ``log((1 - p) / p)`` of each sample, with p the softmax probability of its given label.

    It ranks as cross-entropy does and is near normal over the samples of a class: the logit scaling, with the sign
    turned, of N. Carlini et al., "Membership Inference Attacks From First Principles", 2021,
    https://arxiv.org/abs/2112.03570.

    Args:
        logits: (N, C) in any float dtype; computed on in float64.
        labels: (N,) int64, the labels as given.

    Returns:
        (N,) float64: the log-sum-exp of the other logits minus the label's; lower is better learned.

    Raises:
        MethodRefused: If a label is none of the C classes.
    """
    values = logits.detach().to("cpu", torch.float64)
    index = labels.to("cpu", torch.int64)[:, None]
    if len(index) and not 0 <= int(index.min()) <= int(index.max()) < values.shape[1]:
        found = f"{int(index.min())} to {int(index.max())}"
        raise MethodRefused(f"labels must be classes of the model, 0 to {values.shape[1] - 1}, got {found}")
    own = values.gather(1, index)[:, 0]
    others = values.scatter(1, index, -torch.inf).logsumexp(1)
    return (others - own).numpy()


def cross_entropy(odds: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return each sample's cross-entropy, log-sum-exp minus the label's logit, from its log odds.

    The same number as the plain difference, but without its cancellation: losses stay apart down to 1e-300, where the
    difference ties at 0 from about 1e-16 on.

    Args:
        odds: (N,) float64 of ``log_odds_against``.
    """
    return np.logaddexp(0.0, odds)
