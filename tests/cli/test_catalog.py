from __future__ import annotations

import dataclasses
import importlib
from dataclasses import dataclass, field

import pytest

from fedbd import registry
from fedbd.cli import catalog
from fedbd.cli.catalog import describe, entries
from fedbd.config.schema import CONTRACTS, own_problems
from fedbd.errors import FedBDError, ScenarioError, UserError
from fedbd.registry import METHODS, choice, either, location, near_miss, resolve

NAMES = [(kind, name) for kind, methods in METHODS.items() for name in methods]
OURS = [(kind, name) for kind, name in NAMES if kind != "strategy"]


def test_every_registered_method_is_listed_once_in_order() -> None:
    assert [(entry.kind, entry.name) for entry in entries()] == NAMES
    assert [entry.name for entry in entries("aggregation")] == list(METHODS["aggregation"])


def test_every_method_says_in_one_line_what_it_is() -> None:
    for entry in entries():
        assert 10 < len(entry.summary) <= 120, entry
        assert "``" not in entry.summary, entry


@pytest.mark.parametrize(("kind", "name"), OURS, ids=[f"{kind}/{name}" for kind, name in OURS])
def test_every_method_is_a_frozen_keyword_only_dataclass_of_its_kind(kind: str, name: str) -> None:
    cls = resolve(kind, name, kind)
    assert cls.__dataclass_params__.frozen
    fields = [field for field in dataclasses.fields(cls) if field.init]
    assert all(field.kw_only for field in fields)
    contract = CONTRACTS.get(kind)
    if contract is not None:
        missing = [member for member in vars(contract) if not member.startswith("_") and not hasattr(cls, member)]
        assert missing == []
    required = [field.name for field in fields if field.default is field.default_factory]
    if not required:
        assert own_problems(cls()) == []
        assert hash(cls()) == hash(cls())
    assert cls.__doc__


@pytest.mark.parametrize(("kind", "name"), NAMES, ids=[f"{kind}/{name}" for kind, name in NAMES])
def test_the_description_names_the_class_and_every_field_with_its_default(kind: str, name: str) -> None:
    cls, text = resolve(kind, name, kind), describe(name)
    assert f"{kind}: {name}  ({cls.__module__}:{cls.__name__})" in text
    if not dataclasses.is_dataclass(cls):
        return
    lines = text.partition("\nFields:\n")[2].partition("\n\n")[0].splitlines()
    assert len(lines) == len(dataclasses.fields(cls))
    for line, entry in zip(lines, dataclasses.fields(cls), strict=True):
        default = "required" if entry.default is dataclasses.MISSING else repr(entry.default)
        if entry.default_factory is not dataclasses.MISSING:
            default = repr(entry.default_factory())
        assert line.startswith(f"  {entry.name}: ")
        assert line.endswith(f" = {default}")


def test_a_description_by_hand() -> None:
    assert describe("norm_clip").endswith(
        "Fields:\n  bound: float = 3.0\n  where: Literal['server', 'client'] = 'server'"
    )
    assert "https://arxiv.org/abs/1911.07963" in describe("norm_clip")


@dataclass(frozen=True, kw_only=True)
class Listed:
    """Has a field of every sort."""

    must: int
    may: tuple[int, ...] = field(default_factory=tuple)


def test_required_fields_and_factories_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalog, "METHODS", {"model": {"one": ""}, "data": {"one": ""}})
    monkeypatch.setattr(catalog, "resolve", lambda kind, name, path: Listed)
    text = describe("one")
    assert text.count("must: int = required") == text.count("may: tuple[int, ...] = ()") == 2  # once for each kind
    assert text.index("model: one") < text.index("data: one")


@pytest.mark.parametrize(
    ("word", "message"),
    [
        (
            "norm_clap",
            "name: must be a method, a scenario file or a run's folder, got 'norm_clap'; did you mean 'norm_clip'?",
        ),
        ("zzz", "name: must be a method, a scenario file or a run's folder, got 'zzz'; fedbd list names the methods"),
    ],
)
def test_an_unknown_method(word: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        describe(word)
    assert str(caught.value) == message


def test_an_unknown_kind() -> None:
    with pytest.raises(UserError) as caught:
        entries("cleanups")
    kinds = "data, partition, model, trigger, attack, evasion, local_defense, central_defense, secure_sum, aggregation"
    assert (
        str(caught.value)
        == f"kind: must be {kinds}, cleanup, detection or strategy, got 'cleanups'; did you mean 'cleanup'?"
    )


# The registry.


def test_locations() -> None:
    assert location("model", "mlp", "model") == "fedbd.models.mlp:Mlp"
    assert location("model", "a.b_c:D1", "model") == "a.b_c:D1"
    for name in ("a.b", "a:b:c", ":b", "a:", "a b:c", "../a:b", "1a:b", "a..b:c"):
        with pytest.raises(ScenarioError):
            location("model", name, "model")


def test_choices_in_words() -> None:
    assert [either(words) for words in (["a"], ["a", "b"], ["a", "b", "c"])] == ["a", "a or b", "a, b or c"]
    assert choice("cleanup") == f"{', '.join(METHODS['cleanup'])} or package.module:Class"
    assert choice("secure_sum") == "ckks"


def test_near_misses() -> None:
    assert near_miss("momentm", ["lr", "momentum"]) == "did you mean 'momentum'?"
    assert near_miss("learning_rate", ["lr_step", "lr"]) == ""


def test_one_of_our_own_that_cannot_be_imported_is_no_mistake_of_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry.METHODS["model"], "mlp", "fedbd.models.gone:Mlp")
    with pytest.raises(FedBDError) as caught:
        resolve("model", "mlp", "model.name")
    assert not isinstance(caught.value, UserError)
    assert str(caught.value) == (
        "model mlp: fedbd.models.gone cannot be imported: No module named 'fedbd.models.gone'; see fedbd doctor"
    )


@pytest.mark.parametrize(
    ("kind", "package"),
    [
        ("cleanup", "cleanup"),
        ("detection", "detection"),
        ("aggregation", "aggregation"),
        ("local_defense", "local"),
        ("central_defense", "local"),
    ],
)
def test_every_defense_can_be_imported_from_its_package(kind: str, package: str) -> None:
    """``from fedbd.defenses.cleanup import RNP``, as in a notebook."""
    module = importlib.import_module(f"fedbd.defenses.{package}")
    for name in METHODS[kind]:
        cls = resolve(kind, name, kind)
        assert getattr(module, cls.__name__) is cls
        assert cls.__name__ in dir(module)
    with pytest.raises(AttributeError, match="Nothing"):
        _ = module.Nothing
