"""Flower strategies by name, with their constructor's arguments."""

from __future__ import annotations

import inspect
import logging
import types
import typing
from collections.abc import Iterator, Mapping
from inspect import Parameter
from typing import Annotated, Any

from annotated_types import Ge, Gt, Lt
from flwr.serverapp.strategy import Strategy

from fedbd.config.field_values import adapter, checked, shown
from fedbd.errors import Problem, ScenarioError
from fedbd.registry import near_miss, resolve

OURS = ("fraction_train", "fraction_evaluate", "min_train_nodes", "min_evaluate_nodes", "min_available_nodes")
"""Arguments that decide who takes part: the scenario's cohort does."""

REST = (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD)

PLAIN = (int, float, bool, str, type(None))

BOUNDS = {
    **dict.fromkeys(("eta", "eta_l", "tau", "server_learning_rate"), (Gt(0),)),
    **dict.fromkeys(("beta_1", "beta_2", "server_momentum"), (Ge(0), Lt(1))),
}
"""What arguments of Flower's own strategies can be: Flower takes any number, and trains into nonsense with most."""


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
    problems = [*_unfit(arguments, known, cls), *_missing(arguments, known, cls), *_wrong_values(arguments, cls)]
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


def _wrong_values(arguments: Mapping[str, Any], cls: type) -> list[Problem]:
    """Return the arguments whose values are not of the type that the constructor names, or out of ``BOUNDS``."""
    constructor = inspect.getattr_static(cls, "__init__")
    flowers = str(constructor.__module__).startswith("flwr.")
    try:
        hints = typing.get_type_hints(constructor)
    except (NameError, TypeError):  # a third party's annotation may name what is only there for a type checker
        return []
    problems: list[Problem] = []
    for name, value in arguments.items():
        path, hint = f"strategy.arguments.{name}", hints.get(name)
        if name in OURS or hint is None:
            continue
        if _is_plain(hint):
            bounds = BOUNDS.get(name, ()) if flowers else ()
            check = adapter(Annotated[(hint, *bounds)] if bounds else hint)
            checked(check, value, path, type(None) in typing.get_args(hint), "", problems)
        elif flowers:
            problems.append(Problem(path=path, expected="is a function, which YAML cannot give", got=shown(value)))
    return problems


def _is_plain(hint: Any) -> bool:
    """Return whether an annotation names numbers, text, truth values, null or several of them."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return all(map(_is_plain, typing.get_args(hint)))
    return hint in PLAIN or typing.get_origin(hint) is typing.Literal
