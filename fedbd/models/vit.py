"""A small vision transformer for small images.

Reference: Dosovitskiy et al., "An Image is Worth 16x16 Words: Transformers for Image Recognition at Scale", ICLR 2021
(https://arxiv.org/abs/2010.11929), section 3.1, equations 1 to 4: patches, a class token, learned positions, pre-norm
blocks of attention and a two-layer perceptron with GELU, a LayerNorm, and a linear classifier on the class token.

Differs from the paper: sized for 32x32 images (patch 4, six blocks of width 128); the perceptron is twice, not four
times as wide as the tokens; no dropout; one linear layer is the head from the start. It has neither convolutions nor
BatchNorm, so methods that read maps or mask channels refuse it; its ``taps`` are the class tokens after each block.
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

DEVIATION = 0.02
"""Standard deviation of fresh tokens and positions, as is the custom."""


class Tokens(nn.Module):
    """Cuts images into patches, embeds them linearly, puts the class token first and adds positions (equation 1)."""

    def __init__(self, shape: tuple[int, int, int], patch: int, width: int) -> None:
        """Lay out the layers for (C, H, W) images whose sides are multiples of ``patch``."""
        super().__init__()
        channels, height, breadth = shape
        self.patch = patch
        self.embed = nn.Linear(channels * patch * patch, width)
        self.token = nn.Parameter(torch.empty(1, 1, width))
        self.positions = nn.Parameter(torch.empty(1, 1 + (height // patch) * (breadth // patch), width))

    def draw(self, rng: torch.Generator) -> None:
        """Set token and positions to N(0, 0.02^2)."""
        nn.init.normal_(self.token, std=DEVIATION, generator=rng)
        nn.init.normal_(self.positions, std=DEVIATION, generator=rng)

    def forward(self, x: Tensor) -> Tensor:
        """Return (N, 1 + patches, width) of (N, C, H, W)."""
        n, p = x.shape[0], self.patch
        patches = x.unfold(2, p, p).unfold(3, p, p).permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)
        return torch.cat([self.token.expand(n, -1, -1), self.embed(patches)], 1) + self.positions


class Attention(nn.Module):
    """Multi-head self-attention."""

    def __init__(self, width: int, heads: int) -> None:
        """Lay out the layers."""
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Return (N, T, width) of (N, T, width)."""
        query, key, value = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value)
        out: Tensor = self.out(mixed.transpose(1, 2).flatten(2))
        return out


class First(nn.Module):
    """The class token of (N, T, width) tokens, (N, width): a place where detectors can look."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the first token."""
        return x[:, 0]


class Block(nn.Module):
    """LayerNorm and attention, LayerNorm and perceptron, each with a shortcut around it (equations 2 and 3)."""

    def __init__(self, width: int, heads: int) -> None:
        """Lay out the layers."""
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.perceptron = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        self.first = First()

    def forward(self, x: Tensor) -> Tensor:
        """Return (N, T, width) of (N, T, width)."""
        x = x + self.attention(self.norm1(x))
        x = x + self.perceptron(self.norm2(x))
        self.first(x)  # for hooks alone
        return x


class VitModule(nn.Module):
    """Tokens, blocks, LayerNorm, linear classifier ``head`` on the class token (equation 4)."""

    classifier = "head"

    def __init__(
        self, shape: tuple[int, int, int], patch: int, width: int, depth: int, heads: int, classes: int
    ) -> None:
        """Lay out the layers for (C, H, W) images."""
        super().__init__()
        self.tokens = Tokens(shape, patch, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)
        self.taps = tuple(f"blocks.{i}.first" for i in range(depth))
        self.maps = self.channels = ""

    def forward(self, x: Tensor) -> Tensor:
        """Return (N, classes) logits of (N, C, H, W) images in [0, 1]."""
        x = self.tokens(x)
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.norm(x[:, 0]))
        return logits


@dataclass(frozen=True, kw_only=True)
@checks_fields
class Vit:
    """A vision transformer (``VitModule``): PyTorch's default initialization, N(0, 0.02^2) tokens.

    Attributes:
        patch: Pixels along the side of a patch; images must be whole patches wide and high.
        width: Values of a token; with the other defaults 128 gives 811,146 parameters for 32x32 color images and 10
            classes.
        depth: Number of blocks.
        heads: Attention heads; they share the width evenly.
    """

    patch: Annotated[int, Ge(1)] = 4
    width: Annotated[int, Ge(1)] = 128
    depth: Annotated[int, Ge(1)] = 6
    heads: Annotated[int, Ge(1)] = 4

    def problems(self) -> list[tuple[str, str]]:
        """Return what is wrong between the fields."""
        uneven = self.width % self.heads != 0
        return [("heads", f"must divide width ({self.width}), got {self.heads}")] if uneven else []

    def build(self, shape: tuple[int, int, int], classes: int, rng: torch.Generator) -> VitModule:
        """Return a fresh model (see ``types.ModelFamily``).

        Raises:
            UserError: If an image is not whole patches wide and high.
        """
        if any(side % self.patch for side in shape[1:]):
            expected = f"must divide the images' {shape[1]}x{shape[2]} into whole patches"
            raise UserError([Problem(path="model.patch", expected=expected, got=str(self.patch))])
        model = materialize(lambda: VitModule(shape, self.patch, self.width, self.depth, self.heads, classes))
        initialize(model, rng, convolutions="torch")
        return model
