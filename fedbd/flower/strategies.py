"""Flower strategies by name, with their constructor's arguments."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from flwr.serverapp.strategy import Strategy

from fedbd.errors import Problem, ScenarioError
from fedbd.registry import near_miss, resolve

OURS = ("fraction_train", "fraction_evaluate", "min_train_nodes", "min_evaluate_nodes", "min_available_nodes")
"""Arguments that decide who takes part: the scenario's cohort does."""


def inner_strategy(name: str, arguments: Mapping[str, Any]) -> Strategy:
    """Return a Flower strategy that trains everybody it is shown and evaluates nobody.

    Args:
        name: A registered name or ``package.module:Class``.
        arguments: Keyword arguments of its constructor.

    Raises:
        ScenarioError: If the name is unknown, or an argument is not the constructor's or not the user's to set.
    """
    cls = resolve("strategy", name, "strategy.name")
    known = list(inspect.signature(cls).parameters)
    allowed = [argument for argument in known if argument not in OURS]
    problems = [
        Problem(
            path=f"strategy.arguments.{argument}",
            expected="is decided by cohort" if argument in OURS else f"is no argument of {cls.__name__}",
            remedy="" if argument in OURS else near_miss(argument, allowed) or f"known: {', '.join(allowed)}",
        )
        for argument in arguments
        if argument not in allowed
    ]
    if problems:
        raise ScenarioError(problems)
    ours = {"fraction_train": 1.0, "fraction_evaluate": 0.0}
    try:
        strategy: Strategy = cls(**{k: v for k, v in ours.items() if k in known}, **arguments)
    except (TypeError, ValueError) as error:
        raise ScenarioError([Problem(path="strategy.arguments", expected=str(error))]) from None
    return strategy
