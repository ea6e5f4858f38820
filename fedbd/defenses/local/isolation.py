"""Which samples a loss-controlled model learned best, and whether they stand out enough to be unlearned."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

FEWEST = 20
"""Images of a label below which two modes cannot be told from chance."""

VERY_STRONG = 10.0
"""Smallest advantage in BIC: "very strong" evidence (R. Kass, A. Raftery, "Bayes Factors", 1995)."""

_FLOOR = 0.1
"""Smallest deviation of a component, as a share of the whole's: two close points are no mode."""


def isolation_count(samples: int, ratio: float, minimum: int) -> int:
    """Return how many samples to isolate: ``floor(samples * ratio)``, at least ``minimum``, at most half.

    Args:
        samples: Size of the data set.
        ratio: Share in [0, 1]; a product that is an integer but for rounding counts as that integer.
        minimum: Smallest count.
    """
    return min(max(minimum, math.floor(samples * ratio + 1e-9)), samples // 2)


def class_rank(losses: NDArray[np.float64], labels: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return each sample's place among those of its label by ascending loss, as a share in (0, 1).

    The r-th of n (from 0) is at ``(r + 1/2) / n``; equal losses keep their order.

    Args:
        losses: (N,) float64.
        labels: (N,) int64, the labels as given.
    """
    ranks = np.empty(len(losses), dtype=np.float64)
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        ranks[rows[np.argsort(losses[rows], kind="stable")]] = (np.arange(len(rows)) + 0.5) / len(rows)
    return ranks


def lowest(scores: NDArray[np.float64], losses: NDArray[np.float64], count: int) -> NDArray[np.int64]:
    """Return the indices of the lowest scores, lowest first; ties by loss, then by index.

    Args:
        scores: (N,) float64, lower is more suspicious.
        losses: (N,) float64.
        count: How many.
    """
    return np.lexsort((losses, scores))[:count].astype(np.int64)


@dataclass(frozen=True)
class TwoNormals:
    """A mixture of two normal distributions, the one with the lower mean first.

    Attributes:
        weights: Their shares.
        means: Their means.
        deviations: Their standard deviations.
        bic_gain: BIC of one normal minus BIC of the two: above 0 two are preferred.
    """

    weights: tuple[float, float]
    means: tuple[float, float]
    deviations: tuple[float, float]
    bic_gain: float

    @property
    def separation(self) -> float:
        """Ashman's D: distance of the means in root mean square deviations; over 2 for a clean separation."""
        spread = math.hypot(*self.deviations)
        return math.sqrt(2) * (self.means[1] - self.means[0]) / spread

    def in_lower(self, values: NDArray[np.float64]) -> NDArray[np.bool_]:
        """Return which values rather come from the lower component, or lie below its mean."""
        low, high = _log_densities(values, np.array(self.weights), np.array(self.means), np.array(self.deviations))
        inside: NDArray[np.bool_] = (low >= high) | (values <= self.means[0])
        return inside


def _log_densities(
    values: NDArray[np.float64],
    weights: NDArray[np.float64],
    means: NDArray[np.float64],
    deviations: NDArray[np.float64],
) -> NDArray[np.float64]:
    """Return (2, N): the log of each component's weighted density."""
    scaled = (values - means[:, None]) / deviations[:, None]
    constant = np.log(weights / deviations) - 0.5 * math.log(2 * math.pi)
    return constant[:, None] - 0.5 * np.square(scaled)


def fit_two_normals(values: NDArray[np.float64], iterations: int = 500) -> TwoNormals | None:
    """Fit two normals by expectation maximization, from splits at the 10, 50 and 90 % quantiles; the likeliest is kept.

    Args:
        values: (N,) float64.
        iterations: Most iterations per start.

    Returns:
        The mixture, or None for fewer than ``FEWEST`` values, or for values that are all the same.
    """
    if len(values) < FEWEST or not np.ptp(values) > 0:
        return None
    center, scale = float(values.mean()), float(values.std())
    unit = (values - center) / scale
    best, likelihood = None, -math.inf
    for share in (0.1, 0.5, 0.9):
        below = unit <= np.quantile(unit, share)
        if below.all():  # more than one in ten share the largest value: no split here
            continue
        fitted, reached = _maximize(unit, np.stack([below, ~below]).astype(np.float64), iterations)
        if reached > likelihood:
            best, likelihood = fitted, reached
    if best is None:
        return None
    order = np.argsort(best[1], kind="stable")
    weights, means, deviations = (part[order] for part in best)
    one = -0.5 * len(unit) * (math.log(2 * math.pi) + 1)
    gain = (2 - 5) * math.log(len(unit)) - 2 * (one - likelihood)
    return TwoNormals(
        (float(weights[0]), float(weights[1])),
        (float(center + scale * means[0]), float(center + scale * means[1])),
        (float(scale * deviations[0]), float(scale * deviations[1])),
        gain,
    )


def _maximize(
    unit: NDArray[np.float64], shares: NDArray[np.float64], iterations: int
) -> tuple[tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]], float]:
    """Return weights, means and deviations, each (2,), and their log likelihood, starting from (2, N) shares."""
    before = -math.inf
    while True:
        mass = np.maximum(shares.sum(axis=1), 1e-12)
        means = (shares @ unit) / mass
        variances = (shares * np.square(unit - means[:, None])).sum(axis=1) / mass
        fitted = (mass / mass.sum(), means, np.sqrt(np.maximum(variances, _FLOOR**2)))
        logs = _log_densities(unit, *fitted)
        total = np.logaddexp(logs[0], logs[1])
        likelihood, iterations = float(total.sum()), iterations - 1
        if iterations <= 0 or likelihood - before < 1e-9 * len(unit):
            return fitted, likelihood
        before, shares = likelihood, np.exp(logs - total)


