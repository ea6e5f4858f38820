"""A model from anywhere, with the data to judge it on: what ``fedbd clean`` and ``fedbd inspect`` work on.

Model, data and trigger are named one by one (YAML values), or come out of the file that the model was made with: a
scenario, a central training, or the folder that either left.
"""

from __future__ import annotations

import copy
import dataclasses
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import torch
from torch import nn

from fedbd.central.plan import load_central
from fedbd.central.training import MODEL, PLAN
from fedbd.config.plans import DataPlan
from fedbd.config.scenario import Scenario, load_scenario
from fedbd.config.scenario_file import parse_yaml, read_yaml
from fedbd.config.schema import Kind, Method, parse, to_plain
from fedbd.data.trusted import Trusted
from fedbd.errors import Problem, UserError
from fedbd.models.checkpoint import load_checkpoint
from fedbd.models.norms import with_group_norm
from fedbd.records.record import SCENARIO, read_summary
from fedbd.registry import near_miss
from fedbd.roles import attack_window
from fedbd.seeding import torch_rng
from fedbd.targets import ALL_TO_ALL, Target, class_problem
from fedbd.types import Dataset, Partitioner, Trigger

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class _Model:
    method: Annotated[Method, Kind("model")]


@dataclass(frozen=True, kw_only=True)
class _Trigger:
    method: Annotated[Method, Kind("trigger")]


@dataclass(frozen=True, kw_only=True)
class _Cleanup:
    method: Annotated[Method, Kind("cleanup")]


@dataclass(frozen=True, kw_only=True)
class _Detection:
    method: Annotated[Method, Kind("detection")]


@dataclass(frozen=True, kw_only=True)
class _Evasion:
    method: Annotated[Method, Kind("evasion")]


@dataclass(frozen=True, kw_only=True)
class Source:
    """What a model was made with, as far as somebody wrote it down.

    Attributes:
        data: The data set.
        model: The model family.
        trigger: The (first) attack's trigger.
        target: Its target label, or ``all_to_all``.
        seed: Of the training or run.
        held_out: Of a central training: clean samples that it left out.
        trusted: Of a scenario: the trusted set that no client had.
        partitioner: Of a scenario: what split the others.
        start: Checkpoint that the run started from; None: a fresh model.
        batch_norm: Of a scenario: what became of BatchNorm layers.
        own: The source is the checkpoint's own folder, so that ``seed`` is known to be the model's.
        attacked: An attack acts in it: it is no twin's.
        course: What else decided the weights, attacks aside: field -> plain value.
    """

    data: DataPlan
    model: Method | None = None
    trigger: Method | None = None
    target: Target | None = None
    seed: int = 0
    held_out: int | None = None
    trusted: Trusted | None = None
    partitioner: Partitioner | None = None
    start: Path | None = None
    batch_norm: str = "average"
    own: bool = False
    attacked: bool = False
    course: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A command's words about a model.

    Attributes:
        checkpoint: A file, or the folder of a run or a training.
        data: A YAML value of a data method, a scenario or central YAML file, or a folder; None: the checkpoint's own.
        model: A YAML value; None: that of the data's file.
        trigger: A YAML value; None: that of the data's file.
        target: A label or ``all_to_all``; None: that of the data's file.
        twin: Checkpoint of the attack-free twin.
        reference: Checkpoint of the model that the training started from.
    """

    checkpoint: Path
    data: str | None = None
    model: str | None = None
    trigger: str | None = None
    target: str | None = None
    twin: Path | None = None
    reference: Path | None = None


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A model and its data, at hand.

    Attributes:
        model: In eval mode.
        dataset: The data set.
        trigger: None where there is no attack to look for.
        target: Target label, or ``all_to_all``; None without a trigger.
        twin: The attack-free twin, in eval mode, or None.
        reference: The model that the training started from, in eval mode; a folder's own where none is named; or None.
        source: What it was made with.
    """

    model: nn.Module
    dataset: Dataset
    trigger: Trigger | None
    target: Target | None
    twin: nn.Module | None
    reference: nn.Module | None
    source: Source


def value_of(
    kind: Literal["model", "trigger", "cleanup", "detection", "evasion"], text: str, path: str, problems: list[Problem]
) -> Any:
    """Return the ``Method`` that a YAML value names, or None with what is wrong with it."""
    cls: Any = {
        "model": _Model,
        "trigger": _Trigger,
        "cleanup": _Cleanup,
        "detection": _Detection,
        "evasion": _Evasion,
    }[kind]
    found = caught(problems, lambda: parse(cls, parse_yaml(text, path), path, problems))
    return None if found is None else found.method


