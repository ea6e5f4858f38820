"""Computed weights (weight norm, spectral norm, prune masks) are no place to switch a channel off."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import prune
from torch.nn.utils.parametrizations import spectral_norm, weight_norm
from torch.nn.utils.parametrize import remove_parametrizations

from fedbd.defenses.cleanup.channel_masks import switch_off
from fedbd.defenses.cleanup.channel_norms import silence
from fedbd.defenses.cleanup.clp import CLP
from fedbd.defenses.cleanup.fine_pruning import FinePruning
from fedbd.defenses.cleanup.flain import FLAIN
from fedbd.defenses.cleanup.linf_pruning import LinfPruning
from fedbd.defenses.cleanup.rnp import RNP
from fedbd.defenses.detection.model_mutation import ModelMutation
from fedbd.errors import MethodRefused
from fedbd.types import Clues, Samples, TrustedData

pytestmark = pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated:FutureWarning")

Wrap = Callable[[Any], nn.Module]
WRAPS: dict[str, Wrap] = {
    "weight_norm": weight_norm,
    "spectral_norm": spectral_norm,
    "old weight_norm": torch.nn.utils.weight_norm,
    "old spectral_norm": torch.nn.utils.spectral_norm,
    "prune": lambda module: prune.l1_unstructured(module, "weight", 0.2),  # type: ignore[no-untyped-call]
}
OFF = np.array([True, False, False, False])


class Net(nn.Module):
    maps, channels, classifier = "relu", "conv", "fc"

    def __init__(self, wrap: Wrap, norm: bool = False) -> None:
        super().__init__()
        self.conv = wrap(nn.Conv2d(1, 4, 3))
        self.norm = nn.BatchNorm2d(4) if norm else nn.Identity()
        self.relu = nn.ReLU()
        self.fc = wrap(nn.Linear(4, 2))
        if norm:
            self.channels = "norm"

    def forward(self, x: torch.Tensor) -> Any:
        return self.fc(self.relu(self.norm(self.conv(x))).mean((2, 3)))


def trusted() -> TrustedData:
    images = torch.randint(0, 256, (12, 1, 8, 8), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    data = Samples(images, torch.arange(12) % 2)
    return TrustedData(data, data, 2)


@pytest.mark.parametrize("wrap", WRAPS)
@pytest.mark.parametrize("method", [CLP(), FinePruning(), LinfPruning(), RNP()])
def test_a_run_learns_before_it_starts(wrap: str, method: Any) -> None:
    model = Net(WRAPS[wrap])
    said = method.refusal(model)
    assert "the weight of conv is computed from other parameters" in said
    assert "remove_parametrizations" in said
    with pytest.raises(MethodRefused, match="weight of conv is computed"):
        method.clean(model, trusted(), Clues(), torch.Generator())


@pytest.mark.parametrize("wrap", WRAPS)
def test_the_last_guard(wrap: str) -> None:
    with pytest.raises(MethodRefused, match="weight of conv"):
        silence(Net(WRAPS[wrap]), {"conv": OFF})
    with torch.no_grad():  # the old hooks keep a result that cannot be copied with its gradient
        model = Net(WRAPS[wrap])
    with pytest.raises(MethodRefused, match="weight of conv"):
        switch_off(model, {"conv": OFF})
    with pytest.raises(MethodRefused, match="weight of fc is computed"):
        FLAIN().clean(model, trusted(), Clues(reference=copy.deepcopy(model)), torch.Generator())


@pytest.mark.parametrize("wrap", WRAPS)
def test_noise_on_a_computed_weight_is_refused(wrap: str) -> None:
    with torch.no_grad():
        model = Net(WRAPS[wrap]).eval()
    said = ModelMutation(noise=1.0).refusal(model)
    assert "the weight of fc is computed from other parameters" in (said or "")
    with pytest.raises(MethodRefused, match="weight of fc is computed"):
        ModelMutation(noise=1.0, mutants=3).score(model, trusted().fit, None, torch.Generator())


def test_a_computed_classifier_is_no_normalization_of_channels() -> None:
    model = Net(weight_norm)
    remove_parametrizations(model.conv, "weight")
    assert RNP().refusal(model) is None


def test_a_normalization_behind_computed_filters_can_be_switched_off() -> None:
    model = Net(weight_norm, norm=True).eval()
    assert RNP().refusal(model) is None
    assert FinePruning().refusal(model) is None
    pruned = switch_off(model, {"norm": OFF})
    assert pruned.get_parameter("norm.weight")[0] == 0


def test_the_remedy_works() -> None:
    model = Net(weight_norm)
    for name in ("conv", "fc"):
        remove_parametrizations(model.get_submodule(name), "weight")
    for method in (CLP(), FinePruning(), LinfPruning(), RNP()):
        assert method.refusal(model) is None
    repaired, clues, notes = CLP(u=0.5).clean(model.eval(), trusted(), Clues(), torch.Generator())
    assert notes["pruned"] > 0
    assert (repaired.get_parameter("conv.weight")[torch.from_numpy(clues.pruned["conv"])] == 0).all()
