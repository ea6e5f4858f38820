from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fedbd.attacks.badnets import BadNets
from fedbd.central.holdings import method_problems
from fedbd.compatibility import check
from fedbd.config.plans import CleanupPlan
from fedbd.config.scenario import from_dict
from fedbd.config.schema import Method
from fedbd.targets import class_problem, one_label, target_problem, victims, wanted_labels

LABELS = torch.tensor([0, 1, 2, 2, 1])


def test_what_is_wanted_of_each_image() -> None:
    assert wanted_labels(LABELS, 1, 3).tolist() == [1, 1, 1, 1, 1]
    assert wanted_labels(LABELS, "all_to_all", 3).tolist() == [1, 2, 0, 0, 2]
    assert wanted_labels(LABELS, "all_to_all", 4).tolist() == [1, 2, 3, 3, 2]
    assert LABELS.tolist() == [0, 1, 2, 2, 1]


def test_victims_do_not_have_the_wanted_label_anyway() -> None:
    assert victims(LABELS, 1).tolist() == [True, False, True, True, False]
    assert victims(LABELS, 0).tolist() == [False, True, True, True, True]
    for target in ("all_to_all", None):
        assert victims(LABELS, target).all()  # type: ignore[arg-type]


def test_one_label() -> None:
    assert (one_label(0), one_label(7), one_label("all_to_all")) == (0, 7, None)


@pytest.mark.parametrize(
    ("attack", "said"),
    [
        (BadNets(), None),
        (BadNets(labels="clean"), "with labels: clean an attack stamps the images of one class, got 'all_to_all'; set"),
        (object(), "'mine' has one target class, got 'all_to_all'; name a class, or take badnets"),
    ],
)
def test_an_attack_says_whether_it_can_be_all_to_all(attack: Any, said: str | None) -> None:
    problem = target_problem("all_to_all", "mine", attack, "attacks[0].target")
    assert (problem is None) if said is None else str(problem).startswith(f"attacks[0].target: must be a label: {said}")
    assert target_problem(0, "mine", attack, "attacks[0].target") is None


def test_a_label_is_a_class_of_the_data() -> None:
    assert [class_problem(target, 3, "t") for target in (0, 2, "all_to_all", None)] == [None] * 4  # type: ignore[arg-type]
    assert str(class_problem(3, 3, "t")) == "t: must be a class of the data, 0 to 2, got 3"
    assert class_problem(-1, 3, "t") is not None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Told:
    """A cleanup that needs the real label."""

    oracle: bool = True
    needs_label: bool = True

    def clean(self, model: Any, trusted: Any, clues: Any, rng: torch.Generator) -> Any:
        return model, clues, {}


def test_an_oracle_that_needs_one_label_is_refused_all_to_all() -> None:
    raw: dict[str, Any] = {"name": "t", "rounds": 3, "data": "digits", "model": "cnn"}
    attack = {"name": "badnets", "clients": {"count": 2}, "trigger": "grid"}
    for target, expected in ((0, []), ("all_to_all", ["cleanup[0].oracle"])):
        scenario = from_dict({**raw, "attacks": [{**attack, "target": target}]})
        scenario = dataclasses.replace(scenario, cleanup=(CleanupPlan(method=Method("told", Told())),))
        problems = check(scenario)
        assert [problem.path for problem in problems] == expected
    assert str(problems[0]) == (
        "cleanup[0].oracle: must be false: 'told' is told one target label, and all_to_all has none, got true; leave "
        "the cleanup out, or give the first attack a label as its target"
    )


def test_the_same_oracle_is_refused_on_a_model_from_anywhere() -> None:
    subject: Any = SimpleNamespace(trigger=object(), target="all_to_all", model=None, source=None, reference=None)
    (problem,) = method_problems({"told": Told()}, subject, None)
    assert str(problem) == "--method told: is told one target label, and all_to_all has none; take another method"
    subject.target = 3
    assert method_problems({"told": Told()}, subject, None) == []
