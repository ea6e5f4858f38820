"""The server's trusted set: clean samples taken out of the training set before the clients get theirs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
from annotated_types import Ge, Gt, Lt
from numpy.typing import NDArray

from fedbd.data.stratify import stratified
from fedbd.errors import Problem, UserError

Index = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Trusted:
    """How much clean data the server holds.

    Attributes:
        size: Samples in all.
        validate_share: Share of them that thresholds and roll-backs are decided on; cleanups train on the others.
        balance: ``as_is``: drawn uniformly, so that classes come as they do in the training set; ``balanced``: equally
            many of each class (where ``size`` is no multiple, random classes give one more).
    """

    size: Annotated[int, Ge(2)] = 500
    validate_share: Annotated[float, Gt(0), Lt(1)] = 0.5
    balance: Literal["as_is", "balanced"] = "as_is"

    @property
    def validate_size(self) -> int:
        """Samples to validate on: ``size * validate_share``, rounded half up."""
        return int(self.size * self.validate_share + 0.5)

    def problems(self) -> list[tuple[str, str]]:
        """Return what is wrong between the fields."""
        if 0 < self.validate_size < self.size:
            return []
        part = "validate" if self.validate_size == 0 else "fit"
        return [("validate_share", f"leaves no sample to {part} on: {self.validate_share} of {self.size}")]


def hold_out(labels: Index, trusted: Trusted | None, rng: np.random.Generator) -> tuple[Index, Index, Index]:
    """Take the trusted set out of the training set.

    Args:
        labels: (N,) int64, the training labels.
        trusted: What to take; None for nothing.
        rng: Draws the samples, then the split, which gives each class its share of both parts.

    Returns:
        The indices to fit on, to validate on, and those left for the clients; disjoint, ascending int64.

    Raises:
        UserError: If nothing would be left for the clients, or a class has too few samples for a balanced set.
    """
    if trusted is None:
        return np.empty(0, np.int64), np.empty(0, np.int64), np.arange(len(labels), dtype=np.int64)
    problems = [Problem(path=f"trusted.{field}", expected=text) for field, text in trusted.problems()]
    if trusted.size >= len(labels):
        expected = f"must leave samples for the clients: less than {len(labels)}"
        problems.append(Problem(path="trusted.size", expected=expected, got=str(trusted.size)))
    if problems:
        raise UserError(problems)
    if trusted.balance == "balanced":
        taken = _balanced(labels, trusted.size, rng)
    else:
        taken = np.sort(rng.permutation(len(labels))[: trusted.size])
    validate, fit = stratified(labels[taken], trusted.validate_size, rng)
    rest = np.setdiff1d(np.arange(len(labels), dtype=np.int64), taken, assume_unique=True)
    return taken[fit], taken[validate], rest


def _balanced(labels: Index, size: int, rng: np.random.Generator) -> Index:
    """Return an ascending draw with equally many samples of each class."""
    classes, counts = np.unique(labels, return_counts=True)
    takes = np.full(len(classes), size // len(classes))
    takes[rng.permutation(len(classes))[: size % len(classes)]] += 1
    problems = []
    if size < len(classes):
        expected = f"must be at least the number of classes, {len(classes)}, for a balanced set"
        problems.append(Problem(path="trusted.size", expected=expected, got=str(size)))
    least = int(counts.argmin())
    if counts[least] < -(-size // len(classes)):
        expected = f"cannot be balanced: it takes {-(-size // len(classes))} samples of each class"
        got = f"{counts[least]} of class {classes[least]}"
        remedy = f"set trusted.size to {counts[least] * len(classes)} or less, or trusted.balance to as_is"
        problems.append(Problem(path="trusted.balance", expected=expected, got=got, remedy=remedy))
    if problems:
        raise UserError(problems)
    picks = [
        rng.permutation(np.flatnonzero(labels == label))[:take] for label, take in zip(classes, takes, strict=True)
    ]
    return np.sort(np.concatenate(picks))
