from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

from fedbd.attacks.badnets import BadNets
from fedbd.defenses.local import abl
from fedbd.defenses.local.abl import ABL
from fedbd.defenses.local.isolate import sample_odds
from fedbd.defenses.local.objectives import flooding, gradient_ascent_below
from fedbd.errors import MethodRefused
from fedbd.params import flatten
from fedbd.training import TrainingPlan, train
from fedbd.types import AttackContext, LocalDefense, Memory, Notes, Samples

NetBuilder = Callable[[int], nn.Module]
PLAN = TrainingPlan(epochs=1, lr=0.05)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def participate(
    abl: ABL, model: nn.Module, data: Samples, times: int, plan: TrainingPlan = PLAN
) -> tuple[Memory, list[Notes]]:
    memory: Memory = {}
    notes = []
    for t in range(times):
        memory, found = abl.fit(model, data, plan, memory, generator(t))
        notes.append(found)
    return memory, notes


def reference_losses(model: nn.Module, data: Samples) -> np.ndarray:
    with torch.no_grad():
        out = copy.deepcopy(model).eval()(data.images.float() / 255)
    return F.cross_entropy(out.double(), data.labels, reduction="none").numpy()


def test_is_a_local_defense() -> None:
    assert isinstance(ABL(), LocalDefense)


def test_lga_and_flooding_give_the_same_bits(digits: Samples, tiny_net: NetBuilder) -> None:
    weights, data, plan = {}, digits.subset(torch.arange(300)), replace(PLAN, batch_size=16)
    for control in ("lga", "flooding"):
        model = tiny_net(1)
        participate(ABL(control=control, isolate_after=9), model, data, 4, plan)  # type: ignore[arg-type]
        weights[control] = flatten(model).tobytes()
    plain = tiny_net(1)
    for t in range(4):
        train(plain, data, plan, generator(t))
    assert weights["lga"] == weights["flooding"]
    assert weights["lga"] != flatten(plain).tobytes()  # so the sign was reversed at least once


@pytest.mark.parametrize("control", [gradient_ascent_below, flooding])
@pytest.mark.parametrize(("second", "sign"), [(2.0, 1.0), (-0.5, -1.0)])
def test_the_sign_acts_on_the_batch_mean(
    control: Callable[[torch.Tensor, torch.Tensor, float], torch.Tensor], second: float, sign: float
) -> None:
    # The first sample's loss is always below gamma; the mean is above it only where the second's is large.
    values = [[4.0, 0.0], [second, 0.0]]
    logits, labels = torch.tensor(values, requires_grad=True), torch.tensor([0, 1])
    control(logits, labels, 0.5).backward()
    softmax = F.softmax(torch.tensor(values), dim=1)
    expected = sign * (softmax - F.one_hot(labels, 2)) / 2
    assert logits.grad is not None
    assert torch.allclose(logits.grad, expected)


def test_schedule_counts_participations(digits: Samples, tiny_net: NetBuilder) -> None:
    data = digits.subset(torch.arange(250))
    abl, model, memory = ABL(isolate_after=2, ratio=0.03, minimum=1), tiny_net(0), {}
    stages, keys = [], []
    for t in range(4):
        memory, notes = abl.fit(model, data, PLAN, memory, generator(t))
        assert notes["participation"] == t + 1 == int(memory["participations"][0])
        stages.append(notes["stage"])
        keys.append(set(memory))
        assert all(isinstance(value, np.ndarray) for value in memory.values())
        assert model.training
    after = {"participations", "samples", "isolated", "isolation_loss", "confident"}
    assert stages == ["control", "control", "finetune", "finetune"]
    assert keys == [{"participations", "samples", "odds"}, after, after, after]
    assert len(memory["isolated"]) == 7
    assert memory["isolated"].dtype == np.int64
    assert memory["isolation_loss"][0] < memory["isolation_loss"][1]


