from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fedbd.attacks.badnets import BadNets
from fedbd.attacks.grid_trigger import GridTrigger
from fedbd.attacks.wanet_trigger import WaNetTrigger
from fedbd.errors import MethodRefused, UserError
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


def all_to_all() -> AttackContext:
    zero = np.zeros(1, np.float32)
    return AttackContext(trigger=GridTrigger(), target="all_to_all", classes=3, global_weights=zero)


def test_all_to_all_labels_are_the_next_classes() -> None:
    data = samples()
    polluted, index = BadNets(share=0.5).pollute(data, all_to_all(), generator(2))
    assert len(index) == 25
    for i in range(50):
        poisoned = i in set(index.tolist())
        assert int(polluted.labels[i]) == ((i + 1) % 3 if poisoned else i % 3)
        assert bool(is_stamped(polluted.images[i : i + 1] / 255)) == poisoned


def counted_labels(attack: BadNets, data: Samples, ctx: AttackContext) -> list[int]:
    """Train one step on one batch from zero weights: the bias moves by mean(onehot) - 1/3, which counts its labels."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(36, 3))
    nn.init.zeros_(model[1].weight)
    nn.init.zeros_(model[1].bias)
    plan = TrainingPlan(epochs=1, batch_size=len(data), lr=1.0, momentum=0.0, weight_decay=0.0)
    attack.fit(model, data, plan, ctx, generator())
    return [round(value) for value in ((model[1].bias + 1 / 3) * len(data)).tolist()]


@pytest.mark.parametrize("per", ["batch", "dataset"])
def test_all_to_all_moves_labels_in_training(per: str) -> None:
    data = Samples(samples(60).images, torch.full((60,), 2))
    attack = BadNets(share=0.25, per=per)  # type: ignore[arg-type]
    assert counted_labels(attack, data, all_to_all()) == [15, 0, 45]


@pytest.mark.parametrize("per", ["batch", "dataset"])
def test_clean_labels_stay_and_only_images_of_the_target_class_are_stamped(per: str) -> None:
    data = samples(60)  # 20 of each class
    attack = BadNets(share=0.3, per=per, labels="clean")  # type: ignore[arg-type]
    assert counted_labels(attack, data, context()) == [20, 20, 20]
    model = Probe()
    notes = attack.fit(model, data, TrainingPlan(epochs=1, batch_size=60), context(), generator())
    (batch,) = model.seen
    assert int(is_stamped(batch).sum()) == notes["poisoned"] == 6
    polluted, index = attack.pollute(data, context(), generator())
    assert len(index) == 6
    assert (data.labels[torch.as_tensor(index)] == TARGET).all()
    assert torch.equal(polluted.labels, data.labels)
    assert np.array_equal(is_stamped(polluted.images / 255).nonzero()[:, 0].numpy(), index)


def test_the_share_of_a_batch_counts_its_images_of_the_target_class() -> None:
    data = Samples(samples(64).images, torch.tensor([TARGET] * 4 + [0] * 60))
    model = Probe()
    notes = BadNets(share=1.0, labels="clean").fit(
        model, data, TrainingPlan(epochs=1, batch_size=16), context(), generator()
    )
    assert sum(int(is_stamped(x).sum()) for x in model.seen) == notes["poisoned"] == 4


@pytest.mark.parametrize("per", ["batch", "dataset"])
def test_without_an_image_of_the_target_class_clean_labels_poison_nothing(per: str) -> None:
    data = Samples(samples(20).images, torch.arange(20) % TARGET)
    attack = BadNets(share=1.0, per=per, labels="clean")  # type: ignore[arg-type]
    model = Probe()
    notes = attack.fit(model, data, TrainingPlan(epochs=1), context(), generator())
    assert notes["poisoned"] == 0
    assert not any(is_stamped(x).any() for x in model.seen)
    polluted, index = attack.pollute(data, context(), generator())
    assert len(index) == 0
    assert torch.equal(polluted.images, data.images)


def test_clean_labels_refuse_all_to_all_and_cover() -> None:
    assert not BadNets(labels="clean").all_to_all
    assert BadNets().all_to_all
    with pytest.raises(ValueError, match="one target class"):
        BadNets(labels="clean").pollute(samples(), all_to_all(), generator())
    with pytest.raises(UserError, match="cover: must be 0 with labels: clean, got 1"):
        BadNets(labels="clean", cover=1.0)


def warped() -> AttackContext:
    zero = np.zeros(1, np.float32)
    return AttackContext(trigger=WaNetTrigger(s=4.0), target=TARGET, classes=3, global_weights=zero)


def test_covered_images_get_a_disturbed_trigger_and_keep_their_labels() -> None:
    data, ctx = samples(60), warped()
    polluted, index = BadNets(share=0.2, cover=2.0).pollute(data, ctx, generator(3))
    changed = (polluted.images != data.images).flatten(1).any(1)
    exact = (ctx.trigger.stamp(data.images / 255) * 255).round().to(torch.uint8)
    as_stamped = (polluted.images == exact).flatten(1).all(1)
    assert len(index) == 12
    assert int(changed.sum()) == 36
    assert np.array_equal(as_stamped.nonzero()[:, 0].numpy(), index)
    covered = changed & ~as_stamped
    assert torch.equal(polluted.labels[covered], data.labels[covered])
    assert torch.equal(polluted.labels[~changed], data.labels[~changed])


def test_batches_are_covered_behind_the_stamped_images() -> None:
    model, data = Probe(), samples(40)
    notes = BadNets(share=0.25, cover=2.0).fit(
        model, data, TrainingPlan(epochs=1, batch_size=40), warped(), generator(3)
    )
    order = torch.randperm(40, generator=generator(3))
    plain = data.batch(order)[0]
    same = (model.seen[0] == plain).flatten(1).all(1)
    assert notes["poisoned"] == 10
    assert same.tolist() == [False] * 30 + [True] * 10
    assert torch.equal(model.seen[0][:10], warped().trigger.stamp(plain[:10]))
    assert not torch.equal(model.seen[0][10:30], warped().trigger.stamp(plain[10:30]))


def test_cover_needs_room_and_a_trigger_that_can_be_disturbed() -> None:
    assert BadNets(share=0.5, cover=1.0).problems() == []
    with pytest.raises(UserError, match=r"cover: must leave share \* \(1 \+ cover\) at most 1, got 1\.5"):
        BadNets(share=0.5, cover=2.0)
    with pytest.raises(MethodRefused, match="set cover: 0 or take wanet"):
        BadNets(share=0.2, cover=1.0).pollute(samples(), context(), generator())


def test_without_cover_no_random_number_is_drawn_in_a_batch() -> None:
    """The default must leave the bits of a run as they were: the order of the images is all that is drawn."""
    rng = generator(9)
    BadNets().fit(Probe(), samples(), TrainingPlan(epochs=1), context(), rng)
    other = generator(9)
    torch.randperm(50, generator=other)
    assert torch.equal(rng.get_state(), other.get_state())


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
