from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fedbd.defenses.cleanup.trigger_recovery import TriggerRecovery, anomaly_indices
from fedbd.errors import MethodRefused, UserError
from fedbd.metrics import predict
from fedbd.types import Cleanup, Clues, Samples, TrustedData

CLASSES = 6


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(3)


class Rows(nn.Module):
    """Class k is the brightest of six rows of an 6x6 image; with a backdoor the last pixel alone gives class 2."""

    def __init__(self, backdoor: float) -> None:
        super().__init__()
        self.fc = nn.Linear(36, CLASSES)
        self.classifier = "fc"
        with torch.no_grad():
            self.fc.weight.zero_()
            self.fc.bias.zero_()
            for row in range(CLASSES):
                self.fc.weight.view(CLASSES, 6, 6)[row, row] = 5.0
            self.fc.weight[2, -1] += backdoor

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc(x.flatten(1))
        return out


class Always(Rows):
    """Gives class 2 to everything, as an unlearned model does."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 100 * torch.eye(CLASSES)[2]


@pytest.fixture(scope="module")
def trusted() -> TrustedData:
    images = torch.randint(0, 10, (120, 1, 6, 6), generator=generator(), dtype=torch.uint8)
    labels = torch.arange(120) % CLASSES
    images[torch.arange(120), 0, labels] += 150
    images[:, 0, -1, -1] = 0
    data = Samples(images, labels)
    return TrustedData(data.subset(torch.arange(60)), data.subset(torch.arange(60, 120)), CLASSES)


def test_for_the_detected_label(trusted: TrustedData) -> None:
    model = Rows(30.0).eval()
    method = TriggerRecovery(batch_size=16)
    assert isinstance(method, Cleanup)
    assert method.needs_trusted and not method.repairs
    same, clues, notes = method.clean(model, trusted, Clues(target=2), generator())
    assert same is not model
    assert all(torch.equal(a, b) for a, b in zip(same.parameters(), model.parameters(), strict=True))
    json.dumps(notes, allow_nan=False)
    assert clues.trigger is not None and clues.target == notes["target"] == 2
    others = trusted.validate.subset(torch.nonzero(trusted.validate.labels != 2)[:, 0])
    share = (predict(model, others, stamp=clues.trigger.stamp) == 2).mean()
    assert notes["success"] == notes["success_on_model"] == pytest.approx(share)
    assert share > 0.9
    assert notes["success_without"] == 0
    assert notes["size"] == pytest.approx(36 * notes["size_share"])
    clean_notes = method.clean(Rows(0.0).eval(), trusted, Clues(target=2), generator())[2]
    assert clean_notes["size"] > 2 * notes["size"]


def test_all_labels_declare_the_planted_one_by_its_index(trusted: TrustedData) -> None:
    method = TriggerRecovery(labels="all", batch_size=16, passes=50)
    _, clues, notes = method.clean(Rows(30.0).eval(), trusted, Clues(target=5), generator())
    assert notes["acted"]
    assert notes["declared"] == [2]
    assert clues.target == 2
    assert [one["label"] for one in notes["searched"]] == list(range(CLASSES))
    assert notes["anomaly_index"] == notes["searched"][2]["anomaly_index"] > 2
    bar = TriggerRecovery(labels="all", batch_size=16, passes=50, declare_at=1e6)
    given = Clues(target=5)
    _, clues, notes = bar.clean(Rows(30.0).eval(), trusted, given, generator())
    assert clues is given
    assert notes["acted"] is False
    assert "outlier" in notes["reason"]


def test_a_trigger_that_only_the_unlearned_model_obeys_is_not_handed_on(trusted: TrustedData) -> None:
    given = Clues(target=2, unlearned=Always(0.0).eval())
    _, clues, notes = TriggerRecovery(on="unlearned").clean(Rows(30.0).eval(), trusted, given, generator())
    assert clues is given
    assert notes["success"] == notes["success_without"] == 1
    assert notes["success_on_model"] < 0.5
    assert notes["acted"] is False
    assert "on: model" in notes["reason"]
    obeyed = Clues(target=2, unlearned=Rows(25.0).eval())
    _, clues, notes = TriggerRecovery(on="unlearned").clean(Rows(30.0).eval(), trusted, obeyed, generator())
    assert notes["acted"]
    assert clues.trigger is not None


def test_a_trigger_that_no_validation_image_can_try_on_the_model_is_not_handed_on(trusted: TrustedData) -> None:
    only = trusted.validate.subset(torch.nonzero(trusted.validate.labels == 2)[:, 0])
    given = Clues(target=2, unlearned=Rows(25.0).eval())
    lone = TrustedData(trusted.fit, only, CLASSES)
    _, clues, notes = TriggerRecovery(on="unlearned").clean(Rows(30.0).eval(), lone, given, generator())
    assert clues is given
    assert (notes["acted"], notes["success"], notes["success_on_model"]) == (False, None, None)
    assert "no validation image has another label than 2" in notes["reason"]
    json.dumps(notes, allow_nan=False)


def test_says_what_is_missing(trusted: TrustedData) -> None:
    model, given = Rows(30.0).eval(), Clues()
    for method, reason in (
        (TriggerRecovery(), "rnp_label"),
        (TriggerRecovery(on="unlearned", target=2), "unlearned model"),
        (TriggerRecovery(target=2, passes=1, recover_lr=1e-6, success=1.0), "raise passes"),
    ):
        same, clues, notes = method.clean(model, trusted, given, generator())
        assert same is not model
        assert clues is given
        assert notes["acted"] is False
        assert reason in notes["reason"]


def test_refusals(trusted: TrustedData) -> None:
    model = Rows(0.0)
    outside = TriggerRecovery(target=CLASSES)
    assert "0 to 5; set one of them" in (outside.refusal_on(model, trusted) or "")
    assert TriggerRecovery(target=5).refusal_on(model, trusted) is None
    assert TriggerRecovery(labels="all").refusal_on(model, trusted) is None
    with pytest.raises(MethodRefused, match="0 to 5"):
        outside.clean(model, trusted, Clues(), generator())
    with pytest.raises(MethodRefused, match="hand it TrustedData"):
        TriggerRecovery().clean(model, None, Clues(), generator())
    with pytest.raises(UserError, match="target: must be null where labels is all"):
        TriggerRecovery(labels="all", target=1)
    assert TriggerRecovery(labels="all").problems() == TriggerRecovery(target=1).problems() == []


def test_a_clue_outside_the_classes_is_refused(trusted: TrustedData) -> None:
    with pytest.raises(MethodRefused, match="searches target 99 and the labels are 0 to 5"):
        TriggerRecovery().clean(Rows(0.0).eval(), trusted, Clues(target=99), generator())


def test_of_two_labels_none_can_stand_out(trusted: TrustedData) -> None:
    few = [part.subset(torch.nonzero(part.labels < 2)[:, 0]) for part in (trusted.fit, trusted.validate)]
    method = TriggerRecovery(labels="all")
    with pytest.raises(MethodRefused, match="of 2 classes none can be; set labels: detected, or target"):
        method.clean(Rows(0.0).eval(), TrustedData(few[0], few[1], 2), Clues(), generator())
    assert "of 2 classes" in (method.refusal_on(Rows(0.0), TrustedData(few[0], few[1], 2)) or "")
    # Why: the index of two different sizes is 1 / 1.4826, whatever they are.
    assert anomaly_indices([3.0, 600.0]) == pytest.approx([0.6745, 0.6745], abs=1e-4)


def test_works_on_a_trained_network(backdoored: Any) -> None:
    _, clues, notes = TriggerRecovery(target=0, passes=40).clean(
        backdoored.model, backdoored.trusted, Clues(), generator()
    )
    assert notes["acted"]
    assert clues.trigger is not None
    hit = predict(backdoored.model, backdoored.triggered, stamp=None) == 0
    again = predict(backdoored.model, backdoored.clean, stamp=clues.trigger.stamp) == 0
    assert hit.mean() > 0.9
    assert again.mean() > 0.8
