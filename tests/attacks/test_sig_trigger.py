from __future__ import annotations

import math

import pytest
import torch

from fedbd.attacks.sig_trigger import SigTrigger


def test_the_equation_pixel_by_pixel() -> None:
    images = torch.rand(2, 3, 4, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    stamped = SigTrigger().stamp(images)
    for n, channel, i, j in ((0, 0, 0, 0), (0, 1, 2, 1), (1, 2, 3, 17), (1, 0, 1, 31), (0, 2, 2, 30)):
        wanted = float(images[n, channel, i, j]) + 20 / 255 * math.sin(2 * math.pi * 6 * j / 32)
        assert float(stamped[n, channel, i, j]) == pytest.approx(min(1, max(0, wanted)), abs=1e-12)


def test_it_darkens_as_much_as_it_brightens_and_never_wraps() -> None:
    """The uint8 sinusoid of the source methods' codes has 237 to 255 where it should be negative."""
    change = SigTrigger().stamp(torch.full((1, 1, 1, 32), 0.5, dtype=torch.float64)) - 0.5
    assert float(change.sum()) == pytest.approx(0, abs=1e-12)
    assert float(change.min()) == pytest.approx(-20 / 255, rel=1e-2)
    assert float(change.max()) == pytest.approx(20 / 255, rel=1e-2)


def test_frequency_and_delta() -> None:
    change = SigTrigger(frequency=1, delta=0.25).stamp(torch.full((1, 1, 1, 4), 0.5)) - 0.5
    assert change.flatten().tolist() == pytest.approx([0, 0.25, 0, -0.25], abs=1e-6)


def test_black_and_white_are_clamped() -> None:
    stamped = SigTrigger(delta=0.5).stamp(torch.tensor([[[[0.0] * 8]], [[[1.0] * 8]]]))
    assert stamped.min() == 0
    assert stamped.max() == 1
