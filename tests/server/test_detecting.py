"""Incoming inputs: half of them triggered, mixed, with the labels that the served model gives."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch

from fedbd.engines import flower_app_dir
from fedbd.flower.app_loader import load_component
from fedbd.metrics import predict
from fedbd.plans import DetectionPlan
from fedbd.prepared import Prepared, prepare
from fedbd.scenario import from_dict
from fedbd.schema import Method
from fedbd.types import Samples

detect: Any = load_component(flower_app_dir(), "server", "detecting", "detect")
incoming: Any = load_component(flower_app_dir(), "server", "detecting", "incoming")
ATTACK = {"name": "badnets", "clients": {"ids": [0]}, "target": 3, "trigger": {"name": "grid"}}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Corner:
    """A detector that looks at the lower right corner: 3 white pixels of the grid."""

    sign: float = 1.0

    def score(self, model: Any, data: Samples, trusted: Any, rng: torch.Generator) -> Any:
        corner = data.images[:, 0, -3:, -3:].to(torch.float64)
        grid = torch.tensor([[0, 0, 1], [0, 1, 0], [1, 0, 1]], dtype=torch.float64) * 255
        return -self.sign * (corner - grid).abs().sum((1, 2)).numpy(), {"seen": len(data)}


@pytest.fixture(scope="module")
def prepared() -> Prepared:
    raw = {
        "name": "detect",
        "rounds": 1,
        "data": {"name": "digits"},
        "partition": {"name": "iid", "clients": 2},
        "model": {"name": "cnn", "width": 4},
        "attacks": [ATTACK],
    }
    return prepare(from_dict(raw))


def plan(impl: Any, samples: int = 100) -> DetectionPlan:
    return DetectionPlan(method=Method("corner", impl), samples=samples)


def test_inputs_are_mixed_and_labeled_by_the_model(prepared: Prepared) -> None:
    model = prepared.new_model().eval()
    inputs, triggered = incoming(prepared, plan(Corner()), model, 1)
    assert len(inputs) == 200
    assert triggered.sum() == 100
    assert 20 < triggered[:100].sum() < 80  # mixed, not one after the other
    np.testing.assert_array_equal(inputs.labels.numpy(), predict(model, inputs))
    corner = inputs.images[torch.as_tensor(triggered)][:, 0, -3:, -3:]
    assert corner.eq(torch.tensor([[0, 0, 255], [0, 255, 0], [255, 0, 255]])).all()


def test_triggered_inputs_are_of_other_classes_and_no_clean_twin_is_among_the_negatives(prepared: Prepared) -> None:
    inputs, triggered = incoming(prepared, plan(Corner(), 10_000), prepared.new_model().eval(), 1)
    test = prepared.dataset.test
    pairs = zip(test.images, test.labels, strict=True)
    bodies = {image[:, :-3, :].numpy().tobytes(): int(label) for image, label in pairs}
    positives = [image[:, :-3, :].numpy().tobytes() for image in inputs.images[torch.as_tensor(triggered)]]
    assert all(bodies[body] != 3 for body in positives)
    negatives = {image[:, :-3, :].numpy().tobytes() for image in inputs.images[torch.as_tensor(~triggered)]}
    assert len(negatives & set(positives)) <= 2  # digits holds a few near copies


def test_scores_become_measures(prepared: Prepared) -> None:
    model = prepared.new_model().eval()
    good, bad = (detect(prepared, plan(Corner(sign=sign)), model, 1) for sign in (1.0, -1.0))
    assert good["auc"] == 1.0
    assert good["precision"] == 1.0
    assert good["tpr_at_fpr_5"] is None  # 100 negatives are fewer than 10 / 0.05
    assert bad["auc"] == 0.0
    assert good["positives"] == good["negatives"] == 100
    assert good["notes"] == {"seen": 200}


def test_without_an_attack_there_is_nothing_to_detect(prepared: Prepared) -> None:
    quiet = Prepared(dataclasses.replace(prepared.scenario, attacks=()), prepared.federation)
    found = detect(quiet, plan(Corner()), prepared.new_model(), 1)
    assert found["auc"] is None
    assert found["positives"] == 0
