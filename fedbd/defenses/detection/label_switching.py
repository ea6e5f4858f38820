"""Label switching: how unusually an input changes its class from one activation space to the next.

Z. Katzir, Y. Elovici, "Detecting Adversarial Perturbations Through Spatial Behavior in Activation Spaces", IJCNN 2019,
https://arxiv.org/abs/1811.09043. One of the four detectors that K. Jin, T. Zhang, C. Shen, Y. Chen, M. Fan, C. Lin,
T. Liu, "Can We Mitigate Backdoor Attack Using Adversarial Detection Methods?", IEEE TDSC 2022,
https://arxiv.org/abs/2006.14871, turn on backdoors; they published no code for it.

From the paper's abstract: one k-nearest-neighbor classifier per activation space, built from clean examples; an input's
sequence of their labels; the prior probability of a label change between one activation space and another; the
likelihood of the sequence.

Differs from the paper: only its abstract could be checked, so the rest is fedbd's own reading.

- The spaces are the model's declared taps, the classifier's input and the logits, with maps averaged per channel by
  default; the paper takes every layer.
- Switches are counted between successive spaces and taken as independent, with one more of each outcome than was seen
  (Laplace), so that no probability is 0.
- Classifiers are built from one part of the trusted set and switches counted on the other: an image is its own nearest
  neighbor where it was learned.
- k, and that ties of the vote go to the nearer neighbors.
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
    need_classes,
    read_spaces,
    spaces,
    squared_distances,
    trusted_parts,
    vectors,
)
from fedbd.defenses.sound_model import need_scorable, need_sound
from fedbd.errors import refusal
from fedbd.method_fields import checks_fields
from fedbd.types import Notes, Samples, TrustedData

Likelihood = Literal["switch", "labels"]


def nearest_labels(squared: Tensor, owners: Tensor, neighbors: int) -> NDArray[np.int64]:
    """Return each point's label by the vote of its nearest neighbors; ties go to the nearer ones.

    Args:
        squared: (N, M) distances, squared or not.
        owners: (M,) int64 labels.
        neighbors: k <= M.

    Returns:
        (N,) int64.
    """
    near = owners[squared.topk(neighbors, dim=1, largest=False, sorted=True).indices]
    # The bonuses of all ranks together stay below one vote.
    bonus = torch.arange(neighbors, 0, -1, dtype=torch.float64) / (neighbors * (neighbors + 1))
    votes = torch.zeros(len(near), int(owners.max()) + 1, dtype=torch.float64)
    votes.scatter_add_(1, near, (1 + bonus).expand(near.shape))
    return votes.argmax(1).numpy().astype(np.int64, copy=False)


def transition_costs(labels: NDArray[np.int64], classes: int, likelihood: Likelihood) -> NDArray[np.float64]:
    """Return minus the log probability of every step, as clean sequences have it.

    Args:
        labels: (N, S) label sequences of clean images.
        classes: Number of classes.
        likelihood: ``switch``: a step is a change of label or none. ``labels``: it is the next label given the present.

    Returns:
        (S - 1, classes, classes) float64: per step, from label, to label.
    """
    steps = labels.shape[1] - 1
    costs = np.empty((steps, classes, classes))
    for step in range(steps):
        now, then = labels[:, step], labels[:, step + 1]
        if likelihood == "switch":
            switched = (np.count_nonzero(now != then) + 1) / (len(labels) + 2)
            costs[step] = -np.log(switched)
            np.fill_diagonal(costs[step], -np.log1p(-switched))
        else:
            counts = np.ones((classes, classes))
            np.add.at(counts, (now, then), 1)
            costs[step] = -np.log(counts / counts.sum(1, keepdims=True))
    return costs


def sequence_costs(labels: NDArray[np.int64], costs: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return minus the log likelihood of (N, S) label sequences, (N,) float64, by the costs of their S - 1 steps."""
    total: NDArray[np.float64] = costs[np.arange(len(costs)), labels[:, :-1], labels[:, 1:]].sum(1)
    return total


