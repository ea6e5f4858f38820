from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

from fedbd.defenses.cleanup.unlearning import fewest, modal_prediction, unlearn
from fedbd.params import flatten
from fedbd.training import TrainingPlan
from fedbd.types import Samples

NetBuilder = Callable[[int], nn.Module]
PLAN = TrainingPlan(epochs=20, batch_size=32, lr=0.01, momentum=0.9, weight_decay=5e-4, lr_step=10)


def generator(seed: int = 3) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def state_bytes(model: nn.Module) -> dict[str, bytes]:
    return {name: entry.numpy().tobytes() for name, entry in model.state_dict().items()}


def slow_reference(model: nn.Module, data: Samples, epochs: int) -> tuple[nn.Module, list[float]]:
    """Ascent with momentum and weight decay by hand; nothing is clipped."""
    slow, rng = copy.deepcopy(model).train(), generator()
    velocity = {name: torch.zeros_like(p) for name, p in slow.named_parameters()}
    accuracy = []
    for epoch in range(epochs):
        right, order = 0, torch.randperm(len(data), generator=rng)
        for start in range(0, len(data), 32):
            index = order[start : start + 32]
            x = (data.images[index].float() / 255).contiguous(memory_format=torch.channels_last)
            out = slow(x)
            right += int((out.argmax(1) == data.labels[index]).sum())
            slow.zero_grad()
            F.nll_loss(F.log_softmax(out, 1), data.labels[index]).backward()
            with torch.no_grad():
                for name, p in slow.named_parameters():
                    velocity[name] = 0.9 * velocity[name] + (5e-4 * p - p.grad)
                    p.sub_(0.01 * 0.1 ** (epoch // 10) * velocity[name])
        accuracy.append(right / len(data))
    return slow, accuracy


def test_equals_a_slow_reference_and_stops_after_the_first_epoch_at_the_stop(backdoored: Any) -> None:
    found = unlearn(backdoored.model, backdoored.trusted.fit, PLAN, 0.2, generator())
    assert found.reached
    assert found.reason == ""
    assert found.accuracy[-1] <= 0.2 < min(found.accuracy[:-1])
    slow, accuracy = slow_reference(backdoored.model, backdoored.trusted.fit, len(found.accuracy))
    assert np.allclose(found.accuracy, accuracy, atol=0.011)  # two of 200 images
    distance = np.linalg.norm(flatten(slow) - flatten(found.model))
    moved = np.linalg.norm(flatten(backdoored.model) - flatten(found.model))
    assert distance < 0.01 * moved


def test_leaves_the_original_untouched_and_returns_a_model_in_eval_mode(backdoored: Any) -> None:
    before = state_bytes(backdoored.model)
    found = unlearn(backdoored.model, backdoored.trusted.fit, PLAN, 0.2, generator())
    assert state_bytes(backdoored.model) == before
    assert not backdoored.model.training
    assert not any(module.training for module in found.model.modules())
    assert all(entry.requires_grad for entry in found.model.parameters())


def test_a_stop_that_is_never_reached_is_reported(backdoored: Any) -> None:
    plan = TrainingPlan(epochs=2, batch_size=128, lr=1e-4)
    found = unlearn(backdoored.model, backdoored.trusted.fit, plan, 0.2, generator())
    assert not found.reached
    assert len(found.accuracy) == 2
    assert found.reason.endswith(": raise unlearn_lr, lower batch_size, raise unlearn_epochs or raise unlearn_stop")
    long = unlearn(backdoored.model, backdoored.trusted.fit, replace(plan, epochs=20, lr=1e-6), 0.2, generator())
    assert long.reason.endswith(": raise unlearn_lr, lower batch_size or raise unlearn_stop")  # no more epochs
    assert found.as_notes() == {"reached": False, "epochs": 2, "accuracy": list(found.accuracy)}


def test_an_untrained_model_has_nothing_to_unlearn(backdoored: Any, tiny_net: NetBuilder) -> None:
    found = unlearn(tiny_net(0), backdoored.trusted.fit, PLAN, 0.2, generator())
    assert not found.reached
    assert found.accuracy == ()
    assert "not trained yet" in found.reason


@pytest.mark.parametrize(("stop", "bar"), [(0.0, 0.0), (0.1, 0.2), (0.2, 0.4), (0.4, 0.7), (0.5, 0.75)])
def test_any_stop_that_a_field_takes_can_be_reached_by_a_good_model(stop: float, bar: float) -> None:
    assert fewest(stop) == pytest.approx(bar)


def test_a_high_stop_unlearns_a_good_model_and_a_refusal_names_the_stop(backdoored: Any, tiny_net: NetBuilder) -> None:
    assert unlearn(backdoored.model, backdoored.trusted.fit, PLAN, 0.5, generator()).reached
    found = unlearn(tiny_net(0), backdoored.trusted.fit, PLAN, 0.5, generator())
    assert not found.reached
    assert "too close to the stop of 0.5 (at least 0.75)" in found.reason
    assert "or lower unlearn_stop" in found.reason


def test_images_that_augmentation_makes_unknown_are_no_success(backdoored: Any) -> None:
    plan = TrainingPlan(epochs=20, batch_size=32, lr=0.01, augment="crop_flip")
    found = unlearn(backdoored.model, backdoored.trusted.fit, plan, 0.2, generator())
    assert not found.reached
    assert "augment" in found.reason


def test_a_frozen_model_cannot_unlearn(backdoored: Any) -> None:
    frozen = copy.deepcopy(backdoored.model).requires_grad_(False)
    found = unlearn(frozen, backdoored.trusted.fit, PLAN, 0.2, generator())
    assert not found.reached
    assert "requires_grad_(True)" in found.reason
    assert not any(entry.requires_grad for entry in frozen.parameters())


def test_divergence_does_not_pass_for_success(backdoored: Any) -> None:
    plan = TrainingPlan(epochs=20, batch_size=32, lr=1e20)
    found = unlearn(backdoored.model, backdoored.trusted.fit, plan, 0.2, generator())
    assert not found.reached
    assert "diverged" in found.reason


def test_same_generator_same_bits(backdoored: Any) -> None:
    first, again = (unlearn(backdoored.model, backdoored.trusted.fit, PLAN, 0.2, generator()) for _ in range(2))
    assert flatten(first.model).tobytes() == flatten(again.model).tobytes()


class Fixed(nn.Module):
    """Predicts the label that the first pixel says; 255 gives NaN."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        value = (x[:, 0, 0, 0] * 255).round().long()
        out = F.one_hot(value.clamp(max=4), 5).float()
        out[value == 255] = torch.nan
        return out


@pytest.mark.parametrize(
    ("pixels", "expected"),
    [([3, 3, 1, 2], (3, 0.5)), ([2, 1, 1, 2], (1, 0.5)), ([255, 255, 255, 4], (4, 0.25)), ([255], (0, 0.0))],
)
def test_modal_prediction(pixels: list[int], expected: tuple[int, float]) -> None:
    images = torch.tensor(pixels, dtype=torch.uint8)[:, None, None, None]
    assert modal_prediction(Fixed(), Samples(images, torch.zeros(len(pixels), dtype=torch.int64))) == expected
