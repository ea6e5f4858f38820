from __future__ import annotations

import copy
from dataclasses import dataclass, replace

import pytest
import torch
from torch import nn

from fedbd.attacks.grid_trigger import GridTrigger
from fedbd.central.repair import Row, Truth, judge, repair, repair_all, stamped_inputs
from fedbd.errors import MethodRefused
from fedbd.metrics import BRIEF
from fedbd.types import Clues, Notes, Samples, TrustedData


class Constant(nn.Module):
    """Says ``bias``'s largest entry, whatever it sees."""

    def __init__(self, label: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.eye(3)[label])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.bias.expand(len(x), 3)


@dataclass(frozen=True, kw_only=True)
class Says:
    """Makes the model say a label; notes a random number and what it was told."""

    label: int
    oracle: bool = False

    def clean(
        self, model: nn.Module, trusted: TrustedData | None, clues: Clues, rng: torch.Generator
    ) -> tuple[nn.Module, Clues, Notes]:
        fixed = copy.deepcopy(model)
        with torch.no_grad():
            fixed.bias.copy_(torch.eye(3)[self.label])
        was = int(model.bias.argmax())
        notes = {"was": was, "target": clues.target, "drawn": int(torch.randint(10**9, (1,), generator=rng))}
        return fixed, replace(clues, target=clues.target or 9, unlearned=fixed), {"acted": True, **notes}


@dataclass(frozen=True, kw_only=True)
class Finds:
    repairs = False

    def clean(
        self, model: nn.Module, trusted: TrustedData | None, clues: Clues, rng: torch.Generator
    ) -> tuple[nn.Module, Clues, Notes]:
        return copy.deepcopy(model), replace(clues, target=2), {"acted": True}


@dataclass(frozen=True, kw_only=True)
class Refuses:
    def clean(
        self, model: nn.Module, trusted: TrustedData | None, clues: Clues, rng: torch.Generator
    ) -> tuple[nn.Module, Clues, Notes]:
        raise MethodRefused("there is nothing; add something")


@pytest.fixture
def test() -> Samples:
    labels = torch.tensor([0, 0, 1, 1, 1, 2, 2, 2, 2, 2])
    return Samples(torch.zeros(10, 1, 4, 4, dtype=torch.uint8), labels)


def rows_of(test: Samples, methods: dict[str, object], **more: object) -> list[Row]:
    def judged(model: nn.Module) -> Notes:
        return judge(model, test, 3, GridTrigger(), 0)

    truth = Truth(trigger=GridTrigger(), target=0, triggered=stamped_inputs(test, GridTrigger(), 0))
    return list(repair_all(Constant(0), methods, None, Clues(), 1, judged, truth=truth, **more))  # type: ignore[arg-type]


def test_one_method_on_a_model() -> None:
    model = Constant(0)
    found = repair(model, Says(label=1), None, Clues(), torch.Generator().manual_seed(0))
    assert (found.acted, found.refused, found.notes["was"]) == (True, False, 0)
    assert found.seconds >= 0
    assert int(model.bias.argmax()) == 0
    assert int(found.model.bias.argmax()) == 1
    refused = repair(model, Refuses(), None, Clues(target=1), torch.Generator())
    assert (refused.acted, refused.refused, refused.model is model) == (False, True, True)
    assert refused.notes == {"acted": False, "reason": "there is nothing; add something"}
    assert refused.clues.target == 1


def test_the_measures_are_counts(test: Samples) -> None:
    measured = judge(Constant(0), test, 3, GridTrigger(), 0)
    assert list(measured) == list(BRIEF)
    assert measured["clean_accuracy"] == pytest.approx(0.2)
    assert measured["clean_accuracy_without_target"] == 0
    assert measured["target_class_accuracy"] == 1
    assert measured["attack_success"] == 1
    assert measured["robust_accuracy"] == 0
    assert measured["collapsed"]
    bare = judge(Constant(2), test, 3, None, None)
    assert (bare["clean_accuracy"], bare["attack_success"]) == (0.5, None)


