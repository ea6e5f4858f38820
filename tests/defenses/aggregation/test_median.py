from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from fedbd.defenses.aggregation.median import Median, coordinate_median
from fedbd.errors import MethodRefused
from fedbd.types import Aggregator, Cohort, Need

RNG = torch.Generator()


def cohort(updates: NDArray[np.float32] | None, weights: list[float]) -> Cohort:
    width = 3 if updates is None else updates.shape[1]
    return Cohort(
        updates=updates,
        mean=np.zeros(width, np.float32),
        weights=np.array(weights),
        clients=len(weights),
        ids=None,
        global_weights=np.zeros(width, np.float32),
    )


def test_odd_and_even_numbers_of_rows_by_hand() -> None:
    rows = np.array([[1, 9, -1], [5, 2, 0], [3, 4, 7], [100, -8, 1]], dtype=np.float32)
    assert coordinate_median(rows[:3]).tolist() == [3, 4, 0]
    assert coordinate_median(rows).tolist() == [4, 3, 0.5]


@pytest.mark.parametrize("n", [1, 2, 3, 8, 11])
def test_equals_numpy_across_chunks(n: int) -> None:
    rows = np.random.default_rng(n).normal(size=(n, (1 << 18) + 5)).astype(np.float32)
    assert np.array_equal(coordinate_median(rows), np.median(rows, axis=0))


def test_the_middle_of_two_huge_values_does_not_overflow() -> None:
    assert coordinate_median(np.full((2, 1), 3e38, dtype=np.float32)).tolist() == [np.float32(3e38)]


def test_a_minority_cannot_move_it_out_of_the_honest_range() -> None:
    rng = np.random.default_rng(0)
    honest, attackers = rng.normal(size=(6, 200)), rng.normal(size=(5, 200)) * 1e9
    rows = np.concatenate([honest, attackers]).astype(np.float32)
    aggregate, _, notes = Median().aggregate(cohort(rows, [1.0] * 11), {}, RNG)
    honest32 = honest.astype(np.float32)
    assert (aggregate.delta >= honest32.min(0)).all()
    assert (aggregate.delta <= honest32.max(0)).all()
    assert notes == {"rows": 11, "degenerate": False, "weights_ignored": False}


def test_weights_do_not_count_and_the_notes_say_so() -> None:
    rows = np.array([[0.0], [1.0], [10.0]], dtype=np.float32)
    aggregate, _, notes = Median().aggregate(cohort(rows, [1.0, 1.0, 50.0]), {}, RNG)
    assert aggregate.delta.tolist() == [1.0]
    assert notes["weights_ignored"] is True


def test_needs() -> None:
    assert isinstance(Median(), Aggregator)
    assert Median().needs == {Need.INDIVIDUAL}
    assert Median().minimum_rows == 3
    with pytest.raises(MethodRefused, match="one sum"):
        Median().aggregate(cohort(None, [3.0]), {}, RNG)


def test_two_rows_are_marked_as_no_median() -> None:
    _, _, notes = Median().aggregate(cohort(np.ones((2, 4), dtype=np.float32), [1.0, 1.0]), {}, RNG)
    assert notes["degenerate"] is True
