"""What a run computes, as one hash: an attack-free twin or a warm-up of the same hash need not be run again."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from dataclasses import dataclass, field

from fedbd.config.scenario import Scenario, fingerprint, to_dict
from fedbd.data.digest import digest
from fedbd.prepared import load_data
from fedbd.records.environment import code_digest
from fedbd.running.engines import flower_app_dir


@dataclass(frozen=True)
class DataDigests:
    """Hashes of the data sets of some scenarios (``fedbd.data.digest``), each read once."""

    _known: dict[str, str] = field(default_factory=dict)

    def of(self, scenario: Scenario) -> str:
        """Return the hash of a scenario's data set.

        Raises:
            UserError: If it cannot be read.
        """
        which = json.dumps(to_dict(scenario)["data"], sort_keys=True)
        if which not in self._known:
            self._known[which] = digest(load_data(scenario))
        return self._known[which]


def identity(scenario: Scenario, data: str) -> str:
    """Return a hash of what a run computes: its fingerprint, device, data, versions and fedbd's own code.

    Args:
        scenario: The run's.
        data: Hash of its data set, from ``DataDigests``.
    """
    versions = [f"{name} {importlib.metadata.version(name)}" for name in ("fedbd", "flwr", "torch", "numpy")]
    text = [fingerprint(scenario), scenario.engine.device, data, *versions, code_digest(flower_app_dir())]
    return hashlib.sha256("\n".join(text).encode()).hexdigest()
