from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedbd.scores import isolation_quality, precision_at, roc_auc, score_measures, tpr_at_fpr

SCORES = st.lists(st.integers(-3, 3), min_size=1, max_size=12)


@given(SCORES, SCORES)
def test_auc_is_mann_whitney_with_ties_halved(positive, negative):
    wins = sum((p > n) + 0.5 * (p == n) for p in positive for n in negative)
    assert roc_auc(positive, negative) == pytest.approx(wins / (len(positive) * len(negative)))


def test_auc_of_infinite_and_absent_scores():
    assert roc_auc([math.inf, 1.0], [-math.inf, 1.0]) == 3.5 / 4
    assert roc_auc([], [1.0]) is None
    assert roc_auc([1.0], []) is None
    with pytest.raises(ValueError, match="NaN"):
        roc_auc([math.nan], [0.0])


@given(SCORES, st.lists(st.integers(-3, 3), min_size=20, max_size=30))
def test_tpr_is_the_best_over_all_thresholds(positive, negative):
    best = 0.0
    for threshold in [*set(positive + negative), 99]:
        flagged = sum(n >= threshold for n in negative) / len(negative)
        if flagged <= 0.5:
            best = max(best, sum(p >= threshold for p in positive) / len(positive))
    assert tpr_at_fpr(positive, negative, 0.5) == pytest.approx(best)


def test_tpr_by_hand_and_null_without_enough_negatives():
    negative = np.arange(1000)
    assert tpr_at_fpr([989, 989.5, 990, 2000], negative, 0.01) == 3 / 4  # ten negatives (990..999) may be flagged
    assert tpr_at_fpr([989, 990], negative[:999], 0.01) is None
    assert tpr_at_fpr([150, 250], np.arange(200), 0.05) == 1 / 2
    assert tpr_at_fpr([150, 250], np.arange(199), 0.05) is None
    assert tpr_at_fpr([], negative, 0.01) is None


def test_precision_at_the_isolation_rate():
    assert precision_at([9, 8], [7, 1], 0.5) == 1.0
    assert precision_at([9, 1], [8, 7], 0.5) == 0.5
    assert precision_at([5, 5], [5, 5], 0.5) == 0.5  # all tied: the expectation
    assert precision_at([9, 5], [5, 5], 0.5) == pytest.approx((1 + 1 / 3) / 2)
    assert precision_at([9], [1], 0.01) is None
    assert precision_at([], [], 1.0) is None


def test_score_measures_have_the_names_of_the_record_and_a_control():
    scores = np.concatenate([np.full(10, 2.0), np.arange(300) / 300])
    poisoned = np.arange(310) < 10
    found = score_measures(scores, poisoned, np.random.default_rng(0))
    control = found.pop("auc_shuffled")
    assert found == {
        "auc": 1.0,
        "tpr_at_fpr_1": None,
        "tpr_at_fpr_5": 1.0,
        "precision": 1.0,
        "positives": 10,
        "negatives": 300,
    }
    controls = [score_measures(scores, poisoned, np.random.default_rng(seed))["auc_shuffled"] for seed in range(200)]
    assert control in controls
    assert abs(np.mean(controls) - 0.5) < 0.03


def test_isolation_quality_by_hand() -> None:
    found = isolation_quality(np.array([1, 2, 3, 4]), np.array([3, 4, 5, 6, 7, 8]), 40)
    assert found == {
        "isolated": 4,
        "isolation_share": 0.1,
        "isolation_precision": 0.5,
        "isolation_recall": pytest.approx(1 / 3),
    }
    assert isolation_quality(None, None, 10) == {}
    assert isolation_quality(np.array([0]), None, 10)["isolation_recall"] is None
