from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from fedbd.defenses.cleanup.channel_masks import (
    MaskedBatchNorm2d,
    MaskedConv2d,
    at_most,
    both,
    maskable,
    multiplied,
    recalibrate,
    recover_masks,
    switch_off,
)
from fedbd.errors import MethodRefused
from fedbd.training import TrainingPlan
from fedbd.types import Samples


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def norm(channels: int = 3) -> nn.BatchNorm2d:
    module = nn.BatchNorm2d(channels)
    with torch.no_grad():
        for entry in (module.weight, module.bias, module.running_mean):
            entry.copy_(torch.randn(channels, generator=generator(1)))  # type: ignore[union-attr]
        module.running_var.copy_(torch.rand(channels, generator=generator(2)) + 0.5)  # type: ignore[union-attr]
    return module


def net(seed: int = 0) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Conv2d(1, 3, 3, bias=False), norm(), nn.ReLU(), nn.Flatten(), nn.Linear(3 * 16, 4))


def samples(n: int = 10) -> Samples:
    images = torch.randint(0, 256, (n, 1, 6, 6), generator=generator(5), dtype=torch.uint8)
    return Samples(images, torch.arange(n) % 4)


@pytest.mark.parametrize("training", [True, False])
def test_masks_the_scale_alone(training: bool) -> None:
    inner = norm()
    masked = MaskedBatchNorm2d(inner).train(training)
    with torch.no_grad():
        masked.mask.copy_(torch.tensor([1.0, 0.3, 0.0]))
    x = torch.randn(8, 3, 5, 5, generator=generator(3))
    mean = x.mean((0, 2, 3)) if training else inner.running_mean
    variance = x.var((0, 2, 3), unbiased=False) if training else inner.running_var
    shape = (1, 3, 1, 1)
    unit = (x - mean.view(shape)) / torch.sqrt(variance.view(shape) + 1e-5)  # type: ignore[union-attr]
    expected = unit * (inner.weight * torch.tensor([1.0, 0.3, 0.0])).view(shape) + inner.bias.view(shape)
    out = masked(x)
    assert torch.allclose(out, expected, atol=1e-5)
    assert torch.equal(out[:, 2], torch.full_like(out[:, 2], inner.bias[2].item()))  # a masked channel is its shift


def test_a_mask_of_ones_is_the_norm_itself_and_running_statistics_stay() -> None:
    inner = norm()
    before = inner.running_mean.clone()  # type: ignore[union-attr]
    x = torch.randn(8, 3, 5, 5, generator=generator(3))
    out = MaskedBatchNorm2d(inner).train()(x)
    assert torch.equal(inner.running_mean, before)  # type: ignore[arg-type]
    assert torch.equal(out, inner.train()(x))


def test_recovery_equals_a_slow_reference() -> None:
    model, data = net(), samples()
    plan = TrainingPlan(epochs=4, batch_size=4, lr=2.0, momentum=0.9, weight_decay=5e-4)
    masks = recover_masks(model, data, plan, 0.2, generator(7), "test")
    conv, bn, linear = model[0].weight.detach(), model[1], model[4]
    mask, velocity, rng = torch.ones(3), torch.zeros(3), generator(7)
    lowest = 1.0
    for _ in range(4):
        order = torch.randperm(10, generator=rng)
        for index in (order[:4], order[4:8], order[8:]):
            mask.requires_grad_(True)
            x = F.conv2d(data.images[index].float() / 255, conv)
            unit = (x - x.mean((0, 2, 3), keepdim=True)) / torch.sqrt(
                x.var((0, 2, 3), unbiased=False, keepdim=True) + 1e-5
            )
            hidden = unit * (bn.weight.detach() * mask).view(1, 3, 1, 1) + bn.bias.detach().view(1, 3, 1, 1)
            out = hidden.relu().flatten(1) @ linear.weight.detach().T + linear.bias.detach()
            loss = -0.2 * F.log_softmax(out, 1)[torch.arange(len(index)), data.labels[index]].mean()
            (gradient,) = torch.autograd.grad(loss, mask)
            velocity = 0.9 * velocity + gradient
            mask = (mask.detach() - 2.0 * velocity).clamp(0, 1)
            lowest = min(lowest, mask.min().item())
    assert list(masks) == ["1"]
    assert np.allclose(masks["1"], mask.numpy(), atol=1e-5)
    assert lowest < 0.9  # the masks moved, so that the comparison says something


def test_recovery_leaves_the_model_untouched() -> None:
    model = net().eval()
    before = {name: entry.numpy().tobytes() for name, entry in model.state_dict().items()}
    recover_masks(model, samples(), TrainingPlan(epochs=2, batch_size=4, lr=1.0), 0.2, generator(), "test")
    assert {name: entry.numpy().tobytes() for name, entry in model.state_dict().items()} == before
    assert not model.training
    assert isinstance(model[1], nn.BatchNorm2d)
    assert all(entry.requires_grad and entry.grad is None for entry in model.parameters())


