"""What a scenario stands for in memory: data, partitions, model, triggers. Built once per process.

Client processes and the server build the same thing from the same scenario; data lie in memory-mapped files that they
share.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray
from torch import nn

from fedbd.config.plans import AttackPlan, DetectionPlan
from fedbd.config.scenario import Scenario, from_dict
from fedbd.data.assemble import Federation, assemble
from fedbd.data.checks import describe
from fedbd.data.stratify import stratified
from fedbd.defenses.trusted_data import needs_classes, several_classes, why_not
from fedbd.errors import CheckpointError, Problem, ScenarioError, UserError
from fedbd.models.checkpoint import load_checkpoint
from fedbd.models.norms import batch_norm_entries, freeze_batch_norm, has_batch_norm, with_group_norm
from fedbd.params import Layout, join, layout_of, split
from fedbd.roles import assignment, locally_defended
from fedbd.seeding import numpy_rng, torch_rng
from fedbd.targets import Target, class_problem
from fedbd.types import AttackContext, Dataset, Samples, Trigger, Vector

START_ENTRIES = "fedbd-start-entries"
"""Key of a message's config: what clients keep to themselves, as the start has it (safetensors)."""


@dataclass(frozen=True)
class Prepared:
    """A scenario with its data and model at hand.

    Attributes:
        scenario: The scenario.
        federation: Data set, partitions and trusted data.
    """

    scenario: Scenario
    federation: Federation

    @property
    def dataset(self) -> Dataset:
        """The data set."""
        return self.federation.dataset

    @property
    def triggers(self) -> dict[str, tuple[Trigger, Target]]:
        """Trigger and target of each attack, by its name in the records: what a model is measured with."""
        return {attack.key: (attack.trigger.impl, attack.target) for attack in self.scenario.attacks}

    @cached_property
    def measured(self) -> Samples:
        """What the run's models are measured on: the test set, or ``evaluation.samples`` of it.

        Raises:
            ScenarioError: If the test set has fewer images, or the drawn ones could not have one of each class.
        """
        test, wanted = self.dataset.test, self.scenario.evaluation.samples
        if wanted is None:
            return test
        if not self.dataset.classes <= wanted <= len(test):
            expected = (
                f"must be between the number of classes ({self.dataset.classes}) and of test images ({len(test)})"
            )
            raise ScenarioError([Problem(path="evaluation.samples", expected=expected, got=str(wanted))])
        rng = numpy_rng(self.scenario.seed, "evaluation")
        return test.subset(stratified(test.labels.numpy(), wanted, rng)[0])

    @cached_property
    def assigned(self) -> dict[int, AttackPlan]:
        """``roles.assignment``, worked out once: it goes over all clients, however few take part."""
        return assignment(self.scenario)

    @cached_property
    def defended(self) -> frozenset[int]:
        """``roles.locally_defended``, worked out once."""
        return locally_defended(self.scenario)

    def attack_context(self, attack: AttackPlan, weights: Vector) -> AttackContext:
        """Return what an attacker knows in a round that starts from ``weights``, (D,) float32."""
        return AttackContext(
            trigger=attack.trigger.impl,
            target=attack.target,
            classes=self.dataset.classes,
            global_weights=weights,
            cohort_size=self.scenario.cohort_size,
            server_rate=self.scenario.server_rate,
        )

    def new_model(self) -> nn.Module:
        """Return the initial model (the scenario's seed decides its weights)."""
        model = self._built()
        return with_group_norm(model) if self.scenario.batch_norm == "group_norm" else model

    def _built(self) -> nn.Module:
        rng = torch_rng(self.scenario.seed, "init")
        model: nn.Module = self.scenario.model.impl.build(self.dataset.shape, self.dataset.classes, rng)
        return model

    def start_model(self, warmed: Path | None = None) -> nn.Module:
        """Return the model that the run starts from: the initial one, the scenario's checkpoint, or its warm-up's.

        Args:
            warmed: What the warm-up left, for a scenario that starts from one.

        Raises:
            CheckpointError: If the checkpoint does not fit, or the warm-up's result is not there.
        """
        model, start = self.new_model(), self.scenario.start
        if start is not None and start.checkpoint is not None:
            load_checkpoint(model, Path(start.checkpoint).expanduser())
        elif start is not None and warmed is not None:
            load_checkpoint(model, warmed)
        elif start is not None:
            expected = f"needs the result of {start.warm_up} clean rounds, and it is not there"
            remedy = "start the run with fedbd run, which runs them first, or name their model as start.checkpoint"
            raise CheckpointError([Problem(path="start.warm_up", expected=expected, remedy=remedy)])
        return model

    @cached_property
    def model(self) -> nn.Module:
        """The one model of this process that clients train, to be filled in place."""
        model = self.new_model().to(torch.device(self.scenario.engine.device))
        return freeze_batch_norm(model) if self.scenario.batch_norm == "frozen" else model

    @cached_property
    def layout(self) -> Layout:
        """Names and shapes of the float weights."""
        return layout_of(self.new_model().state_dict())

    @cached_property
    def batch_norm_names(self) -> tuple[str, ...]:
        """The state entries of BatchNorm layers."""
        return batch_norm_entries(self.new_model())

    @property
    def own_names(self) -> tuple[str, ...]:
        """The state entries that each client keeps to itself: of BatchNorm where that is local, else none."""
        return self.batch_norm_names if self.scenario.batch_norm == "local" else ()

    @cached_property
    def exchanged(self) -> Layout:
        """Names and shapes of the float weights that travel: all but ``own_names``."""
        return layout_of({n: e for n, e in self.new_model().state_dict().items() if n not in self.own_names})

    def whole(self, weights: Vector, own: Mapping[str, NDArray[Any]]) -> Vector:
        """Return all float weights, (D,), of those that travel and a client's or the server's own entries."""
        if not self.own_names:
            return weights
        return join({**split(weights, self.exchanged), **own}, self.layout)

    def sent(self, weights: Vector) -> Vector:
        """Return those of all float weights, (D,), that travel."""
        return join(split(weights, self.layout), self.exchanged) if self.own_names else weights

    def own_entries(self, model: nn.Module) -> dict[str, NDArray[Any]]:
        """Return copies of a model's entries of ``own_names``, on the CPU."""
        state = model.state_dict()
        return {name: state[name].detach().cpu().numpy().copy() for name in self.own_names}


