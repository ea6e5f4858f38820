from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

from fedbd.attacks.badnets import BadNets
from fedbd.defenses.local import abl_central
from fedbd.defenses.local.abl_central import ABLCentral
from fedbd.defenses.local.central_state import CentralState, momentum_of, restore_momentum
from fedbd.defenses.local.cutout import crop_flip_cutout
from fedbd.defenses.local.isolate import sample_losses
from fedbd.defenses.local.objectives import crop_and_flip
from fedbd.errors import MethodRefused, UserError
from fedbd.models.checkpoint import read_tensors, save_tensors
from fedbd.params import flatten
from fedbd.training import TrainingPlan, sgd, train_epoch
from fedbd.types import AttackContext, Samples

NetBuilder = Callable[[int], nn.Module]
SMALL = ABLCentral(
    tuning_epochs=2, finetune_epochs=3, unlearn_epochs=2, late_from=2, lr=0.05, batch_size=32, ratio=0.05
)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_the_authors_code_is_10_60_4_at_their_rates() -> None:
    epochs = ABLCentral.authors_code().schedule
    assert [epoch.stage for epoch in epochs] == ["tuning"] * 10 + ["finetune"] * 60 + ["unlearn"] * 4
    assert [epoch.lr for epoch in epochs] == [0.1] * 10 + [0.1] * 40 + [0.01] * 20 + [5e-4] * 4
    assert [i for i, epoch in enumerate(epochs) if epoch.fresh] == [0, 10]  # one optimizer for the second stage
    code = ABLCentral.authors_code()
    assert (code.control, code.gamma, code.ratio, code.batch_size) == ("flooding", 0.5, 0.01, 128)
    assert (code.momentum, code.nesterov, code.weight_decay) == (0.9, True, 1e-4)
    assert code.augment == "crop_flip_cutout"


def test_the_paper_is_20_of_100_with_one_objective() -> None:
    epochs = ABLCentral.paper().schedule
    assert [epoch.stage for epoch in epochs] == ["tuning"] * 20 + ["joint"] * 80
    assert [epoch.lr for epoch in epochs] == [0.1] * 20 + [0.1] * 40 + [0.01] * 40
    assert ABLCentral.paper().control == "lga"


def test_the_demo_is_5_epochs_of_ascent_with_an_optimizer_of_its_own() -> None:
    demo = ABLCentral.quick_demo()
    assert [(epoch.stage, epoch.lr) for epoch in demo.schedule] == [("unlearn", 5e-4)] * 5
    assert [epoch.fresh for epoch in demo.schedule] == [True, False, False, False, False]
    assert demo.batch_size == 64
    assert all(preset.problems() == [] for preset in (demo, ABLCentral.paper(), ABLCentral.authors_code()))


@pytest.mark.parametrize(("carried", "starts"), [("carry", [0, 2]), ("fresh", [0, 2, 5])])
def test_where_optimizers_start(carried: str, starts: list[int]) -> None:
    schedule = replace(SMALL, unlearn_optimizer=carried).schedule  # type: ignore[arg-type]
    assert [i for i, epoch in enumerate(schedule) if epoch.fresh] == starts


def test_problems() -> None:
    with pytest.raises(UserError, match="nesterov: needs a momentum above 0"):
        replace(SMALL, momentum=0.0)
    with pytest.raises(UserError, match="finetune_epochs: must be above 0 where no stage has an epoch"):
        ABLCentral(tuning_epochs=0, finetune_epochs=0, unlearn_epochs=0)


def slow_step(
    model: nn.Module,
    velocity: dict[nn.Parameter, torch.Tensor],
    x: torch.Tensor,
    y: torch.Tensor,
    lr: float,
    sign: float,
) -> None:
    """One step of Nesterov's SGD, from its definition; ``sign`` 0 stands for the loss control."""
    model.zero_grad()
    loss = F.cross_entropy(model(x.contiguous(memory_format=torch.channels_last)), y)
    loss.backward()
    factor = sign or (1.0 if loss.item() > SMALL.gamma else -1.0)
    with torch.no_grad():
        for p in model.parameters():
            assert p.grad is not None
            gradient = factor * p.grad + 1e-4 * p
            velocity[p] = 0.9 * velocity[p] + gradient if p in velocity else gradient.clone()
            p.sub_(lr * (gradient + 0.9 * velocity[p]))


