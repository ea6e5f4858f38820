from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from fedbd.report.trigger_picture import _first_of_each_label, caption, draw_triggers, gain_of
from fedbd.types import Samples


class Corner:
    def stamp(self, images: Tensor) -> Tensor:
        out = images.clone()
        out[:, :, -2:, -2:] = 1.0
        return out


def samples(channels: int, n: int = 6) -> Samples:
    images = torch.full((n, channels, 8, 8), 51, dtype=torch.uint8)  # 0.2
    return Samples(images, torch.tensor([0, 0, 1, 0, 2, 1][:n]))


def test_images_are_the_first_of_each_label_then_the_next():
    labels = torch.tensor([0, 0, 1, 0, 2, 1])
    assert _first_of_each_label(labels, 2).tolist() == [0, 2]
    assert _first_of_each_label(labels, 5).tolist() == [0, 2, 4, 1, 3]
    assert _first_of_each_label(labels, 99).tolist() == [0, 2, 4, 1, 3, 5]


def test_the_caption_counts_changed_pixels():
    change = torch.zeros(2, 3, 8, 8)
    change[:, 1, :2, :4] = 0.8  # one channel of 8 of 64 pixels
    change[:, 0, 7, 7] = 0.4 / 255  # less than half a gray level
    assert caption(change) == "12.5 % of pixels changed, by at most 204 of 255"


@pytest.mark.parametrize(("change", "gain"), [(-1.0, 1), (0.5, 2), (0.51, 1), (-20 / 255, 8), (1 / 255, 16), (0, 16)])
def test_the_gain_is_the_largest_power_of_two_that_keeps_a_change_in_range(change, gain):
    assert gain_of(torch.tensor([0.0, change])) == gain


def test_many_triggers_stand_side_by_side(tmp_path):
    sizes = {}
    for count in (1, 2, 5):
        draw_triggers(tmp_path / "t.png", samples(3), {str(i): Corner() for i in range(count)}, images=2)
        sizes[count] = Image.open(tmp_path / "t.png").size
    assert sizes[2] == (sizes[1][0], 2 * sizes[1][1])
    assert sizes[5] == (3 * sizes[1][0], 2 * sizes[1][1])


@pytest.mark.parametrize("channels", [1, 3])
def test_the_picture_shows_image_stamp_and_the_change_around_mid_gray(tmp_path, channels):
    draw_triggers(tmp_path / "t.png", samples(channels), {"corner": Corner(), "again": Corner()}, images=2)
    pixels = np.asarray(Image.open(tmp_path / "t.png").convert("RGB")).reshape(-1, 3)
    assert np.all(pixels == 51, axis=1).mean() > 0.1  # the images themselves, gray 51
    assert np.isin(pixels, (127, 128)).all(1).mean() > 0.1  # the unchanged part of the difference
    assert np.isin(pixels, (229, 230)).all(1).mean() > 0.001  # 0.8 brighter: half of it above mid-gray
    once = (tmp_path / "t.png").read_bytes()
    draw_triggers(tmp_path / "t.png", samples(channels), {"corner": Corner(), "again": Corner()}, images=2)
    assert (tmp_path / "t.png").read_bytes() == once


def test_one_image_and_class_names(tmp_path):
    data = samples(3, n=1)
    draw_triggers(tmp_path / "t.png", data, {"corner": Corner()}, names={0: "cat"})
    assert Image.open(tmp_path / "t.png").size[1] > 100
    assert int(data.images.min()) == int(data.images.max()) == 51  # untouched
