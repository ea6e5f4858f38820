"""Plain values to frozen dataclasses and back, with every mistake reported at once.

pydantic checks the single values (strictly: no text for a number, no 1 for true); this module walks the nesting, finds
the method classes by name and words the problems. A field ``method`` is flattened: the method's own fields stand beside
the plan's, as in ``{name: rnp, every: 5, alpha: 0.2}``.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import types
import typing
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeVar

import pydantic

from fedbd.errors import Problem, ScenarioError
from fedbd.registry import near_miss, resolve

T = TypeVar("T")
FLAT = "method"


@dataclass(frozen=True)
class Kind:
    """Marks a field that holds a method of a kind (a key of ``registry.METHODS``)."""

    kind: str


@dataclass(frozen=True)
class Method:
    """A method as a scenario names it: the name, and the dataclass with its hyper-parameters."""

    name: str
    impl: Any

    @staticmethod
    def default(kind: str, name: str) -> Method:
        """Return a registered method with its defaults."""
        return Method(name, resolve(kind, name, kind)())


@dataclass(frozen=True)
class _Slot:
    """What a field may hold: a plain value, a nested dataclass, a method, or a list of dataclasses."""

    hint: Any
    shape: str  # plain | nested | listed | method
    inner: Any
    optional: bool


@cache
def _slots(cls: type) -> dict[str, _Slot]:
    hints = typing.get_type_hints(cls, include_extras=True)
    return {field.name: _slot(hints[field.name]) for field in dataclasses.fields(cls) if field.init}


def _slot(hint: Any) -> _Slot:
    kind = next((extra.kind for extra in getattr(hint, "__metadata__", ()) if isinstance(extra, Kind)), None)
    bare = typing.get_args(hint)[0] if kind is not None else hint
    arms = typing.get_args(bare) if typing.get_origin(bare) in (typing.Union, types.UnionType) else (bare,)
    optional = type(None) in arms
    only = [arm for arm in arms if arm is not type(None)]
    if kind is not None:
        return _Slot(hint, "method", kind, optional)
    if len(only) == 1 and dataclasses.is_dataclass(only[0]):
        return _Slot(hint, "nested", only[0], optional)
    items = typing.get_args(only[0]) if typing.get_origin(only[0]) is tuple else ()
    if items and dataclasses.is_dataclass(items[0]):
        return _Slot(hint, "listed", items[0], optional)
    return _Slot(hint, "plain", None, optional)


def parse(cls: type[T], raw: object, path: str, problems: list[Problem]) -> T | None:
    """Return an instance of a dataclass made from plain values.

    Args:
        cls: A frozen dataclass.
        raw: What the user wrote in its place.
        path: Where that stands; empty at the top.
        problems: Everything wrong is appended here.

    Returns:
        The instance, or None if anything in it is wrong.
    """
    if not isinstance(raw, dict):
        problems.append(Problem(path=path, expected="must be a mapping", got=_show(raw)))
        return None
    before = len(problems)
    slots = _slots(cls)  # type: ignore[arg-type]
    own = {str(key): value for key, value in raw.items()}
    values: dict[str, Any] = {}
    if FLAT in slots:
        own, values[FLAT] = _flattened(slots, own, path, problems)
    _unknown(own, [name for name in slots if name != FLAT], path, problems)
    plain = {name: own[name] for name in slots if name in own and slots[name].shape == "plain"}
    values |= _plain(cls, plain, path, problems)
    for name, slot in slots.items():
        if name == FLAT or slot.shape == "plain":
            continue
        if name in own:
            values[name] = _structured(slot, own[name], _join(path, name), problems)
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and field.init and field.name not in own and field.name != FLAT:
            problems.append(Problem(path=_join(path, field.name), expected="is required"))
    if len(problems) > before:
        return None
    instance = cls(**values)
    problems.extend(
        Problem(path=_join(path, name) if name else path, expected=sentence)
        for name, sentence in own_problems(instance)
    )
    return instance if len(problems) == before else None


def own_problems(instance: object) -> list[tuple[str, str]]:
    """Return what a dataclass says of its own fields (``problems()`` without arguments), if it says anything."""
    check: Callable[[], list[tuple[str, str]]] | None = getattr(instance, "problems", None)
    return check() if check is not None and not inspect.signature(check).parameters else []


def _structured(slot: _Slot, raw: object, path: str, problems: list[Problem]) -> Any:
    if raw is None and slot.optional:
        return None
    if slot.shape == "nested":
        return parse(slot.inner, raw, path, problems)
    if slot.shape == "method":
        return _method(slot.inner, raw, path, problems)
    if not isinstance(raw, list):
        problems.append(Problem(path=path, expected="must be a list of mappings", got=_show(raw)))
        return None
    return tuple(parse(slot.inner, item, f"{path}[{i}]", problems) for i, item in enumerate(raw))


def _method(kind: str, raw: object, path: str, problems: list[Problem]) -> Method | None:
    entry = {"name": raw} if isinstance(raw, str) else raw
    if not isinstance(entry, dict):
        problems.append(Problem(path=path, expected="must be a mapping with a name", got=_show(raw)))
        return None
    cls = _class(kind, entry, path, problems)
    if cls is None:
        return None
    fields = {key: value for key, value in entry.items() if key != "name"}
    impl = parse(cls, fields, path, problems)
    return None if impl is None else Method(entry["name"], impl)


def _flattened(
    slots: dict[str, _Slot], raw: dict[str, Any], path: str, problems: list[Problem]
) -> tuple[dict[str, Any], Method | None]:
    """Take a method's fields out of a plan's mapping; return what is the plan's own, and the method."""
    cls = _class(slots[FLAT].inner, raw, path, problems)
    rest = {key: value for key, value in raw.items() if key != "name"}
    if cls is None:  # its fields cannot be told from misspelt ones
        return {key: value for key, value in rest.items() if key in slots}, None
    mine = {key: value for key, value in rest.items() if key in slots and key != FLAT}
    other = {key: value for key, value in rest.items() if key not in mine}
    known = [*_slots(cls), *slots]
    strange = {key: value for key, value in other.items() if key not in _slots(cls)}
    _unknown(strange, known, path, problems)
    impl = parse(cls, {key: value for key, value in other.items() if key not in strange}, path, problems)
    return mine, None if impl is None else Method(raw["name"], impl)


