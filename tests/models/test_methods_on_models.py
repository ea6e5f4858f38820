"""Which cleanup and which detector acts on which model, and what the others say: one table, checked in both directions.

A method that does not refuse must be able to read what it reads: that is what the conformance tests hold it to on a
CNN; here the places that the models declare are used.
"""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fedbd.defenses.cleanup.channel_curve import pruning_curve, right
from fedbd.defenses.cleanup.channel_norms import channel_norms, silence
from fedbd.defenses.cleanup.fine_pruning import FinePruning
from fedbd.defenses.gradcam import gradcam
from fedbd.models.cnn import Cnn
from fedbd.models.mlp import Mlp
from fedbd.models.mnistnet import MnistNet
from fedbd.models.preact_resnet import PreActResNet18
from fedbd.models.resnet import ResNet18
from fedbd.models.taps import readings
from fedbd.models.torchvision_models import Torchvision
from fedbd.models.vit import Vit
from fedbd.models.wrn import Wrn
from fedbd.registry import METHODS, resolve
from fedbd.types import Clues, Samples, TrustedData

SHAPE, CLASSES = (1, 28, 28), 4


def theirs(architecture: str) -> Torchvision:
    return Torchvision(architecture=architecture, resize=64)


FAMILIES: dict[str, Any] = {
    "cnn": Cnn(width=4),
    "mlp": Mlp(hidden=(16, 8)),
    "mnistnet": MnistNet(),
    "wrn16-1": Wrn(depth=10),
    "resnet18": ResNet18(width=4),
    "preact_resnet18": PreActResNet18(width=4),
    "vit": Vit(width=16, depth=2, heads=2),
    "torchvision resnet18": theirs("resnet18"),
    "torchvision vgg11_bn": theirs("vgg11_bn"),
    "torchvision mobilenet_v3_small": theirs("mobilenet_v3_small"),
    "torchvision shufflenet_v2_x0_5": theirs("shufflenet_v2_x0_5"),
    "torchvision squeezenet1_1": theirs("squeezenet1_1"),
}
ALWAYS = {"rnp_label", "trigger_recovery", "finetune", "rnp_unlearned", "abl_isolation", "strip", "frequency"}
"""Methods that take any classifier."""
NO_CLASSIFIER = dict.fromkeys(("activation_clustering", "spectral_signatures", "kernel_density"), "`classifier`")
NO_TAPS = dict.fromkeys(("label_switching", "lid", "nad"), "`taps`")
FOUR = {"nad": "set betas to 4 numbers"}
REFUSED: dict[str, dict[str, str]] = {
    "cnn": {},
    "mlp": {
        "rnp": "neither BatchNorm2d nor Conv2d",
        "clp": "judges convolutions and the model has none",
        "nad": "tap 'hidden.0' gives (1, 16)",
    },
    "mnistnet": {"nad": "set betas to 2 numbers, for pool1, pool2"},
    "wrn16-1": {},
    "resnet18": FOUR,
    "preact_resnet18": FOUR,
    "vit": {
        "rnp": "cannot mask the channels of a model with LayerNorm",
        "clp": "judges convolutions and the model has none",
        "nad": "tap 'blocks.0.first' gives (1, 16)",
        "linf_pruning": "`maps`",
        "fine_pruning": "`maps`",
    },
    "torchvision resnet18": {**FOUR, "linf_pruning": "`channels`", "fine_pruning": "`channels`"},
    "torchvision vgg11_bn": {"nad": "set betas to 5 numbers"},
    "torchvision mobilenet_v3_small": NO_TAPS,
    "torchvision shufflenet_v2_x0_5": {},
    "torchvision squeezenet1_1": {
        **NO_CLASSIFIER,
        **NO_TAPS,
        "linf_pruning": "`maps`",
        "fine_pruning": "`maps`",
        "flain": "the model has none; take a model with a Linear",
        "model_mutation": "the model has none; take a model with a classifier",
    },
}
"""Family -> method -> what its refusal says; every other method acts."""


def build(name: str) -> nn.Module:
    model: nn.Module = FAMILIES[name].build(SHAPE, CLASSES, torch.Generator().manual_seed(0))
    return model


def images(count: int = 12) -> Samples:
    pixels = torch.randint(0, 256, (count, *SHAPE), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    return Samples(pixels, torch.arange(count) % CLASSES)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_cleanup_and_detector_acts_or_says_why_not(name: str) -> None:
    model = build(name)
    said: dict[str, str] = {}
    for kind in ("cleanup", "detection"):
        for method in METHODS[kind]:
            refusal = getattr(resolve(kind, method, kind)(), "refusal", None)
            reason = refusal(model) if refusal is not None else None
            if reason is not None:
                said[method] = reason
    assert set(said) == set(REFUSED[name])
    assert not ALWAYS & set(said)
    for method, reason in said.items():
        assert REFUSED[name][method] in reason
        assert method in reason
        assert ";" in reason  # a remedy


@pytest.mark.parametrize("name", FAMILIES)
def test_gradcam_looks_at_the_last_map_or_refuses(name: str) -> None:
    model, batch = build(name).eval(), images(3)
    if name in ("mlp", "vit", "torchvision squeezenet1_1"):
        with pytest.raises(Exception, match="gradcam"):
            gradcam(model, batch.images, batch.labels)
        return
    seen = gradcam(model, batch.images, batch.labels)
    assert seen.shape == (3, 28, 28)
    assert 0 <= seen.min() <= seen.max() <= 1


@pytest.mark.parametrize("name", [name for name in FAMILIES if "fine_pruning" not in REFUSED[name]])
def test_what_prunes_switches_channels_of_the_declared_maps_off(name: str) -> None:
    model, data = build(name).eval(), images()
    norms = channel_norms(model, data)["linf"]
    place = getattr(model, "prunable", model.maps)
    repaired = copy.deepcopy(model)
    silence(repaired, {model.channels: np.isin(np.arange(len(norms)), [0, 2])})
    maps = readings(repaired, place, data)
    assert (maps[:, [0, 2]] == 0).all()
    assert torch.equal(maps[:, 1], readings(model, place, data)[:, 1])
    if name.startswith("torchvision"):
        return
    clean = TrustedData(data, data, CLASSES)
    method = FinePruning(keep_within=1.0, epochs=1, batch_size=6, lr=0.01)
    fixed, clues, notes = method.clean(model, clean, Clues(), torch.Generator().manual_seed(2))
    assert notes["pruned"] == len(norms) - 1
    assert (readings(fixed, place, data)[:, clues.pruned[model.channels]] == 0).all()


@pytest.mark.parametrize("name", ["resnet18", "preact_resnet18"])
def test_the_quick_curve_past_a_shortcut_is_the_slow_one(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = build(name).eval(), images(40)
    order = np.random.default_rng(0).permutation(32)[:9]
    counts = []

    def counted(*args: Any) -> int:
        counts.append(1)
        return right(*args)

    monkeypatch.setattr("fedbd.defenses.cleanup.channel_curve.right", counted)
    quick = pruning_curve(model, order, data)
    assert not counts  # the slow way was not taken
    slow = []
    for count in range(10):
        pruned = copy.deepcopy(model)
        silence(pruned, {model.channels: np.isin(np.arange(32), order[:count])})
        slow.append(right(pruned, data))
    assert quick == slow
