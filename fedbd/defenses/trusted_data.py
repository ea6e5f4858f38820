"""What every method asks of the trusted set before it uses it."""

from __future__ import annotations

from torch import nn

from fedbd.errors import MethodRefused
from fedbd.types import Need, Samples, TrustedData


def needs_trusted(method: object) -> bool:
    """Return whether a cleanup, a detector or an aggregation rule says that it cannot act without trusted data."""
    return bool(getattr(method, "needs_trusted", False)) or Need.TRUSTED in getattr(method, "needs", ())


def needs_classes(method: object) -> bool:
    """Return whether the trusted data of a method must be of several classes.

    It says so itself (``needs_classes``); one that does not is taken to train on them, and what trains on images of one
    class learns to name it.
    """
    return needs_trusted(method) and bool(getattr(method, "needs_classes", True))


def fewest_trusted(method: object) -> int:
    """Return how many trusted images to fit a method takes at least (``fewest_trusted``; 1 where it does not say)."""
    return int(getattr(method, "fewest_trusted", 1)) if needs_trusted(method) else 0


def why_not(method: object, model: nn.Module, trusted: TrustedData | None) -> str | None:
    """Return why a method cannot act on a model with these trusted data, None if it can or does not say.

    A method says so itself: ``refusal(model)``, and ``refusal_on(model, trusted)`` for what the model alone cannot
    tell, as the images' size.
    """
    alone, both = getattr(method, "refusal", None), getattr(method, "refusal_on", None)
    reason: str | None = None if alone is None else alone(model)
    return reason or (None if both is None or trusted is None else both(model, trusted))


def several_classes(samples: Samples) -> bool:
    """Return whether samples are of more than one class."""
    return len(set(samples.labels.tolist())) > 1


def required(trusted: TrustedData | None, method: str, why: str, *, several: bool = True) -> TrustedData:
    """Return the trusted data.

    Args:
        trusted: What a method got.
        method: Who asks, for the message.
        why: What the method does with them: ``unlearns``.
        several: Whether the part to fit on must have images of more than one class.

    Raises:
        MethodRefused: If there are none, none in one of the two parts, or one class where several are needed.
    """
    held = there(trusted, method, why)
    if several and not several_classes(held.fit):
        raise MethodRefused(f"{method} {why} trusted data and all of them are of one class; {SEVERAL}")
    return held


SOME = "hand it TrustedData with images in both parts (in a scenario: trusted: {size: 500})"
SEVERAL = "hand it images of several classes (in a scenario: leave trusted.labels out, or name more classes there)"
"""What to do, for a reader of Python and for one of a scenario."""


def there(trusted: TrustedData | None, method: str, why: str) -> TrustedData:
    """Return the trusted data, with images in both parts; of what classes, the method asks itself.

    Raises:
        MethodRefused: If there are none, or none in one of the two parts.
    """
    if trusted is None or len(trusted.fit) + len(trusted.validate) == 0:
        raise MethodRefused(f"{method} {why} trusted data and there are none; {SOME}")
    for part, samples in (("fit", trusted.fit), ("validate", trusted.validate)):
        if len(samples) == 0:
            raise MethodRefused(f"{method} {why} trusted data and their part to {part} on is empty; {SOME}")
    return trusted
