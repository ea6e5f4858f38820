"""Plain values to frozen dataclasses and back, with every mistake reported at once.

``field_values`` checks the single values; this module walks the nesting and finds the method classes by name. A field
``method`` is flattened: the method's own fields stand beside the plan's, as in ``{name: rnp, every: 5, alpha: 0.2}``.
Where a mapping has a name, the name alone will do: ``aggregation: mean``, ``cleanup: [rnp]``, ``engine: ray``.
"""

from __future__ import annotations

import dataclasses
import inspect
import types
import typing
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, TypeVar

from fedbd.config.field_values import Adapter, adapter, checked, shown
from fedbd.errors import Problem, ScenarioError, UserError
from fedbd.registry import METHODS, choice, near_miss, resolve
from fedbd.types import (
    Aggregator,
    Attack,
    CentralDefense,
    Cleanup,
    DataSource,
    Detector,
    Evasion,
    LocalDefense,
    ModelFamily,
    Partitioner,
    Trigger,
)

T = TypeVar("T")
FLAT = "method"
CONTRACTS: dict[str, type] = {
    "data": DataSource,
    "partition": Partitioner,
    "model": ModelFamily,
    "trigger": Trigger,
    "attack": Attack,
    "evasion": Evasion,
    "local_defense": LocalDefense,
    "central_defense": CentralDefense,
    "aggregation": Aggregator,
    "cleanup": Cleanup,
    "detection": Detector,
}
"""kind -> the Protocol that its methods obey; a third party's class is held to it."""


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
class Slot:
    """What a field may hold: a plain value, a nested dataclass, a method, or a list of dataclasses.

    Attributes:
        hint: The field's type, with its bounds.
        shape: ``plain``, ``nested``, ``listed`` or ``method``.
        inner: The dataclass (``nested``, ``listed``), the kind (``method``) or None.
        optional: It may be null.
        required: It has no default.
    """

    hint: Any
    shape: str
    inner: Any
    optional: bool
    required: bool

    @property
    def remedy(self) -> str:
        """What to do about a null that may not stand here: ``key:`` with nothing behind it is one, too."""
        return "" if self.required else "leave the field out for its default"


@cache
def slots_of(cls: type) -> dict[str, Slot]:
    """Return what each field of a dataclass may hold."""
    hints = typing.get_type_hints(cls, include_extras=True)
    return {
        field.name: _slot(hints[field.name], field.default is field.default_factory)  # both MISSING
        for field in dataclasses.fields(cls)
        if field.init
    }


def _slot(hint: Any, required: bool) -> Slot:
    kind = next((extra.kind for extra in getattr(hint, "__metadata__", ()) if isinstance(extra, Kind)), None)
    bare = typing.get_args(hint)[0] if kind is not None else hint
    arms = typing.get_args(bare) if typing.get_origin(bare) in (typing.Union, types.UnionType) else (bare,)
    optional = type(None) in arms
    only = [arm for arm in arms if arm is not type(None)]
    if kind is not None:
        return Slot(hint, "method", kind, optional, required)
    if len(only) == 1 and dataclasses.is_dataclass(only[0]):
        return Slot(hint, "nested", only[0], optional, required)
    items = typing.get_args(only[0]) if typing.get_origin(only[0]) is tuple else ()
    if items and dataclasses.is_dataclass(items[0]):
        return Slot(hint, "listed", items[0], optional, required)
    return Slot(hint, "plain", None, optional, required)


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
    slots = slots_of(cls)  # type: ignore[arg-type]
    named = FLAT in slots or "name" in slots
    if named and isinstance(raw, str):
        raw = {"name": raw}
    if not isinstance(raw, dict):
        expected = "must be a name or a mapping with one" if named else "must be a mapping"
        problems.append(Problem(path=path, expected=expected, got=shown(raw)))
        return None
    before = len(problems)
    own = {str(key): value for key, value in raw.items()}
    values: dict[str, Any] = {}
    if FLAT in slots:
        own, values[FLAT] = _flattened(slots, own, path, problems)
    _unknown(own, [name for name in slots if name != FLAT], path, problems)
    for name, slot in slots.items():
        place = _join(path, name)
        if name in own and slot.shape == "plain":
            check = _adapters(cls)[name]  # type: ignore[arg-type]
            values[name] = checked(check, own[name], place, slot.optional, slot.remedy, problems)
        elif name in own:
            values[name] = _structured(slot, own[name], place, problems)
        elif slot.required and name != FLAT:
            problems.append(Problem(path=place, expected="is required", remedy=_choices(slot)))
    return _built(cls, values, path, problems) if len(problems) == before else None


def _built(cls: type[T], values: dict[str, Any], path: str, problems: list[Problem]) -> T | None:
    """Return the instance, or None if it finds something wrong between its own fields."""
    before = len(problems)
    try:
        instance = cls(**values)
    except UserError as error:  # a method that checks its own fields (method_fields)
        problems.extend(replace(one, path=_join(path, one.path) if one.path else path) for one in error.problems)
        return None
    except (TypeError, ValueError) as error:  # a third party's __post_init__
        problems.append(Problem(path=path, expected=f"is refused by {cls.__name__}: {error}"))
        return None
    problems.extend(
        Problem(path=_join(path, name) if name else path, expected=sentence)
        for name, sentence in own_problems(instance)
    )
    return instance if len(problems) == before else None


def _choices(slot: Slot) -> str:
    """Return which methods a required field may name, if it is one for a method."""
    kind = slot.inner
    if slot.shape == "nested":
        kind = slots_of(slot.inner)[FLAT].inner if FLAT in slots_of(slot.inner) else None
    return f"name {choice(kind)}" if isinstance(kind, str) else ""


