"""Flower's records and strategies as values that a checkpoint can hold (``fedbd.records.saved_state``), and back."""

from __future__ import annotations

import functools
import types
from collections.abc import Mapping
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from flwr.serverapp.strategy import Strategy

from fedbd.flower.arrays import pack_all, view_all
from fedbd.records.saved_state import Unsaveable, encode

REBUILT = (types.FunctionType, types.BuiltinFunctionType, types.MethodType, functools.partial, type)
"""Attributes that a strategy gets back from its constructor."""

_RECORDS: dict[str, type] = {"arrays": ArrayRecord, "config": ConfigRecord, "metrics": MetricRecord}


def records_state(content: RecordDict) -> dict[str, Any]:
    """Return the records of a client's state as plain values and arrays."""
    return {str(name): _record_state(record) for name, record in content.items()}


def records_from(state: Mapping[str, Any]) -> RecordDict:
    """Return the records that ``records_state`` made plain."""
    return RecordDict({name: _record_from(*saved) for name, saved in state.items()})


def strategy_state(strategy: Strategy) -> dict[str, Any]:
    """Return what a Flower strategy remembers.

    That is what its ``state_dict`` returns where it has one, else its attributes without functions and classes, which
    the scenario builds again.

    Raises:
        Unsaveable: If it keeps something else than numbers, text, arrays, Flower's records, and lists and dicts of
            them.
    """
    name = type(strategy).__name__
    if _speaks(strategy):
        state = {"state_dict": ("value", strategy.state_dict())}  # type: ignore[attr-defined]
    elif not hasattr(strategy, "__dict__"):
        raise Unsaveable(name, "a class with __slots__")
    else:
        kept = {key: value for key, value in vars(strategy).items() if not isinstance(value, REBUILT)}
        state = {
            key: _record_state(value) if isinstance(value, tuple(_RECORDS.values())) else ("value", value)
            for key, value in kept.items()
        }
    for key, (_, value) in state.items():
        encode(value, {}, f"{name}.{key}")  # refused here, where its name is known
    return state


def restore_strategy(strategy: Strategy, state: Mapping[str, Any]) -> None:
    """Give a freshly built strategy what ``strategy_state`` returned."""
    if _speaks(strategy):
        strategy.load_state_dict(state["state_dict"][1])  # type: ignore[attr-defined]
        return
    for key, saved in state.items():
        setattr(strategy, key, _record_from(*saved))


def _speaks(strategy: Strategy) -> bool:
    return all(callable(getattr(strategy, name, None)) for name in ("state_dict", "load_state_dict"))


def _record_state(record: Any) -> tuple[str, Any]:
    kind = next(kind for kind, cls in _RECORDS.items() if isinstance(record, cls))
    return kind, view_all(record) if isinstance(record, ArrayRecord) else dict(record)


def _record_from(kind: str, value: Any) -> Any:
    if kind == "value":
        return value
    return pack_all(value) if kind == "arrays" else _RECORDS[kind](value)
