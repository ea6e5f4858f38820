"""The adapter for flwr-datasets, on a stand-in for the package; on the package itself where it is installed."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest

from fedbd.config.scenario import from_dict, to_dict
from fedbd.data.partition_flwr_datasets import FlwrDatasets
from fedbd.errors import UserError

LABELS = np.arange(60) % 3
GROUPS = np.arange(60) // 10


def stand_in():
    path = Path(__file__).with_name("fake_flwr_datasets.py")
    spec = importlib.util.spec_from_file_location("fake_flwr_datasets", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def fake(monkeypatch):
    module = stand_in()
    module.install(monkeypatch)
    return module


def split(rule, clients=4, seed=0, groups=None):
    return rule.split(LABELS, clients, np.random.default_rng(seed), groups=groups)


def test_it_gives_what_the_partitioner_gives(fake):
    rule = FlwrDatasets(partitioner="DealingPartitioner", arguments={"seed": 7})
    theirs = fake.DealingPartitioner(4, seed=7)
    theirs.dataset = fake.Dataset.from_dict({"idx": list(range(60))})
    for part, client in zip(split(rule), range(4), strict=True):
        assert part.dtype == np.int64
        assert part.tolist() == sorted(theirs.load_partition(client)["idx"])
    assert all(map(np.array_equal, split(rule, seed=1), split(rule, seed=2)))  # its own seed was given


def test_the_seed_is_the_scenarios(fake):
    rule = FlwrDatasets(partitioner="DealingPartitioner")
    assert all(map(np.array_equal, split(rule), split(rule)))
    assert not all(map(np.array_equal, split(rule), split(rule, seed=1)))


def test_groups_are_a_column(fake):
    rule = FlwrDatasets(partitioner="NaturalIdPartitioner", arguments={"partition_by": "group"})
    assert [part.tolist() for part in split(rule, 6, groups=GROUPS)] == [
        list(range(10 * i, 10 * i + 10)) for i in range(6)
    ]
    assert rule.keeps_groups
    assert not FlwrDatasets(partitioner="NaturalIdPartitioner", arguments={"partition_by": "label"}).keeps_groups
    assert not FlwrDatasets(partitioner="DealingPartitioner").keeps_groups


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"partitioner": "DealingPartitoner"},
            "partition.partitioner: must be a class of flwr_datasets.partitioner, got 'DealingPartitoner'; did you "
            "mean 'DealingPartitioner'?",
        ),
        (
            {"partitioner": "Xyz"},
            "partition.partitioner: must be a class of flwr_datasets.partitioner, got 'Xyz'; there are "
            "DealingPartitioner, NaturalIdPartitioner",
        ),
        (
            {"partitioner": "DealingPartitioner", "arguments": {"offset": -1}},
            "partition: is refused by DealingPartitioner: offset must not be negative",
        ),
        (
            {"partitioner": "DealingPartitioner", "arguments": {"alpha": 1}},
            "partition: is refused by DealingPartitioner: DealingPartitioner.__init__() got an unexpected keyword "
            "argument 'alpha'",
        ),
        (
            {"partitioner": "NaturalIdPartitioner", "arguments": {"partition_by": "label"}},
            "partition.clients: must be 3, the parts that NaturalIdPartitioner makes, got 4",
        ),
        (
            {"partitioner": "NaturalIdPartitioner", "arguments": {"partition_by": "group"}},
            "partition: is refused by NaturalIdPartitioner: 'group'",
        ),
    ],
)
def test_refusals(fake, fields, message):
    with pytest.raises(UserError) as caught:
        split(FlwrDatasets(**fields))
    assert str(caught.value) == message


def scenario(**arguments):
    entry = {"name": "flwr_datasets", "partitioner": "DealingPartitioner", "arguments": arguments}
    return {"name": "t", "rounds": 1, "data": "digits", "model": "mlp", "partition": entry}


def test_in_a_scenario(fake):
    made = from_dict(scenario(offset=2, seed=3))
    assert from_dict(to_dict(made)) == made
    with pytest.raises(UserError) as caught:
        from_dict(scenario(num_partitions=3))
    assert str(caught.value) == "partition.arguments.num_partitions: must be left out: it is partition.clients"
    assert from_dict(scenario(sizes=[1, 2])).partition.method.impl.arguments == {"sizes": [1, 2]}


def test_without_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "flwr_datasets", None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError) as caught:
        from_dict(scenario())
    assert str(caught.value) == (
        "partition: needs the package flwr-datasets: pip install flwr-datasets, or take a partition of fedbd's"
    )


@pytest.mark.skipif(importlib.util.find_spec("flwr_datasets") is None, reason="flwr-datasets is not installed")
@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("IidPartitioner", {}),
        ("DirichletPartitioner", {"alpha": 0.5, "partition_by": "label", "min_partition_size": 1}),
        ("PathologicalPartitioner", {"num_classes_per_partition": 2, "partition_by": "label"}),
        ("ShardPartitioner", {"partition_by": "label", "num_shards_per_partition": 2}),
        ("NaturalIdPartitioner", {"partition_by": "group"}),
    ],
)
def test_the_package_itself(name, arguments):
    rule = FlwrDatasets(partitioner=name, arguments=arguments)
    parts = split(rule, 6, groups=GROUPS)
    assert sorted(np.concatenate(parts).tolist()) == list(range(60))
    assert all(map(np.array_equal, parts, split(rule, 6, groups=GROUPS)))
    if name == "NaturalIdPartitioner":
        assert {tuple(np.unique(GROUPS[part])) for part in parts} == {(group,) for group in range(6)}
