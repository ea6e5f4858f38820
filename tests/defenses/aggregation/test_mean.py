from __future__ import annotations

import numpy as np
import torch

from fedbd.defenses.aggregation.mean import Mean
from fedbd.types import Aggregator, Cohort, Need

RNG = torch.Generator()


def test_returns_the_cohorts_mean_without_seeing_a_row() -> None:
    mean = np.array([3.0, -4.0], dtype=np.float32)
    cohort = Cohort(
        updates=None, mean=mean, weights=np.array([5.0]), clients=5, ids=None, global_weights=np.zeros(2, np.float32)
    )
    memory = {"kept": np.array([1])}
    aggregate, after, notes = Mean().aggregate(cohort, memory, RNG)
    assert np.array_equal(aggregate.delta, mean)
    assert aggregate.delta.dtype == np.float32
    assert aggregate.accepted is None
    assert after is memory
    assert notes == {"norm": 5.0}


def test_needs_only_the_sum() -> None:
    assert isinstance(Mean(), Aggregator)
    assert Mean().needs == {Need.SUM}
    assert Mean().minimum_rows == 1
