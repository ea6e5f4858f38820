from __future__ import annotations

import copy
import json
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fedbd.defenses.cleanup import fine_pruning
from fedbd.defenses.cleanup.fine_pruning import FinePruning, affordable, mean_activation
from fedbd.defenses.cleanup.finetune import FineTune
from fedbd.errors import MethodRefused
from fedbd.metrics import predict
from fedbd.models.mlp import Mlp
from fedbd.models.mnistnet import MnistNet
from fedbd.models.taps import readings
from fedbd.models.wrn import Wrn
from fedbd.types import Cleanup, Clues, Samples, TrustedData

FIELDS: dict[str, Any] = {"epochs": 2, "batch_size": 32, "lr": 0.02, "augment": "none"}
SMALL = FinePruning(**FIELDS, keep_within=0.05)


def generator(seed: int = 3) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def state_bytes(model: nn.Module) -> dict[str, bytes]:
    return {name: entry.numpy().tobytes() for name, entry in model.state_dict().items()}


def share_right(model: nn.Module, data: Samples) -> float:
    return float((predict(model, data) == data.labels.numpy()).mean())


def slow_right(model: nn.Module, data: Samples, off: list[int]) -> int:
    """The cnn called by hand, with the channels' maps blanked in place of the weights."""
    with torch.no_grad():
        x = model.pool(model.block1(data.images.float() / 255))
        maps = model.block3(model.pool(model.block2(x)))
        maps[:, off] = 0
        predicted = model.fc(maps.mean((2, 3))).argmax(1)
    return int((predicted == data.labels).sum())


def slow_activation(model: nn.Module, data: Samples) -> list[float]:
    with torch.no_grad():
        x = model.pool(model.block1(data.images.float() / 255))
        maps = model.block3(model.pool(model.block2(x))).double()
    return [float(maps[:, channel].mean()) for channel in range(maps.shape[1])]


def test_order_and_curve_against_a_slow_reference(backdoored: Any) -> None:
    model, fit, validate = backdoored.model, backdoored.trusted.fit, backdoored.trusted.validate
    activation = mean_activation(model, fit)
    slow = slow_activation(model, fit)
    assert activation.dtype == np.float64
    assert activation.tolist() == pytest.approx(slow, rel=1e-5, abs=1e-9)
    _, _, notes = SMALL.clean(model, backdoored.trusted, Clues(), generator())
    assert notes["activation"] == activation.tolist()
    assert notes["order"] == sorted(range(64), key=lambda channel: activation[channel])
    right = [slow_right(model, validate, notes["order"][:count]) for count in range(64)]
    assert notes["curve"] == [hits / 200 for hits in right]
    pruned = 0
    while pruned < 63 and right[0] - right[pruned + 1] <= 10:  # 0.05 of 200
        pruned += 1
    assert 0 < pruned < 63
    assert (notes["pruned"], notes["validation_pruned"]) == (pruned, right[pruned] / 200)


def test_pruning_ends_before_the_first_costly_channel_even_if_accuracy_comes_back() -> None:
    right = [90, 91, 88, 84, 90, 60]
    assert [affordable(right, allowed) for allowed in (0, 1, 2, 5, 6, 29, 30)] == [1, 1, 2, 2, 4, 4, 5]
    assert affordable([90], 0) == 0
    assert affordable([100, 96], 0.04 * 100) == 1


def test_equally_active_channels_go_in_the_models_order(tiny_net: Any, backdoored: Any) -> None:
    dead = tiny_net(0).eval()
    with torch.no_grad():
        dead.block3.bn.weight.zero_()
        dead.block3.bn.bias.fill_(-1.0)
    _, _, notes = FinePruning(**{**FIELDS, "epochs": 1}).clean(dead, backdoored.trusted, Clues(), generator())
    assert notes["order"] == list(range(64))
    assert notes["pruned"] == 63  # the last one stays


def test_pruned_channels_are_exactly_off_after_the_fine_tuning(backdoored: Any) -> None:
    before = state_bytes(backdoored.model)
    model, clues, notes = SMALL.clean(backdoored.model, backdoored.trusted, Clues(), generator())
    assert state_bytes(backdoored.model) == before
    off = clues.pruned["block3.bn"]
    assert off.dtype == np.bool_ and off.shape == (64,)
    assert sorted(np.flatnonzero(off)) == sorted(notes["order"][: notes["pruned"]])
    assert 0 < notes["pruned"] < 64 and notes["pruned_share"] == notes["pruned"] / 64
    for data in (backdoored.clean, backdoored.triggered):
        maps = readings(model, "block3", data)
        assert not maps[:, off].any()
        assert not readings(model, "block3.bn", data)[:, off].any()
        assert maps[:, ~off].any()
    # All the others were trained, and so was everything else.
    scale, old = model.block3.bn.weight.detach(), backdoored.model.block3.bn.weight.detach()
    assert (scale[torch.from_numpy(~off)] != old[torch.from_numpy(~off)]).all()
    assert (model.block1.conv.weight != backdoored.model.block1.conv.weight).any()


