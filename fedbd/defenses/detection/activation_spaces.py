"""Where in a model detectors look, and reading all those places in one pass over the images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fedbd.defenses.trusted_data import there
from fedbd.errors import MethodRefused
from fedbd.metrics import logits
from fedbd.models.taps import declared
from fedbd.types import Samples, TrustedData

Read = Callable[[Tensor], Tensor]
Pool = Literal["flat", "average"]
"""How a map becomes a vector: all its values, or each channel's mean."""


@dataclass(frozen=True)
class Space:
    """A place in a model whose activations are compared.

    Attributes:
        name: What notes call it.
        module: The module's name in the model.
        inputs: What the module takes in, not what it puts out.
    """

    name: str
    module: str
    inputs: bool = False


def ends(model: nn.Module, method: str) -> tuple[Space, Space]:
    """Return what the model's classifier takes in (``penultimate``) and what it puts out (``logits``).

    Raises:
        MethodRefused: If the model declares no ``classifier``.
    """
    classifier = declared(model, "classifier", method)
    return Space("penultimate", classifier, inputs=True), Space("logits", classifier)


def spaces(model: nn.Module, method: str) -> tuple[Space, ...]:
    """Return the model's taps, from input to output, and its two ``ends``.

    Raises:
        MethodRefused: If the model declares no ``taps`` or no ``classifier``.
    """
    return *(Space(tap, tap) for tap in declared(model, "taps", method)), *ends(model, method)


def vectors(pool: Pool) -> Read:
    """Return the function that turns (B, C, ...) activations into (B, D) vectors."""

    def read(out: Tensor) -> Tensor:
        return out.flatten(2).mean(2) if pool == "average" and out.dim() > 2 else out.flatten(1)

    return read


class _Everywhere(nn.Module):
    """A model that returns the readings of several places side by side, in place of its logits."""

    def __init__(self, model: nn.Module, places: Sequence[Space], reads: Sequence[Read]) -> None:
        super().__init__()
        self.model, self.places, self.reads = model, places, reads
        self.widths: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        found: dict[int, Tensor] = {}

        def keep(i: int) -> Callable[..., None]:
            def hook(_: nn.Module, taken: Any, out: Tensor) -> None:
                # A clone: what follows may work in place.
                found[i] = self.reads[i](taken[0] if self.places[i].inputs else out).clone()

            return hook

        handles = [
            self.model.get_submodule(place.module).register_forward_hook(keep(i)) for i, place in enumerate(self.places)
        ]
        try:
            self.model(x)
        finally:
            for handle in handles:
                handle.remove()
        parts = [found[i] for i in range(len(self.places))]
        self.widths = [part.shape[1] for part in parts]
        return torch.cat(parts, 1)


def read_spaces(
    model: nn.Module, places: Sequence[Space], images: Samples, reads: Sequence[Read], method: str
) -> list[Tensor]:
    """Return what a model computes at several places, in eval mode, in one pass.

    Args:
        model: Left untouched, in the mode it was in.
        places: Where to read.
        images: Only their images are read.
        reads: Per place, applied to each chunk's (B, ...) activations; gives (B, D).
        method: Who asks, for the message.

    Returns:
        One (N, D) tensor per place, on the CPU; (0, 0) where there are no images.

    Raises:
        MethodRefused: If a reading is NaN or infinite, as those of a diverged model are.
    """
    if len(images) == 0:
        return [torch.empty(0, 0) for _ in places]
    reader = _Everywhere(model, places, reads)
    # One thread: hooks are registered on the one model, and chunks side by side would read each other's.
    out = logits(reader, images, threads=1)
    parts = list(torch.split(out, reader.widths, dim=1))
    for place, part in zip(places, parts, strict=True):
        if not bool(torch.isfinite(part).all()):
            raise MethodRefused(f"{method}: the activations at `{place.name}` are not finite; the model has diverged")
    return parts


def distinct(parts: Sequence[Tensor]) -> list[int]:
    """Return the indices of readings that are not the same as the one before (a tap may be the classifier's input)."""
    kept = [0]
    for i in range(1, len(parts)):
        before = parts[i - 1]
        if parts[i].shape != before.shape or not torch.allclose(parts[i], before, rtol=1e-5, atol=1e-6):
            kept.append(i)
    return kept


def squared_distances(a: Tensor, b: Tensor) -> Tensor:
    """Return squared Euclidean distances, (N, M) float64, of (N, D) to (M, D) vectors, in any float dtype.

    Vectors that differ by less than 1e-5 of their length are the same up to float32 rounding: 0 apart.
    """
    a, b = a.to(torch.float64), b.to(a.device, torch.float64)
    lengths = (a * a).sum(1)[:, None] + (b * b).sum(1)
    apart = lengths - 2 * (a @ b.T)
    return apart.where(apart > 1e-10 * lengths, 0.0)


def trusted_parts(trusted: TrustedData | None, method: str, fewest: int = 1) -> TrustedData:
    """Return the trusted data.

    Args:
        trusted: What the detector was given.
        method: Who asks, for the message.
        fewest: Images that the part that fits must have at least.

    Raises:
        MethodRefused: If there are none, or too few.
    """
    held = there(trusted, method, "compares with")
    if len(held.fit) < fewest:
        remedy = "hand it more (in a scenario: raise trusted.size)"
        raise MethodRefused(f"{method} needs {fewest} trusted images to fit and there are {len(held.fit)}; {remedy}")
    return held


def need_classes(samples: Samples, method: str) -> None:
    """Check that samples are of more than one class.

    Raises:
        MethodRefused: If they are of one.
    """
    if len(set(samples.labels.tolist())) < 2:
        raise MethodRefused(f"{method} compares classes and the trusted images are all of one; trust several classes")
