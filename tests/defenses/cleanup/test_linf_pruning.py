from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fedbd.config.schema import parse
from fedbd.defenses.cleanup import linf_pruning
from fedbd.defenses.cleanup.linf_pruning import LinfPruning
from fedbd.errors import MethodRefused, UserError
from fedbd.metrics import predict
from fedbd.models.cnn import Cnn
from fedbd.models.mlp import Mlp
from fedbd.types import Cleanup, Clues, Samples, TrustedData

CLASSES, SIDE, BACKDOOR = 4, 6, 2


@dataclass(frozen=True)
class Corner:
    """One white pixel in the corner."""

    def stamp(self, images: Tensor) -> Tensor:
        stamped = images.clone()
        stamped[..., -1, -1] = 1.0
        return stamped


class Planted(nn.Module):
    """Channels 0 to 3 of the maps, where not the backdoor's, see a class's bright row; one sees a white corner."""

    maps, channels, classifier = "relu", "bn", "fc"

    def __init__(self) -> None:
        super().__init__()
        rows = CLASSES + 1
        self.conv = nn.Conv2d(1, rows, SIDE, padding=SIDE - 1, bias=False)
        self.bn = nn.BatchNorm2d(rows)
        self.relu = nn.ReLU()
        self.fc = nn.Linear(rows, CLASSES)
        with torch.no_grad():
            self.conv.weight.zero_()
            self.fc.weight.zero_()
            self.fc.bias.zero_()
            self.bn.bias.fill_(-0.5)
            for entry in self.clues_rows():
                self.conv.weight[entry, 0, entry if entry < BACKDOOR else entry - 1] = 1.0 / SIDE
            self.conv.weight[BACKDOOR, 0, -1, -1] = 1.0
            for column, entry in enumerate(self.clues_rows()):
                self.fc.weight[column, entry] = 1.0
            self.fc.weight[0, BACKDOOR] = 50.0
        self.eval()

    @staticmethod
    def clues_rows() -> list[int]:
        return [row for row in range(CLASSES + 1) if row != BACKDOOR]

    def forward(self, x: Tensor) -> Tensor:
        center = self.bn(self.conv(x)[:, :, SIDE - 1 : SIDE, SIDE - 1 : SIDE])  # the filter once, on the whole picture
        out: Tensor = self.fc(self.relu(center).mean((2, 3)))
        return out


def rows(count: int) -> Samples:
    """Black pictures with one bright row, which is the class; the corner is always black."""
    labels = torch.arange(count) % CLASSES
    images = torch.zeros(count, 1, SIDE, SIDE, dtype=torch.uint8)
    images[torch.arange(count), 0, labels] = 255
    images[..., -1] = 0
    return Samples(images, labels)


@pytest.fixture
def planted() -> Planted:
    return Planted()


@pytest.fixture
def trusted() -> TrustedData:
    return TrustedData(rows(20), rows(40), CLASSES)


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def caught() -> Tensor:
    return Corner().stamp(rows(12).images.float() / 255).mul(255).to(torch.uint8)


def right(model: nn.Module, stamp: bool = False) -> float:
    data = rows(40)
    return float(np.mean(predict(model, data, stamp=Corner().stamp if stamp else None) == data.labels.numpy()))


KNOWING = [
    ("recovered", False, Clues(trigger=Corner())),
    ("real", True, Clues(trigger=Corner())),
    ("inputs", True, Clues(triggered=caught())),
]


@pytest.mark.parametrize(("knowledge", "oracle", "clues"), KNOWING, ids=[row[0] for row in KNOWING])
@pytest.mark.parametrize("norm", ["linf", "l1", "l2"])
@pytest.mark.parametrize("by", ["difference", "ratio"])
def test_finds_the_planted_channel_first_and_removes_the_backdoor(
    planted: Planted, trusted: TrustedData, knowledge: Any, oracle: bool, clues: Clues, norm: Any, by: Any
) -> None:
    assert right(planted) == 1.0
    assert right(planted, stamp=True) == 0.25  # everything becomes class 0
    method = LinfPruning(knowledge=knowledge, oracle=oracle, norm=norm, by=by)
    model, found, notes = method.clean(planted, trusted, clues, generator())
    assert notes["acted"]
    assert notes["chosen"] == [BACKDOOR]
    assert notes["candidates"] == 1
    assert notes["curve"] == [{"pruned": 0, "accuracy": 1.0}, {"pruned": 1, "accuracy": 1.0}]
    assert right(model) == 1.0
    assert right(model, stamp=True) == 1.0
    assert found.pruned["bn"].tolist() == [row == BACKDOOR for row in range(CLASSES + 1)]
    assert (found.trigger, found.triggered) == (clues.trigger, clues.triggered)
    assert model.bn.weight[BACKDOOR] == 0 and model.bn.bias[BACKDOOR] == 0
    assert planted.bn.weight[BACKDOOR] == 1 and planted.bn.bias[BACKDOOR] == -0.5
    json.dumps(notes, allow_nan=False)


