from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from fedbd.attacks.badnets import BadNets
from fedbd.defenses.detection.abl_isolation import ABLIsolation
from fedbd.errors import MethodRefused
from fedbd.metrics import roc_auc
from fedbd.types import Detector, Samples


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(3)


class Fixed(nn.Module):
    """Gives logits that its first pixel's value looks up."""

    def __init__(self, table: list[list[float]]) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.tensor(table))

    def forward(self, x: Tensor) -> Tensor:
        return self.table[(x[:, 0, 0, 0] * 255).round().long()]


def looked_up(labels: list[int]) -> Samples:
    images = torch.arange(len(labels), dtype=torch.uint8)[:, None, None, None].expand(-1, 1, 8, 8).contiguous()
    return Samples(images, torch.tensor(labels))


def test_the_score_is_minus_the_cross_entropy_and_has_no_ties() -> None:
    model = Fixed([[0.0, 0.0], [3.0, 1.0], [40.0, 0.0], [60.0, 0.0], [0.0, 60.0]])
    scores, notes = ABLIsolation().score(model, looked_up([0, 0, 0, 0, 0]), None, generator())
    by_hand = -np.log1p(np.exp([0.0, -2.0, -40.0, -60.0]))
    assert np.allclose(scores[:4], by_hand, rtol=1e-12, atol=0)
    assert scores[4] == pytest.approx(-60, rel=1e-12)
    assert F.cross_entropy(model.table[2:4], torch.tensor([0, 0]), reduction="none").tolist() == [0, 0]
    assert scores[3] > scores[2] > scores[1] > scores[0] > scores[4]
    assert notes == {"mean_loss": pytest.approx(-scores.mean())}


def test_the_rank_is_within_the_given_label() -> None:
    model = Fixed([[1.0, 0.0], [2.0, 0.0], [3.0, 0.0], [0.0, 9.0], [0.0, 8.0]])
    scores, _ = ABLIsolation(by="class_rank").score(model, looked_up([0, 0, 0, 1, 1]), None, generator())
    assert np.allclose(scores, [-2.5 / 3, -1.5 / 3, -0.5 / 3, -0.5 / 2, -1.5 / 2])


def test_poisoned_training_samples_score_higher(backdoored: Any, digits: Samples, context: Any) -> None:
    data, poisoned = BadNets(share=0.1, per="dataset").pollute(
        digits.subset(torch.arange(900)), context, torch.Generator().manual_seed(1)
    )
    scores, _ = ABLIsolation().score(backdoored.model, data, None, generator())
    flag = np.isin(np.arange(len(data)), poisoned)
    assert (roc_auc(scores[flag], scores[~flag]) or 0) > 0.6


def test_order_does_not_matter(backdoored: Any) -> None:
    order = torch.randperm(len(backdoored.clean), generator=generator())
    straight, _ = ABLIsolation().score(backdoored.model, backdoored.clean, None, generator())
    shuffled, _ = ABLIsolation().score(backdoored.model, backdoored.clean.subset(order), None, generator())
    assert np.allclose(shuffled, straight[order.numpy()], rtol=1e-4, atol=1e-12)


def test_tuning_trains_a_copy_whose_losses_stay_at_the_flood_level(digits: Samples, tiny_net: Any) -> None:
    own, model = digits.subset(torch.arange(300)), tiny_net(4)
    before = copy.deepcopy(model.state_dict())
    settings = {"tune_epochs": 8, "batch_size": 32, "tune_lr": 0.05}
    scores, notes = ABLIsolation(**settings).score(model, own, None, generator())  # type: ignore[arg-type]
    flooded, _ = ABLIsolation(control="flooding", **settings).score(model, own, None, generator())  # type: ignore[arg-type]
    free, _ = ABLIsolation(gamma=1e-6, **settings).score(model, own, None, generator())  # type: ignore[arg-type]
    assert np.array_equal(scores, flooded)
    assert scores.mean() < free.mean()
    untuned, _ = ABLIsolation().score(model, own, None, generator())
    assert scores.mean() > untuned.mean()
    assert set(notes) == {"mean_loss", "tuned_loss"}
    assert all(torch.equal(entry, before[name]) for name, entry in model.state_dict().items())
    assert model.training


def test_tuning_is_nesterov_sgd_under_the_control(digits: Samples, tiny_net: Any) -> None:
    own, model = digits.subset(torch.arange(200)), tiny_net(4)
    scores, _ = ABLIsolation(tune_epochs=2, batch_size=32, tune_lr=0.05).score(model, own, None, generator())
    slow, rng = copy.deepcopy(model).train(), generator()
    optimizer = torch.optim.SGD(slow.parameters(), lr=0.05, momentum=0.9, nesterov=True, weight_decay=1e-4)
    for _ in range(2):
        for index in torch.randperm(200, generator=rng).split(32):
            loss = F.cross_entropy(slow(own.images[index].float() / 255), own.labels[index])
            optimizer.zero_grad()
            (loss if loss > 0.5 else -loss).backward()
            optimizer.step()
    with torch.no_grad():
        out = slow.eval()(own.images.float() / 255).double()
    assert np.allclose(scores, -F.cross_entropy(out, own.labels, reduction="none").numpy(), rtol=1e-2, atol=1e-3)


def test_refuses_a_diverged_model_and_nothing_to_score(backdoored: Any) -> None:
    assert isinstance(ABLIsolation(), Detector)
    assert not ABLIsolation().needs_trusted
    broken = copy.deepcopy(backdoored.model)
    broken.fc.weight.data.fill_(torch.nan)
    with pytest.raises(MethodRefused, match="not finite"):
        ABLIsolation().score(broken, backdoored.clean, None, generator())
    with pytest.raises(MethodRefused, match="lower tune_lr"):
        ABLIsolation(tune_epochs=3, tune_lr=1e30).score(backdoored.model, backdoored.clean, None, generator())
    with pytest.raises(MethodRefused, match="no samples"):
        ABLIsolation().score(backdoored.model, backdoored.clean.subset(torch.arange(0)), None, generator())
    frozen = copy.deepcopy(backdoored.model).requires_grad_(False)
    with pytest.raises(MethodRefused, match="all weights are frozen"):
        ABLIsolation(tune_epochs=1).score(frozen, backdoored.clean, None, generator())
    assert np.isfinite(ABLIsolation().score(frozen, backdoored.clean, None, generator())[0]).all()
