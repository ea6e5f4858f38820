from __future__ import annotations

import pytest
import torch

from fedbd.attacks.four_corners_trigger import FourCornersTrigger
from fedbd.attacks.grid_trigger import GridTrigger
from fedbd.errors import UserError

BY_HAND = """\
.........
.#.#..#.#
..#....#.
.#......#
.........
.........
.#......#
..#....#.
.#.#..#.#
"""


def test_by_hand_with_margins_of_one() -> None:
    expected = torch.tensor([[float(sign == "#") for sign in line] for line in BY_HAND.splitlines()])
    stamped = FourCornersTrigger(margin=0).stamp(torch.zeros(1, 1, 9, 9))[0, 0]
    assert torch.equal(stamped, expected)


def test_where_the_codes_of_abl_and_rnp_put_them_on_a_cifar_image() -> None:
    images = torch.full((2, 3, 32, 32), 0.5)
    stamped = FourCornersTrigger().stamp(images)
    changed = (stamped != 0.5).all(1).all(0)
    near, far = range(29, 32), range(1, 4)
    places = {(row, column) for row in (*near, *far) for column in (*near, *far)}
    assert {(row, column) for row, column in changed.nonzero().tolist()} == places
    assert torch.equal(stamped[..., 29:, 29:], GridTrigger().stamp(images)[..., 29:, 29:])
    for row, column in ((1, 1), (1, 31), (31, 1), (31, 31)):
        assert (stamped[..., row, column] == 1).all()
    for row, column in ((3, 3), (3, 29), (29, 3), (29, 29)):  # the dark corner points inward
        assert (stamped[..., row, column] == 0).all()


def test_margins_move_them() -> None:
    stamped = FourCornersTrigger(margin=2, far_margin=0).stamp(torch.zeros(1, 1, 10, 12))[0, 0]
    for row, column in ((0, 0), (0, 9), (7, 0), (7, 9)):
        assert stamped[row, column] == 1
    assert stamped[8:].sum() == stamped[:, 10:].sum() == 0


def test_too_small_images_are_refused() -> None:
    with pytest.raises(UserError, match=r"at least 7x7 pixels \(two 3x3 patterns, margins 0 and 1\), got 8x6"):
        FourCornersTrigger().stamp(torch.zeros(1, 1, 8, 6))
