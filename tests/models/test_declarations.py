"""What a model declares of itself must name modules that it has."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from fedbd.defenses.cleanup.fine_pruning import FinePruning
from fedbd.defenses.cleanup.flain import FLAIN
from fedbd.defenses.cleanup.linf_pruning import LinfPruning
from fedbd.defenses.cleanup.nad import NAD
from fedbd.defenses.detection.activation_spaces import spaces
from fedbd.errors import MethodRefused
from fedbd.models.cnn import Cnn
from fedbd.models.taps import declared, prunable
from fedbd.training import TrainingPlan, train
from fedbd.types import Clues, Samples, TrustedData


def model(**other: Any) -> nn.Module:
    built = Cnn(width=4).build((1, 8, 8), 2, torch.Generator().manual_seed(0))
    for name, value in other.items():
        setattr(built, name, value)
    return built.eval()


def samples() -> Samples:
    images = torch.randint(0, 256, (12, 1, 8, 8), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    return Samples(images, torch.arange(12) % 2)


def clean(method: Any, net: nn.Module, **clues: Any) -> Any:
    return method.clean(net, TrustedData(samples(), samples(), 2), Clues(**clues), torch.Generator())


@pytest.mark.parametrize("attribute", ["maps", "channels", "classifier", "taps", "prunable"])
def test_a_name_without_a_module_is_refused(attribute: str) -> None:
    net = model(**{attribute: ("nope",) if attribute == "taps" else "nope"})
    with pytest.raises(MethodRefused, match=f"`{attribute}` and it has no module 'nope'"):
        declared(net, attribute, "method")


def test_methods_say_so_before_they_start() -> None:
    for method in (FinePruning(), LinfPruning()):
        for attribute in ("maps", "prunable", "channels"):
            assert "no module 'nope'" in (method.refusal(model(**{attribute: "nope"})) or "")
    assert "no module 'nope'" in (NAD().refusal(model(taps=("nope", "nope", "nope"))) or "")
    with pytest.raises(MethodRefused, match="`classifier` and it has no module"):
        spaces(model(classifier="nope"), "lid")
    assert prunable(model(), "method") == model().maps


def test_a_module_under_a_declaration_s_name_is_refused() -> None:
    net = nn.Module()
    net.classifier = nn.Linear(2, 2)
    with pytest.raises(MethodRefused, match="has a module of its own there; wrap it in a module"):
        declared(net, "classifier", "method")


def test_what_hooks_do_not_reach_is_refused() -> None:
    net = model()
    for wrapped, inner in ((torch.compile(net, backend="eager"), "_orig_mod"), (nn.DataParallel(net), "module")):
        with pytest.raises(MethodRefused, match=f"hand it the plain one, model.{inner}"):
            declared(wrapped, "taps", "method")
    net.compile(backend="eager")
    with pytest.raises(MethodRefused, match=r"compile\(\) was called on this one"):
        declared(net, "taps", "method")


def test_taps_that_are_a_string_are_not_read_letter_by_letter() -> None:
    said = NAD(betas=(1.0,)).refusal(model(taps="fc")) or ""
    assert "must be a tuple of modules' names and is the string 'fc'" in said
    assert "set it to ('fc',)" in said


@pytest.mark.parametrize("method", [FinePruning(), LinfPruning(knowledge="real", oracle=True)])
def test_channels_of_another_layer_than_the_maps_are_refused(method: Any) -> None:
    net = model()
    others = {name for name, module in net.named_modules() if isinstance(module, nn.BatchNorm2d)} - {net.channels}
    net.channels = next(name for name in sorted(others) if len(net.get_parameter(f"{name}.weight")) == 4)
    with pytest.raises(MethodRefused, match="set both to the same layer"):
        clean(method, net)


def test_a_reference_must_be_a_model() -> None:
    with pytest.raises(MethodRefused, match="must be a model and is a OrderedDict; build the model anew"):
        clean(FLAIN(), model(), reference=model().state_dict())


def test_a_frozen_model_is_not_trained() -> None:
    with pytest.raises(MethodRefused, match="all are frozen; call"):
        train(model().requires_grad_(False), samples(), TrainingPlan(), torch.Generator())
