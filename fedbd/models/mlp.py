"""A multilayer perceptron.

Reference: McMahan et al., "Communication-Efficient Learning of Deep Networks from Decentralized Data", AISTATS 2017
(https://arxiv.org/abs/1602.05629), section 3: the "2NN", two hidden layers of 200 ReLU units, 199,210 parameters for
28x28 images of one channel and 10 classes.

Differs from the paper: nothing for the defaults.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated

import torch
from annotated_types import Ge
from torch import Tensor, nn

from fedbd.method_fields import checks_fields
from fedbd.models.initialize import initialize, materialize


class MlpModule(nn.Module):
    """Hidden layers ``hidden.0``, ``hidden.1``, ... with ReLU, and a linear classifier ``fc``."""

    classifier = "fc"

    def __init__(self, shape: tuple[int, int, int], hidden: tuple[int, ...], classes: int) -> None:
        """Lay out the layers for (C, H, W) images."""
        super().__init__()
        sizes = (math.prod(shape), *hidden)
        self.hidden = nn.ModuleList(nn.Sequential(nn.Linear(a, b), nn.ReLU()) for a, b in pairwise(sizes))
        self.fc = nn.Linear(sizes[-1], classes)
        self.taps = tuple(f"hidden.{i}" for i in range(len(hidden)))
        self.maps = self.taps[-1] if hidden else ""
        self.channels = f"{self.maps}.0" if hidden else ""

    def forward(self, x: Tensor) -> Tensor:
        """Return (N, classes) logits of (N, C, H, W) images in [0, 1]."""
        x = x.flatten(1)
        for layer in self.hidden:
            x = layer(x)
        logits: Tensor = self.fc(x)
        return logits


@dataclass(frozen=True, kw_only=True)
@checks_fields
class Mlp:
    """A multi-layer perceptron (``MlpModule``), by default McMahan's 2NN: PyTorch's default initialization.

    Attributes:
        hidden: Units of each hidden layer; none gives softmax regression.
    """

    hidden: tuple[Annotated[int, Ge(1)], ...] = (200, 200)

    def build(self, shape: tuple[int, int, int], classes: int, rng: torch.Generator) -> MlpModule:
        """Return a fresh model (see ``types.ModelFamily``); images of any shape are taken."""
        model = materialize(lambda: MlpModule(shape, self.hidden, classes))
        initialize(model, rng, convolutions="torch")
        return model
