from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

from fedbd.defenses.cleanup.masked_batchnorm import MaskedBatchNorm2d, batchnorms, prune, recover_masks
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
    pruned, count = prune(model, masks, 0.5)
    assert count == 2
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
    assert prune(net(), masks, threshold)[1] == count


def test_models_without_batchnorm_scales_are_refused() -> None:
    for model in (nn.Sequential(nn.Linear(2, 2)), nn.Sequential(nn.BatchNorm2d(3, affine=False))):
        with pytest.raises(MethodRefused, match="cleaner masks BatchNorm2d"):
            batchnorms(model, "cleaner")
