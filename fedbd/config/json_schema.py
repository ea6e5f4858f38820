"""The form of a scenario as a JSON Schema (draft 2020-12), so that editors complete and check scenario files.

It is made from what ``schema.parse`` reads: the plans, the registry and the methods' own dataclasses. A method is
chosen by its ``name``; each has a closed form of its own, with the plan's fields beside the method's where both stand
in one mapping. What depends on several fields (``fedbd.compatibility``) or on the data is not in it: ``fedbd validate``
tells.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fedbd.config.field_texts import sentences, summary, unmarked
from fedbd.config.field_values import adapter
from fedbd.config.plans import OFF, CheckpointPlan, StrategyPlan
from fedbd.config.schema import FLAT, Slot, slots_of, to_plain
from fedbd.registry import CLOSED, METHODS, PATH, resolve

DIALECT = "https://json-schema.org/draft/2020-12/schema"
Json = dict[str, Any]


def schema_text(*, central: bool = False) -> str:
    """Return the JSON Schema of scenarios, or of central trainings, as the text of a file."""
    if central:
        from fedbd.central.plan import CentralPlan  # noqa: PLC0415 - a scenario needs none of what this imports

        found = json_schema(CentralPlan, "a central training of fedbd")
    else:
        from fedbd.config.scenario import Scenario  # noqa: PLC0415 - likewise

        found = json_schema(Scenario, "a scenario of fedbd")
    return json.dumps(found, indent=1, ensure_ascii=False) + "\n"


def json_schema(cls: type, title: str) -> Json:
    """Return the JSON Schema of a plan's dataclass.

    Args:
        cls: ``Scenario`` or ``CentralPlan``.
        title: Its title.
    """
    definitions: dict[str, Json] = {}
    top = _mapping(cls, None, definitions)
    definitions = dict(sorted(definitions.items()))
    return {"$schema": DIALECT, "title": title, **top, "$defs": definitions}


def _mapping(cls: type, method: tuple[str, str] | None, definitions: dict[str, Json]) -> Json:
    """Return the closed form of a plan, or of a plan with the fields of one of its methods beside its own.

    Args:
        cls: The plan.
        method: Kind and registered name of its flattened method, where it has one.
        definitions: What is referred to is put here.
    """
    properties, required = _fields(cls, definitions)
    text = summary(cls)
    if method is not None:
        impl = resolve(*method, method[0])
        others, wanted = _fields(impl, definitions)
        text = summary(impl)
        properties = {"name": {"const": method[1]}, **others, **properties}
        required = ["name", *(name for name in wanted if name not in required), *required]
    return {
        "type": "object",
        "description": unmarked(text),
        "properties": properties,
        "required": required,
        "additionalProperties": False,
    }


def _fields(cls: type, definitions: dict[str, Json]) -> tuple[dict[str, Json], list[str]]:
    """Return a dataclass's fields but for a flattened method, and which of them are required."""
    texts = sentences(cls)
    defaults = {field.name: _default(field) for field in dataclasses.fields(cls)}
    properties = {}
    for name, slot in slots_of(cls).items():
        if name == FLAT:
            continue
        form = _value(slot, definitions)
        if cls is StrategyPlan and name == "name":
            form = _name("strategy")
        if slot.inner is CheckpointPlan:
            form["anyOf"].append({"const": OFF})
        if name in texts:
            form["description"] = unmarked(texts[name])
        if not slot.required:
            form["default"] = defaults[name]
        properties[name] = form
    return properties, [name for name, slot in slots_of(cls).items() if slot.required and name != FLAT]


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return to_plain(field.default_factory())
    return None if field.default is dataclasses.MISSING else to_plain(field.default)


def _value(slot: Slot, definitions: dict[str, Json]) -> Json:
    """Return the form of a field's value."""
    if slot.shape == "plain":
        return dict(_untitled(adapter(slot.hint).json_schema()))
    if slot.shape == "method":
        form = _reference(slot.inner, definitions, lambda: _chosen(None, slot.inner, definitions))
    else:
        form = _reference(slot.inner.__name__, definitions, lambda: _plan(slot.inner, definitions))
    if slot.shape == "listed":
        form = {"type": "array", "items": form}
    return {"anyOf": [form, {"type": "null"}]} if slot.optional else form


def _untitled(form: Any) -> Any:
    """Return a schema without the titles that pydantic makes out of names."""
    if isinstance(form, dict):
        return {key: _untitled(entry) for key, entry in form.items() if key != "title"}
    return [_untitled(entry) for entry in form] if isinstance(form, list) else form


def _reference(name: str, definitions: dict[str, Json], make: Callable[[], Json]) -> Json:
    if name not in definitions:
        definitions[name] = {}  # taken, should the form refer to itself
        definitions[name] = make()
    return {"$ref": f"#/$defs/{name}"}


def _plan(cls: type, definitions: dict[str, Json]) -> Json:
    """Return the form of a nested plan: one per method where it flattens one; a bare name where a name suffices."""
    slots = slots_of(cls)
    if FLAT in slots:
        return _chosen(cls, slots[FLAT].inner, definitions)
    form = _mapping(cls, None, definitions)
    if "name" not in slots or any(slot.required for name, slot in slots.items() if name != "name"):
        return form
    bare = {key: entry for key, entry in form["properties"]["name"].items() if key not in ("default", "description")}
    return {"anyOf": [form, bare]}


def _chosen(plan: type | None, kind: str, definitions: dict[str, Json]) -> Json:
    """Return the form of a method of a kind: a bare name, or a mapping whose ``name`` decides the other fields.

    Args:
        plan: The plan that flattens it; None for a method that stands alone.
        kind: A key of ``METHODS``.
        definitions: What is referred to is put here.
    """
    own = plan or _Alone
    prefix = f"{plan.__name__}." if plan is not None else f"{kind}."
    cases = [
        {
            "if": {"properties": {"name": {"const": name}}, "required": ["name"]},
            "then": _reference(prefix + name, definitions, lambda n=name: _mapping(own, (kind, n), definitions)),  # type: ignore[misc]
        }
        for name in METHODS[kind]
    ]
    properties, required = _fields(own, definitions)
    mapping = {"type": "object", "properties": {"name": _name(kind)}, "required": ["name"], "allOf": cases}
    if kind not in CLOSED:
        foreign = {"if": {"properties": {"name": {"pattern": _WHOLE}}, "required": ["name"]}}
        mapping["allOf"] = [*cases, {**foreign, "then": {"properties": properties, "required": required}}]
    bare = [] if required else [name for name in METHODS[kind] if not _fields(resolve(kind, name, kind), {})[1]]
    if not bare:
        return mapping
    return {"if": {"type": "string"}, "then": _name(kind, bare), "else": mapping}


@dataclass(frozen=True)
class _Alone:
    """A method that no plan flattens: no fields beside its own."""


_WHOLE = f"^{PATH.pattern}$".replace(r"\w", "[A-Za-z0-9_]")


def _name(kind: str, names: list[str] | None = None) -> Json:
    """Return the form of a method's name: a registered one, or ``package.module:Class``."""
    known = {"enum": names or list(METHODS[kind])}
    return {"anyOf": [known, {"type": "string", "pattern": _WHOLE}]} if kind not in CLOSED else known
