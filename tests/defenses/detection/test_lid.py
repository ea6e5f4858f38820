from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fedbd.defenses.detection.lid import LID, local_dimension
from fedbd.errors import MethodRefused, UserError
from fedbd.types import Samples, TrustedData


def generator(seed: int = 3) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def brute_force(point: np.ndarray, reference: np.ndarray, k: int) -> float:
    distances = sorted(math.dist(point, other) for other in reference)[:k]
    return -1 / (sum(math.log(r / distances[-1]) for r in distances) / k)


class Plain(nn.Module):
    """Its spaces can be written down: a 2x2 map, its values, and a linear map of them."""

    taps, maps, channels, classifier = ("scale",), "", "", "fc"

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.flatten, self.fc = nn.AvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)
        torch.manual_seed(0)
        nn.init.normal_(self.fc.weight)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc(torch.sigmoid(self.flatten(self.scale(x))))
        return out


def pictures(count: int, seed: int) -> Samples:
    images = torch.randint(0, 256, (count, 1, 2, 2), generator=generator(seed), dtype=torch.uint8)
    return Samples(images, torch.arange(count) % 3)


def test_the_estimate_is_the_formula() -> None:
    rng = np.random.default_rng(0)
    points, reference = rng.random((6, 3)), rng.random((30, 3))
    distances = np.linalg.norm(points[:, None] - reference[None], axis=2)
    for k in (2, 7, 30):
        wanted = [brute_force(point, reference, k) for point in points]
        assert np.allclose(local_dimension(distances, k), wanted, rtol=1e-12)


def test_the_point_itself_is_no_neighbor_and_too_few_give_nan() -> None:
    found = local_dimension(np.array([[0.0, 1.0, 2.0, 4.0], [1.0, 2.0, 4.0, 9.0], [0.0, 0.0, 1.0, 2.0]]), 3)
    assert found[0] == found[1] == pytest.approx(-3 / (math.log(1 / 4) + math.log(2 / 4)))
    assert np.isnan(found[2])
    assert np.isinf(local_dimension(np.ones((1, 4)), 3)[0])


@pytest.mark.parametrize("dimensions", [1, 2, 5])
def test_the_estimate_finds_the_dimension_of_a_ball(dimensions: int) -> None:
    # Distances from the center of a uniform ball are U^(1/d): the estimate's mean tends to d.
    distances = np.random.default_rng(1).random((200, 2000)) ** (1 / dimensions)
    assert local_dimension(distances, 200).mean() == pytest.approx(dimensions, rel=0.03)


@pytest.mark.parametrize("direction", ["higher", "lower", "both"])
def test_scores_are_averaged_z_scores_over_the_spaces(direction: Any) -> None:
    model, data = Plain().eval(), pictures(9, 0)
    trusted = TrustedData(pictures(30, 1), pictures(20, 2), 3)
    scores, notes = LID(neighbors=5, reference=None, direction=direction).score(model, data, trusted, generator())

    def activations(samples: Samples) -> list[np.ndarray]:
        x = samples.images.double() / 255
        hidden = torch.sigmoid(x.flatten(1))
        out = hidden @ model.fc.weight.double().T + model.fc.bias.double()
        return [part.detach().numpy() for part in (x.flatten(1), hidden, out)]

    z = []
    parts = zip(activations(trusted.fit), activations(trusted.validate), activations(data), strict=True)
    for reference, clean, own in parts:
        expected = np.array([brute_force(point, reference, 5) for point in clean])
        found = np.array([brute_force(point, reference, 5) for point in own])
        z.append((found - expected.mean()) / expected.std())
    signed = {"higher": np.array(z), "lower": -np.array(z), "both": np.abs(z)}[direction]
    assert np.allclose(scores, signed.mean(0), rtol=1e-3, atol=1e-3)
    assert [layer["name"] for layer in notes["layers"]] == ["scale", "penultimate", "logits"]
    assert [layer["dimensions"] for layer in notes["layers"]] == [4, 4, 3]


def test_the_reference_is_drawn_by_the_generator_and_capped(backdoored: Any) -> None:
    def score(seed: int, reference: int | None) -> tuple[np.ndarray, Any]:
        detector = LID(reference=reference)
        return detector.score(backdoored.model, backdoored.clean, backdoored.trusted, generator(seed))

    assert np.array_equal(score(1, 50)[0], score(1, 50)[0])
    assert not np.array_equal(score(1, 50)[0], score(2, 50)[0])
    assert np.allclose(score(1, None)[0], score(2, None)[0], rtol=1e-6)
    assert score(1, 50)[1]["reference"] == 50
    assert score(1, 10_000)[1]["reference"] == len(backdoored.trusted.fit)


def test_noise_images_have_a_higher_dimension_than_clean_ones(backdoored: Any) -> None:
    # Uniform noise fills the pixel space; the digits lie on something thinner.
    noise = Samples(
        torch.randint(0, 256, (100, 1, 8, 8), generator=generator(), dtype=torch.uint8), torch.zeros(100).long()
    )
    detector = LID(pool="average")
    odd, _ = detector.score(backdoored.model, noise, backdoored.trusted, generator())
    clean, _ = detector.score(backdoored.model, backdoored.clean, backdoored.trusted, generator())
    assert np.median(odd) > np.median(clean)
    # The last map averaged is what the classifier takes in: it counts once.
    names = [
        layer["name"] for layer in detector.score(backdoored.model, noise, backdoored.trusted, generator())[1]["layers"]
    ]
    assert names == ["block1", "block2", "block3", "logits"]


def test_it_refuses_what_it_cannot_do(backdoored: Any, tiny_net: Any) -> None:
    detector = LID()
    assert detector.needs_trusted
    assert detector.refusal(backdoored.model) is None
    assert "`taps`" in (detector.refusal(nn.Linear(2, 2)) or "")
    with pytest.raises(UserError, match="reference: must be at least neighbors"):
        LID(reference=10)
    assert LID(reference=20).problems() == detector.problems() == []
    few = TrustedData(backdoored.trusted.fit.subset(torch.arange(19)), backdoored.trusted.validate, 10)
    alone = TrustedData(backdoored.trusted.fit, backdoored.trusted.validate.subset(torch.arange(1)), 10)
    for trusted, reason in [(None, "size: 500"), (few, "needs 20"), (alone, "at least 2 trusted images to validate")]:
        with pytest.raises(MethodRefused, match=reason):
            detector.score(backdoored.model, backdoored.clean, trusted, generator())
    assert "validate_share" in (detector.refusal_on(backdoored.model, alone) or "")
    assert detector.refusal_on(backdoored.model, backdoored.trusted) is None
    with pytest.raises(MethodRefused, match="`taps`"):
        detector.score(
            nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), backdoored.clean, backdoored.trusted, generator()
        )
    dead = tiny_net(0)
    with torch.no_grad():
        dead.fc.weight.zero_()
    with pytest.raises(MethodRefused, match="`logits` tells too few"):
        detector.score(dead, backdoored.clean, backdoored.trusted, generator())
