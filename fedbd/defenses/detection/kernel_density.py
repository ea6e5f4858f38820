"""Kernel density: how common an input's features are among clean images of the class that the model gives it.

R. Feinman, R. R. Curtin, S. Shintre, A. B. Gardner, "Detecting Adversarial Samples from Artifacts", 2017,
https://arxiv.org/abs/1703.00410; code https://github.com/rfeinman/detecting-adversarial-samples. One of the four
detectors that K. Jin, T. Zhang, C. Shen, Y. Chen, M. Fan, C. Lin, T. Liu, "Can We Mitigate Backdoor Attack Using
Adversarial Detection Methods?", IEEE TDSC 2022, https://arxiv.org/abs/2006.14871, turn on backdoors; they published no
code for it.

Differs from the paper:

- The densities stand on the trusted set, not on the training set, which no server of a federation holds.
- The paper joins the density with dropout uncertainty in a logistic regression trained on malicious inputs. Here the
  density alone scores, as there is neither dropout nor anything malicious to train on.
- The authors' bandwidths (1.20 MNIST, 0.26 CIFAR-10, 1.00 SVHN) were tuned for their models by cross-validation. Here
  it is tuned on this model: the one that makes the trusted validation images likeliest.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated

import numpy as np
import torch
from annotated_types import Gt
from numpy.typing import NDArray
from scipy.special import logsumexp
from torch import Tensor, nn

from fedbd.defenses.detection.activation_spaces import (
    ends,
    need_classes,
    read_spaces,
    squared_distances,
    trusted_parts,
    vectors,
)
from fedbd.defenses.sound_model import need_scorable, need_sound
from fedbd.errors import MethodRefused, refusal
from fedbd.method_fields import checks_fields
from fedbd.types import Notes, Samples, TrustedData

FACTORS: tuple[float, ...] = tuple(2.0 ** (step / 4) for step in range(-24, 17))
"""Bandwidths that are tried, in multiples of the trusted features' deviation within their class: 1/64 ... 16."""

Apart = Mapping[int, tuple[NDArray[np.int64], NDArray[np.float64]]]
"""Per class the rows of the inputs that it was given and their squared distances to its trusted features."""


def log_density(squared: NDArray[np.float64], bandwidth: float, dimensions: int) -> NDArray[np.float64]:
    """Return log densities of a Gaussian kernel estimate, computed so that far away they do not all become -inf.

    Args:
        squared: (N, M) squared distances to the M points.
        bandwidth: The kernel's deviation.
        dimensions: D of the space.

    Returns:
        (N,) float64: log of the mean over the points of ``exp(-d^2 / 2 h^2) / (2 pi h^2)^(D/2)``.
    """
    constant = 0.5 * dimensions * math.log(2 * math.pi * bandwidth**2) + math.log(squared.shape[1])
    sums: NDArray[np.float64] = logsumexp(-squared / (2 * bandwidth**2), axis=1)
    return sums - constant


