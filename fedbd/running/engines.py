"""One app, three ways to run it: worker processes, Flower's simulation runtime, SuperLink and SuperNodes.

Each takes a scenario and a folder, and leaves the same records. ``clients/`` and ``server/`` are loaded by path under
private names, so that no user's own ``server.py`` can stand in for them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from flwr.app import Context, RecordDict

from fedbd.config.plans import AttackPlan
from fedbd.config.scenario import Scenario, to_dict
from fedbd.crypto.agent_client import AgentProcess, start_agent
from fedbd.errors import RunFailed
from fedbd.flower.app_loader import load_component
from fedbd.flower.executors import ProcessPoolExecutor, SerialExecutor
from fedbd.flower.local_grid import LocalGrid
from fedbd.flower.mods import AGENT
from fedbd.flower.observer import observations
from fedbd.flower.runtime import run_app
from fedbd.fork_server import ONE_THREAD
from fedbd.records.environment import cores
from fedbd.records.record import FINISHED, SUMMARY, RunFolder, read_rounds, read_summary

Poll = Callable[[], None]
LINGER = 30.0
"""Seconds that Flower's runtime may take to end after the run's summary is written."""


def flower_app_dir() -> Path:
    """Return the folder of the Flower app: the checkout if this is one, else the copy in the wheel."""
    package = Path(__file__).resolve().parents[1]
    project = package.parent / "pyproject.toml"
    if project.is_file() and 'name = "fedbd"' in project.read_text(encoding="utf-8"):
        return package.parent
    return package / "flower-app"


def execute(
    scenario: Scenario,
    folder: Path,
    twin: Path | None,
    poll: Poll | None = None,
    *,
    start: Path | None = None,
    resume: str = "",
) -> dict[str, Any]:
    """Run a scenario on its engine.

    Args:
        scenario: What to run.
        folder: The run's folder.
        twin: The folder of the finished attack-free twin.
        poll: Called now and then while another process runs the rounds.
        start: The model that the run's warm-up left, where it starts from one.
        resume: ``same-code`` or ``other-code``: go on with the unfinished run in the folder (see ``server/app.py``).

    Returns:
        The run's summary.

    Raises:
        RunFailed: With the reason; finished rounds and the summary are on disk.
        UserError: If the folder is taken or the scenario does not fit its data.
    """
    scenario = _absolute(scenario)
    config = {"scenario-json": json.dumps(to_dict(scenario)), "out-dir": str(folder.resolve())}
    config["twin-dir"] = str(twin.resolve()) if twin is not None else ""
    config["warmed-up"] = str(start.resolve()) if start is not None else ""
    config["resume"] = resume
    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        observed = stack.enter_context(observations())
        env = {"FEDBD_OBSERVER": str(observed), **ONE_THREAD}
        agent: AgentProcess | None = None
        if scenario.secure_sum is not None:
            agent = stack.enter_context(start_agent(scenario.secure_sum.impl))
        if scenario.engine.name == "local":
            _local(scenario, config, env, agent)
        else:
            _flower(scenario, config, env, agent, folder, poll)
    summary = read_summary(folder)
    if summary is None or summary["status"] != FINISHED:
        raise RunFailed(summary["reason"] if summary else "the run ended without a summary")
    return summary


def _absolute(scenario: Scenario) -> Scenario:
    """Engines start elsewhere: a relative data folder, checkpoint or trigger's file is the caller's."""
    scenario = dataclasses.replace(scenario, attacks=tuple(map(_absolute_trigger, scenario.attacks)))
    if scenario.start is not None and scenario.start.checkpoint is not None:
        file = str(Path(scenario.start.checkpoint).expanduser().resolve())
        scenario = dataclasses.replace(scenario, start=dataclasses.replace(scenario.start, checkpoint=file))
    if scenario.data.root is None:
        return scenario
    root = str(Path(scenario.data.root).expanduser().resolve())
    return dataclasses.replace(scenario, data=dataclasses.replace(scenario.data, root=root))


def _absolute_trigger(attack: AttackPlan) -> AttackPlan:
    trigger = attack.trigger
    if not isinstance(getattr(trigger.impl, "file", None), str):
        return attack
    impl = dataclasses.replace(trigger.impl, file=str(Path(trigger.impl.file).expanduser().resolve()))
    return dataclasses.replace(attack, trigger=dataclasses.replace(trigger, impl=impl))


def _local(scenario: Scenario, config: dict[str, str], env: dict[str, str], agent: AgentProcess | None) -> None:
    logging.getLogger("flwr").setLevel(logging.WARNING)
    app_dir = flower_app_dir()
    client_env = {**env, **({"FEDBD_KEY_AGENT": agent.handle} if agent is not None else {})}
    server = load_component(app_dir, "server")
    workers = scenario.engine.workers or cores()
    factory = (app_dir / "clients" / "app.py", "app")
    with contextlib.ExitStack() as stack:
        executor: SerialExecutor | ProcessPoolExecutor
        if scenario.engine.executor == "serial":
            stack.enter_context(_environment(client_env))
            executor = stack.enter_context(SerialExecutor(factory))
        else:
            stack.enter_context(_environment({"FEDBD_OBSERVER": env["FEDBD_OBSERVER"]}))
            workers = min(workers, scenario.cohort_size)
            executor = stack.enter_context(
                ProcessPoolExecutor(
                    factory,
                    workers,
                    timeout=scenario.engine.timeout,
                    worker_env=client_env,
                    cuda_devices=gpu_names(scenario.engine.cuda_devices),
                )
            )
        grid = LocalGrid(executor, scenario.partition.clients)
        context = Context(run_id=1, node_id=1, node_config={}, state=RecordDict(), run_config=dict(config))
        server(grid=grid, context=context)  # type: ignore[operator]


def gpu_names(numbers: Sequence[int] | None) -> list[str] | None:
    """Return GPUs, numbered as this process sees them, by the names that its workers must be given.

    A scheduler that hands out GPUs 2 and 3 says so in CUDA_VISIBLE_DEVICES; here they are 0 and 1.
    """
    if numbers is None:
        return None
    seen = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    return [seen[number] if seen else str(number) for number in numbers]


class _Lingers(Exception):  # noqa: N818 - it never leaves this module
    """The run is over, its runtime is not: Ray waits for a client that never ends."""


def _ending(folder: Path, poll: Poll | None) -> Poll:
    """Return a poll that also ends a runtime which outlives its run."""
    before, since = _written(folder), 0.0

    def look() -> None:
        nonlocal since
        if poll is not None:
            poll()
        if not since and _written(folder) != before:
            since = time.monotonic()
        if since and time.monotonic() - since > LINGER:
            raise _Lingers

    return look


def _written(folder: Path) -> int:
    """Return when a run's summary was written (a run that is taken up again has one), 0 where there is none."""
    with contextlib.suppress(FileNotFoundError):
        return (folder / SUMMARY).stat().st_mtime_ns
    return 0