@pytest.mark.parametrize("score", ["loss", "class_rank", "drop"])
def test_isolates_by_its_score(score: str, digits: Samples, tiny_net: NetBuilder) -> None:
    data = digits.subset(torch.arange(250))
    model = tiny_net(0)
    train(model, data.subset(torch.arange(100)), PLAN, generator(9))
    before = reference_losses(model, data)
    memory, _ = participate(ABL(isolate_after=1, ratio=0.1, score=score), model, data, 1)  # type: ignore[arg-type]
    after, labels = reference_losses(model, data), data.labels.numpy()
    ranks = np.array(
        [((after < after[i]) & (labels == labels[i])).sum() / (labels == labels[i]).sum() for i in range(250)]
    )
    sizes = np.bincount(labels)[labels]
    by = {"loss": after, "drop": after - before, "class_rank": ranks + 0.5 / sizes}[score]
    assert memory["isolated"].tolist() == np.lexsort((after, by))[:25].tolist()


def test_without_confidence_it_fine_tunes_on_the_rest_alone(digits: Samples, tiny_net: NetBuilder) -> None:
    data, model = digits.subset(torch.arange(200)), tiny_net(0)
    abl = ABL(isolate_after=1, ratio=0.2)
    memory, notes = abl.fit(model, data, PLAN, {}, generator(0))
    assert not notes["confidence"]["passed"]
    expected = copy.deepcopy(model)
    abl.fit(model, data, PLAN, memory, generator(1))
    rest = [i for i in range(200) if i not in set(memory["isolated"].tolist())]
    train(expected, data.subset(torch.tensor(rest)), PLAN, generator(1))
    assert flatten(model).tobytes() == flatten(expected).tobytes()


def test_unlearning_is_plain_ascent_on_the_isolated_samples(digits: Samples, tiny_net: NetBuilder) -> None:
    data, model = digits.subset(torch.arange(200)), tiny_net(0)
    plan = replace(PLAN, momentum=0.5, weight_decay=1e-3, lr_step=1)
    abl = ABL(isolate_after=1, ratio=0.1, confidence=None, unlearn_epochs=3, unlearn_lr=0.01)
    memory, _ = abl.fit(model, data, plan, {}, generator(0))
    slow = copy.deepcopy(model)
    _, notes = abl.fit(model, data, plan, memory, generator(1))
    rng = generator(1)
    isolated = memory["isolated"]
    train(slow, data.subset(np.setdiff1d(np.arange(200), isolated)), plan, rng)
    velocity = [torch.zeros_like(p) for p in slow.parameters()]
    for _ in range(3):
        order = torch.randperm(20, generator=rng)
        x, y = data.images[isolated][order].float() / 255, data.labels[isolated][order]
        slow.zero_grad()
        F.cross_entropy(slow(x.contiguous(memory_format=torch.channels_last)), y).backward()
        with torch.no_grad():
            for p, v in zip(slow.parameters(), velocity, strict=True):
                v.mul_(0.5).add_(-p.grad + 1e-3 * p)
                p.sub_(0.01 * v)
    assert notes["stage"] == "unlearn"
    assert np.allclose(flatten(model), flatten(slow), atol=1e-5)


def slow_participation(
    model: nn.Module, data: Samples, isolated: np.ndarray, plan: TrainingPlan, seed: int, abl: ABL
) -> None:
    """Plain fine-tuning, then ascent with the same velocities, step by step."""
    rng, momentum = generator(seed), plan.momentum
    velocity = [torch.zeros_like(p) for p in model.parameters()]
    rest = data.subset(np.setdiff1d(np.arange(len(data)), isolated))
    stages = [(rest, plan.lr, 1.0, plan.epochs), (data.subset(isolated), abl.unlearn_lr, -1.0, abl.unlearn_epochs)]
    for part, lr, sign, epochs in stages:
        for _ in range(epochs):
            for index in torch.split(torch.randperm(len(part), generator=rng), plan.batch_size):
                x, y = part.batch(index)
                model.zero_grad()
                F.cross_entropy(model(x.contiguous(memory_format=torch.channels_last)), y).backward()
                with torch.no_grad():
                    for p, v in zip(model.parameters(), velocity, strict=True):
                        assert p.grad is not None
                        v.mul_(momentum).add_(sign * p.grad + plan.weight_decay * p)
                        p.sub_(lr * v)


