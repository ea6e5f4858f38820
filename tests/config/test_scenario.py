from __future__ import annotations

import copy
import dataclasses
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedbd.config.plans import CheckpointPlan, Window
from fedbd.config.run_text import message_text, scenario_text
from fedbd.config.scenario import Scenario, fingerprint, from_dict, load_scenario, to_dict, twin_of
from fedbd.config.scenario_file import parse_yaml
from fedbd.config.schema import Method
from fedbd.errors import ScenarioError

SCENARIOS = Path(__file__).resolve().parents[2] / "scenarios"
FILES = sorted(SCENARIOS.glob("*.yaml"))
MINIMAL: dict[str, Any] = {"name": "t", "rounds": 3, "data": {"name": "digits"}, "model": {"name": "mlp"}}
ATTACK: dict[str, Any] = {"name": "badnets", "clients": {"count": 2}, "target": 0, "trigger": {"name": "grid"}}
RICH: dict[str, Any] = {
    "name": "rich",
    "seed": 5,
    "rounds": 9,
    "data": {"name": "digits", "pixels": 16, "root": "/data"},
    "partition": {"name": "dirichlet", "alpha": 0.9, "clients": 12},
    "trusted": {"size": 100},
    "model": {"name": "mlp", "hidden": [8, 4]},
    "training": {"lr_step": 2},
    "cohort": {"size": 6, "attackers_per_round": 2, "weighting": "examples"},
    "attacks": [
        {**ATTACK, "label": "one", "training": {"lr": 0.2}, "rounds": {"first": 2, "last": 8}},
        {**ATTACK, "label": "two", "clients": {"ids": [0, 3]}, "role": "polluted", "per": "dataset"},
    ],
    "local_defense": {"name": "abl"},
    "local_defense_clients": {"share": 0.5},
    "start": {"checkpoint": "start.safetensors"},
    "strategy": {"name": "fedadam", "arguments": {"eta": 0.1, "beta_1": 0.5}},
    "secure_sum": {"name": "ckks"},
    "bucket_size": 2,
    "aggregation": {"name": "norm_clip", "bound": 5.0},
    "cleanup": [{"name": "rnp", "every": 3, "label": "repair"}],
    "detection": [{"name": "rnp_unlearned", "rounds": [1, 9]}],
}


def file(path: Path) -> str:
    return path.stem


# Parsing and writing again.


@pytest.mark.parametrize("path", FILES, ids=file)
def test_every_shipped_scenario_comes_back_from_its_resolved_form(path: Path) -> None:
    scenario = load_scenario(path)
    assert from_dict(to_dict(scenario)) == scenario
    assert from_dict(parse_yaml(scenario_text(scenario), "resolved")) == scenario


def test_scenarios_are_shipped() -> None:
    assert {"quickstart", "quickstart-clean", "quickstart-defended"} <= {path.stem for path in FILES}


def test_a_rich_scenario_comes_back_and_holds_what_was_written() -> None:
    scenario = from_dict(RICH)
    assert from_dict(to_dict(scenario)) == scenario
    assert scenario.model.impl.hidden == (8, 4)
    assert scenario.partition.method.impl.alpha == 0.9
    assert scenario.attacks[1].method.impl.per == "dataset"
    assert scenario.cleanup[0].method.name == "rnp"
    assert scenario.strategy.arguments == {"eta": 0.1, "beta_1": 0.5}
    assert scenario.bucket_size == 2


FINE = st.floats(min_value=1e-6, max_value=1.0, exclude_max=True)
LABELS = st.text(min_size=1, max_size=12) | st.sampled_from(["1e-4", "off", "010", "null", "1:30", "yes", "~", "a: b"])


