from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

from fedbd.defenses.cleanup.rnp_label import RNPLabel
from fedbd.defenses.cleanup.unlearning import ascent_plan, unlearn
from fedbd.errors import MethodRefused
from fedbd.params import flatten
from fedbd.types import Cleanup, Clues, Samples, TrustedData


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(3)


class Says(nn.Module):
    """Predicts the label that the first pixel says; 255 gives NaN."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        value = (x[:, 0, 0, 0] * 255).round().long()
        out = F.one_hot(value.clamp(max=4), 5) * self.weight
        return torch.where((value == 255)[:, None], torch.nan, out)


def trusted(pixels: list[int], labels: list[int]) -> TrustedData:
    data = Samples(torch.tensor(pixels, dtype=torch.uint8)[:, None, None, None], torch.tensor(labels))
    return TrustedData(fit=data, validate=data, classes=5)


@pytest.mark.parametrize(("bar", "target"), [(0.6, 3), (0.61, None)])
def test_label_of_a_hand_made_unlearned_model(bar: float, target: int | None) -> None:
    model, unlearned = nn.Linear(2, 2), Says()
    clean = trusted([3, 3, 3, 1, 255], [3, 0, 1, 2, 4])
    same, clues, notes = RNPLabel(declare_at=bar).clean(model, clean, Clues(unlearned=unlearned, target=0), generator())
    assert same is not model
    assert flatten(same).tobytes() == flatten(model).tobytes()
    assert clues.unlearned is unlearned
    assert clues.target == target
    assert notes == {
        "acted": True,
        "unlearning": None,
        "target": 3,
        "target_share": 0.6,
        "declared": target == 3,
        "shares": [0.0, 0.2, 0.0, 0.6, 0.0],
        "validation_share": 0.2,
    }


def test_unlearns_by_itself_and_names_the_target(backdoored: Any) -> None:
    method = RNPLabel(batch_size=32, declare_at=0.5)
    assert isinstance(method, Cleanup)
    assert method.needs_trusted
    assert not method.repairs
    before = flatten(backdoored.model).tobytes()
    model, clues, notes = method.clean(backdoored.model, backdoored.trusted, Clues(), generator())
    assert flatten(model).tobytes() == flatten(backdoored.model).tobytes() == before
    assert clues.target == notes["target"] == 0
    assert sum(notes["shares"]) == pytest.approx(1)
    assert notes["unlearning"]["reached"]
    own = unlearn(backdoored.model, backdoored.trusted.fit, ascent_plan(method), 0.2, generator()).model
    assert clues.unlearned is not None
    assert flatten(clues.unlearned).tobytes() == flatten(own).tobytes()


def test_where_the_unlearning_fails_it_says_so_and_hands_nothing_on(backdoored: Any) -> None:
    given = Clues(target=7)
    _, clues, notes = RNPLabel(unlearn_epochs=1).clean(backdoored.model, backdoored.trusted, given, generator())
    assert clues is given
    assert notes["acted"] is False
    assert "unlearn_epochs" in notes["reason"]


def test_refuses_without_trusted_data(backdoored: Any) -> None:
    with pytest.raises(MethodRefused, match=r"rnp_label.*hand it TrustedData"):
        RNPLabel().clean(backdoored.model, None, Clues(), generator())