def prepare(scenario: Scenario) -> Prepared:
    """Load the data, split them, and check what only data and model can tell.

    Raises:
        UserError: With every problem found.
    """
    if scenario.engine.device == "cuda" and not torch.cuda.is_available():
        remedy = "set engine.device: cpu, or install a CUDA build on a machine with a GPU"
        raise ScenarioError(
            [Problem(path="engine.device", expected="no CUDA device is here", got="'cuda'", remedy=remedy)]
        )
    missing = [number for number in scenario.engine.cuda_devices or () if number >= torch.cuda.device_count()]
    if missing:
        expected = f"must be GPUs of this machine (0 to {torch.cuda.device_count() - 1})"
        got = ", ".join(map(str, missing))
        raise ScenarioError([Problem(path="engine.cuda_devices", expected=expected, got=got)])
    prepared = Prepared(scenario, federate(scenario))
    problems = list(_mismatches(prepared))
    if problems:
        raise UserError(problems, _heading(scenario))
    return prepared


def load_data(scenario: Scenario) -> Dataset:
    """Return a scenario's data set.

    Raises:
        UserError: If the data are not there or damaged.
    """
    dataset: Dataset = scenario.data.method.impl.load(Path(scenario.data.root) if scenario.data.root else None)
    return dataset


def federate(scenario: Scenario) -> Federation:
    """Load the data and split them: who holds what, without a model.

    Raises:
        UserError: If the data are not there, damaged, or cannot be split so.
    """
    try:
        return assemble(
            load_data(scenario),
            scenario.partition.method.impl,
            scenario.partition.clients,
            scenario.trusted,
            scenario.seed,
        )
    except UserError as error:
        raise type(error)(error.problems, _heading(scenario)) from None


def _heading(scenario: Scenario) -> str:
    return f"scenario '{scenario.name}' does not fit its data:"