@st.composite
def raw_scenarios(draw: st.DrawFn) -> dict[str, Any]:
    """Draw scenarios that are right, with whatever names and numbers."""
    clients = draw(st.integers(2, 40))
    rounds = draw(st.integers(1, 50))
    raw: dict[str, Any] = {
        **MINIMAL,
        "name": draw(LABELS.filter(lambda text: text.isalnum() or text in ("1e-4", "1:30"))),
        "seed": draw(st.integers(-(2**70), 2**70)),
        "rounds": rounds,
        "partition": draw(
            st.sampled_from([{"name": "iid"}, {"name": "dirichlet", "alpha": draw(FINE)}]).map(
                lambda plan: {**plan, "clients": clients}
            )
        ),
        "training": {
            "epochs": draw(st.integers(1, 10**6)),
            "lr": draw(st.floats(min_value=1e-300, max_value=1e300)),
            "momentum": draw(st.floats(0, 1, exclude_max=True)),
            "augment": draw(st.sampled_from(["none", "crop_flip"])),
            "lr_step": draw(st.none() | st.integers(1, 9)),
        },
        "server_rate": draw(st.integers(1, 3) | FINE),
        "strategy": {
            "name": "fedadam",
            "arguments": draw(st.dictionaries(LABELS, FINE | st.integers() | st.booleans() | LABELS, max_size=3)),
        },
        "aggregation": draw(st.sampled_from(["mean", {"name": "norm_clip", "bound": draw(FINE)}])),
        "evaluation": {"twin": draw(st.booleans())},
        "engine": {"timeout": draw(FINE), "workers": draw(st.none() | st.integers(1, 64))},
    }
    if draw(st.booleans()):
        raw["attacks"] = [
            {
                **ATTACK,
                "label": draw(st.none() | LABELS),
                "share": draw(FINE),
                "enabled": draw(st.booleans()),
                "clients": draw(st.sampled_from([{"count": 1}, {"share": 0.5}, {"ids": [clients - 1]}])),
                "rounds": {"first": draw(st.integers(1, rounds))},
                "training": draw(st.none() | st.just({"lr": draw(FINE)})),
            }
        ]
    return raw


@settings(max_examples=60, deadline=None)
@given(raw_scenarios())
def test_any_scenario_comes_back_from_dict_text_and_message(raw: dict[str, Any]) -> None:
    scenario = from_dict(raw)
    assert from_dict(to_dict(scenario)) == scenario
    assert from_dict(parse_yaml(scenario_text(scenario), "resolved")) == scenario
    plain = parse_yaml(message_text(scenario), "message")  # JSON is YAML
    assert from_dict(plain) == dataclasses.replace(scenario, engine=from_dict(plain).engine)
    assert fingerprint(from_dict(plain)) == fingerprint(scenario)


def test_the_message_keeps_nothing_of_the_engine_but_the_device() -> None:
    plain = parse_yaml(message_text(from_dict({**MINIMAL, "engine": {"workers": 7, "timeout": 5.0}})), "message")
    assert plain["engine"] == {"device": "cpu"}


# Defaults and short forms.


def test_defaults() -> None:
    scenario = from_dict(MINIMAL)
    assert scenario.partition.method.name == "iid"
    assert (scenario.partition.clients, scenario.cohort_size, scenario.buckets) == (10, 10, 10)
    assert (scenario.seed, scenario.server_rate, scenario.on_client_failure) == (0, 1.0, "fail")
    assert (scenario.training.epochs, scenario.training.batch_size, scenario.training.lr) == (2, 64, 0.1)
    assert scenario.aggregation.name == "mean"
    assert (scenario.trusted, scenario.attacks, scenario.secure_sum, scenario.local_defense) == (None, (), None, None)
    assert (scenario.engine.name, scenario.engine.executor, scenario.evaluation.twin) == ("local", "process", True)


@pytest.mark.parametrize(
    ("fields", "bucket_size", "buckets"),
    [
        ({}, 1, 10),
        ({"secure_sum": None}, 1, 10),
        ({"secure_sum": {"name": "ckks"}}, None, 1),
        ({"secure_sum": "ckks"}, None, 1),
        ({"secure_sum": "ckks", "bucket_size": None}, None, 1),
        ({"secure_sum": "ckks", "bucket_size": 1}, 1, 10),
        ({"bucket_size": None}, None, 1),
        ({"bucket_size": 3}, 3, 3),
    ],
)
def test_under_encryption_the_server_sees_one_sum_unless_told_otherwise(
    fields: dict[str, Any], bucket_size: int | None, buckets: int
) -> None:
    scenario = from_dict({**MINIMAL, **fields})
    assert (scenario.bucket_size, scenario.buckets) == (bucket_size, buckets)
    assert from_dict(to_dict(scenario)).bucket_size == bucket_size


