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

from fedbd.data.trusted import Trusted
from fedbd.errors import Problem, ScenarioError
from fedbd.field_values import shown
from fedbd.scenario_file import override, read_yaml
from fedbd.schema import Kind, Method, parse, to_plain
from fedbd.training import TrainingPlan
from fedbd.types import Need

TWIN = " (twin)"
"""What the name of an attack-free twin ends in."""

Positive = Annotated[int, Ge(1)]
Share = Annotated[float, Gt(0), Le(1)]


@dataclass(frozen=True, kw_only=True)
class DataPlan:
    """Which data set, and where its files lie (``root``; else the environment variable FEDBD_DATA)."""

    method: Annotated[Method, Kind("data")]
    root: str | None = None


@dataclass(frozen=True, kw_only=True)
class PartitionPlan:
    """How the training samples are split among so many clients."""

    method: Annotated[Method, Kind("partition")]
    clients: Positive = 10


@dataclass(frozen=True, kw_only=True)
class CohortPlan:
    """Who takes part in a round.

    Attributes:
        size: Clients drawn per round, without replacement; null: all.
        attackers_per_round: Exactly so many attackers in each round of an attack window; null: as drawn.
        weighting: ``equal``, or ``examples``: by the number of samples each client claims to hold.
        largest_weight: No client counts more than so many times the average one (a mean of plain updates).
    """

    size: Positive | None = None
    attackers_per_round: Annotated[int, Ge(0)] | None = None
    weighting: Literal["equal", "examples"] = "equal"
    largest_weight: Annotated[float, Ge(1)] = 10.0


@dataclass(frozen=True, kw_only=True)
class Selection:
    """Which clients: exactly one of a share of all, a number, or a list of ids."""

    share: Share | None = None
    count: Positive | None = None
    ids: Annotated[tuple[Annotated[int, Ge(0)], ...], MinLen(1)] | None = None

    def problems(self) -> list[tuple[str, str]]:
        """Return what is wrong between the fields."""
        given = [name for name in ("share", "count", "ids") if getattr(self, name) is not None]
        found = " and ".join(given) or "none"
        return [] if len(given) == 1 else [("", f"must hold exactly one of share, count and ids, got {found}")]


@dataclass(frozen=True, kw_only=True)
class Window:
    """Rounds from ``first`` to ``last``, both included; ``last: null`` is the end of the run."""

    first: Positive = 1
    last: Positive | None = None

    def __contains__(self, round_: int) -> bool:
        """Return whether a round lies in the window."""
        return self.first <= round_ and (self.last is None or round_ <= self.last)

    def problems(self) -> list[tuple[str, str]]:
        """Return what is wrong between the fields."""
        late = self.last is not None and self.last < self.first
        return [("last", f"must be >= first ({self.first}), got {self.last}")] if late else []


@dataclass(frozen=True, kw_only=True)
class AttackPlan:
    """One attack: who carries it out, when, with which trigger and target.

    Attributes:
        method: The attack itself.
        label: Its name in the records; default: the attack's name.
        role: ``attacker`` (ignores local defenses) or ``polluted`` (an honest client whose data somebody poisoned).
        clients: Who.
        rounds: When they act.
        enabled: False gives the attack-free twin: same roles and draws, everybody acts honestly, triggers are measured.
        target: Target label.
        trigger: The trigger.
        training: The attackers' own training plan; null: the scenario's.
    """

    method: Annotated[Method, Kind("attack")]
    clients: Selection
    target: Annotated[int, Ge(0)]
    trigger: Annotated[Method, Kind("trigger")]
    label: str | None = None
    role: Literal["attacker", "polluted"] = "attacker"
    rounds: Window = Window()
    enabled: bool = True
    training: TrainingPlan | None = None

    @property
    def key(self) -> str:
        """The name in the records."""
        return self.label or self.method.name


@dataclass(frozen=True, kw_only=True)
class CleanupPlan:
    """One cleanup: when it runs and what becomes of its result.

    Attributes:
        method: The cleanup itself.
        label: Its name in the records; default: the method's name.
        mode: ``if_stopped_now``: a copy is repaired and measured; ``in_loop``: the next round starts from the repaired.
        every: Run every so many rounds.
        rounds: Run in exactly these rounds instead.
        rollback: ``in_loop``: keep the unrepaired model if validation accuracy falls by more than this; null: never.
    """

    method: Annotated[Method, Kind("cleanup")]
    label: str | None = None
    mode: Literal["if_stopped_now", "in_loop"] = "if_stopped_now"
    every: Positive = 1
    rounds: Annotated[tuple[Positive, ...], MinLen(1)] | None = None
    rollback: Annotated[float, Ge(0), Le(1)] | None = 0.1

    @property
    def key(self) -> str:
        """The name in the records."""
        return self.label or self.method.name

    def due(self, round_: int) -> bool:
        """Return whether the cleanup runs in a round."""
        return round_ in self.rounds if self.rounds is not None else round_ % self.every == 0


