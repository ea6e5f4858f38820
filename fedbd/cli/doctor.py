"""``fedbd doctor``: does this installation do what a run needs?"""

from __future__ import annotations

import importlib.metadata
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from fedbd.crypto.agent_client import KeyAgent, start_agent
from fedbd.crypto.ckks import Ckks, Evaluator
from fedbd.flower.executors import ProcessPoolExecutor
from fedbd.records.environment import cores
from fedbd.registry import METHODS
from fedbd.running.engines import flower_app_dir

PACKAGES = ("flwr", "ray", "torch", "torchvision", "tenseal", "numpy")
FREE_GIB = 2


@dataclass(frozen=True)
class Check:
    """One finding: what was looked at, what was found, whether it is good, and, only if not, what to do."""

    name: str
    found: str
    good: bool = True
    remedy: str | None = None


def examine() -> list[Check]:
    """Return all findings; a check that breaks is a bad finding, not an exception."""
    return [_tried(name, look) for name, look in LOOKS.items()]


def _tried(name: str, look: Callable[[], Check]) -> Check:
    try:
        found = look()
    except Exception as error:
        return Check(name, f"{type(error).__name__}: {error}", False, "reinstall fedbd with its constraints file")
    return replace(found, remedy=None) if found.good else found


def _python() -> Check:
    found = ".".join(map(str, sys.version_info[:3]))
    return Check("Python", found, sys.version_info[:2] == (3, 11), "fedbd is tested on Python 3.11")


def _packages() -> Check:
    return Check("packages", ", ".join(f"{name} {importlib.metadata.version(name)}" for name in PACKAGES))


def _devices() -> Check:
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return Check("devices", f"{cores()} cores; {', '.join(gpus) or 'no GPU (the CPU serves)'}")


def _app() -> Check:
    folder = flower_app_dir()
    missing = [name for name in ("clients/app.py", "server/app.py", "pyproject.toml") if not (folder / name).is_file()]
    return Check("Flower app", str(folder), not missing, f"missing {', '.join(missing)}: reinstall fedbd")


def _worker() -> Check:
    with ProcessPoolExecutor((flower_app_dir() / "clients" / "app.py", "app"), 1, start_timeout=60.0):
        return Check("worker process", "starts and loads the clients' app")


def _encryption() -> Check:
    values = np.arange(-3, 3, dtype=np.int64)
    with start_agent(Ckks()) as agent, KeyAgent(agent.handle) as holder:
        evaluator = Evaluator(Ckks())
        total = evaluator.add(evaluator.add(None, holder.encrypt(values)), holder.encrypt(values))
        opened, noise = holder.decrypt(evaluator.serialize(total))
    exact = bool(np.array_equal(opened, 2 * values))
    return Check("encrypted sum", f"exact, noise {noise:.1e}" if exact else "wrong", exact, "reinstall tenseal")


def _disk() -> Check:
    free = shutil.disk_usage(tempfile.gettempdir()).free / 2**30
    return Check("temporary space", f"{free:.0f} GiB free", free >= FREE_GIB, "free some space or set TMPDIR")


def _runtime() -> Check:
    tools = [name for name in ("flwr", "flower-superlink", "flower-supernode")]
    missing = [name for name in tools if not (Path(sys.executable).parent / name).exists()]
    found = "ray and deployment engines" if not missing else f"missing {', '.join(missing)}"
    return Check("Flower runtime", found, not missing, "pip install 'flwr[simulation]' into this environment")


def _methods() -> Check:
    count = sum(len(methods) for methods in METHODS.values())
    from fedbd.cli.catalog import entries  # noqa: PLC0415 - imports every method

    return Check("methods", f"{len(entries())} of {count} load", len(entries()) == count)


LOOKS: dict[str, Callable[[], Check]] = {
    "Python": _python,
    "packages": _packages,
    "devices": _devices,
    "Flower app": _app,
    "Flower runtime": _runtime,
    "methods": _methods,
    "worker process": _worker,
    "encrypted sum": _encryption,
    "temporary space": _disk,
}
