"""Pickles read as data: numbers, text, lists, dicts and arrays of bytes, and nothing is ever called.

CIFAR comes in pickles that Python 2 wrote. Unpickling runs what the file says; here its opcodes are read one by one
(``pickletools``) and only those that build plain values are carried out. A name in it stays a name, a call stays a note
of what would have been called: an array is recognized by its note, anything else is refused.
"""

from __future__ import annotations

import pickletools
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

BROKEN = (ValueError, IndexError, KeyError, TypeError, OverflowError, MemoryError, struct.error)
"""What a damaged file leads to."""


@dataclass(frozen=True)
class _Name:
    """``module name``, which stays one."""

    text: str


@dataclass
class _Call:
    """What would have been called, with what, and what its result would have been told."""

    what: _Name
    arguments: tuple[Any, ...]
    state: Any = None


class NotPlainError(ValueError):
    """A pickle that is damaged, or holds more than plain values."""


def read_plain(path: Path) -> Any:
    """Return the value in a pickle file.

    Raises:
        NotPlainError: If it is damaged or would build anything but plain values and arrays of bytes.
    """
    stack: list[Any] = []
    memo: dict[int, Any] = {}
    try:
        with path.open("rb") as file:
            for opcode, argument, _ in pickletools.genops(file):
                if opcode.name == "STOP":
                    return stack.pop()
                _carry_out(opcode.name, argument, stack, memo)
    except NotPlainError:
        raise
    except BROKEN:
        raise NotPlainError("it is damaged") from None
    raise NotPlainError("it is damaged")


_MARK = object()
_CONSTANTS: dict[str, Callable[[], Any]] = {
    "MARK": lambda: _MARK,
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_LIST": list,
    "EMPTY_DICT": dict,
    "EMPTY_TUPLE": tuple,
}
_TEXT = {"BINSTRING", "SHORT_BINSTRING"}
"""What Python 2 called a string: pickletools gives it as text in Latin-1."""
_VALUES = {"BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE"}
_VALUES |= {"BINBYTES", "SHORT_BINBYTES"}
_NOTHING = {"PROTO", "FRAME"}


def _carry_out(name: str, argument: Any, stack: list[Any], memo: dict[int, Any]) -> None:
    """Carry out one opcode."""
    if name in _CONSTANTS:
        stack.append(_CONSTANTS[name]())
    elif name in _TEXT:
        stack.append(argument.encode("latin-1"))
    elif name in _VALUES:
        stack.append(argument)
    elif name in ("BINPUT", "LONG_BINPUT", "MEMOIZE"):
        memo[len(memo) if name == "MEMOIZE" else argument] = stack[-1]
    elif name in ("BINGET", "LONG_BINGET"):
        stack.append(memo[argument])
    elif name in _BUILDERS:
        _BUILDERS[name](stack)
    elif name == "GLOBAL":
        stack.append(_Name(argument))
    elif name not in _NOTHING:
        raise NotPlainError(f"it would do more than build plain values ({name})")


def _since_mark(stack: list[Any]) -> list[Any]:
    at = max(place for place, value in enumerate(stack) if value is _MARK)  # ValueError where there is none
    items = stack[at + 1 :]
    del stack[at:]
    return items


def _extend(stack: list[Any], items: list[Any]) -> None:
    if not isinstance(stack[-1], list):
        raise NotPlainError("it is damaged")
    stack[-1].extend(items)


def _update(stack: list[Any], items: list[Any]) -> None:
    if not isinstance(stack[-1], dict):
        raise NotPlainError("it is damaged")
    stack[-1].update(zip(items[::2], items[1::2], strict=True))


def _tuple(count: int) -> Callable[[list[Any]], None]:
    def build(stack: list[Any]) -> None:
        items = [stack.pop() for _ in range(count)]
        stack.append(tuple(reversed(items)))

    return build


def _call(stack: list[Any]) -> None:
    arguments, what = stack.pop(), stack.pop()
    if not isinstance(what, _Name) or not isinstance(arguments, tuple):
        raise NotPlainError("it is damaged")
    stack.append(_Call(what, arguments))


def _tell(stack: list[Any]) -> None:
    state = stack.pop()
    if not isinstance(stack[-1], _Call):
        raise NotPlainError("it is damaged")
    stack[-1].state = state


def _stacked_name(stack: list[Any]) -> None:
    name, module = stack.pop(), stack.pop()
    stack.append(_Name(f"{module} {name}"))


_BUILDERS: dict[str, Callable[[list[Any]], None]] = {
    "APPEND": lambda stack: _extend(stack, [stack.pop()]),
    "APPENDS": lambda stack: _extend(stack, _since_mark(stack)),
    "SETITEM": lambda stack: _update(stack, [*reversed([stack.pop(), stack.pop()])]),
    "SETITEMS": lambda stack: _update(stack, _since_mark(stack)),
    "TUPLE": lambda stack: stack.append(tuple(_since_mark(stack))),
    "TUPLE1": _tuple(1),
    "TUPLE2": _tuple(2),
    "TUPLE3": _tuple(3),
    "REDUCE": _call,
    "BUILD": _tell,
    "STACK_GLOBAL": _stacked_name,
}


def byte_array(value: Any) -> NDArray[np.uint8]:
    """Return the array that a note of a call stands for.

    Raises:
        NotPlainError: If it is not NumPy's for unsigned bytes in C order.
    """
    made = {f"numpy.{core}.multiarray _reconstruct" for core in ("core", "_core")}
    try:
        if not isinstance(value, _Call) or value.what.text not in made:
            raise NotPlainError("it holds no array where one has to be")
        _, shape, kind, fortran, content = value.state
        text = kind.arguments[0] if isinstance(kind, _Call) and kind.what.text == "numpy dtype" else None
        if text not in (b"u1", "u1") or fortran is not False or not isinstance(content, bytes):
            raise NotPlainError("its array is not one of unsigned bytes, row by row")
        return np.frombuffer(content, np.uint8).reshape([int(length) for length in shape])
    except NotPlainError:
        raise
    except BROKEN:
        raise NotPlainError("it is damaged") from None
