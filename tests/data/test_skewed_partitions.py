"""Shards, exact classes per client, sizes: against what their papers say of them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedbd.data.partition_pathological import Pathological
from fedbd.data.partition_quantity import Quantity
from fedbd.data.partition_shards import Shards
from fedbd.errors import UserError

LABELS = st.lists(st.integers(0, 5), min_size=1, max_size=120).map(lambda x: np.array(x, dtype=np.int64))
RULES = st.one_of(
    st.builds(Shards, per_client=st.integers(1, 4)),
    st.builds(Pathological, classes=st.integers(1, 4)),
    st.builds(Quantity, law=st.sampled_from(["dirichlet", "power"]), alpha=st.floats(1e-3, 1e3), minimum=st.just(2)),
)


def split(rule, labels, clients, seed=0):
    parts = rule.split(labels, clients, np.random.default_rng(seed))
    assert len(parts) == clients
    assert sorted(np.concatenate(parts).tolist()) == list(range(len(labels)))
    for part in parts:
        assert part.dtype == np.int64
        assert len(part) > 0
        assert (np.diff(part) > 0).all()
    return parts


@settings(max_examples=150, deadline=None)
@given(RULES, LABELS, st.integers(1, 40), st.integers(0, 3))
def test_each_sample_is_given_once_or_the_split_is_refused(rule, labels, clients, seed):
    try:
        first = split(rule, labels, clients, seed)
    except UserError as error:
        assert all(problem.path.startswith("partition") for problem in error.problems)
        return
    assert all(map(np.array_equal, first, split(rule, labels, clients, seed)))


def test_shards_are_those_of_the_paper():
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(10), 600))  # MNIST, a tenth of it
    parts = split(Shards(), labels, 100)
    assert {len(part) for part in parts} == {60}  # two shards of 30
    held = np.array([np.bincount(labels[part], minlength=10) for part in parts])
    assert set(held.ravel().tolist()) == {0, 30, 60}
    assert ((held > 0).sum(axis=1) <= 2).all()
    same = (held == 60).any(axis=1).mean()
    assert same == pytest.approx(
        19 / 199, abs=0.09
    )  # the second shard is of the first one's class: 19 of the other 199
    other = split(Shards(), labels, 100, seed=1)
    assert not all(map(np.array_equal, parts, other))


@pytest.mark.parametrize(("classes", "clients"), [(1, 10), (2, 10), (2, 7), (3, 100), (10, 4)])
def test_pathological_gives_exactly_so_many_classes_and_shares_them_equally(classes, clients):
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(10), 300))
    parts = split(Pathological(classes=classes), labels, clients)
    held = np.array([np.bincount(labels[part], minlength=10) for part in parts])
    assert ((held > 0).sum(axis=1) == classes).all()
    owners = (held > 0).sum(axis=0)
    assert owners.max() - owners.min() <= 1
    for place in range(10):
        shares = held[held[:, place] > 0, place]
        assert shares.max() - shares.min() <= 1


def test_which_classes_a_client_gets_is_chance():
    """Without the paper's repair of unowned classes a client's pair is one of 45, each as likely as the others."""
    labels = np.repeat(np.arange(10), 10)
    pairs = [tuple(np.unique(labels[split(Pathological(), labels, 5, seed)[0]])) for seed in range(450)]
    counts = np.unique(pairs, axis=0, return_counts=True)[1]
    assert len(counts) == 45
    assert ((counts - 10) ** 2 / 10).sum() < 73  # chi-squared with 44 degrees of freedom at 0.4 %


@pytest.mark.parametrize("alpha", [0.3, 1.0, 2.0])
def test_power_law_sizes_are_the_laws(alpha):
    labels = np.arange(10_000) % 7
    sizes = np.sort([len(part) for part in split(Quantity(law="power", alpha=alpha, minimum=5), labels, 40)])[::-1]
    weights = np.arange(1, 41) ** -alpha
    assert np.abs(sizes - (5 + (10_000 - 200) * weights / weights.sum())).max() <= 1


def test_who_is_large_is_chance():
    labels = np.zeros(1000, dtype=np.int64)
    first = [len(split(Quantity(law="power", alpha=1.0), labels, 5, seed)[0]) for seed in range(100)]
    ranks = [np.abs(np.array([437, 219, 146, 110, 88]) - size).argmin() for size in first]
    assert ((np.bincount(ranks, minlength=5) - 20) ** 2 / 20).sum() < 14.9  # chi-squared, 4 degrees of freedom, 0.5 %


@pytest.mark.parametrize("alpha", [0.2, 1.0, 10.0])
def test_dirichlet_sizes_have_the_theorys_variance(alpha):
    """A client's share is Beta(alpha, (n - 1) alpha): variance (n - 1) / (n^2 (n alpha + 1))."""
    clients, samples = 10, 5000
    labels = np.zeros(samples, dtype=np.int64)
    rule = Quantity(alpha=alpha)
    shares = np.array([[len(part) for part in split(rule, labels, clients, seed)] for seed in range(300)]) / samples
    assert shares.var() == pytest.approx((clients - 1) / (clients**2 * (clients * alpha + 1)), rel=0.12)


def test_quantity_skews_sizes_only():
    labels = np.random.default_rng(0).integers(0, 4, 40_000)
    for part in split(Quantity(law="power", alpha=1.0, minimum=100), labels, 10):
        assert np.bincount(labels[part]) / len(part) == pytest.approx(0.25, abs=5 * (0.25 * 0.75 / len(part)) ** 0.5)


@pytest.mark.parametrize(
    ("rule", "labels", "clients", "message"),
    [
        (
            Shards(per_client=3),
            np.zeros(100, np.int64),
            50,
            "partition: cannot cut 100 samples into 150 shards, 3 for each client; use at most 33 clients",
        ),
        (
            Shards(per_client=30),
            np.zeros(20, np.int64),
            4,
            "partition: cannot cut 20 samples into 120 shards, 30 for each client; set partition.per_client to 5 or "
            "less",
        ),
        (
            Pathological(classes=4),
            np.arange(30) % 3,
            5,
            "partition.classes: must be at most the number of classes in the data, 3, got 4",
        ),
        (
            Pathological(classes=2),
            np.arange(100) % 10,
            4,
            "partition: leaves classes without a client: 4 clients own 2 each, and there are 10; set partition.classes "
            "to 3 or more, or use more clients",
        ),
        (
            Pathological(classes=2),
            np.array([0] * 50 + [1] * 50 + [2] * 3),
            12,
            "partition: gives class 2 to 8 clients, and it has 3 samples; use fewer clients or fewer classes a client",
        ),
        (
            Quantity(minimum=11),
            np.zeros(100, np.int64),
            10,
            "partition: must leave each of 10 clients its minimum of 11 of 100 samples; set partition.minimum to 10 or "
            "less, or use at most 9 clients",
        ),
        (
            Quantity(),
            np.zeros(9, np.int64),
            10,
            "partition: must leave each of 10 clients its minimum of 1 of 9 samples; use at most 9 clients",
        ),
    ],
)
def test_impossible_splits_say_what_to_do(rule, labels, clients, message):
    with pytest.raises(UserError) as caught:
        rule.split(labels, clients, np.random.default_rng(0))
    assert str(caught.value) == message
