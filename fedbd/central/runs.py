"""Central trainings as a person asks for them: several seeds, each with its attack-free twin, each in its folder."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from fedbd.central.plan import (
    CentralData,
    CentralPlan,
    assemble_central,
    identity,
    load_central,
    new_model,
    twin_of,
)
from fedbd.central.subject import attack_problems
from fedbd.central.training import LOG, MODEL, PLAN, STATE, train_central
from fedbd.errors import DataError, Problem, UserError
from fedbd.records.run_lock import LOCK, is_written, writing
from fedbd.types import Dataset, Notes


@dataclass(frozen=True, kw_only=True)
class Training:
    """One training: what, and where.

    Attributes:
        plan: What to train.
        folder: Where.
        title: What it is called on the terminal.
    """

    plan: CentralPlan
    folder: Path
    title: str

    def lines(self) -> list[Notes]:
        """Return the lines of the epochs that are done."""
        return read_epochs(self.folder)

    @property
    def checkpoint(self) -> Path:
        """The trained model."""
        return self.folder / MODEL


def read_epochs(folder: Path) -> list[Notes]:
    """Return the lines of a training's epochs that are done; none where there is no log.

    Raises:
        DataError: If the log is damaged.
    """
    log = folder / LOG
    if not log.exists():
        return []
    whole = [line for line in log.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("\n")]
    try:
        return [json.loads(line) for line in whole]
    except ValueError as error:
        remedy = "the file was changed or damaged; remove the folder, or pass --overwrite"
        problem = Problem(path=str(log), expected="must hold one JSON object a line", got=str(error), remedy=remedy)
        raise DataError([problem]) from None


def trainings(plan: CentralPlan, seeds: int, out: Path, *, twin: bool) -> list[Training]:
    """Return the trainings of a plan with its own seed and the following ones, each before its attack-free twin."""
    found = []
    for seed in range(plan.seed, plan.seed + seeds):
        own = replace(plan, seed=seed)
        folder = out / plan.name / f"seed-{seed}"
        found.append(Training(plan=own, folder=folder, title=f"{plan.name} seed {seed}"))
        if twin and plan.poison is not None and plan.poison.enabled:
            place = folder.with_name(f"seed-{seed}-twin")
            found.append(Training(plan=twin_of(own), folder=place, title=f"{plan.name} seed {seed} twin"))
    return found


def folder_problems(found: list[Training], *, overwrite: bool) -> list[Problem]:
    """Return why trainings cannot have their folders."""
    problems: list[Problem] = []
    if Path(found[0].plan.name).name != found[0].plan.name or found[0].plan.name in (".", ".."):
        expected = "must be a plain name: it becomes a folder"
        problems.append(Problem(path="name", expected=expected, got=repr(found[0].plan.name)))
        return problems
    for training in found:
        problem = _taken(training, overwrite)
        problems += [problem] if problem is not None else []
    return problems


def _taken(training: Training, overwrite: bool) -> Problem | None:
    folder, elsewhere = training.folder, "pass --out with another folder"
    there = next((place for place in (folder, *folder.parents) if place.exists()), folder)
    if there.exists() and not (there.is_dir() and os.access(there, os.W_OK)):
        return Problem(path=str(there), expected="must be a folder that can be written", remedy=elsewhere)
    if is_written(folder):
        return Problem(path=str(folder), expected="is being written by another fedbd train", remedy="wait for it")
    if there != folder or all(entry.name == LOCK for entry in folder.iterdir()):
        return None
    if not any((folder / name).exists() for name in (PLAN, STATE, LOG, MODEL)):
        return Problem(path=str(folder), expected="must be new, empty or a training's folder", remedy=elsewhere)
    if overwrite:
        return None
    try:
        same = (folder / PLAN).exists() and identity(load_central(folder / PLAN)) == identity(training.plan)
    except UserError:
        same = False
    remedy = f"pass --overwrite to replace it, or {elsewhere.removeprefix('pass ')}"
    return None if same else Problem(path=str(folder), expected="holds another training", remedy=remedy)


def data_problems(plan: CentralPlan, dataset: Dataset) -> list[Problem]:
    """Return what only the data can tell of a plan."""
    problems = []
    if plan.poison is not None:
        poison = plan.poison
        problems += attack_problems(poison.trigger.impl, poison.target, dataset, "poison.trigger", "poison.target")
    if plan.held_out >= len(dataset.train):
        expected = f"must leave samples to train on: less than {len(dataset.train)}"
        problems.append(Problem(path="held_out", expected=expected, got=str(plan.held_out)))
    try:
        new_model(plan, dataset)
    except UserError as error:
        problems += error.problems
    return problems


def load_data(plan: CentralPlan) -> Dataset:
    """Return a plan's data set.

    Raises:
        UserError: If it cannot be read, or the plan does not fit it: everything wrong at once.
    """
    dataset: Dataset = plan.data.method.impl.load(Path(plan.data.root) if plan.data.root else None)
    problems = data_problems(plan, dataset)
    if problems:
        raise UserError(problems, f"central training '{plan.name}' does not fit its data:")
    return dataset


def carry_out(training: Training, on_epoch: Callable[[Notes], None], *, overwrite: bool = False) -> CentralData:
    """Train, or go on with, one model, its folder locked against a second process.

    Raises:
        UserError: If another process writes the folder.
    """
    data = assemble_central(training.plan)
    with writing(training.folder):
        if overwrite:
            for entry in training.folder.iterdir():
                if entry.name != LOCK:
                    shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        train_central(training.plan, data, training.folder, on_epoch)
    return data
