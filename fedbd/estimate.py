"""What a run will take, from a few timed steps: ``fedbd run --dry-run``. Nothing is started and nothing is written.

Timed on this machine, now: an honest client's and an attacker's training on a few batches of client 0's data, a chunk
of the evaluation clean and triggered, and where updates are encrypted one encryption, addition and decryption. The rest
is arithmetic over the rounds' cohorts. Not in it: the start of the run (imports, worker processes), cleanups and
detectors, a local defense's own work, and what other programs take from the machine meanwhile.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from fedbd.config.plans import AttackPlan
from fedbd.config.scenario import Scenario, twin_of, warm_up_of
from fedbd.crypto.agent_client import KeyAgent, start_agent
from fedbd.crypto.ckks import Evaluator
from fedbd.metrics import logits
from fedbd.params import assign, flatten
from fedbd.prepared import Prepared
from fedbd.records.environment import cores
from fedbd.roles import assignment, attack_window, draw_cohort, expected_images, role_of
from fedbd.seeding import torch_rng
from fedbd.sums import to_row
from fedbd.training import TrainingPlan, train
from fedbd.types import Role, Samples, Vector

BATCHES, CHUNK, TURNS, COHORTS = 8, 250, 3, 500
DECRYPTORS = 2
HEADER = 128
"""Bytes before the values of an array in a message."""


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What a run will take; ``per_round`` and ``twin_per_round`` are means over the rounds.

    Attributes:
        name: The scenario's.
        seed: Its seed.
        rounds: Its rounds.
        workers: Processes that train at once.
        seconds: Of one round: {train, encrypt, aggregate, decrypt, evaluate, total}.
        twin_seconds: Of one round of the attack-free twin; None where none is run.
        run_seconds: Of all rounds, those of the twin included.
        parameters: The model's float weights.
        data_bytes: Decoded images, which all processes share.
        process_bytes: Peak memory of this process after these steps: about what each of ``workers`` + 1 will hold, the
            shared images and libraries counted in each.
        bytes_down: To the clients in a round.
        bytes_up: From the clients in a round.
        not_counted: What the scenario has and the figures leave out.
    """

    name: str
    seed: int
    rounds: int
    workers: int
    seconds: dict[str, float]
    twin_seconds: dict[str, float] | None
    run_seconds: float
    parameters: int
    data_bytes: int
    process_bytes: int
    bytes_down: int
    bytes_up: int
    not_counted: list[str]


@dataclass(frozen=True, kw_only=True)
class Pace:
    """Seconds of single steps.

    Attributes:
        image: Of an honest client, per image trained on.
        poisoned: Of an attacker, the same.
        client: Beside training, per client: weights in and out.
        clean: Of the evaluation, per image on one core.
        triggered: The same with the trigger.
        encrypt: Of one row; 0 in the clear, as those below.
        add: Of one ciphertext.
        decrypt: Of one sum.
        blob: Bytes of one ciphertext.
    """

    image: float
    poisoned: float
    client: float
    clean: float
    triggered: float
    encrypt: float = 0.0
    add: float = 0.0
    decrypt: float = 0.0
    blob: int = 0


def estimate(prepared: Prepared, workers: int | None = None) -> Estimate:
    """Time a few steps of a scenario and return what its run will take.

    Args:
        prepared: The scenario with its data and model.
        workers: Processor cores to use; None: all.
    """
    scenario = prepared.scenario
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as clients and server do
    try:
        pace = _pace(prepared)
    finally:
        torch.set_num_threads(threads)
    at_once = 1 if scenario.engine.executor == "serial" else scenario.engine.workers or workers or cores()
    at_once = min(at_once, scenario.cohort_size)
    own = _round(prepared, pace, at_once, attacked=True)
    twin = _twin_round(prepared, pace, at_once)
    travels = [e for name, e in prepared.model.state_dict().items() if name not in prepared.own_names]
    state = sum(HEADER + entry.numel() * entry.element_size() for entry in travels)
    opened = 8 * (prepared.exchanged.size + 1) * scenario.buckets * DECRYPTORS
    encrypted = scenario.secure_sum is not None
    images = [prepared.dataset.train.images, prepared.dataset.test.images]
    cohort = scenario.cohort_size
    return Estimate(
        name=scenario.name,
        seed=scenario.seed,
        rounds=scenario.rounds,
        workers=at_once,
        seconds=own,
        twin_seconds=twin,
        run_seconds=scenario.rounds * (own["total"] + (twin["total"] if twin is not None else 0.0)),
        parameters=prepared.layout.size,
        data_bytes=sum(image.numel() * image.element_size() for image in images),
        process_bytes=_peak_bytes(),
        bytes_down=cohort * state + (DECRYPTORS * scenario.buckets * pace.blob if encrypted else 0),
        bytes_up=cohort * pace.blob + opened if encrypted else cohort * state,
        not_counted=_not_counted(scenario),
    )


def _pace(prepared: Prepared) -> Pace:
    """Time the steps."""
    scenario = prepared.scenario
    model, whole = prepared.model, prepared.federation.client(0)
    plan = dataclasses.replace(scenario.training, epochs=1)
    data = whole.subset(np.arange(min(len(whole), BATCHES * plan.batch_size))).to(scenario.engine.device)
    weights = flatten(model)
    rng = torch_rng(scenario.seed, "estimate")

    def reset() -> None:
        assign(model, weights)
        flatten(model)

    client = timed(reset)
    image = timed(lambda: train(model, data, plan, rng)) / len(data)
    reset()
    attack = next((attack for attack in scenario.attacks if attack.role == "attacker" and attack.enabled), None)
    poisoned = image if attack is None else _poisoned(prepared, attack, data, plan)
    reset()
    test, judged = prepared.measured, prepared.new_model().eval()  # the server's, on the CPU
    chunk = test.subset(np.arange(min(len(test), CHUNK)))
    clean = timed(lambda: logits(judged, chunk, threads=1)) / len(chunk)
    triggered = sum(
        timed(lambda stamp=trigger.stamp: logits(judged, chunk, stamp=stamp, threads=1)) / len(chunk)  # type: ignore[misc]
        for trigger, _ in prepared.triggers.values()
    )
    pace = Pace(image=image, poisoned=poisoned, client=client, clean=clean, triggered=triggered)
    return _with_encryption(prepared, weights, pace)


