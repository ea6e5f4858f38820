from __future__ import annotations

import pytest
import torch

from fedbd.attacks.square_trigger import SquareTrigger
from fedbd.errors import UserError


def test_by_hand() -> None:
    x = torch.full((1, 1, 5, 6), 0.25)
    expected = torch.tensor(
        [
            [0.25, 0.25, 0.25, 0.25, 0.25, 0.25],
            [0.25, 0.25, 1.00, 1.00, 1.00, 0.25],
            [0.25, 0.25, 1.00, 1.00, 1.00, 0.25],
            [0.25, 0.25, 1.00, 1.00, 1.00, 0.25],
            [0.25, 0.25, 0.25, 0.25, 0.25, 0.25],
        ]
    )
    assert torch.equal(SquareTrigger().stamp(x)[0, 0], expected)


def test_rows_and_columns_28_to_30_of_a_cifar_image_in_every_channel() -> None:
    stamped = SquareTrigger().stamp(torch.zeros(2, 3, 32, 32))
    assert (stamped[:, :, 28:31, 28:31] == 1).all()
    assert stamped.sum() == 2 * 3 * 9


def test_size_margin_and_value() -> None:
    stamped = SquareTrigger(size=4, margin=0, value=0.5).stamp(torch.ones(1, 1, 6, 6))
    assert (stamped[..., 2:, 2:] == 0.5).all()
    assert stamped.sum() == 16 * 0.5 + 20


def test_too_small_images_are_refused() -> None:
    with pytest.raises(UserError, match=r"at least 6x6 pixels \(4x4 square, margin 2\), got 6x5; lower the margin"):
        SquareTrigger(size=4, margin=2).stamp(torch.zeros(1, 1, 6, 5))
