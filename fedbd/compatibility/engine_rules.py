"""Engines, their machines, and checkpoints. Rules of ``fedbd.compatibility``."""

from __future__ import annotations

import re
from collections.abc import Iterator

from fedbd.config.scenario import Scenario, memory_in_reach
from fedbd.errors import Problem


def engine_fits(s: Scenario) -> Iterator[Problem]:
    """Engine fields that would be ignored are refused."""
    if s.engine.client_gpus and s.engine.name != "ray":
        expected = "must be 0 unless engine.name is ray"
        yield Problem(path="engine.client_gpus", expected=expected, got=f"{s.engine.client_gpus:g}")
    if s.engine.executor == "serial" and (s.engine.workers or 1) > 1:
        expected = "must be 1 or null with executor: serial"
        yield Problem(path="engine.workers", expected=expected, got=str(s.engine.workers))
    if s.engine.executor == "serial" and s.engine.name != "local":
        yield Problem(path="engine.executor", expected="must be process unless engine.name is local", got="'serial'")


def gpus_used(s: Scenario) -> Iterator[Problem]:
    """GPUs are named where fedbd hands them out itself."""
    if s.engine.cuda_devices is None:
        return
    for wrong, expected, got in (
        (s.engine.device != "cuda", "must be null unless engine.device is cuda", s.engine.device),
        (s.engine.name != "local", "must be null unless engine.name is local: ray has client_gpus", s.engine.name),
        (s.engine.executor == "serial", "must be null with executor: serial, which computes in one process", "serial"),
    ):
        if wrong:
            yield Problem(path="engine.cuda_devices", expected=expected, got=got)


def cluster_reached(s: Scenario) -> Iterator[Problem]:
    """A Ray cluster has an address, and nothing is asked of its machines that only this one has."""
    address, path = s.engine.ray_address, "engine.ray_address"
    if address is None:
        return
    if s.engine.name != "ray":
        yield Problem(path=path, expected="must be null unless engine.name is ray", got=repr(address))
    if not re.fullmatch(r"(\[[0-9a-fA-F:.]+\]|[^\s:/\[\]]+):\d{1,5}", address):
        yield Problem(path=path, expected="must be HOST:PORT, as `ray start --head` prints it", got=repr(address))
    if s.secure_sum is not None:
        expected = "must be null under encryption: the key agent serves the clients of one machine"
        yield Problem(path=path, expected=expected, remedy="set secure_sum: null, or leave ray_address out")
    if any(plan.where == "training" for plan in s.detection):
        expected = "must be null with a detector where: training: what clients noted stays on the cluster's machines"
        yield Problem(path=path, expected=expected)


def checkpoint_can_hold(s: Scenario) -> Iterator[Problem]:
    """A checkpoint holds all of a run."""
    if s.checkpoint is not None and not memory_in_reach(s):
        what = "a local defense" if s.local_defense is not None else "batch_norm: local"
        yield Problem(
            path="checkpoint",
            expected=f"must be null with {what} on engine {s.engine.name}: what clients remember lies in "
            "Flower's runtime, out of a checkpoint's reach",
            remedy="leave it out, or set engine: local",
        )


CHECKS = (
    engine_fits,
    gpus_used,
    cluster_reached,
    checkpoint_can_hold,
)