@dataclass(frozen=True, kw_only=True)
@checks_fields
class LabelSwitching:
    """Scores an input by how unlikely its sequence of labels through the activation spaces is for a clean image.

    Attributes:
        neighbors: k of each space's classifier.
        pool: ``average``: a map becomes its channels' means. ``flat``: all its values.
        components: Most principal components of a space that are kept (of the trusted images); None keeps the space.
        likelihood: ``switch``: the probability that the label changes at all, per step, as in the abstract. ``labels``:
            that it becomes this label from that one, which needs many trusted images.
    """

    neighbors: Annotated[int, Ge(1)] = 5
    pool: Pool = "average"
    components: Annotated[int, Ge(1)] | None = None
    likelihood: Likelihood = "switch"

    @property
    def needs_trusted(self) -> bool:
        """Classifiers and probabilities come from clean images."""
        return True

    @property
    def fewest_trusted(self) -> int:
        """Trusted images to fit that it takes at least."""
        return self.neighbors

    def refusal(self, model: nn.Module) -> str | None:
        """Return why a model cannot be looked into, None if it can: a run asks before it starts."""
        return refusal(lambda: spaces(model, "label_switching"))

    def score(
        self, model: nn.Module, data: Samples, trusted: TrustedData | None, rng: torch.Generator
    ) -> tuple[NDArray[np.float64], Notes]:
        """Score samples.

        Args:
            model: Declares ``taps`` and ``classifier``; left untouched.
            data: Only the images are read.
            trusted: The spaces' classifiers know ``fit``; the probabilities are counted on ``validate``.
            rng: Not used.

        Returns:
            (N,) float64, minus the log likelihood, and notes: ``spaces`` (name, dimensions, accuracy of its classifier
            on the trusted validation images) and ``switches`` (per step the share of validation images and of samples
            whose label changes).

        Raises:
            MethodRefused: Without taps, trusted data or ``neighbors`` trusted images, or if these are of one class.
        """
        trusted = trusted_parts(trusted, "label_switching", self.neighbors)
        need_sound(model, "label_switching", trusted.fit, trusted.classes)
        need_scorable(model, "label_switching", data)
        need_classes(trusted.fit, "label_switching")
        places, reads, points = self._spaces(model, trusted.fit)
        owners = trusted.fit.labels.cpu()
        sequences = []
        for images in (trusted.validate, data):
            found = read_spaces(model, places, images, reads, "label_switching")
            pairs = zip(found, points, strict=True)
            labels = [nearest_labels(squared_distances(a, b), owners, self.neighbors) for a, b in pairs if len(a)]
            sequences.append(np.stack(labels, axis=1) if labels else np.empty((0, len(places)), dtype=np.int64))
        clean, own = sequences
        classes = max(trusted.classes, int(owners.max()) + 1)
        scores = sequence_costs(own, transition_costs(clean, classes, self.likelihood))
        right = (clean == trusted.validate.labels.cpu().numpy()[:, None]).mean(0)
        notes: Notes = {
            "spaces": [
                {"name": place.name, "dimensions": part.shape[1], "accuracy": float(share)}
                for place, part, share in zip(places, points, right, strict=True)
            ],
            "switches": {"validation": _switches(clean), "samples": _switches(own)},
        }
        return scores, notes

    def _spaces(self, model: nn.Module, images: Samples) -> tuple[list[Space], list[Read], list[Tensor]]:
        """Return the distinct spaces, how each is read, and the images' (M, D) points in them."""
        places = spaces(model, "label_switching")
        read = vectors(self.pool)
        points = read_spaces(model, places, images, [read] * len(places), "label_switching")
        kept = distinct(points)
        if self.components is None:
            return [places[i] for i in kept], [read] * len(kept), [points[i] for i in kept]
        projections = [_principal(points[i], self.components) for i in kept]
        reads = [_after(read, project) for project in projections]
        return (
            [places[i] for i in kept],
            reads,
            [project(points[i]) for i, project in zip(kept, projections, strict=True)],
        )


def _principal(points: Tensor, components: int) -> Read:
    """Return the projection onto the first principal components of (M, D) points."""
    center = points.to(torch.float64).mean(0)
    axes = torch.linalg.svd(points.to(torch.float64) - center, full_matrices=False).Vh[:components].T
    return lambda values: (values.to(torch.float64) - center.to(values.device)) @ axes.to(values.device)


def _after(read: Read, project: Read) -> Read:
    return lambda out: project(read(out))


def _switches(labels: NDArray[np.int64]) -> list[float] | None:
    return (labels[:, 1:] != labels[:, :-1]).mean(0).tolist() if len(labels) else None
