"""What a class's docstring says of its fields: the one source of docs/scenario.md and of the scenario schema."""

from __future__ import annotations

import inspect
import re


def sentences(cls: type) -> dict[str, str]:
    """Return a class's sentence for each field, from the ``Attributes:`` of its docstring, each on one line.

    Args:
        cls: A dataclass, documented in Google's style.

    Returns:
        Field -> its text as it stands there, code in double backticks; {} where the docstring names no field.
    """
    block = re.search(r"^Attributes:\n((?:    .*\n?|\n)*)", inspect.getdoc(cls) or "", re.MULTILINE)
    found: dict[str, str] = {}
    name = ""
    for line in (block.group(1) if block else "").splitlines():
        start = re.match(r"    (\w+): (.*)", line)
        if start:
            name = start.group(1)
            found[name] = start.group(2)
        elif line.strip():
            found[name] += " " + line.strip()
    return found


def summary(cls: type) -> str:
    """Return the first paragraph of a class's docstring on one line."""
    return (inspect.getdoc(cls) or "").partition("\n\n")[0].replace("\n", " ")


def unmarked(text: str) -> str:
    """Return a docstring's text for readers of plain text: single backticks, and YAML's name for None."""
    return re.sub(r"\bNone\b", "null", text.replace("``", "`"))
