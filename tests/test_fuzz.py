"""Scenario text that nobody would write: a scenario comes out, or a mistake in words; nothing else, no traceback."""

from __future__ import annotations

import json
import string
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

import fedbd
from fedbd.central.plan import load_central
from fedbd.config.json_schema import schema_text
from fedbd.config.scenario import Scenario, from_dict, load_scenario, to_dict
from fedbd.config.scenario_file import dump_yaml, override, parse_yaml
from fedbd.errors import UserError
from fedbd.registry import METHODS

ROOT = Path(fedbd.__file__).resolve().parent.parent
TEXTS = [path.read_text(encoding="utf-8") for path in sorted((ROOT / "scenarios").glob("*.yaml"))]
CENTRAL = [path.read_text(encoding="utf-8") for path in sorted((ROOT / "scenarios" / "central").glob("*.yaml"))]
SCHEMA = Draft202012Validator(json.loads(schema_text()))
NAMES = sorted({name for methods in METHODS.values() for name in methods})
PIECES = (
    "0 -1 1 2.5 1e999 -.inf .nan 0x10 010 1:30 true off null ~ '' [] {} [[]] &a *a <<: - --- ... % @ ` | > ? !! "
    "!!python/object:os.system a.b:C os:path fedbd.attacks.badnets:"
)
WORDS = [
    *PIECES.split(" "),
    *("{a: 1}", "!!binary aGk=", "{<<: *a}", "9" * 400, "\t", "\n", "\n  ", ": ", "# ", "\x00", "\ud7ff", "\u2028"),
    *("\ufeff", "\u00e9", "'", '"', "name: ", "first: 0", "last: -1"),
    *NAMES,
]
FEW = settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
MANY = settings(max_examples=1500, deadline=None, suppress_health_check=list(HealthCheck))


@st.composite
def mutated(draw: st.DrawFn, texts: list[str]) -> str:
    """Return a good text after a few cuts, copies and insertions."""
    text = draw(st.sampled_from(texts))
    for _ in range(draw(st.integers(1, 4))):
        a, b = sorted(draw(st.tuples(st.integers(0, len(text)), st.integers(0, len(text)))))
        b = min(b, a + draw(st.integers(0, 40)))
        new = draw(st.one_of(st.sampled_from(WORDS), st.just(""), st.just(text[a:b] * 2), st.text(max_size=5)))
        text = text[:a] + new + text[b:]
    return text


@st.composite
def spoiled(draw: st.DrawFn) -> bytes:
    """Return a good file with a few bytes changed."""
    raw = bytearray(encoded(draw(st.sampled_from(TEXTS))))
    for _ in range(draw(st.integers(1, 5))):
        raw[draw(st.integers(0, len(raw) - 1))] = draw(st.integers(0, 255))
    return bytes(raw)


SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(-2, 12),
    st.floats(),
    st.sampled_from(NAMES),
    st.sampled_from(["a.b:C", "os:path", "fedbd.attacks.badnets:BadNets", "fedbd.errors:Problem", "typing:Any", ""]),
    st.text(max_size=8),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.sampled_from(["name", "ids", "x"]), inner)),
    max_leaves=5,
)


@st.composite
def edited(draw: st.DrawFn, texts: list[str]) -> Any:
    """Return a good scenario's values with some of them replaced, removed or added, at any depth."""
    values = parse_yaml(draw(st.sampled_from(texts)), "")
    for _ in range(draw(st.integers(1, 3))):
        node = values
        while True:
            keys = list(node) if isinstance(node, dict) else list(range(len(node)))
            if not keys:
                break
            key = draw(st.sampled_from(keys))
            if isinstance(node[key], dict | list) and node[key] and draw(st.integers(0, 2)):
                node = node[key]
                continue
            what = draw(st.integers(0, 4))
            if what == 0:
                del node[key]
            elif what == 1 and isinstance(node, dict):
                node[draw(st.sampled_from(FIELDS))] = draw(VALUES)
            else:
                node[key] = draw(VALUES)
            break
    return values


FIELDS = sorted({name for form in (json.loads(schema_text())["$defs"]).values() for name in form.get("properties", {})})
FIELDS += list(Scenario.__dataclass_fields__)


