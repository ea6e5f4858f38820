"""What the stages of a round hand to each other: the data that flows and the Protocols that methods obey.

A method is a frozen, keyword-only dataclass: its fields are its hyper-parameters and so its YAML schema. It keeps no
state; memory across rounds goes in and comes out. Randomness is an argument. Every stage returns its notes (plain JSON
values), which end in the round's record.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fedbd.errors import Problem, UserError
from fedbd.targets import Target

if TYPE_CHECKING:
    from pathlib import Path

    from fedbd.defenses.local.central_state import CentralState
    from fedbd.training import TrainingPlan

Notes = dict[str, Any]
"""JSON values only: str, int, float, bool, None, lists and dicts of them."""

Memory = Mapping[str, NDArray[Any]]
"""What a method remembers between rounds: named arrays, so that a checkpoint needs no pickle. Empty at first."""

Vector = NDArray[np.float32]
"""Flat float weights or an update, shape (D,), in the order of ``params.Layout``."""


@dataclass(frozen=True)
class Samples:
    """Labeled images as they lie in memory.

    Attributes:
        images: (N, C, H, W) uint8, contiguous in that order.
        labels: (N,) int64, the labels as given (a poisoned set's labels are the poisoned ones).

    Raises (when they are made):
        UserError: For other types or shapes: floats would be divided by 255 once more, and train on black images.
    """

    images: Tensor
    labels: Tensor

    def __post_init__(self) -> None:
        """Check types and shapes; the values are looked at where the number of classes is known."""
        problems = _form_problems(self.images, self.labels)
        if problems:
            raise UserError(problems, "these are no samples:")

    def __len__(self) -> int:
        """Return N."""
        return int(self.labels.shape[0])

    def batch(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Return ``(x, y)``: the indexed images as float32 in [0, 1], (B, C, H, W), and their labels, (B,) int64."""
        return self.images[index].to(torch.float32).div_(255.0), self.labels[index]

    def subset(self, index: Tensor | NDArray[np.int64]) -> Samples:
        """Return the indexed samples, in the order of ``index``."""
        rows = torch.as_tensor(index, dtype=torch.int64)
        return Samples(self.images[rows], self.labels[rows])

    def to(self, device: str) -> Samples:
        """Return the samples on a device (``cpu``, ``cuda``); themselves where they are there."""
        return Samples(self.images.to(device), self.labels.to(device))


def _form_problems(images: object, labels: object) -> list[Problem]:
    """Return what keeps two objects from being samples."""
    wrong = []
    if not isinstance(images, Tensor) or images.dtype != torch.uint8 or images.dim() != 4:
        remedy = "fedbd.types.quantized(images) makes them of floats in [0, 1], permute(0, 3, 1, 2) of (N, H, W, C)"
        expected = "must be a tensor (N, C, H, W) of uint8"
        wrong.append(Problem(path="images", expected=expected, got=_form(images), remedy=remedy))
    if not isinstance(labels, Tensor) or labels.dtype != torch.int64 or labels.dim() != 1:
        remedy = "labels.long(); of one-hot rows labels.argmax(1)"
        expected = "must be a tensor (N,) of int64"
        wrong.append(Problem(path="labels", expected=expected, got=_form(labels), remedy=remedy))
    elif not wrong and len(labels) != len(images):  # type: ignore[arg-type]
        wrong.append(Problem(path="labels", expected=f"must be as many as images, {len(images)}", got=f"{len(labels)}"))  # type: ignore[arg-type]
    return wrong


def _form(value: object) -> str:
    """Return type and shape of what somebody took for a tensor."""
    return f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else f"{type(value).__name__}"


def quantized(images: Tensor) -> Tensor:
    """Return float images in [0, 1] as they lie in memory: rounded to 256 levels, uint8, in the same shape."""
    return images.mul(255.0).round_().clamp_(0.0, 255.0).to(torch.uint8)


@dataclass(frozen=True)
class Dataset:
    """A data set, decoded: its parts and how many classes it has.

    Attributes:
        train: What clients and the trusted set are drawn from.
        test: What the evaluation uses and no defense sees.
        classes: Number of classes; labels are 0 .. classes - 1.
        groups: (N,) int64, whose each training sample is: a client's id, a track of near copies. None where nobody
            says. What splits the data reads it; it stays here and is part of no ``Samples``, so that no method sees it.
    """

    train: Samples
    test: Samples
    classes: int
    groups: NDArray[np.int64] | None = None

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of an image."""
        c, h, w = self.train.images.shape[1:]
        return int(c), int(h), int(w)


@dataclass(frozen=True)
class TrustedData:
    """Clean data that the server holds, disjoint from clients and test.

    Attributes:
        fit: What a cleanup may train on.
        validate: What thresholds and roll-backs are decided on.
        classes: Number of classes of the task.

    Raises (when they are made):
        UserError: For parts that are no ``Samples``, hold labels that are no class of the task, or images of two sizes.
    """

    fit: Samples
    validate: Samples
    classes: int

    def __post_init__(self) -> None:
        """Check both parts."""
        wrong = []
        for name, part in (("fit", self.fit), ("validate", self.validate)):
            if not isinstance(part, Samples):
                wrong.append(Problem(path=name, expected="must be Samples(images, labels)", got=type(part).__name__))
            elif len(part) and not 0 <= int(part.labels.min()) <= int(part.labels.max()) < self.classes:
                found = f"{int(part.labels.min())} to {int(part.labels.max())}"
                wrong.append(Problem(path=f"{name}.labels", expected=f"must be 0 to {self.classes - 1}", got=found))
        if not wrong and len(self.fit) and len(self.validate):
            one, other = (tuple(part.images.shape[1:]) for part in (self.fit, self.validate))
            if one != other:
                wrong.append(Problem(path="validate.images", expected=f"must be {one} as in fit", got=str(other)))
        if wrong:
            raise UserError(wrong, "these are no trusted data:")


class Role(StrEnum):
    """What a client is in a round: the ground truth, never part of a message."""

    HONEST = "honest"
    POLLUTED = "polluted"
    ATTACKER = "attacker"


class Need(StrEnum):
    """What an aggregation rule must see, or have, to act."""

    SUM = "sum"
    INDIVIDUAL = "individual"
    IDS = "ids"
    TRUSTED = "trusted"


@dataclass(frozen=True, kw_only=True)
class Cohort:
    """What the server sees of a round's updates.

    Attributes:
        updates: (n, D) float32, single updates or bucket means, in the buckets' order (``ids`` says whose each row is);
            None under one full sum.
        mean: (D,) float32, the weighted mean of all; always there.
        weights: (n,) float64, the weight of each row (of a bucket: the sum of its clients' weights).
        clients: Number of clients behind it.
        ids: Stable client ids of the rows, or None where rows have none (buckets, pseudonyms).
        global_weights: (D,) float32, what the round started from.
        trusted: The server's trusted data, or None.
        build: Weights -> a model with them, in eval mode (a new one each time); None where there is no model at hand.
    """

    updates: NDArray[np.float32] | None
    mean: Vector
    weights: NDArray[np.float64]
    clients: int
    ids: tuple[int, ...] | None
    global_weights: Vector
    trusted: TrustedData | None = None
    build: Callable[[Vector], nn.Module] | None = None


@dataclass(frozen=True, kw_only=True)
class Aggregate:
    """What an aggregation rule decides.

    Attributes:
        delta: (D,) float32, the update to apply (before the server rate).
        accepted: Rows of ``Cohort.updates`` that count, as booleans; None for a rule that rejects nobody.
    """

    delta: Vector
    accepted: tuple[bool, ...] | None = None


@dataclass(frozen=True, kw_only=True)
class AttackContext:
    """What an attacker knows in a round.

    Attributes:
        trigger: The trigger to plant.
        target: The target label, or ``all_to_all`` (see ``targets.wanted_labels``).
        classes: Number of classes.
        global_weights: (D,) float32, what the round started from.
        previous_step: (D,) float32, the last change of the global model, or None in round 1.
        cohort_size: Clients in this round.
        server_rate: The server's rate on the aggregate.
        shared: What colluders shared in this round.
    """

    trigger: Trigger
    target: Target
    classes: int
    global_weights: Vector
    previous_step: Vector | None = None
    cohort_size: int = 1
    server_rate: float = 1.0
    shared: Memory = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Clues:
    """What one cleanup found and the next may use, so that methods chain.

    Attributes:
        target: The suspected target label; the real one for a method with ``oracle: true``, None if there is no single
            one (all-to-all).
        trigger: A recovered trigger; the real one for a method with ``oracle: true``.
        triggered: (N, C, H, W) uint8, triggered inputs; only for a method with ``oracle: true``.
        unlearned: The unlearned model of RNP, in eval mode.
        recovered: The unlearned model of RNP with its recovered masks, in eval mode.
        reference: The model that the run (or the training) started from, in eval mode.
        pruned: What a cleanup switched off: per module that holds a scale or filters, by its name in the model, (C,)
            bool. A run with ``mask: persist`` keeps it off in later rounds.
    """

    target: int | None = None
    trigger: Trigger | None = None
    triggered: Tensor | None = None
    unlearned: nn.Module | None = None
    recovered: nn.Module | None = None
    reference: nn.Module | None = None
    pruned: Mapping[str, NDArray[np.bool_]] = field(default_factory=dict)


@runtime_checkable
class DataSource(Protocol):
    """Reads a data set."""

    def load(self, root: Path | None) -> Dataset:
        """Return the decoded data set.

        Args:
            root: The folder of data files, or None where the scenario names none.

        Raises:
            DataError: If a file is missing, damaged or of another form.
        """
        ...


@runtime_checkable
class Partitioner(Protocol):
    """Splits the training samples among clients.

    One with a class variable ``takes_groups = True`` also takes ``groups: NDArray[np.int64] | None`` by keyword (see
    ``Dataset.groups``). One with ``keeps_groups`` (a class variable or property) true gives each group to one client.
    """

    def split(self, labels: NDArray[np.int64], clients: int, rng: np.random.Generator) -> list[NDArray[np.int64]]:
        """Return one ascending index array per client, pairwise disjoint, none empty."""
        ...


@runtime_checkable
class ModelFamily(Protocol):
    """Builds a classifier that takes (N, C, H, W) float32 in [0, 1] and returns (N, classes) logits."""

    def build(self, shape: tuple[int, int, int], classes: int, rng: torch.Generator) -> nn.Module:
        """Return a freshly initialized model in train mode; the same generator state gives the same weights.

        Raises:
            UserError: If the family does not take images of that shape.
        """
        ...


@runtime_checkable
class Trigger(Protocol):
    """Stamps a trigger."""

    def stamp(self, images: Tensor) -> Tensor:
        """Return stamped copies of (N, C, H, W) float images in [0, 1]; the input is left untouched."""
        ...


@runtime_checkable
class Attack(Protocol):
    """What an attacker, or whoever polluted a client's data, does.

    One that can have ``all_to_all`` for its target has an attribute ``all_to_all`` that is true; another gets a label.
    """

    def pollute(self, data: Samples, ctx: AttackContext, rng: torch.Generator) -> tuple[Samples, NDArray[np.int64]]:
        """Poison a data set once and for all; return it and the poisoned indices, ascending."""
        ...

    def fit(
        self, model: nn.Module, data: Samples, plan: TrainingPlan, ctx: AttackContext, rng: torch.Generator
    ) -> Notes:
        """Train ``model`` in place on poisoned batches."""
        ...

    def tamper(self, delta: Vector, ctx: AttackContext, rng: torch.Generator) -> Vector:
        """Return the update to send in place of ``delta``."""
        ...


@runtime_checkable
class LocalDefense(Protocol):
    """Replaces plain local training of honest and polluted clients."""

    def fit(
        self, model: nn.Module, data: Samples, plan: TrainingPlan, memory: Memory, rng: torch.Generator
    ) -> tuple[Memory, Notes]:
        """Train ``model`` in place; return the memory for the client's next participation, and notes."""
        ...


@runtime_checkable
class CentralDefense(Protocol):
    """Trains a model on a single, possibly poisoned data set, epoch by epoch, in a schedule of its own."""

    @property
    def schedule(self) -> Sequence[Any]:
        """All epochs in their order; each says its ``stage``."""
        ...

    @property
    def needs_isolated(self) -> bool:
        """Whether ``start`` must be told what to unlearn."""
        ...

    def start(self, data: Samples, rng: torch.Generator, isolated: NDArray[np.int64] | None = None) -> CentralState:
        """Return the state before the first epoch."""
        ...

    def epochs(
        self, model: nn.Module, data: Samples, rng: torch.Generator, state: CentralState
    ) -> Iterator[CentralState]:
        """Train one epoch after the other in place, from ``state`` on, and yield the state after each."""
        ...

    def notes(self, state: CentralState) -> Notes:
        """Return what was found by ``state``."""
        ...


@runtime_checkable
class Aggregator(Protocol):
    """A rule that turns a cohort into one update."""

    @property
    def needs(self) -> frozenset[Need]:
        """What the rule must see; checked when the scenario loads."""
        ...

    @property
    def minimum_rows(self) -> int:
        """The fewest rows (updates or bucket means) that the rule is defined for."""
        ...

    def aggregate(self, cohort: Cohort, memory: Memory, rng: torch.Generator) -> tuple[Aggregate, Memory, Notes]:
        """Return the aggregate, the memory for the next round, and notes."""
        ...


@runtime_checkable
class Cleanup(Protocol):
    """Repairs a model after aggregation.

    One with ``oracle`` that cannot act without the real target label has an attribute ``needs_label`` that is true: it
    is refused where the attack is all-to-all.
    """

    def clean(
        self, model: nn.Module, trusted: TrustedData | None, clues: Clues, rng: torch.Generator
    ) -> tuple[nn.Module, Clues, Notes]:
        """Return a repaired copy, the clues for the next method, and notes; ``model`` is left untouched."""
        ...


@runtime_checkable
class Detector(Protocol):
    """Scores samples: higher is more suspicious. Thresholds live outside."""

    def score(
        self, model: nn.Module, data: Samples, trusted: TrustedData | None, rng: torch.Generator
    ) -> tuple[NDArray[np.float64], Notes]:
        """Return one score per sample, (N,) float64, and notes; ``model`` is left untouched."""
        ...


@runtime_checkable
class Evasion(Protocol):
    """Makes adversarial examples: inputs that a clean model gets wrong without any trigger."""

    def perturb(self, model: nn.Module, images: Tensor, labels: Tensor, rng: torch.Generator) -> tuple[Tensor, Notes]:
        """Return perturbed copies of (N, C, H, W) float32 images in [0, 1], and notes; inputs are left untouched.

        Args:
            model: Left untouched, in eval mode.
            images: What to perturb.
            labels: (N,) int64, the true labels that the model shall no longer give.
            rng: The only source of randomness.
        """
        ...
