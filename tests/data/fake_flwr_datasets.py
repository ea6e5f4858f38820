"""A stand-in for flwr-datasets, with its calling conventions: class, constructor, ``dataset``, ``load_partition``."""

from __future__ import annotations

import importlib.machinery
import sys
from types import ModuleType

import numpy as np


class Dataset:
    """As much of ``datasets.Dataset`` as an adapter needs."""

    def __init__(self, columns):
        self.columns = columns

    @classmethod
    def from_dict(cls, columns):
        assert all(type(held) is list for held in columns.values())
        assert all(type(value) is int for held in columns.values() for value in held)
        return cls(columns)

    def __getitem__(self, name):
        return self.columns[name]

    def rows(self, places):
        return Dataset({name: [held[place] for place in places] for name, held in self.columns.items()})


class DealingPartitioner:
    """Deals shuffled rows in turn."""

    def __init__(self, num_partitions, offset=0, seed=42):
        if offset < 0:
            raise ValueError("offset must not be negative\nand more")
        self.num_partitions, self.offset, self.seed = num_partitions, offset, seed
        self.dataset = None

    def load_partition(self, number):
        order = np.random.default_rng(self.seed).permutation(len(self.dataset["idx"]))
        return self.dataset.rows(order[number :: self.num_partitions].tolist())


class NaturalIdPartitioner:
    """One part for each value of a column."""

    def __init__(self, partition_by):
        self.partition_by = partition_by

    @property
    def num_partitions(self):
        return len(set(self.dataset[self.partition_by]))

    def load_partition(self, number):
        held = np.array(self.dataset[self.partition_by])
        return self.dataset.rows(np.flatnonzero(held == np.unique(held)[number])[::-1].tolist())


def install(monkeypatch):
    """Put the stand-ins where the package and the one that it stands on would be."""

    def module(name, **content):
        made = ModuleType(name)
        made.__spec__ = importlib.machinery.ModuleSpec(name, None)
        vars(made).update(content)
        monkeypatch.setitem(sys.modules, name, made)
        return made

    parts = module(
        "flwr_datasets.partitioner", DealingPartitioner=DealingPartitioner, NaturalIdPartitioner=NaturalIdPartitioner
    )
    module("flwr_datasets", partitioner=parts)
    module("datasets", Dataset=Dataset, disable_progress_bars=lambda: None)
