"""The ServerApp: from the run config to a run folder with one line per round and a summary."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import resource
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import safetensors.numpy
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context
from flwr.serverapp import Grid, ServerApp
from torch import nn

from fedbd.config.run_text import message_text, scenario_text
from fedbd.config.scenario import Scenario, fingerprint, from_dict, load_scenario
from fedbd.data.digest import digest
from fedbd.errors import FedBDError
from fedbd.flower.arrays import SCENARIO, pack_all, view_all
from fedbd.flower.local_grid import LocalGrid
from fedbd.flower.mods import checksum
from fedbd.flower.observer import collect
from fedbd.flower.proxies import OrderedGrid
from fedbd.flower.strategies import inner_strategy
from fedbd.flower.strategy import AfterRound, DefendedStrategy
from fedbd.models.checkpoint import load_checkpoint, save_safetensors
from fedbd.params import assign, flatten, is_weight, join
from fedbd.prepared import START_ENTRIES, Prepared, prepared_from_json
from fedbd.records.checkpoint import Checkpoint, Stamp, remove_checkpoints, stamp_of
from fedbd.records.environment import cores
from fedbd.records.record import FINISHED, RunFolder, read_rounds, resumed_from
from fedbd.roles import attack_window, draw_cohort, expected_images, planned_window
from fedbd.summary import summarize
from fedbd.types import Vector
from fedbd.weighing import Weighing

from .masking import load_mask, save_mask
from .relearning import relearn
from .saving import APP_DIR, Saver, take_up
from .starting_point import StartingPoint, started_from
from .step import Rounds

MODEL = "model.safetensors"
VERSIONS = ("fedbd", "flwr", "torch", "tenseal", "numpy")

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run a scenario on whatever engine the grid belongs to.

    Run config: ``scenario-json`` (a resolved scenario) or ``scenario`` (a file in the app), ``out-dir`` (the run's
    folder), ``twin-dir`` (the folder of the attack-free twin, or empty), ``warmed-up`` (the model that the scenario's
    warm-up left, or empty), ``resume`` (empty; ``same-code`` or ``other-code``: go on with the unfinished run in the
    folder, and what may have written it).
    """
    config = context.run_config
    text = str(config.get("scenario-json", ""))
    here = Path(__file__).resolve().parent.parent
    scenario = from_dict(json.loads(text)) if text else load_scenario(here / str(config["scenario"]))
    out = Path(str(config.get("out-dir") or f"runs/{scenario.name}/seed-{scenario.seed}"))
    twin, warmed = (str(config.get(name, "")) for name in ("twin-dir", "warmed-up"))
    resume = str(config.get("resume", ""))
    place = RunFolder(out, resume=bool(resume))
    serve(grid, scenario, place, Path(twin) if twin else None, Path(warmed) if warmed else None, resume)


def serve(
    grid: Grid,
    scenario: Scenario,
    folder: RunFolder,
    twin: Path | None,
    warmed: Path | None = None,
    resume: str = "",
) -> None:
    """Carry out a run; whatever ends it, the finished rounds and a summary with the reason stay on disk.

    Args:
        grid: The engine's grid.
        scenario: What to run.
        folder: Where to write.
        twin: The folder of the finished attack-free twin, or none.
        warmed: The model that the warm-up left, where the scenario starts from one.
        resume: See ``main``.
    """
    started = time.perf_counter()
    # Server-side training must give the same bits on any machine; evaluation spreads over cores by itself.
    torch.set_num_threads(1)
    prepared = Prepared(scenario, prepared_from_json(message_text(scenario)).federation)  # clients are told less
    stamp = stamp_of(scenario, digest(prepared.dataset), APP_DIR)
    checkpoint = take_up(folder, stamp, other_code=resume == "other-code") if resume else None
    folder.write_scenario(scenario_text(scenario))
    if not resume:
        folder.write_environment(threads=1)
    observed = Path(os.environ.get("FEDBD_OBSERVER") or folder.path / "observations")
    rounds = Rounds(
        prepared=prepared,
        folder=folder,
        twin={line["round"]: line for line in read_rounds(twin)} if twin is not None else {},
        collect=lambda round_: collect(observed, round_),
        checksum=checksum,
        warmed=warmed,
    )
    status, reason = FINISHED, ""
    relearned: dict[str, Any] | None = None
    try:
        _train(grid, scenario, prepared, rounds, folder, stamp, checkpoint)
        relearned = _relearn(grid, scenario, prepared, rounds, twin)
    except BaseException as error:
        status = "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
        if isinstance(error, FedBDError):
            reason = str(error)
        elif status == "failed":
            reason = f"{type(error).__name__}: {error}".removesuffix(": ")
        raise
    finally:
        seconds = time.perf_counter() - started + _seconds_before(checkpoint, rounds)
        summary = _summary(scenario, rounds, status, reason, seconds)
        summary |= {"data_sha256": stamp.data, "peak_memory_bytes": _peak_memory(grid)}
        began = {"started_from": started_from(scenario, warmed), "resumed_from": resumed_from(folder.path)}
        began["twin"] = os.path.relpath(twin, folder.path) if twin is not None else None
        folder.write_summary({**summary, **began, "relearning": relearned})
    remove_checkpoints(folder.path)


