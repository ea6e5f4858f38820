"""A model's float weights as one flat vector, and back.

Integer buffers (``num_batches_tracked``) are no weights: they are never averaged, encrypted, clipped or counted in a
distance, and keep the global model's value.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fedbd.types import Vector


@dataclass(frozen=True)
class Layout:
    """Names and shapes of a model's float entries, in ``state_dict`` order.

    Attributes:
        names: The entries' names.
        shapes: Their shapes, one per name.
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]

    @property
    def sizes(self) -> tuple[int, ...]:
        """Number of values of each entry."""
        return tuple(int(np.prod(shape, dtype=np.int64)) for shape in self.shapes)

    @property
    def size(self) -> int:
        """D, the length of the flat vector."""
        return sum(self.sizes)


def is_weight(entry: Tensor | NDArray[np.generic]) -> bool:
    """Return whether a state entry counts as a weight (floating point)."""
    if isinstance(entry, Tensor):
        return entry.is_floating_point()
    return np.issubdtype(entry.dtype, np.floating)


def is_statistic(name: str) -> bool:
    """Return whether a state entry is a running mean or variance of BatchNorm, which nobody trains."""
    return name.rpartition(".")[2] in ("running_mean", "running_var")


def layout_of(state: Mapping[str, Tensor] | Mapping[str, NDArray[np.generic]]) -> Layout:
    """Return the layout of the float entries of a state dict."""
    kept = {name: entry for name, entry in state.items() if is_weight(entry)}
    return Layout(tuple(kept), tuple(tuple(int(d) for d in entry.shape) for entry in kept.values()))


def flatten(model: nn.Module) -> Vector:
    """Return a model's float entries as one (D,) float32 vector (a copy, on the CPU)."""
    parts = [entry.detach().reshape(-1) for entry in model.state_dict().values() if is_weight(entry)]
    return torch.cat(parts).to("cpu", torch.float32).numpy()


def assign(model: nn.Module, vector: Vector, buffers: Mapping[str, NDArray[Any]] | None = None) -> None:
    """Copy a flat vector into a model's float entries, in place (no new tensors, the memory format stays).

    Args:
        model: The model to fill.
        vector: (D,) float32 in the model's own layout.
        buffers: Values for integer entries by name; others stay as they are.

    Raises:
        ValueError: If the length is not the model's.
    """
    state = {name: entry for name, entry in model.state_dict().items() if is_weight(entry)}
    total = sum(entry.numel() for entry in state.values())
    if vector.shape != (total,):
        raise ValueError(f"vector: expected shape ({total},), got {vector.shape}")
    source = torch.from_numpy(vector) if vector.flags.writeable else torch.from_numpy(vector.copy())
    start = 0
    with torch.no_grad():
        for entry in state.values():
            entry.copy_(source[start : start + entry.numel()].view(entry.shape))
            start += entry.numel()
        for name, value in (buffers or {}).items():
            model.state_dict()[name].copy_(torch.from_numpy(np.array(value)))


def split(vector: Vector, layout: Layout) -> dict[str, NDArray[np.float32]]:
    """Return views of a flat vector, one per entry of the layout."""
    ends = np.cumsum(layout.sizes)[:-1]
    parts = np.split(vector, ends)
    return {name: part.reshape(shape) for name, shape, part in zip(layout.names, layout.shapes, parts, strict=True)}


def join(arrays: Mapping[str, NDArray[np.generic]], layout: Layout) -> Vector:
    """Return named arrays as one (D,) float32 vector in the layout's order."""
    return np.concatenate([np.asarray(arrays[name], dtype=np.float32).reshape(-1) for name in layout.names])


def sha256(vector: Vector) -> str:
    """Return the SHA-256 of a vector's little-endian float32 bytes, in hex."""
    return hashlib.sha256(np.ascontiguousarray(vector, dtype="<f4").tobytes()).hexdigest()


def misfit(weights: Mapping[str, NDArray[Any]], layout: Layout) -> str:
    """Return what is wrong with a reply's names and shapes, or the empty string."""
    missing = [name for name in layout.names if name not in weights]
    strange = [name for name in weights if name not in layout.names]
    if missing or strange:
        return f"arrays do not fit the model: missing {missing[:3]}, unknown {strange[:3]}"
    wrong = [
        f"'{name}' must be {shape}, got {weights[name].shape}"
        for name, shape in zip(layout.names, layout.shapes, strict=True)
        if weights[name].shape != shape
    ]
    return f"arrays do not fit the model: {'; '.join(wrong[:3])}" if wrong else ""
