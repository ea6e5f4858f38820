"""One hash of all samples: files of the same name may hold other data tomorrow."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedbd.types import Dataset, Samples


def digest(dataset: Dataset) -> str:
    """Return the SHA-256 of all images, labels and groups, in hex; 0.1 s for CIFAR-10."""
    groups = [] if dataset.groups is None else [dataset.groups]
    return _hashed(str(dataset.classes), [*_arrays(dataset.train), *_arrays(dataset.test), *groups])


def samples_digest(samples: Samples) -> str:
    """Return the SHA-256 of images and labels in their order, in hex."""
    return _hashed("", _arrays(samples))


def _arrays(samples: Samples) -> list[NDArray[Any]]:
    return [tensor.cpu().numpy() for tensor in (samples.images, samples.labels)]


def _hashed(head: str, arrays: Iterable[NDArray[Any]]) -> str:
    found = hashlib.sha256(head.encode())
    for array in arrays:
        found.update(f"{array.dtype} {array.shape}".encode())
        found.update(np.ascontiguousarray(array).data)
    return found.hexdigest()