@pytest.mark.parametrize("carried", ["carry", "fresh"])
def test_equals_a_slow_reference(carried: str, digits: Samples, tiny_net: NetBuilder) -> None:
    data = digits.subset(torch.arange(200))
    abl = replace(SMALL, augment="none", unlearn_lr=0.01, unlearn_optimizer=carried)  # type: ignore[arg-type]
    model, slow, rng = tiny_net(0), tiny_net(0).train(), generator()
    _, notes = abl.fit(model, data, generator())

    def epochs(part: Samples, rates: list[float], sign: float, velocity: dict[nn.Parameter, torch.Tensor]) -> None:
        for lr in rates:
            for index in torch.split(torch.randperm(len(part), generator=rng), 32):
                slow_step(slow, velocity, *part.batch(index), lr, sign)

    epochs(data, [0.05, 0.05], 0.0, {})
    isolated = np.argsort(sample_losses(slow, data), kind="stable")[:10]
    velocity: dict[nn.Parameter, torch.Tensor] = {}
    epochs(data.subset(np.setdiff1d(np.arange(200), isolated)), [0.05, 0.05, 0.01], 1.0, velocity)
    epochs(data.subset(isolated), [0.01, 0.01], -1.0, velocity if carried == "carry" else {})
    assert notes["isolated"] == isolated.tolist()
    assert [len(notes[stage]) for stage in ("tuning", "finetune", "unlearn")] == [2, 3, 2]
    assert np.allclose(flatten(model), flatten(slow), atol=1e-4)


