"""Local intrinsic dimensionality: how fast neighbors multiply around an input, layer by layer.

X. Ma, B. Li, Y. Wang, S. M. Erfani, S. Wijewickrema, G. Schoenebeck, D. Song, M. E. Houle, J. Bailey, "Characterizing
Adversarial Subspaces Using Local Intrinsic Dimensionality", ICLR 2018, https://arxiv.org/abs/1801.02613; code
https://github.com/xingjunm/lid_adversarial_subspace_detection. One of the four detectors that K. Jin, T. Zhang,
C. Shen, Y. Chen, M. Fan, C. Lin, T. Liu, "Can We Mitigate Backdoor Attack Using Adversarial Detection Methods?", IEEE
TDSC 2022, https://arxiv.org/abs/2006.14871, turn on backdoors; they published no code for it.

Differs from the paper:

- The paper trains a logistic regression on the layers' estimates of clean, noisy and adversarial inputs. A server has
  no malicious inputs to train on: here each layer's estimate becomes a z-score against clean validation images and
  the score is their mean. That is fedbd's own reading.
- The layers are the model's declared taps, the classifier's input and the logits; the code takes every layer and the
  image itself.
- One random minibatch of clean images is the reference of all inputs; the paper draws one for each minibatch of inputs.
- Not copied from the code: dropping the nearest neighbor of every input, which for inputs outside the minibatch is not
  the input itself. Here only a neighbor at distance 0 is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
import torch
from annotated_types import Ge
from numpy.typing import NDArray
from torch import Tensor, nn

from fedbd.defenses.detection.activation_spaces import (
    Pool,
    Read,
    Space,
    distinct,
    read_spaces,
    spaces,
    squared_distances,
    trusted_parts,
    vectors,
)
from fedbd.defenses.sound_model import need_scorable, need_sound
from fedbd.errors import MethodRefused, refusal
from fedbd.method_fields import checks_fields
from fedbd.types import Notes, Samples, TrustedData

FEWEST_HELD_OUT = 2
"""Of a single image's estimates there is no deviation to count in."""


