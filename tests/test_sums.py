from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from fedbd.errors import SecureSumFailed
from fedbd.sums import LARGEST, bucket_of, mean_of, to_row

STEP = 2.0**-24
VALUES = st.floats(-8, 8, width=32)
DELTAS = npst.arrays(np.float32, (5, 7), elements=VALUES)
WEIGHTS = st.lists(st.integers(1, 2560).map(lambda k: k / 256), min_size=5, max_size=5)


def total_of(deltas: np.ndarray, weights: list[float], order: list[int] | None = None) -> np.ndarray:
    total = np.zeros(deltas.shape[1] + 1, dtype=np.int64)
    for i in order or range(len(deltas)):
        total = total + to_row(deltas[i], weights[i])
    return total


def test_a_row_by_hand() -> None:
    row = to_row(np.array([1.0, -0.5, STEP, 0.75 * STEP], np.float32), 2.0)
    assert row.dtype == np.int64
    assert row.tolist() == [2**25, -(2**24), 2, 2, 2**25]  # 1.5 steps are rounded to the even 2


def test_halves_go_to_the_even_step() -> None:
    values = np.array([0.5, 1.5, 2.5, -0.5, -1.5], np.float32) * np.float32(STEP)
    assert to_row(values, 1.0)[:-1].tolist() == [0, 2, 2, 0, -2]


def test_a_coarser_grid() -> None:
    assert to_row(np.array([0.26, -0.25], np.float32), 1.0, bits=1).tolist() == [1, 0, 2]
    mean, weight = mean_of(np.array([3, -1, 4], np.int64), bits=1)
    assert mean.tolist() == [0.75, -0.25]
    assert weight == 2.0


@settings(max_examples=100, deadline=None)
@given(DELTAS, WEIGHTS, st.permutations(range(5)))
def test_rows_add_up_to_the_same_integers_in_any_order(
    deltas: np.ndarray, weights: list[float], order: list[int]
) -> None:
    assert np.array_equal(total_of(deltas, weights), total_of(deltas, weights, order))


@settings(max_examples=100, deadline=None)
@given(DELTAS, WEIGHTS, st.integers(1, 4))
def test_sums_of_parts_add_up_to_the_whole(deltas: np.ndarray, weights: list[float], cut: int) -> None:
    parts = total_of(deltas[:cut], weights[:cut]) + total_of(deltas[cut:], weights[cut:])
    assert np.array_equal(parts, total_of(deltas, weights))


@settings(max_examples=100, deadline=None)
@given(DELTAS, st.lists(st.integers(256, 2560).map(lambda k: k / 256), min_size=5, max_size=5))
def test_the_mean_is_within_half_a_grid_step_of_float64(deltas: np.ndarray, weights: list[float]) -> None:
    # A client's product is off by half a step at most, so their sum by n / 2 steps, and the mean by n / (2 W) <= 1 / 2.
    mean, weight = mean_of(total_of(deltas, weights))
    assert mean.dtype == np.float32
    assert weight == sum(weights)
    exact = [
        sum(Fraction(float(deltas[i, d])) * Fraction(weights[i]) for i in range(5)) / Fraction(sum(weights))
        for d in range(7)
    ]
    assert np.average(deltas.astype(np.float64), axis=0, weights=weights) == pytest.approx([float(e) for e in exact])
    for got, want in zip(mean, exact, strict=True):
        rounding = np.spacing(np.float32(abs(got))) / 2  # the mean itself is float32
        assert abs(Fraction(float(got)) - want) <= Fraction(STEP) / 2 + Fraction(float(rounding))


def test_float32_would_depend_on_the_order() -> None:
    # The control: the same clients, added as floats.
    values = np.random.default_rng(1).normal(size=(50, 1)).astype(np.float32)
    assert sum(values[:, 0]) != sum(values[::-1, 0])
    weights = [1.0] * 50
    assert np.array_equal(total_of(values, weights), total_of(values[::-1], weights))


def test_an_equal_client_keeps_its_bits_where_the_grid_holds_them() -> None:
    delta = (np.random.default_rng(0).integers(-(2**23), 2**23, 100) * STEP).astype(np.float32)
    mean, _ = mean_of(total_of(np.stack([delta] * 7), [3.0] * 7))
    assert np.array_equal(mean, delta)


def test_weights_count() -> None:
    deltas = np.array([[1.0], [0.0]], np.float32)
    assert mean_of(total_of(deltas, [3.0, 1.0]))[0].tolist() == [0.75]
    assert mean_of(total_of(deltas, [1.0, 3.0]))[0].tolist() == [0.25]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 2 * LARGEST])
def test_what_does_not_fit_the_grid_is_refused(value: float) -> None:
    with pytest.raises(SecureSumFailed, match="1 of 4 values of the update cannot be summed exactly"):
        to_row(np.array([0, value, 0], np.float32), 1.0)


def test_a_limit_counts_after_the_weight_and_covers_the_weight_itself() -> None:
    to_row(np.array([1.0], np.float32), 4.0, largest=4.0)
    with pytest.raises(SecureSumFailed):
        to_row(np.array([1.5], np.float32), 4.0, largest=4.0)
    with pytest.raises(SecureSumFailed):
        to_row(np.array([0.0], np.float32), 5.0, largest=4.0)


@pytest.mark.parametrize("weight", [0, -5])
def test_a_mean_needs_a_weight(weight: int) -> None:
    with pytest.raises(ValueError, match="the total weight must be > 0"):
        mean_of(np.array([1, weight], np.int64))


# Buckets.


def buckets(count: int, size: int | None, order: np.ndarray) -> dict[int, list[int]]:
    found: dict[int, list[int]] = {}
    for position in range(count):
        found.setdefault(bucket_of(position, count, size, order), []).append(position)
    return found


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 60), st.integers(1, 60), st.randoms(use_true_random=False))
def test_buckets_part_the_cohort_and_none_is_short(count: int, size: int, random: object) -> None:
    size = min(size, count)
    order = np.array(random.sample(range(count), count), dtype=np.int64)  # type: ignore[attr-defined]
    found = buckets(count, size, order)
    assert sorted(found) == list(range(count // size))
    assert sorted(position for group in found.values() for position in group) == list(range(count))
    lengths = [len(found[bucket]) for bucket in sorted(found)]
    assert lengths[:-1] == [size] * (len(lengths) - 1)
    assert lengths[-1] == size + count % size
    for bucket, group in found.items():  # cut along the permutation
        places = sorted(int(order[position]) for position in group)
        assert places == list(range(bucket * size, bucket * size + len(group)))


def test_no_bucket_size_is_one_bucket() -> None:
    assert buckets(5, None, np.arange(5)) == {0: [0, 1, 2, 3, 4]}


def test_a_bucket_size_above_the_cohort_is_one_bucket() -> None:
    assert buckets(3, 7, np.arange(3)) == {0: [0, 1, 2]}


def test_buckets_by_hand() -> None:
    order = np.array([4, 0, 3, 1, 2])  # position 0 stands at place 4 ...
    assert buckets(5, 2, order) == {1: [0, 2, 4], 0: [1, 3]}
    assert [bucket_of(i, 5, 1, order) for i in range(5)] == [4, 0, 3, 1, 2]
