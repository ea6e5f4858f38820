"""Triggers, attacks and evasions, one per file.

``from fedbd.attacks import CW`` finds every registered one by its class, and imports its module alone.
"""

from typing import Any

from fedbd.registry import class_named, class_names

KINDS = ("trigger", "attack", "evasion")


def __getattr__(name: str) -> Any:
    """Return a registered method's class."""
    for kind in KINDS:
        if name in class_names(kind):
            return class_named(kind, name, __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}", name=name)


def __dir__() -> list[str]:
    """Return the names of the registered methods' classes."""
    return sorted(name for kind in KINDS for name in class_names(kind))
