"""ResNet-18 for small images, with the layer names of the RNP authors' code, so that their checkpoints load.

Reference: He et al., "Deep Residual Learning for Image Recognition", CVPR 2016 (https://arxiv.org/abs/1512.03385),
section 3.3 and table 1: basic blocks in four groups of 64, 128, 256 and 512 channels. Names and details follow
kuangliu/pytorch-cifar as used in bboylyg/RNP (models/resnet_cifar.py): 122 state entries, 11,173,962 parameters and
4,800 BatchNorm channels for three input channels and 10 classes.

Differs from the paper: the form for CIFAR that everybody uses: a 3x3 stem of stride 1 and no max pooling, so that
32x32 images leave the last group as 4x4 maps; where sizes differ the shortcut is a 1x1 convolution with BatchNorm
(option B). Differs from the code: the last average runs over the whole map, which is its 4x4 for 32x32 images and lets
other sizes in; ReLUs are modules of their own, so that ``taps`` can name them.
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

SMALLEST = 16
BLOCKS = 2
"""Blocks in each of the four groups."""


class BasicBlock(nn.Module):
    """3x3 convolution, BatchNorm, ReLU, 3x3 convolution, BatchNorm; then the shortcut is added, and ReLU."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        """Lay out the layers; ``shortcut`` is empty, the identity, where sizes do not change."""
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.relu1 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.relu2 = nn.ReLU(inplace=True)
        self.shortcut = nn.Sequential()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        """Return (N, outputs, H / stride, W / stride) of (N, inputs, H, W)."""
        inner = self.relu1(self.bn1(self.conv1(x)))
        out: Tensor = self.relu2(self.bn2(self.conv2(inner)) + self.shortcut(x))
        return out


def group(block: type[nn.Module], inputs: int, outputs: int, stride: int) -> nn.Sequential:
    """Return the blocks of one width; the first has the stride."""
    rest = (block(outputs, outputs, 1) for _ in range(BLOCKS - 1))
    return nn.Sequential(block(inputs, outputs, stride), *rest)


class ResNetModule(nn.Module):
    """A convolution with BatchNorm and ReLU, four groups, average, linear classifier."""

    taps = ("layer1", "layer2", "layer3", "layer4")
    maps = "layer4"
    prunable = "layer4.1.relu1"
    channels = "layer4.1.bn1"
    classifier = "linear"

    def __init__(self, inputs: int, width: int, classes: int) -> None:
        """Lay out the layers for images of ``inputs`` channels."""
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.layer1 = group(BasicBlock, width, width, 1)
        self.layer2 = group(BasicBlock, width, 2 * width, 2)
        self.layer3 = group(BasicBlock, 2 * width, 4 * width, 2)
        self.layer4 = group(BasicBlock, 4 * width, 8 * width, 2)
        self.linear = nn.Linear(8 * width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return (N, classes) logits of (N, C, H, W) images in [0, 1]."""
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        logits: Tensor = self.linear(x.mean((2, 3)))
        return logits


def need_pixels(name: str, shape: tuple[int, int, int]) -> None:
    """Refuse images that three halvings leave as maps of one pixel: BatchNorm would be left with single values.

    Raises:
        UserError: If an image has fewer than 16 pixels in a direction.
    """
    if min(shape[1:]) < SMALLEST:
        expected, got = f"{name} takes images from {SMALLEST}x{SMALLEST} up", f"{shape[1]}x{shape[2]}"
        remedy = "use cnn or mlp, or digits with pixels: 16"
        raise UserError([Problem(path="model", expected=expected, got=got, remedy=remedy)])


@dataclass(frozen=True, kw_only=True)
@checks_fields
class ResNet18:
    """The CIFAR form of ResNet-18 (``ResNetModule``): PyTorch's default initialization, channels_last.

    Attributes:
        width: Channels of the first group; 64 is the paper's and has 11,173,962 parameters.
    """

    width: Annotated[int, Ge(1)] = 64

    def build(self, shape: tuple[int, int, int], classes: int, rng: torch.Generator) -> ResNetModule:
        """Return a fresh model (see ``types.ModelFamily``).

        Raises:
            UserError: If an image has fewer than 16 pixels in a direction.
        """
        need_pixels("resnet18", shape)
        model = materialize(lambda: ResNetModule(shape[0], self.width, classes))
        initialize(model, rng, convolutions="torch")
        return model.to(memory_format=torch.channels_last)