def target_of(word: str, path: str, problems: list[Problem]) -> Target | None:
    """Return the target that a word names, a label or ``all_to_all``, or None with what is wrong with it."""
    if word == ALL_TO_ALL:
        return ALL_TO_ALL
    if word.isascii() and word.isdigit() and len(word) < 10:
        return int(word)
    expected = f"must be a label (an integer >= 0) or {ALL_TO_ALL}"
    problems.append(Problem(path=path, expected=expected, got=repr(word), remedy=near_miss(word, [ALL_TO_ALL])))
    return None


def source_of(text: str, path: str, problems: list[Problem]) -> Source | None:
    """Return what a word names: a YAML value of a data method, a scenario or central file, or a folder with one."""
    place = Path(text)
    if place.is_dir():
        files = [place / name for name in (SCENARIO, PLAN) if (place / name).is_file()]
        if not files:
            expected = f"must hold {SCENARIO} (a run) or {PLAN} (a training)"
            problems.append(Problem(path=path, expected=expected, got=f"the folder {text}"))
            return None
        return caught(problems, lambda: _from_file(files[0]))
    if place.suffix in (".yaml", ".yml"):
        return caught(problems, lambda: _from_file(place))
    plan = caught(problems, lambda: parse(DataPlan, parse_yaml(text, path), path, problems))
    return None if plan is None else Source(data=plan)


def _from_file(path: Path) -> Source:
    raw = read_yaml(path)
    if isinstance(raw, dict) and "rounds" in raw:
        run = load_scenario(path)
        first = run.attacks[0] if run.attacks else None
        return Source(
            data=run.data,
            model=run.model,
            trigger=None if first is None else first.trigger,
            target=None if first is None else first.target,
            seed=run.seed,
            trusted=run.trusted,
            partitioner=run.partition.method.impl,
            start=_started_from(run, path),
            batch_norm=run.batch_norm,
            attacked=attack_window(run) is not None,
            course=_course(run, RUN_COURSE),
        )
    plan = load_central(path)
    return Source(
        data=plan.data,
        model=plan.model,
        trigger=None if plan.poison is None else plan.poison.trigger,
        target=None if plan.poison is None else plan.poison.target,
        seed=plan.seed,
        held_out=plan.held_out,
        attacked=plan.poison is not None and plan.poison.enabled,
        course=_course(plan, CENTRAL_COURSE),
    )


CENTRAL_COURSE = ("training", "defense", "held_out")
RUN_COURSE = (
    "rounds",
    "batch_norm",
    "partition",
    "trusted",
    "training",
    "cohort",
    "local_defense",
    "local_defense_clients",
    "strategy",
    "server_rate",
    "bucket_size",
    "aggregation",
)
"""Fields that an attack-free twin has in common with its model, beside data set, model and seed."""


def _course(plan: object, names: tuple[str, ...]) -> dict[str, Any]:
    plain = to_plain(plan)
    return {name: plain[name] for name in names}


def _started_from(run: Scenario, path: Path) -> Path | None:
    """Return the file that a run started from: its checkpoint, or what its warm-up left as the summary names it."""
    if run.start is None:
        return None
    if run.start.checkpoint is not None:
        return Path(run.start.checkpoint).expanduser()
    found = (read_summary(path.parent) or {}).get("started_from") or {}
    return Path(found.get("file") or path.parent / "no-warm-up")


def load_subject(asked: Asked, problems: list[Problem]) -> Subject | None:
    """Load a model and its data; everything wrong is appended to ``problems``, and the result is then None."""
    before = len(problems)
    home = home_of(asked.checkpoint)
    own = None if home is None else str(home)
    word = asked.data or own
    source = None if word is None else source_of(word, "--data" if asked.data else "CHECKPOINT", problems)
    if source is not None:
        source = dataclasses.replace(source, own=own is not None and asked.data is None and asked.model is None)
    if word is None:
        remedy = "give a YAML value, {name: digits}, or the scenario or central YAML file that the model was made with"
        problems.append(Problem(path="--data", expected="is required for a checkpoint file", remedy=remedy))
    model, trigger, target = _named(asked, source, problems)
    stamp: Trigger | None = None if trigger is None else trigger.impl
    dataset = None if source is None else caught(problems, lambda: _load(source))
    if dataset is not None:
        problems += attack_problems(stamp, target, dataset, "--trigger", "--target")
    if model is None or dataset is None or source is None:
        return None
    paths = {"--twin": asked.twin, "--reference": asked.reference, "CHECKPOINT": asked.checkpoint}
    nets = {
        name: _net(model, source, dataset, path, name, problems) for name, path in paths.items() if path is not None
    }
    if source.own and asked.reference is None:
        nets["--reference"] = _start(source, model, dataset, problems)
    found = nets["CHECKPOINT"]
    if found is None or len(problems) > before:
        return None
    return Subject(
        model=found,
        dataset=dataset,
        trigger=stamp,
        target=target,
        twin=nets.get("--twin"),
        reference=nets.get("--reference"),
        source=source,
    )


