"""Activation clustering: a label's samples fall into two clusters, and the small one is poison.

B. Chen, W. Carvalho, N. Baracaldo, H. Ludwig, B. Edwards, T. Lee, I. Molloy, B. Srivastava, "Detecting Backdoor Attacks
on Deep Neural Networks by Activation Clustering", SafeAI at AAAI 2019, https://arxiv.org/abs/1811.03728.

Differs from the paper:

- The paper calls clusters poisoned, by their relative size, their silhouette, or by training without them. Here each
  sample gets a continuous score, fedbd's own, made of the first two (see ``ActivationClustering``); training anew is
  not offered.
- With two clusters of equal right, size is all that tells which is poison: where poison is the majority of a label,
  as it may be among incoming inputs, the score points at the clean samples. ``suspect: excess``, which the paper does
  not have, compares with trusted samples instead.
- The paper finds ICA better than PCA. FastICA whitens and then rotates, and k-means and silhouette see distances alone,
  which a rotation keeps: ``ica`` whitens and leaves the rotation out, which gives the same clusters.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
import torch
from annotated_types import Ge
from numpy.typing import NDArray
from torch import nn

from fedbd.defenses.detection.activation_spaces import ends
from fedbd.defenses.detection.spectral_signatures import Matrix, label_rows, penultimate_features
from fedbd.defenses.sound_model import need_scorable
from fedbd.defenses.trusted_data import required
from fedbd.errors import MethodRefused, refusal
from fedbd.method_fields import checks_fields
from fedbd.types import Notes, Samples, TrustedData

METHOD = "activation_clustering"

TIE = 1e-3
"""How much the place between the two centers counts beside the verdict on the clusters: it orders what ties there."""

STARTS = 10
"""Starts of k-means."""

SILHOUETTE = 5000
"""Samples of a label from which on the silhouette is taken of so many drawn ones: its cost grows as their square."""

NEGLIGIBLE = 1e-6
"""Singular values below this share of the largest are rounding of float32 features: whitening would blow them up."""


@dataclass(frozen=True)
class Reduction:
    """A map of features to few components.

    Attributes:
        mean: (D,) float64.
        axes: (D, components) float64; features minus mean times this.
    """

    mean: Matrix
    axes: Matrix

    def apply(self, features: Matrix) -> Matrix:
        """Return (N, components) of (N, D)."""
        reduced: Matrix = (features - self.mean) @ self.axes
        return reduced


def fit_reduction(features: Matrix, reduce: Literal["ica", "pca"], components: int) -> Reduction | None:
    """Return the reduction of a label's features to their first principal components, with ``ica`` of unit variance.

    Args:
        features: (N, D) float64.
        reduce: ``ica`` or ``pca``.
        components: The most components; there are no more than the features vary in.

    Returns:
        The reduction, or None where all features are the same.
    """
    mean = features.mean(0)
    _, values, directions = np.linalg.svd(features - mean, full_matrices=False)
    scale = np.abs(features).max() * np.sqrt(len(features))
    count = min(components, int(np.count_nonzero(values > NEGLIGIBLE * max(values[0], scale))))
    if count == 0:
        return None
    axes = directions[:count].T
    return Reduction(mean, axes if reduce == "pca" else axes * (np.sqrt(len(features)) / values[:count]))


@dataclass(frozen=True, kw_only=True)
@checks_fields
class ActivationClustering:
    """Scores a sample by whether it is in the suspicious one of its label's two clusters, and how suspicious that is.

    A member of the suspicious cluster scores ``weight * max(silhouette, 0)``, any other sample 0, both plus ``TIE``
    times ``(a - b) / (a + b)`` with ``a`` its distance to the center of the other cluster and ``b`` to that of the
    suspicious one. Samples of labels that are not judged score 0.

    Attributes:
        suspect: Which cluster is suspicious. ``smaller``: the one with fewer samples; the weight is 1 minus its share
            of the label. ``excess``: the one with the larger surplus of its share of the label's samples over its share
            of the trusted samples of the label; the weight is that surplus. Labels without trusted samples are then not
            judged.
        reduce: ``ica``, as in the paper: components of unit variance. ``pca``: components as they are.
        components: The most components that activations are reduced to (10 in the paper).
        minimum: Fewest samples of a label that are judged.
    """

    suspect: Literal["smaller", "excess"] = "smaller"
    reduce: Literal["ica", "pca"] = "ica"
    components: Annotated[int, Ge(1)] = 10
    minimum: Annotated[int, Ge(3)] = 20

    @property
    def needs_trusted(self) -> bool:
        """Only to see which cluster is in excess."""
        return self.suspect == "excess"

    @property
    def needs_classes(self) -> bool:
        """Labels without trusted samples are not judged; one may do."""
        return False

    def refusal(self, model: nn.Module) -> str | None:
        """Return why a model cannot be looked into, None if it can: a run asks before it starts."""
        return refusal(lambda: ends(model, METHOD))

    def score(
        self, model: nn.Module, data: Samples, trusted: TrustedData | None, rng: torch.Generator
    ) -> tuple[NDArray[np.float64], Notes]:
        """Score samples; their order does not matter.

        Args:
            model: Declares ``classifier``; left untouched.
            data: The samples with their labels as given or, for incoming inputs, as ``model`` predicts them.
            trusted: ``fit`` is compared with in ``suspect: excess``; else not used.
            rng: Draws the starts of k-means.

        Returns:
            (N,) float64, from -0.001 to 1.001, higher is more suspicious, and notes: ``labels`` (per judged label
            ``samples``, ``share`` of the suspicious cluster, ``silhouette``, ``weight``) and ``not_judged`` (labels
            with too few samples, all the same, or without trusted samples).

        Raises:
            MethodRefused: Without a classifier, without a label that has ``minimum`` samples, or without the trusted
                samples that ``suspect: excess`` needs.
        """
        need_scorable(model, METHOD, data)
        clean = self._trusted_features(model, trusted)
        features = penultimate_features(model, data, METHOD)
        enough, left = label_rows(data.labels.cpu().numpy(), self.minimum, METHOD)
        scores = np.zeros(len(data), dtype=np.float64)
        judged: Notes = {}
        for label, mine in enough.items():
            seed = int(torch.randint(2**31 - 1, (1,), generator=rng))
            rows = mine[np.lexsort(features[mine].T)]  # else the starts would depend on the order of the samples
            reference = None if clean is None else clean.get(label)
            found = None
            if clean is None or reference is not None:
                found = self._judge(features[rows], reference, seed)
            if found is None:
                left.append(label)
            else:
                scores[rows], judged[str(label)] = found
        if clean is not None and not set(enough) & set(clean):
            raise MethodRefused(f"{METHOD}: no label to judge has trusted samples; raise trusted.size")
        return scores, {"labels": judged, "not_judged": sorted(left)}

    def _trusted_features(self, model: nn.Module, trusted: TrustedData | None) -> dict[int, Matrix] | None:
        """Return the trusted samples' features by class, None where they are not asked for."""
        if self.suspect == "smaller":
            return None
        fit = required(trusted, METHOD, "compares with", several=self.needs_classes).fit
        features, labels = penultimate_features(model, fit, METHOD), fit.labels.cpu().numpy()
        return {int(label): features[labels == label] for label in np.unique(labels)}

    def _judge(self, features: Matrix, reference: Matrix | None, seed: int) -> tuple[Matrix, Notes] | None:
        """Return the scores of one label's samples and its notes, or None where all are the same."""
        reduction = fit_reduction(features, self.reduce, self.components)
        if reduction is None:
            return None
        points = reduction.apply(features)
        members, centers, silhouette = two_clusters(points, seed)
        shares = np.bincount(members, minlength=2) / len(members)
        weights = 1.0 - shares
        if reference is not None:
            nearest = distances(reduction.apply(reference), centers).argmin(1)
            weights = shares - np.bincount(nearest, minlength=2) / len(nearest)
        suspect = int(weights.argmax())
        apart = distances(points, centers)
        other, own = apart[:, 1 - suspect], apart[:, suspect]
        verdict = (members == suspect) * weights[suspect] * max(silhouette, 0.0)
        notes: Notes = {
            "samples": len(members),
            "share": float(shares[suspect]),
            "silhouette": silhouette,
            "weight": float(weights[suspect]),
        }
        return verdict + TIE * (other - own) / (other + own), notes


def two_clusters(points: Matrix, seed: int) -> tuple[NDArray[np.int64], Matrix, float]:
    """Cluster points by k-means with two centers.

    Args:
        points: (N, C) float64, at least three and not all the same.
        seed: Of the starts.

    Returns:
        Each point's cluster, (N,) int64 of 0 and 1, the centers, (2, C) float64, and the mean silhouette in [-1, 1].
    """
    # A second and 60 MB that a process without this detector would pay.
    from sklearn.cluster import KMeans  # noqa: PLC0415
    from sklearn.metrics import silhouette_score  # noqa: PLC0415

    fitted = KMeans(2, n_init=STARTS, random_state=seed).fit(points)
    members = fitted.labels_.astype(np.int64)
    few = SILHOUETTE if len(points) > SILHOUETTE and np.bincount(members).min() > len(points) / 100 else None
    silhouette = float(silhouette_score(points, members, sample_size=few, random_state=seed))
    return members, fitted.cluster_centers_, silhouette


def distances(points: Matrix, centers: Matrix) -> Matrix:
    """Return Euclidean distances, (N, 2) float64, of (N, C) points to (2, C) centers."""
    apart: Matrix = np.linalg.norm(points[:, None] - centers[None], axis=2)
    return apart
