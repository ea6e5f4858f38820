from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from fedbd.defenses.detection.frequency import KINDS, Frequency, dct, patches, shadows, synthetic, turned
from fedbd.errors import MethodRefused, UserError
from fedbd.metrics import roc_auc
from fedbd.types import Detector, Samples, TrustedData

QUICK = Frequency(width=4, epochs=4)


def generator(seed: int = 3) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, shape, generator=generator(seed), dtype=torch.uint8)


def cosines(size: int) -> np.ndarray:
    """Return the orthonormal DCT-II matrix from its definition."""
    rows = [[math.cos(math.pi * (2 * n + 1) * k / (2 * size)) for n in range(size)] for k in range(size)]
    scale = [math.sqrt((1 if k == 0 else 2) / size) for k in range(size)]
    return np.array(rows) * np.array(scale)[:, None]


def test_the_transform_of_a_constant_image_is_its_first_coefficient() -> None:
    found = dct(torch.full((1, 2, 8, 12), 200, dtype=torch.uint8))
    assert np.allclose(found[0, :, 0, 0], 200 * math.sqrt(8 * 12), rtol=1e-6)
    found[0, :, 0, 0] = 0
    assert np.abs(found).max() < 1e-3


def test_the_transform_is_separable_and_keeps_the_sum_of_squares() -> None:
    images = noise(3, 2, 8, 12)
    by_hand = cosines(8) @ images.numpy().astype(np.float64) @ cosines(12).T
    assert np.allclose(dct(images), by_hand, atol=1e-2)
    assert np.square(dct(images).astype(np.float64)).sum() == pytest.approx(np.square(images.double().numpy()).sum())


def test_patches_are_rectangles_in_the_corners() -> None:
    found = patches(500, 32, 32, generator())[:, 0].numpy()
    tops = set()
    for mask in found:
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        assert mask.sum() == len(rows) * len(columns)
        assert {len(rows), len(columns)} <= {2, 3, 4, 5, 6, 7}
        tops.add((int(rows[0] > 16), int(columns[0] > 16)))
        assert min(rows[0], 31 - rows[-1]) <= 5
    assert len(tops) == 4
    sides = {int(mask.any(1).sum()) for mask in found}
    assert sides == {2, 3, 4, 5, 6, 7}
    assert patches(50, 8, 8, generator()).any((1, 2, 3)).all()


def test_every_kind_of_synthetic_trigger_does_what_it_says() -> None:
    images = torch.full((400, 3, 32, 32), 100, dtype=torch.uint8)
    before = images.clone()
    made = synthetic(images, generator())
    assert torch.equal(images, before)
    assert made.dtype == torch.uint8
    kind = torch.randint(len(KINDS), (400, 1, 1, 1), generator=generator()).flatten()
    by_kind = {name: made[kind == i].float() for i, name in enumerate(KINDS)}
    assert set(by_kind["white"].unique().tolist()) == {100.0, 255.0}
    changed = (by_kind["noise_patch"] != 100).float().mean((1, 2, 3))
    assert changed.max() <= 49 / 1024
    assert changed.min() > 0
    assert by_kind["noise"].mean() == pytest.approx(125, abs=0.5)
    assert by_kind["noise"].std(dim=(1, 2, 3)).min() > 3
    assert by_kind["noise"].std(dim=(1, 2, 3)).max() < 9
    assert set(by_kind["shadow"].unique().tolist()) == {50.0, 100.0}
    assert set(by_kind["added"].unique().tolist()) == {130.0}


def test_an_added_image_is_another_one() -> None:
    images = torch.full((400, 1, 32, 32), 50, dtype=torch.uint8)
    images[200:] = 100
    made = synthetic(images, generator())
    kind = torch.randint(len(KINDS), (400, 1, 1, 1), generator=generator()).flatten()
    added = (made.float() - images.float())[kind == KINDS.index("added")].flatten(1)
    own = images[kind == KINDS.index("added"), 0, 0, 0]
    assert (added == added[:, :1]).all()
    pairs = set(zip(own.tolist(), added[:, 0].tolist(), strict=True))
    assert pairs == {(50, 15.0), (50, 30.0), (100, 15.0), (100, 30.0)}


def test_shadows_are_bands_of_some_width() -> None:
    covered = shadows(400, 32, 32, generator()).float().mean((1, 2, 3))
    assert 0.15 < covered.mean() < 0.5
    assert covered.max() < 0.75


