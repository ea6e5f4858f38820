from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fedbd.attacks.badnets import BadNets
from fedbd.attacks.grid_trigger import GridTrigger
from fedbd.training import TrainingPlan
from fedbd.types import Attack, AttackContext, Samples

TARGET = 2


class Probe(nn.Module):
    """A linear classifier that keeps the batches it saw in train mode."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(36, 3)
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(x.detach().clone())
        out: Tensor = self.fc(x.flatten(1))
        return out


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def context() -> AttackContext:
    return AttackContext(trigger=GridTrigger(), target=TARGET, classes=3, global_weights=np.zeros(1, np.float32))


def samples(n: int = 50) -> Samples:
    """Mid-gray images (never pure black or white), so that stamped ones can be told from clean ones."""
    images = torch.randint(50, 200, (n, 1, 6, 6), generator=generator(1), dtype=torch.uint8)
    return Samples(images, torch.arange(n) % 3)


def is_stamped(x: Tensor) -> Tensor:
    return x[:, 0, 5, 5] == 1


def test_is_an_attack() -> None:
    assert isinstance(BadNets(), Attack)


def test_pollute_stamps_and_relabels_exactly_the_reported_images() -> None:
    data = samples()
    images, labels = data.images.clone(), data.labels.clone()
    polluted, index = BadNets(share=0.3).pollute(data, context(), generator())
    assert torch.equal(data.images, images)
    assert torch.equal(data.labels, labels)
    assert len(index) == 15
    assert (np.diff(index) > 0).all()
    pattern = torch.tensor([[0, 0, 255], [0, 255, 0], [255, 0, 255]], dtype=torch.uint8)
    chosen = np.isin(np.arange(50), index)
    for i in range(50):
        expected = images[i].clone()
        if chosen[i]:
            expected[0, 3:, 3:] = pattern
        assert torch.equal(polluted.images[i], expected)
        assert int(polluted.labels[i]) == (TARGET if chosen[i] else int(labels[i]))


def test_pollute_draws_from_all_classes_and_from_the_generator_alone() -> None:
    data = samples(300)
    first = BadNets(share=0.2).pollute(data, context(), generator(7))[1]
    again = BadNets(share=0.2).pollute(data, context(), generator(7))[1]
    other = BadNets(share=0.2).pollute(data, context(), generator(8))[1]
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
    assert set(data.labels[torch.as_tensor(first)].tolist()) == {0, 1, TARGET}


@pytest.mark.parametrize(("share", "count"), [(0.0, 0), (0.01, 0), (0.05, 2), (0.07, 4), (1.0, 50)])
def test_counts_are_rounded_halves_to_even(share: float, count: int) -> None:
    polluted, index = BadNets(share=share).pollute(samples(), context(), generator())
    assert len(index) == count
    assert int(is_stamped(polluted.images.float() / 255).sum()) == count


def test_per_batch_stamps_the_first_20_of_64_and_leaves_a_tiny_last_batch_clean() -> None:
    model = Probe()
    data = samples(64 + 64 + 1)
    notes = BadNets().fit(model, data, TrainingPlan(epochs=1), context(), generator())
    assert [len(x) for x in model.seen] == [64, 64, 1]
    assert [int(is_stamped(x).sum()) for x in model.seen] == [20, 20, 0]
    assert all(is_stamped(x)[:20].all() for x in model.seen[:2])
    assert notes["poisoned"] == 40
    assert notes["images"] == 129


def test_per_batch_labels_of_stamped_images_are_the_target() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(36, 3))
    with torch.no_grad():
        model[1].weight.zero_()
        model[1].bias.zero_()
    # From zero weights one step of size 1 moves the bias by mean(onehot) - 1/3: it counts the labels of the batch.
    data = Samples(samples(60).images, torch.zeros(60, dtype=torch.int64))
    plan = TrainingPlan(epochs=1, batch_size=60, lr=1.0, momentum=0.0, weight_decay=0.0)
    BadNets(share=0.25).fit(model, data, plan, context(), generator())
    expected = torch.tensor([45 / 60, 0.0, 15 / 60]) - 1 / 3
    assert torch.allclose(model[1].bias, expected, atol=1e-6)


def test_per_dataset_trains_on_the_same_poisoned_images_in_every_epoch() -> None:
    model = Probe()
    notes = BadNets(share=0.2, per="dataset").fit(
        model, samples(), TrainingPlan(epochs=3, batch_size=25), context(), generator()
    )
    epochs = [torch.cat(model.seen[2 * e : 2 * e + 2]) for e in range(3)]
    stamped = [x[is_stamped(x)].flatten(1) for x in epochs]
    assert [len(x) for x in stamped] == [10, 10, 10]
    rows = [{tuple(row.tolist()) for row in x} for x in stamped]
    assert rows[0] == rows[1] == rows[2]
    assert notes["poisoned"] == 30


def test_per_batch_draws_other_images_in_every_epoch() -> None:
    model = Probe()
    BadNets(share=0.2).fit(model, samples(), TrainingPlan(epochs=2, batch_size=50), context(), generator())
    rows = [{tuple(row.tolist()) for row in x[is_stamped(x)].flatten(1)} for x in model.seen]
    assert rows[0] != rows[1]


@pytest.mark.parametrize("per", ["batch", "dataset"])
def test_same_generator_same_weights(per: str) -> None:
    weights = []
    for seed in (3, 3, 4):
        torch.manual_seed(0)
        model = Probe()
        BadNets(per=per).fit(model, samples(), TrainingPlan(epochs=1), context(), generator(seed))  # type: ignore[arg-type]
        weights.append(model.fc.weight.detach().clone())
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_tamper_returns_the_update_itself() -> None:
    delta = np.array([1.0, -2.0], dtype=np.float32)
    assert BadNets().tamper(delta, context(), generator()) is delta


def test_stamped_pixels_are_rounded_not_cut_off_and_kept_in_range() -> None:
    class Brighter:
        def stamp(self, images: Tensor) -> Tensor:
            return images + 0.6 / 255

    data = Samples(torch.tensor([[[[10, 255]]]], dtype=torch.uint8), torch.tensor([0]))
    ctx = AttackContext(trigger=Brighter(), target=TARGET, classes=3, global_weights=np.zeros(1, np.float32))
    polluted, _ = BadNets(share=1.0).pollute(data, ctx, generator())
    assert polluted.images.flatten().tolist() == [11, 255]
