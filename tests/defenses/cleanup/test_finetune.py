from __future__ import annotations

import copy
import json
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from fedbd.defenses.cleanup.finetune import FineTune, tune
from fedbd.defenses.local.cutout import cutout
from fedbd.errors import MethodRefused, UserError
from fedbd.metrics import predict
from fedbd.training import TrainingPlan, crop_flip, train
from fedbd.types import Cleanup, Clues, Samples, TrustedData

SMALL = FineTune(epochs=2, batch_size=32, lr=0.02, augment="none")


def generator(seed: int = 3) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def state_bytes(model: nn.Module) -> dict[str, bytes]:
    return {name: entry.numpy().tobytes() for name, entry in model.state_dict().items()}


def share_right(model: nn.Module, data: Samples) -> float:
    return float((predict(model, data) == data.labels.numpy()).mean())


def test_rate_falls_once() -> None:
    assert [FineTune().rate(epoch) for epoch in range(20)] == [0.1] * 2 + [0.1 * 0.1] * 18
    assert [FineTune(lr_drop_epoch=None).rate(epoch) for epoch in (0, 5)] == [0.1, 0.1]
    with pytest.raises(UserError, match="nesterov: needs a momentum above 0"):
        FineTune(momentum=0.0)
    assert FineTune(momentum=0.0, nesterov=False).problems() == []


def test_loop_against_a_plain_one_with_another_optimizer(backdoored: Any) -> None:
    """Nesterov SGD with weight decay, written out, on the same order of samples."""
    how = FineTune(epochs=2, batch_size=64, lr=0.02, lr_drop_epoch=1, augment="none")
    tuned = copy.deepcopy(backdoored.model)
    tuning = tune(tuned, backdoored.trusted.fit, how, generator())
    slow, rng, losses = copy.deepcopy(backdoored.model).train(), generator(), []
    velocity = [torch.zeros_like(p) for p in slow.parameters()]
    for rate in (0.02, 0.02 * 0.1):
        for index in torch.randperm(200, generator=rng).split(64):
            x, y = backdoored.trusted.fit.images[index].float() / 255, backdoored.trusted.fit.labels[index]
            loss = F.cross_entropy(slow(x), y)
            gradients = torch.autograd.grad(loss, list(slow.parameters()))
            losses.append(float(loss.detach()))
            with torch.no_grad():
                for p, v, g in zip(slow.parameters(), velocity, gradients, strict=True):
                    decayed = g + 1e-4 * p
                    v.mul_(0.9).add_(decayed)
                    p.sub_(rate * (decayed + 0.9 * v))
    assert [entry["lr"] for entry in tuning.epochs] == [0.02, 0.02 * 0.1]
    wanted = [float(np.mean(losses[:4])), float(np.mean(losses[4:]))]
    assert [entry["cross_entropy"] for entry in tuning.epochs] == pytest.approx(wanted, rel=1e-3)
    for (name, a), b in zip(tuned.state_dict().items(), slow.state_dict().values(), strict=True):
        assert torch.allclose(a.float(), b.float(), atol=1e-4), name


def test_augmentation_draws_as_the_trainings_does(backdoored: Any) -> None:
    """With a constant rate it is the clients' own training."""
    tuned, trained = copy.deepcopy(backdoored.model), copy.deepcopy(backdoored.model)
    tune(tuned, backdoored.trusted.fit, FineTune(epochs=1, lr=0.02), generator())
    plan = TrainingPlan(epochs=1, lr=0.02, nesterov=True, weight_decay=1e-4, augment="crop_flip")
    train(trained, backdoored.trusted.fit, plan, generator())
    assert state_bytes(tuned) == state_bytes(trained)


def test_cutout_comes_after_the_crop(backdoored: Any) -> None:
    seen: list[Tensor] = []
    tuned = copy.deepcopy(backdoored.model)
    handle = tuned.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    how = FineTune(epochs=1, batch_size=200, augment="crop_flip_cutout")
    tune(tuned, backdoored.trusted.fit, how, generator())
    handle.remove()
    rng = generator()
    x, _ = backdoored.trusted.fit.batch(torch.randperm(200, generator=rng))
    assert torch.equal(seen[0], cutout(crop_flip(x, rng), rng))
    assert (seen[0] != x).any()


def test_whole_run(backdoored: Any) -> None:
    before = state_bytes(backdoored.model)
    clues = Clues(target=3)
    model, passed, notes = SMALL.clean(backdoored.model, backdoored.trusted, clues, generator())
    assert isinstance(SMALL, Cleanup) and SMALL.needs_trusted
    assert state_bytes(backdoored.model) == before
    assert not backdoored.model.training and not model.training
    assert passed is clues
    assert notes["acted"] and len(notes["epochs"]) == 2
    assert "attention" not in notes["epochs"][0]
    validate = backdoored.trusted.validate
    assert notes["validation_before"] == notes["validation_start"] == share_right(backdoored.model, validate)
    assert notes["validation_after"] == share_right(model, validate)
    assert all(p.grad is None for p in model.parameters())
    json.dumps(notes, allow_nan=False)
    again = SMALL.clean(backdoored.model, backdoored.trusted, clues, generator())
    assert state_bytes(again[0]) == state_bytes(model) and again[2] == notes
    other = SMALL.clean(backdoored.model, backdoored.trusted, clues, generator(4))
    assert state_bytes(other[0]) != state_bytes(model)