def test_unlearning_may_carry_the_momentum_over(digits: Samples, tiny_net: NetBuilder) -> None:
    data, plan, weights = digits.subset(torch.arange(200)), replace(PLAN, momentum=0.8, weight_decay=1e-3), {}
    for carried in ("carry", "fresh"):
        abl = ABL(isolate_after=1, ratio=0.1, confidence=None, unlearn_lr=0.01, unlearn_optimizer=carried)  # type: ignore[arg-type]
        model = tiny_net(0)
        memory, _ = abl.fit(model, data, plan, {}, generator(0))
        slow = copy.deepcopy(model).train()
        abl.fit(model, data, plan, memory, generator(1))
        slow_participation(slow, data, memory["isolated"], plan, 1, abl)
        weights[carried] = flatten(model), flatten(slow)
    assert np.allclose(*weights["carry"], atol=1e-5)
    assert not np.allclose(*weights["fresh"], atol=1e-4)


def test_without_momentum_there_is_nothing_to_carry(digits: Samples, tiny_net: NetBuilder) -> None:
    weights = []
    for carried in ("carry", "fresh"):
        model = tiny_net(0)
        abl = ABL(isolate_after=1, confidence=None, unlearn_optimizer=carried)  # type: ignore[arg-type]
        participate(abl, model, digits.subset(torch.arange(150)), 2, replace(PLAN, momentum=0.0))
        weights.append(flatten(model).tobytes())
    assert weights[0] == weights[1]


@pytest.mark.parametrize(("weight", "factor"), [(1.0, 1.0), (None, 20 / 180)])
def test_joint_training_replaces_fine_tuning_and_ascent(
    weight: float | None, factor: float, digits: Samples, tiny_net: NetBuilder
) -> None:
    data, plan = digits.subset(torch.arange(200)), replace(PLAN, momentum=0.0, batch_size=64)
    abl = ABL(isolate_after=1, ratio=0.1, confidence=None, objective="joint", unlearn_weight=weight)
    model = tiny_net(0)
    memory, _ = abl.fit(model, data, plan, {}, generator(0))
    slow = copy.deepcopy(model).train()
    _, notes = abl.fit(model, data, plan, memory, generator(1))
    isolated, rng = memory["isolated"], generator(1)
    rest = np.setdiff1d(np.arange(200), isolated)
    for index in torch.split(torch.randperm(180, generator=rng), 64):
        rows = np.concatenate([rest[index], isolated[torch.randperm(20, generator=rng)]])
        signs = torch.tensor([1 / len(index)] * len(index) + [-factor / 20] * 20)
        x, y = data.batch(torch.from_numpy(rows))
        slow.zero_grad()
        losses = F.cross_entropy(slow(x.contiguous(memory_format=torch.channels_last)), y, reduction="none")
        (losses * signs).sum().backward()
        with torch.no_grad():
            for p in slow.parameters():
                assert p.grad is not None
                p.sub_(plan.lr * (p.grad + plan.weight_decay * p))
    assert (notes["stage"], notes["images"]) == ("joint", 180)
    assert np.allclose(flatten(model), flatten(slow), atol=1e-5)


def test_joint_training_waits_for_the_confidence_test_too(digits: Samples, tiny_net: NetBuilder) -> None:
    weights = []
    for objective in ("joint", "sequential"):
        model = tiny_net(0)
        abl = ABL(isolate_after=1, separation=1e9, objective=objective)  # type: ignore[arg-type]
        _, notes = participate(abl, model, digits.subset(torch.arange(150)), 2)
        weights.append(flatten(model).tobytes())
        assert notes[1]["stage"] == "finetune"
    assert weights[0] == weights[1]


def test_unlearning_raises_the_loss_of_the_isolated_samples(digits: Samples, tiny_net: NetBuilder) -> None:
    data, losses = digits.subset(torch.arange(300)), {}
    for confidence in ("mixture", None):
        model = tiny_net(0)
        abl = ABL(isolate_after=2, ratio=0.05, separation=1e9, confidence=confidence, unlearn_lr=0.01)  # type: ignore[arg-type]
        memory, notes = participate(abl, model, data, 4, replace(PLAN, batch_size=16))
        losses[confidence] = reference_losses(model, data)[memory["isolated"]].mean()
        assert notes[-1]["stage"] == ("finetune" if confidence else "unlearn")
    assert losses[None] > 2 * losses["mixture"]


