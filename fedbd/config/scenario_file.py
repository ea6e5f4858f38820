"""YAML text to plain values: strict where YAML is treacherous.

Two keys of one name are refused (YAML keeps the last one silently); only ``true`` and ``false`` are booleans (``off``
and ``no`` are words); ``1e-4`` is a number, as every user means it, and ``010`` and ``1:30`` are none. Anchors, aliases
and ``<<`` serve to write a value once, not to unfold a small file into a huge one.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from fedbd.config.field_values import shown
from fedbd.errors import Problem, ScenarioError

UNFOLDED = 100_000
"""Most values that aliases may add to those written down."""

_SCALARS = {
    "bool": (r"true|True|TRUE|false|False|FALSE", "tTfF"),
    "int": (r"[-+]?(?:0|[1-9]\d*)|0x[0-9a-fA-F]+", "-+0123456789"),
    "float": (
        r"[-+]?(?:\d+\.\d*|\.\d+|\d+(?=[eE]))(?:[eE][-+]?\d+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        "-+0123456789.",
    ),
}
_PATH = re.compile(r"[^.\[\]\s]+(?:\.[^.\[\]\s]+|\[\d+\])*")
_STEP = re.compile(r"\.?([^.\[\]]+)|\[(\d+)\]")
_TAG = "tag:yaml.org,2002:"
_HINTS = (
    ("found character '\\t'", "indent with spaces, not with tabs"),
    ("that cannot start any token", "put the text in quotes"),
    ("mapping values are not allowed", "put a text that holds ': ' in quotes"),
    ("another document", "keep one scenario to a file, without a second ---"),
    ("constructor for the tag", "leave the tag out: a scenario holds plain values"),
)


class _Loader(yaml.SafeLoader):
    """SafeLoader with YAML 1.2 scalars, plain values only, and without silent duplicates."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in rules if tag in (f"{_TAG}null", f"{_TAG}merge")]
    for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _name, (_pattern, _first) in _SCALARS.items():
    _Loader.add_implicit_resolver(f"{_TAG}{_name}", re.compile(f"(?:{_pattern})$"), list(_first))


def _mapping(loader: _Loader, node: yaml.Node) -> dict[str, Any]:
    """Return a mapping with text keys; its own keys go before those that ``<<`` brings in."""
    if not isinstance(node, yaml.MappingNode):
        raise yaml.MarkedYAMLError(problem="expected a mapping", problem_mark=node.start_mark)
    first: dict[str, yaml.Mark] = {}
    for key, _ in node.value:
        where = _place(loader.name, key.start_mark)
        if not isinstance(key, yaml.ScalarNode):
            raise ScenarioError(
                [Problem(path=where, expected="must be a word before the colon, not a list or mapping")]
            )
        if key.value in first:
            seen = first[key.value]
            earlier = f"line {seen.line + 1}, column {seen.column + 1}"
            expected = f"must give each key once, and '{key.value}' stands already at {earlier}"
            raise ScenarioError([Problem(path=where, expected=expected, remedy="remove one of them")])
        first[key.value] = key.start_mark
    loader.flatten_mapping(node)
    return {str(key.value): loader.construct_object(value, deep=True) for key, value in node.value}


_Loader.yaml_constructors = {
    tag: constructor
    for tag, constructor in yaml.SafeLoader.yaml_constructors.items()
    if tag is None or tag.removeprefix(_TAG) in ("null", "bool", "int", "float", "str", "seq")
}
_Loader.add_constructor(f"{_TAG}map", _mapping)


def parse_yaml(text: str, source: str) -> Any:
    """Return the plain values of a YAML text.

    Args:
        text: The text.
        source: What it is called in a message.

    Raises:
        ScenarioError: If it is no YAML; the message gives line and column.
    """
    try:
        loader = _Loader(text)
        loader.name = source
        node = loader.get_single_node()
        if node is None:
            return None
        written: dict[int, int] = {}
        if _values(node, written) - len(written) > UNFOLDED:
            expected = f"must not unfold by its aliases (*name) to more than {UNFOLDED:,} values"
            raise ScenarioError([Problem(path=source, expected=expected, remedy="write the values out")])
        return loader.construct_document(node)
    except (yaml.YAMLError, ValueError, KeyError) as error:
        raise ScenarioError([_worded(error, text, source)]) from None
    except RecursionError:
        expected = "must not be nested that deeply; no scenario is"
        raise ScenarioError([Problem(path=source, expected=expected)]) from None


def _values(node: yaml.Node, written: dict[int, int]) -> int:
    """Return the number of values that a node stands for; ``written`` keeps those of each node below it."""
    if id(node) in written:
        if written[id(node)] == 0:
            raise yaml.MarkedYAMLError(problem="an alias stands inside of what it names", problem_mark=node.start_mark)
        return written[id(node)]
    written[id(node)] = 0
    children: list[yaml.Node] = []
    if isinstance(node, yaml.MappingNode):
        children = [part for pair in node.value for part in pair]
    elif isinstance(node, yaml.SequenceNode):
        children = node.value
    written[id(node)] = 1 + sum(_values(child, written) for child in children)
    return written[id(node)]


