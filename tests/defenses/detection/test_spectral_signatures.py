from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fedbd.defenses.detection.spectral_signatures import SpectralSignatures, top_direction
from fedbd.errors import MethodRefused
from fedbd.types import Detector, Samples, TrustedData


class Pixels(nn.Module):
    """A linear classifier: its penultimate features are the pixels."""

    classifier = "fc"

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x.flatten(1))


def generator(seed: int = 3) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def planted(each: int, shifted: int, seed: int = 0) -> tuple[Samples, np.ndarray]:
    """Three labels of noise around 100; so many of label 1 have four pixels raised."""
    images = torch.randint(90, 111, (3 * each, 1, 4, 4), generator=generator(seed), dtype=torch.uint8)
    labels = torch.arange(3).repeat_interleave(each)
    images[each : each + shifted, 0, 0] += 100
    return Samples(images, labels), np.isin(np.arange(3 * each), np.arange(each, each + shifted))


def power_iteration(rows: np.ndarray) -> np.ndarray:
    """Return the top right singular vector, up to its sign."""
    vector = np.ones(rows.shape[1])
    for _ in range(5000):
        vector = rows.T @ (rows @ vector)
        vector /= np.linalg.norm(vector)
    return vector


def test_scores_are_the_squared_projections_found_by_power_iteration() -> None:
    data, _ = planted(40, 6)
    scores, notes = SpectralSignatures().score(Pixels(), data, None, generator())
    for label in range(3):
        mine = (data.labels == label).numpy()
        rows = data.images[torch.as_tensor(mine)].flatten(1).numpy() / 255
        rows = rows - rows.mean(0)
        along = rows @ power_iteration(rows)
        assert np.allclose(scores[mine], along**2, rtol=1e-4, atol=1e-8)
        share = (along**2).sum() / (rows**2).sum()
        assert notes["labels"][str(label)] == {"samples": 40, "top_share": pytest.approx(share, rel=1e-5)}
    assert notes["not_judged"] == []


def test_a_planted_minority_scores_highest_and_order_does_not_matter() -> None:
    data, poison = planted(60, 9)
    scores, _ = SpectralSignatures().score(Pixels(), data, None, generator())
    assert scores[poison].min() > scores[~poison].max()
    order = torch.randperm(len(data), generator=generator())
    shuffled, _ = SpectralSignatures().score(Pixels(), data.subset(order), None, generator())
    assert np.allclose(shuffled, scores[order.numpy()], rtol=1e-6, atol=1e-12)


def test_the_codes_projection_takes_the_features_as_they_are() -> None:
    data, _ = planted(40, 6)
    scores, _ = SpectralSignatures(projected="raw").score(Pixels(), data, None, generator())
    mine = (data.labels == 2).numpy()
    rows = data.images[80:].flatten(1).numpy() / 255
    assert np.allclose(scores[mine], (rows @ power_iteration(rows - rows.mean(0))) ** 2, rtol=1e-4)


def test_a_planted_majority_scores_highest_only_around_trusted_centers() -> None:
    data, poison = planted(60, 50)
    clean, _ = planted(30, 0, seed=1)
    trusted = TrustedData(clean, clean, 3)
    by_data, _ = SpectralSignatures().score(Pixels(), data, None, generator())
    by_trusted, _ = SpectralSignatures(center="trusted").score(Pixels(), data, trusted, generator())
    clean_of_label = ~poison & (data.labels == 1).numpy()
    assert by_data[poison].max() < by_data[clean_of_label].min()
    assert by_trusted[poison].min() > by_trusted[~poison].max()


def test_samples_of_labels_that_are_not_judged_score_zero() -> None:
    data, _ = planted(30, 0)
    few = data.subset(torch.arange(65))
    scores, notes = SpectralSignatures().score(Pixels(), few, None, generator())
    assert not scores[60:].any()
    assert scores[:60].all()
    assert notes["not_judged"] == [2]
    clean, _ = planted(20, 0, seed=1)
    only = TrustedData(clean.subset(torch.arange(20)), clean, 3)
    scores, notes = SpectralSignatures(center="trusted").score(Pixels(), data, only, generator())
    assert not scores[30:].any()
    assert notes["not_judged"] == [1, 2]


def test_equal_rows_have_no_direction() -> None:
    direction, share = top_direction(np.zeros((5, 3)))
    assert share is None
    assert direction.shape == (3,)


def test_refusals(backdoored: Any) -> None:
    data, _ = planted(30, 0)
    method = SpectralSignatures()
    assert isinstance(method, Detector)
    assert (method.needs_trusted, SpectralSignatures(center="trusted").needs_trusted) == (False, True)
    assert method.refusal(Pixels()) is None
    bare = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
    assert "classifier" in (method.refusal(bare) or "")
    with pytest.raises(MethodRefused, match="classifier"):
        method.score(bare, data, None, generator())
    with pytest.raises(MethodRefused, match="wants 31 of them, and no label has more than 30"):
        SpectralSignatures(minimum=31).score(Pixels(), data, None, generator())
    with pytest.raises(MethodRefused, match="no samples"):
        method.score(Pixels(), data.subset(torch.arange(0)), None, generator())
    with pytest.raises(MethodRefused, match="trusted"):
        SpectralSignatures(center="trusted").score(Pixels(), data, None, generator())
    other = TrustedData(Samples(data.images[:5], torch.full((5,), 9)), data, 10)
    with pytest.raises(MethodRefused, match="no label to judge has trusted samples"):
        SpectralSignatures(center="trusted").score(Pixels(), data, other, generator())
    diverged = Pixels()
    diverged.fc.weight.data.fill_(torch.nan)
    with pytest.raises(MethodRefused, match=r"`fc\.weight` is not finite"):  # though its features are still pixels
        method.score(diverged, data, None, generator())