def test_fine_tuning_alone_augments(digits: Samples, tiny_net: NetBuilder, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[object] = []
    original = abl_central.train_epoch
    monkeypatch.setattr(
        abl_central, "train_epoch", lambda *a, **named: (seen.append(named.get("on_batch")), original(*a, **named))[1]
    )
    short = {"tuning_epochs": 1, "finetune_epochs": 1, "unlearn_epochs": 1, "ratio": 0.1}
    for augment, wanted in (("crop_flip_cutout", crop_flip_cutout), ("crop_flip", crop_and_flip), ("none", None)):
        seen.clear()
        ABLCentral(**short, augment=augment).fit(tiny_net(0), digits.subset(torch.arange(60)), generator())  # type: ignore[arg-type]
        assert seen == [None, wanted, None]


def test_lga_and_flooding_give_the_same_bits(digits: Samples, tiny_net: NetBuilder) -> None:
    weights, notes = {}, {}
    for control in ("lga", "flooding"):
        model = tiny_net(1)
        abl = replace(SMALL, control=control, tuning_epochs=6, gamma=0.7)  # type: ignore[arg-type]
        _, notes[control] = abl.fit(model, digits.subset(torch.arange(300)), generator())
        weights[control] = flatten(model).tobytes()
    assert weights["lga"] == weights["flooding"]
    assert notes["lga"]["tuning"] != notes["flooding"]["tuning"]  # so the sign was reversed at least once
    assert min(notes["flooding"]["tuning"]) >= 0.7


@pytest.mark.parametrize("objective", ["sequential", "joint"])
@pytest.mark.parametrize("stop", [1, 2, 3, 5])
def test_resumed_from_files_is_the_same_to_the_bit(
    stop: int, objective: str, tmp_path: Path, digits: Samples, tiny_net: NetBuilder
) -> None:
    data, abl = digits.subset(torch.arange(150)), replace(SMALL, objective=objective, lr=0.02)  # type: ignore[arg-type]
    whole, expected = abl.fit(tiny_net(0), data, generator(3))
    first, rng = tiny_net(0), generator(3)
    for state in abl.epochs(first, data, rng, abl.start(data, rng)):
        save_tensors(first.state_dict(), tmp_path / "weights", {})
        save_tensors(state.tensors(), tmp_path / "state", {})
        if state.done == stop:
            break
    second = tiny_net(7)
    second.load_state_dict(read_tensors(tmp_path / "weights")[0])
    state = CentralState.from_tensors(read_tensors(tmp_path / "state")[0])
    seen: list[int] = []
    second, notes = abl.fit(second, data, generator(99), on_epoch=lambda s: seen.append(s.done), state=state)
    assert seen == list(range(stop + 1, len(abl.schedule) + 1))
    assert notes == expected
    assert all(
        torch.equal(entry, second.state_dict()[name]) and torch.isfinite(entry).all()
        for name, entry in whole.state_dict().items()
    )


def test_resuming_needs_its_momentum(digits: Samples, tiny_net: NetBuilder) -> None:
    data = digits.subset(torch.arange(150))
    whole, _ = SMALL.fit(tiny_net(0), data, generator(3))
    model, rng = tiny_net(0), generator(3)
    state = next(SMALL.epochs(model, data, rng, SMALL.start(data, rng)))
    SMALL.fit(model, data, rng, state=replace(state, momentum={}))
    assert flatten(model).tobytes() != flatten(whole).tobytes()


def test_a_state_stays_what_it_was(digits: Samples, tiny_net: NetBuilder) -> None:
    data, states, weights = digits.subset(torch.arange(100)), [], []
    model = tiny_net(0)

    def keep(state: CentralState) -> None:
        states.append(state)
        weights.append(copy.deepcopy(model.state_dict()))

    SMALL.fit(model, data, generator(), on_epoch=keep)
    again = tiny_net(0)
    again.load_state_dict(weights[0])
    SMALL.fit(again, data, generator(), state=states[0])  # the training had gone on since
    assert flatten(again).tobytes() == flatten(model).tobytes()


def test_a_finished_training_stays_as_it_is(digits: Samples, tiny_net: NetBuilder) -> None:
    data, states = digits.subset(torch.arange(100)), []
    model, notes = SMALL.fit(tiny_net(0), data, generator(), on_epoch=states.append)
    before = flatten(model).tobytes()
    _, again = SMALL.fit(model, data, generator(), state=states[-1])
    assert again == notes
    assert flatten(model).tobytes() == before


def test_momentum_survives_in_the_parameters_memory_format(digits: Samples, tiny_net: NetBuilder) -> None:
    model, plan = tiny_net(0), TrainingPlan(epochs=1)
    optimizer = sgd(model, plan)
    train_epoch(model, optimizer, digits.subset(torch.arange(64)), plan, 0, generator())
    kept = {name: buffer.contiguous() for name, buffer in momentum_of(model, optimizer).items()}
    assert kept.keys() == dict(model.named_parameters()).keys()
    other = sgd(model, plan)
    restore_momentum(model, other, kept)
    for parameter in model.parameters():
        restored = other.state[parameter]["momentum_buffer"]
        assert torch.equal(restored, optimizer.state[parameter]["momentum_buffer"])
        assert restored.stride() == parameter.stride()


def test_a_given_set_replaces_the_isolation(digits: Samples, tiny_net: NetBuilder) -> None:
    data, given = digits.subset(torch.arange(100)), np.array([7, 3, 50])
    _, notes = SMALL.fit(tiny_net(0), data, generator(), isolated=given)
    assert notes["isolated"] == [7, 3, 50]
    assert notes["isolated_loss"] is None


def test_the_demo_unlearns_a_backdoor(digits: Samples, tiny_net: NetBuilder, context: AttackContext) -> None:
    poisoned, truth = BadNets(share=0.1, per="dataset").pollute(digits.subset(torch.arange(900)), context, generator(1))
    model, plan = tiny_net(0), TrainingPlan(epochs=10, lr=0.05)
    optimizer = sgd(model, plan)
    for epoch in range(10):
        train_epoch(model, optimizer, poisoned, plan, epoch, generator(epoch))
    given, unseen = truth[::2], truth[1::2]
    clean = np.setdiff1d(np.arange(900), truth)
    demo = replace(ABLCentral.quick_demo(), unlearn_lr=5e-3)
    trained, notes = demo.fit(copy.deepcopy(model), poisoned, generator(), isolated=given)
    before, after = sample_losses(model, poisoned), sample_losses(trained, poisoned)
    assert notes["unlearn"] == sorted(notes["unlearn"])
    assert after[unseen].mean() > before[unseen].mean() + 1
    assert after[unseen].mean() > 3 * after[clean].mean()


def test_joint_training_raises_the_loss_of_the_isolated_alone(digits: Samples, tiny_net: NetBuilder) -> None:
    data, given = digits.subset(torch.arange(300)), np.arange(0, 300, 20)
    abl = replace(SMALL, tuning_epochs=0, objective="joint", finetune_epochs=8, augment="none")
    model, notes = abl.fit(tiny_net(0), data, generator(), isolated=given)
    losses = sample_losses(model, data)
    assert "unlearn" not in notes
    assert len(notes["joint"]) == 8
    assert losses[given].mean() > 2 * np.delete(losses, given).mean()


@pytest.mark.parametrize(
    ("isolated", "says"),
    [
        (None, "without tuning_epochs"),
        (np.array([], dtype=np.int64), "distinct indices"),
        (np.array([1, 1]), "distinct indices"),
        (np.array([0.5]), "distinct indices"),
        (np.arange(20), "not of all"),
        (np.array([-1]), "from 0 to 19"),
        (np.array([20]), "from 0 to 19"),
    ],
)
def test_refuses_a_set_that_is_none(
    isolated: np.ndarray | None, says: str, digits: Samples, tiny_net: NetBuilder
) -> None:
    with pytest.raises(MethodRefused, match=says):
        ABLCentral.quick_demo().fit(tiny_net(0), digits.subset(torch.arange(20)), generator(), isolated=isolated)


def test_refuses_the_state_of_another_training(digits: Samples, tiny_net: NetBuilder) -> None:
    data, states = digits.subset(torch.arange(60)), []
    SMALL.fit(tiny_net(0), data, generator(), on_epoch=states.append)
    for abl, samples, state in (
        (SMALL, data.subset(torch.arange(59)), states[0]),
        (replace(SMALL, unlearn_epochs=1), data, states[-1]),
        (replace(SMALL, tuning_epochs=1), data, states[0]),  # nothing isolated yet, though the stage is over
    ):
        with pytest.raises(MethodRefused, match="another training's"):
            abl.fit(tiny_net(0), samples, generator(), state=state)


def test_refuses_a_single_sample(digits: Samples, tiny_net: NetBuilder) -> None:
    with pytest.raises(MethodRefused, match="1 samples"):
        SMALL.fit(tiny_net(0), digits.subset(torch.arange(1)), generator())