def test_a_name_alone_stands_for_a_mapping_with_that_name() -> None:
    short = {
        **MINIMAL,
        "rounds": 5,
        "data": "digits",
        "partition": "iid",
        "model": "cnn",
        "trusted": {"size": 100},
        "aggregation": "mean",
        "local_defense": "abl",
        "secure_sum": "ckks",
        "cleanup": ["rnp"],
        "detection": ["rnp_unlearned"],
        "strategy": "fedadam",
        "engine": "ray",
    }
    long = {
        key: {"name": value} if isinstance(value, str) and key != "name" else value for key, value in short.items()
    } | {"cleanup": [{"name": "rnp"}], "detection": [{"name": "rnp_unlearned"}]}
    assert from_dict(short) == from_dict(long)
    assert from_dict(short).engine.name == "ray"


def test_an_integer_stands_for_a_float_and_stays_a_float() -> None:
    assert repr(from_dict({**MINIMAL, "server_rate": 2}).server_rate) == "2.0"
    assert fingerprint(from_dict({**MINIMAL, "server_rate": 2})) == fingerprint(
        from_dict({**MINIMAL, "server_rate": 2.0})
    )


def test_windows() -> None:
    assert [round_ for round_ in range(8) if round_ in Window(first=2, last=4)] == [2, 3, 4]
    assert [round_ for round_ in range(8) if round_ in Window(first=6)] == [6, 7]


def test_cleanups_are_due_every_so_often_or_in_listed_rounds() -> None:
    plans = [{"name": "rnp", "every": 3}, {"name": "rnp", "label": "b", "rounds": [1, 4]}]
    scenario = from_dict({**MINIMAL, "rounds": 9, "trusted": {"size": 20}, "cleanup": plans})
    assert [[r for r in range(1, 10) if plan.due(r)] for plan in scenario.cleanup] == [[3, 6, 9], [1, 4]]


def test_guards_name_their_places() -> None:
    guards = from_dict(RICH).guards
    assert [(path, plan.key) for path, plan in guards] == [("cleanup[0]", "repair"), ("detection[0]", "rnp_unlearned")]


def test_a_field_of_the_default_partition_can_be_set_alone(tmp_path: Path) -> None:
    file = tmp_path / "short.yaml"
    file.write_text("name: t\nrounds: 1\ndata: digits\nmodel: mlp\n", encoding="utf-8")
    plan = load_scenario(file, ["partition.clients=5"]).partition
    assert (plan.method.name, plan.clients) == ("iid", 5)
    assert load_scenario(file, ["partition.name=dirichlet"]).partition.method.name == "dirichlet"
    with pytest.raises(ScenarioError, match=r"partition\.name: is required"):
        load_scenario(file, ["partition={clients: 5}"])


def test_overrides_are_applied_before_anything_is_checked(tmp_path: Path) -> None:
    path = tmp_path / "s.yaml"
    path.write_text("name: t\nrounds: none\ndata: digits\nmodel: mlp\n", encoding="utf-8")
    scenario = load_scenario(path, ["rounds=4", "training.lr=1e-3", "secure_sum={name: ckks}", "model.hidden=[3]"])
    assert (scenario.rounds, scenario.training.lr, scenario.bucket_size) == (4, 0.001, None)
    assert scenario.model.impl.hidden == (3,)


# The fingerprint.


