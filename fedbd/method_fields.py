"""Checks of a method's fields where it is made in Python; a scenario's are checked by ``schema`` before it is made."""

from __future__ import annotations

from typing import TypeVar

from fedbd.errors import Problem, UserError

T = TypeVar("T")


def checks_fields(cls: type[T]) -> type[T]:
    """Let a method refuse values that its fields do not take: ``RNP(keep_within=2)``, ``CLP(u=-3)``.

    It stands between ``@dataclass(frozen=True, kw_only=True)`` and the class. What may stand in a field is what the
    scenario's schema says of it; what fields may not be together, the method's ``problems()``.

    Raises (when an instance is made):
        UserError: With every field that is wrong.
    """
    cls.__post_init__ = _check  # type: ignore[attr-defined]
    return cls


def _check(method: object) -> None:
    from fedbd.config.schema import field_problems, own_problems  # noqa: PLC0415 - pydantic takes its time, and a table of names needs none

    problems = field_problems(method) or [Problem(path=name, expected=text) for name, text in own_problems(method)]
    if problems:
        raise UserError(problems, f"{type(method).__name__} cannot be made of these fields:")
