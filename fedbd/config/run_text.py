"""A scenario as text: the resolved YAML for people, and the JSON that travels to clients."""

from __future__ import annotations

import json

from fedbd.config.scenario import Scenario, fingerprint, to_dict
from fedbd.config.scenario_file import dump_yaml


def scenario_text(scenario: Scenario) -> str:
    """Return the resolved scenario as YAML, every default spelled out, with its fingerprint as a comment."""
    return f"# resolved by fedbd; fingerprint {fingerprint(scenario)}\n{dump_yaml(to_dict(scenario))}"


def message_text(scenario: Scenario) -> str:
    """Return what clients get: the same text on every engine, so that its bytes count the same."""
    plain = to_dict(scenario)
    plain["engine"] = {"device": scenario.engine.device}
    for name in ("every", "samples"):  # when and on what the server measures
        del plain["evaluation"][name]
    if scenario.faults:  # what clients check must hold for them; it is the server that keeps the time
        plain["engine"]["timeout"] = 1.0
    else:
        del plain["faults"]
    plain["start"] = None  # the weights travel, the file that they came from is the server's
    del plain["checkpoint"]
    if scenario.batch_norm == "average":
        del plain["batch_norm"]
    elif scenario.batch_norm == "frozen":
        plain["start"] = {"warm_up": 1}  # that there is a start must be known; which one is the server's, again
    return json.dumps(plain, sort_keys=True)
