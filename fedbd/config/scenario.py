"""A scenario: everything that decides a run, as frozen dataclasses.

``load_scenario`` reads the YAML (see ``scenario_file``), ``parse`` makes the objects (see ``schema``), and
``compatibility`` refuses what cannot work together. ``to_dict`` writes the resolved form, with every default spelled
out; ``fingerprint`` names what was computed, whatever engine computed it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Le, MinLen

from fedbd.config.field_values import shown
from fedbd.config.file_kinds import refuse_central
from fedbd.config.plans import (
    OFF,
    AttackPlan,
    CheckpointPlan,
    CleanupPlan,
    CohortPlan,
    DataPlan,
    DetectionPlan,
    EnginePlan,
    EvaluationPlan,
    FaultPlan,
    PartitionPlan,
    Positive,
    Selection,
    StartPlan,
    StrategyPlan,
    Window,
)
from fedbd.config.scenario_file import override, read_yaml
from fedbd.config.schema import Kind, Method, parse, to_plain
from fedbd.crypto.grid import GRID_BITS
from fedbd.data.files import content_of
from fedbd.data.trusted import Trusted
from fedbd.errors import Problem, ScenarioError
from fedbd.training import TrainingPlan
from fedbd.types import Need

TWIN = " (twin)"
"""What the name of an attack-free twin ends in."""
WARM_UP = " (warm-up)"
"""What the name of a warm-up ends in."""
WATCHED = 10
"""A warm-up is measured every so many rounds."""
MOST_ROUNDS = 1_000_000
"""Rounds of a run, at most: rules look at every one before it starts."""
SHARED = ("twins", "warm-ups")
"""Folders of runs that several scenarios share, beside those that are named after scenarios."""


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """One run, complete. Field by field what a scenario file may hold; docs/scenario.md explains each.

    Attributes:
        name: Names the run's folder and its row in a comparison.
        rounds: Rounds of the federation.
        data: The data set.
        model: The model family and its fields.
        seed: Decides every draw: partition, initialization, cohorts, batches, roles, buckets, decryptors.
        start: The model that the run starts from.
        batch_norm: What becomes of BatchNorm layers. ``average``: their scales, shifts and running statistics are
            averaged like all weights. ``frozen``: they stay as the start has them while clients train, in eval mode;
            needs a ``start``. ``local``: all their entries stay with each client (FedBN), neither sent, averaged nor
            encrypted; a client's first are those of the start. What is evaluated, and repaired in a copy, is the
            averaged rest with the start's scales and shifts and the statistics of ``trusted`` data. ``group_norm``:
            GroupNorm stands in their place, under the same names.
        partition: How the training set is split among clients; left out, ``iid`` among 10 of them.
        trusted: Clean data that the server holds.
        training: How a client trains.
        cohort: Who takes part in a round, and how much a client counts.
        attacks: Who attacks, when and how; an empty list: nobody.
        local_defense: What replaces plain training at honest and polluted clients; null: nothing does.
        local_defense_clients: Which clients run it when they do not attack; null: all. The draw does not depend on who
            attacks.
        strategy: The Flower strategy that gets the aggregate.
        server_rate: Factor on the aggregate before the strategy gets it.
        secure_sum: How updates are encrypted; null: they travel in the clear.
        bucket_size: Clients per sum that the server comes to see: 1: single updates; null: one sum over the cohort.
            Under ``secure_sum`` the default is null. A short last bucket joins the one before.
        aggregation: The rule that turns updates, bucket means or the sum into one update.
        cleanup: What repairs the model after a round.
        detection: What scores samples after a round.
        evaluation: What is measured beside the run itself.
        faults: Which clients fail, how and when, to see whether the run survives it; an empty list: nobody.
        engine: How the run is carried out.
        on_client_failure: ``fail``: the run ends with the reason; ``skip``: the round goes on without the client, and
            the record names it.
        checkpoint: When the run saves where it stands, for ``fedbd resume``. The default is null for a local defense or
            ``batch_norm: local`` on engine ``ray`` or ``deployment``: Flower's runtime keeps what clients remember.
    """

    name: Annotated[str, MinLen(1)]
    rounds: Annotated[int, Ge(1), Le(MOST_ROUNDS)]
    data: DataPlan
    model: Annotated[Method, Kind("model")]
    seed: int = 0
    start: StartPlan | None = None
    batch_norm: Literal["average", "frozen", "local", "group_norm"] = "average"
    partition: PartitionPlan = PartitionPlan(method=Method.default("partition", "iid"))
    trusted: Trusted | None = None
    training: TrainingPlan = TrainingPlan()
    cohort: CohortPlan = CohortPlan()
    attacks: tuple[AttackPlan, ...] = ()
    local_defense: Annotated[Method | None, Kind("local_defense")] = None
    local_defense_clients: Selection | None = None
    strategy: StrategyPlan = StrategyPlan()
    server_rate: Annotated[float, Gt(0)] = 1.0
    secure_sum: Annotated[Method | None, Kind("secure_sum")] = None
    bucket_size: Positive | None = 1
    aggregation: Annotated[Method, Kind("aggregation")] = Method.default("aggregation", "mean")
    cleanup: tuple[CleanupPlan, ...] = ()
    detection: tuple[DetectionPlan, ...] = ()
    evaluation: EvaluationPlan = EvaluationPlan()
    faults: tuple[FaultPlan, ...] = ()
    engine: EnginePlan = EnginePlan()
    on_client_failure: Literal["fail", "skip"] = "fail"
    checkpoint: CheckpointPlan | None = CheckpointPlan()

    @property
    def cohort_size(self) -> int:
        """Clients per round."""
        return self.cohort.size or self.partition.clients

    @property
    def buckets(self) -> int:
        """Rows that an aggregation rule gets: one sum, bucket means or single updates."""
        return 1 if self.bucket_size is None else max(1, self.cohort_size // self.bucket_size)

    @property
    def guards(self) -> list[tuple[str, CleanupPlan | DetectionPlan]]:
        """Cleanups and detectors, each with its path in the scenario."""
        cleanups: list[tuple[str, CleanupPlan | DetectionPlan]] = [
            (f"cleanup[{i}]", plan) for i, plan in enumerate(self.cleanup)
        ]
        return cleanups + [(f"detection[{i}]", plan) for i, plan in enumerate(self.detection)]

    @property
    def trusted_users(self) -> list[tuple[str, Method]]:
        """Whatever may read the trusted set, each with its path in the scenario."""
        return [("aggregation", self.aggregation), *((path, plan.method) for path, plan in self.guards)]

    def measured(self, round_: int) -> bool:
        """Return whether the model is measured after a round: see ``EvaluationPlan.every``."""
        ends = (0, self.rounds)
        return round_ in ends or round_ % self.evaluation.every == 0 or any(plan.due(round_) for _, plan in self.guards)

    @property
    def needs(self) -> frozenset[Need]:
        """What the aggregation rule must see."""
        needed: frozenset[Need] = self.aggregation.impl.needs
        return needed


def to_dict(scenario: Scenario) -> dict[str, Any]:
    """Return the resolved scenario as plain YAML values; parsing it again gives an equal scenario."""
    plain: dict[str, Any] = to_plain(scenario)
    return plain


def fingerprint(scenario: Scenario) -> str:
    """Return a hash of all that decides the records.

    That is the resolved scenario without its name, its engine, the folder of its data, its checkpoints and what is
    measured beside the run; a model to start from and a trigger's file count by their content, a warm-up by the
    fingerprint of its own scenario. When and on what a run is measured counts where it is not the default.
    """
    beside = ("name", "engine", "evaluation", "checkpoint")
    plain = {key: value for key, value in to_dict(scenario).items() if key not in beside}
    if (measured := (scenario.evaluation.every, scenario.evaluation.samples)) != (1, None):
        plain["measured"] = measured
    if plain["batch_norm"] == "average":
        del plain["batch_norm"]
    plain["data"] = {key: value for key, value in plain["data"].items() if key != "root"}
    if not scenario.faults:  # without any, the hash is that of a time before there were some
        del plain["faults"]
    for detector in plain["detection"]:
        if detector.get("honest") is False:  # the same
            del detector["honest"]
    if scenario.start is not None and scenario.start.checkpoint is not None:
        plain["start"] = {"checkpoint": content_of(scenario.start.checkpoint)}
    warm_up = warm_up_of(scenario)
    if warm_up is not None:
        plain["start"] = {"warm_up": fingerprint(warm_up)}
    for attack in plain["attacks"]:
        if isinstance(attack["trigger"].get("file"), str):
            attack["trigger"]["file"] = content_of(attack["trigger"]["file"])
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def memory_in_reach(scenario: Scenario) -> bool:
    """Return whether a checkpoint reaches what clients remember: Flower's own runtimes keep that to themselves."""
    remember = scenario.local_defense is not None or scenario.batch_norm == "local"
    return scenario.engine.name == "local" or not remember


