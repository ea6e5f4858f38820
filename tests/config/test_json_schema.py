"""The schema for editors, held against the parser by a validator that is not ours (``jsonschema``)."""

from __future__ import annotations

import copy
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator

import fedbd
from fedbd.central.plan import CentralPlan, load_central
from fedbd.config import plans
from fedbd.config.field_values import adapter, checked
from fedbd.config.json_schema import json_schema, schema_text
from fedbd.config.scenario import Scenario, from_dict, load_scenario, to_dict
from fedbd.config.scenario_file import read_yaml
from fedbd.config.schema import CONTRACTS, parse, slots_of, to_plain
from fedbd.data.trusted import Trusted
from fedbd.errors import Problem, UserError
from fedbd.registry import METHODS, resolve
from fedbd.training import TrainingPlan

ROOT = Path(fedbd.__file__).resolve().parent.parent
FILES = sorted((ROOT / "scenarios").rglob("*.yaml"))
SCENARIO = json.loads(schema_text())
CENTRAL = json.loads(schema_text(central=True))
PLANS = [name for name in vars(plans) if name.endswith("Plan") or name in ("Selection", "Window")]
GOOD: dict[str, Any] = {
    "name": "good",
    "rounds": 4,
    "data": "digits",
    "model": {"name": "cnn", "width": 4},
    "trusted": {"size": 50},
    "attacks": [{"name": "badnets", "clients": {"count": 1}, "target": 0, "trigger": "grid", "share": 0.5}],
    "cleanup": ["rnp", {"name": "clp", "u": 2.0, "every": 2}],
    "detection": [{"name": "strip", "adversarial": ["fgsm"]}],
}


def wrong(schema: dict[str, Any], values: Any) -> list[str]:
    """Return what the independent validator says, one line per leaf."""
    found = []
    for error in Draft202012Validator(schema).iter_errors(values):
        found += [f"{'.'.join(map(str, leaf.absolute_path))}: {leaf.message}" for leaf in error.context or [error]]
    return found


@pytest.mark.parametrize("schema", [SCENARIO, CENTRAL], ids=["scenario", "central"])
def test_it_is_a_schema_of_the_dialect_that_it_names(schema: dict[str, Any]) -> None:
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    Draft202012Validator.check_schema(schema)
    referred = set(re.findall(r'"#/\$defs/([^"]+)"', json.dumps(schema)))
    assert referred == set(schema["$defs"])


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_every_scenario_names_its_schema_and_obeys_it(path: Path) -> None:
    first = path.read_text(encoding="utf-8").splitlines()[0]
    named = re.fullmatch(r"# yaml-language-server: \$schema=(\S+)", first)
    assert named is not None
    schema = json.loads((path.parent / named[1]).read_text(encoding="utf-8"))
    assert schema == (CENTRAL if path.parent.name == "central" else SCENARIO)
    assert wrong(schema, read_yaml(path)) == []


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_a_resolved_scenario_obeys_it_too(path: Path) -> None:
    central = path.parent.name == "central"
    resolved = to_plain(load_central(path)) if central else to_dict(load_scenario(path))
    assert wrong(CENTRAL if central else SCENARIO, json.loads(json.dumps(resolved))) == []


def test_the_command_prints_it(tmp_path: Path) -> None:
    for words, expected in ([], SCENARIO), (["--central"], CENTRAL):
        command = [sys.executable, "-m", "fedbd", "schema", *words]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, cwd=ROOT)
        assert (done.returncode, done.stderr) == (0, "")
        assert json.loads(done.stdout) == expected


