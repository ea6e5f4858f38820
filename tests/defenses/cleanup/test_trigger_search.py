from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fedbd.defenses.cleanup import trigger_search
from fedbd.defenses.cleanup.trigger_search import (
    FIRST_COST,
    RecoveredTrigger,
    Search,
    anomaly_indices,
    outliers,
    search,
)
from fedbd.errors import MethodRefused
from fedbd.types import Samples, Trigger


def generator(seed: int = 3) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def found(label: int, size: float, reached: bool = True) -> Search:
    mask = torch.zeros(20, 20)
    mask.view(-1)[: int(size)] = 1
    return Search(label, RecoveredTrigger(mask, torch.zeros(1, 20, 20)), reached, 1)


def test_stamp_blends_the_pattern_in_and_leaves_the_input() -> None:
    trigger = RecoveredTrigger(torch.tensor([[0.0, 1.0], [0.25, 0.0]]), torch.full((3, 2, 2), 0.8))
    assert isinstance(trigger, Trigger)
    images = torch.full((2, 3, 2, 2), 0.4, dtype=torch.float64)
    stamped = trigger.stamp(images)
    assert stamped.dtype == torch.float64
    assert torch.allclose(stamped[1, 2], torch.tensor([[0.4, 0.8], [0.5, 0.4]], dtype=torch.float64))
    assert (images == 0.4).all()
    assert trigger.size == 1.25


def test_anomaly_indices_against_the_closed_form() -> None:
    # Median 3, deviations 2 1 0 1 7, their median 1.
    assert np.allclose(anomaly_indices([1, 2, 3, 4, 10]), np.array([2, 1, 0, 1, 7]) / 1.4826)
    assert np.isnan(anomaly_indices([2, 2, 2, 9])).all()
    normal = np.random.default_rng(0).normal(5, 3, 20001)
    assert np.mean(anomaly_indices(normal) > 2) == pytest.approx(0.0455, abs=0.01)  # a normal's share beyond 2 sigma


def test_only_small_working_triggers_are_outliers() -> None:
    sizes = [50, 52, 48, 51, 10, 90, 12]
    searches = [found(label, size, reached=label != 6) for label, size in enumerate(sizes)]
    assert [(one.label, round(index, 2)) for index, one in outliers(searches, 2.0)] == [
        (4, round((50 - 10) / (1.4826 * 2), 2))  # median 50; deviations 0 2 2 1 40 40 38, their median 2
    ]
    assert outliers(searches, 20.0) == []


def test_the_cost_follows_success() -> None:
    cost = trigger_search._Cost()
    values = []
    for worked in [False] * 5 + [True] * 9 + [False] * 4 + [True] + [False] * 5:
        cost.update(worked)
        values.append(cost.value)
    assert values[:9] == [0.0] * 9
    assert values[9:13] == [FIRST_COST] * 4  # the pass that set it counts
    assert values[13:23] == [2 * FIRST_COST] * 10
    assert values[23] == pytest.approx(2 * FIRST_COST / 2**1.5)
    assert cost.grew and cost.fell


def reference_costs(outcomes: list[bool]) -> list[float]:
    """Return the cost after each step by the published counters: of setting, of raising, of lowering."""
    cost, setting, raising, lowering, costs = 0.0, 0, 0, 0, []
    for worked in outcomes:
        setting = setting + 1 if cost == 0 and worked else 0
        if setting >= 5:
            cost, raising, lowering = 1e-3, 0, 0
        raising, lowering = (raising + 1, 0) if worked else (0, lowering + 1)
        if raising >= 5:
            raising, cost = 0, cost * 2
        elif lowering >= 5:
            lowering, cost = 0, cost / 2**1.5
        costs.append(cost)
    return costs


@pytest.mark.parametrize("seed", range(5))
def test_the_cost_is_that_of_the_published_counters(seed: int) -> None:
    runs = np.random.default_rng(seed).integers(1, 12, 60)
    outcomes = [bool(i % 2) for i, length in enumerate(runs) for _ in range(length)]
    cost, values = trigger_search._Cost(), []
    for worked in outcomes:
        cost.update(worked)
        values.append(cost.value)
    assert np.allclose(values, reference_costs(outcomes), rtol=1e-12, atol=0)


class Quadrants(nn.Module):
    """Class k is the brightest quarter of an 8x8 image; with a backdoor two bright corner pixels give class 0."""

    def __init__(self, backdoor: bool) -> None:
        super().__init__()
        self.backdoor = backdoor

    def forward(self, x: Tensor) -> Tensor:
        gray = x.mean(1)
        out = 20 * torch.stack([gray[:, r : r + 4, c : c + 4].mean((1, 2)) for r in (0, 4) for c in (0, 4)], 1)
        if not self.backdoor:
            return out
        lit = torch.relu(gray[:, 7, 7] + gray[:, 6, 6] - 0.4)
        return out + 40 * lit[:, None] * torch.tensor([1.0, 0, 0, 0])


