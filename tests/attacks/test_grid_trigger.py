from __future__ import annotations

import pytest
import torch

from fedbd.attacks.grid_trigger import GridTrigger
from fedbd.errors import UserError
from fedbd.types import Trigger


def test_is_a_trigger() -> None:
    assert isinstance(GridTrigger(), Trigger)


def test_gray_image_by_hand() -> None:
    image = torch.full((1, 1, 5, 5), 0.4)
    expected = torch.tensor(
        [
            [0.4, 0.4, 0.4, 0.4, 0.4],
            [0.4, 0.4, 0.4, 0.4, 0.4],
            [0.4, 0.4, 0.0, 0.0, 1.0],
            [0.4, 0.4, 0.0, 1.0, 0.0],
            [0.4, 0.4, 1.0, 0.0, 1.0],
        ]
    )
    assert torch.equal(GridTrigger().stamp(image)[0, 0], expected)


def test_every_channel_of_every_image_on_rows_and_columns_29_to_31() -> None:
    images = torch.rand(4, 3, 32, 32)
    stamped = GridTrigger().stamp(images)
    on, off = ((29, 31), (30, 30), (31, 29), (31, 31)), ((29, 29), (29, 30), (30, 29), (30, 31), (31, 30))
    for row, column in on:
        assert (stamped[:, :, row, column] == 1).all()
    for row, column in off:
        assert (stamped[:, :, row, column] == 0).all()
    assert torch.equal(stamped[:, :, :29], images[:, :, :29])
    assert torch.equal(stamped[:, :, :, :29], images[:, :, :, :29])


def test_margin_moves_the_pattern_away_from_both_edges() -> None:
    stamped = GridTrigger(margin=2).stamp(torch.full((1, 1, 8, 6), 0.4))[0, 0]
    assert stamped[3, 3].item() == 1
    assert stamped[5, 1].item() == 1
    assert (stamped[6:] == torch.tensor(0.4)).all()
    assert (stamped[:, 4:] == torch.tensor(0.4)).all()


def test_input_is_left_untouched_and_the_memory_format_stays() -> None:
    images = torch.rand(2, 3, 6, 6).contiguous(memory_format=torch.channels_last)
    before = images.clone()
    stamped = GridTrigger().stamp(images)
    assert torch.equal(images, before)
    assert stamped.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(("shape", "margin"), [((2, 8), 0), ((8, 2), 0), ((4, 4), 2)])
def test_too_small_images_are_refused(shape: tuple[int, int], margin: int) -> None:
    with pytest.raises(UserError, match=f"{3 + margin}x{3 + margin}"):
        GridTrigger(margin=margin).stamp(torch.zeros(1, 1, *shape))