def changed(value: Any) -> Any:
    """Return some other value; scenarios are not checked when they are built in Python."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + 1
    if isinstance(value, str):
        return value + "x"
    if isinstance(value, dict):
        return {**value, "more": 1}
    return (1,) if value is None else (*value, 1)


def variants(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the value with each of its leaves changed in turn, and the leaf's path."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            for where, other in variants(getattr(value, field.name), f"{path}.{field.name}"):
                variant = copy.copy(value)  # a method would refuse some values
                object.__setattr__(variant, field.name, other)
                yield where, variant
    elif isinstance(value, tuple) and value and dataclasses.is_dataclass(value[0]):
        for i, entry in enumerate(value):
            for where, other in variants(entry, f"{path}[{i}]"):
                yield where, (*value[:i], other, *value[i + 1 :])
        yield f"{path}[-1]", value[:-1]
    else:
        yield path.removeprefix("."), changed(value)


IGNORED = (
    "name",
    "engine.",
    "data.root",
    "checkpoint.",
    *(f"evaluation.{x}" for x in ("twin", "relearn", "keep_models")),
)


def test_the_fingerprint_names_what_was_computed_and_nothing_else() -> None:
    scenario = from_dict(RICH)
    before = fingerprint(scenario)
    assert fingerprint(from_dict(RICH)) == before
    found: dict[str, set[str]] = {"same": set(), "other": set()}
    for path, variant in variants(scenario):
        assert variant != scenario, path
        found["same" if fingerprint(variant) == before else "other"].add(path.removeprefix("."))
    ignored = {path for path in found["same"] | found["other"] if path.startswith(IGNORED) and "method" not in path}
    assert found["same"] == ignored
    assert {"name", "data.root", "engine.workers", "engine.device", "evaluation.twin"} <= found["same"]
    assert {"seed", "rounds", "attacks[1].rounds.first", "cleanup[0].method.impl.alpha", "model.name"} <= found["other"]
    assert {"evaluation.every", "evaluation.samples"} <= found["other"]
    assert len(found["other"]) > 80


def test_fingerprints_of_two_attacks_differ_from_those_of_the_same_attacks_in_another_order() -> None:
    turned = {**RICH, "attacks": RICH["attacks"][::-1]}
    assert fingerprint(from_dict(turned)) != fingerprint(from_dict(RICH))


# The twin.


def test_the_twin_of_the_quickstart_is_the_shipped_clean_scenario() -> None:
    quickstart, clean = (load_scenario(SCENARIOS / f"{name}.yaml") for name in ("quickstart", "quickstart-clean"))
    assert fingerprint(twin_of(quickstart)) == fingerprint(twin_of(clean)) != fingerprint(quickstart)
    assert all(not attack.enabled for attack in clean.attacks)


def test_a_twin_differs_only_in_who_acts_and_in_what_cannot_change_its_records() -> None:
    scenario = from_dict(RICH)
    twin = twin_of(scenario)
    assert [attack.enabled for attack in twin.attacks] == [False, False]
    assert (twin.name, twin.secure_sum, twin.evaluation.twin) == ("rich (twin)", None, False)
    restored = dataclasses.replace(
        twin,
        name=scenario.name,
        secure_sum=scenario.secure_sum,
        evaluation=scenario.evaluation,
        attacks=tuple(
            dataclasses.replace(attack, enabled=True, training=own.training)
            for attack, own in zip(twin.attacks, scenario.attacks, strict=True)
        ),
    )
    assert restored == scenario
    assert from_dict(to_dict(twin)) == twin  # it travels like any other
    assert fingerprint(twin_of(twin)) == fingerprint(twin)


# Third parties.

RULE = '''
from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Gt

from fedbd.types import Aggregate, Need


@dataclass(frozen=True, kw_only=True)
class First:
    """Takes the first row."""

    factor: Annotated[float, Gt(0)] = 1.0
    mode: Literal["a", "b"] = "a"
    copy: tuple[int, ...] = ()

    @property
    def needs(self):
        return frozenset({Need.INDIVIDUAL})

    @property
    def minimum_rows(self):
        return 4

    def aggregate(self, cohort, memory, rng):
        return Aggregate(delta=self.factor * cohort.updates[0]), memory, {}
'''


@pytest.fixture
def third_party(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    package = tmp_path / "fedbd_someone"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "rules.py").write_text(RULE)
    monkeypatch.syspath_prepend(tmp_path)
    yield
    for name in ("fedbd_someone", "fedbd_someone.rules"):
        sys.modules.pop(name, None)


@pytest.mark.usefixtures("third_party")
def test_a_third_partys_class_is_a_method_like_any_other() -> None:
    plan = {"name": "fedbd_someone.rules:First", "factor": 2, "copy": [1, 2]}
    scenario = from_dict({**MINIMAL, "aggregation": plan})
    assert isinstance(scenario.aggregation, Method)
    impl = scenario.aggregation.impl
    assert (type(impl).__name__, impl.factor, impl.mode, impl.copy) == ("First", 2.0, "a", (1, 2))
    assert to_dict(scenario)["aggregation"] == {**plan, "mode": "a", "copy": [1, 2]}
    assert from_dict(to_dict(scenario)) == scenario
    assert fingerprint(scenario) != fingerprint(from_dict({**MINIMAL, "aggregation": "fedbd_someone.rules:First"}))


@pytest.mark.usefixtures("third_party")
def test_a_third_partys_fields_and_needs_are_checked_like_any_others() -> None:
    plan = {"name": "fedbd_someone.rules:First", "factor": 0, "mode": "c"}
    with pytest.raises(ScenarioError) as caught:
        from_dict({**MINIMAL, "aggregation": plan})
    assert [str(problem) for problem in caught.value.problems] == [
        "aggregation.factor: must be > 0, got 0",
        "aggregation.mode: must be a or b, got 'c'",
    ]
    with pytest.raises(ScenarioError, match=r"needs at least 4 updates or buckets, got 3 buckets of 3") as caught:
        from_dict({**MINIMAL, "aggregation": plan | {"factor": 1, "mode": "b"}, "bucket_size": 3})


def test_a_scenario_cannot_be_changed() -> None:
    scenario: Scenario = from_dict(MINIMAL)
    with pytest.raises(dataclasses.FrozenInstanceError):
        scenario.rounds = 5  # type: ignore[misc]


def test_a_start_counts_by_its_content_wherever_it_lies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def printed(checkpoint: str) -> str:
        return fingerprint(from_dict({**MINIMAL, "start": {"checkpoint": checkpoint}}))

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    Path("a.pt").write_bytes(b"one")
    first = printed("a.pt")
    assert first == printed(str(tmp_path / "a.pt")) == printed("~/a.pt")
    assert first != fingerprint(from_dict(MINIMAL))
    Path("a.pt").write_bytes(b"two")
    assert first != printed("a.pt") == printed("~/a.pt")


def test_a_triggers_file_counts_by_its_content_wherever_it_lies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def printed(file: str) -> str:
        return fingerprint(from_dict({**MINIMAL, "attacks": [{**ATTACK, "trigger": {"name": "blend", "file": file}}]}))

    monkeypatch.chdir(tmp_path)
    Path("a.png").write_bytes(b"one")
    first = printed("a.png")
    assert first == printed(str(tmp_path / "a.png"))
    Path("a.png").write_bytes(b"two")
    assert first != printed("a.png")


def test_the_twin_starts_from_the_same_checkpoint_and_learns_nothing_again() -> None:
    raw = {**MINIMAL, "attacks": [ATTACK], "cleanup": [{"name": "clp"}], "evaluation": {"relearn": [1]}}
    twin = twin_of(from_dict({**raw, "start": {"checkpoint": "a.pt"}}))
    assert twin.start is not None
    assert twin.start.checkpoint == "a.pt"
    assert twin.evaluation.relearn is None
    assert fingerprint(twin) == fingerprint(
        twin_of(from_dict({**raw, "start": {"checkpoint": "a.pt"}, "evaluation": {}}))
    )


@pytest.mark.parametrize("word", ["off", None])
def test_checkpoints_can_be_switched_off(word: Any) -> None:
    assert from_dict(MINIMAL).checkpoint == CheckpointPlan(every=1)
    scenario = from_dict({**MINIMAL, "checkpoint": word})
    assert scenario.checkpoint is None
    assert from_dict(to_dict(scenario)) == scenario


def test_checkpoints_never_reach_a_client_or_a_fingerprint() -> None:
    texts = {message_text(from_dict({**MINIMAL, "checkpoint": plan})) for plan in ("off", {"every": 3}, {"every": 1})}
    assert texts == {message_text(from_dict(MINIMAL))}
    assert "checkpoint" not in json.loads(texts.pop())


def test_there_are_none_by_default_where_they_do_not_reach_clients_memory() -> None:
    long = {**MINIMAL, "rounds": 5}
    found = {
        (engine, defense is not None): from_dict({**long, "engine": engine, "local_defense": defense}).checkpoint
        for engine in ("local", "ray", "deployment")
        for defense in (None, "abl")
    }
    assert {where for where, plan in found.items() if plan is None} == {("ray", True), ("deployment", True)}


def test_a_detectors_honest_counts_only_where_it_is_set() -> None:
    detector = {"name": "abl_isolation", "where": "training"}
    who = {"role": "polluted", "per": "dataset", "clients": {"ids": [0]}}
    attack = {"name": "badnets", **who, "target": 0, "trigger": {"name": "grid"}}
    raw = {
        "name": "t",
        "rounds": 2,
        "data": {"name": "digits"},
        "model": {"name": "cnn"},
        "attacks": [attack],
        "detection": [detector],
    }
    plain, unset, asked = (
        fingerprint(from_dict({**raw, "detection": [{**detector, **more}]}))
        for more in ({}, {"honest": False}, {"honest": True})
    )
    assert plain == unset != asked