def judged(load: Callable[[], Scenario]) -> Scenario | None:
    """Return the scenario, or None after a mistake told in words; anything else is the bug that is looked for."""
    try:
        found = load()
    except UserError as error:
        assert error.problems
        for problem in error.problems:
            assert problem.expected
            assert "Traceback" not in str(problem)
            str(problem).encode()  # can be printed
        return None
    again = from_dict(json.loads(json.dumps(to_dict(found))))
    assert again == found  # what is written beside the records is what ran
    assert from_dict(parse_yaml(dump_yaml(to_dict(found)), "")) == found
    return found


def from_file(content: bytes, folder: Path) -> Scenario | None:
    file = folder / "fuzz.yaml"
    file.write_bytes(content)
    return judged(lambda: load_scenario(file))


def encoded(text: str) -> bytes:
    return text.encode("utf-8", errors="surrogatepass")


def check_text(text: str, folder: Path) -> None:
    from_file(encoded(text), folder)


def check_bytes(content: bytes, folder: Path) -> None:
    from_file(content, folder)


def check_values(values: Any) -> None:
    """What the parser takes, the schema for editors takes, too."""
    if judged(lambda: from_dict(values)) is not None:
        assert [error.message for error in SCHEMA.iter_errors(values)] == []


def check_setting(text: str, setting: str) -> None:
    judged(lambda: from_dict(override(parse_yaml(text, ""), [setting])))


def check_central(text: str, folder: Path) -> None:
    file = folder / "central.yaml"
    file.write_bytes(encoded(text))
    try:
        load_central(file)
    except UserError as error:
        assert error.problems


SETTINGS = st.one_of(
    st.text(max_size=20),
    st.builds(
        "{}{}{}={}".format,
        st.sampled_from(FIELDS),
        st.sampled_from(["", ".", "[0]", "[9]", "[0].", ".x.", "[", "..", "[-1]"]),
        st.sampled_from([*FIELDS, ""]),
        st.sampled_from(WORDS),
    ),
)
RANDOM = st.one_of(st.text(), st.text(alphabet=string.printable), st.lists(st.sampled_from(WORDS)).map(" ".join))


@FEW
@given(text=st.one_of(mutated(TEXTS), RANDOM))
def test_any_text(text: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    check_text(text, tmp_path_factory.getbasetemp())


@FEW
@given(content=st.one_of(st.binary(), spoiled()))
def test_any_bytes(content: bytes, tmp_path_factory: pytest.TempPathFactory) -> None:
    check_bytes(content, tmp_path_factory.getbasetemp())


@FEW
@given(values=edited(TEXTS))
def test_any_values(values: Any) -> None:
    check_values(values)


@FEW
@given(text=st.sampled_from(TEXTS), setting=SETTINGS)
def test_any_setting(text: str, setting: str) -> None:
    check_setting(text, setting)


@FEW
@given(text=st.one_of(mutated(CENTRAL), edited(CENTRAL).map(dump_yaml)))
def test_any_central_training(text: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    check_central(text, tmp_path_factory.getbasetemp())


@pytest.mark.slow
@MANY
@given(text=st.one_of(mutated(TEXTS), RANDOM))
def test_much_text(text: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    check_text(text, tmp_path_factory.getbasetemp())


@pytest.mark.slow
@MANY
@given(content=st.one_of(st.binary(), spoiled()))
def test_many_bytes(content: bytes, tmp_path_factory: pytest.TempPathFactory) -> None:
    check_bytes(content, tmp_path_factory.getbasetemp())


@pytest.mark.slow
@MANY
@given(values=edited(TEXTS))
def test_many_values(values: Any) -> None:
    check_values(values)


@pytest.mark.slow
@MANY
@given(text=st.sampled_from(TEXTS), setting=SETTINGS)
def test_many_settings(text: str, setting: str) -> None:
    check_setting(text, setting)


@pytest.mark.slow
@MANY
@given(text=st.one_of(mutated(CENTRAL), edited(CENTRAL).map(dump_yaml)))
def test_many_central_trainings(text: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    check_central(text, tmp_path_factory.getbasetemp())
