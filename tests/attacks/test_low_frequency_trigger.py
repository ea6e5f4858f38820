from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.fft import dctn

from fedbd.attacks.low_frequency_trigger import LowFrequencyTrigger
from fedbd.errors import UserError

GRAY = 0.5


def pattern(trigger: LowFrequencyTrigger, channels: int = 3, height: int = 32, width: int = 24) -> np.ndarray:
    images = torch.full((2, channels, height, width), GRAY, dtype=torch.float64)
    change = trigger.stamp(images) - GRAY
    assert torch.equal(change[0], change[1])
    return change[0].numpy()


@pytest.mark.parametrize("cutoff", [2, 4, 7])
def test_the_dct_of_the_pattern_is_zero_beyond_the_cutoff_and_for_the_constant(cutoff: int) -> None:
    for channel in pattern(LowFrequencyTrigger(cutoff=cutoff)):
        found = np.abs(dctn(channel, norm="ortho"))
        inside = found[:cutoff, :cutoff].copy()
        found[:cutoff, :cutoff] = 0
        assert found.max() < 1e-6
        assert inside[0, 0] < 1e-6
        assert (inside.flatten()[1:] > 1e-6).all()


def test_its_coefficients_are_the_same_for_every_size_up_to_the_scale() -> None:
    found = []
    for height, width in ((32, 32), (16, 20)):
        block = dctn(pattern(LowFrequencyTrigger(), 1, height, width)[0], norm="ortho")[:4, :4]
        found.append(block / np.abs(block).max())
    assert np.allclose(*found, atol=1e-5)


def test_its_largest_value_is_delta_and_channels_differ() -> None:
    found = pattern(LowFrequencyTrigger(delta=0.25))
    assert np.abs(found).max() == pytest.approx(0.25, abs=1e-6)
    assert not np.allclose(found[0], found[1], atol=0.01)
    assert not np.allclose(found, pattern(LowFrequencyTrigger(delta=0.25, seed=1)), atol=0.01)


def test_it_is_clamped() -> None:
    stamped = LowFrequencyTrigger(delta=1.0).stamp(torch.rand(2, 1, 8, 8))
    assert stamped.min() == 0
    assert stamped.max() == 1


def test_too_small_images_are_refused() -> None:
    with pytest.raises(UserError, match=r"at least 4x4 pixels \(cutoff 4\), got 3x8; lower the cutoff"):
        LowFrequencyTrigger().stamp(torch.zeros(1, 1, 3, 8))
