"""The re-learning test: how soon a repaired model has its backdoor again when the attackers go on.

That purified models learn their backdoor again within a few steps is the finding of R. Min et al.,
https://arxiv.org/abs/2410.09838. Here the federation itself is the attacker's chance: rounds go on after the run, with
the same clients and draws for all starting points.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

from flwr.app import ConfigRecord
from flwr.serverapp import Grid

from fedbd.config.run_text import message_text
from fedbd.config.scenario import Scenario, twin_of, with_open_windows
from fedbd.flower.arrays import SCENARIO, pack_all, view_all
from fedbd.flower.outcome import Outcome, Replacement
from fedbd.flower.strategy import DefendedStrategy
from fedbd.metrics import evaluate
from fedbd.params import assign, flatten, join, split
from fedbd.prepared import Prepared
from fedbd.types import Notes

from .masking import apply_mask
from .starting_point import StartingPoint

MEASURED = ("clean_accuracy", "attack_success", "collapsed")
Build = Callable[[Scenario, Callable[[Outcome], Replacement | None]], DefendedStrategy]
"""Scenario and hook -> a strategy as the run's own."""


def relearn(grid: Grid, prepared: Prepared, points: Mapping[str, StartingPoint], build: Build) -> Notes:
    """Go on from each starting point under attack; return by name CA and ASR after so many further rounds.

    Rounds are numbered on, so that draws and decaying rates are those of a longer run; everybody's sums are in the
    clear, which changes no bit. The Flower strategy inside starts without momentum.

    Returns:
        ``{name: {"from_round": R, "after": {"1": {clean_accuracy, attack_success, collapsed}, ...}}}``.
    """
    wanted = prepared.scenario.evaluation.relearn or ()
    last = max(point.round for point in points.values()) + max(wanted)
    scenario = _further(prepared.scenario, last)
    return {
        name: {"from_round": point.round, "after": _go_on(grid, prepared, scenario, point, wanted, build)}
        for name, point in points.items()
    }


def _further(scenario: Scenario, last: int) -> Scenario:
    """Return the scenario with attacks in every round and nothing that repairs, detects, measures or encrypts."""
    twin = twin_of(scenario)
    return dataclasses.replace(
        with_open_windows(scenario),
        rounds=last,
        cleanup=(),
        detection=(),
        secure_sum=twin.secure_sum,
        evaluation=twin.evaluation,
    )


def _go_on(
    grid: Grid, prepared: Prepared, scenario: Scenario, point: StartingPoint, wanted: tuple[int, ...], build: Build
) -> Notes:
    model = prepared.new_model()
    assign(model, point.weights)

    def keep_off(outcome: Outcome) -> Replacement | None:
        if not point.mask:
            return None
        assign(model, outcome.weights)
        apply_mask(model, point.mask)
        return Replacement(weights=flatten(model))

    strategy = build(scenario, keep_off)
    arrays = pack_all({name: entry.numpy() for name, entry in model.state_dict().items()})
    found: Notes = {}
    for step in range(1, max(wanted) + 1):
        config = ConfigRecord({SCENARIO: message_text(scenario)})
        messages = strategy.configure_train(point.round + step, arrays, config, grid)
        replies = grid.send_and_receive(messages, timeout=strategy.timeout)
        arrays = strategy.aggregate_train(point.round + step, replies)[0] or arrays
        if step in wanted:
            named = dict(split(join(view_all(arrays), prepared.layout), prepared.layout))
            assign(model, join(named, prepared.layout))
            found[str(step)] = _measured(prepared, model)
    return found


def _measured(prepared: Prepared, model: object) -> Notes:
    found = evaluate(model, prepared.measured, prepared.triggers, prepared.dataset.classes)  # type: ignore[arg-type]
    return {name: getattr(found, name) for name in MEASURED}
