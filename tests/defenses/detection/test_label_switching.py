from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA
from sklearn.neighbors import KNeighborsClassifier
from threadpoolctl import threadpool_limits
from torch import Tensor, nn

from fedbd.defenses.detection.label_switching import (
    LabelSwitching,
    nearest_labels,
    sequence_costs,
    transition_costs,
)
from fedbd.errors import MethodRefused
from fedbd.models.taps import penultimate, readings
from fedbd.types import Samples, TrustedData


def generator(seed: int = 3) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_neighbors_vote_and_ties_go_to_the_nearer() -> None:
    owners = torch.tensor([2, 2, 0, 1, 1])
    squared = torch.tensor([[1.0, 5.0, 2.0, 3.0, 4.0], [3.0, 4.0, 1.0, 5.0, 2.0]])
    assert nearest_labels(squared, owners, 1).tolist() == [2, 0]
    assert nearest_labels(squared, owners, 3).tolist() == [2, 0]  # three labels, one vote each
    assert nearest_labels(squared, owners, 4).tolist() == [1, 2]  # two votes beat two single nearer ones
    # From near to far 0, 2, 2, 1, 1 and 0, 1, 1, 2, 2: two votes each for 1 and 2.
    assert nearest_labels(squared[:1], torch.tensor([0, 1, 2, 2, 1]), 5).tolist() == [2]
    assert nearest_labels(squared[:1], torch.tensor([0, 2, 1, 1, 2]), 5).tolist() == [1]


def test_step_costs_by_hand() -> None:
    labels = np.array([[0, 0, 1], [1, 1, 1], [0, 1, 0], [1, 1, 0]])
    switch = transition_costs(labels, 3, "switch")
    # One change of four at the first step, three of four at the second; one more of each outcome.
    assert np.allclose(np.exp(-switch[:, 0, 1]), [2 / 6, 4 / 6])
    assert np.allclose(np.exp(-switch[:, 2, 2]), [4 / 6, 2 / 6])
    by_label = transition_costs(labels, 3, "labels")
    assert np.allclose(np.exp(-by_label[0]), [[2 / 5, 2 / 5, 1 / 5], [1 / 5, 3 / 5, 1 / 5], [1 / 3, 1 / 3, 1 / 3]])
    assert np.allclose(np.exp(-by_label[1, 1]), [3 / 6, 2 / 6, 1 / 6])
    own = np.array([[0, 0, 0], [0, 1, 2]])
    assert np.allclose(np.exp(-sequence_costs(own, switch)), [4 / 6 * 2 / 6, 2 / 6 * 4 / 6])
    assert np.allclose(np.exp(-sequence_costs(own, by_label)), [2 / 5 * 1 / 4, 2 / 5 * 1 / 6])


class Two(nn.Module):
    """Two pixels; the classifier takes them in shifted by a third pixel, which so acts as a trigger."""

    taps, maps, channels, classifier = ("pixels",), "", "", "fc"

    def __init__(self) -> None:
        super().__init__()
        self.pixels, self.fc = nn.Flatten(), nn.Linear(2, 2, bias=False)
        with torch.no_grad():
            self.fc.weight.copy_(torch.eye(2))

    def forward(self, x: Tensor) -> Tensor:
        flat = self.pixels(x)
        out: Tensor = self.fc(flat[:, :2] + torch.tensor([4.0, 0.0]) * flat[:, 2:])
        return out


def two_pixels(rows: list[list[int]], labels: list[int]) -> Samples:
    return Samples(torch.tensor(rows, dtype=torch.uint8)[:, :, None, None], torch.tensor(labels))


def test_an_input_whose_class_turns_late_is_the_suspicious_one() -> None:
    fit = two_pixels(
        [[200, 20, 0], [220, 10, 0], [210, 0, 0], [20, 200, 0], [10, 220, 0], [0, 210, 0]], [0] * 3 + [1] * 3
    )
    validate = two_pixels([[190, 30, 0], [20, 190, 0], [205, 5, 0], [5, 205, 0]], [0, 1, 0, 1])
    data = two_pixels([[205, 25, 0], [25, 205, 0], [25, 205, 100]], [0, 1, 0])
    for likelihood in ("switch", "labels"):
        detector = LabelSwitching(neighbors=3, likelihood=likelihood)  # type: ignore[arg-type]
        scores, notes = detector.score(Two().eval(), data, TrustedData(fit, validate, 2), generator())
        # Spaces: pixels, classifier's input, which is the logits, too. Four clean sequences without a change.
        assert [space["name"] for space in notes["spaces"]] == ["pixels", "penultimate"]
        keep, turn = (5 / 6, 1 / 6) if likelihood == "switch" else (3 / 4, 1 / 4)
        assert np.allclose(scores, -np.log([keep, keep, turn]))
        assert notes["switches"] == {"validation": [0.0], "samples": [pytest.approx(1 / 3)]}
        assert [space["accuracy"] for space in notes["spaces"]] == [1.0, 1.0]


@pytest.mark.parametrize(("pool", "components"), [("average", None), ("flat", None), ("flat", 5), ("average", 1000)])
def test_sequences_are_those_of_scikit_learn(pool: Any, components: int | None, backdoored: Any) -> None:
    model, trusted, data = backdoored.model, backdoored.trusted, backdoored.triggered
    scores, notes = LabelSwitching(neighbors=1, pool=pool, components=components).score(
        model, data, trusted, generator()
    )

    def read(name: str, samples: Samples) -> np.ndarray:
        if name == "penultimate":
            return penultimate(model, samples, "test").numpy()
        out = readings(model, "fc" if name == "logits" else name, samples)
        return (out.mean((2, 3)) if pool == "average" and out.dim() > 2 else out.flatten(1)).double().numpy()

    names = [space["name"] for space in notes["spaces"]]
    assert ("penultimate" in names) == (pool == "flat")
    labels = []
    for samples in (trusted.validate, data):
        columns = []
        for name in names:
            points, own = read(name, trusted.fit), read(name, samples)
            if components is not None and components < points.shape[1]:
                with threadpool_limits(1):
                    projection = PCA(components, svd_solver="full").fit(points)
                points, own = projection.transform(points), projection.transform(own)
            columns.append(KNeighborsClassifier(1).fit(points, trusted.fit.labels.numpy()).predict(own))
        labels.append(np.stack(columns, 1))
    clean, own = labels
    shares = ((clean[:, 1:] != clean[:, :-1]).sum(0) + 1) / (len(clean) + 2)
    switched = own[:, 1:] != own[:, :-1]
    wanted = -np.log(np.where(switched, shares, 1 - shares)).sum(1)
    assert switched.any()
    assert np.isclose(scores, wanted).mean() > 0.99  # a tie of two distances may fall either way


def test_it_refuses_what_it_cannot_do(backdoored: Any) -> None:
    detector, trusted = LabelSwitching(), backdoored.trusted
    assert detector.needs_trusted
    assert detector.refusal(backdoored.model) is None
    assert "`taps`" in (detector.refusal(nn.Linear(2, 2)) or "")
    one = TrustedData(trusted.fit.subset(torch.nonzero(trusted.fit.labels == 1)[:, 0]), trusted.validate, 10)
    few = TrustedData(trusted.fit.subset(torch.arange(4)), trusted.validate, 10)
    for given, reason in [(None, "size: 500"), (one, "all of one"), (few, "needs 5")]:
        with pytest.raises(MethodRefused, match=reason):
            detector.score(backdoored.model, backdoored.clean, given, generator())
