import re
from typing import Any

import numpy as np
import pytest
import torch

from fedbd.errors import UserError
from fedbd.types import Samples, TrustedData, quantized

IMAGES = torch.zeros(6, 3, 8, 8, dtype=torch.uint8)
LABELS = torch.arange(6)


@pytest.mark.parametrize(
    ("images", "labels", "says"),
    [
        (IMAGES / 255, LABELS, "images: must be a tensor (N, C, H, W) of uint8, got torch.float32 (6, 3, 8, 8)"),
        (IMAGES.long(), LABELS, "got torch.int64 (6, 3, 8, 8)"),
        (IMAGES[:, 0], LABELS, "got torch.uint8 (6, 8, 8)"),
        (IMAGES.numpy(), LABELS, "got ndarray"),
        (IMAGES, LABELS.int(), "labels: must be a tensor (N,) of int64, got torch.int32 (6,); labels.long()"),
        (IMAGES, LABELS[:, None], "got torch.int64 (6, 1)"),
        (IMAGES, np.arange(6), "got ndarray"),
        (IMAGES, LABELS[:5], "labels: must be as many as images, 6, got 5"),
    ],
)
def test_what_is_no_samples_is_refused(images: Any, labels: Any, says: str) -> None:
    with pytest.raises(UserError, match=re.escape(says)):
        Samples(images, labels)


def test_the_remedy_makes_samples_of_floats() -> None:
    floats = torch.tensor([0.0, 0.5, 1.0]).view(3, 1, 1, 1)
    samples = Samples(quantized(floats), torch.zeros(3, dtype=torch.int64))
    assert samples.images.flatten().tolist() == [0, 128, 255]
    assert torch.equal(samples.batch(torch.tensor([2, 0]))[0].flatten(), torch.tensor([1.0, 0.0]))


@pytest.mark.parametrize("labels", [LABELS - 1, LABELS + 1])
def test_trusted_labels_must_be_classes(labels: torch.Tensor) -> None:
    good = Samples(IMAGES, LABELS)
    TrustedData(fit=good, validate=good.subset(torch.arange(0)), classes=6)
    with pytest.raises(UserError, match=r"validate\.labels: must be 0 to 5, got"):
        TrustedData(fit=good, validate=Samples(IMAGES, labels), classes=6)


def test_trusted_parts_are_of_one_size() -> None:
    good = Samples(IMAGES, LABELS)
    larger = Samples(IMAGES.repeat(1, 1, 2, 2), LABELS)
    with pytest.raises(UserError, match=r"validate\.images: must be .* as in fit, got"):
        TrustedData(fit=good, validate=larger, classes=6)
    TrustedData(fit=good, validate=larger.subset(torch.arange(0)), classes=6)


def test_trusted_parts_must_be_samples() -> None:
    pair: Any = (IMAGES, LABELS)
    with pytest.raises(UserError, match=r"fit: must be Samples\(images, labels\), got tuple"):
        TrustedData(fit=pair, validate=Samples(IMAGES, LABELS), classes=6)
