from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from fedbd.errors import MethodRefused, UserError
from fedbd.flower.app_loader import load_component
from fedbd.running.engines import flower_app_dir
from fedbd.training import TrainingPlan, crop_flip, learning, memory_format_of, sgd, train
from fedbd.types import Samples


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """As clients train: more threads may add in another order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def samples(n: int = 37, shape: tuple[int, int, int] = (3, 8, 8), classes: int = 4, seed: int = 0) -> Samples:
    rng = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (n, *shape), generator=rng, dtype=torch.uint8)
    return Samples(images, torch.randint(0, classes, (n,), generator=rng))


def small_cnn(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 64, 4)
    )


def generator(seed: int = 5) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def plain_loop(model: nn.Module, data: Samples, plan: TrainingPlan, rates: list[float], rng: torch.Generator) -> float:
    """Train as every tutorial does: float images, an order per epoch, one optimizer; return the last epoch's loss."""
    x_all, y_all = data.images.float() / 255, data.labels
    optimizer = torch.optim.SGD(
        model.parameters(),
        lr=1.0,
        momentum=plan.momentum,
        nesterov=plan.nesterov,
        weight_decay=plan.weight_decay,
        fused=True,
    )
    model.train()
    for rate in rates:
        optimizer.param_groups[0]["lr"] = rate
        order = torch.randperm(len(y_all), generator=rng)
        losses = []
        for start in range(0, len(y_all), plan.batch_size):
            rows = order[start : start + plan.batch_size]
            loss = F.cross_entropy(model(x_all[rows]), y_all[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    return sum(losses) / len(losses)


PLANS: list[tuple[dict[str, Any], list[float]]] = [
    ({"epochs": 1, "batch_size": 10, "lr": 0.1}, [0.1]),
    ({"epochs": 3, "batch_size": 16, "lr": 0.05, "momentum": 0.0, "weight_decay": 0.0}, [0.05] * 3),
    ({"epochs": 2, "batch_size": 37, "lr": 0.1, "nesterov": True}, [0.1] * 2),
    ({"epochs": 2, "batch_size": 1000, "lr": 0.1}, [0.1] * 2),
    ({"epochs": 5, "batch_size": 20, "lr": 0.1, "lr_step": 2, "lr_gamma": 0.5}, [0.1, 0.1, 0.05, 0.05, 0.025]),
]


@pytest.mark.parametrize(("fields", "rates"), PLANS, ids=[str(fields) for fields, _ in PLANS])
def test_training_is_the_plain_loop_bit_for_bit(fields: dict[str, Any], rates: list[float]) -> None:
    data, plan = samples(), TrainingPlan(**fields)
    ours, theirs = small_cnn(), small_cnn()
    mine, other = generator(), generator()
    notes = train(ours, data, plan, mine)
    loss = plain_loop(theirs, data, plan, rates, other)
    for name, entry in ours.state_dict().items():
        assert torch.equal(entry, theirs.state_dict()[name]), name
    assert notes["loss"] == pytest.approx(loss, rel=1e-6)
    assert notes["images"] == plan.epochs * 37
    assert torch.equal(mine.get_state(), other.get_state())  # it drew one order per epoch, and nothing else


def test_the_unfused_optimizer_agrees_up_to_rounding() -> None:
    data, plan = samples(), TrainingPlan(epochs=2, batch_size=10)
    model, by_hand = small_cnn(), small_cnn()
    train(model, data, plan, generator())
    rng = generator()
    velocity = {name: torch.zeros_like(p) for name, p in by_hand.named_parameters()}
    by_hand.train()
    for _ in range(2):
        for rows in torch.randperm(37, generator=rng).split(10):
            x, y = data.batch(rows)
            by_hand.zero_grad()
            F.cross_entropy(by_hand(x), y).backward()
            with torch.no_grad():
                for name, p in by_hand.named_parameters():
                    velocity[name] = 0.9 * velocity[name] + p.grad + 5e-4 * p
                    p.sub_(0.1 * velocity[name])
    for (name, got), want in zip(model.named_parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6, msg=name)


def test_training_moves_the_model_and_lowers_the_loss() -> None:
    data, model = samples(), small_cnn()
    first = train(model, data, TrainingPlan(epochs=1, batch_size=16, lr=0.05), generator())
    last = train(model, data, TrainingPlan(epochs=20, batch_size=16, lr=0.05), generator(1))
    assert last["loss"] < 0.5 * first["loss"]


# Rates.


def test_rates_by_epoch() -> None:
    plan = TrainingPlan(lr=0.2, lr_step=3, lr_gamma=0.1)
    assert [plan.rate(epoch) for epoch in range(8)] == pytest.approx([0.2] * 3 + [0.02] * 3 + [0.002] * 2)
    assert [TrainingPlan(lr=0.2).rate(epoch) for epoch in (0, 99)] == [0.2, 0.2]


def test_rates_by_round() -> None:
    plan_of = load_component(flower_app_dir(), "clients", "step", "plan_of")
    plan = TrainingPlan(lr=0.1, lr_decay=0.5, lr_step=2, epochs=4)
    assert [plan_of(plan, round_).lr for round_ in (1, 2, 3, 5)] == [0.1, 0.05, 0.025, 0.00625]
    assert plan_of(plan, 1) == plan
    assert [plan_of(plan, 2).rate(epoch) for epoch in range(4)] == pytest.approx([0.05, 0.05, 0.005, 0.005])
    assert plan_of(TrainingPlan(), 1000).lr == 0.1


def test_nesterov_needs_momentum() -> None:
    with pytest.raises(
        UserError, match="TrainingPlan cannot be made of these fields:\n  nesterov: needs a momentum above 0"
    ):
        TrainingPlan(nesterov=True, momentum=0.0)
    assert TrainingPlan(nesterov=True).problems() == TrainingPlan(momentum=0.0).problems() == []


@pytest.mark.parametrize(
    "wrong", [{"augment": "cropflip"}, {"epochs": 0}, {"momentum": 2.0}, {"lr": -1.0}, {"batch_size": 0}]
)
def test_a_plan_that_is_made_in_python_is_checked(wrong: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=f"{next(iter(wrong))}: must be"):
        TrainingPlan(**wrong)


def test_a_rate_that_falls_for_long_never_becomes_none() -> None:
    plan_of = load_component(flower_app_dir(), "clients", "step", "plan_of")
    assert plan_of(TrainingPlan(lr_decay=0.1), 1000).lr > 0


# What is trained.


def test_frozen_parameters_stay() -> None:
    model = small_cnn()
    model[0].requires_grad_(False)
    before = model[0].weight.clone()
    assert len(sgd(model, TrainingPlan()).param_groups[0]["params"]) == 4
    train(model, samples(), TrainingPlan(), generator())
    assert torch.equal(model[0].weight, before)


def test_a_last_batch_may_be_smaller_and_every_image_is_seen_once_an_epoch() -> None:
    seen: list[list[int]] = []

    def note(x: Tensor, y: Tensor, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        seen.append((x[:, 0, 0, 0] * 255).round().to(torch.int64).tolist())
        return x, y

    images = torch.zeros(23, 3, 8, 8, dtype=torch.uint8)
    images[:, 0, 0, 0] = torch.arange(23)
    train(
        small_cnn(),
        Samples(images, torch.zeros(23, dtype=torch.int64)),
        TrainingPlan(epochs=2, batch_size=10),
        generator(),
        on_batch=note,
    )
    assert [len(batch) for batch in seen] == [10, 10, 3, 10, 10, 3]
    first, second = ([*epoch[0], *epoch[1], *epoch[2]] for epoch in (seen[:3], seen[3:]))
    assert sorted(first) == sorted(second) == list(range(23))
    assert first != second != list(range(23))


def test_a_batch_is_rewritten_raw_and_before_the_augmentation() -> None:
    data = samples()
    given: list[tuple[float, float, torch.dtype]] = []
    model = small_cnn()
    inputs: list[Tensor] = []
    model.register_forward_pre_hook(lambda _, x: inputs.append(x[0].clone()))

    def paint(x: Tensor, y: Tensor, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        given.append((float(x.min()), float(x.max()), x.dtype))
        return torch.ones_like(x), torch.zeros_like(y)

    plan = TrainingPlan(epochs=1, batch_size=37, augment="crop_flip")
    notes = train(model, data, plan, generator(), on_batch=paint)
    assert given == [(0.0, 1.0, torch.float32)]
    (x,) = inputs
    assert set(x.unique().tolist()) == {0.0, 1.0}  # painted, then shifted: zeros moved in
    assert notes["loss"] < 5


def test_the_hook_draws_from_the_same_generator_after_the_order() -> None:
    drawn: list[float] = []

    def draw(x: Tensor, y: Tensor, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        drawn.append(float(torch.rand((), generator=rng)))
        return x, y

    train(small_cnn(), samples(), TrainingPlan(epochs=2, batch_size=37), generator(), on_batch=draw)
    rng = generator()
    expected = []
    for _ in range(2):
        torch.randperm(37, generator=rng)
        expected.append(float(torch.rand((), generator=rng)))
    assert drawn == expected


def test_another_objective() -> None:
    model, data = small_cnn(), samples()
    train(
        model,
        data,
        TrainingPlan(epochs=8, batch_size=37),
        generator(),
        objective=lambda out, y: -F.cross_entropy(out, y).clamp(max=50),
    )
    model.eval()
    with torch.no_grad():
        x, y = data.batch(torch.arange(37))
        assert float(F.cross_entropy(model(x), y)) > math.log(4)  # worse than guessing


def test_nothing_is_drawn_from_the_global_generator() -> None:
    torch.manual_seed(1)
    expected = torch.rand(3)
    model, data = small_cnn(), samples()
    torch.manual_seed(1)
    train(model, data, TrainingPlan(augment="crop_flip"), generator())
    assert torch.equal(torch.rand(3), expected)


def test_other_generators_give_other_models_and_the_same_the_same() -> None:
    def weights(seed: int) -> Tensor:
        model = small_cnn()
        train(model, samples(), TrainingPlan(), generator(seed))
        return model[0].weight

    assert torch.equal(weights(1), weights(1))
    assert not torch.equal(weights(1), weights(2))


def test_data_are_left_untouched_and_the_model_is_left_in_train_mode() -> None:
    data, model = samples(), small_cnn().eval()
    images, labels = data.images.clone(), data.labels.clone()
    train(model, data, TrainingPlan(augment="crop_flip"), generator())
    assert torch.equal(data.images, images)
    assert torch.equal(data.labels, labels)
    assert model.training


# Memory formats.


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("augment", ["none", "crop_flip"])
def test_the_memory_format_of_the_model_is_kept_and_its_inputs_have_it(
    layout: torch.memory_format, augment: Any
) -> None:
    model = small_cnn().to(memory_format=layout)
    inputs: list[Tensor] = []
    model.register_forward_pre_hook(lambda _, x: inputs.append(x[0]))
    assert memory_format_of(model) == layout
    train(model, samples(), TrainingPlan(augment=augment), generator())
    assert model[0].weight.is_contiguous(memory_format=layout)
    assert model[0].weight.is_contiguous() == (layout == torch.contiguous_format)
    assert all(x.is_contiguous(memory_format=layout) for x in inputs)
    assert all(x.is_contiguous() == (layout == torch.contiguous_format) for x in inputs)


def test_a_weight_that_fits_both_formats_does_not_decide() -> None:
    one_channel = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 8, 3))
    assert memory_format_of(one_channel) == torch.contiguous_format
    assert memory_format_of(one_channel.to(memory_format=torch.channels_last)) == torch.channels_last
    assert memory_format_of(nn.Linear(3, 2)) == torch.contiguous_format
    assert memory_format_of(nn.Sequential(nn.Conv2d(1, 4, 3))) == torch.contiguous_format


# Augmentation.


def slow_crop_flip(images: Tensor, rng: torch.Generator, padding: int) -> Tensor:
    """Return what ``crop_flip`` should, image by image: pad, cut the shifted window, mirror it."""
    n, channels, height, width = images.shape
    shifts = torch.randint(0, 2 * padding + 1, (2, n), generator=rng)
    mirrors = torch.rand(n, generator=rng) < 0.5
    out = np.zeros((n, channels, height, width), np.float32)
    for i in range(n):
        canvas = np.zeros((channels, height + 2 * padding, width + 2 * padding), np.float32)
        canvas[:, padding : padding + height, padding : padding + width] = images[i].numpy()
        top, left = int(shifts[0, i]), int(shifts[1, i])
        window = canvas[:, top : top + height, left : left + width]
        out[i] = window[:, :, ::-1] if mirrors[i] else window
    return torch.from_numpy(out)


@pytest.mark.parametrize(("shape", "padding"), [((3, 8, 8), 4), ((1, 5, 9), 4), ((2, 6, 4), 1), ((3, 4, 4), 0)])
def test_crop_flip_is_pad_crop_and_mirror_of_each_image(shape: tuple[int, int, int], padding: int) -> None:
    images = torch.rand(40, *shape, generator=generator(1))
    before = images.clone()
    mine, other = generator(), generator()
    got = crop_flip(images, mine, padding)
    assert torch.equal(got, slow_crop_flip(images, other, padding))
    assert torch.equal(mine.get_state(), other.get_state())
    assert torch.equal(images, before)


def test_crop_flip_of_channels_last_images_is_the_same() -> None:
    images = torch.rand(10, 3, 8, 8, generator=generator(1))
    last = images.contiguous(memory_format=torch.channels_last)
    assert torch.equal(crop_flip(last, generator()), crop_flip(images, generator()))


def test_half_of_the_images_are_mirrored_and_shifts_are_even() -> None:
    n, size = 4000, 9
    images = torch.zeros(n, 1, size, size)
    images[:, :, 4, 4], images[:, :, 4, 5] = 1.0, 2.0  # a pair that shows side and place
    out = crop_flip(images, generator(), padding=2)[:, 0]
    ones = torch.tensor([divmod(int(i), size) for i in (out == 1).flatten(1).float().argmax(1)])
    twos = torch.tensor([divmod(int(i), size) for i in (out == 2).flatten(1).float().argmax(1)])
    mirrored = twos[:, 1] < ones[:, 1]
    assert abs(float(mirrored.float().mean()) - 0.5) < 0.04
    assert torch.equal((twos[:, 1] - ones[:, 1]).abs(), torch.ones(n, dtype=torch.int64))
    counts = torch.bincount(ones[:, 0], minlength=size)
    assert counts.nonzero().flatten().tolist() == [2, 3, 4, 5, 6]
    assert all(abs(int(count) - n / 5) < 150 for count in counts[2:7])


def test_fedprox_by_hand() -> None:
    """One weight, loss w: the gradient is 1, with the term 1 + mu (w - w_start), here mu = 0.2 and w_start = 1."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(1, 1, bias=False))
    nn.init.ones_(model[1].weight)
    white = Samples(torch.full((1, 1, 1, 1), 255, dtype=torch.uint8), torch.zeros(1, dtype=torch.int64))
    plan = TrainingPlan(epochs=3, lr=0.5, momentum=0.0, weight_decay=0.0)
    train(model, white, plan, generator(), objective=lambda out, _: out.mean(), proximal_mu=0.2)
    # 1 - 0.5 * 1 = 0.5;  0.5 - 0.5 * (1 - 0.2 * 0.5) = 0.05;  0.05 - 0.5 * (1 - 0.2 * 0.95) = -0.355
    assert model[1].weight.item() == pytest.approx(-0.355, abs=1e-6)


def test_fedprox_is_the_penalty_in_the_loss() -> None:
    """The same as a loop that adds mu / 2 ||w - w_start||^2 to every batch's loss and lets autograd do the rest."""
    data, plan, mu = samples(), TrainingPlan(epochs=2, batch_size=16, lr=0.05), 0.7
    ours, theirs = small_cnn(), small_cnn()
    train(ours, data, plan, generator(), proximal_mu=mu)
    start = [entry.detach().clone() for entry in theirs.parameters()]
    optimizer, rng = sgd(theirs, plan), generator()
    theirs.train()
    for _ in range(plan.epochs):
        for rows in torch.split(torch.randperm(len(data), generator=rng), plan.batch_size):
            x, y = data.batch(rows)
            term = sum(((w - w0) ** 2).sum() for w, w0 in zip(theirs.parameters(), start, strict=True))
            optimizer.zero_grad()
            (F.cross_entropy(theirs(x), y) + mu / 2 * term).backward()
            optimizer.step()
    plain = small_cnn()
    train(plain, data, plan, generator())
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(ours[4].weight, plain[4].weight, rtol=1e-2)


def test_a_batch_norm_of_single_values_is_refused_with_the_remedy() -> None:
    model = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(4), nn.Linear(4, 2))
    data = Samples(torch.zeros(5, 1, 2, 2, dtype=torch.uint8), torch.zeros(5, dtype=torch.int64))
    train(model, data, TrainingPlan(batch_size=3), torch.Generator().manual_seed(0))
    with pytest.raises(MethodRefused, match="choose a batch_size that leaves no batch of one image"):
        train(model, data, TrainingPlan(batch_size=4), torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match="another mistake"), learning(torch.Generator()):
        raise ValueError("another mistake")