def _poisoned(prepared: Prepared, attack: AttackPlan, data: Samples, plan: TrainingPlan) -> float:
    own = dataclasses.replace(attack.training or plan, epochs=1)
    weights = flatten(prepared.model)
    rng = torch_rng(prepared.scenario.seed, "estimate/attack")
    ctx = prepared.attack_context(attack, weights)
    return timed(lambda: attack.method.impl.fit(prepared.model, data, own, ctx, rng)) / len(data)


def _with_encryption(prepared: Prepared, weights: Vector, pace: Pace) -> Pace:
    """Time one encryption, one addition and one decryption, by a key agent as in a run."""
    scheme = prepared.scenario.secure_sum
    if scheme is None:
        return pace
    row = to_row(np.zeros_like(weights), 1.0)
    evaluator = Evaluator(scheme.impl)
    with start_agent(scheme.impl) as agent, KeyAgent(agent.handle) as holder:
        blob = holder.encrypt(row)
        total = evaluator.serialize(evaluator.add(None, blob))
        return dataclasses.replace(
            pace,
            encrypt=timed(lambda: holder.encrypt(row)),
            add=timed(lambda: evaluator.add(None, blob)),
            decrypt=timed(lambda: holder.decrypt(total)),
            blob=len(blob),
        )


def timed(step: Callable[[], object]) -> float:
    """Return the seconds of a step: the median of a few, after one that nobody counts."""
    step()
    found = []
    for _ in range(TURNS):
        started = time.perf_counter()
        step()
        found.append(time.perf_counter() - started)
    return statistics.median(found)


def _round(prepared: Prepared, pace: Pace, workers: int, *, attacked: bool) -> dict[str, float]:
    """Return the seconds of a mean round."""
    scenario = prepared.scenario
    rounds = [_jobs(prepared, pace, round_, attacked) for round_ in _looked_at(scenario.rounds)]
    trained, sent = (
        statistics.fmean(_spread([job + more for job in jobs], workers) for jobs in rounds)
        for more in (0.0, pace.encrypt)
    )
    every = scenario.evaluation.every
    measured = scenario.rounds // every + (scenario.rounds % every > 0)  # the last round always is
    images = len(prepared.measured)
    threads = min(cores(), -(-images // CHUNK))
    found = {
        "train": trained,
        "encrypt": sent - trained,  # the agent has a process for each client that asks
        "aggregate": scenario.cohort_size * pace.add,
        "decrypt": scenario.buckets * -(-DECRYPTORS // workers) * pace.decrypt,
        "evaluate": measured / scenario.rounds * images * (pace.clean + pace.triggered) / threads,
    }
    return {**found, "total": sum(found.values())}


def _twin_round(prepared: Prepared, pace: Pace, workers: int) -> dict[str, float] | None:
    """Return the seconds of a mean round of the attack-free twin, None where there is none."""
    scenario = prepared.scenario
    if not scenario.evaluation.twin or attack_window(scenario) is None:
        return None
    if twin_of(scenario).secure_sum is None:
        pace = dataclasses.replace(pace, encrypt=0.0, add=0.0, decrypt=0.0)
    return _round(prepared, pace, workers, attacked=False)


def _looked_at(rounds: int) -> list[int]:
    """Return the rounds whose cohorts are drawn: all, or so many spread over a long run."""
    return sorted({int(round_) for round_ in np.linspace(1, rounds, min(rounds, COHORTS))})


def _jobs(prepared: Prepared, pace: Pace, round_: int, attacked: bool) -> list[float]:
    """Return the seconds that each client of a round trains."""
    scenario, sizes = prepared.scenario, prepared.federation.sizes
    jobs = []
    assigned = assignment(scenario)
    for client in draw_cohort(scenario, round_):
        attack = assigned.get(client)
        attacks = attacked and role_of(attack, round_) is Role.ATTACKER
        images = (
            expected_images(scenario, attack, sizes[client], round_)
            if attacks
            else scenario.training.epochs * sizes[client]
        )
        jobs.append(pace.client + images * (pace.poisoned if attacks else pace.image))
    return jobs


def _spread(jobs: list[float], workers: int) -> float:
    """Return when the last worker is done, if the longest jobs are taken first."""
    loads = [0.0] * workers
    for job in sorted(jobs, reverse=True):
        loads[loads.index(min(loads))] += job
    return max(loads)


def _not_counted(scenario: Scenario) -> list[str]:
    guards = [f"{path.partition('[')[0]} {plan.method.name}" for path, plan in scenario.guards]
    local = [f"local defense {scenario.local_defense.name}"] if scenario.local_defense is not None else []
    relearn = ["the re-learning test"] if scenario.evaluation.relearn is not None else []
    warm_up = ["the warm-up"] if warm_up_of(scenario) is not None else []
    return ["the start of the run", *warm_up, *local, *guards, *relearn]


def _peak_bytes() -> int:
    import resource  # noqa: PLC0415 - not on every system

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
