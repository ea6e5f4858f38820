"""State as files can hold it without pickle: a tree of plain JSON values, and the arrays in it apart, by name.

What goes in comes out with the same types and bits: None, booleans, integers, floats (NaN and infinities, too),
strings, bytes, NumPy arrays and scalars of numbers, text and times, and lists, tuples and dicts of them. Anything else
is refused: a state that came back half would be worse than none.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

Arrays = dict[str, NDArray[Any]]

DEEPEST = 40
"""Levels of nesting that are followed: a list that holds itself has no end."""

_KINDS = "biufcUSmM"  # void types (NumPy's names for structures, and for numbers that it does not know) lose their name


class Unsaveable(Exception):  # noqa: N818 - says what a value is
    """A value that has no place in a saved state; ``kind`` says what it is and ``path`` where it stands."""

    def __init__(self, path: str, kind: str) -> None:
        """Keep the place and the kind."""
        super().__init__(f"{path or 'the state'} is {kind}")
        self.path = path
        self.kind = kind


def encode(value: Any, arrays: Arrays, path: str = "", depth: int = 0) -> Any:
    """Return a value as JSON knows it; its arrays are added to ``arrays``.

    Args:
        value: See the module's description.
        arrays: Takes the arrays, under new names.
        path: Where the value stands, for messages.
        depth: How deep it is nested.

    Raises:
        Unsaveable: If something in it is of another kind.
    """
    if depth > DEEPEST:
        raise Unsaveable(path, f"nested more than {DEEPEST} levels deep")
    kind = type(value)
    if value is None or kind in (bool, int, str) or (kind is float and math.isfinite(value)):
        return value
    if kind in (list, tuple):
        items = [encode(item, arrays, f"{path}[{i}]", depth + 1) for i, item in enumerate(value)]
        return items if kind is list else {"tuple": items}
    if kind is dict:
        return {"dict": [_pair(key, item, arrays, path, depth + 1) for key, item in value.items()]}
    return _leaf(value, arrays, path)


def _pair(key: Any, item: Any, arrays: Arrays, path: str, depth: int) -> list[Any]:
    place = f"{path}.{key}" if path else str(key)
    return [encode(key, arrays, f"a key of {path or 'the state'}", depth), encode(item, arrays, place, depth)]


def _leaf(value: Any, arrays: Arrays, path: str) -> dict[str, str]:
    """Return what is no container and has no place in JSON."""
    kind = type(value)
    if kind is float:
        return {"float": repr(value)}
    if isinstance(value, np.generic):
        return {"scalar": _put(np.asarray(value), arrays, path)}
    if kind is np.ndarray:
        return {"array": _put(value, arrays, path)}
    if kind is bytes:
        return {"bytes": _put(np.frombuffer(value, np.uint8), arrays, path)}
    raise Unsaveable(path, f"a {kind.__module__}.{kind.__qualname__}")


def decode(tree: Any, arrays: Arrays) -> Any:
    """Return the value that ``encode`` made a tree of."""
    if isinstance(tree, list):
        return [decode(item, arrays) for item in tree]
    if not isinstance(tree, dict):
        return tree
    [(tag, content)] = tree.items()
    if tag == "dict":
        return {decode(key, arrays): decode(item, arrays) for key, item in content}
    if tag == "tuple":
        return tuple(decode(item, arrays) for item in content)
    if tag == "float":
        return float(content)
    return {"array": lambda a: a, "scalar": lambda a: a[()], "bytes": lambda a: a.tobytes()}[tag](arrays[content])


def _put(array: NDArray[Any], arrays: Arrays, path: str) -> str:
    if array.dtype.kind not in _KINDS:
        raise Unsaveable(path, f"an array of {array.dtype}")
    name = f"a{len(arrays)}"
    arrays[name] = array
    return name
