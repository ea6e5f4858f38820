"""One hash of a whole data set: files of the same name may hold other data tomorrow."""

from __future__ import annotations

import hashlib

import numpy as np

from fedbd.types import Dataset


def digest(dataset: Dataset) -> str:
    """Return the SHA-256 of all images, labels and groups, in hex; 0.1 s for CIFAR-10."""
    found = hashlib.sha256(str(dataset.classes).encode())
    parts = [tensor.numpy() for samples in (dataset.train, dataset.test) for tensor in (samples.images, samples.labels)]
    for array in [*parts, *([] if dataset.groups is None else [dataset.groups])]:
        found.update(f"{array.dtype} {array.shape}".encode())
        found.update(np.ascontiguousarray(array).data)
    return found.hexdigest()