def test_pruning_zeroes_scales_at_or_below_the_threshold_and_nothing_else() -> None:
    model = net().eval()
    before = {name: entry.clone() for name, entry in model.state_dict().items()}
    masks = {"1": np.array([0.5, 0.25, 1.0], dtype=np.float32)}
    off = at_most(masks, 0.5)
    pruned = switch_off(model, off)
    assert off["1"].tolist() == [True, True, False]
    for name, entry in pruned.state_dict().items():
        expected = before[name].clone()
        if name == "1.weight":
            expected[:2] = 0
        assert torch.equal(entry, expected)
    assert all(torch.equal(entry, before[name]) for name, entry in model.state_dict().items())
    hidden = pruned[1](torch.randn(2, 3, 4, 4))  # type: ignore[index]
    for channel in (0, 1):
        assert torch.equal(hidden[:, channel], before["1.bias"][channel].expand(2, 4, 4))


@pytest.mark.parametrize(("threshold", "count"), [(0.0, 1), (0.1, 1), (0.25, 2), (0.9, 3), (0.249, 1)])
def test_thresholds_are_inclusive(threshold: float, count: int) -> None:
    masks = {"1": np.array([0.0, 0.25, 0.9], dtype=np.float32)}
    masks["1"][2] = 0.875
    assert at_most(masks, threshold)["1"].sum() == count


def plain_net(bias: bool = True) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(4)
        return nn.Sequential(nn.Conv2d(1, 3, 3, bias=bias), nn.ReLU(), nn.Flatten(), nn.Linear(3 * 16, 4))


def test_a_masked_convolution_has_its_filters_and_bias_multiplied() -> None:
    conv = nn.Conv2d(2, 3, 3, stride=2, padding=1, padding_mode="reflect")
    masked = MaskedConv2d(conv)
    x, mask = torch.randn(4, 2, 7, 7, generator=generator(3)), [1.0, 0.3, 0.0]
    assert torch.equal(masked(x), conv(x))
    with torch.no_grad():
        masked.mask.copy_(torch.tensor(mask))
    padded = F.pad(x, (1, 1, 1, 1), mode="reflect")
    for channel, factor in enumerate(mask):
        expected = F.conv2d(padded, factor * conv.weight[channel : channel + 1], factor * conv.bias[channel:][:1], 2)  # type: ignore[index]
        assert torch.allclose(masked(x)[:, channel], expected[:, 0], atol=1e-6)


@pytest.mark.parametrize("bias", [True, False])
def test_recovery_without_batchnorm_equals_a_slow_reference(bias: bool) -> None:
    model, data = plain_net(bias), samples()
    masks = recover_masks(
        model, data, TrainingPlan(epochs=3, batch_size=4, lr=2.0, momentum=0.9), 0.2, generator(7), "t"
    )
    conv, linear = model[0], model[3]
    mask, velocity, rng = torch.ones(3), torch.zeros(3), generator(7)
    for _ in range(3):
        order = torch.randperm(10, generator=rng)
        for index in (order[:4], order[4:8], order[8:]):
            mask.requires_grad_(True)
            x = data.images[index].float() / 255
            shift = mask * conv.bias.detach() if bias else None  # type: ignore[union-attr, operator]
            hidden = F.conv2d(x, conv.weight.detach() * mask.view(3, 1, 1, 1), shift).relu().flatten(1)  # type: ignore[operator]
            out = hidden @ linear.weight.detach().T + linear.bias.detach()  # type: ignore[operator]
            loss = -0.2 * F.log_softmax(out, 1)[torch.arange(len(index)), data.labels[index]].mean()
            (gradient,) = torch.autograd.grad(loss, mask)
            velocity = 0.9 * velocity + gradient
            mask = (mask.detach() - 2.0 * velocity).clamp(0, 1)
    assert list(masks) == ["0"]
    assert np.allclose(masks["0"], mask.numpy(), atol=1e-5)
    assert mask.min() < 0.97  # the masks moved


def test_a_pruned_convolution_channel_is_exactly_off_and_nothing_else_changes() -> None:
    model = plain_net().eval()
    before = {name: entry.clone() for name, entry in model.state_dict().items()}
    pruned = switch_off(model, {"0": np.array([True, False, True])})
    hidden = pruned[0](100 * torch.randn(5, 1, 6, 6, generator=generator(1)))  # type: ignore[index]
    assert (hidden[:, [0, 2]] == 0).all()
    assert (hidden[:, 1] != 0).all()
    for name, entry in pruned.state_dict().items():
        expected = before[name].clone()
        if name in ("0.weight", "0.bias"):
            expected[[0, 2]] = 0
        assert torch.equal(entry, expected)
    assert all(torch.equal(entry, before[name]) for name, entry in model.state_dict().items())
    assert not pruned.training


