"""One small scenario with every kind of stage in it, and its plain, serial run: what all engines must reproduce."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from fedbd.config.scenario import Scenario, from_dict
from fedbd.running.runs import RunResult, run

RAW = {
    "name": "every-stage",
    "seed": 5,
    "rounds": 2,
    "data": {"name": "digits"},
    "partition": {"name": "dirichlet", "alpha": 5.0, "clients": 2},
    "trusted": {"size": 120},
    "model": {"name": "cnn", "width": 4},
    "training": {"epochs": 1, "batch_size": 32, "lr": 0.05},
    "attacks": [
        {
            "name": "badnets",
            "label": "attacker",
            "clients": {"ids": [0]},
            "target": 0,
            "trigger": {"name": "grid"},
            "training": {"epochs": 2, "batch_size": 32, "lr": 0.05},
        },
        {
            "name": "badnets",
            "label": "polluted",
            "role": "polluted",
            "per": "dataset",
            "share": 0.1,
            "clients": {"ids": [1]},
            "target": 1,
            "trigger": {"name": "grid"},
        },
    ],
    "local_defense": {"name": "abl", "isolate_after": 1, "confidence": None},
    "strategy": {"name": "fedavgm", "arguments": {"server_momentum": 0.5}},
    "cleanup": [{"name": "rnp", "unlearn_epochs": 20, "unlearn_stop": 0.3, "recover_epochs": 2}],
    "detection": [{"name": "rnp_unlearned", "samples": 50}],
    "evaluation": {"twin": False},
}


def scenario(engine: dict, **fields: object) -> Scenario:
    return from_dict({**RAW, **fields, "engine": engine})


@pytest.fixture(scope="session")
def reference(tmp_path_factory: pytest.TempPathFactory) -> RunResult:
    """The plain run, client after client in one process."""
    return run(scenario({"executor": "serial"}), tmp_path_factory.mktemp("reference"))


@pytest.fixture(scope="session")
def encrypted(tmp_path_factory: pytest.TempPathFactory) -> RunResult:
    """The encrypted run with two workers."""
    return run(scenario({"workers": 2}, secure_sum={"name": "ckks"}), tmp_path_factory.mktemp("encrypted"))


@pytest.fixture(scope="session")
def make() -> Callable[..., Scenario]:
    """Return the scenario with an engine and other fields."""
    return scenario
