from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import entropy as scipy_entropy
from torch import Tensor, nn

from fedbd.defenses.detection.strip import STRIP, entropy, superimpose
from fedbd.errors import MethodRefused
from fedbd.metrics import roc_auc
from fedbd.types import Detector, Samples, TrustedData


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(3)


class FirstPixel(nn.Module):
    """Sure of class 0 where the first pixel is bright, as a backdoored model is; else as sure as the mean is high."""

    def forward(self, x: Tensor) -> Tensor:
        sure = 20 * (x[:, 0, 0, 0] > 0.9) + x.mean((1, 2, 3))
        return torch.stack([sure, torch.zeros_like(sure)], 1)


def test_superimposing_by_hand() -> None:
    image = torch.tensor([0, 51, 204], dtype=torch.uint8).reshape(1, 1, 1, 3)
    overlay = torch.tensor([255, 51, 102], dtype=torch.uint8).reshape(1, 1, 1, 3)
    assert torch.allclose(superimpose(image, overlay, "add").flatten(), torch.tensor([1.0, 0.4, 1.0]))
    assert torch.allclose(superimpose(image, overlay, "average").flatten(), torch.tensor([0.5, 0.2, 0.6]))
    assert image.flatten().tolist() == [0, 51, 204]


def test_entropy_is_in_bits_and_survives_certainty() -> None:
    assert entropy(torch.zeros(1, 8)).item() == pytest.approx(3)
    assert entropy(torch.tensor([[0.0, 2000.0]])).item() == 0
    outputs = torch.randn(20, 5, generator=generator())
    expected = scipy_entropy(outputs.double().softmax(1).numpy(), base=2, axis=1)
    assert np.allclose(entropy(outputs).numpy(), expected, rtol=1e-12)
    tiny = entropy(torch.tensor([[40.0, 0.0]])).item()  # float32 would give 0 for the sure class
    assert tiny == pytest.approx(math.exp(-40) * 41 / math.log(2), rel=1e-6)


@pytest.mark.parametrize("blend", ["add", "average"])
def test_scores_are_those_of_a_loop_over_images_and_overlays(blend: str, backdoored: Any) -> None:
    data, fit = backdoored.clean.subset(torch.arange(12)), backdoored.trusted.fit
    detector = STRIP(overlays=4, blend=blend)  # type: ignore[arg-type]
    scores, notes = detector.score(backdoored.model, data, backdoored.trusted, generator())
    drawn = torch.randint(len(fit), (12, 4), generator=generator())
    expected = np.zeros((12, 4))
    for i in range(12):
        for j in range(4):
            pixels = data.images[i].double() / 255 + fit.images[drawn[i, j]].double() / 255
            pixels = pixels.clamp(max=1) if blend == "add" else pixels / 2
            with torch.no_grad():
                out = backdoored.model(pixels[None].float())[0].double()
            expected[i, j] = scipy_entropy(out.softmax(0).numpy(), base=2)
    assert np.allclose(-scores, expected.mean(1), atol=1e-4)
    assert notes["mean_entropy"] == pytest.approx(expected.mean(), abs=1e-4)
    assert notes["entropy_margin"] == pytest.approx(math.sqrt((expected.var(1, ddof=1) / 4).mean()), abs=1e-4)
    assert notes["trusted"] == len(fit)


def test_a_trigger_that_survives_overlays_scores_higher(backdoored: Any) -> None:
    images = torch.randint(60, 120, (40, 1, 8, 8), generator=generator(), dtype=torch.uint8)
    images[20:, 0, 0, 0] = 255
    dark = Samples(images[:20] // 2, torch.zeros(20, dtype=torch.int64))
    data = Samples(images, torch.zeros(40, dtype=torch.int64))
    scores, _ = STRIP().score(FirstPixel(), data, TrustedData(dark, dark, 2), generator())
    assert scores[20:].min() > scores[:20].max()


def test_triggered_digits_score_higher(backdoored: Any) -> None:
    images = torch.cat([backdoored.clean.images, backdoored.triggered.images])
    data = Samples(images, torch.zeros(len(images), dtype=torch.int64))
    scores, _ = STRIP().score(backdoored.model, data, backdoored.trusted, generator())
    clean = len(backdoored.clean)
    assert (roc_auc(scores[clean:], scores[:clean]) or 0) > 0.7


def test_blocks_do_not_change_the_scores(backdoored: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    data = backdoored.clean.subset(torch.arange(50))
    whole, _ = STRIP(overlays=2).score(backdoored.model, data, backdoored.trusted, generator())
    monkeypatch.setattr("fedbd.defenses.detection.strip.BLOCK", 20)
    parts, _ = STRIP(overlays=2).score(backdoored.model, data, backdoored.trusted, generator())
    assert np.allclose(whole, parts, atol=1e-5)


def test_one_overlay_has_no_margin(backdoored: Any) -> None:
    data = backdoored.clean.subset(torch.arange(5))
    assert STRIP(overlays=1).score(backdoored.model, data, backdoored.trusted, generator())[1]["entropy_margin"] is None


def test_refusals(backdoored: Any) -> None:
    assert isinstance(STRIP(), Detector)
    assert STRIP().needs_trusted
    with pytest.raises(MethodRefused, match="trusted"):
        STRIP().score(backdoored.model, backdoored.clean, None, generator())
    nothing = backdoored.clean.subset(torch.arange(0))
    with pytest.raises(MethodRefused, match="no samples"):
        STRIP().score(backdoored.model, nothing, backdoored.trusted, generator())
    broken = copy.deepcopy(backdoored.model)
    broken.fc.bias.data.fill_(torch.inf)
    with pytest.raises(MethodRefused, match="not finite"):
        STRIP().score(broken, backdoored.clean, backdoored.trusted, generator())