@pytest.mark.parametrize(
    ("model", "name", "wrapper"), [(net(), "1", MaskedBatchNorm2d), (plain_net(), "0", MaskedConv2d)]
)
def test_masks_as_parameters_compute_what_the_masked_network_computes(
    model: nn.Sequential, name: str, wrapper: type[nn.Module]
) -> None:
    model.eval()
    mask = np.array([0.0, 0.4, 1.0], dtype=np.float32)
    masked = wrapper(model[int(name)])
    with torch.no_grad():
        masked.mask.copy_(torch.from_numpy(mask))  # type: ignore[operator, union-attr]
    layers = list(model)
    layers[int(name)] = masked
    x = torch.randn(6, 1, 6, 6, generator=generator(2))
    assert torch.allclose(multiplied(model, {name: mask})(x), nn.Sequential(*layers).eval()(x), atol=1e-6)


def test_what_masks_multiply() -> None:
    assert maskable(net(), "x")[0] == "batchnorm"
    assert list(maskable(net(), "x")[1]) == ["1"]
    assert maskable(plain_net(), "x")[0] == "convolution"
    assert list(maskable(plain_net(), "x")[1]) == ["0"]


class Normalize(nn.Module):
    """Subtracts a constant, as many published models do first: no statistics of the batch or the image."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x - 0.5


class FrozenBatchNorm2d(nn.Module):
    """What detection models have."""


def test_models_whose_masks_mean_nothing_are_refused() -> None:
    conv = nn.Conv2d(1, 4, 3)
    assert maskable(nn.Sequential(Normalize(), conv), "x")[0] == "convolution"
    for other in (
        nn.GroupNorm(2, 4),
        nn.InstanceNorm2d(4, affine=True),
        nn.LayerNorm(4),
        nn.BatchNorm2d(4, affine=False),
        FrozenBatchNorm2d(),
    ):
        with pytest.raises(MethodRefused, match=f"with {type(other).__name__} .*; take a model"):
            maskable(nn.Sequential(conv, other), "x")
    with pytest.raises(MethodRefused, match="neither BatchNorm2d nor Conv2d; take a model"):
        maskable(nn.Sequential(nn.Flatten(), nn.Linear(4, 2)), "x")
    frozen = net().requires_grad_(False)
    with pytest.raises(MethodRefused, match=r"frozen; call model.requires_grad_\(True\)"):
        maskable(frozen, "x")


def test_thresholds_are_nested_and_prunings_add_up() -> None:
    masks = {"a": np.array([0.1, 0.5, 0.9], np.float32), "b": np.array([0.3], np.float32)}
    found = [at_most(masks, threshold) for threshold in (0.0, 0.2, 0.4, 0.6, 1.0)]
    for smaller, larger in pairwise(found):
        assert all((smaller[name] <= larger[name]).all() for name in masks)
    union = both({"a": np.array([True, False])}, {"a": np.array([False, False]), "b": np.array([True])})
    assert {name: off.tolist() for name, off in union.items()} == {"a": [True, False], "b": [True]}


@pytest.mark.parametrize("batch_size", [10, 5])
def test_recalibrated_statistics_are_those_of_the_data(batch_size: int) -> None:
    model, data = net().train(), samples()
    momentum = model[1].momentum
    recalibrate(model, data, batch_size)
    hidden = F.conv2d(data.images.float() / 255, model[0].weight.detach())  # type: ignore[arg-type]
    passes = hidden.split(batch_size)
    assert torch.allclose(model[1].running_mean, hidden.mean((0, 2, 3)), atol=1e-6)  # type: ignore[arg-type]
    expected = torch.stack([part.var((0, 2, 3)) for part in passes]).mean(0)
    assert torch.allclose(model[1].running_var, expected, atol=1e-6)  # type: ignore[arg-type]
    assert not any(module.training for module in model.modules())
    assert model[1].momentum == momentum


class Reused(nn.Module):
    """One BatchNorm2d behind two convolutions, under one name or under two."""

    def __init__(self, second_name: bool) -> None:
        super().__init__()
        self.one, self.two, self.norm = nn.Conv2d(1, 3, 3), nn.Conv2d(3, 3, 3), norm()
        if second_name:
            self.again = self.norm
        self.fc = nn.Linear(3 * 4, 4)

    def forward(self, x: Tensor) -> Tensor:
        first = torch.relu(self.norm(self.one(x)))
        out: Tensor = self.fc(torch.relu(getattr(self, "again", self.norm)(self.two(first))).flatten(1))
        return out


def test_a_batchnorm_under_two_names_is_masked_wherever_it_is_used() -> None:
    plan = TrainingPlan(epochs=3, batch_size=5, lr=0.3)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        twice, once = Reused(True), Reused(False)
    weights = {name: entry for name, entry in twice.state_dict().items() if not name.startswith("again")}
    once.load_state_dict(weights)
    found = [recover_masks(net, samples(), plan, 1.0, generator(), "rnp") for net in (twice, once)]
    assert list(found[0]) == ["norm"]
    assert (found[1]["norm"] < 1).any()
    np.testing.assert_array_equal(found[0]["norm"], found[1]["norm"])