def _train(
    grid: Grid,
    scenario: Scenario,
    prepared: Prepared,
    rounds: Rounds,
    folder: RunFolder,
    stamp: Stamp,
    checkpoint: Checkpoint | None,
) -> None:
    strategy = defended(scenario, prepared, rounds.after_round)
    saver = Saver(scenario=scenario, folder=folder, grid=grid, strategy=strategy, rounds=rounds, stamp=stamp)
    arrays = _started(prepared, rounds) if checkpoint is None else saver.restore(checkpoint)
    with _drawing(scenario, prepared, folder):
        if strategy.done < scenario.rounds:
            arrays = strategy.start(
                _ordered(grid, scenario, prepared, rounds),
                arrays,
                num_rounds=scenario.rounds - strategy.done,
                timeout=patience(scenario),
                train_config=_told(prepared, rounds),
                evaluate_fn=saver.save,
            ).arrays
        save_safetensors(_last_model(prepared, rounds, arrays), folder.path / MODEL)
        save_mask(folder.path, rounds.mask)


@contextlib.contextmanager
def _drawing(scenario: Scenario, prepared: Prepared, folder: RunFolder) -> Iterator[None]:
    """Draw the triggers while the first clients train: loading matplotlib and drawing take a second."""

    def draw() -> None:
        from fedbd.report.trigger_picture import draw_triggers  # noqa: PLC0415 - matplotlib

        triggers = {attack.key: attack.trigger.impl for attack in scenario.attacks}
        draw_triggers(folder.path / "triggers.png", prepared.dataset.test, triggers)

    with ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        drawn = pool.submit(draw) if scenario.attacks else None
        yield
        if drawn is not None:
            drawn.result()


def _started(prepared: Prepared, rounds: Rounds) -> ArrayRecord:
    """Write round 0; return what travels of the model that the run starts from."""
    model = prepared.start_model(rounds.warmed)
    rounds.start(prepared.sent(flatten(model)))
    return pack_all({n: entry.numpy() for n, entry in model.state_dict().items() if n not in prepared.own_names})


def _told(prepared: Prepared, rounds: Rounds) -> ConfigRecord:
    """Return what every train message says: the scenario, and what clients keep to themselves as the start has it.

    A fresh model's entries are known to everybody.
    """
    told: dict[str, str | bytes] = {SCENARIO: message_text(prepared.scenario)}
    if prepared.own_names and prepared.scenario.start is not None:
        told[START_ENTRIES] = safetensors.numpy.save(prepared.own_entries(rounds.begun))
    return ConfigRecord(told)  # type: ignore[arg-type]


def _last_model(prepared: Prepared, rounds: Rounds, arrays: ArrayRecord) -> nn.Module:
    """Return the model with the weights that the run ends with."""
    state = view_all(arrays)
    weights = join(state, prepared.exchanged)
    if prepared.own_names:
        return rounds.model(weights)
    model = prepared.new_model()
    assign(model, weights, {name: entry for name, entry in state.items() if not is_weight(entry)})
    return model


def _seconds_before(checkpoint: Checkpoint | None, rounds: Rounds) -> float:
    """Return what the rounds took that an earlier process did, as far as their lines tell."""
    done = checkpoint.round if checkpoint is not None else -1
    return sum(line["seconds"]["total"] or 0.0 for line in rounds.lines if line["round"] <= done)


