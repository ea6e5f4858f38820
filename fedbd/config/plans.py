"""The sections of a scenario, as frozen dataclasses: their fields are the YAML schema, their defaults the defaults."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Le, MinLen

from fedbd.config.schema import Kind, Method
from fedbd.targets import TargetField
from fedbd.training import TrainingPlan

Positive = Annotated[int, Ge(1)]
Share = Annotated[float, Gt(0), Le(1)]
OFF = "off"
"""Another word for null in the field ``checkpoint``."""


@dataclass(frozen=True, kw_only=True)
class DataPlan:
    """Which data set, and where its files lie (``root``; else the environment variable FEDBD_DATA).

    Attributes:
        method: The data source itself.
        root: The folder of data files; null: the one that the environment variable FEDBD_DATA names.
    """

    method: Annotated[Method, Kind("data")]
    root: str | None = None


@dataclass(frozen=True, kw_only=True)
class PartitionPlan:
    """How the training samples are split among so many clients.

    Attributes:
        method: The partitioner itself.
        clients: How many clients there are.
    """

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
    """Which clients: exactly one of a share of all, a number, or a list of ids.

    Attributes:
        share: This share of all clients, rounded, at least one; who they are is drawn from the seed.
        count: So many clients, drawn from the seed.
        ids: These clients.
    """

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
    """Rounds from ``first`` to ``last``, both included; ``last: null`` is the end of the run.

    Attributes:
        first: First round.
        last: Last round, included; null: the end of the run.
    """

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
class StartPlan:
    """The model that a run starts from, in place of a fresh one: exactly one of a checkpoint and a warm-up.

    Attributes:
        checkpoint: A safetensors file or a PyTorch state dict (alone or under ``state_dict``) that fits the model in
            every name and shape; a relative path starts where the command runs. fedbd cannot tell what it was trained
            on: a central training on the same data has seen most of the trusted images, which are then easier for it
            than new ones; a warm-up has not.
        warm_up: The result of so many clean rounds from the fresh model: same data, partition, trusted set, training,
            cohort size and weights, strategy, server rate and seed, and nobody who attacks, defends, encrypts or
            fails. ``fedbd run`` runs them first, as a job of its own, once for all scenarios that share them
            (``runs/warm-ups/``). The run's own rounds, learning rates and server optimizer start anew.
    """

    checkpoint: Annotated[str, MinLen(1)] | None = None
    warm_up: Positive | None = None

    def problems(self) -> list[tuple[str, str]]:
        """Return what is wrong between the fields."""
        given = [name for name in ("checkpoint", "warm_up") if getattr(self, name) is not None]
        found = " and ".join(given) or "none"
        return [] if len(given) == 1 else [("", f"must hold exactly one of checkpoint and warm_up, got {found}")]


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
        target: Target label, the same for all images; or ``all_to_all``: of an image of class y class y + 1, and 0 of
            one of the last class.
        trigger: The trigger.
        training: The attackers' own training plan; null: the scenario's.
    """

    method: Annotated[Method, Kind("attack")]
    clients: Selection
    target: TargetField
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


def _due(every: int, rounds: tuple[int, ...] | None, round_: int) -> bool:
    return round_ in rounds if rounds is not None else round_ % every == 0


@dataclass(frozen=True, kw_only=True)
class CleanupPlan:
    """One cleanup: when it runs and what becomes of its result.

    Attributes:
        method: The cleanup itself.
        label: Its name in the records; default: the method's name.
        mode: ``if_stopped_now``: a copy is repaired and measured; ``in_loop``: the next round starts from the repaired.
        every: Run every so many rounds.
        rounds: Run in exactly these rounds instead.
        rollback: ``in_loop``: keep the unrepaired model if accuracy on the trusted validation part falls by more than
            this; null: never.
        mask: ``in_loop``, for methods that prune. ``release``: clients train the pruned channels on, and they may grow
            back. ``persist``: the server switches them off again after every later round.
        server_optimizer_state: ``in_loop``: what becomes of the Flower strategy's momentum and moments, which were
            gathered before the repair: ``keep`` or ``reset``.
    """

    method: Annotated[Method, Kind("cleanup")]
    label: str | None = None
    mode: Literal["if_stopped_now", "in_loop"] = "if_stopped_now"
    every: Positive = 1
    rounds: Annotated[tuple[Positive, ...], MinLen(1)] | None = None
    rollback: Annotated[float, Ge(0), Le(1)] | None = 0.1
    mask: Literal["persist", "release"] = "release"
    server_optimizer_state: Literal["keep", "reset"] = "keep"

    @property
    def key(self) -> str:
        """The name in the records."""
        return self.label or self.method.name

    def due(self, round_: int) -> bool:
        """Return whether the cleanup runs in a round."""
        return _due(self.every, self.rounds, round_)


