"""What a run is called, who takes part, and what is measured. Rules of ``fedbd.compatibility``."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator

from fedbd.config.field_values import shown
from fedbd.config.scenario import SHARED, TWIN, WARM_UP, Scenario
from fedbd.errors import Problem
from fedbd.registry import either
from fedbd.roles import planned_window
from fedbd.summary import LAST_ROUNDS

LONGEST = 200
"""Bytes of a scenario's name, which is a folder's."""


def name_is_a_folder(s: Scenario) -> Iterator[Problem]:
    """The name can be that of the folder in which the records go."""
    name = s.name.removesuffix(TWIN).removesuffix(WARM_UP)
    if re.search(r"[/\\\x00-\x1f]", name) or name[:1] in ".~" or name != name.strip() or name in SHARED:
        kept = either(SHARED)
        expected = f"must be fit for a folder: no / or \\, no dot or ~ in front, no space around it, and not {kept}"
        yield Problem(path="name", expected=expected, got=repr(s.name))
    elif len(os.fsencode(name)) > LONGEST:
        yield Problem(path="name", expected=f"must be fit for a folder: at most {LONGEST} bytes", got=shown(s.name))


def cohort_fits(s: Scenario) -> Iterator[Problem]:
    """The cohort is no larger than the population."""
    if s.cohort_size > s.partition.clients:
        expected = f"must be <= partition.clients ({s.partition.clients})"
        yield Problem(path="cohort.size", expected=expected, got=str(s.cohort_size))


def labels_differ(s: Scenario) -> Iterator[Problem]:
    """Names in the records are unique."""
    for kind, plans in (("attacks", s.attacks), ("cleanup", s.cleanup), ("detection", s.detection)):
        for key, times in Counter(plan.key for plan in plans).items():
            if times > 1:
                got, remedy = f"'{key}' {times} times", "give each its own label"
                yield Problem(path=kind, expected="must have different labels", got=got, remedy=remedy)


def groups_there(s: Scenario) -> Iterator[Problem]:
    """What goes by the data's own ids needs data that have some."""
    if getattr(s.data.method.impl, "has_groups", None) is not False:
        return  # or a third party's source, which does not say
    name = s.data.method.name
    expected = f"must be groups of the data, and '{name}' has none"
    remedy = "take data that have some (gtsrb; npz or image_parquet with groups: COLUMN)"
    if hasattr(s.data.method.impl, "groups"):
        expected, remedy = "must be groups of the data, and data.groups is null", "name the column in data.groups"
    if getattr(s.partition.method.impl, "keeps_groups", False):
        yield Problem(path="partition", expected=expected, got=repr(s.partition.method.name), remedy=remedy)
    if s.trusted is not None and s.trusted.groups == "whole":
        yield Problem(path="trusted.groups", expected=expected, got="'whole'", remedy=remedy)


def figures_are_measured(s: Scenario) -> Iterator[Problem]:
    """Some of the rounds that a run's figures are means of are measured."""
    window = planned_window(s)
    if window is None:
        return  # the last round always is
    first, last = max(window[0], window[1] - LAST_ROUNDS + 1), window[1]
    if not any(s.measured(round_) for round_ in range(first, last + 1)):
        yield Problem(
            path="evaluation.every",
            expected=f"leaves the last attacked rounds ({first} to {last}) without a measurement, and so the run",
            got=str(s.evaluation.every),
            remedy=f"take a number that divides {last}",
        )


def kept_models_exist(s: Scenario) -> Iterator[Problem]:
    """Models are kept of rounds of the run."""
    late = [round_ for round_ in s.evaluation.keep_models or () if round_ > s.rounds]
    if late:
        expected = f"must be rounds of the run (1 to {s.rounds})"
        yield Problem(path="evaluation.keep_models", expected=expected, got=", ".join(map(str, late)))


CHECKS = (
    name_is_a_folder,
    cohort_fits,
    labels_differ,
    groups_there,
    figures_are_measured,
    kept_models_exist,
)