def local_dimension(distances: NDArray[np.float64], neighbors: int) -> NDArray[np.float64]:
    """Return the maximum likelihood estimate of local intrinsic dimensionality, section 3.2: -1 / mean(log(r_i / r_k)).

    Args:
        distances: (N, M), M >= neighbors, of each point to the reference; a distance of 0 is the point itself and out.
        neighbors: k, how many of the nearest count.

    Returns:
        (N,) float64; infinite where all k are equally far, NaN where fewer than k are at a distance.
    """
    others = np.where(distances > 0, distances, np.inf)
    nearest = np.sort(np.partition(others, neighbors - 1, axis=1)[:, :neighbors], axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        result: NDArray[np.float64] = -1.0 / np.log(nearest / nearest[:, -1:]).mean(axis=1)
    return np.where(np.isinf(nearest[:, -1]), np.nan, np.abs(result))


@dataclass(frozen=True, kw_only=True)
@checks_fields
class LID:
    """Scores an input by its local intrinsic dimensionality among clean images, as z-scores averaged over layers.

    Attributes:
        neighbors: k, nearest neighbors of an estimate; the authors' default.
        reference: At most so many trusted images, drawn at random, in which neighbors are looked for (the authors'
            minibatch); None for all.
        pool: ``flat``: a map is compared value by value, as in the paper. ``average``: by its channels' means.
        direction: ``higher``: a high dimension is suspicious, as in the paper. ``lower``: a low one. ``both``: either,
            the mean of the absolute z-scores.
    """

    neighbors: Annotated[int, Ge(2)] = 20
    reference: Annotated[int, Ge(2)] | None = 100
    pool: Pool = "flat"
    direction: Literal["higher", "lower", "both"] = "higher"

    @property
    def needs_trusted(self) -> bool:
        """Neighbors are clean images."""
        return True

    @property
    def needs_classes(self) -> bool:
        """It reads no labels."""
        return False

    @property
    def fewest_trusted(self) -> int:
        """Trusted images to fit that it takes at least."""
        return self.neighbors

    def problems(self) -> list[tuple[str, str]]:
        """Return what is wrong between the fields."""
        if self.reference is None or self.reference >= self.neighbors:
            return []
        return [("reference", f"must be at least neighbors ({self.neighbors})")]

    def refusal(self, model: nn.Module) -> str | None:
        """Return why a model cannot be looked into, None if it can: a run asks before it starts."""
        return refusal(lambda: spaces(model, "lid"))

    def refusal_on(self, model: nn.Module, trusted: TrustedData) -> str | None:
        """Return why these trusted images have no spread, None if they have: a run asks before it starts."""
        return refusal(lambda: _need_spread(trusted))

    def score(
        self, model: nn.Module, data: Samples, trusted: TrustedData | None, rng: torch.Generator
    ) -> tuple[NDArray[np.float64], Notes]:
        """Score samples.

        Args:
            model: Declares ``taps`` and ``classifier``; left untouched.
            data: Only the images are read.
            trusted: The reference is drawn from ``fit``; ``validate`` gives the estimates' mean and deviation.
            rng: Draws the reference.

        Returns:
            (N,) float64, higher is more suspicious, and notes: ``neighbors``, ``reference`` (images) and ``layers``
            (name, dimensions of the space, the validation images' mean estimate and its deviation, and the samples').

        Raises:
            MethodRefused: Without taps, trusted data, ``neighbors`` trusted images to fit or two to validate, or if a
                layer tells too few of them apart, as those of a collapsed model do.
        """
        trusted = trusted_parts(trusted, "lid", self.neighbors)
        _need_spread(trusted)
        need_sound(model, "lid", trusted.fit, trusted.classes)
        need_scorable(model, "lid", data)
        count = len(trusted.fit) if self.reference is None else min(self.reference, len(trusted.fit))
        chosen = trusted.fit.subset(torch.randperm(len(trusted.fit), generator=rng)[:count])
        places = spaces(model, "lid")
        points = read_spaces(model, places, chosen, [vectors(self.pool)] * len(places), "lid")
        kept = distinct(points)
        places, points = tuple(places[i] for i in kept), [points[i] for i in kept]
        clean = self._estimates(model, trusted.validate, places, points)
        found = self._estimates(model, data, places, points)
        mean, deviation = clean.mean(0), clean.std(0)
        z = (found - mean) / np.where(deviation > 0, deviation, 1.0)
        z = {"higher": z, "lower": -z, "both": np.abs(z)}[self.direction]
        layers = [
            {
                "name": place.name,
                "dimensions": points[i].shape[1],
                "validation_mean": float(mean[i]),
                "validation_deviation": float(deviation[i]),
                "mean": float(found[:, i].mean()) if len(data) else None,
            }
            for i, place in enumerate(places)
        ]
        notes: Notes = {"neighbors": self.neighbors, "reference": count, "layers": layers}
        return z.mean(1), notes

    def _estimates(
        self, model: nn.Module, images: Samples, places: tuple[Space, ...], points: list[Tensor]
    ) -> NDArray[np.float64]:
        """Return (N, layers) estimates."""
        read = vectors(self.pool)

        def distances_to(reference: Tensor) -> Read:
            # Distances, not activations, are kept: flat maps of thousands of images would not fit in memory.
            return lambda out: squared_distances(read(out), reference).sqrt()

        if len(images) == 0:
            return np.empty((0, len(places)))
        distances = read_spaces(model, places, images, [distances_to(part) for part in points], "lid")
        estimates = np.stack([local_dimension(part.numpy(), self.neighbors) for part in distances], axis=1)
        for place, column in zip(places, estimates.T, strict=True):
            if not np.isfinite(column).all():
                reason = f"`{place.name}` tells too few trusted images apart for {self.neighbors} neighbors"
                raise MethodRefused(f"lid: {reason}; the model has collapsed, or trusted.size is too small")
        return estimates


def _need_spread(trusted: TrustedData) -> None:
    count = len(trusted.validate)
    if count < FEWEST_HELD_OUT:
        reason = f"lid compares with the spread of at least {FEWEST_HELD_OUT} trusted images to validate"
        raise MethodRefused(f"{reason} and got {count}; raise trusted.validate_share or trusted.size")
