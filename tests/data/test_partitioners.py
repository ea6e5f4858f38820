from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from fedbd.data.partition_dirichlet import Dirichlet
from fedbd.data.partition_iid import Iid
from fedbd.errors import UserError
from fedbd.types import Partitioner

LABELS = st.lists(st.integers(0, 5), min_size=1, max_size=120).map(lambda x: np.array(x, dtype=np.int64))


def check_contract(parts, samples, clients):
    assert len(parts) == clients
    assert sorted(np.concatenate(parts).tolist()) == list(range(samples))
    for part in parts:
        assert part.dtype == np.int64
        assert len(part) > 0
        assert (np.diff(part) > 0).all()


@settings(max_examples=60, deadline=None)
@given(LABELS, st.integers(1, 130), st.integers(0, 3))
def test_iid_gives_each_sample_once_and_equal_sizes(labels, clients, seed):
    if clients > len(labels):
        with pytest.raises(UserError, match="at most the number of training samples"):
            Iid().split(labels, clients, np.random.default_rng(seed))
        return
    parts = Iid().split(labels, clients, np.random.default_rng(seed))
    check_contract(parts, len(labels), clients)
    sizes = [len(part) for part in parts]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] - sizes[-1] <= 1


@settings(max_examples=150, deadline=None)
@given(LABELS, st.integers(1, 60), st.floats(1e-3, 1e3), st.integers(1, 4), st.integers(0, 3))
def test_dirichlet_gives_each_sample_once_and_the_minimum(labels, clients, alpha, minimum, seed):
    rule = Dirichlet(alpha=alpha, minimum=minimum)
    if clients * minimum > len(labels):
        with pytest.raises(UserError, match="its minimum of"):
            rule.split(labels, clients, np.random.default_rng(seed))
        return
    parts = rule.split(labels, clients, np.random.default_rng(seed))
    check_contract(parts, len(labels), clients)
    assert min(map(len, parts)) >= minimum


@pytest.mark.parametrize("alpha", [1e-300, 1e-12, 1e12, 1e300])
def test_dirichlet_at_the_ends_of_alpha(alpha):
    parts = Dirichlet(alpha=alpha).split(np.arange(200) % 4, 10, np.random.default_rng(0))
    check_contract(parts, 200, 10)


@pytest.mark.parametrize("rule", [Iid(), Dirichlet(alpha=0.3)])
def test_the_same_generator_gives_the_same_split(rule):
    assert isinstance(rule, Partitioner)
    labels = np.arange(500) % 10
    first, again, other = (rule.split(labels, 7, np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert all(map(np.array_equal, first, again))
    assert not all(map(np.array_equal, first, other))


@pytest.mark.parametrize("alpha", [0.1, 0.5, 5.0])
def test_dirichlet_marginals_are_the_theorys(alpha):
    """A client's share of a class is Beta(alpha, (n - 1) alpha): mean 1/n, variance (n - 1) / (n^2 (n alpha + 1))."""
    clients, classes, each, draws = 10, 40, 400, 25
    labels = np.repeat(np.arange(classes), each)
    counts = np.empty((draws, clients, classes), dtype=np.int64)
    for seed in range(draws):
        parts = Dirichlet(alpha=alpha).split(labels, clients, np.random.default_rng(seed))
        counts[seed] = [np.bincount(labels[part], minlength=classes) for part in parts]
    shares = counts / each
    variance = (clients - 1) / (clients**2 * (clients * alpha + 1))
    assert shares.var() == pytest.approx(variance, rel=0.06)
    assert shares.mean(axis=(0, 2)) == pytest.approx(1 / clients, abs=4 * (variance / (draws * classes)) ** 0.5)
    # The first client's count is its share of 400, rounded: its distribution function is known at each half count.
    theory = stats.beta(alpha, (clients - 1) * alpha).cdf((np.arange(each) + 0.5) / each)
    first = np.bincount(counts[:, 0].ravel(), minlength=each + 1).cumsum()[:each] / (draws * classes)
    assert np.abs(first - theory).max() < 0.05  # Kolmogorov-Smirnov at 1 % for 1,000 draws


def test_dirichlet_fills_up_from_the_largest():
    labels = np.zeros(1000, dtype=np.int64)
    free = Dirichlet(alpha=0.05).split(labels, 20, np.random.default_rng(3))
    filled = Dirichlet(alpha=0.05, minimum=10).split(labels, 20, np.random.default_rng(3))
    sizes, after = np.array([len(p) for p in free]), np.array([len(p) for p in filled])
    assert (sizes < 10).sum() > 5
    assert (after[sizes < 10] == 10).all()
    largest = int(sizes.argmax())
    untouched = (sizes >= 10) & (np.arange(20) != largest)
    assert (after[untouched] == sizes[untouched]).all()
    assert all(set(free[i]) <= set(filled[i]) for i in range(20) if i != largest and sizes[i] > 1)


def test_refusals_say_what_to_do():
    with pytest.raises(UserError) as caught:
        Iid().split(np.zeros(3, dtype=np.int64), 4, np.random.default_rng(0))
    assert str(caught.value) == "partition.clients: must be at most the number of training samples, 3, got 4"
    with pytest.raises(UserError) as caught:
        Dirichlet(minimum=10).split(np.zeros(99, dtype=np.int64), 10, np.random.default_rng(0))
    assert str(caught.value) == (
        "partition: must leave each of 10 clients its minimum of 10 of 99 samples; set partition.minimum to 9 or less, "
        "or use at most 9 clients"
    )
