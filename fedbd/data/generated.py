"""A synthetic data set that a small network can learn: for tests and demonstrations, in no need of a file.

Each class has a smooth random picture of its own; a sample is that picture, weakened by ``difficulty``, in white noise.
So the best classifier is known: the class whose picture is nearest. It is no stand-in for real images.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from annotated_types import Ge, Le
from numpy.typing import NDArray

from fedbd.data.cache import cached
from fedbd.data.checks import Arrays, describe, to_dataset
from fedbd.errors import DataError, Problem
from fedbd.method_fields import checks_fields
from fedbd.records.environment import memory
from fedbd.types import Dataset

NOISE, SIGNAL, HAND = 40.0, 40.0, 12.0
"""Standard deviations in gray levels: of the noise, of a class's picture at difficulty 0, of a group's own picture."""

LABEL, PICTURE = 24, 24
"""Bytes that a label, and a pixel of a class's or group's picture, take while they are drawn."""

PURPOSE = 20261127
Positive = Annotated[int, Ge(1)]


@dataclass(frozen=True, kw_only=True)
@checks_fields
class Generated:
    """Smooth random pictures, one for each class, in noise.

    Attributes:
        classes: Number of classes; labels are dealt in turn, so that all have equally many samples, give or take one.
        samples: Training samples.
        test_samples: Test samples.
        shape: Channels (1 or 3), height and width.
        difficulty: 0: the classes are told apart nearly always; 1: by chance only.
        groups: So many writers, to whom the training samples are dealt at random, each with a hand of his own (a faint
            picture that lies over all his samples): clients for partition ``natural``; null: none.
        seed: Decides the pictures and the noise. It belongs to the data set: the scenario's seed does not change it.
    """

    classes: Annotated[int, Ge(2)] = 10
    samples: Annotated[int, Ge(2)] = 2000
    test_samples: Positive = 500
    shape: tuple[Positive, ...] = (1, 16, 16)
    difficulty: Annotated[float, Ge(0), Le(1)] = 0.3
    groups: Positive | None = None
    seed: Annotated[int, Ge(0)] = 0

    @property
    def has_groups(self) -> bool:
        """Whether the data set gets a column of groups."""
        return self.groups is not None

    def problems(self) -> list[tuple[str, str]]:
        """Return what is wrong between the fields."""
        found = []
        if len(self.shape) != 3:
            found.append(("shape", f"must be three numbers, channels, height and width, got {len(self.shape)}"))
        elif self.shape[0] not in (1, 3):
            found.append(("shape", f"must begin with 1 or 3 channels, got {self.shape[0]}"))
        if self.samples < self.classes:
            found.append(("samples", f"must be at least the number of classes, {self.classes}, got {self.samples}"))
        if self.groups is not None and self.groups > self.samples:
            found.append(("groups", f"must be at most the number of samples, {self.samples}, got {self.groups}"))
        return found

    def load(self, root: Path | None) -> Dataset:
        """Return the data set; ``root`` is not used.

        Raises:
            DataError: If this machine has too little memory for it.
        """
        fields: dict[str, Any] = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return to_dataset(cached("generated", fields | {"numpy": np.__version__}, [], self._make))

    def _refuse_too_much(self) -> None:
        """Refuse more than fits into memory: past it the process would be killed, without a word."""
        count, pixels = self.samples + self.test_samples, math.prod(self.shape)
        pictures = self.classes + (self.groups or 0)
        needed = count * (pixels + LABEL) + pictures * pixels * PICTURE
        if needed > memory():
            expected = f"must fit into this machine's memory of {memory() / 1e9:,.1f} GB"
            got = f"{needed / 1e9:,.1f} GB ({count:,} images of {describe(self.shape)}, {self.classes:,} classes)"
            remedy = "lower data.samples, data.test_samples, data.classes, data.groups or data.shape"
            raise DataError([Problem(path="data", expected=expected, got=got, remedy=remedy)])

    def _make(self) -> Arrays:
        self._refuse_too_much()
        rng = np.random.Generator(np.random.PCG64([PURPOSE, self.seed]))
        faces = SIGNAL * (1 - self.difficulty) * _smooth(self.classes, self.shape, rng)
        hands = HAND * _smooth(self.groups or 0, self.shape, rng)
        arrays: Arrays = {}
        for part, count in (("train", self.samples), ("test", self.test_samples)):
            labels = rng.permutation(np.arange(count) % self.classes).astype(np.int64)
            images = np.empty((count, *self.shape), np.uint8)
            groups = None
            if part == "train" and self.groups is not None:
                groups = arrays["train_groups"] = rng.permutation(np.arange(count) % self.groups).astype(np.int64)
            for row, label in enumerate(labels):  # one by one: memory for one sample, whatever their number
                signal = faces[label] if groups is None else faces[label] + hands[groups[row]]
                pixels = 128 + signal + NOISE * rng.standard_normal(self.shape, dtype=np.float32)
                images[row] = np.rint(pixels).clip(0, 255).astype(np.uint8)
            arrays |= {f"{part}_images": images, f"{part}_labels": labels}
        return arrays


def _smooth(count: int, shape: tuple[int, ...], rng: np.random.Generator) -> NDArray[np.float64]:
    """Return random pictures of low frequency, each of mean 0 and standard deviation 1 (of one pixel: all 0)."""
    channels, height, width = shape
    vertical, horizontal = (np.cos(np.pi * np.outer(np.arange(4), (np.arange(n) + 0.5) / n)) for n in (height, width))
    weights = rng.standard_normal((count, channels, 4, 4))
    pictures: NDArray[np.float64] = np.einsum("ncij,ih,jw->nchw", weights, vertical, horizontal)
    pictures -= pictures.mean(axis=(1, 2, 3), keepdims=True)
    deviation = pictures.std(axis=(1, 2, 3), keepdims=True)
    return pictures / np.where(deviation > 0, deviation, 1)
