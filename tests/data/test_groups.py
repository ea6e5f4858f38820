"""Columns of client ids and tracks: read, dealt whole, kept out of the trusted set, and seen by nobody."""

from __future__ import annotations

import dataclasses
import hashlib
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from fedbd.central.holdings import holdings
from fedbd.central.subject import source_of
from fedbd.config.scenario import load_scenario
from fedbd.data.assemble import assemble, held_by_server
from fedbd.data.digits import Digits
from fedbd.data.image_parquet import ImageParquet
from fedbd.data.npz import Npz
from fedbd.data.partition_iid import Iid
from fedbd.data.partition_natural import Natural
from fedbd.data.partition_pathological import Pathological
from fedbd.data.trusted import Trusted, hold_out
from fedbd.errors import DataError, UserError
from fedbd.prepared import federate
from fedbd.types import Dataset, Samples, TrustedData

GROUPS = np.array([7, 7, -3, 7, 100, -3, 100, 5, 5, 5], dtype=np.int64)


def deal(rule, clients, groups=GROUPS, seed=0):
    return rule.split(np.zeros(len(groups), np.int64), clients, np.random.default_rng(seed), groups=groups)


def test_one_client_for_each_id_in_their_order():
    parts = deal(Natural(), 4)
    assert [part.tolist() for part in parts] == [[2, 5], [7, 8, 9], [0, 1, 3], [4, 6]]
    assert all(part.dtype == np.int64 for part in parts)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(-5, 20), min_size=1, max_size=80), st.integers(1, 30), st.sampled_from(["random", "even"]))
def test_no_id_is_ever_split(groups, clients, deal_by):
    groups = np.array(groups, dtype=np.int64)
    ids = set(groups.tolist())
    if clients > len(ids):
        with pytest.raises(UserError, match="must be at most the number of ids"):
            deal(Natural(deal=deal_by), clients, groups)
        return
    parts = deal(Natural(deal=deal_by), clients, groups)
    assert sorted(np.concatenate(parts).tolist()) == list(range(len(groups)))
    owned = [set(groups[part].tolist()) for part in parts]
    assert sum(map(len, owned)) == len(ids)
    assert all((np.diff(part) > 0).all() for part in parts)
    if deal_by == "random":
        assert max(map(len, owned)) - min(map(len, owned)) <= 1


def test_even_dealing_is_largest_first_to_the_smallest():
    sizes = [9, 8, 7, 5, 3, 3, 1]
    groups = np.repeat(np.arange(7), sizes)
    held = [0, 0, 0]
    for size in sizes:  # by hand: 9 | 8 | 7, then 5 to the third, 3 to the second, ...
        held[held.index(min(held))] += size
    assert sorted(len(part) for part in deal(Natural(deal="even"), 3, groups)) == sorted(held) == [12, 12, 12]
    chance = [sorted(len(part) for part in deal(Natural(), 3, groups, seed)) for seed in range(20)]
    assert chance.count([12, 12, 12]) < 10


def test_without_ids_there_is_nothing_to_go_by():
    with pytest.raises(UserError) as caught:
        Natural().split(np.zeros(5, np.int64), 2, np.random.default_rng(0))
    assert str(caught.value) == (
        "partition: 'natural' splits by the data's own ids, and these data have none; name the column in data.groups "
        "(npz, image_parquet), or take data that have one (gtsrb)"
    )
    with pytest.raises(UserError) as caught:
        deal(Natural(), 10)
    assert str(caught.value) == (
        "partition.clients: must be at most the number of ids that are left for clients, 4, got 10; set it to 4 for "
        "one client per id"
    )


def tracks(classes=4, per_class=30, frames=5) -> Dataset:
    """Return a set like GTSRB: every track shows one sign, its frames are near copies."""
    labels = np.repeat(np.arange(classes), per_class * frames)
    groups = np.repeat(np.arange(classes * per_class), frames)
    order = np.random.default_rng(1).permutation(len(labels))
    images = torch.zeros(len(labels), 1, 2, 2, dtype=torch.uint8)
    train = Samples(images, torch.from_numpy(labels[order]))
    return Dataset(train, train.subset(torch.arange(4)), classes, groups=groups[order])


@settings(max_examples=100, deadline=None)
@given(
    st.integers(2, 300),
    st.floats(0.1, 0.9),
    st.sampled_from(["as_is", "balanced", "skewed"]),
    st.sampled_from([None, (0, 2)]),
    st.integers(0, 3),
)
def test_no_track_is_on_two_sides(size, share, balance, labels, seed):
    data = tracks()
    y, groups = data.train.labels.numpy(), data.groups
    trusted = Trusted(size=size, validate_share=share, balance=balance, labels=labels)
    try:
        fit, validate, rest = held_by_server(data, trusted, Natural(), seed)
    except UserError:
        return
    assert (len(fit) + len(validate), len(validate)) == (size, trusted.validate_size)
    sides = [set(groups[part].tolist()) for part in (fit, validate, rest)]
    assert not sides[0] & sides[1]
    assert not sides[0] & sides[2]
    assert not sides[1] & sides[2]
    assert sum(map(len, sides)) == len(np.unique(groups))  # what is given to nobody is of a group that was touched
    assert all((np.diff(part) > 0).all() for part in (fit, validate, rest))
    assert len(rest) == 5 * len(sides[2])
    counts = np.bincount(y[np.concatenate([fit, validate])], minlength=4)
    if labels is not None:
        assert counts[[1, 3]].tolist() == [0, 0]
    if balance == "balanced":
        held = counts[[0, 2]] if labels is not None else counts
        assert held.max() - held.min() <= 1
    if balance == "as_is":
        assert len(np.concatenate([fit, validate])) + len(rest) > len(y) - 10  # one track's frames for each part


