"""Pre-activation ResNet-18 for small images, with the layer names of BackdoorBench, so that its checkpoints load.

Reference: He et al., "Identity Mappings in Deep Residual Networks", ECCV 2016 (https://arxiv.org/abs/1603.05027),
section 4: BatchNorm and ReLU before each convolution. Names and details follow kuangliu/pytorch-cifar as used in
SCLBD/BackdoorBench (models/preact_resnet.py): 102 state entries, 11,171,146 parameters and 3,392 BatchNorm channels for
three input channels and 10 classes.

Differs from the paper: as in that code, no BatchNorm and ReLU stand between the last block and the average, so that the
last map, a plain sum, has no activation; where sizes differ the 1x1 shortcut takes the activated input. Differs from
the code: ReLUs are modules of their own, so that ``taps`` can name them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from annotated_types import Ge
from torch import Tensor, nn

from fedbd.method_fields import checks_fields
from fedbd.models.initialize import initialize, materialize
from fedbd.models.resnet import group, need_pixels


class PreActBlock(nn.Module):
    """BatchNorm, ReLU, 3x3 convolution, twice, and a shortcut around them."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        """Lay out the layers; ``shortcut`` is empty, the identity, where sizes do not change."""
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.relu1 = nn.ReLU(inplace=True)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.relu2 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.changes = stride != 1 or inputs != outputs
        self.shortcut = nn.Sequential()
        if self.changes:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        """Return (N, outputs, H / stride, W / stride) of (N, inputs, H, W)."""
        active = self.relu1(self.bn1(x))
        inner = self.conv2(self.relu2(self.bn2(self.conv1(active))))
        out: Tensor = inner + self.shortcut(active if self.changes else x)
        return out


class PreActResNetModule(nn.Module):
    """A convolution, four groups, average, linear classifier."""

    taps = ("layer1", "layer2", "layer3", "layer4")
    maps = "layer4"
    prunable = "layer4.1.relu2"
    channels = "layer4.1.bn2"
    classifier = "linear"

    def __init__(self, inputs: int, width: int, classes: int) -> None:
        """Lay out the layers for images of ``inputs`` channels."""
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 3, padding=1, bias=False)
        self.layer1 = group(PreActBlock, width, width, 1)
        self.layer2 = group(PreActBlock, width, 2 * width, 2)
        self.layer3 = group(PreActBlock, 2 * width, 4 * width, 2)
        self.layer4 = group(PreActBlock, 4 * width, 8 * width, 2)
        self.linear = nn.Linear(8 * width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return (N, classes) logits of (N, C, H, W) images in [0, 1]."""
        x = self.layer4(self.layer3(self.layer2(self.layer1(self.conv1(x)))))
        logits: Tensor = self.linear(x.mean((2, 3)))
        return logits


@dataclass(frozen=True, kw_only=True)
@checks_fields
class PreActResNet18:
    """The CIFAR form of the pre-activation ResNet-18 (``PreActResNetModule``): PyTorch's default, channels_last.

    Attributes:
        width: Channels of the first group; 64 is the paper's and has 11,171,146 parameters.
    """

    width: Annotated[int, Ge(1)] = 64

    def build(self, shape: tuple[int, int, int], classes: int, rng: torch.Generator) -> PreActResNetModule:
        """Return a fresh model (see ``types.ModelFamily``).

        Raises:
            UserError: If an image has fewer than 16 pixels in a direction.
        """
        need_pixels("preact_resnet18", shape)
        model = materialize(lambda: PreActResNetModule(shape[0], self.width, classes))
        initialize(model, rng, convolutions="torch")
        return model.to(memory_format=torch.channels_last)