def with_weights(subject: Subject, checkpoint: Path, name: str, problems: list[Problem]) -> Subject | None:
    """Return the subject with the weights of another checkpoint of the same model; None with the reason appended.

    Args:
        subject: Left untouched.
        checkpoint: A file with weights.
        name: Where the file's name stands, for the message.
        problems: What is wrong so far.
    """
    net = copy.deepcopy(subject.model)
    found = caught(problems, lambda: _filled(net, checkpoint, name))
    return None if found is None else dataclasses.replace(subject, model=found)


def home_of(checkpoint: Path) -> Path | None:
    """Return the folder of the run or training that a checkpoint belongs to: itself, its own, or the one above it."""
    if checkpoint.is_dir():
        return checkpoint
    place = Path(os.path.abspath(checkpoint)).parent  # a bare file name has no folder above; a link stays where it is
    around = (place, place.parent)
    return next((folder for folder in around if any((folder / name).is_file() for name in (SCENARIO, PLAN))), None)


def _named(
    asked: Asked, source: Source | None, problems: list[Problem]
) -> tuple[Method | None, Method | None, Target | None]:
    """Return model, trigger and target: those of the command, else those of the file."""
    model = None if source is None else source.model
    if asked.model is not None:
        model = value_of("model", asked.model, "--model", problems)
    elif source is not None and model is None:
        remedy = "name the model family, e.g. --model wrn16-1 (fedbd list model)"
        problems.append(Problem(path="--model", expected="is required: the data name no model", remedy=remedy))
    trigger = None if source is None else source.trigger
    if asked.trigger is not None:
        trigger = value_of("trigger", asked.trigger, "--trigger", problems)
    target = None if source is None else source.target
    if asked.target is not None:
        target = target_of(asked.target, "--target", problems)
    elif asked.trigger is not None and target is None:
        problems.append(Problem(path="--target", expected="is required with --trigger"))
    if asked.target is not None and trigger is None and asked.trigger is None:
        problems.append(Problem(path="--trigger", expected="is required with --target"))
    return model, trigger, target


def attack_problems(
    trigger: Trigger | None, target: Target | None, dataset: Dataset, trigger_path: str, target_path: str
) -> list[Problem]:
    """Return what only the data can tell of a trigger and a target label."""
    unknown = class_problem(target, dataset.classes, target_path)
    problems = [] if unknown is None else [unknown]
    try:
        if trigger is not None:
            trigger.stamp(torch.zeros(1, *dataset.shape))
    except UserError as error:
        problems += [dataclasses.replace(problem, path=trigger_path) for problem in error.problems]
    except (ValueError, RuntimeError, IndexError) as error:
        shape = "x".join(map(str, dataset.shape))
        problems.append(Problem(path=trigger_path, expected=f"cannot be stamped on images of {shape}: {error}"))
    return problems


def checkpoint_file(path: Path) -> Path:
    """Return the file with the weights: a folder stands for the model in it."""
    return path / MODEL if path.is_dir() else path


def _filled(net: nn.Module, path: Path, name: str) -> nn.Module:
    try:
        load_checkpoint(net, checkpoint_file(path))
    except UserError as error:
        raise UserError([dataclasses.replace(p, path=f"{name} {p.path}") for p in error.problems]) from None
    return net.eval()


def _net(
    model: Method, source: Source, dataset: Dataset, path: Path, name: str, problems: list[Problem]
) -> nn.Module | None:
    def load() -> nn.Module:
        return _filled(_fresh(model, source, dataset, 0), path, name)

    before = len(problems)
    net = caught(problems, load)
    problems[before:] = [problem for problem in problems[before:] if problem not in problems[:before]]
    return net


def _start(source: Source, model: Method, dataset: Dataset, problems: list[Problem]) -> nn.Module | None:
    """Return the model that a run or training in its own folder started from; None where that lies elsewhere now."""
    if source.start is not None and not source.start.exists():
        return None  # who needs it refuses and says so; the run may come from another machine
    if source.start is not None:
        return _net(model, source, dataset, source.start, "start.checkpoint", problems)
    return _fresh(model, source, dataset, source.seed).eval()


def _fresh(model: Method, source: Source, dataset: Dataset, seed: int) -> nn.Module:
    net: nn.Module = model.impl.build(dataset.shape, dataset.classes, torch_rng(seed, "init"))
    return with_group_norm(net) if source.batch_norm == "group_norm" else net


def _load(source: Source) -> Dataset:
    dataset: Dataset = source.data.method.impl.load(Path(source.data.root) if source.data.root else None)
    return dataset


def caught(problems: list[Problem], make: Callable[[], T]) -> T | None:
    """Return what ``make`` does; a user's mistake is appended and gives None."""
    try:
        return make()
    except UserError as error:
        problems += error.problems
        return None
