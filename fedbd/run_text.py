"""A scenario as text: the resolved YAML for people, and the JSON that travels to clients."""

from __future__ import annotations

import json

import yaml

from fedbd.scenario import Scenario, fingerprint, to_dict


def scenario_text(scenario: Scenario) -> str:
    """Return the resolved scenario as YAML, every default spelled out, with its fingerprint as a comment."""
    body = yaml.safe_dump(to_dict(scenario), sort_keys=False, allow_unicode=True, width=100)
    return f"# resolved by fedbd; fingerprint {fingerprint(scenario)}\n{body}"


def message_text(scenario: Scenario) -> str:
    """Return what clients get: the same text on every engine, so that its bytes count the same."""
    plain = to_dict(scenario)
    plain["engine"] = {"device": scenario.engine.device}
    return json.dumps(plain, sort_keys=True)