def test_chooses_the_most_channels_that_keep_accuracy_in_score_order(planted: Planted, trusted: TrustedData) -> None:
    method = LinfPruning(count=3)
    model, found, notes = method.clean(planted, trusted, Clues(trigger=Corner()), generator())
    # Only the backdoor's channel is raised; the rest tie at 0 and go by their index, one class lost with each.
    assert notes["chosen"] == [BACKDOOR, 0, 1]
    assert [point["accuracy"] for point in notes["curve"]] == [1.0, 1.0, 1.0, 0.75]  # class 0 is what no channel says
    assert notes["validation_after"] == 0.75 == right(model)
    assert found.pruned["bn"].sum() == 3


def test_the_curve_need_not_fall_steadily() -> None:
    method = LinfPruning(keep_within=0.1)
    assert method._chosen([100, 80, 91, 89], 100) == 2
    assert method._chosen([100, 90, 80], 100) == 1  # 0.1 * 100 lost is just within
    assert method._chosen([100, 80], 100) == 0


def test_fit_images_rank_the_channels_and_validation_images_choose_how_many(
    planted: Planted, trusted: TrustedData, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[str, Any]] = []
    for name in ("channel_norms", "pruning_curve"):
        original = getattr(linf_pruning, name)

        def spy(model: nn.Module, *given: Any, _name: str = name, _do: Any = original, **named: Any) -> Any:
            seen.append((_name, next(one for one in given if isinstance(one, Samples))))
            return _do(model, *given, **named)

        monkeypatch.setattr(linf_pruning, name, spy)
    LinfPruning().clean(planted, trusted, Clues(trigger=Corner()), generator())
    assert [name for name, _ in seen] == ["channel_norms", "channel_norms", "pruning_curve"]
    assert seen[0][1] is seen[1][1] is trusted.fit and seen[2][1] is trusted.validate


def test_nothing_within_the_allowed_loss(planted: Planted, trusted: TrustedData) -> None:
    with torch.no_grad():  # the backdoor's channel carries class 3, too
        planted.conv.weight[BACKDOOR, 0, 3] = 1.0
        planted.fc.weight[3, 4] = 0.0
        planted.fc.weight[3, BACKDOOR] = 60.0
    model, found, notes = LinfPruning().clean(planted, trusted, Clues(trigger=Corner()), generator())
    assert not notes["acted"]
    assert "raise keep_within" in notes["reason"]
    assert notes["validation_after"] == notes["validation_before"] == 1.0
    assert notes["curve"][1]["accuracy"] == 0.75
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), planted.parameters(), strict=True))
    assert model is not planted
    assert not found.pruned


def test_a_trigger_that_raises_nothing(planted: Planted, trusted: TrustedData) -> None:
    @dataclass(frozen=True)
    class Idle:
        def stamp(self, images: Tensor) -> Tensor:
            return images.clone()

    _, _, notes = LinfPruning().clean(planted, trusted, Clues(trigger=Idle()), generator())
    assert (notes["acted"], notes["candidates"]) == (False, 0)
    assert "raises the linf norm of no channel" in notes["reason"]


def test_joins_what_was_pruned_before(planted: Planted, trusted: TrustedData) -> None:
    before = {"bn": np.arange(CLASSES + 1) == 1, "other": np.array([True])}
    clues = Clues(trigger=Corner(), pruned=before)
    _, found, _ = LinfPruning().clean(planted, trusted, clues, generator())
    assert np.flatnonzero(found.pruned["bn"]).tolist() == [1, BACKDOOR]
    assert found.pruned["other"].tolist() == [True]
    assert np.flatnonzero(before["bn"]).tolist() == [1]


