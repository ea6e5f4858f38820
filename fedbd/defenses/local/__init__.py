"""Defenses that replace a client's plain local training, or the training on a single data set.

``from fedbd.defenses.local import ABL, ABLCentral`` finds every registered one by its class, and imports its module
alone.
"""

from typing import Any

from fedbd.registry import class_named, class_names

KINDS = ("local_defense", "central_defense")


def __getattr__(name: str) -> Any:
    """Return a registered method's class."""
    kind = next((kind for kind in KINDS if name in class_names(kind)), KINDS[0])
    return class_named(kind, name, __name__)


def __dir__() -> list[str]:
    """Return the names of the registered methods' classes."""
    return [name for kind in KINDS for name in class_names(kind)]