def twin_of(scenario: Scenario) -> Scenario:
    """Return the attack-free twin: the same draws, initialization and defenses, everybody acts honestly.

    It runs in the clear: sums are exact on the grid, so encryption cannot change what the twin measures. Where clients
    fail it is encrypted, too: it has the same faults, some of them at stages of the encryption, and only then closes
    the same sums.
    """
    attacks = tuple(dataclasses.replace(attack, enabled=False, training=None) for attack in scenario.attacks)
    scheme = scenario.secure_sum
    other_grid = scheme is not None and scheme.impl.grid_bits != GRID_BITS  # then only encryption gives the same bits
    return dataclasses.replace(
        scenario,
        name=f"{scenario.name}{TWIN}",
        attacks=attacks,
        secure_sum=scheme if other_grid or scenario.faults else None,
        evaluation=dataclasses.replace(scenario.evaluation, twin=False, relearn=None, keep_models=None),
    )


def warm_up_of(scenario: Scenario) -> Scenario | None:
    """Return the clean rounds that a run starts from, or None where it starts from something else.

    Arms of a comparison shall start from the same model: nothing in it depends on attacks or defenses.
    """
    rounds = scenario.start.warm_up if scenario.start is not None else None
    if rounds is None:
        return None
    return Scenario(
        name=f"{scenario.name.removesuffix(TWIN)}{WARM_UP}",
        rounds=rounds,
        data=scenario.data,
        model=scenario.model,
        seed=scenario.seed,
        batch_norm="group_norm" if scenario.batch_norm == "group_norm" else "average",
        partition=scenario.partition,
        trusted=scenario.trusted,
        training=scenario.training,
        cohort=dataclasses.replace(scenario.cohort, attackers_per_round=None),
        strategy=scenario.strategy,
        server_rate=scenario.server_rate,
        evaluation=EvaluationPlan(twin=False, every=WATCHED),
        engine=scenario.engine,
        on_client_failure=scenario.on_client_failure,
        checkpoint=scenario.checkpoint,
    )