def test_a_federation_by_track_splits_no_track():
    data = tracks()
    made = assemble(data, Natural(), 10, Trusted(size=100, balance="balanced"), seed=3)
    owners = [set(data.groups[part].tolist()) for part in made.partitions]
    assert sum(map(len, owners)) == len(set.union(*owners))
    held = len(np.unique(data.groups)) - sum(map(len, owners))
    assert held == 4 * 2 * 3  # 13 and 12 frames of each class: three tracks of five for each part
    again = assemble(data, Natural(), 10, Trusted(size=100, balance="balanced"), seed=3)
    assert all(map(np.array_equal, made.partitions, again.partitions))


def test_who_decides_whether_groups_stay_whole():
    data, one = tracks(), Trusted(size=101)

    def together(trusted, rule):
        fit, validate, rest = held_by_server(data, trusted, rule, 0)
        return len(fit) + len(validate) + len(rest) == len(data.train)

    assert not together(one, Natural())
    assert together(one, Iid())
    assert together(one, None)
    assert together(dataclasses.replace(one, groups="split"), Natural())
    assert not together(dataclasses.replace(one, groups="whole"), Iid())
    plain = dataclasses.replace(data, groups=None)
    with pytest.raises(UserError) as caught:
        held_by_server(plain, dataclasses.replace(one, groups="whole"), Iid(), 0)
    assert str(caught.value) == (
        "trusted.groups: cannot be whole: these data have no groups; name the column in data.groups (npz, "
        "image_parquet), or leave the field out"
    )


@pytest.mark.parametrize(
    ("trusted", "message"),
    [
        (
            Trusted(size=599),
            "trusted.size: must leave whole groups: it takes all 120, got 599",
        ),
        (
            Trusted(size=590, balance="balanced"),
            "trusted.size: must leave whole groups: it takes all 120, got 590",
        ),
        (
            Trusted(size=148, labels=(1,), balance="balanced", validate_share=0.01),
            "trusted.size: cannot be taken in whole groups: 2 samples of class 1 are lacking when all groups are used; "
            "lower trusted.size, or set trusted.groups to split",
        ),
    ],
)
def test_impossible_whole_sets_are_refused(trusted, message):
    with pytest.raises(UserError) as caught:
        held_by_server(tracks(), trusted, Natural(), 0)
    assert str(caught.value) == message


def test_what_was_drawn_before_there_were_groups_is_drawn_still():
    """The bits of records made earlier hang on these draws."""
    labels = np.arange(500) % 10
    drawn = hold_out(labels, Trusted(size=60, balance="skewed"), np.random.default_rng(4))
    digest = hashlib.sha256(b"".join(part.tobytes() for part in drawn)).hexdigest()
    assert digest[:16] == "278b987fd89ba494"


def test_the_column_reaches_no_client_and_no_defense():
    made = assemble(tracks(), Natural(), 5, Trusted(size=50), seed=0)
    assert {field.name for field in dataclasses.fields(Samples)} == {"images", "labels"}
    assert {field.name for field in dataclasses.fields(TrustedData)} == {"fit", "validate", "classes"}
    assert isinstance(made.client(0), Samples)
    assert isinstance(made.trusted, TrustedData)


def test_a_model_of_such_a_run_is_repaired_with_the_runs_own_trusted_set(tmp_path):
    """``fedbd clean`` draws it anew from the scenario: it has to know what kept the groups whole."""
    raw = {"name": "t", "rounds": 1, "model": "mlp", "seed": 5, "trusted": {"size": 30}}
    raw |= {"data": {"name": "generated", "samples": 300, "groups": 30}, "partition": {"name": "natural", "clients": 6}}
    file = tmp_path / "scenario.yaml"
    file.write_text(json.dumps(raw))
    source = source_of(str(file), "--data", [])
    made = federate(load_scenario(file))
    held = holdings(source, made.dataset, None, None, 0)
    assert held.origin == "the run's own trusted set"
    for ours, theirs in ((held.trusted.fit, made.trusted.fit), (held.trusted.validate, made.trusted.validate)):
        assert torch.equal(ours.images, theirs.images)
        assert torch.equal(ours.labels, theirs.labels)


def noise(*shape):
    return np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)


