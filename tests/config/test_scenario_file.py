from __future__ import annotations

import math
import time
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from fedbd.config.scenario import from_dict
from fedbd.config.scenario_file import UNFOLDED, dump_yaml, override, parse_yaml
from fedbd.errors import ScenarioError


def refused(text: str) -> str:
    with pytest.raises(ScenarioError) as caught:
        parse_yaml(text, "s.yaml")
    return str(caught.value)


# Scalars.


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("1E5", 1e5),
        ("-1e+3", -1e3),
        ("5.0e-4", 5e-4),
        (".5", 0.5),
        ("+.5", 0.5),
        ("1.", 1.0),
        ("1.5", 1.5),
        (".inf", math.inf),
        ("-.INF", -math.inf),
        ("0", 0),
        ("-7", -7),
        ("+7", 7),
        ("0x1f", 31),
        ("12345678901234567890", 12345678901234567890),
        ("true", True),
        ("False", False),
        ("TRUE", True),
        ("null", None),
        ("~", None),
        ("", None),
        ("off", "off"),
        ("on", "on"),
        ("yes", "yes"),
        ("No", "No"),
        ("y", "y"),
        ("truest", "truest"),
        ("false alarm", "false alarm"),
        ("1e", "1e"),
        ("e5", "e5"),
        ("1.2.3", "1.2.3"),
        ("1e5x", "1e5x"),
        ("010", "010"),
        ("1_000", "1_000"),
        ("1:30", "1:30"),
        ("1:30.5", "1:30.5"),
        ("0b11", "0b11"),
        ("2026-01-31", "2026-01-31"),
        ("2026-01-31T10:00:00Z", "2026-01-31T10:00:00Z"),
        ("'1'", "1"),
        ('"true"', "true"),
        ("=", "="),
    ],
)
def test_scalars(text: str, value: Any) -> None:
    got = parse_yaml(f"a: {text}", "s.yaml")["a"]
    assert (type(got), got) == (type(value), value)


def test_not_a_number_is_a_float() -> None:
    assert math.isnan(parse_yaml(".nan", "s.yaml"))


def test_keys_are_text_whatever_they_look_like() -> None:
    assert parse_yaml("1: a\n2.5: b\ntrue: c\noff: d\nnull: e", "s.yaml") == {
        "1": "a",
        "2.5": "b",
        "true": "c",
        "off": "d",
        "null": "e",
    }


def test_unicode() -> None:
    assert parse_yaml('name: "Größe \\u4e2d"\nähm: [ß, 🐝]', "s.yaml") == {"name": "Größe 中", "ähm": ["ß", "🐝"]}


# What is refused.


@pytest.mark.parametrize(
    "text",
    ["a: 1\nb: 2\na: 3", "a: {b: 1, b: 1}", "- {x: 1}\n- {y: 1, y: 2}", "a: 1\n'a': 2", "a:\n  b: {c: {d: 1, d: 2}}"],
)
def test_a_key_that_stands_twice_is_refused_wherever_it_is(text: str) -> None:
    assert "must give each key once" in refused(text)


def test_the_same_key_in_two_mappings_is_none() -> None:
    assert parse_yaml("a: {x: 1}\nb: {x: 2}", "s.yaml") == {"a": {"x": 1}, "b": {"x": 2}}


@pytest.mark.parametrize(
    "text", ["? [a, b]\n: 1", "? {a: b}\n: 1", "{[a]: 1}"], ids=["list", "mapping", "list in a flow mapping"]
)
def test_a_key_is_a_word(text: str) -> None:
    assert "must be a word before the colon" in refused(text)


@pytest.mark.parametrize(
    "text",
    ["!!python/name:os.system x", "!!binary aGk=", "!!set {a, b}", "!!timestamp 2026-01-31", "!mine {a: 1}"],
)
def test_only_plain_values(text: str) -> None:
    assert "could not determine a constructor for the tag" in refused(f"a: {text}")


@pytest.mark.parametrize("text", ["!!bool maybe", "!!int x", "!!float x", "9" * 5000], ids=lambda text: text[:9])
def test_values_that_do_not_fit_their_tag(text: str) -> None:
    assert "must be YAML whose values fit their types" in refused(f"a: {text}")


@pytest.mark.parametrize("depth", [1_000, 100_000])
@pytest.mark.parametrize("opening", ["[", "{a: "])
def test_deep_nesting_ends_in_a_message(opening: str, depth: int) -> None:
    if opening == "{a: " and depth == 100_000:
        depth = 10_000  # the scanner is quadratic there
    assert refused("a: " + opening * depth) == "s.yaml: must not be nested that deeply; no scenario is"


def test_a_deep_override_ends_in_a_message() -> None:
    with pytest.raises(ScenarioError, match="must not lead that deep"):
        override({}, [".".join(["a"] * 50_000) + "=1"])


