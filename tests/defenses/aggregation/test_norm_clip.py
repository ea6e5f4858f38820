from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from fedbd.defenses.aggregation.norm_clip import NormClip
from fedbd.errors import MethodRefused
from fedbd.types import Aggregator, Cohort, Need

RNG = torch.Generator()


def cohort(updates: NDArray[np.float32] | None, weights: NDArray[np.float64], mean: NDArray[np.float32]) -> Cohort:
    return Cohort(
        updates=updates,
        mean=mean,
        weights=weights,
        clients=len(weights),
        ids=None,
        global_weights=np.zeros_like(mean),
    )


def of_rows(rows: list[list[float]], weights: list[float]) -> Cohort:
    updates, shares = np.array(rows, dtype=np.float32), np.array(weights)
    mean = ((shares[:, None] * updates).sum(0) / shares.sum()).astype(np.float32)
    return cohort(updates, shares, mean)


def test_by_hand() -> None:
    # Norms 5, 1, 0: the first row is shortened to norm 2.5, (1.5, 2); weights 1, 2, 1.
    aggregate, _, notes = NormClip(bound=2.5).aggregate(of_rows([[3, 4], [0, 1], [0, 0]], [1, 2, 1]), {}, RNG)
    assert np.allclose(aggregate.delta, [1.5 / 4, 4 / 4], rtol=1e-7)
    assert aggregate.delta.dtype == np.float32
    assert notes == {"norms": [5.0, 1.0, 0.0], "clipped": 1, "advisory": False}


def test_nothing_to_clip_is_the_weighted_mean() -> None:
    rows = np.random.default_rng(0).normal(size=(6, 100))
    weights = [1.0, 2.0, 3.0, 1.0, 5.0, 1.0]
    aggregate, _, notes = NormClip(bound=1e6).aggregate(of_rows(rows.tolist(), weights), {}, RNG)
    assert np.allclose(aggregate.delta, np.average(rows.astype(np.float32), axis=0, weights=weights), atol=1e-6)
    assert notes["clipped"] == 0


def test_one_huge_row_moves_the_mean_by_no_more_than_its_share_of_the_bound() -> None:
    honest = np.zeros((9, 50), dtype=np.float32)
    attacker = np.full((1, 50), 1e6, dtype=np.float32)
    aggregate, _, _ = NormClip(bound=3.0).aggregate(
        of_rows([*honest.tolist(), *attacker.tolist()], [1.0] * 10), {}, RNG
    )
    assert np.linalg.norm(aggregate.delta.astype(np.float64)) == pytest.approx(0.3, rel=1e-6)


def test_norms_are_exact_where_float32_sums_are_not() -> None:
    # 2^24 and eight ones: in float32 the ones vanish one by one.
    row = np.array([[4096.0] + [1.0] * 8], dtype=np.float32)
    _, _, notes = NormClip().aggregate(cohort(row, np.array([1.0]), row[0]), {}, RNG)
    assert notes["norms"] == [np.sqrt(2.0**24 + 8)]


def test_huge_finite_rows_do_not_overflow() -> None:
    row = np.full((1, 4), 3e38, dtype=np.float32)
    aggregate, _, _ = NormClip(bound=2.0).aggregate(cohort(row, np.array([1.0]), row[0]), {}, RNG)
    assert np.allclose(aggregate.delta, 1.0)


def test_at_the_server_it_needs_single_rows() -> None:
    assert isinstance(NormClip(), Aggregator)
    assert NormClip().needs == {Need.INDIVIDUAL}
    with pytest.raises(MethodRefused, match="bucket_size"):
        NormClip().aggregate(cohort(None, np.array([3.0]), np.ones(2, np.float32)), {}, RNG)


def test_at_the_clients_the_sum_is_enough_and_is_taken_as_it_comes() -> None:
    rule = NormClip(bound=1.0, where="client")
    assert rule.needs == {Need.SUM}
    mean = np.array([30.0, 40.0], dtype=np.float32)
    aggregate, _, notes = rule.aggregate(cohort(None, np.array([3.0]), mean), {}, RNG)
    assert np.array_equal(aggregate.delta, mean)
    assert notes == {"norms": None, "clipped": None, "advisory": True}


def test_honest_clients_clip_only_when_asked_to() -> None:
    delta = np.array([3.0, 4.0], dtype=np.float32)
    clipped = NormClip(bound=1.0, where="client").clip_local(delta)
    assert np.allclose(clipped, [0.6, 0.8])
    assert clipped.dtype == np.float32
    assert np.array_equal(delta, [3, 4])
    assert np.array_equal(NormClip(bound=6.0, where="client").clip_local(delta), delta)
    assert NormClip(bound=1.0).clip_local(delta) is delta


def test_clip_at_the_clients_equals_clip_at_the_server() -> None:
    rows = np.random.default_rng(1).normal(size=(5, 40)).astype(np.float32)
    local = NormClip(bound=2.0, where="client")
    sent = np.stack([local.clip_local(row) for row in rows])
    aggregate, _, _ = NormClip(bound=2.0).aggregate(of_rows(rows.tolist(), [1.0] * 5), {}, RNG)
    assert np.allclose(aggregate.delta, sent.mean(0), atol=1e-6)
