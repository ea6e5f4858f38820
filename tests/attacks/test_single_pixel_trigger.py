from __future__ import annotations

import pytest
import torch

from fedbd.attacks.single_pixel_trigger import SinglePixelTrigger
from fedbd.errors import UserError


@pytest.mark.parametrize(("fields", "row", "column"), [({}, 2, 3), ({"right": 0, "bottom": 3}, 0, 4)])
def test_one_pixel_of_every_channel(fields: dict[str, int], row: int, column: int) -> None:
    images = torch.rand(3, 2, 4, 5)
    expected = images.clone()
    for n in range(3):
        for channel in range(2):
            expected[n, channel, row, column] = 1.0
    assert torch.equal(SinglePixelTrigger(**fields).stamp(images), expected)


def test_its_value() -> None:
    assert SinglePixelTrigger(value=0.5).stamp(torch.zeros(1, 1, 4, 4)).sum() == 0.5


def test_a_pixel_outside_is_refused() -> None:
    with pytest.raises(
        UserError, match=r"at least 2x6 pixels \(the pixel is 1 from the lower and 5 from the right edge"
    ):
        SinglePixelTrigger(right=5).stamp(torch.zeros(1, 1, 9, 5))