@dataclass(frozen=True)
class Confidence:
    """Whether the isolated samples stand out.

    Attributes:
        passed: The outcome.
        coverage: Share of the isolated samples that lie in the lower mode of a label with two clear modes.
        label: The given label of most isolated samples; None where nothing is isolated.
        separation: Ashman's D of that label's two modes; None where none could be fitted.
        bic_gain: See ``TwoNormals.bic_gain``.
    """

    passed: bool
    coverage: float
    label: int | None = None
    separation: float | None = None
    bic_gain: float | None = None

    def as_notes(self) -> dict[str, Any]:
        """Return plain values for the record."""
        return {
            "passed": self.passed,
            "coverage": self.coverage,
            "label": self.label,
            "separation": self.separation,
            "bic_gain": self.bic_gain,
        }


def mixture_confidence(
    odds: NDArray[np.float64],
    labels: NDArray[np.int64],
    isolated: NDArray[np.int64],
    *,
    classes: int,
    separation: float,
    coverage: float,
) -> Confidence:
    """Test whether the isolated samples are a mode of their own among the samples with their label.

    Labels are looked at one by one, because on skewed clean data the classes themselves differ in loss. A label has two
    clear modes if two normals fit its log odds better than one by ``VERY_STRONG``, Ashman's D reaches ``separation``,
    and the upper mode is still predicted better than by guessing (else it is what is mislabeled or not learned at all,
    and the lower mode is the label's honest bulk).

    Args:
        odds: (N,) float64 of ``losses.log_odds_against``.
        labels: (N,) int64, the labels as given.
        isolated: Indices of the isolated samples.
        classes: Number of classes.
        separation: Smallest Ashman's D.
        coverage: Smallest share of isolated samples in such lower modes.
    """
    if len(isolated) == 0:
        return Confidence(passed=False, coverage=0.0)
    hits, most, commonest = 0, 0, Confidence(passed=False, coverage=0.0)
    for label in np.unique(labels[isolated]):
        mine = isolated[labels[isolated] == label]
        fitted = fit_two_normals(odds[labels == label])
        if fitted is not None and _clear(fitted, classes, separation):
            hits += int(np.count_nonzero(fitted.in_lower(odds[mine])))
        if len(mine) > most:
            most = len(mine)
            measured = (None, None) if fitted is None else (fitted.separation, fitted.bic_gain)
            commonest = Confidence(False, 0.0, int(label), *measured)
    share = hits / len(isolated)
    return Confidence(share >= coverage, share, commonest.label, commonest.separation, commonest.bic_gain)


def _clear(fitted: TwoNormals, classes: int, separation: float) -> bool:
    learned = fitted.means[1] < math.log(max(classes - 1, 1))
    return learned and fitted.bic_gain >= VERY_STRONG and fitted.separation >= separation