def _ordered(grid: Grid, scenario: Scenario, prepared: Prepared, rounds: Rounds) -> OrderedGrid:
    ordered = OrderedGrid(grid, scenario.partition.clients)
    if isinstance(grid, LocalGrid):
        sizes, assigned = prepared.federation.sizes, prepared.assigned

        def cost(client: int) -> int:
            return expected_images(scenario, assigned.get(client), sizes[client], len(rounds.lines))

        ordered.cost = cost
    return ordered


def _relearn(
    grid: Grid, scenario: Scenario, prepared: Prepared, rounds: Rounds, twin: Path | None
) -> dict[str, Any] | None:
    """Carry out the re-learning test; None where it is not wanted or no cleanup acted."""
    points = dict(rounds.repaired)
    if scenario.evaluation.relearn is None or not points:
        return None
    used = sorted({point.round for point in points.values()})
    latest = used[-1]
    for round_ in used:  # a control for each round that a repaired model goes on from, the latest under the plain name
        points["none" if round_ == latest else f"none, round {round_}"] = rounds.unrepaired[round_]
    if twin is not None and latest == scenario.rounds and (twin / MODEL).is_file():
        clean = prepared.new_model()
        load_checkpoint(clean, twin / MODEL)
        points["twin"] = StartingPoint(round=latest, weights=flatten(clean), mask=load_mask(twin))
    ordered = _ordered(grid, scenario, prepared, rounds)
    return relearn(ordered, prepared, points, lambda other, hook: defended(other, prepared, hook))


def patience(scenario: Scenario) -> float:
    """Return the seconds for one exchange: clients take turns on the workers, each with its own timeout."""
    engine = scenario.engine
    alone = engine.name == "local" and engine.executor == "serial"
    turns = -(-scenario.cohort_size // (1 if alone else engine.workers or cores()))
    return scenario.engine.timeout * turns


def defended(scenario: Scenario, prepared: Prepared, after_round: AfterRound) -> DefendedStrategy:
    """Return the strategy of a scenario, with what follows a round behind it."""
    average = sum(prepared.federation.sizes) / scenario.partition.clients
    return DefendedStrategy(
        inner_strategy(scenario.strategy.name, scenario.strategy.arguments),
        aggregation=scenario.aggregation.impl,
        secure_sum=scenario.secure_sum.impl if scenario.secure_sum is not None else None,
        bucket_size=scenario.bucket_size,
        server_rate=scenario.server_rate,
        seed=scenario.seed,
        cohort=lambda round_: draw_cohort(scenario, round_),
        clients=scenario.partition.clients,
        weighing=Weighing(
            weighting=scenario.cohort.weighting,
            average_examples=average,
            largest=scenario.cohort.largest_weight,
        ),
        on_client_failure=scenario.on_client_failure,
        trusted=prepared.federation.trusted,
        build=lambda weights: _model_of(prepared, weights),
        frozen=prepared.batch_norm_names if scenario.batch_norm == "frozen" else (),
        after_round=after_round,
        timeout=patience(scenario),
    )


def _model_of(prepared: Prepared, weights: Vector) -> nn.Module:
    """Return a new model with these weights, in eval mode."""
    model = prepared.new_model()
    assign(model, weights)
    return model.eval()


def _peak_memory(grid: Grid) -> int:
    """Return the most memory that one of this process, its children and the local engine's workers held, in bytes."""
    held = [resource.getrusage(who).ru_maxrss * 1024 for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return max(*held, grid.peak_memory() if isinstance(grid, LocalGrid) else 0)


def _summary(scenario: Scenario, rounds: Rounds, status: str, reason: str, seconds: float) -> dict[str, Any]:
    measures = summarize(rounds.lines, attack_window(scenario), scenario.rounds, planned_window(scenario))
    return {
        "name": scenario.name,
        "seed": scenario.seed,
        "status": status,
        "reason": reason or None,
        "rounds": len([line for line in rounds.lines if line["round"] > 0]),
        "planned_rounds": scenario.rounds,
        **measures,
        "cipher_noise": rounds.noise,
        "fingerprint": fingerprint(scenario),
        "seconds_total": seconds,
        "versions": {name: importlib.metadata.version(name) for name in VERSIONS},
    }
