"""Flower strategies by name, with their constructor's arguments."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Mapping
from typing import Any

from flwr.serverapp.strategy import Strategy

from fedbd.errors import Problem, ScenarioError
from fedbd.registry import near_miss, resolve

OURS = ("fraction_train", "fraction_evaluate", "min_train_nodes", "min_evaluate_nodes", "min_available_nodes")
"""Arguments that decide who takes part: the scenario's cohort does."""

OPEN = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def inner_strategy(name: str, arguments: Mapping[str, Any]) -> Strategy:
    """Return a Flower strategy that trains everybody it is shown and evaluates nobody.

    Args:
        name: A registered name or ``package.module:Class``.
        arguments: Keyword arguments of its constructor.

    Raises:
        ScenarioError: If the name is unknown, or an argument is not the constructor's or not the user's to set.
    """
    cls = resolve("strategy", name, "strategy.name")
    if not isinstance(cls, type):
        raise ScenarioError([Problem(path="strategy.name", expected="must name a class", got=repr(name))])
    parameters = {name: parameter for name, parameter in inspect.signature(cls).parameters.items() if name not in OURS}
    problems = [_unfit(argument, list(parameters), cls) for argument in arguments if argument not in parameters]
    problems += [
        Problem(path=f"strategy.arguments.{name}", expected=f"is required by {cls.__name__}")
        for name, parameter in parameters.items()
        if parameter.default is parameter.empty and parameter.kind not in OPEN and name not in arguments
    ]
    if problems:
        raise ScenarioError(problems)
    ours = {"fraction_train": 1.0, "fraction_evaluate": 0.0}
    known = inspect.signature(cls).parameters
    log = logging.getLogger("flwr")
    level = log.level
    log.setLevel(logging.ERROR)  # Flower warns that fraction_evaluate is 0: it is meant
    try:
        strategy: Strategy = cls(**{k: v for k, v in ours.items() if k in known}, **arguments)
    except Exception as error:  # a third party's constructor may raise anything
        expected = f"are refused by {cls.__name__}: {error}"
        raise ScenarioError([Problem(path="strategy.arguments", expected=expected)]) from None
    finally:
        log.setLevel(level)
    return strategy


def _unfit(argument: str, allowed: list[str], cls: type) -> Problem:
    path = f"strategy.arguments.{argument}"
    if argument in OURS:
        return Problem(path=path, expected="is not the user's to set", remedy="set cohort.size and partition.clients")
    remedy = near_miss(argument, allowed) or f"known: {', '.join(allowed) or 'none'}"
    return Problem(path=path, expected=f"is no argument of {cls.__name__}", remedy=remedy)
