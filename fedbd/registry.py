"""The names that a scenario may use, and where each method lives.

Literal tables on purpose: no import side effect can add or lose a method, and a reader sees all of them at once. A
third party writes ``package.module:Class`` in place of a name.
"""

from __future__ import annotations

import difflib
import importlib
import re
from typing import Any

from fedbd.errors import Problem, ScenarioError

METHODS: dict[str, dict[str, str]] = {
    "data": {
        "digits": "fedbd.data.digits:Digits",
        "npz": "fedbd.data.npz:Npz",
        "image_parquet": "fedbd.data.image_parquet:ImageParquet",
    },
    "partition": {
        "iid": "fedbd.data.partition_iid:Iid",
        "dirichlet": "fedbd.data.partition_dirichlet:Dirichlet",
    },
    "model": {
        "cnn": "fedbd.models.cnn:Cnn",
        "mlp": "fedbd.models.mlp:Mlp",
        "mnistnet": "fedbd.models.mnistnet:MnistNet",
        "wrn16-1": "fedbd.models.wrn:Wrn",
    },
    "trigger": {"grid": "fedbd.attacks.grid_trigger:GridTrigger"},
    "attack": {"badnets": "fedbd.attacks.badnets:BadNets"},
    "local_defense": {"abl": "fedbd.defenses.local.abl:ABL"},
    "secure_sum": {"ckks": "fedbd.crypto.ckks:Ckks"},
    "aggregation": {
        "mean": "fedbd.defenses.aggregation.mean:Mean",
        "norm_clip": "fedbd.defenses.aggregation.norm_clip:NormClip",
        "median": "fedbd.defenses.aggregation.median:Median",
    },
    "cleanup": {"rnp": "fedbd.defenses.cleanup.rnp:RNP"},
    "detection": {"rnp_unlearned": "fedbd.defenses.detection.rnp_unlearned:RnpUnlearned"},
    "strategy": {
        "fedavg": "flwr.serverapp.strategy:FedAvg",
        "fedavgm": "flwr.serverapp.strategy:FedAvgM",
        "fedadagrad": "flwr.serverapp.strategy:FedAdagrad",
        "fedadam": "flwr.serverapp.strategy:FedAdam",
        "fedyogi": "flwr.serverapp.strategy:FedYogi",
    },
}
"""kind -> name -> ``module:Class``. The strategies are Flower's; only ``fedbd.flower`` resolves them."""

PATH = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")


def near_miss(word: str, known: list[str]) -> str:
    """Return ``did you mean 'x'?`` for the closest known word, or the empty string."""
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"did you mean '{close[0]}'?" if close else ""


def location(kind: str, name: str, path: str) -> str:
    """Return the ``module:Class`` of a method.

    Args:
        kind: A key of ``METHODS``.
        name: A registered name, or ``package.module:Class`` itself.
        path: Where the name stands in the scenario, for the message.

    Raises:
        ScenarioError: If the name is neither.
    """
    known = METHODS[kind]
    if name in known:
        return known[name]
    if PATH.fullmatch(name):
        return name
    expected = f"must be one of {', '.join(known)} or package.module:Class"
    raise ScenarioError([Problem(path=path, expected=expected, got=repr(name), remedy=near_miss(name, list(known)))])


def resolve(kind: str, name: str, path: str) -> Any:
    """Return the class of a method (see ``location``), importing its module.

    Raises:
        ScenarioError: If the name is unknown, or the module or class is not there.
    """
    where = location(kind, name, path)
    module, _, attribute = where.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        if name in METHODS[kind]:
            raise  # one of fedbd's own: a broken installation, not the user's spelling
        problem = Problem(path=path, expected="must name an importable class", got=repr(name), remedy=str(error))
        raise ScenarioError([problem]) from None