def with_open_windows(scenario: Scenario) -> Scenario:
    """Return the scenario with all its attacks in every round: what the re-learning test goes on with."""
    attacks = tuple(dataclasses.replace(attack, rounds=Window()) for attack in scenario.attacks)
    return dataclasses.replace(scenario, attacks=attacks)


def from_dict(raw: object, heading: str = "") -> Scenario:
    """Return the scenario that plain values (from YAML or JSON) describe.

    Raises:
        ScenarioError: With every problem found, fields and combinations together where possible.
    """
    if not isinstance(raw, dict):
        required = [field.name for field in dataclasses.fields(Scenario) if field.default is field.default_factory]
        expected = f"must be a mapping with {', '.join(required[:-1])} and {required[-1]}"
        raise ScenarioError([Problem(path="the scenario", expected=expected, got=shown(raw))], heading)
    if "bucket_size" not in raw and raw.get("secure_sum") is not None:
        raw = {**raw, "bucket_size": None}  # under encryption the default is one sum over the cohort
    if raw.get("checkpoint") == OFF:
        raw = {**raw, "checkpoint": None}
    problems: list[Problem] = []
    scenario = parse(Scenario, raw, "", problems)
    if scenario is not None:
        if "checkpoint" not in raw and not memory_in_reach(scenario):
            scenario = dataclasses.replace(scenario, checkpoint=None)
        from fedbd.compatibility import check  # noqa: PLC0415 - it needs this module's classes

        problems.extend(check(scenario))
    if problems or scenario is None:
        raise ScenarioError(problems, heading)
    return scenario


def load_scenario(path: str | Path, overrides: tuple[str, ...] | list[str] = ()) -> Scenario:
    """Read a scenario file.

    Args:
        path: A YAML file.
        overrides: ``path=VALUE`` each, the value in YAML: ``training.lr=0.05``, ``secure_sum={name: ckks}``.

    Raises:
        ScenarioError: With every problem found: its place, what was expected, what came.
    """
    heading = f"{path} is not a scenario that can run:"
    raw = read_yaml(Path(path))
    refuse_central(raw, Path(path))
    if overrides and isinstance(raw, dict):
        raw = {"partition": Scenario.partition.method.name, **raw}  # so that partition.clients alone can be set
    return from_dict(override(raw, overrides), heading)
