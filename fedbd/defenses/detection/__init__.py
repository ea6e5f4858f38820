"""Scores of samples: higher is more suspicious.

``from fedbd.defenses.detection import STRIP`` finds every registered one by its class, and imports its module alone.
"""

from typing import Any

from fedbd.registry import class_named, class_names


def __getattr__(name: str) -> Any:
    """Return a registered method's class."""
    return class_named("detection", name, __name__)


def __dir__() -> list[str]:
    """Return the names of the registered methods' classes."""
    return class_names("detection")