@dataclass(frozen=True, kw_only=True)
class EvasionPlan:
    """One way to make adversarial examples, for the comparison of both kinds of malicious inputs."""

    method: Annotated[Method, Kind("evasion")]


@dataclass(frozen=True, kw_only=True)
class DetectionPlan:
    """One sample detector: over incoming inputs on the server, or over polluted clients' own training data.

    Attributes:
        method: The detector itself.
        label: Its name in the records; default: the method's name.
        every: Run every so many rounds.
        rounds: Run in exactly these rounds instead.
        where: ``incoming``: clean and triggered test images, mixed, on the server. ``training``: each polluted client
            scores its own training data with the global model that it received (it holds no trusted data).
        honest: ``training``: honest clients score their data, too: what the detector says where there is none to
            find.
        samples: ``incoming``: so many clean and so many triggered images (fewer where the test set has fewer).
        adversarial: ``incoming``: also tell clean, triggered and adversarial inputs apart, pair by pair; the latter are
            made on the served model from other clean test images.
    """

    method: Annotated[Method, Kind("detection")]
    label: str | None = None
    every: Positive = 1
    rounds: Annotated[tuple[Positive, ...], MinLen(1)] | None = None
    where: Literal["incoming", "training"] = "incoming"
    honest: bool = False
    samples: Positive = 1000
    adversarial: tuple[EvasionPlan, ...] = ()

    @property
    def key(self) -> str:
        """The name in the records."""
        return self.label or self.method.name

    def due(self, round_: int) -> bool:
        """Return whether the detector runs in a round."""
        return _due(self.every, self.rounds, round_)


@dataclass(frozen=True, kw_only=True)
class StrategyPlan:
    """The Flower strategy inside, by name or ``package.module:Class``, with its constructor's arguments.

    Attributes:
        name: A registered strategy, or ``package.module:Class``.
        arguments: Its constructor's arguments, of the types that it names; those that decide who takes part are
            ``cohort``'s. Of Flower's own, rates and ``tau`` are above 0, momentum and ``beta`` from 0 to below 1.
    """

    name: str = "fedavg"
    arguments: dict[str, float | int | bool | str] = dataclasses.field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class EvaluationPlan:
    """What is measured beside the run itself.

    Attributes:
        twin: Also run the attack-free twin, for the floor of the attack success rate and the price of a defense.
        relearn: The re-learning test: after the run, the federation goes on, attacked, from what each cleanup made of
            the model in the last round in which it acted; attack success is measured after so many further rounds. Two
            controls go on beside it: the model that nothing repaired and, where there is one, the attack-free twin's.
        keep_models: Keep the models of these rounds, as the next round starts from them: for ``fedbd inspect`` and
            ``fedbd clean`` round by round.
        every: Measure the model every so many rounds; always at the start, after the last round, and where a cleanup or
            detector is due. What was not measured is null, and the run's figures are means over what was.
        samples: Measure on so many test images, drawn once per seed with the classes' shares, in all rounds and the
            twin's; null: on the whole test set.
    """

    twin: bool = True
    relearn: Annotated[tuple[Positive, ...], MinLen(1)] | None = None
    keep_models: Annotated[tuple[Positive, ...], MinLen(1)] | None = None
    every: Positive = 1
    samples: Positive | None = None