def test_keep_isolates_once_and_renew_in_every_later_participation(digits: Samples, tiny_net: NetBuilder) -> None:
    data = digits.subset(torch.arange(250))
    for isolation, reported in (("keep", [False, True, False, False]), ("renew", [False, True, True, True])):
        memory, notes = participate(ABL(isolate_after=2, isolation=isolation), tiny_net(0), data, 4)  # type: ignore[arg-type]
        assert ["isolated" in found for found in notes] == reported
        assert len(memory["isolated"]) == 5


def test_renewing_does_not_train_the_model_under_the_control(digits: Samples, tiny_net: NetBuilder) -> None:
    data, model = digits.subset(torch.arange(200)), tiny_net(0)
    abl = ABL(isolate_after=1, isolation="renew")
    memory, _ = abl.fit(model, data, PLAN, {}, generator(0))
    expected, spent = copy.deepcopy(model), copy.deepcopy(model)
    memory, _ = abl.fit(model, data, PLAN, memory, generator(1))
    rng = generator(1)
    train(spent, data, PLAN, rng, objective=lambda out, y: gradient_ascent_below(out, y, 0.5))
    isolated = np.argsort(reference_losses(spent, data), kind="stable")[:5]
    train(expected, data.subset(np.setdiff1d(np.arange(200), isolated)), PLAN, rng)
    assert memory["isolated"].tolist() == isolated.tolist()
    assert flatten(model).tobytes() == flatten(expected).tobytes()


def test_the_control_trains_without_augmentation_and_fine_tuning_with(digits: Samples, tiny_net: NetBuilder) -> None:
    data = digits.subset(torch.arange(100))
    weights = []
    for augment in ("none", "crop_flip"):
        model, plan = tiny_net(0), replace(PLAN, augment=augment)
        abl = ABL(isolate_after=1)
        memory, _ = abl.fit(model, data, plan, {}, generator(0))
        weights.append(flatten(model).tobytes())
        abl.fit(model, data, plan, memory, generator(1))
        weights.append(flatten(model).tobytes())
    assert weights[0] == weights[2]
    assert weights[1] != weights[3]


def test_the_ascent_trains_without_augmentation(
    digits: Samples, tiny_net: NetBuilder, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[str, str]] = []
    original = abl.train_epoch

    def spy(
        model: nn.Module, optimizer: torch.optim.Optimizer, data: Samples, plan: TrainingPlan, *rest: object, **named
    ):  # type: ignore[no-untyped-def]
        seen.append((named["objective"].__name__, plan.augment))
        return original(model, optimizer, data, plan, *rest, **named)

    monkeypatch.setattr(abl, "train_epoch", spy)
    defense, model, memory = ABL(isolate_after=1, confidence=None, unlearn_epochs=2), tiny_net(0), {}
    for turn in range(2):
        plan = TrainingPlan(epochs=1, augment="crop_flip")
        memory, _ = defense.fit(model, digits.subset(torch.arange(200)), plan, memory, generator(turn))
    assert seen == [("cross_entropy", "crop_flip"), ("ascent", "none"), ("ascent", "none")]


