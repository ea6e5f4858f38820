from __future__ import annotations

import dataclasses
import gc
import statistics
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fedbd.config.scenario import Scenario, from_dict
from fedbd.defenses.aggregation.masa import MASA, median_deviation_scores
from fedbd.errors import MethodRefused
from fedbd.params import assign, flatten
from fedbd.prepared import prepare
from fedbd.running.runs import run
from fedbd.training import TrainingPlan, train
from fedbd.types import Cohort, Need, Samples, TrustedData, Vector

Build = Callable[[Vector], nn.Module]
CLASSES = 10


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def linear() -> nn.Sequential:
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, CLASSES))
    nn.init.zeros_(net[1].weight)
    nn.init.zeros_(net[1].bias)
    return net


def build(weights: Vector) -> nn.Module:
    net = linear()
    assign(net, weights)
    return net.eval()


def step(start: Vector, data: Samples, seed: int) -> Vector:
    """Return a client's update: one epoch on its data."""
    net = build(start)
    train(net, data, TrainingPlan(epochs=1, lr=0.1, momentum=0.0, weight_decay=0.0), rng(seed))
    return flatten(net) - start


@pytest.fixture(scope="module")
def start(digits: Samples) -> Vector:
    net = linear()
    train(net, digits.subset(torch.arange(300)), TrainingPlan(epochs=3, lr=0.1), rng())
    return flatten(net)


@pytest.fixture(scope="module")
def rows(digits: Samples, start: Vector) -> Any:
    """Seven honest clients, and the third of eight, whose labels are shifted by one."""
    parts = [digits.subset(torch.arange(300 + 100 * i, 400 + 100 * i)) for i in range(8)]
    parts[2] = Samples(parts[2].images, (parts[2].labels + 1) % CLASSES)
    return np.stack([step(start, part, i) for i, part in enumerate(parts)])


@pytest.fixture(scope="module")
def trusted(digits: Samples) -> TrustedData:
    fit = digits.subset(torch.arange(1100, 1220))
    return TrustedData(fit, digits.subset(torch.arange(1220, 1240)), CLASSES)


def cohort(rows: Any, start: Vector, trusted: TrustedData | None, make: Build | None = build, **other: Any) -> Cohort:
    given: dict[str, Any] = {"updates": rows, "weights": np.ones(len(rows)), **other}
    weights = given["weights"]
    return Cohort(
        mean=(weights @ rows / weights.sum()).astype(np.float32),
        clients=len(rows),
        ids=None,
        global_weights=start,
        trusted=trusted,
        build=make,
        **given,
    )


# The score.


@given(st.lists(st.floats(0.1, 1e4), min_size=1, max_size=12))
@settings(max_examples=60, deadline=None)
def test_scores_against_a_slow_reference(losses: list[float]) -> None:
    middle, spread = statistics.median(losses), statistics.pstdev(losses)
    found = median_deviation_scores(np.array(losses))
    if spread > 1.1e-6 * middle:
        assert found.tolist() == pytest.approx([(loss - middle) / spread for loss in losses], abs=1e-6)
    if spread < 0.9e-6 * middle:
        assert found.tolist() == [0.0] * len(losses)


def test_scores_by_hand() -> None:
    assert median_deviation_scores(np.array([1.0, 1.0, 1.0, 5.0])).tolist() == pytest.approx([0, 0, 0, 4 / 3**0.5])
    assert median_deviation_scores(np.array([2.0, 3.0])).tolist() == [-1.0, 1.0]
    with_gap = median_deviation_scores(np.array([2.0, np.nan, 3.0, np.inf]))
    assert with_gap[[0, 2]].tolist() == [-1.0, 1.0]
    assert np.isnan(with_gap[[1, 3]]).all()
    assert np.isnan(median_deviation_scores(np.full(3, np.nan))).all()


# The losses.


def ascent(weights: Vector, x: Any, y: Any, rule: MASA) -> float:
    """Return the accumulated loss of full-batch ascent on a softmax regression, in numpy and float64."""
    w, b = weights[: 64 * CLASSES].reshape(CLASSES, 64).astype(np.float64), weights[64 * CLASSES :].astype(np.float64)
    speed_w, speed_b, total, hot = np.zeros_like(w), np.zeros_like(b), 0.0, np.eye(CLASSES)[y]
    for _ in range(rule.unlearn_epochs):
        scores = x @ w.T + b
        p = np.exp(scores - scores.max(1, keepdims=True))
        p /= p.sum(1, keepdims=True)
        total += -np.log(p[np.arange(len(y)), y]).mean()
        gradient = (hot - p) / len(y)  # of minus the loss
        grad_w, grad_b = gradient.T @ x, gradient.sum(0)
        norm = np.sqrt((grad_w**2).sum() + (grad_b**2).sum())
        factor = min(1.0, rule.max_norm / norm) if rule.max_norm is not None else 1.0
        speed_w, speed_b = rule.momentum * speed_w + factor * grad_w, rule.momentum * speed_b + factor * grad_b
        w, b = w - rule.unlearn_lr * speed_w, b - rule.unlearn_lr * speed_b
    return float(total)


