"""Wide residual networks, with the layer names of the ABL and NAD authors' code, so that their checkpoints load.

Reference: Zagoruyko and Komodakis, "Wide Residual Networks", BMVC 2016 (https://arxiv.org/abs/1605.07146), section 2:
pre-activation basic blocks in three groups of 16, 32 and 64 times the width. Names and details follow
xternalz/WideResNet-pytorch as used in bboylyg/ABL and bboylyg/NAD (models/wresnet.py). WRN-16-1 has 82 state entries
and 175,066 parameters for three input channels and 10 classes.

Differs from the paper: as in that code, where widths differ the 1x1 shortcut takes the activated input (the residual
branch's own), elsewhere the identity takes the raw one. Differs from the code: the last average runs over the whole
map, which is its 8x8 for 32x32 images and lets other sizes in; forward returns the logits alone (see ``taps``).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
import torch.nn.functional as F  # noqa: N812 - the name that every PyTorch user reads
from annotated_types import Ge
from torch import Tensor, nn

from fedbd.errors import Problem, UserError
from fedbd.method_fields import checks_fields
from fedbd.models.initialize import initialize, materialize

SMALLEST = 8


class BasicBlock(nn.Module):
    """BatchNorm, ReLU, 3x3 convolution, twice, and a shortcut around them."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        """Lay out the layers; ``convShortcut`` is there only where the widths differ."""
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        # The authors' spelling: it is a key of their checkpoints.
        self.convShortcut = nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False) if inputs != outputs else None

    def forward(self, x: Tensor) -> Tensor:
        """Return (N, outputs, H / stride, W / stride) of (N, inputs, H, W)."""
        # In place trains and infers 12 % faster; a hook that keeps what a bn puts out must clone it.
        active = F.relu(self.bn1(x), inplace=True)
        out: Tensor = self.conv2(F.relu(self.bn2(self.conv1(active)), inplace=True))
        return out + (x if self.convShortcut is None else self.convShortcut(active))


class Group(nn.Module):
    """Blocks of one width; the first has the stride."""

    def __init__(self, blocks: int, inputs: int, outputs: int, stride: int) -> None:
        """Lay out the blocks."""
        super().__init__()
        rest = (BasicBlock(outputs, outputs, 1) for _ in range(blocks - 1))
        self.layer = nn.Sequential(BasicBlock(inputs, outputs, stride), *rest)

    def forward(self, x: Tensor) -> Tensor:
        """Return the last block's sum, before any BatchNorm."""
        out: Tensor = self.layer(x)
        return out


class WrnModule(nn.Module):
    """A convolution, three groups, BatchNorm, ReLU, average, linear classifier."""

    taps = ("block1", "block2", "block3")
    maps = "relu"
    channels = "bn1"
    classifier = "fc"

    def __init__(self, inputs: int, depth: int, width: int, classes: int) -> None:
        """Lay out the layers for images of ``inputs`` channels."""
        super().__init__()
        blocks, widths = (depth - 4) // 6, (16 * width, 32 * width, 64 * width)
        self.conv1 = nn.Conv2d(inputs, 16, 3, padding=1, bias=False)
        self.block1 = Group(blocks, 16, widths[0], 1)
        self.block2 = Group(blocks, widths[0], widths[1], 2)
        self.block3 = Group(blocks, widths[1], widths[2], 2)
        self.bn1 = nn.BatchNorm2d(widths[2])
        self.relu = nn.ReLU()
        self.fc = nn.Linear(widths[2], classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return (N, classes) logits of (N, C, H, W) images in [0, 1]."""
        x = self.block3(self.block2(self.block1(self.conv1(x))))
        logits: Tensor = self.fc(self.relu(self.bn1(x)).mean((2, 3)))
        return logits


@dataclass(frozen=True, kw_only=True)
@checks_fields
class Wrn:
    """Wide residual network (``WrnModule``): N(0, 2 / fan_out) convolutions, a zero bias, channels_last.

    Attributes:
        depth: Number of layers, 6 n + 4 with n blocks in a group.
        width: Widening factor.
    """

    depth: Annotated[int, Ge(10)] = 16
    width: Annotated[int, Ge(1)] = 1

    def problems(self) -> list[tuple[str, str]]:
        """Return what is wrong with the fields."""
        if self.depth >= 10 and self.depth % 6 == 4:
            return []
        return [("depth", f"must be 6 n + 4 (10, 16, 22, 28, 34, 40, ...), got {self.depth}")]

    def build(self, shape: tuple[int, int, int], classes: int, rng: torch.Generator) -> WrnModule:
        """Return a fresh model (see ``types.ModelFamily``).

        Raises:
            UserError: If an image has fewer than 8 pixels in a direction.
        """
        if min(shape[1:]) < SMALLEST:
            expected, got = f"a Wide ResNet takes images from {SMALLEST}x{SMALLEST} up", f"{shape[1]}x{shape[2]}"
            raise UserError([Problem(path="model", expected=expected, got=got, remedy="use mlp")])
        model = materialize(lambda: WrnModule(shape[0], self.depth, self.width, classes))
        initialize(model, rng, convolutions="he")
        return model.to(memory_format=torch.channels_last)