def test_the_confidence_test_sees_the_mean_over_participations(
    digits: Samples, tiny_net: NetBuilder, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[np.ndarray] = []
    original = abl.mixture_confidence
    monkeypatch.setattr(
        abl, "mixture_confidence", lambda odds, *a, **named: (seen.append(odds), original(odds, *a, **named))[1]
    )
    data, model, memory, found = digits.subset(torch.arange(200)), tiny_net(0), {}, []
    for turn in range(3):
        memory, _ = ABL(isolate_after=3).fit(model, data, TrainingPlan(epochs=1), memory, generator(turn))
        found.append(sample_odds(model, data)[0])
    assert len(seen) == 1
    assert np.allclose(seen[0], np.mean(found, axis=0))
    assert not np.allclose(seen[0], found[-1])


def test_same_generators_same_bits(digits: Samples, tiny_net: NetBuilder) -> None:
    outcomes = []
    for _ in range(2):
        model = tiny_net(0)
        memory, notes = participate(ABL(isolate_after=1, confidence=None), model, digits.subset(torch.arange(150)), 2)
        outcomes.append((flatten(model).tobytes(), {k: v.tobytes() for k, v in memory.items()}, notes))
    assert outcomes[0] == outcomes[1]


def test_refuses_memory_of_other_data(digits: Samples, tiny_net: NetBuilder) -> None:
    memory, _ = participate(ABL(), tiny_net(0), digits.subset(torch.arange(100)), 1)
    with pytest.raises(MethodRefused, match=r"100 samples.* 99"):
        ABL().fit(tiny_net(0), digits.subset(torch.arange(99)), PLAN, memory, generator(0))


def test_refuses_to_rank_a_diverged_model(digits: Samples, tiny_net: NetBuilder) -> None:
    with pytest.raises(MethodRefused, match="not finite"):
        ABL().fit(tiny_net(0), digits.subset(torch.arange(100)), replace(PLAN, lr=1e30), {}, generator(0))


def test_a_model_that_diverges_after_the_isolation_is_refused_too(digits: Samples, tiny_net: NetBuilder) -> None:
    data, method = digits.subset(torch.arange(100)), ABL(isolate_after=1, confidence=None)
    memory, _ = participate(method, tiny_net(0), data, 1)
    with pytest.raises(MethodRefused, match="diverged; lower the rate"):
        method.fit(tiny_net(0), data, replace(PLAN, lr=1e30), memory, generator(0))


def test_a_client_with_a_single_sample_trains(digits: Samples, tiny_net: NetBuilder) -> None:
    memory, notes = participate(ABL(isolate_after=1, confidence=None), tiny_net(0), digits.subset(torch.arange(1)), 2)
    assert len(memory["isolated"]) == 0
    assert [found["stage"] for found in notes] == ["control", "finetune"]
    assert notes[0]["isolated_loss"] is None


def isolate(data: Samples, model: nn.Module, seed: int) -> tuple[Memory, Notes]:
    memory: Memory = {}
    notes: Notes = {}
    for t in range(3):
        memory, notes = ABL(isolate_after=3).fit(
            model, data, TrainingPlan(epochs=2, lr=0.05), memory, generator(100 * seed + t)
        )
    return memory, notes


def test_on_poisoned_digits_it_isolates_poison_and_is_confident(
    digits: Samples, tiny_net: NetBuilder, context: AttackContext
) -> None:
    clean = digits.subset(torch.arange(1000))
    poisoned, truth = BadNets(share=0.2, per="dataset").pollute(clean, context, generator(10))
    memory, notes = isolate(poisoned, tiny_net(10), 10)
    assert np.isin(memory["isolated"], truth).all()
    assert notes["confidence"]["passed"]
    assert notes["confidence"]["label"] == 0
    assert bool(memory["confident"][0])


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_on_clean_digits_it_is_not_confident(seed: int, digits: Samples, tiny_net: NetBuilder) -> None:
    _, notes = isolate(digits.subset(torch.arange(1000)), tiny_net(seed), seed)
    assert not notes["confidence"]["passed"]


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_on_skewed_clean_digits_it_is_not_confident(seed: int, digits: Samples, tiny_net: NetBuilder) -> None:
    kept = np.full(10, 4)
    kept[[seed, seed + 3, seed + 6]] = [140, 100, 60]
    labels = digits.labels.numpy()
    rows = np.sort(np.concatenate([np.flatnonzero(labels == c)[: kept[c]] for c in range(10)]))
    memory, notes = isolate(digits.subset(rows), tiny_net(seed), seed)
    assert len(np.unique(labels[rows][memory["isolated"]])) < 3  # the majority's lowest losses, as raw loss has it
    assert not notes["confidence"]["passed"]
