from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scipy.spatial.distance import cdist
from torch import nn

from fedbd.defenses.detection.activation_spaces import (
    Space,
    distinct,
    ends,
    need_classes,
    read_spaces,
    spaces,
    squared_distances,
    trusted_parts,
    vectors,
)
from fedbd.errors import MethodRefused, refusal
from fedbd.models.taps import penultimate, readings
from fedbd.types import Samples, TrustedData


def test_spaces_are_the_taps_and_the_two_ends(backdoored: Any) -> None:
    places = spaces(backdoored.model, "it")
    assert [place.name for place in places] == ["block1", "block2", "block3", "penultimate", "logits"]
    assert places[3:] == ends(backdoored.model, "it")
    assert refusal(lambda: spaces(backdoored.model, "it")) is None
    assert "`taps`" in (refusal(lambda: spaces(nn.Linear(2, 2), "it")) or "")
    assert "`classifier`" in (refusal(lambda: ends(nn.Linear(2, 2), "it")) or "")


def test_one_pass_reads_what_single_passes_read(backdoored: Any) -> None:
    model, images = backdoored.model, backdoored.clean
    places = spaces(model, "it")
    found = read_spaces(model, places, images, [vectors("flat")] * 5, "it")
    for place, part in zip(places[:3], found, strict=False):
        assert torch.equal(part, readings(model, place.module, images).flatten(1))
    assert torch.equal(found[3], penultimate(model, images, "it"))
    with torch.no_grad():
        assert torch.allclose(found[4], model(images.images.float() / 255), atol=1e-5)
    averaged = read_spaces(model, places[:1], images, [vectors("average")], "it")[0]
    assert torch.allclose(averaged, readings(model, "block1", images).mean((2, 3)), atol=1e-6)
    assert not any(module._forward_hooks for module in model.modules())


def test_no_images_give_no_readings(backdoored: Any) -> None:
    nothing = backdoored.clean.subset(torch.arange(0))
    assert [
        part.shape[0] for part in read_spaces(backdoored.model, spaces(backdoored.model, "it"), nothing, [], "it")
    ] == [0] * 5


def test_a_diverged_model_is_refused(tiny_net: Any, backdoored: Any) -> None:
    model = tiny_net(0)
    with torch.no_grad():
        model.fc.bias[0] = torch.nan
    with pytest.raises(MethodRefused, match="`logits` are not finite"):
        read_spaces(model, [Space("logits", "fc")], backdoored.clean, [vectors("flat")], "it")


def test_a_repeated_space_counts_once() -> None:
    a, b = torch.rand(4, 3), torch.rand(4, 3)
    assert distinct([a, a + 1e-8, b, b[:, :2], a]) == [0, 2, 3, 4]


def test_distances_are_exact_and_zero_for_the_same_point() -> None:
    rng = torch.Generator().manual_seed(0)
    a, b = torch.randn(7, 5, generator=rng) + 100, torch.randn(4, 5, generator=rng) + 100
    b[0] = a[2] * (1 + 1e-7)
    found = squared_distances(a, b).numpy()
    wanted = cdist(a.double().numpy(), b.double().numpy(), "sqeuclidean")
    assert found[2, 0] == 0
    wanted[2, 0] = 0
    assert np.allclose(found, wanted, rtol=1e-8)


def test_trusted_data_must_be_there_and_enough_and_of_several_classes() -> None:
    def of(labels: list[int]) -> Samples:
        return Samples(torch.zeros(len(labels), 1, 2, 2, dtype=torch.uint8), torch.tensor(labels, dtype=torch.int64))

    good = TrustedData(of([0, 1]), of([0]), 2)
    assert trusted_parts(good, "it", 2) is good
    for absent in (None, TrustedData(of([]), of([0]), 2), TrustedData(of([0]), of([]), 2)):
        with pytest.raises(MethodRefused, match="size: 500"):
            trusted_parts(absent, "it")
    with pytest.raises(MethodRefused, match="needs 3 trusted images to fit and there are 2"):
        trusted_parts(good, "it", 3)
    need_classes(good.fit, "it")
    with pytest.raises(MethodRefused, match="all of one"):
        need_classes(of([1, 1]), "it")