@pytest.mark.parametrize(
    ("family", "shape", "layer"),
    [
        (Wrn(depth=10), (1, 8, 8), "bn1"),
        (MnistNet(), (1, 20, 20), "conv2"),
        (Mlp(hidden=(12, 9)), (1, 8, 8), "hidden.1.0"),
    ],
    ids=["wrn", "mnistnet", "mlp"],
)
def test_switches_off_a_scale_a_filter_and_a_unit(family: Any, shape: Any, layer: str, digits: Samples) -> None:
    model = family.build(shape, 10, generator())
    pad = [(shape[1] - 8) // 2] * 4
    data = Samples(nn.functional.pad(digits.images[:60], pad), digits.labels[:60])
    trusted = TrustedData(data, data, 10)
    how = FinePruning(**FIELDS, keep_within=1.0)
    repaired, clues, _ = how.clean(model, trusted, Clues(), generator())
    assert repaired.training and model.training
    assert list(clues.pruned) == [layer]
    off = clues.pruned[layer]
    assert off.sum() == len(off) - 1
    maps = readings(repaired, model.maps, data)
    assert not maps[:, off].any()
    assert maps[:, ~off].any()


def test_where_no_channel_can_go_it_is_fine_tuning_bit_for_bit(
    backdoored: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fine_pruning, "pruning_curve", lambda *_: [180, 160, 180])
    model, clues, notes = SMALL.clean(backdoored.model, backdoored.trusted, Clues(), generator())
    plain, _, wanted = FineTune(**FIELDS).clean(backdoored.model, backdoored.trusted, Clues(), generator())
    assert (notes["pruned"], notes["pruned_share"], dict(clues.pruned)) == (0, 0.0, {})
    assert notes["acted"] and notes["validation_pruned"] == 0.9
    assert state_bytes(model) == state_bytes(plain)
    assert notes["epochs"] == wanted["epochs"]


def test_notes_and_clues(backdoored: Any) -> None:
    other = np.array([True, False])
    earlier = np.zeros(64, dtype=np.bool_)
    earlier[5] = True
    given = Clues(target=4, pruned={"block1.bn": other, "block3.bn": earlier})
    model, clues, notes = SMALL.clean(backdoored.model, backdoored.trusted, given, generator())
    assert isinstance(SMALL, Cleanup) and SMALL.needs_trusted and SMALL.prunes
    assert clues.target == 4 and np.array_equal(clues.pruned["block1.bn"], other)
    off = set(notes["order"][: notes["pruned"]])
    assert set(np.flatnonzero(clues.pruned["block3.bn"])) == off | {5}
    assert given.pruned["block3.bn"].sum() == 1
    assert notes["acted"] and len(notes["epochs"]) == 2
    validate = backdoored.trusted.validate
    assert notes["validation_before"] == share_right(backdoored.model, validate) == notes["curve"][0]
    assert notes["validation_after"] == share_right(model, validate)
    json.dumps(notes, allow_nan=False)
    again = SMALL.clean(backdoored.model, backdoored.trusted, given, generator())
    assert state_bytes(again[0]) == state_bytes(model) and again[2] == notes


def test_where_it_diverges_it_says_so_and_changes_nothing(backdoored: Any) -> None:
    how = FinePruning(**{**FIELDS, "lr": 1e30})
    model, clues, notes = how.clean(backdoored.model, backdoored.trusted, Clues(), generator())
    assert state_bytes(model) == state_bytes(backdoored.model)
    assert notes["acted"] is False and "lower lr" in notes["reason"]
    assert notes["pruned"] == 0 and not clues.pruned


def test_refusals(backdoored: Any) -> None:
    with pytest.raises(MethodRefused, match="hand it TrustedData"):
        SMALL.clean(backdoored.model, None, Clues(), generator())
    assert SMALL.refusal(backdoored.model) is None
    softmax = Mlp(hidden=()).build((1, 8, 8), 10, generator())
    odd, apart = copy.deepcopy(backdoored.model), copy.deepcopy(backdoored.model)
    odd.channels = "pool"
    for model, word in ((softmax, "`maps`"), (odd, "MaxPool2d"), (nn.Linear(2, 2), "`maps`")):
        assert word in (SMALL.refusal(model) or "")
    for model, word in ((softmax, "declares none"), (odd, "MaxPool2d")):
        with pytest.raises(MethodRefused, match=word):
            SMALL.clean(model, backdoored.trusted, Clues(), generator())
    apart.channels = "block2.bn"
    with pytest.raises(MethodRefused, match="same layer"):
        SMALL.clean(apart, backdoored.trusted, Clues(), generator())


class Leaky(nn.Module):
    """Its activation passes gradients at 0, so that a channel that is off would be trained on again."""

    maps, channels, classifier = "act", "bn", "fc"

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.act = nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.LeakyReLU(0.5)
        self.fc = nn.Linear(6, 10)
        for i, entry in enumerate(self.parameters()):
            nn.init.normal_(entry, std=0.5, generator=generator(i))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.fc(self.act(self.bn(self.conv(x))).mean((2, 3)))
        return out


def test_pruned_channels_stay_off_whatever_the_activation(backdoored: Any) -> None:
    model, clues, notes = FinePruning(**FIELDS, keep_within=1.0).clean(
        Leaky().eval(), backdoored.trusted, Clues(), generator()
    )
    off = torch.from_numpy(clues.pruned["bn"])
    assert notes["pruned"] == int(off.sum()) == 5
    assert not model.bn.weight[off].any() and not model.bn.bias[off].any()
    assert model.bn.weight[~off].all()
