from __future__ import annotations

import copy
import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fedbd.config.schema import parse
from fedbd.defenses.cleanup.flain import FLAIN
from fedbd.defenses.cleanup.input_neurons import weight_of
from fedbd.errors import MethodRefused
from fedbd.metrics import predict
from fedbd.models.mlp import Mlp
from fedbd.training import TrainingPlan, train
from fedbd.types import Cleanup, Clues, Samples, TrustedData

CLASSES = 10


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def right(model: nn.Module, data: Samples) -> int:
    return int((predict(model, data) == data.labels.numpy()).sum())


@pytest.fixture(scope="module")
def start() -> nn.Module:
    return Mlp(hidden=(24,)).build((1, 8, 8), CLASSES, generator()).eval()


@pytest.fixture(scope="module")
def trusted(digits: Samples) -> TrustedData:
    return TrustedData(digits.subset(torch.arange(900, 1000)), digits.subset(torch.arange(1000, 1200)), CLASSES)


@pytest.fixture(scope="module")
def model(start: nn.Module, digits: Samples) -> nn.Module:
    """Trained with a backdoor in a pixel that clean data leave nearly dark: a lit one gives class 0."""
    data = digits.subset(torch.arange(900))
    images, labels = data.images.clone(), data.labels.clone()
    images[:200, 0, 0, 0], labels[:200] = 255, 0
    trained = copy.deepcopy(start)
    train(trained, Samples(images, labels), TrainingPlan(epochs=15, batch_size=32, lr=0.1), generator(2))
    return trained.eval()


def lit(digits: Samples) -> Samples:
    test = digits.subset(torch.arange(1300, 1797))
    victims = test.subset(torch.nonzero(test.labels != 0)[:, 0])
    images = victims.images.clone()
    images[:, 0, 0, 0] = 255
    return Samples(images, victims.labels)


def slow(
    model: Any, start: Any, trusted: TrustedData, first: float, step: float, cap: float, bound: float
) -> tuple[Tensor, int, float, list[tuple[int, int]]]:
    """The code's loop on an MLP: every threshold, every column, then the norm; with its last weights and counts."""
    weight, old = model.hidden[0][0].weight.detach(), start.hidden[0][0].weight.detach()
    means = (trusted.fit.images.double().flatten(1) / 255).mean(0)
    trial = copy.deepcopy(model)
    before, seen = right(model, trusted.validate), []
    for at in range(round((cap - first) / step) + 1):
        threshold, new, count = first + at * step, weight.clone(), 0
        for column in range(weight.shape[1]):
            if 0 <= means[column] <= threshold:
                new[:, column] = old[:, column] - (weight[:, column] - old[:, column])
                count += 1
        trial.hidden[0][0].weight.data.copy_(new)
        now = right(trial, trusted.validate)
        seen.append((count, now))
        if before - now >= bound * len(trusted.validate):
            break
    return new * (weight.norm() / new.norm()), count, threshold, seen


@pytest.mark.parametrize("bound", [0.015, 0.1, 0.9])
def test_is_the_slow_loop(model: nn.Module, start: nn.Module, trusted: TrustedData, bound: float) -> None:
    weight, count, threshold, seen = slow(model, start, trusted, 0.001, 0.005, 0.996, bound)
    method = FLAIN(bound=bound, start=0.001, step=0.005, cap=0.996)
    repaired, clues, notes = method.clean(model, trusted, Clues(reference=start), generator())
    assert notes["acted"]
    assert notes["flipped"] == count
    assert notes["threshold"] <= threshold  # where nothing more is flipped the first of equal ones is named
    assert notes["bound_reached"] == (right(model, trusted.validate) - seen[-1][1] >= bound * 200)
    own = dict(repaired.named_parameters())
    assert torch.allclose(own["hidden.0.0.weight"], weight, atol=1e-7)
    for name, entry in model.named_parameters():
        assert name == "hidden.0.0.weight" or torch.equal(own[name], entry)
    distinct = list(dict.fromkeys(seen))
    assert [(p["flipped"], round(p["accuracy"] * 200)) for p in notes["curve"]] == distinct
    assert notes["validation_after"] == right(repaired, trusted.validate) / 200
    assert clues.reference is start
    json.dumps(notes, allow_nan=False)