def field_problems(instance: object) -> list[Problem]:
    """Return what is wrong with the plain fields of a dataclass that was made in Python, by field.

    Nested dataclasses and methods have checked their own.
    """
    cls: Any = type(instance)
    problems: list[Problem] = []
    for name, check in _adapters(cls).items():
        slot = slots_of(cls)[name]
        checked(check, getattr(instance, name), name, slot.optional, slot.remedy, problems)
    return problems


def own_problems(instance: object) -> list[tuple[str, str]]:
    """Return what a dataclass says of its own fields (``problems()`` without arguments), if it says anything."""
    check: Callable[[], list[tuple[str, str]]] | None = getattr(instance, "problems", None)
    return check() if check is not None and not inspect.signature(check).parameters else []


def _structured(slot: Slot, raw: object, path: str, problems: list[Problem]) -> Any:
    if raw is None:
        if not slot.optional:
            what = {"nested": "a mapping", "method": "a name or a mapping with one", "listed": "a list"}[slot.shape]
            problems.append(Problem(path=path, expected=f"must be {what}", got="null", remedy=slot.remedy))
        return None
    if slot.shape == "nested":
        return parse(slot.inner, raw, path, problems)
    if slot.shape == "method":
        return _method(slot.inner, raw, path, problems)
    if not isinstance(raw, list):
        remedy = "begin each entry with a dash" if isinstance(raw, dict) else ""
        problems.append(Problem(path=path, expected="must be a list of mappings", got=shown(raw), remedy=remedy))
        return None
    return tuple(parse(slot.inner, item, f"{path}[{i}]", problems) for i, item in enumerate(raw))


def _method(kind: str, raw: object, path: str, problems: list[Problem]) -> Method | None:
    entry = {"name": raw} if isinstance(raw, str) else raw
    if not isinstance(entry, dict):
        problems.append(Problem(path=path, expected="must be a name or a mapping with one", got=shown(raw)))
        return None
    cls = _class(kind, entry, path, problems)
    if cls is None:
        return None
    fields = {key: value for key, value in entry.items() if key != "name"}
    impl = parse(cls, fields, path, problems)
    return None if impl is None else Method(entry["name"], impl)


def _flattened(
    slots: dict[str, Slot], raw: dict[str, Any], path: str, problems: list[Problem]
) -> tuple[dict[str, Any], Method | None]:
    """Take a method's fields out of a plan's mapping; return what is the plan's own, and the method."""
    cls = _class(slots[FLAT].inner, raw, path, problems)
    rest = {key: value for key, value in raw.items() if key != "name"}
    if cls is None:  # its fields cannot be told from misspelt ones
        return {key: value for key, value in rest.items() if key in slots}, None
    mine = {key: value for key, value in rest.items() if key in slots and key != FLAT}
    other = {key: value for key, value in rest.items() if key not in mine}
    known = [*slots_of(cls), *slots]
    strange = {key: value for key, value in other.items() if key not in slots_of(cls)}
    _unknown(strange, known, path, problems)
    impl = parse(cls, {key: value for key, value in other.items() if key not in strange}, path, problems)
    return mine, None if impl is None else Method(raw["name"], impl)


def _class(kind: str, raw: dict[str, Any], path: str, problems: list[Problem]) -> Any:
    where = _join(path, "name")
    name = raw.get("name")
    if not isinstance(name, str):
        if name is None:
            problems.append(Problem(path=where, expected="is required", remedy=f"name {choice(kind)}"))
        else:
            problems.append(Problem(path=where, expected=f"must be {choice(kind)}", got=shown(name)))
        return None
    try:
        cls = resolve(kind, name, where)
    except ScenarioError as error:
        problems.extend(error.problems)
        return None
    expected, remedy = _unfit(kind, cls) if name not in METHODS[kind] else ("", "")
    if expected:
        problems.append(Problem(path=where, expected=expected, got=shown(name), remedy=remedy))
        return None
    return cls


def _unfit(kind: str, cls: Any) -> tuple[str, str]:
    """Return why a third party's class cannot be a method of a kind, and a remedy; empty if it can."""
    if not isinstance(cls, type) or not dataclasses.is_dataclass(cls) or not cls.__dataclass_params__.frozen:  # type: ignore[attr-defined]
        return "must name a frozen dataclass", "write @dataclass(frozen=True, kw_only=True) above the class"
    contract = CONTRACTS[kind]
    missing = [name for name in vars(contract) if not name.startswith("_") and not hasattr(cls, name)]
    if missing:
        return f"must name a method of kind {kind} (fedbd.types.{contract.__name__})", f"it lacks {', '.join(missing)}"
    try:
        _adapters(cls)
    except Exception as error:
        reason = str(error).partition("\n")[0]
        return f"must have fields of types that YAML can give ({type(error).__name__}: {reason})", ""
    return "", ""


def _unknown(raw: dict[str, Any], known: list[str], path: str, problems: list[Problem]) -> None:
    for key in raw:
        if key not in known:
            hint = near_miss(key, known) or f"known here: {', '.join(k for k in known if k != FLAT) or 'none'}"
            problems.append(Problem(path=_join(path, key), expected="is not a field", remedy=hint))


@cache
def _adapters(cls: type) -> dict[str, Adapter]:
    return {name: adapter(slot.hint) for name, slot in slots_of(cls).items() if slot.shape == "plain"}


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


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
