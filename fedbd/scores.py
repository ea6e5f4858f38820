"""How well the scores of a detector separate poisoned samples from clean ones: higher is more suspicious.

A share over nothing is None, never 0, and a rate that would rest on under ten samples is None, too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fedbd.errors import MethodRefused

if TYPE_CHECKING:
    import torch
    from torch import nn

    from fedbd.types import Detector, Notes, Samples, TrustedData


def _scores(values: ArrayLike) -> NDArray[np.float64]:
    scores = np.asarray(values, dtype=np.float64).reshape(-1)
    if np.isnan(scores).any():
        raise ValueError("scores: a NaN has no rank; expected numbers (infinities are fine)")
    return scores


def roc_auc(positive: ArrayLike, negative: ArrayLike) -> float | None:
    """Return the probability that a positive scores above a negative, ties counted half (Mann-Whitney).

    Args:
        positive: Scores of the poisoned samples, higher is more suspicious.
        negative: Scores of the clean ones.

    Returns:
        In [0, 1], 0.5 for no separation; None where either is empty.

    Raises:
        ValueError: If a score is NaN.
    """
    hot, cold = _scores(positive), _scores(negative)
    if hot.size == 0 or cold.size == 0:
        return None
    # Dense ranks keep order and ties and make infinities finite, which scikit-learn asks for.
    ranks = np.unique(np.concatenate([hot, cold]), return_inverse=True)[1]
    from sklearn.metrics import roc_auc_score  # noqa: PLC0415 - a second that every worker process would pay

    return float(roc_auc_score(np.repeat([1, 0], [hot.size, cold.size]), ranks))


def tpr_at_fpr(positive: ArrayLike, negative: ArrayLike, fpr: float) -> float | None:
    """Return the largest true positive rate whose false positive rate is at most ``fpr``.

    Returns:
        In [0, 1]; None without positives, or with fewer than 10 / fpr negatives (the rate would rest on under ten).

    Raises:
        ValueError: If a score is NaN.
    """
    hot, cold = _scores(positive), np.sort(_scores(negative))[::-1]
    if hot.size == 0 or cold.size * fpr < 10 - 1e-9:
        return None
    allowed = int(np.floor(fpr * cold.size + 1e-9))
    return float(np.mean(hot > cold[allowed])) if allowed < cold.size else 1.0


def precision_at(positive: ArrayLike, negative: ArrayLike, rate: float) -> float | None:
    """Return the share of positives among the ``rate`` most suspicious of all samples (precision at isolation).

    Ties at the cut count as their expectation over a random choice among the tied.

    Returns:
        In [0, 1]; None where ``int(rate * N)`` is 0, so that nothing is isolated.

    Raises:
        ValueError: If a score is NaN.
    """
    hot, cold = _scores(positive), _scores(negative)
    both = np.concatenate([hot, cold])
    size = int(rate * both.size + 1e-9)
    if size == 0:
        return None
    cut = np.sort(both)[::-1][size - 1]
    tied = np.count_nonzero(both == cut)
    free = size - np.count_nonzero(both > cut)
    return float((np.count_nonzero(hot > cut) + free * np.count_nonzero(hot == cut) / tied) / size)


def scores_of(
    detector: Detector, model: nn.Module, data: Samples, trusted: TrustedData | None, rng: torch.Generator
) -> tuple[NDArray[np.float64] | None, Notes]:
    """Return a detector's scores, or None where it cannot act or some are not finite, and its notes with the reason."""
    try:
        scores, notes = detector.score(model, data, trusted, rng)
    except MethodRefused as refusal:
        return None, {"acted": False, "reason": str(refusal)}
    if not np.isfinite(scores).all():
        lost = f"{int((~np.isfinite(scores)).sum())} of {len(scores)} scores are not finite"
        return None, {**notes, "acted": False, "reason": lost}
    return scores, notes


def score_measures(scores: ArrayLike, poisoned: ArrayLike, rng: np.random.Generator) -> dict[str, Any]:
    """Return the measures of a detection's record.

    Args:
        scores: (N,), higher is more suspicious.
        poisoned: (N,) bool, the truth.
        rng: Shuffles the truth for the control.

    Returns:
        ``auc``, ``auc_shuffled`` (the control: about 1/2), ``tpr_at_fpr_1``, ``tpr_at_fpr_5``, ``precision`` (at the
        true share), ``positives`` and ``negatives``.

    Raises:
        ValueError: If a score is NaN.
    """
    values, truth = _scores(scores), np.asarray(poisoned, dtype=bool)
    shuffled = rng.permutation(truth)
    positive, negative = values[truth], values[~truth]
    return {
        "auc": roc_auc(positive, negative),
        "auc_shuffled": roc_auc(values[shuffled], values[~shuffled]),
        "tpr_at_fpr_1": tpr_at_fpr(positive, negative, 0.01),
        "tpr_at_fpr_5": tpr_at_fpr(positive, negative, 0.05),
        "precision": precision_at(positive, negative, positive.size / max(1, values.size)),
        "positives": int(positive.size),
        "negatives": int(negative.size),
    }


def isolation_quality(isolated: NDArray[np.int64] | None, truth: NDArray[np.int64] | None, samples: int) -> Notes:
    """Compare isolated samples with the truly poisoned ones (EVIDENCE: precision, recall and size are recorded).

    Args:
        isolated: Indices that a local defense isolated, or None before it did.
        truth: Poisoned indices; None where the client is honest.
        samples: Size of the client's data set.
    """
    if isolated is None or len(isolated) == 0:
        return {}
    poisoned = np.empty(0, np.int64) if truth is None else truth
    hits = int(np.isin(isolated, poisoned).sum())
    return {
        "isolated": len(isolated),
        "isolation_share": len(isolated) / samples,
        "isolation_precision": hits / len(isolated),
        "isolation_recall": hits / len(poisoned) if len(poisoned) else None,
    }
