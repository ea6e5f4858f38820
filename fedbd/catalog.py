"""The registered methods as a person reads them: one line each, or one with its fields and their defaults."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import typing
from dataclasses import dataclass

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
    kinds = [kind for kind, methods in METHODS.items() if name in methods]
    if not kinds:
        known = [known for methods in METHODS.values() for known in methods]
        problem = Problem(path="name", expected="must be a method, a scenario file or a run's folder", got=repr(name))
        raise UserError([dataclasses.replace(problem, remedy=near_miss(name, known) or "fedbd list names the methods")])
    return "\n\n".join(_described(kind, name) for kind in kinds)


def _described(kind: str, name: str) -> str:
    cls = resolve(kind, name, kind)
    module = inspect.getdoc(importlib.import_module(cls.__module__)) or ""
    lines = [f"{kind}: {name}  ({cls.__module__}:{cls.__name__})", "", inspect.getdoc(cls) or "", "", module]
    if dataclasses.is_dataclass(cls):
        hints = typing.get_type_hints(cls, include_extras=False)
        lines += ["", "Fields:"]
        for field in dataclasses.fields(cls):
            default = "required" if field.default is dataclasses.MISSING else repr(field.default)
            if field.default_factory is not dataclasses.MISSING:
                default = repr(field.default_factory())
            kind_of = getattr(hints[field.name], "__name__", None) or str(hints[field.name])
            shown = kind_of if "[" not in str(hints[field.name]) else str(hints[field.name])
            lines.append(f"  {field.name}: {shown.replace('typing.', '')} = {default}")
    return _plain("\n".join(lines)).rstrip()
