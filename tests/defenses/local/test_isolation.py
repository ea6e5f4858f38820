from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray
from sklearn.mixture import GaussianMixture

from fedbd.defenses.local.isolation import (
    Confidence,
    class_rank,
    fit_two_normals,
    isolation_count,
    lowest,
    mixture_confidence,
)

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@pytest.mark.parametrize(
    ("samples", "ratio", "minimum", "expected"),
    [
        (50_000, 0.01, 1, 500),
        (599, 0.01, 1, 5),
        (100, 0.29, 1, 29),  # 0.29 * 100 is 28.999999999999996
        (40, 0.01, 5, 5),
        (40, 0.01, 1, 1),
        (6, 0.01, 5, 3),
        (1, 0.5, 1, 0),
    ],
)
def test_count_is_the_floor_within_its_bounds(samples: int, ratio: float, minimum: int, expected: int) -> None:
    assert isolation_count(samples, ratio, minimum) == expected


def test_class_rank_by_hand() -> None:
    losses = np.array([0.5, 0.1, 9.0, 0.3, 8.0, 0.3])
    labels = np.array([0, 0, 1, 0, 1, 0])
    assert class_rank(losses, labels).tolist() == [7 / 8, 1 / 8, 3 / 4, 3 / 8, 1 / 4, 5 / 8]


def test_lowest_first_then_by_loss_then_by_index() -> None:
    scores = np.array([1.0, 0.0, 1.0, 0.0, 0.0])
    losses = np.array([3.0, 2.0, 1.0, 2.0, 1.0])
    assert lowest(scores, losses, 4).tolist() == [4, 1, 3, 2]
    assert lowest(losses, losses, 5).tolist() == [2, 4, 1, 3, 0]


def mixture(low: int, high: int, gap: float, seed: int = 0) -> Floats:
    rng = np.random.default_rng(seed)
    return np.concatenate([rng.normal(-3 - gap, 0.7, low), rng.normal(-3, 1.2, high)])


@pytest.mark.parametrize(("low", "high", "gap"), [(50, 50, 6.0), (20, 180, 5.0), (150, 30, 7.0)])
def test_fit_equals_scikit_learns(low: int, high: int, gap: float) -> None:
    values = mixture(low, high, gap)
    fitted = fit_two_normals(values)
    one, two = (GaussianMixture(k, n_init=5, tol=1e-9, random_state=0).fit(values[:, None]) for k in (1, 2))
    order = np.argsort(two.means_[:, 0])
    assert fitted is not None
    assert np.allclose(fitted.means, two.means_[order, 0], atol=1e-3)
    assert np.allclose(fitted.deviations, np.sqrt(two.covariances_[order, 0, 0]), atol=1e-3)
    assert np.allclose(fitted.weights, two.weights_[order], atol=1e-3)
    assert fitted.bic_gain == pytest.approx(one.bic(values[:, None]) - two.bic(values[:, None]), abs=0.05)


def test_separation_is_ashmans_d() -> None:
    values = mixture(4000, 4000, 8.0)
    fitted = fit_two_normals(values)
    assert fitted is not None
    assert fitted.separation == pytest.approx(np.sqrt(2) * 8 / np.hypot(0.7, 1.2), rel=0.03)
    assert fitted.in_lower(np.array([-30.0, -11.0, -3.0, 5.0])).tolist() == [True, True, False, False]


def test_one_normal_is_no_mixture_and_constants_have_none() -> None:
    fitted = fit_two_normals(np.random.default_rng(3).normal(size=300))
    assert fitted is not None
    assert fitted.bic_gain < 0
    assert fit_two_normals(np.full(100, 2.0)) is None
    assert fit_two_normals(np.arange(19.0)) is None
    assert fit_two_normals(np.r_[np.zeros(90), np.ones(10)]) is not None


def confidence(odds: Floats, labels: Ints, isolated: Ints) -> Confidence:
    return mixture_confidence(odds, labels, isolated, classes=10, separation=3.5, coverage=0.8)


def clean_classes(means: list[float], each: int = 60, seed: int = 1) -> tuple[Floats, Ints]:
    rng = np.random.default_rng(seed)
    odds = np.concatenate([rng.normal(mean, 1.0, each) for mean in means])
    return odds, np.repeat(np.arange(len(means)), each)


def test_passes_on_a_label_with_a_poisoned_mode() -> None:
    odds, labels = clean_classes([-2.0] * 10)
    odds, labels = np.r_[odds, mixture(40, 0, 5.0)], np.r_[labels, np.full(40, 3)]
    outcome = confidence(odds, labels, lowest(odds, odds, 6))
    assert outcome.passed
    assert outcome.label == 3
    assert outcome.coverage == 1.0
    assert outcome.separation is not None and outcome.separation > 3.5


def test_passes_on_all_to_all_poison_with_a_mode_in_every_label() -> None:
    odds, labels = clean_classes([-2.0] * 4)
    rng = np.random.default_rng(5)
    odds, labels = np.r_[odds, rng.normal(-9, 0.7, 120)], np.r_[labels, np.tile(np.arange(4), 30)]
    isolated = lowest(odds, odds, 10)
    assert len(np.unique(labels[isolated])) > 1
    assert confidence(odds, labels, isolated).passed


def test_fails_on_clean_classes_of_different_difficulty() -> None:
    # Over all labels this is as bimodal as can be; within each it is one normal.
    odds, labels = clean_classes([-9.0, -9.0, 0.0, 0.0, 0.0])
    pooled = fit_two_normals(odds)
    assert pooled is not None and pooled.separation > 3.5 and pooled.bic_gain > 10
    outcome = confidence(odds, labels, lowest(odds, odds, 6))
    assert not outcome.passed
    assert outcome.coverage == 0.0


def test_fails_on_a_skewed_class() -> None:
    odds = -np.random.default_rng(2).gamma(2.0, 2.0, 300)
    assert not confidence(odds, np.zeros(300, np.int64), lowest(odds, odds, 5)).passed


def test_fails_where_the_upper_mode_is_mislabeled_rather_than_clean() -> None:
    honest, mislabeled = mixture(0, 90, 0.0), np.random.default_rng(1).normal(5.0, 0.7, 15)
    odds = np.r_[honest, mislabeled]
    fitted = fit_two_normals(odds)
    assert fitted is not None and fitted.separation > 3.5 and fitted.bic_gain > 10
    assert not confidence(odds, np.zeros(105, np.int64), lowest(odds, odds, 5)).passed


def test_fails_where_isolated_samples_are_not_in_the_lower_mode() -> None:
    odds = mixture(40, 60, 6.0)
    labels = np.zeros(100, np.int64)
    assert confidence(odds, labels, np.arange(5)).passed
    assert not confidence(odds, labels, np.arange(95, 100)).passed
    assert confidence(odds, labels, np.r_[np.arange(4), 99]).coverage == 0.8


def test_fails_where_nothing_is_isolated() -> None:
    assert not confidence(np.zeros(3), np.zeros(3, np.int64), np.empty(0, np.int64)).passed