def forms(schema: Any, place: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield every closed mapping of a schema, with where it stands."""
    if isinstance(schema, dict):
        if schema.get("additionalProperties") is False:
            yield place, schema
        for key, entry in schema.items():
            yield from forms(entry, f"{place}/{key}")
    elif isinstance(schema, list):
        for number, entry in enumerate(schema):
            yield from forms(entry, f"{place}/{number}")


def test_every_field_is_described_and_every_optional_one_has_its_default() -> None:
    seen = 0
    for place, form in [*forms(SCENARIO), *forms(CENTRAL)]:
        assert form["description"], place
        for name, entry in form["properties"].items():
            seen += 1
            assert "const" in entry or entry.get("description"), f"{place}.{name}"
            assert "const" in entry or ("default" in entry) != (name in form["required"]), f"{place}.{name}"
    assert seen > 300


def test_every_method_is_there_with_its_own_fields() -> None:
    for kind in CONTRACTS:
        for name in METHODS[kind]:
            (form,) = (
                form
                for place, form in forms(CENTRAL if kind == "central_defense" else SCENARIO)
                if form["properties"].get("name", {}).get("const") == name
                and place.partition("/$defs/")[2].partition(".")[0].lower().removesuffix("plan")
                in (kind, kind.replace("_", ""))
            )
            assert set(slots_of(resolve(kind, name, kind))) <= set(form["properties"])


# The same verdict as the parser's.


def edited(path: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def edit(raw: dict[str, Any]) -> None:
        steps: list[Any] = [int(step) if step.isdigit() else step for step in path.split(".")]
        node: Any = raw
        for step in steps[:-1]:
            node = node[step]
        if value is ...:
            del node[steps[-1]]
        else:
            node[steps[-1]] = value

    return edit


BROKEN: dict[str, tuple[str, Any]] = {
    "no name": ("name", ...),
    "an empty name": ("name", ""),
    "no rounds": ("rounds", ...),
    "rounds as text": ("rounds", "4"),
    "half a round": ("rounds", 4.5),
    "no round at all": ("rounds", 0),
    "a boolean for a number": ("rounds", True),
    "a seed of null": ("seed", None),
    "a misspelt field": ("rouds", 4),
    "a misspelt field of a plan": ("trusted.siez", 5),
    "a misspelt field of a method": ("model.witdh", 5),
    "a field of another method": ("cleanup.1.unlearn_lr", 0.1),
    "a method's own bound": ("attacks.0.share", 1.5),
    "an unknown model": ("model", "resnet9000"),
    "an unknown model in a mapping": ("model.name", "resnet9000"),
    "an unknown trigger": ("attacks.0.trigger", "gird"),
    "an unknown cleanup": ("cleanup.0", "rpn"),
    "a list of models": ("model", ["cnn"]),
    "a model of null": ("model", None),
    "attacks as a mapping": ("attacks", {"name": "badnets"}),
    "an attack by its name alone": ("attacks.0", "badnets"),
    "an attack without a target": ("attacks.0.target", ...),
    "a target below zero": ("attacks.0.target", -1),
    "a role that is none": ("attacks.0.role", "victim"),
    "a share of nobody": ("attacks.0.clients", {"share": 0}),
    "an empty list of ids": ("attacks.0.clients", {"ids": []}),
    "an engine that is none": ("engine", {"name": "slurm"}),
    "a rule of no kind": ("aggregation", 3),
    "a rounds list of text": ("cleanup.1.rounds", ["two"]),
    "a foreign secure sum": ("secure_sum", "mine.sums:Sum"),
    "an adversary that is none": ("detection.0.adversarial", ["pdg"]),
    "strategy arguments in a list": ("strategy", {"arguments": [1]}),
    "data that lack their file": ("data", "npz"),
}


def test_the_good_one_is_good() -> None:
    assert wrong(SCENARIO, GOOD) == []
    assert from_dict(GOOD).name == "good"


@pytest.mark.parametrize(("path", "value"), BROKEN.values(), ids=BROKEN)
def test_a_broken_scenario_is_rejected_by_both(path: str, value: Any) -> None:
    raw = copy.deepcopy(GOOD)
    edited(path, value)(raw)
    assert wrong(SCENARIO, raw) != []
    with pytest.raises(UserError):
        from_dict(raw)


FOREIGN = {
    "model": "mine.models:Net",
    "aggregation": {"name": "mine.rules:Rule", "anything": 3},
    "cleanup": [{"name": "mine.repairs:Repair", "every": 2, "own": [1]}],
    "strategy": {"name": "mine.strategies:Fed"},
}


def test_a_class_of_somebody_elses_is_allowed_with_any_fields() -> None:
    assert wrong(SCENARIO, {**GOOD, **FOREIGN}) == []
    plan = {**GOOD, "cleanup": [{"name": "mine.repairs:Repair", "every": 0}]}
    assert wrong(SCENARIO, plan) != []  # but the plan's own fields keep their types


@pytest.mark.parametrize("kind", [kind for kind in METHODS if kind != "strategy"])
def test_a_bare_name_is_good_where_the_parser_takes_it(kind: str) -> None:
    where = {
        "model": lambda name: {"model": name},
        "data": lambda name: {"data": name},
        "partition": lambda name: {"partition": name},
        "trigger": lambda name: {"attacks": [{**GOOD["attacks"][0], "trigger": name}]},
        "attack": lambda name: {"attacks": [name]},
        "evasion": lambda name: {"detection": [{"name": "strip", "adversarial": [name]}]},
        "cleanup": lambda name: {"cleanup": [name]},
        "detection": lambda name: {"detection": [name]},
    }.get(kind, lambda name: {kind: name})
    for name in METHODS[kind]:
        raw = {**GOOD, **where(name)}
        problems: list[Problem] = []
        parse(Scenario, raw, "", problems)
        assert (wrong(SCENARIO, raw) == []) == (problems == []), name


VALUES = [-(10**9), -1, -0.5, 0, 0.25, 1, 1.5, 2, 100, True, None, "", "x"]
VALUES += [[], [1], [0.5], ["x"], {}, {"x": 1}, {"x": [1]}]


def dataclasses_() -> Iterator[Any]:
    for kind, names in METHODS.items():
        for name in names if kind != "strategy" else []:
            yield pytest.param(resolve(kind, name, kind), id=f"{kind}-{name}")
    for cls in (Scenario, CentralPlan, TrainingPlan, Trusted, *(getattr(plans, name) for name in PLANS)):
        yield pytest.param(cls, id=cls.__name__)


@pytest.mark.parametrize("cls", dataclasses_())
def test_single_values_get_the_parsers_verdict(cls: type) -> None:
    """Of twenty values for every plain field, schema and parser take the same ones."""
    form = json_schema(cls, "fields")
    for name, slot in slots_of(cls).items():
        if slot.shape != "plain" or (cls, name) == (plans.StrategyPlan, "name"):  # that one knows Flower's names
            continue
        for value in VALUES:
            problems: list[Problem] = []
            checked(adapter(slot.hint), value, name, slot.optional, "", problems)
            said = wrong(form["properties"][name], value)
            assert (said == []) == (problems == []), (name, value, said, problems)
