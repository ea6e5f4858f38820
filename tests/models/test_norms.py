"""BatchNorm replaced and frozen, on every model that has it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from fedbd.errors import CheckpointError
from fedbd.models.checkpoint import load_checkpoint, save_safetensors
from fedbd.models.cnn import Cnn
from fedbd.models.norms import batch_norm_entries, freeze_batch_norm, groups_of, has_batch_norm, with_group_norm
from fedbd.models.preact_resnet import PreActResNet18
from fedbd.models.resnet import ResNet18
from fedbd.models.torchvision_models import Torchvision
from fedbd.models.vit import Vit
from fedbd.models.wrn import Wrn
from fedbd.training import TrainingPlan, train
from fedbd.types import Samples

FAMILIES = [
    *(Cnn(width=4), Wrn(depth=10), ResNet18(width=4), PreActResNet18(width=4)),
    Torchvision(architecture="shufflenet_v2_x0_5", resize=64),
]
ids: dict[str, Any] = {"ids": repr}


def build(family: Any) -> nn.Module:
    model: nn.Module = family.build((1, 16, 16), 3, torch.Generator().manual_seed(0))
    return model


def data() -> Samples:
    images = torch.randint(0, 256, (12, 1, 16, 16), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    return Samples(images, torch.arange(12) % 3)


def fit(model: nn.Module) -> None:
    train(model, data(), TrainingPlan(epochs=2, batch_size=6, lr=0.05), torch.Generator().manual_seed(2))


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: entry.clone() for name, entry in model.state_dict().items()}


@pytest.mark.parametrize("family", FAMILIES, **ids)
def test_group_norm_stands_in_batch_norms_place_and_the_rest_is_the_same(family: Any) -> None:
    before, after = state(build(family)), state(with_group_norm(build(family)))
    gone = {name for name in before if name.endswith(("running_mean", "running_var", "num_batches_tracked"))}
    assert list(after) == [name for name in before if name not in gone]
    assert all(torch.equal(after[name], before[name]) for name in after)
    model = with_group_norm(build(family))
    assert not has_batch_norm(model)
    fit(model)
    x = data().batch(torch.arange(12))[0]
    alone = torch.cat([model(x[i : i + 1]) for i in range(12)])  # in train mode: images do not mix
    assert torch.allclose(model(x), alone, atol=1e-4)


def test_groups_are_up_to_32_of_two_channels_or_more() -> None:
    assert [groups_of(c) for c in (1, 2, 3, 4, 16, 24, 64, 96, 512, 7, 58)] == [1, 1, 1, 2, 8, 12, 32, 32, 32, 1, 29]


def test_group_norm_computes_what_its_paper_says() -> None:
    model = with_group_norm(nn.Sequential(nn.BatchNorm2d(4)))
    norm = model[0]
    assert isinstance(norm, nn.GroupNorm)
    x = torch.rand(3, 4, 5, 5, generator=torch.Generator().manual_seed(0))
    groups = x.view(3, 2, -1)
    expected = (groups - groups.mean(2, keepdim=True)) / (groups.var(2, correction=0, keepdim=True) + 1e-5).sqrt()
    assert torch.allclose(norm(x), expected.view_as(x), atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES, **ids)
def test_frozen_batch_norm_does_not_move_and_the_rest_does(family: Any) -> None:
    model = build(family)
    fit(model)  # statistics of some data
    names = batch_norm_entries(model)
    before = state(freeze_batch_norm(model))
    assert list(before) == list(state(build(family)))
    fit(model)
    assert names
    for name, entry in state(model).items():
        assert torch.equal(entry, before[name]) == (name in names), name
    assert model.training
    assert has_batch_norm(model)


def test_frozen_batch_norm_uses_its_statistics_while_it_trains() -> None:
    model = build(Cnn(width=4))
    fit(model)
    x = data().batch(torch.arange(12))[0]
    norm = freeze_batch_norm(model).train().get_submodule("block1.bn")
    assert isinstance(norm, nn.BatchNorm2d)
    taken = model.get_submodule("block1.conv")(x)
    expected = F.batch_norm(taken, norm.running_mean, norm.running_var, norm.weight, norm.bias)
    assert torch.allclose(norm(taken), expected, atol=1e-6)


def test_the_entries_are_all_of_batch_norms_and_no_others() -> None:
    names = batch_norm_entries(build(ResNet18(width=4)))
    assert len(names) == 20 * 5
    rest = set(build(ResNet18(width=4)).state_dict()) - set(names)
    assert len(rest) == 22  # 20 convolutions, weight and bias of the classifier
    assert batch_norm_entries(build(Vit(width=8, depth=1, heads=1))) == ()


@pytest.mark.parametrize("trained_with", ["batch_norm", "group_norm"])
def test_a_checkpoint_of_the_other_kind_is_told_apart(trained_with: str, tmp_path: Any) -> None:
    plain, grouped = build(Cnn(width=4)), with_group_norm(build(Cnn(width=4)))
    source, target = (plain, grouped) if trained_with == "batch_norm" else (grouped, plain)
    save_safetensors(source, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(target, tmp_path / "model.safetensors")
    kind = "with BatchNorm, and the model has none" if trained_with == "batch_norm" else "without BatchNorm"
    last = caught.value.problems[-1]
    assert last.expected == f"is of a network {kind}"
    assert "group_norm" in last.remedy
    assert len(caught.value.problems) == 9 + 1  # three running entries in each of three layers


def test_a_layer_under_two_names_is_replaced_and_counted_under_both() -> None:
    class Reused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = nn.BatchNorm2d(4)
            self.two = self.one

    model = Reused()
    assert set(batch_norm_entries(model)) == set(model.state_dict())
    replaced = with_group_norm(model)
    assert isinstance(replaced.one, nn.GroupNorm)
    assert replaced.two is replaced.one
