"""A small convolutional network with BatchNorm, for quick runs on images from 8x8 up.

It is fedbd's own, sized so that a client's round on the digits takes a fraction of a second on one core; it has a
BatchNorm after every convolution because repairs (RNP, pruning) act on BatchNorm scales.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from annotated_types import Ge
from torch import Tensor, nn

from fedbd.errors import Problem, UserError
from fedbd.method_fields import checks_fields
from fedbd.models.initialize import initialize, materialize

SMALLEST = 8


class Block(nn.Module):
    """3x3 convolution, BatchNorm, ReLU; keeps the size."""

    def __init__(self, inputs: int, outputs: int) -> None:
        """Lay out the layers."""
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Return (N, outputs, H, W) of (N, inputs, H, W)."""
        return torch.relu(self.bn(self.conv(x)))


class CnnModule(nn.Module):
    """Three blocks of ``width``, 2 and 4 times ``width`` channels, pooling between them, average, linear classifier."""

    taps = ("block1", "block2", "block3")
    maps = "block3"
    channels = "block3.bn"
    classifier = "fc"

    def __init__(self, inputs: int, width: int, classes: int) -> None:
        """Lay out the layers for images of ``inputs`` channels."""
        super().__init__()
        self.block1 = Block(inputs, width)
        self.block2 = Block(width, 2 * width)
        self.block3 = Block(2 * width, 4 * width)
        self.pool = nn.MaxPool2d(2)
        self.fc = nn.Linear(4 * width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return (N, classes) logits of (N, C, H, W) images in [0, 1]."""
        x = self.pool(self.block1(x))
        x = self.pool(self.block2(x))
        logits: Tensor = self.fc(self.block3(x).mean((2, 3)))
        return logits


@dataclass(frozen=True, kw_only=True)
@checks_fields
class Cnn:
    """A small convolutional network with BatchNorm (``CnnModule``): He initialization (fan-out), channels_last.

    Attributes:
        width: Channels of the first block; 16 gives 24,058 parameters for one input channel and 10 classes.
    """

    width: Annotated[int, Ge(1)] = 16

    def build(self, shape: tuple[int, int, int], classes: int, rng: torch.Generator) -> CnnModule:
        """Return a fresh model (see ``types.ModelFamily``).

        Raises:
            UserError: If an image has fewer than 8 pixels in a direction: BatchNorm would be left with single values.
        """
        if min(shape[1:]) < SMALLEST:
            expected, got = f"cnn takes images from {SMALLEST}x{SMALLEST} up", f"{shape[1]}x{shape[2]}"
            raise UserError([Problem(path="model", expected=expected, got=got, remedy="use mlp")])
        model = materialize(lambda: CnnModule(shape[0], self.width, classes))
        initialize(model, rng, convolutions="he")
        return model.to(memory_format=torch.channels_last)
