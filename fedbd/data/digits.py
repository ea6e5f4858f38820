"""The handwritten digits that scikit-learn ships: the data set that needs no file.

Source: E. Alpaydin, C. Kaynak, "Optical Recognition of Handwritten Digits", UCI Machine Learning Repository, 1998
(https://doi.org/10.24432/C50P49); scikit-learn's ``load_digits`` holds its test part, 1,797 pictures of 8x8.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import numpy as np
from annotated_types import Gt, Lt

from fedbd.data.cache import cached
from fedbd.data.checks import Arrays, to_dataset
from fedbd.data.stratify import stratified
from fedbd.method_fields import checks_fields
from fedbd.types import Dataset

SPLIT_SEED = 1998
"""The split is part of the data set: it does not change with the scenario's seed."""


@dataclass(frozen=True, kw_only=True)
@checks_fields
class Digits:
    """scikit-learn's 1,797 digits, values 0 .. 16 scaled to 0 .. 255 and rounded, split by class with a fixed seed.

    Attributes:
        test_share: Share of the pictures that is kept for the evaluation.
        pixels: Height and width; 16 repeats each pixel 2x2, for triggers and models that need the room.
    """

    test_share: Annotated[float, Gt(0), Lt(1)] = 0.25
    pixels: Literal[8, 16] = 8
    has_groups: ClassVar[bool] = False

    def load(self, root: Path | None) -> Dataset:
        """Return the digits, (N, 1, pixels, pixels); ``root`` is not used."""
        # The cache is not about these 115 kB: a hit spares each worker process the import of scikit-learn (1 s).
        fields = {"test_share": self.test_share, "pixels": self.pixels, "scikit-learn": version("scikit-learn")}
        return to_dataset(cached("digits", fields, [], self._decode))

    def _decode(self) -> Arrays:
        from sklearn.datasets import load_digits  # noqa: PLC0415 - see load

        raw, labels = load_digits(return_X_y=True)
        small = np.rint(raw.reshape(-1, 1, 8, 8) * (255 / 16)).astype(np.uint8)
        images = small.repeat(self.pixels // 8, axis=2).repeat(self.pixels // 8, axis=3)
        labels = labels.astype(np.int64)
        rng = np.random.Generator(np.random.PCG64(SPLIT_SEED))
        test, train = stratified(labels, round(self.test_share * len(labels)), rng)
        return {
            "train_images": images[train],
            "train_labels": labels[train],
            "test_images": images[test],
            "test_labels": labels[test],
        }
