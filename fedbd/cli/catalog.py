"""The registered methods as a person reads them: one line each, or one with its fields and their defaults."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from fedbd.config.field_texts import sentences, unmarked
from fedbd.errors import Problem, UserError
from fedbd.registry import METHODS, either, near_miss, resolve


@dataclass(frozen=True)
class Entry:
    """A method in the catalog: its kind, its name and its docstring's first line."""

    kind: str
    name: str
    summary: str


def entries(kind: str | None = None) -> list[Entry]:
    """Return all registered methods, or those of one kind.

    Raises:
        UserError: If there is no such kind.
    """
    if kind is not None and kind not in METHODS:
        expected = f"must be {either(list(METHODS))}"
        raise UserError(
            [Problem(path="kind", expected=expected, got=repr(kind), remedy=near_miss(kind, list(METHODS)))]
        )
    kinds = [kind] if kind is not None else list(METHODS)
    return [Entry(k, name, _summary(resolve(k, name, k))) for k in kinds for name in METHODS[k]]


def _summary(cls: type) -> str:
    return _plain((inspect.getdoc(cls) or "").partition("\n")[0])


def _plain(text: str) -> str:
    return text.replace("``", "`")


def describe(name: str) -> str:
    """Return a method's documentation: what it is, its paper, its fields with types and defaults.

    Raises:
        UserError: If no method has that name.
    """
    return "\n\n".join(_described(method) for method in details(name))


def details(name: str) -> list[dict[str, Any]]:
    """Return a method's documentation as JSON values, once for each kind that has a method of the name.

    Returns:
        Each {kind, name, class, summary, text, source, fields: [{name, type, default, required, text}]}; ``text`` is
        the class's documentation, ``source`` its file's: paper and differences.

    Raises:
        UserError: If no method has that name.
    """
    kinds = [kind for kind, methods in METHODS.items() if name in methods]
    if not kinds:
        known = [known for methods in METHODS.values() for known in methods]
        problem = Problem(path="name", expected="must be a method, a scenario file or a run's folder", got=repr(name))
        raise UserError([dataclasses.replace(problem, remedy=near_miss(name, known) or "fedbd list names the methods")])
    return [_details(kind, name) for kind in kinds]


def _details(kind: str, name: str) -> dict[str, Any]:
    cls = resolve(kind, name, kind)
    return {
        "kind": kind,
        "name": name,
        "class": f"{cls.__module__}:{cls.__name__}",
        "summary": _summary(cls),
        "text": _plain(inspect.getdoc(cls) or ""),
        "source": _plain(inspect.getdoc(importlib.import_module(cls.__module__)) or ""),
        "fields": list(_fields(cls)) if isinstance(cls, type) and dataclasses.is_dataclass(cls) else None,
    }


def _fields(cls: type) -> Iterator[dict[str, Any]]:
    hints, texts = typing.get_type_hints(cls, include_extras=False), sentences(cls)
    for field in dataclasses.fields(cls):
        kind_of = getattr(hints[field.name], "__name__", None) or str(hints[field.name])
        shown = kind_of if "[" not in str(hints[field.name]) else str(hints[field.name])
        default: Any = field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        required = default is dataclasses.MISSING
        yield {
            "name": field.name,
            "type": shown.replace("typing.", ""),
            "default": None if required else default,
            "required": required,
            "text": unmarked(texts.get(field.name, "")),
        }


def _described(method: Mapping[str, Any]) -> str:
    head = f"{method['kind']}: {method['name']}  ({method['class']})"
    lines = [head, "", method["text"], "", method["source"]]
    if method["fields"] is not None:
        lines += ["", "Fields:"]
        for field in method["fields"]:
            default = "required" if field["required"] else repr(field["default"])
            lines.append(f"  {field['name']}: {field['type']} = {default}")
    return "\n".join(lines).rstrip()