@contextlib.contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _flower(
    scenario: Scenario,
    config: dict[str, str],
    env: dict[str, str],
    agent: AgentProcess | None,
    folder: Path,
    poll: Poll | None,
) -> None:
    """Run under Flower's own runtime; in a deployment only SuperNodes are told where the key agent is."""
    mode = scenario.engine.name
    handle = {AGENT: agent.handle} if agent is not None else {}
    passed = {name: os.environ[name] for name in ("FEDBD_DATA", "FEDBD_CACHE") if name in os.environ}
    client_env = {**passed, **env}
    if mode == "ray" and agent is not None:  # one process tree: the runtime has no place for a node's own settings
        client_env["FEDBD_KEY_AGENT"] = agent.handle
    try:
        outcome = run_app(
            flower_app_dir(),
            mode="ray" if mode == "ray" else "deployment",
            clients=scenario.partition.clients,
            run_config=config,
            work_dir=folder / "engine",
            node_config=(lambda _: handle) if mode == "deployment" else None,
            server_env={**passed, **env},
            client_env=client_env,
            client_gpus=scenario.engine.client_gpus,
            ray_address=scenario.engine.ray_address,
            workers=scenario.engine.workers or cores(),
            poll=_ending(folder, poll),
        )
    except _Lingers:
        return
    if outcome.status != "completed" and read_summary(folder) is None:
        lost = {"name": scenario.name, "seed": scenario.seed, "status": "failed", "reason": outcome.reason}
        RunFolder(folder, resume=True).write_summary({**lost, "rounds": len(read_rounds(folder)[1:])})
        raise RunFailed(f"{outcome.reason} (logs: {outcome.logs})")