def archive(folder, **more):
    x, y = noise(6, 4, 4), np.array([0, 0, 1, 1, 2, 2])
    np.savez(folder / "a.npz", x_train=x, y_train=y, x_test=x[:2], y_test=y[:2], **more)


@pytest.mark.parametrize(
    ("column", "per_class", "groups"),
    [
        (np.array([3, 9, 3, 9, 3, 3], np.uint8), False, [3, 9, 3, 9, 3, 3]),
        (np.array([[3], [9], [3], [9], [3], [3]], np.int16), True, [0, 1, 2, 3, 4, 4]),
        (np.array(["b", "a", "b", "c", "a", "a"]), False, [1, 0, 1, 2, 0, 0]),
        (np.array([-1, 2**40, -1, 0, 0, 0]), False, [-1, 2**40, -1, 0, 0, 0]),
    ],
)
def test_npz_reads_a_column(column, per_class, groups, tmp_path):
    archive(tmp_path, who=column)
    source = Npz(file="a.npz", groups="who", groups_per_class=per_class)
    for _ in range(2):  # decoded, then from the cache
        assert source.load(tmp_path).groups.tolist() == groups
    assert Npz(file="a.npz").load(tmp_path).groups is None
    assert (source.has_groups, Npz(file="a.npz").has_groups, Digits().has_groups) == (True, False, False)


@pytest.mark.parametrize(
    ("column", "problem"),
    [
        (np.arange(5), "must hold one id per training image, shape (6,), got (5,); name the training part's column"),
        (np.zeros((6, 2), int), "must hold one id per training image, shape (6,), got (6, 2)"),
        (np.array(3), "must hold one id per training image, shape (6,), got ()"),
        (np.zeros(6), "must be integers or text, got float64"),
        (
            np.array([None] * 6),
            "must be integers or text, got Python objects; fedbd opens no pickles: save a plain array",
        ),
    ],
)
def test_npz_refuses_other_columns(column, problem, tmp_path):
    archive(tmp_path, who=column)
    with pytest.raises(DataError) as caught:
        Npz(file="a.npz", groups="who").load(tmp_path)
    assert str(caught.value) == f"a.npz:who: {problem}"
    with pytest.raises(DataError) as caught:
        Npz(file="a.npz", groups="whom").load(tmp_path)
    assert str(caught.value) == (
        "a.npz:whom: must be there, got no such array; the file holds x_train, y_train, x_test, y_test, who; name the "
        "right one in data.groups"
    )


def picture() -> bytes:
    import io

    buffer = io.BytesIO()
    Image.new("L", (4, 4)).save(buffer, "PNG")
    return buffer.getvalue()


def parquet(path, ids):
    cells = pa.array([{"bytes": picture()}] * 4, pa.struct({"bytes": pa.binary()}))
    columns = {"img": cells, "label": pa.array([0, 1, 0, 1])} | ({} if ids is None else {"writer": pa.array(ids)})
    pq.write_table(pa.table(columns), path)


@pytest.mark.parametrize(("ids", "groups"), [([4, 4, 1, 9], [4, 4, 1, 9]), (["f2", "f1", "f2", "f0"], [2, 1, 2, 0])])
def test_parquet_reads_a_column_of_the_training_part(ids, groups, tmp_path):
    parquet(tmp_path / "a.parquet", ids)
    parquet(tmp_path / "b.parquet", None)
    source = ImageParquet(train="a.parquet", test="b.parquet", groups="writer")
    assert source.load(tmp_path).groups.tolist() == groups
    assert source.load(tmp_path).groups.tolist() == groups


@pytest.mark.parametrize(
    ("ids", "problem"),
    [
        (
            None,
            ":writer: must be there, got no such column; the file has img, label; name the right one in data.groups",
        ),
        ([0.5, 1.0, 1.0, 1.0], ":writer: must be integers or text, got double"),
        ([3, None, 1, 1], ":writer, row 1: must be an id of a group, got null"),
    ],
)
def test_parquet_refuses_other_columns(ids, problem, tmp_path):
    parquet(tmp_path / "a.parquet", ids)
    parquet(tmp_path / "b.parquet", None)
    with pytest.raises(DataError) as caught:
        ImageParquet(train="a.parquet", test="b.parquet", groups="writer").load(tmp_path)
    assert str(caught.value) == f"a.parquet{problem}"


def test_parquet_files_agree_on_what_an_id_is(tmp_path):
    parquet(tmp_path / "a-0.parquet", [1, 2, 3, 4])
    parquet(tmp_path / "a-1.parquet", ["1", "2", "3", "4"])
    with pytest.raises(DataError) as caught:
        ImageParquet(train="a-*.parquet", test="a-0.parquet", groups="writer").load(tmp_path)
    assert str(caught.value) == "a-0.parquet:writer: must be integers in all files, or text in all"


def test_the_ids_do_not_disturb_other_rules():
    data = tracks()
    plain = dataclasses.replace(data, groups=None)
    ours, theirs = (assemble(each, Pathological(), 6, Trusted(size=40), seed=2) for each in (data, plain))
    assert all(map(np.array_equal, ours.partitions, theirs.partitions))
