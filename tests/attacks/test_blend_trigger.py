from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fedbd.attacks.blend_trigger import BlendTrigger
from fedbd.errors import UserError


def images(channels: int = 3, n: int = 4) -> torch.Tensor:
    return torch.rand(n, channels, 8, 6, generator=torch.Generator().manual_seed(2))


def pattern_of(trigger: BlendTrigger, x: torch.Tensor) -> torch.Tensor:
    return (trigger.stamp(x) - (1 - trigger.alpha) * x) / trigger.alpha


def test_every_image_is_mixed_with_the_same_noise() -> None:
    x = images()
    found = pattern_of(BlendTrigger(), x)
    assert torch.allclose(found, found[:1].expand_as(found), atol=1e-6)
    assert torch.equal(BlendTrigger().stamp(x[2:]), BlendTrigger().stamp(x)[2:])
    assert -1e-6 <= found.min() < 0.1
    assert 0.9 < found.max() <= 1 + 1e-6
    assert abs(float(found[0].mean()) - 0.5) < 0.1


def test_the_seed_decides_the_noise_and_gray_images_get_that_of_the_first_channel() -> None:
    x = images()
    assert not torch.allclose(pattern_of(BlendTrigger(), x), pattern_of(BlendTrigger(seed=1), x), atol=0.1)
    gray = pattern_of(BlendTrigger(), x[:, :1])
    assert torch.allclose(gray, pattern_of(BlendTrigger(), x)[:, :1], atol=1e-6)


def test_alpha_one_shows_the_pattern_alone() -> None:
    stamped = BlendTrigger(alpha=1.0).stamp(images())
    assert torch.equal(stamped[0], stamped[1])


@pytest.mark.parametrize("ending", ["png", "bmp"])
def test_a_picture_is_scaled_and_mixed_in(tmp_path: Path, ending: str) -> None:
    pixels = np.zeros((16, 12, 3), np.uint8)
    pixels[:8] = (255, 0, 0)
    pixels[8:] = (0, 0, 255)
    Image.fromarray(pixels).save(tmp_path / f"a.{ending}")
    found = pattern_of(BlendTrigger(alpha=0.5, file=str(tmp_path / f"a.{ending}")), images())
    rows = torch.tensor([1.0, 1, 1, 1, 0, 0, 0, 0])[:, None].expand(8, 6)
    expected = torch.stack([rows, torch.zeros(8, 6), 1 - rows])
    middle = [0, 1, 2, 5, 6, 7]  # the rows at the edge are smoothed
    assert torch.allclose(found[0][:, middle], expected[:, middle], atol=1e-6)


def test_a_picture_becomes_gray_for_gray_images_and_color_for_color_ones(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4), (255, 0, 0)).save(tmp_path / "red.png")
    gray = pattern_of(BlendTrigger(file=str(tmp_path / "red.png")), images(1))
    assert torch.allclose(gray, torch.full_like(gray, 76 / 255), atol=1e-6)  # 0.299 of 255
    Image.new("L", (4, 4), 51).save(tmp_path / "gray.png")
    color = pattern_of(BlendTrigger(file=str(tmp_path / "gray.png")), images(3))
    assert torch.allclose(color, torch.full_like(color, 0.2), atol=1e-6)


def test_a_picture_that_changed_is_read_again(tmp_path: Path) -> None:
    file = tmp_path / "a.png"
    for age, value in enumerate((0, 255)):
        Image.new("L", (4, 4), value).save(file)
        os.utime(file, ns=(age, age))
        found = pattern_of(BlendTrigger(file=str(file)), images(1))
        assert torch.allclose(found, torch.full_like(found, value / 255), atol=1e-6)


def test_what_cannot_be_a_pattern_is_refused(tmp_path: Path) -> None:
    def said(name: str, channels: int = 3) -> str:
        with pytest.raises(UserError) as refused:
            BlendTrigger(file=str(tmp_path / name)).stamp(images(channels))
        return str(refused.value)

    assert said("gone.png").startswith("trigger.file: must be a file, got ")
    (tmp_path / "text.png").write_text("no picture")
    assert "must be a picture, got bytes that are no picture (text.png); save it as RGB or gray" in said("text.png")
    Image.new("RGBA", (4, 4)).save(tmp_path / "alpha.png")
    assert "one of mode RGBA (alpha.png)" in said("alpha.png")
    assert "must be a file of at most 64 MiB" in said(".")
    Image.new("L", (4, 4)).save(tmp_path / "a.png")
    assert "needs images of 1 channel (gray) or 3" in said("a.png", channels=2)
