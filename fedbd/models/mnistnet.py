"""MnistNet: the small network of the federated backdoor literature for 28x28 digits.

Reference: Xie et al., "DBA: Distributed Backdoor Attacks against Federated Learning", ICLR 2020
(https://openreview.net/forum?id=rkgyS0VFvr), whose code has it (AI-secure/DBA, models/MnistNet.py); BackFed and others
took it over. It is LeNet as in PyTorch's MNIST example of the time: 431,080 parameters for (1, 28, 28) and 10 classes.

Differs from the paper: the code returns log-probabilities, this model logits (the same cross-entropy); any number of
channels and classes and any size from 16x16 up is taken. Layer names are the code's.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812 - the name that every PyTorch user reads
from torch import Tensor, nn

from fedbd.errors import Problem, UserError
from fedbd.method_fields import checks_fields
from fedbd.models.initialize import initialize, materialize

SMALLEST = 16


class MnistNetModule(nn.Module):
    """Two 5x5 convolutions of 20 and 50 channels, each with ReLU and 2x2 pooling, then 500 hidden units."""

    taps = ("pool1", "pool2")
    maps = "pool2"
    channels = "conv2"
    classifier = "fc2"

    def __init__(self, shape: tuple[int, int, int], classes: int) -> None:
        """Lay out the layers for (C, H, W) images."""
        super().__init__()
        channels, *sides = shape
        left = [((side - 4) // 2 - 4) // 2 for side in sides]
        self.conv1 = nn.Conv2d(channels, 20, 5)
        self.pool1 = nn.MaxPool2d(2)
        self.conv2 = nn.Conv2d(20, 50, 5)
        self.pool2 = nn.MaxPool2d(2)
        self.fc1 = nn.Linear(50 * left[0] * left[1], 500)
        self.fc2 = nn.Linear(500, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return (N, classes) logits of (N, C, H, W) images in [0, 1]."""
        x = self.pool1(F.relu(self.conv1(x)))
        x = self.pool2(F.relu(self.conv2(x)))
        logits: Tensor = self.fc2(F.relu(self.fc1(x.flatten(1))))
        return logits


@dataclass(frozen=True, kw_only=True)
@checks_fields
class MnistNet:
    """The field's MNIST network (``MnistNetModule``): PyTorch's default initialization, channels_last."""

    def build(self, shape: tuple[int, int, int], classes: int, rng: torch.Generator) -> MnistNetModule:
        """Return a fresh model (see ``types.ModelFamily``).

        Raises:
            UserError: If an image has fewer than 16 pixels in a direction.
        """
        if min(shape[1:]) < SMALLEST:
            expected, got = f"mnistnet takes images from {SMALLEST}x{SMALLEST} up", f"{shape[1]}x{shape[2]}"
            remedy = "use cnn or mlp, or digits with pixels: 16"
            raise UserError([Problem(path="model", expected=expected, got=got, remedy=remedy)])
        model = materialize(lambda: MnistNetModule(shape, classes))
        initialize(model, rng, convolutions="torch")
        return model.to(memory_format=torch.channels_last)
