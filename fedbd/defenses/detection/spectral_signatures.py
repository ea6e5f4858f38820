"""Spectral signatures: poison among a label's samples shows along the direction in which their features vary most.

B. Tran, J. Li, A. Madry, "Spectral Signatures in Backdoor Attacks", NeurIPS 2018, https://arxiv.org/abs/1811.00636,
algorithm 1; code https://github.com/MadryLab/backdoor_data_poisoning.

Differs from the paper:

- Every sample gets its score; the paper removes the 1.5 epsilon highest of each label and trains anew.
- The paper squares the projection of the centered feature; its code takes the size of the projection of the feature as
  it is, along the direction found on centered ones (``projected: raw``; squared here, which ranks alike).
- ``center: trusted`` centers on trusted samples of the label instead, which the paper does not have: its own center is
  on the poison where this is the majority, as it may be among incoming inputs.
- The representation is what the model's classifier takes in.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
import torch
from annotated_types import Ge
from numpy.typing import NDArray
from torch import nn

from fedbd.defenses.detection.activation_spaces import ends, read_spaces, vectors
from fedbd.defenses.sound_model import need_scorable
from fedbd.defenses.trusted_data import required
from fedbd.errors import MethodRefused, refusal
from fedbd.method_fields import checks_fields
from fedbd.types import Notes, Samples, TrustedData

METHOD = "spectral_signatures"

Matrix = NDArray[np.float64]


def penultimate_features(model: nn.Module, data: Samples, method: str) -> Matrix:
    """Return what a model's classifier takes in, (N, D) float64.

    Args:
        model: Declares ``classifier``; left untouched.
        data: Only the images are read.
        method: Who asks, for the message.

    Raises:
        MethodRefused: Without a ``classifier``, or if a feature is not finite.
    """
    place, _ = ends(model, method)
    (features,) = read_spaces(model, [place], data, [vectors("flat")], method)
    return features.to(torch.float64).numpy()


def label_rows(labels: NDArray[np.int64], minimum: int, method: str) -> tuple[dict[int, NDArray[np.int64]], list[int]]:
    """Return the rows of each label that has enough samples, by label, and the labels that have fewer.

    Raises:
        MethodRefused: If no label has enough.
    """
    rows = {int(label): np.flatnonzero(labels == label) for label in np.unique(labels)}
    enough = {label: mine for label, mine in rows.items() if len(mine) >= minimum}
    if not enough:
        most = max((len(mine) for mine in rows.values()), default=0)
        raise MethodRefused(
            f"{method} compares samples of one label, wants {minimum} of them, and no label has more than {most}; give "
            "it more samples, or lower minimum"
        )
    return enough, [label for label in rows if label not in enough]


@dataclass(frozen=True, kw_only=True)
@checks_fields
class SpectralSignatures:
    """Scores a sample by its squared projection on the top singular direction of its label's features.

    Attributes:
        center: What features are centered on: ``data``: the mean of the label's samples, as in the paper. ``trusted``:
            the mean of the trusted samples of the label; labels without any are not judged.
        projected: What is projected: the ``centered`` features, as in the paper, or the ``raw`` ones, as in its code.
        minimum: Fewest samples of a label that are judged; samples of labels with fewer score 0.
    """

    center: Literal["data", "trusted"] = "data"
    projected: Literal["centered", "raw"] = "centered"
    minimum: Annotated[int, Ge(2)] = 20

    @property
    def needs_trusted(self) -> bool:
        """Only to center on trusted samples."""
        return self.center == "trusted"

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
        """Score samples.

        Args:
            model: Declares ``classifier``; left untouched.
            data: The samples with their labels as given or, for incoming inputs, as ``model`` predicts them.
            trusted: ``fit`` gives the centers with ``center: trusted``; else not used.
            rng: Not used.

        Returns:
            (N,) float64, at least 0, higher is more suspicious, and notes: ``labels`` (per judged label ``samples`` and
            ``top_share``: what share of the features' sum of squares lies along the direction; null if they are all 0)
            and ``not_judged`` (labels whose samples score 0).

        Raises:
            MethodRefused: Without a classifier, without a label that has ``minimum`` samples, or without the trusted
                samples that ``center: trusted`` needs.
        """
        need_scorable(model, METHOD, data)
        features = penultimate_features(model, data, METHOD)
        labels = data.labels.cpu().numpy()
        centers = self._trusted_centers(model, trusted)
        enough, left = label_rows(labels, self.minimum, METHOD)
        scores = np.zeros(len(data), dtype=np.float64)
        judged: Notes = {}
        for label, mine in enough.items():
            if centers is not None and label not in centers:
                left.append(label)
                continue
            center = features[mine].mean(0) if centers is None else centers[label]
            direction, share = top_direction(features[mine] - center)
            seen = features[mine] - center if self.projected == "centered" else features[mine]
            scores[mine] = np.square(seen @ direction)
            judged[str(label)] = {"samples": len(mine), "top_share": share}
        if not judged:
            raise MethodRefused(f"{METHOD}: no label to judge has trusted samples; raise trusted.size, or center: data")
        return scores, {"labels": judged, "not_judged": sorted(left)}

    def _trusted_centers(self, model: nn.Module, trusted: TrustedData | None) -> dict[int, Matrix] | None:
        """Return the mean feature of the trusted samples of each class, None where they are not asked for."""
        if self.center == "data":
            return None
        fit = required(trusted, METHOD, "centers on", several=self.needs_classes).fit
        features, labels = penultimate_features(model, fit, METHOD), fit.labels.cpu().numpy()
        return {int(label): features[labels == label].mean(0) for label in np.unique(labels)}


def top_direction(centered: Matrix) -> tuple[Matrix, float | None]:
    """Return the top right singular vector of (N, D) rows, (D,), and the share of their sum of squares along it.

    The share is None where all rows are 0.
    """
    _, values, directions = np.linalg.svd(centered, full_matrices=False)
    total = float(np.square(values).sum())
    return directions[0], float(values[0] ** 2 / total) if total > 0 else None