def pictures(count: int = 64) -> Samples:
    images = torch.randint(20, 60, (count, 1, 8, 8), generator=generator(), dtype=torch.uint8)
    labels = torch.arange(count) % 4
    for image, label in zip(images, labels.tolist(), strict=True):
        image[0, 4 * (label // 2) :, 4 * (label % 2) :][:4, :4] += 60
    images[:, 0, [6, 7], [6, 7]] = 10
    return Samples(images, labels)


def look(model: nn.Module, label: int = 0, passes: int = 100, success: float = 0.99) -> Search:
    return search(model, pictures(), label, passes=passes, batch_size=16, lr=0.1, success=success, rng=generator())


def test_finds_a_planted_trigger_and_none_as_small_in_the_clean_model() -> None:
    data = pictures()
    assert (Quadrants(True)(data.images.float() / 255).argmax(1) == data.labels).all()
    planted, clean = look(Quadrants(True)), look(Quadrants(False))
    assert planted.reached and clean.reached
    assert planted.trigger.size < 3  # two pixels
    assert clean.trigger.size > 1.5 * planted.trigger.size
    mask = planted.trigger.mask
    assert set(mask.flatten().topk(2).indices.tolist()) == {7 * 8 + 7, 6 * 8 + 6}
    assert (planted.trigger.pattern[0, [6, 7], [6, 7]] > 0.7).all()
    for model, outcome in ((Quadrants(True), planted), (Quadrants(False), clean)):
        others = data.images[data.labels != 0].float() / 255
        assert (model(outcome.trigger.stamp(others)).argmax(1) == 0).float().mean() > 0.95


@pytest.mark.parametrize(("success", "price"), [(2.0, FIRST_COST), (0.0, FIRST_COST), (0.0, 0.2)])
def test_equals_a_slow_reference(success: float, price: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """No trigger works, and the mask costs nothing; all do, and it costs little or much from the sixth pass on."""
    monkeypatch.setattr(trigger_search, "FIRST_COST", price)
    data, model, rng = pictures(12), Quadrants(False), generator(7)
    outcome = search(model, data, 2, passes=8, batch_size=5, lr=0.1, success=success, rng=generator(7))
    start = torch.rand(2, 8, 8, generator=rng).double().clamp(1e-4, 1 - 1e-4)
    value, first, second, step = torch.atanh(2 * start - 1), torch.zeros(2, 8, 8), torch.zeros(2, 8, 8), 0
    rows = torch.tensor([i for i in range(12) if i % 4 != 2])
    ends, sizes = [], []
    for done in range(8):
        seen = []
        cost = price if success == 0 and done >= 5 else 0.0
        for index in rows[torch.randperm(len(rows), generator=rng)].split(5):
            step += 1
            value = value.detach().requires_grad_(True)
            both = (torch.tanh(value) + 1) / 2
            x = data.images[index].double() / 255
            out = model((1 - both[0]) * x + both[0] * both[1])
            loss = (out.logsumexp(1) - out[:, 2]).mean() + cost * both[0].sum()
            (gradient,) = torch.autograd.grad(loss, value)
            first, second = 0.5 * first + 0.5 * gradient, 0.9 * second + 0.1 * gradient**2
            value = value - 0.1 * (first / (1 - 0.5**step)) / ((second / (1 - 0.9**step)).sqrt() + 1e-8)
            seen.append(float(both[0].detach().sum()))
        ends.append((torch.tanh(value.detach()) + 1) / 2)
        sizes.append(sum(seen) / len(seen))
    # Of those that work the one of the smallest pass, which is the last only where the mask costs much; else the last.
    assert (int(np.argmin(sizes)) == 7) == (price > FIRST_COST)
    both = ends[int(np.argmin(sizes))] if success == 0 else ends[-1]
    assert outcome.reached == (success == 0)
    assert outcome.passes == 8
    assert torch.allclose(outcome.trigger.mask.double(), both[0], atol=1e-4)
    assert torch.allclose(outcome.trigger.pattern[0].double(), both[1], atol=1e-4)
    assert (both[0] - start[0]).abs().max() > 0.1


def test_leaves_the_model_and_repeats_itself_and_needs_other_labels() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 4)).train()
    before = [entry.clone() for entry in model.parameters()]
    first, again = (look(model, passes=3) for _ in range(2))
    assert torch.equal(first.trigger.mask, again.trigger.mask)
    assert all(torch.equal(a, b) and b.grad is None for a, b in zip(before, model.parameters(), strict=True))
    assert model.training
    only = pictures().subset(torch.arange(0, 64, 4))
    with pytest.raises(MethodRefused, match="other labels than 0"):
        search(model, only, 0, passes=1, batch_size=4, lr=0.1, success=0.9, rng=generator())


def test_a_diverged_model_is_refused_and_does_not_pass_for_class_0() -> None:
    broken = nn.Sequential(nn.Flatten(), nn.Linear(64, 4))
    nn.init.constant_(broken[1].weight, torch.nan)
    for label in (0, 1):
        with pytest.raises(MethodRefused, match="has diverged"):
            look(broken, label, passes=2)