@pytest.mark.parametrize(
    "fields",
    [{}, {"fusion": 1.0}, {"max_norm": 0.05, "unlearn_lr": 0.5}, {"max_norm": None, "momentum": 0.0}],
    ids=str,
)
def test_losses_are_those_of_a_slow_ascent_on_the_fused_models(
    rows: Any, start: Vector, trusted: TrustedData, fields: dict[str, Any]
) -> None:
    rule = MASA(**{"batch_size": 1000, "unlearn_lr": 0.1, "unlearn_epochs": 4, **fields})
    weights = np.arange(1.0, 9.0)
    _, _, notes = rule.aggregate(cohort(rows, start, trusted, weights=weights), {}, rng())
    x = trusted.fit.images.flatten(1).double().numpy() / 255
    y = trusted.fit.labels.numpy()
    mean = weights @ rows.astype(np.float64) / weights.sum()
    slow = [ascent(start + rule.fusion * row + (1 - rule.fusion) * mean, x, y, rule) for row in rows]
    assert notes["losses"] == pytest.approx(slow, rel=1e-4)
    assert notes["images"] == 8 * 4 * 120


# The verdict.


def test_the_poisoned_update_is_left_out(rows: Any, start: Vector, trusted: TrustedData) -> None:
    weights = np.arange(1.0, 9.0)
    found, memory, notes = MASA().aggregate(cohort(rows, start, trusted, weights=weights), {}, rng())
    assert found.accepted is not None
    assert not found.accepted[2]
    assert notes["scores"][2] == max(notes["scores"]) > 1
    counted = np.array(found.accepted)
    assert notes["rejected"] == (~counted).sum()
    assert counted.sum() >= 5
    expected = weights[counted] @ rows[counted].astype(np.float64) / weights[counted].sum()
    assert np.allclose(found.delta, expected, atol=1e-6)
    assert found.delta.dtype == np.float32
    assert memory == {}


def test_scores_follow_their_rows_and_a_generator_decides_all(rows: Any, start: Vector, trusted: TrustedData) -> None:
    order = np.array([5, 2, 0, 7, 1, 3, 6, 4])
    _, _, notes = MASA().aggregate(cohort(rows, start, trusted), {}, rng(3))
    _, _, again = MASA().aggregate(cohort(rows, start, trusted), {}, rng(3))
    _, _, mixed = MASA().aggregate(cohort(rows[order], start, trusted), {}, rng(3))
    assert notes == again
    assert mixed["losses"] == pytest.approx([notes["losses"][i] for i in order], rel=1e-5)


def test_a_higher_threshold_leaves_out_fewer(rows: Any, start: Vector, trusted: TrustedData) -> None:
    found, _, notes = MASA(threshold=100.0).aggregate(cohort(rows, start, trusted), {}, rng())
    assert found.accepted == (True,) * 8
    assert notes["rejected"] == 0
    assert np.allclose(found.delta, rows.mean(0), atol=1e-6)


def test_equal_updates_all_count(rows: Any, start: Vector, trusted: TrustedData) -> None:
    found, _, notes = MASA().aggregate(cohort(np.tile(rows[0], (5, 1)), start, trusted), {}, rng())
    assert found.accepted == (True,) * 5
    assert notes["scores"] == [0.0] * 5
    assert np.allclose(found.delta, rows[0], atol=1e-7)


def test_a_model_that_diverges_is_left_out(rows: Any, start: Vector, trusted: TrustedData) -> None:
    for value in (np.nan, np.inf, 1e38):
        spoilt = rows.copy()
        spoilt[4, :32] = value
        found, _, notes = MASA(fusion=1.0, threshold=100.0).aggregate(cohort(spoilt, start, trusted), {}, rng())
        assert found.accepted == tuple(i != 4 for i in range(8))
        assert notes["diverged"] == 1
        assert notes["losses"][4] is notes["scores"][4] is None
        assert np.allclose(found.delta, np.delete(rows, 4, axis=0).mean(0), atol=1e-6)
        assert np.isfinite(found.delta).all()