def _mismatches(prepared: Prepared) -> Iterator[Problem]:
    scenario, dataset = prepared.scenario, prepared.dataset
    for i, attack in enumerate(scenario.attacks):
        unknown = class_problem(attack.target, dataset.classes, f"attacks[{i}].target")
        if unknown is not None:
            yield unknown
        try:
            attack.trigger.impl.stamp(torch.zeros(1, *dataset.shape))
        except UserError as error:
            for problem in error.problems:
                yield dataclasses.replace(problem, path=f"attacks[{i}].{problem.path}")
        except (ValueError, RuntimeError, IndexError) as error:
            yield Problem(path=f"attacks[{i}].trigger", expected=f"cannot be stamped on {_images(dataset)}: {error}")
    yield from _evasion_targets(prepared)
    try:
        model = prepared.new_model()
    except UserError as error:
        yield from error.problems
        return
    except (ValueError, RuntimeError, IndexError) as error:
        yield Problem(path="model", expected=f"cannot be built for {_images(dataset)}: {error}")
        return
    yield from _no_batch_norm(prepared)
    yield from _bad_checkpoint(prepared)
    for path, plan in scenario.guards:
        own_data = (
            isinstance(plan, DetectionPlan) and plan.where == "training"
        )  # a client's detector gets no trusted data
        reason = why_not(plan.method.impl, model, None if own_data else prepared.federation.trusted)
        if reason:
            yield Problem(path=path, expected=f"cannot act: {reason}")
    yield from _one_class(prepared)
    try:
        _ = prepared.measured
    except ScenarioError as error:
        yield from error.problems


def _evasion_targets(prepared: Prepared) -> Iterator[Problem]:
    """An evasion's target is a class of the data."""
    for i, plan in enumerate(prepared.scenario.detection):
        for j, evasion in enumerate(plan.adversarial):
            target = getattr(evasion.method.impl, "target", None)
            if isinstance(target, int) and target >= prepared.dataset.classes:
                expected = f"must be below the number of classes ({prepared.dataset.classes})"
                yield Problem(path=f"detection[{i}].adversarial[{j}].target", expected=expected, got=str(target))


def _no_batch_norm(prepared: Prepared) -> Iterator[Problem]:
    """A policy for BatchNorm finds some."""
    policy, name = prepared.scenario.batch_norm, prepared.scenario.model.name
    if policy != "average" and not has_batch_norm(prepared._built()):
        expected = f"must be average: model '{name}' has no BatchNorm2d"
        yield Problem(path="batch_norm", expected=expected, got=repr(policy))


def _bad_checkpoint(prepared: Prepared) -> Iterator[Problem]:
    """The checkpoint to start from fits; a warm-up's model is not there yet."""
    start = prepared.scenario.start
    if start is None or start.checkpoint is None:
        return
    try:
        prepared.start_model()
    except CheckpointError as error:
        for problem in error.problems:
            yield dataclasses.replace(problem, path=f"start.checkpoint: {problem.path}")


def _one_class(prepared: Prepared) -> Iterator[Problem]:
    """Methods that train on the trusted set must not get one class only: they would teach the model that class."""
    scenario, trusted = prepared.scenario, prepared.federation.trusted
    if trusted is None or scenario.trusted is None or several_classes(trusted.fit):
        return
    named = scenario.trusted.labels
    remedy = "raise trusted.size or set trusted.balance to balanced" if named is None or len(set(named)) > 1 else ""
    for path, method in scenario.trusted_users:
        if needs_classes(method.impl):
            yield Problem(
                path=path,
                expected=f"'{method.name}' needs trusted data of several classes, and all of it is of one",
                remedy=remedy or "leave trusted.labels out or name more classes",
            )


def _images(dataset: Dataset) -> str:
    return f"images of {describe(dataset.shape)}"


@lru_cache(maxsize=2)
def prepared_from_json(text: str) -> Prepared:
    """Return the prepared scenario of a message; cached, since every message of a run carries the same text.

    Args:
        text: ``json.dumps(to_dict(scenario))``.
    """
    return prepare(from_dict(json.loads(text)))
