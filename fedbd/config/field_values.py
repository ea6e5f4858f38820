"""Single values of a scenario: checked strictly by pydantic, and what is wrong with one in a sentence."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import pydantic

from fedbd.errors import Problem
from fedbd.registry import either, near_miss

Adapter = pydantic.TypeAdapter[Any]

_WANTED = {
    "int_type": "an integer",
    "int_from_float": "an integer",
    "int_parsing": "an integer",
    "float_type": "a number",
    "finite_number": "a finite number",
    "string_type": "text",
    "bool_type": "true or false",
    "tuple_type": "a list",
    "list_type": "a list",
    "dict_type": "a mapping",
    "none_required": "null",
}
_SIGNS = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}


def adapter(hint: Any) -> Adapter:
    """Return what checks a field of a type: no text for a number, no 1 for true, no NaN and no infinity.

    Raises:
        Exception: pydantic's own, if it cannot make such a value out of YAML's.
    """
    return pydantic.TypeAdapter(hint, config=pydantic.ConfigDict(strict=True, allow_inf_nan=False))


def checked(check: Adapter, value: Any, path: str, optional: bool, remedy: str, problems: list[Problem]) -> Any:
    """Return a field's value in its type, or None with one problem for each place in it that is wrong.

    Args:
        check: The field's ``adapter``.
        value: A plain YAML value.
        path: Where it stands.
        optional: Whether the field may be null, for the message.
        remedy: What to do about a null that may not stand here.
        problems: Everything wrong is appended here.
    """
    try:
        found = check.validate_json(json.dumps(value, default=_plain))
        if isinstance(value, bool) and not isinstance(found, bool):  # pydantic takes true for the literal 1
            problems.append(Problem(path=path, expected="must not be true or false", got=shown(value)))
            return None
        return found
    except pydantic.ValidationError as error:
        places: dict[str, list[Any]] = {}  # a union gives one complaint for each of its arms
        for detail in error.errors(include_url=False):
            places.setdefault(_place(detail["loc"], path, value), []).append(detail)
    for place, details in places.items():
        whole = place == path
        problems.append(_worded(place, details, optional and whole, remedy if whole else ""))
    return None


def _plain(value: Any) -> Any:
    """Return NumPy's scalars as Python's; what YAML cannot give becomes text, which no number or list is."""
    scalar = type(value).__module__ == "numpy" and getattr(value, "shape", None) == ()  # numpy itself is not imported
    return value.item() if scalar else str(value)


def _place(steps: Sequence[int | str], path: str, value: Any) -> str:
    """Return where a complaint belongs: pydantic's steps, as far as the user's values go (then come arms of unions)."""
    for step in steps:
        if isinstance(value, dict) and step in value:
            path, value = f"{path}.{step}", value[str(step)]
        elif isinstance(value, list | tuple) and isinstance(step, int) and step < len(value):
            path, value = f"{path}[{step}]", value[step]
        else:
            break
    return path


def _worded(place: str, details: list[Any], optional: bool, of_null: str) -> Problem:
    """Return one problem for all that pydantic says of one place."""
    first, value = details[0], details[0]["input"]
    if first["type"] in ("string_too_short", "too_short"):
        return Problem(path=place, expected="must not be empty")
    wanted = list(dict.fromkeys(_wanted(detail) for detail in details))
    if "a number" in wanted and "an integer" in wanted:
        wanted.remove("an integer")
    if len(wanted) > 1 and "true or false" in wanted:
        wanted = [want for want in wanted if want != "true or false"] + ["true", "false"]
    remedy = ""
    literal = next((detail for detail in details if detail["type"] == "literal_error"), None)
    if literal is not None and value is not None:
        remedy = near_miss(str(value), _literals(literal))
    elif value is None:
        remedy = of_null
    elif wanted == ["text"] and isinstance(value, bool | int | float):
        remedy = "put it in quotes"
    expected = f"must be {either([*wanted, *(['null'] if optional else [])])}"
    return Problem(path=place, expected=expected, got=shown(value), remedy=remedy)


def _wanted(detail: Any) -> str:
    context = detail.get("ctx", {})
    for key, sign in _SIGNS.items():
        if key in context:
            return f"{sign} {context[key]:.12g}"
    if detail["type"] == "literal_error":
        return either(_literals(detail))
    fallback: str = detail["msg"].removeprefix("Input should be ")
    return _WANTED.get(detail["type"], fallback)


def _literals(detail: Any) -> list[str]:
    return str(detail["ctx"]["expected"]).replace("'", "").replace(" or ", ", ").split(", ")


def shown(value: object) -> str:
    """Return a plain value as a message shows it: short ones themselves, lists and mappings by their kind."""
    if isinstance(value, str):
        return repr(value if len(value) <= 60 else value[:57] + "...")
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    if isinstance(value, int | float):
        return f"{value}"
    return {"list": "a list", "dict": "a mapping", "tuple": "a list"}.get(type(value).__name__, type(value).__name__)
