"""What a run ran on: ``environment.json``. Versions, processor, devices, commit; no host name, user or path."""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
from collections.abc import Sequence
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = ("fedbd", "flwr", "ray", "torch", "torchvision", "tenseal", "numpy", "scipy", "scikit-learn", "safetensors")


def describe(*, devices: Sequence[str] = (), threads: int | None = None) -> dict[str, Any]:
    """Return the environment as plain JSON values, null where something cannot be found out.

    Args:
        devices: What clients and server compute on, as the engine names them.
        threads: Threads per client, where the engine fixed them.
    """
    import torch  # noqa: PLC0415 - slow to import, and whoever only reads records needs no torch

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "torch_build": {
            "version": str(torch.__version__),
            "commit": torch.version.git_version,
            "cuda": torch.version.cuda,
            "cpu_capability": torch.backends.cpu.get_cpu_capability(),
            "deterministic_algorithms": torch.are_deterministic_algorithms_enabled(),
        },
        "platform": platform.platform(),
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "cores_usable": len(os.sched_getaffinity(0)),
        "memory_bytes": memory(),
        "gpus": gpus,
        "devices": list(devices),
        "threads": threads,
        "git": _git(Path(__file__).resolve().parent),
    }


def peak_memory(pid: int | None) -> int:
    """Return the most memory that a living process ever held, in bytes; 0 where the system does not tell."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), 0)


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _cpu() -> str | None:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or None


def _git(folder: Path) -> dict[str, Any] | None:
    """Return commit and cleanness of the checkout that this package is tracked in, or None outside one."""
    commit = _ask_git(folder, "rev-parse", "HEAD")
    if not commit or not _ask_git(folder, "ls-files", "__init__.py"):
        return None  # installed somewhere below a repository that is not fedbd's
    return {"commit": commit, "changed": bool(_ask_git(folder, "status", "--porcelain", "--untracked-files=no"))}


def _ask_git(folder: Path, *words: str) -> str | None:
    command = ["git", "-C", str(folder), *words]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


@cache
def code_digest(app_dir: Path) -> str:
    """Return a hash of fedbd's sources, with those of the Flower app in a folder: same records need the same code."""
    digest = hashlib.sha256()
    for folder in (Path(__file__).resolve().parents[1], app_dir / "clients", app_dir / "server"):
        for path in sorted(folder.rglob("*.py")):
            digest.update(path.relative_to(folder).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()


def cores() -> int:
    """Return how many processors this process may use, by its affinity and by its container's share of time."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="ascii").split()
        return max(1, min(usable, -(-int(quota) // int(period))))
    except (OSError, ValueError):  # no such file, or the word max
        return usable


def memory() -> int:
    """Return the bytes of memory that processes of this machine, or of this container, can have."""
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        return min(whole, int(Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii")))
    except (OSError, ValueError):  # no such file, or the word max
        return whole