def test_each_method_starts_from_the_original(test: Samples) -> None:
    rows = rows_of(test, {"one": Says(label=1), "finds": Finds(), "two": Says(label=2)})
    assert [row.repaired.notes.get("was") for row in rows] == [0, None, 0]
    assert [row.repaired.notes.get("target") for row in rows] == [None, None, None]
    assert [row.before["clean_accuracy"] for row in rows] == [0.2, 0.2, 0.2]
    assert [row.after["clean_accuracy"] for row in rows] == pytest.approx([0.3, 0.2, 0.5])
    assert [row.repairs for row in rows] == [True, False, True]
    assert rows[0].repaired.notes["drawn"] == rows_of(test, {"one": Says(label=1)})[0].repaired.notes["drawn"]


def test_methods_draw_alike_so_that_they_are_pairs_and_steps_of_a_chain_do_not(test: Samples) -> None:
    both = {"one": Says(label=1), "two": Says(label=2)}
    drawn = [row.repaired.notes["drawn"] for row in rows_of(test, both)]
    assert drawn[0] == drawn[1]
    chained = [row.repaired.notes["drawn"] for row in rows_of(test, both, chain=True)]
    assert chained[0] == drawn[0] != chained[1]


def test_in_a_chain_models_and_clues_flow(test: Samples) -> None:
    rows = rows_of(test, {"one": Says(label=1), "finds": Finds(), "no": Refuses(), "two": Says(label=2)}, chain=True)
    assert [row.repaired.notes.get("was") for row in rows] == [0, None, None, 1]
    assert rows[3].repaired.notes["target"] == 2
    assert [row.before["clean_accuracy"] for row in rows] == pytest.approx([0.2, 0.3, 0.3, 0.3])
    assert rows[2].after == rows[2].before


@pytest.mark.parametrize("chain", [False, True])
def test_the_truth_is_told_to_an_oracle_alone(test: Samples, chain: bool) -> None:
    wanted = {"before": Says(label=1), "oracle": Says(label=1, oracle=True), "after": Says(label=2)}
    rows = rows_of(test, wanted, chain=chain)
    assert [row.repaired.notes["target"] for row in rows] == [None, 0, 9 if chain else None]
    assert [row.oracle for row in rows] == [False, True, chain]
    assert rows[2].repaired.clues.trigger is None
    assert rows[2].repaired.clues.triggered is None


def test_the_twin_is_repaired_in_the_same_way(test: Samples) -> None:
    rows = rows_of(test, {"one": Says(label=1), "two": Says(label=0)}, twin=Constant(2))
    assert rows[0].twin_before == judge(Constant(2), test, 3, GridTrigger(), 0)
    assert rows[0].twin_after == judge(Constant(1), test, 3, GridTrigger(), 0)
    assert rows[0].price == pytest.approx(0.2)
    assert rows[0].floor is None  # it collapsed
    sound = replace(rows[0], twin_after={**rows[0].twin_after, "collapsed": False})
    assert sound.floor == 0
    flat = sound.flat()
    assert flat["attack_success_floor"] == 0
    assert flat["clean_accuracy_price"] == pytest.approx(0.2)
    assert flat["clean_accuracy_after"] == pytest.approx(0.3)
    assert rows_of(test, {"one": Says(label=1)})[0].price is None


def test_triggered_inputs_are_stamped_and_none_of_the_target(test: Samples) -> None:
    found = stamped_inputs(test, GridTrigger(), 2, most=3)
    assert found.shape == (3, 1, 4, 4)
    assert found.dtype == torch.uint8
    assert found[:, 0, 3, 3].tolist() == [255] * 3
    truth = Truth(trigger=GridTrigger(), target=2, triggered=found)
    rng = torch.Generator().manual_seed(0)
    heard = [repair(Constant(0), Says(label=1, oracle=oracle), None, Clues(), rng, truth) for oracle in (True, False)]
    assert [result.notes["target"] for result in heard] == [2, None]