Stage = Literal["train", "encrypt", "decrypt"]
_ANY: tuple[Stage, ...] = ("train", "encrypt", "decrypt")
FAULT_STAGES: dict[str, tuple[Stage, ...]] = {
    "vanish": _ANY,
    "hang": _ANY,
    "die": _ANY,
    "raise": _ANY,
    "nan": ("train",),
    "wrong_shape": _ANY,
    "extra_metric": _ANY,
    "huge_count": ("train",),
    "renamed": _ANY,
    "garbage": _ANY,
}
"""Kind of fault -> the stages at which a client can fail that way."""


@dataclass(frozen=True, kw_only=True)
class FaultPlan:
    """One fault: how some clients fail, at which stage, when. Who they are is drawn apart from any attack's clients.

    Attributes:
        kind: ``vanish``: the reply never comes, as if the network lost it. ``hang``: the client never ends. ``die``:
            its process ends amid the work. ``raise``: its code raises. ``nan``: NaN and infinity in the weights.
            ``wrong_shape``: an array (a ciphertext, an opened sum) of another size. ``extra_metric``: a metric that
            nobody asked for. ``huge_count``: it claims 1e9 examples. ``renamed``: an array under another name.
            ``garbage``: random bytes in place of an array, a ciphertext or an opened sum.
        clients: Who.
        stage: ``train``: the local weights, before any encryption. Under encryption also ``encrypt``: the encrypted
            reply, and ``decrypt``: the answer of a client that is asked to open sums.
        rounds: When.
        probability: Chance that a chosen client fails in a round, drawn anew for each.
    """

    kind: Literal[
        "vanish", "hang", "die", "raise", "nan", "wrong_shape", "extra_metric", "huge_count", "renamed", "garbage"
    ]
    clients: Selection
    stage: Stage = "train"
    rounds: Window = Window()
    probability: Annotated[float, Gt(0), Le(1)] = 1.0

    def problems(self) -> list[tuple[str, str]]:
        """Return what is wrong between the fields."""
        possible = FAULT_STAGES[self.kind]
        if self.stage in possible:
            return []
        return [("stage", f"must be {' or '.join(possible)} where kind is {self.kind}, got '{self.stage}'")]


@dataclass(frozen=True, kw_only=True)
class CheckpointPlan:
    """When a run saves where it stands, for ``fedbd resume``; never changes a record.

    Attributes:
        every: After every so many rounds, and after the last one.
    """

    every: Positive = 1


@dataclass(frozen=True, kw_only=True)
class EnginePlan:
    """How the run is carried out; never changes a record.

    Attributes:
        name: ``local`` (processes of this machine), ``ray`` (Flower's simulation runtime), ``deployment`` (SuperLink
            and SuperNodes on this machine).
        workers: Processes that train clients; null: as many as cores.
        executor: ``local`` only: ``process``, or ``serial`` in the driver itself.
        device: Where clients compute; the server evaluates and repairs on the CPU.
        cuda_devices: ``local`` with ``device: cuda``: GPUs by their numbers as this process sees them. Worker k uses
            the k-th of them, round and round, so several workers may share one; null: all use the first.
        client_gpus: ``ray`` only: the fraction of a GPU per client.
        ray_address: ``ray`` only: HOST:PORT of a running Ray cluster to compute on; null: a Ray of this run's own.
        timeout: Seconds that a client may take for one message. ``local`` ends one that takes longer and replaces its
            worker. ``ray`` and ``deployment`` cannot: the server waits so long for each turn of the workers, then goes
            on without the client, and what Flower itself takes to start, queue and poll counts.
    """

    name: Literal["local", "ray", "deployment"] = "local"
    workers: Positive | None = None
    executor: Literal["process", "serial"] = "process"
    device: Literal["cpu", "cuda"] = "cpu"
    cuda_devices: Annotated[tuple[Annotated[int, Ge(0)], ...], MinLen(1)] | None = None
    client_gpus: Annotated[float, Ge(0)] = 0.0
    ray_address: Annotated[str, MinLen(1)] | None = None
    timeout: Annotated[float, Gt(0)] = 3600.0
