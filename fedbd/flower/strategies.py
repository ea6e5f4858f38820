"""Flower strategies by name, with their constructor's arguments."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterator, Mapping
from inspect import Parameter
from typing import Any

from flwr.serverapp.strategy import Strategy

from fedbd.errors import Problem, ScenarioError
from fedbd.registry import near_miss, resolve

OURS = ("fraction_train", "fraction_evaluate", "min_train_nodes", "min_evaluate_nodes", "min_available_nodes")
"""Arguments that decide who takes part: the scenario's cohort does."""

REST = (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD)


def inner_strategy(name: str, arguments: Mapping[str, Any]) -> Strategy:
    """Return a Flower strategy that trains everybody it is shown and evaluates nobody.

    Args:
        name: A registered name or ``package.module:Class``.
        arguments: Keyword arguments of its constructor.

    Raises:
        ScenarioError: If the name is unknown, or an argument is not the constructor's or not the user's to set.
    """
    cls = resolve("strategy", name, "strategy.name")
    if not (isinstance(cls, type) and issubclass(cls, Strategy)):
        expected = "must name a subclass of flwr.serverapp.strategy.Strategy"
        raise ScenarioError([Problem(path="strategy.name", expected=expected, got=repr(name))])
    known = inspect.signature(cls).parameters
    problems = [*_unfit(arguments, known, cls), *_missing(arguments, known, cls)]
    if problems:
        raise ScenarioError(problems)
    ours = {"fraction_train": 1.0, "fraction_evaluate": 0.0}
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
    for attribute, value in ours.items():
        if hasattr(strategy, attribute):  # a constructor may keep it from its callers
            setattr(strategy, attribute, value)
    return strategy


def _unfit(arguments: Mapping[str, Any], known: Mapping[str, Parameter], cls: type) -> Iterator[Problem]:
    """Yield the arguments that are not the constructor's, or not the user's to set."""
    named = [name for name, parameter in known.items() if parameter.kind not in REST and name not in OURS]
    anything = any(parameter.kind is Parameter.VAR_KEYWORD for parameter in known.values())
    for argument in arguments:
        path = f"strategy.arguments.{argument}"
        if argument in OURS:
            remedy = "set cohort.size and partition.clients"
            yield Problem(path=path, expected="is not the user's to set", remedy=remedy)
        elif argument not in named and not anything:
            remedy = near_miss(argument, named) or f"known: {', '.join(named) or 'none'}"
            yield Problem(path=path, expected=f"is no argument of {cls.__name__}", remedy=remedy)


def _missing(arguments: Mapping[str, Any], known: Mapping[str, Parameter], cls: type) -> Iterator[Problem]:
    """Yield the arguments that the constructor needs and the scenario does not give."""
    for name, parameter in known.items():
        needed = parameter.default is Parameter.empty and parameter.kind not in REST and name not in OURS
        if needed and name not in arguments:
            yield Problem(path=f"strategy.arguments.{name}", expected=f"is required by {cls.__name__}")