def _class(kind: str, raw: dict[str, Any], path: str, problems: list[Problem]) -> Any:
    where = _join(path, "name")
    name = raw.get("name")
    if not isinstance(name, str):
        got = None if name is None else _show(name)
        problems.append(Problem(path=where, expected="is required" if name is None else "must be text", got=got))
        return None
    try:
        cls = resolve(kind, name, where)
    except ScenarioError as error:
        problems.extend(error.problems)
        return None
    if not dataclasses.is_dataclass(cls):
        problems.append(Problem(path=where, expected="must name a frozen dataclass", got=_show(name)))
        return None
    return cls


def _unknown(raw: dict[str, Any], known: list[str], path: str, problems: list[Problem]) -> None:
    for key in raw:
        if key not in known:
            hint = near_miss(key, known) or f"known here: {', '.join(k for k in known if k != FLAT) or 'none'}"
            problems.append(Problem(path=_join(path, key), expected="is not a field", remedy=hint))


@cache
def _checker(cls: type) -> type[pydantic.BaseModel]:
    fields: dict[str, Any] = {name: (slot.hint, None) for name, slot in _slots(cls).items() if slot.shape == "plain"}
    config = pydantic.ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, protected_namespaces=())
    return pydantic.create_model(f"{cls.__name__}Fields", __config__=config, **fields)


def _plain(cls: type, raw: dict[str, Any], path: str, problems: list[Problem]) -> dict[str, Any]:
    try:
        checked = _checker(cls).model_validate_json(json.dumps(raw, default=str))
    except pydantic.ValidationError as error:
        for detail in error.errors(include_url=False):
            problems.append(_worded(detail, path, raw))
        return {}
    return {name: getattr(checked, name) for name in raw}


_WORDS = {
    "int_type": "must be an integer",
    "int_from_float": "must be an integer",
    "int_parsing": "must be an integer",
    "float_type": "must be a number",
    "finite_number": "must be a finite number",
    "string_type": "must be text",
    "bool_type": "must be true or false",
    "tuple_type": "must be a list",
    "list_type": "must be a list",
    "dict_type": "must be a mapping",
}


def _worded(detail: Any, path: str, raw: dict[str, Any]) -> Problem:
    context = detail.get("ctx", {})
    remedy = ""
    expected = _WORDS.get(detail["type"], "")
    if detail["type"] == "literal_error":
        choices = context["expected"].replace("'", "").replace(" or ", ", ")
        expected = f"must be one of {choices}"
        remedy = near_miss(str(detail["input"]), choices.split(", "))
    for key, sign in (("ge", ">="), ("gt", ">"), ("le", "<="), ("lt", "<")):
        if key in context:
            expected = f"must be {sign} {context[key]:g}"
    if detail["type"] in ("string_too_short", "too_short"):
        expected = "must not be empty"
    where = path
    for step in detail["loc"]:
        if isinstance(step, int):
            where = f"{where}[{step}]"
        elif step in raw or where == path:
            where = _join(where, str(step))
    return Problem(path=where, expected=expected or detail["msg"], got=_show(detail["input"]), remedy=remedy)


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _show(value: object) -> str:
    if isinstance(value, str):
        return repr(value if len(value) <= 60 else value[:57] + "...")
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    if isinstance(value, int | float):
        return f"{value}"
    return {"list": "a list", "dict": "a mapping", "tuple": "a list"}.get(type(value).__name__, type(value).__name__)


def to_plain(value: Any) -> Any:
    """Return a dataclass as plain YAML values, methods flattened as ``parse`` reads them."""
    if isinstance(value, Method):
        return {"name": value.name, **to_plain(value.impl)}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value) if field.init}
        flat = to_plain(fields.pop(FLAT)) if isinstance(fields.get(FLAT), Method) else {}
        return {**flat, **{name: to_plain(entry) for name, entry in fields.items()}}
    if isinstance(value, tuple | list):
        return [to_plain(item) for item in value]
    if isinstance(value, dict):
        return {key: to_plain(item) for key, item in value.items()}
    return value