# Anchors.


def test_anchors_aliases_and_merges() -> None:
    text = "base: &b {lr: 0.1, epochs: 2}\nsame: *b\nmore: {<<: *b, lr: 0.2}\nboth: {<<: [{x: 1, y: 2}, {x: 3}]}"
    assert parse_yaml(text, "s.yaml") == {
        "base": {"lr": 0.1, "epochs": 2},
        "same": {"lr": 0.1, "epochs": 2},
        "more": {"lr": 0.2, "epochs": 2},
        "both": {"x": 1, "y": 2},
    }


def test_an_unknown_alias_is_refused() -> None:
    assert refused("a: *b") == "s.yaml:1:4: must be YAML: found undefined alias 'b'"


@pytest.mark.parametrize("text", ["a: &a {b: *a}", "a: &a [*a]", "a: &a {b: {c: [*a]}}"])
def test_an_alias_inside_of_what_it_names_is_refused(text: str) -> None:
    assert "an alias stands inside of what it names" in refused(text)


def bomb(levels: int, width: int) -> str:
    """Return a few lines that stand for width ** levels values ("billion laughs")."""
    lines = ["l0: &l0 x"]
    lines += [f"l{i}: &l{i} [{', '.join([f'*l{i - 1}'] * width)}]" for i in range(1, levels + 1)]
    return "\n".join(lines)


@pytest.mark.parametrize(("levels", "width"), [(9, 9), (100, 2), (200, 10)])
def test_an_alias_bomb_is_refused_at_once(levels: int, width: int) -> None:
    started = time.perf_counter()
    assert "must not unfold by its aliases (*name) to more than 100,000 values" in refused(bomb(levels, width))
    assert time.perf_counter() - started < 5


def test_a_merge_bomb_is_refused_at_once() -> None:
    lines = ["l0: &l0 {k0: x}"]
    lines += [f"l{i}: &l{i} {{<<: [*l{i - 1}, *l{i - 1}], k{i}: x}}" for i in range(1, 40)]
    started = time.perf_counter()
    assert "must not unfold" in refused("\n".join(lines))
    assert time.perf_counter() - started < 5


def test_aliases_below_the_limit_are_fine_and_long_lists_need_none() -> None:
    assert len(parse_yaml(bomb(3, 9), "s.yaml")["l3"]) == 9
    many = "ids: [" + ", ".join(map(str, range(3000))) + "]"
    assert len(parse_yaml(many, "s.yaml")["ids"]) == 3000 < UNFOLDED


def test_a_bomb_below_the_limit_in_a_field_is_refused_like_any_list() -> None:
    raw = parse_yaml(bomb(4, 9) + "\nname: *l4\nrounds: 1\ndata: digits\nmodel: mlp", "s.yaml")
    with pytest.raises(ScenarioError, match="name: must be text, got a list"):
        from_dict(raw)


# Settings.


def test_override_sets_makes_and_replaces_without_touching_its_input() -> None:
    raw = {"a": {"b": 1}, "l": [{"x": 1}, {"x": 2}]}
    before = dump_yaml(raw)
    got = override(raw, ["a.b=2", "a.c.d=1e-4", "l[1].x=off", "n={name: ckks}", "m=", "s=a=b"])
    assert got == {
        "a": {"b": 2, "c": {"d": 1e-4}},
        "l": [{"x": 1}, {"x": "off"}],
        "n": {"name": "ckks"},
        "m": None,
        "s": "a=b",
    }
    assert dump_yaml(raw) == before


def test_override_of_a_null_makes_a_mapping() -> None:
    assert override({"secure_sum": None}, ["secure_sum.name=ckks"]) == {"secure_sum": {"name": "ckks"}}


def test_override_takes_a_name_for_a_mapping_with_it() -> None:
    assert override({"model": "mlp"}, ["model.hidden=[8]"]) == {"model": {"name": "mlp", "hidden": [8]}}


def test_later_settings_win_and_nested_lists_are_reached() -> None:
    assert override({"a": [[1, 2], [3]]}, ["a[0][1]=5", "a[0][1]=6"]) == {"a": [[1, 6], [3]]}


# Writing.

PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=200, deadline=None)
@given(PLAIN)
def test_what_is_written_is_read_back(value: Any) -> None:
    assert parse_yaml(dump_yaml({"a": value}), "s.yaml") == {"a": value}


@pytest.mark.parametrize(
    "text", ["1e-4", "off", "010", "1:30", "true", "null", "2026-01-31", "1_000", "0x1f", "~", "="]
)
def test_text_that_looks_like_something_else_is_quoted_for_every_reader(text: str) -> None:
    written = dump_yaml({"a": text})
    assert parse_yaml(written, "s.yaml") == yaml.safe_load(written) == {"a": text}