def test_flips_exactly_the_chosen_columns_without_rescaling(
    model: nn.Module, start: nn.Module, trusted: TrustedData
) -> None:
    before = [entry.clone() for entry in (*model.state_dict().values(), *start.state_dict().values())]
    repaired, _, notes = FLAIN(rescale=False, bound=0.05).clean(model, trusted, Clues(reference=start), generator())
    new, weight, old = (dict(net.named_parameters())["hidden.0.0.weight"] for net in (repaired, model, start))
    means = (trusted.fit.images.double().flatten(1) / 255).mean(0).numpy()
    chosen = means <= notes["threshold"]
    assert 0 < chosen.sum() == notes["flipped"] < len(means)
    assert torch.equal(new[:, ~chosen], weight[:, ~chosen])
    assert torch.equal(new[:, chosen], (old - (weight - old))[:, chosen])
    assert notes["scale"] == 1.0
    after = [*model.state_dict().values(), *start.state_dict().values()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_rescaling_gives_the_norm_back(model: nn.Module, start: nn.Module, trusted: TrustedData) -> None:
    plain, scaled = (
        FLAIN(rescale=rescale, bound=0.05).clean(model, trusted, Clues(reference=start), generator())
        for rescale in (False, True)
    )
    name = "hidden.0.0.weight"
    weights = [dict(net.named_parameters())[name] for net in (model, plain[0], scaled[0])]
    assert weights[2].norm().item() == pytest.approx(weights[0].norm().item(), rel=1e-6)
    assert torch.allclose(weights[2], weights[1] * scaled[2]["scale"])
    assert weights[1].norm().item() != pytest.approx(weights[0].norm().item(), rel=1e-4)


def test_before_or_at_the_bound(model: nn.Module, start: nn.Module, trusted: TrustedData) -> None:
    at, within = (
        FLAIN(bound=0.05, take=take, rescale=False).clean(model, trusted, Clues(reference=start), generator())[2]  # type: ignore[arg-type]
        for take in ("at_bound", "within_bound")
    )
    assert at["curve"] == within["curve"]
    assert at["validation_before"] - at["validation_after"] >= 0.05
    assert within["validation_before"] - within["validation_after"] < 0.05
    assert [point["flipped"] for point in at["curve"]][-2:] == [within["flipped"], at["flipped"]]


def test_removes_a_backdoor_in_a_silent_neuron(
    model: nn.Module, start: nn.Module, trusted: TrustedData, digits: Samples
) -> None:
    repaired, _, _ = FLAIN(bound=0.05).clean(model, trusted, Clues(reference=start), generator())
    victims = lit(digits)
    success = [np.mean(predict(net, victims) == 0) for net in (model, repaired)]
    assert success[0] > 0.5
    assert success[1] < success[0] / 2


def test_says_why_it_does_not_act(model: nn.Module, start: nn.Module, trusted: TrustedData) -> None:
    clues = Clues(reference=start)
    bright = replace(trusted, fit=Samples(torch.full_like(trusted.fit.images, 255), trusted.fit.labels))
    tries = [
        (FLAIN(cap=0.5), bright, False, "raise cap"),
        (FLAIN(bound=0.0), bright, True, "raise bound"),  # nothing lost is a loss of 0
        (FLAIN(bound=0.02, take="within_bound", start=1.0), trusted, True, "raise bound"),
    ]
    for method, data, reached, sentence in tries:
        repaired, _, notes = method.clean(model, data, clues, generator())
        assert (notes["acted"], notes["bound_reached"], notes["flipped"]) == (False, reached, 0)
        assert sentence in notes["reason"]
        assert repaired is not model
        assert all(torch.equal(a, b) for a, b in zip(repaired.parameters(), model.parameters(), strict=True))


def test_a_bound_that_is_never_reached_leaves_the_last_threshold(
    model: nn.Module, start: nn.Module, trusted: TrustedData
) -> None:
    _, _, notes = FLAIN(bound=1.0, cap=2.0).clean(model, trusted, Clues(reference=start), generator())
    assert (notes["acted"], notes["bound_reached"], notes["flipped"]) == (True, False, 64)


def test_on_the_classifier_of_a_convolutional_net(backdoored: Any, tiny_net: Any) -> None:
    repaired, _, notes = FLAIN(cap=10.0, take="within_bound").clean(
        backdoored.model, backdoored.trusted, Clues(reference=tiny_net(0)), generator()
    )
    assert (notes["layer"], notes["neurons"]) == ("fc", 64)
    changed = [
        name
        for name, entry in repaired.state_dict().items()
        if not torch.equal(entry, backdoored.model.state_dict()[name])
    ]
    assert changed == (["fc.weight"] if notes["acted"] else [])


def test_refusals(model: nn.Module, start: nn.Module, trusted: TrustedData) -> None:
    assert isinstance(FLAIN(), Cleanup)
    assert FLAIN().needs_trusted
    assert FLAIN().refusal(model) is None
    assert "has none" in str(FLAIN().refusal(nn.Sequential(nn.Conv2d(1, 1, 1))))
    clues = Clues(reference=start)
    other = Mlp(hidden=(7,)).build((1, 8, 8), CLASSES, generator())
    empty = replace(trusted, validate=trusted.validate.subset(torch.arange(0)))
    cases: list[tuple[nn.Module, TrustedData | None, Clues, str]] = [
        (model, None, clues, "hand it TrustedData"),
        (model, empty, clues, "hand it TrustedData"),
        (model, trusted, Clues(), "Clues\\(reference"),
        (model, trusted, Clues(reference=other), "no Linear hidden.0.0 like"),
        (model, trusted, Clues(reference=nn.Sequential()), "no Linear hidden.0.0 like"),
        (nn.Sequential(nn.Conv2d(1, CLASSES, 8), nn.Flatten()), trusted, clues, "has none"),
    ]
    for net, data, given, sentence in cases:
        with pytest.raises(MethodRefused, match=sentence):
            FLAIN().clean(net, data, given, generator())
    for value, sentence in (
        (torch.nan, r"`hidden\.0\.0\.weight` is not finite"),
        (1e30, r"weights of hidden\.0\.0 are not finite or too large"),  # their norm is beyond float32
    ):
        broken = copy.deepcopy(model)
        weight_of(broken, "hidden.0.0").data.fill_(value)
        with pytest.raises(MethodRefused, match=sentence):
            FLAIN().clean(broken, trusted, clues, generator())
    problems: list[Any] = []
    parse(FLAIN, {"start": 0.5, "cap": 0.2}, "cleanup[0]", problems)
    assert [problem.path for problem in problems] == ["cleanup[0].cap"]
