"""The server's trusted set: clean samples taken out of the training set before the clients get theirs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
from annotated_types import Ge, Gt, Lt, MinLen
from numpy.typing import NDArray

from fedbd.data.stratify import stratified
from fedbd.data.trusted_groups import NOBODY, draw_groups
from fedbd.errors import Problem, UserError

Index = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Trusted:
    """How much clean data the server holds.

    Attributes:
        size: Samples in all.
        validate_share: Share of them that thresholds and roll-backs are decided on; cleanups train on the others.
        balance: ``as_is``: drawn uniformly, so that classes come as they do in the training set; ``balanced``: equally
            many of each class (where ``size`` is no multiple, random classes give one more); ``skewed``: the classes'
            shares are drawn from a symmetric Dirichlet distribution with ``alpha``.
        alpha: ``skewed``: smaller is more skewed; 0.5 and 0.1 are usual.
        labels: Only samples of these classes; null: of all. A trusted set need not know every class.
        groups: ``whole``: no group of the data (a client's samples, a track's near copies) lies in two of: the clients,
            the part to fit on, the part to validate on; what is left over of a group is given to nobody. ``split``:
            single samples are drawn, whosever they are. null: ``whole`` where the partition keeps groups whole.
    """

    size: Annotated[int, Ge(2)] = 500
    validate_share: Annotated[float, Gt(0), Lt(1)] = 0.5
    balance: Literal["as_is", "balanced", "skewed"] = "as_is"
    alpha: Annotated[float, Gt(0)] = 0.5
    labels: Annotated[tuple[Annotated[int, Ge(0)], ...], MinLen(1)] | None = None
    groups: Literal["whole", "split"] | None = None

    @property
    def validate_size(self) -> int:
        """Samples to validate on: ``size * validate_share``, rounded half up."""
        return int(self.size * self.validate_share + 0.5)

    def problems(self) -> list[tuple[str, str]]:
        """Return what is wrong between the fields."""
        found = []
        if not 0 < self.validate_size < self.size:
            part = "validate" if self.validate_size == 0 else "fit"
            found.append(("validate_share", f"leaves no sample to {part} on: {self.validate_share} of {self.size}"))
        if self.balance != "skewed" and self.alpha != Trusted.alpha:
            found.append(("alpha", f"must be left out unless balance is skewed, got {self.alpha}"))
        return found


def hold_out(
    labels: Index, trusted: Trusted | None, rng: np.random.Generator, groups: Index | None = None
) -> tuple[Index, Index, Index]:
    """Take the trusted set out of the training set.

    Args:
        labels: (N,) int64, the training labels.
        trusted: What to take; None for nothing.
        rng: Draws the samples, then the split, which gives each class its share of both parts.
        groups: (N,) int64: take whole groups (see ``trusted_groups``); None: single samples.

    Returns:
        The indices to fit on, to validate on, and those left for the clients; disjoint, ascending int64. Together they
        are all samples, but for what whole groups leave over.

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
    taken = _taken(labels, trusted, rng)
    if groups is not None:
        kinds = np.zeros_like(labels) if trusted.balance == "as_is" else labels
        counts = np.bincount(kinds[taken], minlength=int(kinds.max()) + 1)
        if trusted.labels is not None:
            kinds = np.where(np.isin(labels, trusted.labels), kinds, NOBODY)
        return draw_groups(kinds, groups, counts, trusted.validate_size, rng)
    validate, fit = stratified(labels[taken], trusted.validate_size, rng)
    rest = np.setdiff1d(np.arange(len(labels), dtype=np.int64), taken, assume_unique=True)
    return taken[fit], taken[validate], rest


def _taken(labels: Index, trusted: Trusted, rng: np.random.Generator) -> Index:
    """Return the ascending draw of the trusted set."""
    pool = np.arange(len(labels), dtype=np.int64)
    if trusted.labels is not None:
        absent = sorted(set(trusted.labels) - set(labels.tolist()))
        pool = np.flatnonzero(np.isin(labels, trusted.labels))
        problems = [Problem(path="trusted.labels", expected="must be classes of the data", got=str(c)) for c in absent]
        if len(pool) < trusted.size and not absent:
            expected = f"must be at most {len(pool)}, the samples of these classes"
            problems.append(Problem(path="trusted.size", expected=expected, got=str(trusted.size)))
        if problems:
            raise UserError(problems)
    if trusted.balance == "balanced":
        return pool[_balanced(labels[pool], trusted.size, rng)]
    if trusted.balance == "skewed":
        return pool[_skewed(labels[pool], trusted.size, trusted.alpha, rng)]
    return np.sort(pool[rng.permutation(len(pool))[: trusted.size]])


def _skewed(labels: Index, size: int, alpha: float, rng: np.random.Generator) -> Index:
    """Return an ascending draw with class shares from a Dirichlet distribution; full classes pass on what they lack."""
    classes, counts = np.unique(labels, return_counts=True)
    shares = rng.dirichlet(np.full(len(classes), alpha))
    order = {int(label): rng.permutation(np.flatnonzero(labels == label)) for label in classes}
    takes = np.minimum(np.floor(shares * size).astype(np.int64), counts)
    for place in np.argsort(-shares, kind="stable"):  # the rest goes to the largest classes that have room
        takes[place] += min(size - int(takes.sum()), int(counts[place] - takes[place]))
    picks = [order[int(label)][:take] for label, take in zip(classes, takes, strict=True)]
    return np.sort(np.concatenate(picks))


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
