"""YAML text to plain values: strict where YAML is treacherous.

Two keys of one name are refused (YAML keeps the last one silently); only ``true`` and ``false`` are booleans (``off``
and ``no`` are words); ``1e-4`` is a number, as every user means it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from fedbd.errors import Problem, ScenarioError

_FLOAT = re.compile(r"[-+]?(?:\d+\.\d*|\.\d+|\d+(?=[eE]))(?:[eE][-+]?\d+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)")
_STEP = re.compile(r"\.?([^.\[\]]+)|\[(\d+)\]")


class _Loader(yaml.SafeLoader):
    """SafeLoader with YAML 1.2 scalars and without silent duplicates."""


_Loader.yaml_implicit_resolvers = {
    first: [
        (tag, pattern)
        for tag, pattern in rules
        if tag not in ("tag:yaml.org,2002:bool", "tag:yaml.org,2002:float", "tag:yaml.org,2002:timestamp")
    ]
    for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"true|True|TRUE|false|False|FALSE"), list("tTfF"))
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(f"(?:{_FLOAT.pattern})$"), list("-+0123456789."))


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: set[Any] = set()
    for key, _ in node.value:
        if key.value in seen:
            raise yaml.MarkedYAMLError(problem=f"the key '{key.value}' stands here twice", problem_mark=key.start_mark)
        seen.add(key.value)
    return {loader.construct_object(k, deep=True): loader.construct_object(v, deep=True) for k, v in node.value}


_Loader.add_constructor("tag:yaml.org,2002:map", _mapping)


def parse_yaml(text: str, source: str) -> Any:
    """Return the plain values of a YAML text.

    Args:
        text: The text.
        source: What it is called in a message.

    Raises:
        ScenarioError: If it is no YAML; the message gives line and column.
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{source}:{mark.line + 1}:{mark.column + 1}" if mark else source
        what = getattr(error, "problem", None) or (
            str(error) if not isinstance(error, RecursionError) else "nested too deeply"
        )
        raise ScenarioError([Problem(path=where, expected=f"must be YAML: {what}")]) from None


def read_yaml(path: Path) -> Any:
    """Return the plain values of a YAML file.

    Raises:
        ScenarioError: If the file cannot be read or is no YAML.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise ScenarioError([Problem(path=str(path), expected=f"must be a readable YAML file: {reason}")]) from None
    if not text.strip():
        raise ScenarioError([Problem(path=str(path), expected="must hold a scenario", got="an empty file")])
    return parse_yaml(text, str(path))


def _steps(path: str) -> list[str | int]:
    return [int(index) if index else name for name, index in _STEP.findall(path)]


def override(raw: Any, overrides: Sequence[str]) -> Any:
    """Return a copy of plain values with ``path=VALUE`` settings applied.

    Args:
        raw: Plain YAML values.
        overrides: ``training.lr=0.05``, ``attacks[0].enabled=false``, ``secure_sum={name: ckks}``; values are YAML.
            Missing mappings on the way are made.

    Raises:
        ScenarioError: If a setting has no ``=``, leads through a scalar or past a list's end.
    """
    problems: list[Problem] = []
    for setting in overrides:
        path, equals, text = setting.partition("=")
        if not equals or not _steps(path):
            problems.append(Problem(path=f"--set {setting}", expected="must be path=VALUE"))
            continue
        try:
            raw = _put(raw, _steps(path), parse_yaml(text, f"--set {path}"))
        except ScenarioError as error:
            problems.extend(error.problems)
        except (TypeError, IndexError) as error:
            problems.append(Problem(path=f"--set {path}", expected=str(error)))
    if problems:
        raise ScenarioError(problems)
    return raw


def _put(node: Any, steps: list[str | int], value: Any) -> Any:
    if not steps:
        return value
    head, rest = steps[0], steps[1:]
    if isinstance(head, int):
        if not isinstance(node, list):
            raise TypeError(f"[{head}] must follow a list, not {type(node).__name__}")
        if head >= len(node):
            raise IndexError(f"[{head}] is past the end of a list of {len(node)}")
        return [_put(child, rest, value) if i == head else child for i, child in enumerate(node)]
    if node is not None and not isinstance(node, dict):
        raise TypeError(f"'{head}' must lie in a mapping, not in {type(node).__name__}")
    children = dict(node or {})
    children[head] = _put(children.get(head), rest, value)
    return children
