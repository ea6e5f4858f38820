"""Attention maps of a network's groups of layers, and how far two networks' maps lie apart.

Y. Li, X. Lyu, N. Koren, L. Lyu, B. Li, X. Ma, "Neural Attention Distillation: Erasing Backdoor Triggers from Deep
Neural Networks", ICLR 2021, https://arxiv.org/abs/2101.05930, section 3; code
https://github.com/bboylyg/NAD.

Differs from the paper: the distance is the code's by default (a mean of squares), the paper's under its own name. Maps
of different sizes are averaged to a common one. Maps of one pixel are refused: normalized they are 1 for every image.
Only the code was read; the paper's distance is from memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
import torch.nn.functional as F  # noqa: N812 - the name that every PyTorch user reads
from torch import Tensor, nn

from fedbd.errors import MethodRefused, refusal
from fedbd.metrics import logits
from fedbd.models.taps import declared, outputs

Size = tuple[int, int]
Distance = Literal["mse", "l2"]

EPSILON = 1e-6
"""Added to a map's norm, as in the code."""

PROBES = (64, 32, 28, 96, 128, 224, 299, *range(8, 28), *range(29, 32), *range(33, 64))
"""Image sides in pixels at which a model is tried where no image is at hand."""

REMEDY = (
    "take a model with taps that have maps (cnn, wrn16-1, resnet18), or set taps on yours to modules before the global "
    "pool"
)


def attention(features: Tensor, power: float = 2.0, size: Size | None = None) -> Tensor:
    """Return ``sum over c of |F_c| ** power``, divided by its spatial l2 norm (+ 1e-6), per sample.

    Args:
        features: (N, C, H, W) floats.
        power: From 1 up.
        size: (height, width) that the sum is averaged down to before it is normalized; None: as it is.

    Returns:
        (N, H * W) in the features' dtype, of norm 1 (0 where all features are 0).
    """
    energy = (features.square() if power == 2 else features.abs().pow(power)).sum(1)
    if size is not None and tuple(energy.shape[1:]) != size:
        energy = F.adaptive_avg_pool2d(energy, size)
    flat = energy.flatten(1)
    norm: Tensor = torch.linalg.vector_norm(flat, dim=1, keepdim=True)
    return flat / (norm + EPSILON)


def apart(student: Tensor, teacher: Tensor, distance: Distance) -> Tensor:
    """Return how far apart two batches of maps are, a scalar.

    Args:
        student: (N, D) of ``attention``.
        teacher: (N, D), detached.
        distance: ``mse``: the mean over all N * D squared differences (the code's). ``l2``: the mean over samples of
            the l2 norm of the difference (the paper's).
    """
    if distance == "mse":
        return F.mse_loss(student, teacher)
    norms: Tensor = torch.linalg.vector_norm(student - teacher, dim=1)
    return norms.mean()


def map_sizes(model: nn.Module, image: Tensor, method: str) -> tuple[Size, ...]:
    """Return height and width of the map at each of a model's taps.

    Args:
        model: Left as it is.
        image: (1, C, H, W), uint8 or float in [0, 1].
        method: Who asks, for the message.

    Raises:
        MethodRefused: If the model declares no taps, or one that it has not, or one without a map of two pixels.
    """
    taps = declared(model, "taps", method)
    with outputs(model, taps) as kept, torch.no_grad():
        logits(model, image, threads=1)
    sizes: list[Size] = []
    for name in taps:
        shape = tuple(kept[name].shape)
        if len(shape) != 4:
            raise MethodRefused(f"{method} compares maps, (N, C, H, W), and tap {name!r} gives {shape}; {REMEDY}")
        if shape[2] * shape[3] == 1:
            raise MethodRefused(
                f"{method} compares maps and that of tap {name!r} has one pixel, which is 1 for every image once it is "
                f"normalized; {REMEDY}"
            )
        sizes.append((shape[2], shape[3]))
    return tuple(sizes)


def check_betas(model: nn.Module, betas: tuple[float, ...], method: str) -> None:
    """Check that there is one weight for each of a model's taps.

    Raises:
        MethodRefused: If not, or if it declares no taps.
    """
    taps = declared(model, "taps", method)
    if len(taps) != len(betas):
        remedy = f"set betas to {len(taps)} numbers, for {', '.join(taps)}"
        raise MethodRefused(f"{method} weighs each tap's term and has {len(betas)} betas for {len(taps)}; {remedy}")


def unfit(model: nn.Module, betas: tuple[float, ...], method: str) -> str | None:
    """Return why a model cannot be compared at its taps, None if it can or if only its images can tell.

    Without an image at hand it is tried at many sizes, and refused where it takes none that gives it fit maps.
    """
    reason = None
    for image in _probes(model):
        try:
            map_sizes(model, image, method)
        except MethodRefused as refused:
            reason = str(refused)
        except (RuntimeError, ValueError, IndexError):
            continue  # not a size that it takes
        else:
            return refusal(lambda: check_betas(model, betas, method))
    return reason or refusal(lambda: check_betas(model, betas, method))


def _probes(model: nn.Module) -> Iterator[Tensor]:
    """Yield black images that a model may take, by its first layer."""
    first = next((module for module in model.modules() if isinstance(module, (nn.Conv2d, nn.Linear))), None)
    if isinstance(first, nn.Linear):
        yield torch.zeros(1, 1, 1, first.in_features)  # of flattened images; or of patches of them
        yield from (torch.zeros(1, channels, side, side) for channels in (1, 3) for side in PROBES)
    elif first is not None:
        yield from (torch.zeros(1, first.in_channels, side, side) for side in PROBES)
