"""fedbd: a federated-learning security simulator.

``from fedbd import load_scenario, run`` is the Python entry; the command line is ``fedbd``. Names are imported on first
use, so that ``fedbd --help`` does not wait for torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedbd.config.scenario import Scenario, load_scenario
    from fedbd.running.runs import RunResult, run

__version__ = "0.1.0"
__all__ = ["RunResult", "Scenario", "__version__", "load_scenario", "run"]

_HOME = {
    "load_scenario": "config.scenario",
    "Scenario": "config.scenario",
    "run": "running.runs",
    "RunResult": "running.runs",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used."""
    if name not in _HOME:
        raise AttributeError(f"module 'fedbd' has no attribute '{name}'")
    import importlib  # noqa: PLC0415

    return getattr(importlib.import_module(f"fedbd.{_HOME[name]}"), name)