def test_norm_and_comparison_decide_the_order(planted: Planted) -> None:
    def norms(*values: float) -> dict[str, Any]:
        return {name: np.array(values) * factor for name, factor in (("linf", 1.0), ("l1", -1.0), ("l2", 0.0))}

    clean, triggered = norms(1.0, 10.0, 0.0, 0.0), norms(3.0, 15.0, 0.5, 0.25)
    ratios = {"linf": np.array([3.0, 1.5, np.inf, np.inf]), "l1": np.zeros(4), "l2": np.zeros(4)}
    by = {field: LinfPruning(by=field)._order(clean, triggered, ratios) for field in ("difference", "ratio")}
    assert by["difference"][0].tolist() == [1, 0, 2, 3]
    assert by["ratio"][0].tolist() == [2, 3, 0, 1]
    assert by["difference"][1] == by["ratio"][1] == 4
    order, candidates = LinfPruning(norm="l1")._order(clean, triggered, ratios)
    assert (order.tolist(), candidates) == ([3, 2, 0, 1], 0)


def test_on_a_trained_backdoor(backdoored: Any) -> None:
    trigger = replace(Clues(), triggered=backdoored.triggered.images[:100])
    method = LinfPruning(knowledge="inputs", oracle=True, keep_within=0.05)
    model, _, notes = method.clean(backdoored.model, backdoored.trusted, trigger, generator())
    before = np.mean(predict(backdoored.model, backdoored.triggered) == 0)
    assert notes["acted"]
    assert notes["validation_before"] - notes["validation_after"] <= 0.05 + 1e-9
    assert np.mean(predict(model, backdoored.triggered) == 0) < before
    # the model that a curve point speaks of, made by hand
    by_hand = Cnn().build((1, 8, 8), 10, generator()).eval()
    by_hand.load_state_dict(backdoored.model.state_dict())
    with torch.no_grad():
        for channel in notes["chosen"]:
            by_hand.block3.bn.weight[channel] = 0
            by_hand.block3.bn.bias[channel] = 0
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), by_hand.parameters(), strict=True))
    validate = backdoored.trusted.validate
    assert notes["validation_after"] == np.mean(predict(by_hand, validate) == validate.labels.numpy())


def test_refuses_without_the_clue_or_trusted_data(planted: Planted, trusted: TrustedData) -> None:
    empty = replace(trusted, validate=rows(0))
    cases = [
        (LinfPruning(), trusted, Clues(triggered=caught()), "trigger recovery that finds one before it"),
        (LinfPruning(knowledge="real", oracle=True), trusted, Clues(triggered=caught()), "needs a trigger"),
        (LinfPruning(knowledge="inputs", oracle=True), trusted, Clues(trigger=Corner()), "needs triggered inputs"),
        (LinfPruning(), None, Clues(trigger=Corner()), "hand it TrustedData"),
        (LinfPruning(), empty, Clues(trigger=Corner()), "hand it TrustedData"),
        (LinfPruning(count=6), trusted, Clues(trigger=Corner()), "has 5 channels and count is 6"),
    ]
    for method, data, clues, sentence in cases:
        with pytest.raises(MethodRefused, match=sentence):
            method.clean(planted, data, clues, generator())
    with pytest.raises(UserError, match="oracle: must be true"):
        LinfPruning(knowledge="real")
    with pytest.raises(UserError, match="oracle: must be false"):
        LinfPruning(oracle=True)


@pytest.mark.parametrize("knowledge", ["recovered", "inputs", "real"])
@pytest.mark.parametrize("oracle", [False, True])
def test_a_scenario_must_own_up_to_the_oracle(knowledge: str, oracle: bool) -> None:
    problems: list[Any] = []
    parse(LinfPruning, {"knowledge": knowledge, "oracle": oracle}, "cleanup[0]", problems)
    honest = oracle == (knowledge != "recovered")
    assert [problem.path for problem in problems] == ([] if honest else ["cleanup[0].oracle"])


def test_refuses_models_at_load() -> None:
    assert isinstance(LinfPruning(), Cleanup)
    assert LinfPruning().needs_trusted and LinfPruning().prunes
    assert LinfPruning().refusal(Planted()) is None
    assert LinfPruning().refusal(Mlp(hidden=(5,)).build((1, 8, 8), 3, generator())) is None
    linear = Mlp(hidden=()).build((1, 8, 8), 3, generator())
    assert "`maps`" in str(LinfPruning().refusal(linear))
    without = Planted()
    without.channels = ""
    assert "`channels`" in str(LinfPruning().refusal(without))
    assert "count is 9" in str(LinfPruning(count=9).refusal(Planted()))
    with pytest.raises(MethodRefused, match="`channels`"):
        LinfPruning().clean(without, TrustedData(rows(4), rows(4), CLASSES), Clues(trigger=Corner()), generator())
