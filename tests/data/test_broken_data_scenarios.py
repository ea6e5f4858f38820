"""What a scenario is told whose data, partition and trusted set cannot go together, word for word."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fedbd.config.scenario import from_dict
from fedbd.errors import UserError
from fedbd.prepared import prepare

LOAD, DATA = "bad:", "scenario 't' does not fit its data:"
GROUPLESS = "must be groups of the data, and 'digits' has none"
TAKE = "take data that have some (gtsrb; npz or image_parquet with groups: COLUMN)"
NPZ = {"name": "npz", "file": "a.npz", "groups": "who"}
"""Sixty training samples of three classes, whose ids are 0 to 11."""


def scenario(**changes):
    return {"name": "t", "rounds": 3, "data": "digits", "model": "mlp", **changes}


CASES = {
    "natural without ids": (
        scenario(partition="natural"),
        [f"partition: {GROUPLESS}, got 'natural'; {TAKE}"],
    ),
    "natural and whole groups without ids": (
        scenario(partition="natural", trusted={"groups": "whole"}),
        [
            f"partition: {GROUPLESS}, got 'natural'; {TAKE}",
            f"trusted.groups: {GROUPLESS}, got 'whole'; {TAKE}",
        ],
    ),
    "npz without a column": (
        scenario(data={"name": "npz", "file": "a.npz"}, partition="natural"),
        [
            "partition: must be groups of the data, and data.groups is null, got 'natural'; name the column in "
            "data.groups"
        ],
    ),
    "ids per class without ids": (
        scenario(data={"name": "npz", "file": "a.npz", "groups_per_class": True}),
        ["data.groups_per_class: must be false where groups names no column"],
    ),
    "a misspelt law": (
        scenario(partition={"name": "quantity", "law": "powr"}),
        ["partition.law: must be dirichlet or power, got 'powr'; did you mean 'power'?"],
    ),
    "no classes": (
        scenario(partition={"name": "pathological", "classes": 0}),
        ["partition.classes: must be >= 1, got 0"],
    ),
    "no shards": (
        scenario(partition={"name": "shards", "per_client": 0}),
        ["partition.per_client: must be >= 1, got 0"],
    ),
    "an empty name for the column": (
        scenario(data={"name": "npz", "file": "a.npz", "groups": ""}),
        ["data.groups: must not be empty"],
    ),
    "other words for whole": (
        scenario(trusted={"groups": "together"}),
        ["trusted.groups: must be whole or split or null, got 'together'"],
    ),
    "a misspelt deal": (
        scenario(data=NPZ, partition={"name": "natural", "deal": "fair"}),
        ["partition.deal: must be random or even, got 'fair'"],
    ),
}

AT_THE_DATA = {
    "more clients than ids": (
        scenario(data=NPZ, partition={"name": "natural", "clients": 13}),
        [
            "partition.clients: must be at most the number of ids that are left for clients, 12, got 13; set it to 12 "
            "for one client per id"
        ],
    ),
    "more clients than ids that the trusted set leaves": (
        scenario(data=NPZ, partition={"name": "natural", "clients": 12}, trusted={"size": 8}),
        [
            "partition.clients: must be at most the number of ids that are left for clients, 10, got 12; set it to 10 "
            "for one client per id"
        ],
    ),
    "a trusted set of all ids": (
        scenario(data=NPZ, partition={"name": "natural", "clients": 2}, trusted={"size": 59}),
        ["trusted.size: must leave whole groups: it takes all 12, got 59"],
    ),
    "more classes than there are": (
        scenario(data=NPZ, partition={"name": "pathological", "classes": 5}),
        ["partition.classes: must be at most the number of classes in the data, 3, got 5"],
    ),
    "classes without a client": (
        scenario(data=NPZ, partition={"name": "pathological", "classes": 1, "clients": 2}),
        [
            "partition: leaves classes without a client: 2 clients own 1 each, and there are 3; set "
            "partition.classes to 2 or more, or use more clients"
        ],
    ),
    "more owners than samples": (
        scenario(data=NPZ, partition={"name": "pathological", "classes": 2, "clients": 40}),
        ["partition: gives class 0 to 27 clients, and it has 20 samples; use fewer clients or fewer classes a client"],
    ),
    "more shards than samples": (
        scenario(data=NPZ, partition={"name": "shards", "per_client": 7}),
        ["partition: cannot cut 60 samples into 70 shards, 7 for each client; use at most 8 clients"],
    ),
    "a minimum that is too large": (
        scenario(data=NPZ, partition={"name": "dirichlet", "minimum": 7}),
        [
            "partition: must leave each of 10 clients its minimum of 7 of 60 samples; set partition.minimum to 6 or "
            "less, or use at most 8 clients"
        ],
    ),
    "more clients than samples": (
        scenario(data=NPZ, partition={"name": "quantity", "clients": 61}),
        ["partition: must leave each of 61 clients its minimum of 1 of 60 samples; use at most 60 clients"],
    ),
    "a column of another length": (
        scenario(data={**NPZ, "groups": "short"}),
        ["a.npz:short: must hold one id per training image, shape (60,), got (12,); name the training part's column"],
    ),
    "a column that is not there": (
        scenario(data={**NPZ, "groups": "track"}),
        [
            "a.npz:track: must be there, got no such array; the file holds x_train, y_train, x_test, y_test, who, "
            "short; name the right one in data.groups"
        ],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_refused_when_it_loads(case):
    raw, lines = CASES[case]
    with pytest.raises(UserError) as caught:
        from_dict(raw, LOAD)
    assert str(caught.value) == "\n".join([LOAD, *(f"  {line}" for line in lines)])


@pytest.mark.parametrize("case", AT_THE_DATA)
def test_refused_when_the_data_are_there(case, tmp_path: Path):
    raw, lines = AT_THE_DATA[case]
    x, y = np.zeros((60, 8, 8), np.uint8), np.arange(60) % 3
    np.savez(
        tmp_path / "a.npz",
        x_train=x,
        y_train=y,
        x_test=x[:3],
        y_test=y[:3],
        who=np.arange(60) // 5,
        short=np.arange(12),
    )
    with pytest.raises(UserError) as caught:
        prepare(from_dict({**raw, "data": {**raw["data"], "root": str(tmp_path)}}))
    assert str(caught.value) == "\n".join([DATA, *(f"  {line}" for line in lines)])
