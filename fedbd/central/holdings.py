"""What a defender of a single model holds: trusted data out of the training part, and methods that can use them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedbd.central.plan import draw_trusted, hold_out
from fedbd.central.repair import Truth, stamped_inputs
from fedbd.central.subject import Asked, Source, Subject, caught, load_subject
from fedbd.compatibility.cleanup_rules import GIVERS, TARGET_REMEDY, told_target
from fedbd.data.assemble import held_by_server
from fedbd.defenses.trusted_data import fewest_trusted, needs_classes, needs_trusted, several_classes, why_not
from fedbd.errors import Problem, UserError
from fedbd.registry import either
from fedbd.seeding import numpy_rng
from fedbd.targets import ALL_TO_ALL
from fedbd.types import Cleanup, Dataset, Detector, Samples, TrustedData

SIZE, SHARE = 500, 0.5
"""Trusted samples in all, and the share of them to validate on, where nothing else is said."""

SPARE = 2000
"""Most samples that triggered inputs are made of."""


def admit(
    asked: Asked,
    methods: Mapping[str, Cleanup | Detector],
    size: int | None,
    share: float | None,
    seed: int,
    problems: list[Problem],
    *,
    chain: bool = False,
    heading: str = "nothing was repaired:",
) -> tuple[Subject, Holdings]:
    """Load a model, draw its trusted data and ask the methods whether they can act.

    Args:
        asked: The command's words about the model.
        methods: By label.
        size: As in ``holdings``.
        share: As in ``holdings``.
        seed: As in ``holdings``.
        problems: What is wrong so far.
        chain: As in ``method_problems``.
        heading: Of the error.

    Raises:
        UserError: With everything wrong, so far and found here.
    """
    subject, held = load_subject(asked, problems), None
    if share is not None and not 0 < share < 1:
        problems.append(Problem(path="--validate-share", expected="must be above 0 and below 1", got=f"{share:g}"))
        share = None
    if subject is not None:
        held = caught(problems, lambda: holdings(subject.source, subject.dataset, size, share, seed))
    if subject is not None and held is not None:
        problems += method_problems(methods, subject, held.trusted, chain=chain)
    if problems or subject is None or held is None:
        raise UserError(problems, heading)
    return subject, held


def truth_of(subject: Subject, held: Holdings) -> Truth | None:
    """Return what an oracle is told: the real attack, and triggered inputs made of spare training samples."""
    if subject.trigger is None or subject.target is None:
        return None
    inputs = stamped_inputs(held.spare, subject.trigger, subject.target)
    return Truth(trigger=subject.trigger, target=subject.target, triggered=inputs)


@dataclass(frozen=True, kw_only=True)
class Holdings:
    """Clean data for defenses, out of the training part of a data set.

    Attributes:
        trusted: What a defender holds; None for none.
        spare: Other training samples, for the triggered inputs that an oracle is shown.
        origin: Where the trusted data come from, in words.
    """

    trusted: TrustedData | None
    spare: Samples
    origin: str


def holdings(source: Source, dataset: Dataset, size: int | None, share: float | None, seed: int) -> Holdings:
    """Draw trusted data, never out of the test part.

    Args:
        source: A central training gives of its held-out samples, a scenario with a trusted set gives of that one.
        dataset: The data set.
        size: Samples in all; 0 for none; None: the scenario's own number, else 500 or what there is.
        share: Share of them to validate on; None: the scenario's own, else 0.5.
        seed: Of the draw. A scenario's trusted set as a whole is split as in its run.

    Raises:
        UserError: If there are too few.
    """
    labels = dataset.train.labels.numpy()
    every = np.arange(len(labels), dtype=np.int64)
    pool, origin = every, "the training part (the model may have been trained on them)"
    if source.held_out:
        pool = hold_out(source.seed, source.held_out, len(labels), dataset.groups)[0]
        origin = "what the training left out"
    elif source.trusted is not None:
        fit, validate, _ = held_by_server(dataset, source.trusted, source.partitioner, source.seed)
        pool, origin = np.sort(np.concatenate([fit, validate])), "the run's own trusted set"
        if size in (None, len(pool)) and share in (None, source.trusted.validate_share):
            trusted = TrustedData(dataset.train.subset(fit), dataset.train.subset(validate), dataset.classes)
            return Holdings(trusted=trusted, spare=_spare(dataset, every, pool, seed), origin=origin)
        size = len(pool) if size is None else size
    if size == 0:
        return Holdings(trusted=None, spare=_spare(dataset, pool, pool[:0], seed), origin="nowhere")
    wanted, part = min(SIZE, len(pool)) if size is None else size, SHARE if share is None else share
    try:
        drawn, places = draw_trusted(dataset.train.subset(pool), dataset.classes, wanted, part, seed)
    except UserError as error:
        problem = dataclasses.replace(error.problems[0], path="--trusted", remedy="0 is for none")
        expected = f"must be from 2 to {len(pool)}, the samples of {origin}"
        raise UserError([dataclasses.replace(problem, expected=expected)]) from None
    taken = pool[places]
    among = pool if len(pool) > len(taken) else every
    return Holdings(trusted=drawn, spare=_spare(dataset, among, taken, seed), origin=origin)


def _spare(dataset: Dataset, among: NDArray[np.int64], taken: NDArray[np.int64], seed: int) -> Samples:
    rest = np.setdiff1d(among, taken)
    return dataset.train.subset(numpy_rng(seed, "spare").permutation(rest)[:SPARE])


def method_problems(
    methods: Mapping[str, Cleanup | Detector], subject: Subject, trusted: TrustedData | None, *, chain: bool = False
) -> list[Problem]:
    """Return why methods cannot act on a model and its data, as far as that can be told beforehand.

    Args:
        methods: By label, in their order.
        subject: The model and its data.
        trusted: Clean data, or None.
        chain: Whether a method gets the clues of those before it.
    """
    problems, given = [], set[str]()
    for label, method in methods.items():
        path = f"--method {label}"
        problems += data_problems(path, method, subject.source, trusted)
        if getattr(method, "oracle", False) and subject.trigger is None:
            expected = "is told the real trigger (oracle: true), and there is none"
            problems.append(Problem(path=path, expected=expected, remedy="add --trigger and --target"))
        elif getattr(method, "needs_label", False) and subject.target == ALL_TO_ALL:
            expected = f"is told one target label, and {ALL_TO_ALL} has none"
            problems.append(Problem(path=path, expected=expected, remedy="take another method"))
        if told_target(method, [subject.target]) is not None:
            expected = "must not name the target that the measuring knows, which no defender does"
            problems.append(Problem(path=path, expected=expected, remedy=TARGET_REMEDY))
        reason = why_not(method, subject.model, trusted)
        if reason:
            problems.append(Problem(path=path, expected=f"cannot act: {reason}"))
        problems += _clue_problems(path, method, subject, given)
        given |= set(getattr(method, "gives_clues", ())) if chain else set()
    return problems


def _clue_problems(path: str, method: object, subject: Subject, given: set[str]) -> list[Problem]:
    """Return what a method must be told and nobody tells it; ``given``: what methods before it in a chain find."""
    problems, clue = [], getattr(method, "needs_clue", None)
    if clue is not None and clue not in given:
        remedy = f"put -m {either(GIVERS.get(clue, ['one that does']))} before it and add --chain"
        remedy += f", or set its field {clue}" if hasattr(method, clue) else ""
        expected = f"uses the {clue} that a method before it finds, and none does"
        problems.append(Problem(path=path, expected=expected, remedy=remedy))
    if getattr(method, "needs_reference", False) and subject.reference is None:
        expected = "compares with the model that the training started from, and there is none"
        problems.append(Problem(path=path, expected=expected, remedy="name its checkpoint in --reference"))
    return problems


def data_problems(path: str, method: object, source: Source, trusted: TrustedData | None) -> list[Problem]:
    """Return why a cleanup or detector cannot work with the trusted data that there are."""
    if not needs_trusted(method):
        return []
    if trusted is None:
        expected, remedy = "needs trusted data, and there are none", "leave --trusted 0 out, or take another method"
        return [Problem(path=path, expected=expected, remedy=remedy)]
    if needs_classes(method) and not several_classes(trusted.fit):
        expected, remedy = "needs trusted data of several classes, and all of it is of one", "raise --trusted"
        named = None if source.trusted is None else source.trusted.labels
        if named is not None and len(set(named)) == 1:
            remedy = f"name data and model by themselves (--data, --model): the run's trusted.labels is {list(named)}"
        return [Problem(path=path, expected=expected, remedy=remedy)]
    fewest, fit = fewest_trusted(method), len(trusted.fit)
    if fit < fewest:
        expected, remedy = f"needs {fewest} trusted samples to fit on", "raise --trusted or lower --validate-share"
        return [Problem(path=path, expected=expected, got=str(fit), remedy=remedy)]
    return []