def test_turning_gives_the_eight_symmetries_of_a_square_and_four_of_another() -> None:
    image = noise(1, 2, 8, 8)
    made = turned(image.repeat(8, 1, 1, 1), torch.arange(8))
    assert len({one.numpy().tobytes() for one in made}) == 8
    assert all(torch.equal(one.flatten().sort().values, image.flatten().sort().values) for one in made)
    assert torch.equal(made[0], image[0])
    assert torch.equal(made[2], image[0].flip(2))
    oblong = turned(noise(1, 1, 8, 6).repeat(8, 1, 1, 1), torch.arange(8))
    assert len({one.numpy().tobytes() for one in oblong}) == 4


@pytest.mark.parametrize(("network", "transform"), [("cnn", "raw"), ("cnn", "log"), ("linear", "log")])
def test_triggered_digits_score_higher_whatever_the_model(network: Any, transform: Any, backdoored: Any) -> None:
    images = torch.cat([backdoored.clean.images, backdoored.triggered.images])
    data = Samples(images, torch.zeros(len(images), dtype=torch.int64))
    detector = Frequency(network=network, transform=transform, width=8)
    scores, notes = detector.score(backdoored.model, data, backdoored.trusted, generator())
    triggered = np.arange(len(images)) >= len(backdoored.clean)
    assert (roc_auc(scores[triggered], scores[~triggered]) or 0) > 0.6
    assert notes["validation_accuracy"] > 0.6
    assert set(notes["detected"]) == set(KINDS)


def test_the_model_is_not_read_and_order_does_not_matter(backdoored: Any, tiny_net: Any) -> None:
    scores, _ = QUICK.score(backdoored.model, backdoored.clean, backdoored.trusted, generator())
    order = torch.randperm(len(backdoored.clean), generator=generator())
    other, _ = QUICK.score(tiny_net(9), backdoored.clean.subset(order), backdoored.trusted, generator())
    assert np.allclose(other, scores[order.numpy()], atol=1e-4)
    assert not np.allclose(other, other.mean(), atol=1e-2)


def test_the_validation_measures_add_up(backdoored: Any) -> None:
    _, notes = QUICK.score(backdoored.model, backdoored.clean, backdoored.trusted, generator())
    held = len(backdoored.trusted.validate)
    assert (notes["false_positive"] * held) % 1 == pytest.approx(0, abs=1e-9)
    caught = 2 * notes["validation_accuracy"] - 1 + notes["false_positive"]
    assert min(notes["detected"].values()) - 1e-9 <= caught <= max(notes["detected"].values()) + 1e-9


def test_the_global_random_state_is_neither_read_nor_changed(backdoored: Any) -> None:
    before = torch.get_rng_state()
    first, _ = QUICK.score(backdoored.model, backdoored.clean, backdoored.trusted, generator())
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(99)
    again, _ = QUICK.score(backdoored.model, backdoored.clean, backdoored.trusted, generator())
    assert np.array_equal(first, again)
    torch.set_rng_state(before)


def test_refusals(backdoored: Any) -> None:
    assert isinstance(QUICK, Detector)
    assert QUICK.needs_trusted
    with pytest.raises(MethodRefused, match="trusted"):
        QUICK.score(backdoored.model, backdoored.clean, None, generator())
    with pytest.raises(UserError, match="transform: must be log"):
        Frequency(network="linear")
    few = TrustedData(backdoored.clean.subset(torch.arange(19)), backdoored.clean, 10)
    with pytest.raises(MethodRefused, match="at least 20"):
        QUICK.score(backdoored.model, backdoored.clean, few, generator())
    with pytest.raises(MethodRefused, match="no samples"):
        QUICK.score(backdoored.model, backdoored.clean.subset(torch.arange(0)), backdoored.trusted, generator())
    small = Samples(noise(30, 1, 7, 9), torch.zeros(30, dtype=torch.int64))
    with pytest.raises(MethodRefused, match="network: linear"):
        QUICK.score(backdoored.model, small, TrustedData(small, small, 2), generator())
    linear = Frequency(network="linear", transform="log", epochs=1)
    assert "network: linear" in (QUICK.refusal_on(backdoored.model, TrustedData(small, small, 2)) or "")
    assert QUICK.refusal_on(backdoored.model, backdoored.trusted) is None
    assert linear.refusal_on(backdoored.model, TrustedData(small, small, 2)) is None
    scores, _ = linear.score(backdoored.model, small, TrustedData(small, small, 2), generator())
    assert np.isfinite(scores).all()
