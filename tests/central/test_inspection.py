from __future__ import annotations

import numpy as np
import pytest
import torch

from fedbd.central.inspection import judge_claim, one_of_each, top_channels, victims
from fedbd.types import Samples


def ratios(l1: list[float], l2: list[float], linf: list[float]) -> dict[str, np.ndarray]:
    return {"l1": np.array(l1), "l2": np.array(l2), "linf": np.array(linf)}


@pytest.mark.parametrize(
    ("found", "factor", "most", "reproduced"),
    [
        (ratios([1.5, 1.0], [2.0, 1.0], [3.0, 1.0]), 2.0, True, True),
        (ratios([1.5, 1.0], [2.0, 1.0], [1.0, 2.9]), 1.9, True, False),
        (ratios([3.0, 1.0], [2.0, 1.0], [2.0, 1.0]), 0.5, False, False),
        (ratios([1.0, 0.5], [0.9, 1.0], [1.2, 1.0]), None, True, True),
        (ratios([1.0, 0.5], [0.9, 1.0], [0.7, 1.0]), None, False, False),
        (ratios([np.inf, 1.5], [np.inf, 1.5], [np.inf, 1.0]), 0.0, False, False),
    ],
)
def test_the_claim(found: dict[str, np.ndarray], factor: float | None, most: bool, reproduced: bool) -> None:
    claim = judge_claim(found)
    assert claim.factor == pytest.approx(factor)
    assert (claim.most, claim.reproduced) == (most, reproduced)


def test_top_channels_are_those_with_the_largest_linf() -> None:
    assert top_channels(ratios([9, 1, 1, 1], [1, 1, 1, 1], [1.0, 2.0, np.inf, 2.0]), 3) == [2, 1, 3]


def test_which_samples_are_looked_at() -> None:
    data = Samples(torch.zeros(6, 1, 2, 2, dtype=torch.uint8), torch.tensor([2, 0, 2, 1, 0, 1]))
    assert victims(data, 2, 9).labels.tolist() == [0, 1, 0, 1]
    assert victims(data, 2, 1).labels.tolist() == [0]
    assert len(victims(data, None, 9)) == 6
    assert one_of_each(data, 2).labels.tolist() == [0, 1]
    assert one_of_each(data, 5).labels.tolist() == [0, 1, 2, 2, 0]
