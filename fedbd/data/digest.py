"""One hash of all samples: files of the same name may hold other data tomorrow."""

from __future__ import annotations

import hashlib

import numpy as np

from fedbd.types import Dataset, Samples


def digest(dataset: Dataset) -> str:
    """Return the SHA-256 of all images, labels and groups, in hex; 0.1 s for CIFAR-10."""
    found = hashlib.sha256(str(dataset.classes).encode())
    parts = [tensor.numpy() for samples in (dataset.train, dataset.test) for tensor in (samples.images, samples.labels)]
    for array in [*parts, *([] if dataset.groups is None else [dataset.groups])]:
        found.update(f"{array.dtype} {array.shape}".encode())
        found.update(np.ascontiguousarray(array).data)
    return found.hexdigest()


def samples_digest(samples: Samples) -> str:
    """Return the SHA-256 of images and labels in their order, in hex."""
    found = hashlib.sha256(str(tuple(samples.images.shape)).encode())
    for tensor in (samples.images, samples.labels):
        found.update(np.ascontiguousarray(tensor.cpu().numpy()).data)
    return found.hexdigest()