def test_where_every_model_diverges_nothing_counts_and_the_notes_say_so(
    rows: Any, start: Vector, trusted: TrustedData
) -> None:
    found, _, notes = MASA(unlearn_lr=1e38, max_norm=None).aggregate(cohort(rows, start, trusted), {}, rng())
    assert found.accepted == (False,) * 8
    assert not found.delta.any()
    assert notes["diverged"] == notes["rejected"] == 8
    assert "every model diverged" in notes["reason"]


def test_one_model_at_a_time_and_the_input_stays(rows: Any, start: Vector, trusted: TrustedData) -> None:
    alive: list[weakref.ref[nn.Module]] = []
    most = 0

    def counted(weights: Vector) -> nn.Module:
        nonlocal most
        most = max(most, sum(reference() is not None for reference in alive))
        net = build(weights)
        alive.append(weakref.ref(net))
        return net

    before = rows.copy(), start.copy(), trusted.fit.images.clone()
    gc.disable()
    try:
        MASA(unlearn_epochs=1).aggregate(cohort(rows, start, trusted, counted), {}, rng())
    finally:
        gc.enable()
    assert len(alive) == 8
    assert most == 0  # each one is gone before the next is built
    assert np.array_equal(rows, before[0])
    assert np.array_equal(start, before[1])
    assert torch.equal(trusted.fit.images, before[2])


def test_refusals(rows: Any, start: Vector, trusted: TrustedData) -> None:
    with pytest.raises(MethodRefused, match="masa needs single updates"):
        MASA().aggregate(
            Cohort(
                updates=None,
                mean=rows[0],
                weights=np.ones(1),
                clients=8,
                ids=None,
                global_weights=start,
                trusted=trusted,
                build=build,
            ),
            {},
            rng(),
        )
    threes = trusted.fit.subset(torch.nonzero(trusted.fit.labels == 3)[:, 0])
    with pytest.raises(MethodRefused, match=r"one class; .*leave trusted\.labels out"):
        MASA().aggregate(cohort(rows, start, dataclasses.replace(trusted, fit=threes)), {}, rng())
    with pytest.raises(MethodRefused, match=r"there are none; hand it TrustedData"):
        MASA().aggregate(cohort(rows, start, None), {}, rng())
    with pytest.raises(MethodRefused, match="no model at hand"):
        MASA().aggregate(cohort(rows, start, trusted, None), {}, rng())
    assert MASA().needs == {Need.INDIVIDUAL, Need.TRUSTED}
    assert MASA().minimum_rows == 3


def test_models_unlearn_in_train_mode(rows: Any, start: Vector, trusted: TrustedData) -> None:
    modes: list[bool] = []

    def watched(weights: Vector) -> nn.Module:
        net = build(weights)
        net.register_forward_pre_hook(lambda module, _: modes.append(module.training))
        return net

    MASA(unlearn_epochs=1).aggregate(cohort(rows, start, trusted, watched), {}, rng())
    assert modes and all(modes)


# In a run.


def scenario(**fields: Any) -> Scenario:
    raw = {
        "name": "masa",
        "rounds": 1,
        "data": "digits",
        "partition": {"name": "iid", "clients": 4},
        "trusted": {"size": 100},
        "model": {"name": "cnn", "width": 4},
        "training": {"epochs": 1},
        "aggregation": {"name": "masa", "unlearn_epochs": 2, **fields},
        "evaluation": {"twin": False},
        "engine": {"name": "local", "executor": "serial"},
    }
    return from_dict(raw)


def notes_of(line: dict[str, Any]) -> dict[str, Any]:
    return next(notes for notes in line["notes"].values() if isinstance(notes, dict) and "scores" in notes)


def test_a_run_has_its_verdict_in_the_record(tmp_path: Path) -> None:
    _, line = run(scenario(), tmp_path).rounds
    notes = notes_of(line)
    scores = dict(zip(notes["ids"], notes["scores"], strict=True))
    assert sorted(scores) == [0, 1, 2, 3]
    assert line["rejected"] == [client for client in range(4) if scores[client] >= 1]
    assert line["accepted"] == [client for client in range(4) if scores[client] < 1]
    trusted = prepare(scenario()).federation.trusted
    assert trusted is not None
    assert notes["images"] == 4 * 2 * len(trusted.fit)


def test_a_run_in_which_no_update_counts_goes_on_from_where_it_was(tmp_path: Path) -> None:
    before, line = run(scenario(unlearn_lr=1e38, max_norm=None), tmp_path).rounds
    assert line["accepted"] == []
    assert line["rejected"] == [0, 1, 2, 3]
    assert line["weights_sha256"] == before["weights_sha256"]
    assert "every model diverged" in notes_of(line)["reason"]