@dataclass(frozen=True, kw_only=True)
class DetectionPlan:
    """One sample detector over incoming inputs: clean and triggered test images, mixed.

    Attributes:
        method: The detector itself.
        label: Its name in the records; default: the method's name.
        every: Run every so many rounds.
        rounds: Run in exactly these rounds instead.
        samples: So many clean and so many triggered images (fewer where the test set has fewer).
    """

    method: Annotated[Method, Kind("detection")]
    label: str | None = None
    every: Positive = 1
    rounds: Annotated[tuple[Positive, ...], MinLen(1)] | None = None
    samples: Positive = 1000

    @property
    def key(self) -> str:
        """The name in the records."""
        return self.label or self.method.name

    def due(self, round_: int) -> bool:
        """Return whether the detector runs in a round."""
        return round_ in self.rounds if self.rounds is not None else round_ % self.every == 0


@dataclass(frozen=True, kw_only=True)
class StrategyPlan:
    """The Flower strategy inside, by name or ``package.module:Class``, with its constructor's arguments."""

    name: str = "fedavg"
    arguments: dict[str, float | int | bool | str] = dataclasses.field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class EvaluationPlan:
    """What is measured beside the run itself.

    Attributes:
        twin: Also run the attack-free twin, for the floor of the attack success rate and the price of a defense.
    """

    twin: bool = True


@dataclass(frozen=True, kw_only=True)
class EnginePlan:
    """How the run is carried out; never changes a record.

    Attributes:
        name: ``local`` (processes of this machine), ``ray`` (Flower's simulation runtime), ``deployment`` (SuperLink
            and SuperNodes on this machine).
        workers: Processes that train clients; null: as many as cores.
        executor: ``local`` only: ``process``, or ``serial`` in the driver itself.
        device: Where clients and server compute.
        client_gpus: ``ray`` only: the fraction of a GPU per client.
        timeout: Seconds that a client may take for one message.
    """

    name: Literal["local", "ray", "deployment"] = "local"
    workers: Positive | None = None
    executor: Literal["process", "serial"] = "process"
    device: Literal["cpu", "cuda"] = "cpu"
    client_gpus: Annotated[float, Ge(0)] = 0.0
    timeout: Annotated[float, Gt(0)] = 3600.0


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """One run, complete. Field by field what a scenario file may hold; docs/scenario.md explains each."""

    name: Annotated[str, MinLen(1)]
    rounds: Positive
    data: DataPlan
    model: Annotated[Method, Kind("model")]
    seed: int = 0
    partition: PartitionPlan = PartitionPlan(method=Method.default("partition", "iid"))
    trusted: Trusted | None = None
    training: TrainingPlan = TrainingPlan()
    cohort: CohortPlan = CohortPlan()
    attacks: tuple[AttackPlan, ...] = ()
    local_defense: Annotated[Method | None, Kind("local_defense")] = None
    strategy: StrategyPlan = StrategyPlan()
    server_rate: Annotated[float, Gt(0)] = 1.0
    secure_sum: Annotated[Method | None, Kind("secure_sum")] = None
    bucket_size: Positive | None = 1
    aggregation: Annotated[Method, Kind("aggregation")] = Method.default("aggregation", "mean")
    cleanup: tuple[CleanupPlan, ...] = ()
    detection: tuple[DetectionPlan, ...] = ()
    evaluation: EvaluationPlan = EvaluationPlan()
    engine: EnginePlan = EnginePlan()
    on_client_failure: Literal["fail", "skip"] = "fail"

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

    That is the resolved scenario without its name, its engine, the folder of its data and whether a twin is run.
    """
    plain = {key: value for key, value in to_dict(scenario).items() if key not in ("name", "engine", "evaluation")}
    plain["data"] = {key: value for key, value in plain["data"].items() if key != "root"}
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def twin_of(scenario: Scenario) -> Scenario:
    """Return the attack-free twin: the same draws, initialization and defenses, everybody acts honestly.

    It runs in the clear: sums are exact on the grid, so encryption cannot change what the twin measures.
    """
    attacks = tuple(dataclasses.replace(attack, enabled=False) for attack in scenario.attacks)
    return dataclasses.replace(
        scenario,
        name=f"{scenario.name}{TWIN}",
        attacks=attacks,
        secure_sum=None,
        evaluation=dataclasses.replace(scenario.evaluation, twin=False),
    )


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
    problems: list[Problem] = []
    scenario = parse(Scenario, raw, "", problems)
    if scenario is not None:
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
    return from_dict(override(read_yaml(Path(path)), overrides), heading)
