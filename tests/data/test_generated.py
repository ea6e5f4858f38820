"""The synthetic set: what it promises of classes, seeds, difficulty and writers."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fedbd.config.scenario import from_dict
from fedbd.data.generated import NOISE, SIGNAL, Generated
from fedbd.data.partition_natural import Natural
from fedbd.errors import UserError
from fedbd.models.mlp import Mlp
from fedbd.training import TrainingPlan, train
from fedbd.types import DataSource


def nearest(data) -> float:
    """Accuracy of the class whose mean training picture is nearest: the best there is for equal white noise."""
    x, y = data.train.images.flatten(1).float(), data.train.labels
    means = torch.stack([x[y == label].mean(0) for label in range(data.classes)])
    found = torch.cdist(data.test.images.flatten(1).float(), means).argmin(1)
    return float((found == data.test.labels).float().mean())


def test_form_and_counts():
    assert isinstance(Generated(), DataSource)
    data = Generated(classes=4, samples=42, test_samples=10, shape=(3, 8, 6)).load(None)
    assert data.train.images.shape == (42, 3, 8, 6)
    assert data.train.images.dtype == torch.uint8
    assert sorted(np.bincount(data.train.labels).tolist()) == [10, 10, 11, 11]
    assert (data.classes, len(data.test), data.groups) == (4, 10, None)


def test_more_than_the_machine_has_is_refused_before_anything_is_made(monkeypatch):
    monkeypatch.setattr("fedbd.data.generated.memory", lambda: 8 * 10**9)
    with pytest.raises(UserError) as caught:
        Generated(samples=10**14, shape=(1, 16, 16)).load(None)
    assert str(caught.value) == (
        "data: must fit into this machine's memory of 8.0 GB, got 28,000,000.0 GB (100,000,000,000,500 images of 16x16 "
        "with 1 channel, 10 classes); lower data.samples, data.test_samples, data.classes, data.groups or data.shape"
    )
    for fields in ({"shape": (3, 40_000, 40_000)}, {"classes": 10**7, "samples": 10**7, "shape": (1, 6, 6)}):
        with pytest.raises(UserError, match=r"must fit into this machine's memory of 8.0 GB"):
            Generated(**fields).load(None)
    assert len(Generated(samples=51).load(None).train) == 51


def test_the_seed_decides_and_each_field_counts():
    def images(**fields):
        return Generated(samples=50, **fields).load(None).train.images

    assert torch.equal(images(), images())
    for other in ({"seed": 1}, {"difficulty": 0.4}, {"classes": 9}, {"groups": 5}):
        assert not torch.equal(images(), images(**other))


def test_the_deviations_are_as_said():
    data = Generated(classes=2, samples=4000, difficulty=0.25, shape=(1, 16, 16)).load(None)
    x, y = data.train.images.float(), data.train.labels
    means = torch.stack([x[y == label].mean(0) for label in range(2)])
    assert means.flatten(1).std(dim=1).numpy() == pytest.approx(0.75 * SIGNAL, rel=0.05)
    assert float((x - means[y]).std()) == pytest.approx(NOISE, rel=0.03)  # a little less where it is clipped


def test_difficulty_runs_from_sure_to_chance():
    found = [nearest(Generated(difficulty=d, shape=(1, 8, 8)).load(None)) for d in (0.0, 0.7, 0.9, 1.0)]
    assert found[0] > 0.99
    assert found[0] >= found[1] > found[2] > found[3]
    assert found[3] == pytest.approx(0.1, abs=0.05)  # 500 test samples: standard error 0.013


def test_a_small_network_learns_it():
    data = Generated(samples=1000, test_samples=200).load(None)
    net = Mlp(hidden=(32,)).build(data.shape, data.classes, torch.Generator().manual_seed(0))
    train(net, data.train, TrainingPlan(epochs=5, batch_size=32, lr=0.05), torch.Generator().manual_seed(1))
    x, y = data.test.batch(torch.arange(200))
    assert float((net.eval()(x).argmax(1) == y).float().mean()) > 0.9


def test_writers_have_hands_of_their_own():
    data = Generated(samples=1000, difficulty=1.0, groups=5).load(None)
    assert np.bincount(data.groups).tolist() == [200] * 5
    x = data.train.images.float()
    means = torch.stack([x[torch.from_numpy(np.flatnonzero(data.groups == g))].mean(0) for g in range(5)])
    apart = torch.pdist(means.flatten(1))
    assert apart.min() > 3 * NOISE * (2 * 256 / 200) ** 0.5 / 2  # what noise alone leaves is a third of that
    parts = Natural().split(data.train.labels.numpy(), 5, np.random.default_rng(0), groups=data.groups)
    assert all(np.unique(data.groups[part]).tolist() == [client] for client, part in enumerate(parts))


@pytest.mark.parametrize(
    ("fields", "line"),
    [
        ({"shape": [2, 8, 8]}, "data.shape: must begin with 1 or 3 channels, got 2"),
        ({"samples": 5}, "data.samples: must be at least the number of classes, 10, got 5"),
        ({"samples": 50, "groups": 51}, "data.groups: must be at most the number of samples, 50, got 51"),
        ({"difficulty": 1.5}, "data.difficulty: must be <= 1, got 1.5"),
        ({"classes": 1}, "data.classes: must be >= 2, got 1"),
        ({"shape": [1, 8]}, "data.shape: must be three numbers, channels, height and width, got 2"),
        ({"shape": 8}, "data.shape: must be a list, got 8"),
    ],
)
def test_impossible_sets_are_refused(fields, line):
    raw = {"name": "t", "rounds": 1, "model": "mlp", "data": {"name": "generated", **fields}}
    with pytest.raises(UserError) as caught:
        from_dict(raw)
    assert str(caught.value).startswith(line)