def _worded(error: Exception, text: str, source: str) -> Problem:
    """Return what is wrong with a YAML text: where, what, and what to do if it is a common slip."""
    if isinstance(error, yaml.reader.ReaderError):
        before = text[: error.position]
        column = error.position - before.rfind("\n")
        expected = f"must be YAML: the character {chr(error.character)!r} cannot stand in it"
        return Problem(path=f"{source}:{before.count(chr(10)) + 1}:{column}", expected=expected)
    if not isinstance(error, yaml.MarkedYAMLError):  # a constructor's: !!bool maybe, or a number of 5,000 digits
        return Problem(path=source, expected=f"must be YAML whose values fit their types: {error}")
    what, start = str(error.problem or error.context).replace(_TAG, "!!"), error.context_mark
    if what.startswith("but "):
        what = f"{error.context}, {what}"
    elif error.problem and error.context and start is not None:
        what += f", {error.context} that starts at line {start.line + 1}, column {start.column + 1}"
    remedy = next((hint for part, hint in _HINTS if part in what), "")
    return Problem(path=_place(source, error.problem_mark), expected=f"must be YAML: {what}", remedy=remedy)


def _place(source: str, mark: yaml.Mark | None) -> str:
    return f"{source}:{mark.line + 1}:{mark.column + 1}" if mark is not None else source


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
    values = parse_yaml(text, str(path))
    if values is None:
        got = "nothing but comments" if text.strip() else "an empty file"
        raise ScenarioError([Problem(path=str(path), expected="must hold a scenario", got=got)])
    return values


class _Dumper(yaml.SafeDumper):
    """SafeDumper that quotes whatever text a YAML 1.1 or this module's loader would take for something else."""


_Dumper.yaml_implicit_resolvers = {
    first: [
        *yaml.SafeDumper.yaml_implicit_resolvers.get(first, []),
        *_Loader.yaml_implicit_resolvers.get(first, []),
    ]
    for first in {**yaml.SafeDumper.yaml_implicit_resolvers, **_Loader.yaml_implicit_resolvers}
}


def _text(dumper: _Dumper, value: str) -> yaml.Node:
    style = '"' if re.search("[\x85\u2028\u2029]", value) else None  # PyYAML folds these away in any other style
    return dumper.represent_scalar(f"{_TAG}str", value, style)


_Dumper.add_representer(str, _text)


def dump_yaml(values: Any) -> str:
    """Return plain values as YAML text that ``parse_yaml`` (and any YAML 1.1 reader) reads back as they were."""
    text: str = yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)
    return text


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
        if not equals or not _PATH.fullmatch(path):
            expected = "must be PATH=VALUE, as in training.lr=0.05 or attacks[0].enabled=false"
            problems.append(Problem(path=f"--set {setting}", expected=expected))
            continue
        steps = [int(index) if index else name for name, index in _STEP.findall(path)]
        try:
            raw = _put(raw, steps, parse_yaml(text, ""), "")
        except ScenarioError as error:
            expected = error.problems[0].expected.replace("must", "the value must", 1)
            problems.append(Problem(path=f"--set {setting}", expected=expected, remedy=error.problems[0].remedy))
        except ValueError as error:
            problems.append(Problem(path=f"--set {setting}", expected=str(error)))
        except RecursionError:
            problems.append(Problem(path=f"--set {setting[:60]}...", expected="must not lead that deep"))
    if problems:
        raise ScenarioError(problems)
    return raw


def _put(node: Any, steps: list[str | int], value: Any, here: str) -> Any:
    """Return a copy of a node with a value put below it; ``here`` is the node's own path, for the message."""
    if not steps:
        return value
    head, rest = steps[0], steps[1:]
    place = here or "the scenario"
    if isinstance(head, int):
        if not isinstance(node, list):
            raise ValueError(f"{place} must be a list to have an entry [{head}], got {shown(node)}")
        if head >= len(node):
            entries = "1 entry" if len(node) == 1 else f"{len(node)} entries"
            raise ValueError(f"{place} has {entries}, counted from [0]; there is no [{head}]")
        below = f"{here}[{head}]"
        return [_put(child, rest, value, below) if i == head else child for i, child in enumerate(node)]
    if here and isinstance(node, str):
        node = {"name": node}  # as in ``model: mlp`` before ``model.hidden=[8]``
    if node is not None and not isinstance(node, dict):
        hint = f"; name one of its entries, as in {here}[0].{head}" if isinstance(node, list) and here else ""
        raise ValueError(f"{place} must be a mapping to have a field '{head}', got {shown(node)}{hint}")
    children = dict(node or {})
    children[head] = _put(children.get(head), rest, value, f"{here}.{head}" if here else head)
    return children