@pytest.mark.parametrize("start", ["unlearned", "recovered"])
def test_starts_from_what_an_earlier_cleanup_found(start: Any, backdoored: Any, tiny_net: Any) -> None:
    found = tiny_net(5).eval().requires_grad_(False)
    given = state_bytes(found)
    how = FineTune(start=start, epochs=1, batch_size=32, lr=0.02, augment="none")
    clues = Clues(**{start: found})
    model, _, notes = how.clean(backdoored.model, backdoored.trusted, clues, generator())
    alone = copy.deepcopy(found)
    tune(alone, backdoored.trusted.fit, how, generator())
    assert state_bytes(model) == state_bytes(alone) != given
    assert state_bytes(found) == given and not any(p.requires_grad for p in found.parameters())
    assert notes["validation_start"] == share_right(found, backdoored.trusted.validate)
    assert notes["validation_before"] == share_right(backdoored.model, backdoored.trusted.validate)
    with pytest.raises(MethodRefused, match=f"{start} model.*run rnp before"):
        how.clean(backdoored.model, backdoored.trusted, Clues(), generator())
    with pytest.raises(MethodRefused, match="not those of this model"):
        how.clean(backdoored.model, backdoored.trusted, Clues(**{start: nn.Linear(2, 2)}), generator())


def test_where_it_diverges_it_says_so_and_changes_nothing(backdoored: Any) -> None:
    how = FineTune(epochs=4, batch_size=32, lr=1e30, augment="none")
    model, _, notes = how.clean(backdoored.model, backdoored.trusted, Clues(), generator())
    assert model is not backdoored.model
    assert state_bytes(model) == state_bytes(backdoored.model)
    assert notes["acted"] is False
    assert "lower lr" in notes["reason"]
    assert notes["validation_after"] == notes["validation_before"]
    json.dumps(notes, allow_nan=False)


def test_a_penalty_of_weight_zero_is_noted_and_changes_no_bit(backdoored: Any) -> None:
    plain, noted, pressed = (copy.deepcopy(backdoored.model) for _ in range(3))
    without = tune(plain, backdoored.trusted.fit, SMALL, generator())

    def penalty(net: nn.Module, weight: float) -> Any:
        return lambda x: [(weight, net.get_parameter("fc.weight").square().sum())]

    tuning = tune(noted, backdoored.trusted.fit, SMALL, generator(), penalty=penalty(noted, 0.0))
    assert state_bytes(plain) == state_bytes(noted)
    assert [entry["cross_entropy"] for entry in tuning.epochs] == [entry["cross_entropy"] for entry in without.epochs]
    assert all(len(entry["attention"]) == 1 and entry["attention"][0] > 0 for entry in tuning.epochs)
    tune(pressed, backdoored.trusted.fit, SMALL, generator(), penalty=penalty(pressed, 1.0))
    assert pressed.get_parameter("fc.weight").norm() < plain.get_parameter("fc.weight").norm()


def test_refusals(backdoored: Any) -> None:
    fit, validate = backdoored.trusted.fit, backdoored.trusted.validate
    empty = fit.subset(torch.arange(0))
    for trusted, what in (
        (None, "there are none"),
        (TrustedData(empty, validate, 10), "their part to fit on is empty"),
        (TrustedData(fit, empty, 10), "their part to validate on is empty"),
    ):
        with pytest.raises(MethodRefused, match=rf"{what}; hand it TrustedData .*trusted: {{size: 500}}"):
            SMALL.clean(backdoored.model, trusted, Clues(), generator())
    single = fit.subset(torch.nonzero(fit.labels == 2)[:, 0])
    with pytest.raises(MethodRefused, match=r"one class.*trusted\.labels"):
        SMALL.clean(backdoored.model, TrustedData(single, validate, 10), Clues(), generator())


def test_gray_values_and_layout_are_the_trainings(backdoored: Any) -> None:
    seen: list[Tensor] = []
    tuned = copy.deepcopy(backdoored.model)
    handle = tuned.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    tune(tuned, backdoored.trusted.fit, FineTune(epochs=1, batch_size=200, augment="none"), generator())
    handle.remove()
    order = torch.randperm(200, generator=generator())
    assert torch.equal(seen[0], backdoored.trusted.fit.images[order].float() / 255)


def test_every_part_keeps_its_mode_and_what_was_frozen_is_so_again(backdoored: Any) -> None:
    model = copy.deepcopy(backdoored.model).train()
    model.block1.eval()
    model.block1.requires_grad_(False)
    tuned, _, notes = SMALL.clean(model, backdoored.trusted, Clues(), generator())
    assert notes["acted"]
    assert [part.training for part in tuned.modules()] == [part.training for part in model.modules()]
    assert [entry.requires_grad for entry in tuned.parameters()] == [e.requires_grad for e in model.parameters()]
    assert not torch.equal(tuned.block1.conv.weight, model.block1.conv.weight)  # all layers are trained all the same