@dataclass(frozen=True, kw_only=True)
@checks_fields
class KernelDensity:
    """Scores an input by minus the log density of its penultimate features among trusted images of its predicted class.

    Attributes:
        bandwidth: Deviation of the Gaussian kernel, the same for all classes; None (default) chooses it: of a grid
            around the features' own deviation, the one with the largest mean log density of the trusted validation
            images, each under its true class.
    """

    bandwidth: Annotated[float, Gt(0)] | None = None

    @property
    def needs_trusted(self) -> bool:
        """The densities stand on clean images."""
        return True

    def refusal(self, model: nn.Module) -> str | None:
        """Return why a model cannot be looked into, None if it can: a run asks before it starts."""
        return refusal(lambda: ends(model, "kernel_density"))

    def refusal_on(self, model: nn.Module, trusted: TrustedData) -> str | None:
        """Return which classes would have no density, None if all have one: a run asks before it starts."""
        there = set(trusted.fit.labels.tolist())
        missing = sorted(set(range(trusted.classes)) - there)
        if not missing or len(there) < 2:  # of a single class, see ``needs_classes``
            return None
        return f"kernel_density: no trusted image to fit is of {_named(missing)}; trust images of every class"

    def score(
        self, model: nn.Module, data: Samples, trusted: TrustedData | None, rng: torch.Generator
    ) -> tuple[NDArray[np.float64], Notes]:
        """Score samples.

        Args:
            model: Declares ``classifier``; left untouched.
            data: Only the images are read; their class is what ``model`` predicts.
            trusted: The densities stand on ``fit``; ``validate`` chooses the bandwidth.
            rng: Not used.

        Returns:
            (N,) float64, higher is more suspicious, and notes: ``bandwidth``, ``bandwidth_chosen`` (whether on
            validation images), ``dimensions``, ``trusted_per_class`` and ``validation_mean`` (mean score of the
            trusted validation images under their true class; None if no class is in both parts).

        Raises:
            MethodRefused: Without a classifier or trusted data, if these are of one class, or if an input is predicted
                as a class that has no trusted image: it has no density.
        """
        trusted = trusted_parts(trusted, "kernel_density", 2)
        need_sound(model, "kernel_density", trusted.fit, trusted.classes)
        need_scorable(model, "kernel_density", data)
        need_classes(trusted.fit, "kernel_density")
        points, _ = self._read(model, trusted.fit)
        held_out, _ = self._read(model, trusted.validate)
        found, out = self._read(model, data)
        predicted = out.argmax(1) if len(data) else torch.empty(0, dtype=torch.int64)
        counts = Counter(trusted.fit.labels.tolist())
        missing = sorted(set(predicted.tolist()) - set(counts))
        if missing:
            reason = f"inputs are predicted as {_named(missing)}, of which no trusted image is there to fit"
            raise MethodRefused(f"kernel_density: {reason}; trust images of every class")
        owners, dimensions = trusted.fit.labels.cpu(), points.shape[1]
        clean = _apart(held_out, trusted.validate.labels.cpu(), points, owners)
        bandwidth = self.bandwidth or _likeliest(clean, points, owners)
        scores = np.empty(len(data))
        for rows, squared in _apart(found, predicted, points, owners).values():
            scores[rows] = -log_density(squared, bandwidth, dimensions)
        notes: Notes = {
            "bandwidth": bandwidth,
            "bandwidth_chosen": self.bandwidth is None,
            "dimensions": dimensions,
            "trusted_per_class": {str(label): counts[label] for label in sorted(counts)},
            "validation_mean": -_mean_log_density(clean, bandwidth, dimensions) if clean else None,
        }
        return scores, notes

    def _read(self, model: nn.Module, images: Samples) -> tuple[Tensor, Tensor]:
        """Return penultimate features (N, D) and logits (N, classes)."""
        features, out = read_spaces(
            model, ends(model, "kernel_density"), images, [vectors("flat")] * 2, "kernel_density"
        )
        return features, out


def _named(classes: Sequence[int]) -> str:
    return f"class{'es' if len(classes) > 1 else ''} {', '.join(map(str, classes))}"


def _apart(features: Tensor, labels: Tensor, points: Tensor, owners: Tensor) -> Apart:
    """Return, per class that has points, how far its inputs are from them."""
    apart = {}
    for label in sorted(set(owners.tolist())):
        rows = torch.nonzero(labels == label)[:, 0]
        if len(rows):
            apart[label] = rows.numpy(), squared_distances(features[rows], points[owners == label]).numpy()
    return apart


def _mean_log_density(apart: Apart, bandwidth: float, dimensions: int) -> float:
    parts = [log_density(squared, bandwidth, dimensions) for _, squared in apart.values()]
    total = sum(float(part.sum()) for part in parts)
    return total / sum(map(len, parts))


def _likeliest(clean: Apart, points: Tensor, owners: Tensor) -> float:
    """Return the bandwidth under which held-out features are likeliest.

    Raises:
        MethodRefused: If nothing is held out of a class with points, or features do not vary within a class.
    """
    if not clean:
        reason = "no class has trusted images both to fit and to validate, so no bandwidth can be chosen"
        raise MethodRefused(f"kernel_density: {reason}; set bandwidth, or raise trusted.size")
    values = points.to(torch.float64)
    within = torch.cat([values[owners == label] - values[owners == label].mean(0) for label in set(owners.tolist())])
    scale = float(within.square().mean().sqrt())
    if scale == 0:
        reason = "the trusted images of a class all have the same features, so no bandwidth can be chosen"
        raise MethodRefused(f"kernel_density: {reason}; set bandwidth, or raise trusted.size")
    dimensions = points.shape[1]
    return max((scale * factor for factor in FACTORS), key=lambda h: _mean_log_density(clean, h, dimensions))
