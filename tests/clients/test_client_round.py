"""One client's round: honest clients train plainly, polluted ones run the defense, attackers ignore it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedbd.config.plans import DetectionPlan, Selection
from fedbd.config.scenario import from_dict
from fedbd.config.schema import Method
from fedbd.errors import MethodRefused
from fedbd.flower.app_loader import load_component
from fedbd.models.checkpoint import load_checkpoint
from fedbd.models.initialize import seeded
from fedbd.params import assign, flatten
from fedbd.prepared import Prepared, prepare
from fedbd.running.engines import flower_app_dir
from fedbd.running.runs import run
from fedbd.seeding import torch_rng
from fedbd.training import train

client_round: Any = load_component(flower_app_dir(), "clients", "step", "client_round")
GRID = {"trigger": {"name": "grid"}, "target": 0}
RAW: dict[str, Any] = {
    "name": "client",
    "rounds": 3,
    "data": {"name": "digits"},
    "partition": {"name": "iid", "clients": 3},
    "model": {"name": "cnn", "width": 4},
    "training": {"epochs": 1, "lr": 0.1, "lr_decay": 0.5},
    "attacks": [
        {"name": "badnets", "label": "a", "clients": {"ids": [0]}, "rounds": {"first": 2}, **GRID},
        {"name": "badnets", "label": "p", "role": "polluted", "per": "dataset", "clients": {"ids": [1]}, **GRID},
    ],
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spy:
    """A local defense that does not train, and keeps what it saw of the data."""

    def fit(self, model: Any, data: Any, plan: Any, memory: Any, rng: Any) -> Any:
        seen = int(memory["visits"][0]) + 1 if memory else 1
        white = (data.images[:, 0, -1, -1] == 255) & (data.labels == 0)
        return {"visits": np.array([seen]), "isolated": torch.nonzero(white)[:, 0].numpy()[:4]}, {"lr": plan.lr}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Forgetful:
    """A family of models with Dropout."""

    def build(self, shape: Any, classes: int, rng: torch.Generator) -> Any:
        sides, nn = shape[1] * shape[2], torch.nn
        return seeded(lambda: nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(sides, classes)), rng)


@pytest.fixture(scope="module")
def prepared() -> Prepared:
    return prepare(from_dict(RAW))


@pytest.fixture(scope="module")
def spied(prepared: Prepared) -> Prepared:
    scenario = dataclasses.replace(prepared.scenario, local_defense=Method("spy", Spy()))
    return Prepared(scenario, prepared.federation)


def test_an_honest_round_is_plain_training(prepared: Prepared) -> None:
    weights = flatten(prepared.new_model())
    result = client_round(prepared, 2, 3, weights, {})
    model = prepared.new_model()
    assign(model, weights)
    plan = dataclasses.replace(prepared.scenario.training, lr=0.1 * 0.5**2)
    train(model, prepared.federation.client(2), plan, torch_rng(0, "train", 3, 2))
    delta = flatten(model) - weights
    np.testing.assert_array_equal(result.weights, weights + delta)
    assert result.examples == len(prepared.federation.client(2))


def test_rounds_and_clients_do_not_depend_on_each_other(prepared: Prepared) -> None:
    weights = flatten(prepared.new_model())
    alone = client_round(prepared, 2, 2, weights, {}).weights
    client_round(prepared, 0, 2, weights, {})
    client_round(prepared, 1, 1, weights * 0, {})
    np.testing.assert_array_equal(client_round(prepared, 2, 2, weights, {}).weights, alone)


def test_an_attacker_is_honest_before_its_window_and_ignores_the_defense_in_it(spied: Prepared) -> None:
    weights = flatten(spied.new_model())
    before = client_round(spied, 0, 1, weights, {})
    assert before.memory["visits"] == [1]
    np.testing.assert_array_equal(before.weights, weights)  # the spy does not train
    during = client_round(spied, 0, 2, weights, before.memory)
    assert during.memory is before.memory
    assert not np.array_equal(during.weights, weights)
    assert during.notes["poisoned"] > 0


def test_a_polluted_client_runs_the_defense_and_its_isolation_is_judged(spied: Prepared) -> None:
    weights = flatten(spied.new_model())
    first = client_round(spied, 1, 1, weights, {})
    second = client_round(spied, 1, 2, weights, first.memory)
    assert second.memory["visits"] == [2]
    assert first.notes["isolation_precision"] == 1.0
    poisoned = round(20 / 64 * len(spied.federation.client(1)))
    assert first.notes["isolation_recall"] == pytest.approx(4 / poisoned)
    assert "isolation_precision" not in second.notes  # the kept set is judged once, by the data it was taken from


def test_isolation_on_an_honest_client_has_precision_0_and_no_recall(spied: Prepared) -> None:
    weights = flatten(spied.new_model())
    data = spied.federation.client(2)
    result = client_round(spied, 2, 1, weights, {})
    hits = int(((data.images[:, 0, -1, -1] == 255) & (data.labels == 0)).sum())
    expected = {"isolation_precision": 0.0, "isolation_recall": None} if hits else {}
    assert {name: value for name, value in result.notes.items() if name in expected} == expected


@pytest.mark.parametrize("role", ["attacker", "polluted"])
def test_a_client_without_images_of_the_target_class_says_that_it_poisoned_nothing(
    prepared: Prepared, role: str
) -> None:
    clean = {"name": "badnets", "role": role, "per": "dataset", "labels": "clean", "clients": {"ids": [1]}, **GRID}
    scenario = from_dict(
        {
            **RAW,
            "attacks": [clean],
            "local_defense": {"name": "abl", "isolate_after": 1},
            "detection": [{"name": "abl_isolation", "where": "training"}] if role == "polluted" else [],
        }
    )
    partition = prepared.federation.partitions[1]
    others = partition[prepared.dataset.train.labels.numpy()[partition] != 0]
    partitions = [part if i != 1 else others for i, part in enumerate(prepared.federation.partitions)]
    without = dataclasses.replace(prepared.federation, partitions=tuple(partitions))
    weights = flatten(prepared.new_model())
    notes = client_round(Prepared(scenario, without), 1, 1, weights, {}).notes
    assert notes["poisoned"] == 0
    full = client_round(Prepared(scenario, prepared.federation), 1, 1, weights, {}).notes
    if role == "polluted":
        assert (notes["detection"]["abl_isolation"]["positives"], notes["detection"]["abl_isolation"]["auc"]) == (
            0,
            None,
        )
        assert full["detection"]["abl_isolation"]["positives"] > 0
    else:
        assert full["poisoned"] > 0


def test_integer_buffers_are_the_global_models_not_the_last_clients(prepared: Prepared) -> None:
    weights = flatten(prepared.new_model())
    state = prepared.model.state_dict()
    counters = {name: np.array(7) for name, entry in state.items() if not entry.is_floating_point()}
    assert counters
    client_round(prepared, 2, 1, weights, {}, counters)
    steps = -(-len(prepared.federation.client(2)) // 64)
    assert {int(prepared.model.state_dict()[name]) for name in counters} == {7 + steps}


def test_only_chosen_clients_run_the_local_defense(spied: Prepared) -> None:
    chosen = dataclasses.replace(spied.scenario, local_defense_clients=Selection(ids=(0, 1)))
    some = Prepared(chosen, spied.federation)
    weights = flatten(spied.new_model())
    assert client_round(some, 1, 1, weights, {}).memory["visits"] == [1]
    plain = client_round(some, 2, 1, weights, {})
    assert plain.memory == {}
    assert not np.array_equal(plain.weights, weights)  # it trains, the spy does not
    during = client_round(some, 0, 2, weights, {})  # chosen, but it attacks
    assert during.memory == {}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Corner:
    """A detector that looks at the lower right corner, and keeps what it was given."""

    value: float = 1.0
    refuses: bool = False

    def score(self, model: Any, data: Any, trusted: Any, rng: torch.Generator) -> Any:
        if self.refuses:
            raise MethodRefused("not today")
        white = (data.images[:, 0, -1, -3] == 255) & (data.images[:, 0, -2, -2] == 255) & (data.labels == 0)
        scores = white.to(torch.float64).numpy() * self.value
        return scores, {
            "trusted": trusted is not None,
            "samples": len(data),
            "drawn": int(torch.randint(99, (1,), generator=rng)),
        }


def searched(prepared: Prepared, *plans: DetectionPlan) -> Prepared:
    return Prepared(dataclasses.replace(prepared.scenario, detection=plans), prepared.federation)


def looking(label: str, **fields: Any) -> DetectionPlan:
    own = {name: fields.pop(name) for name in ("value", "refuses") if name in fields}
    return DetectionPlan(method=Method("corner", Corner(**own)), label=label, where="training", **fields)


def test_a_polluted_client_scores_its_own_data_and_only_notes_what_it_found(prepared: Prepared) -> None:
    weights = flatten(prepared.new_model())
    plans = (looking("a"), looking("later", rounds=(3,)), dataclasses.replace(looking("b"), where="incoming"))
    result = client_round(searched(prepared, *plans), 1, 1, weights, {})
    assert set(result.notes["detection"]) == {"a"}
    found = result.notes["detection"]["a"]
    size = len(prepared.federation.client(1))
    assert (found["auc"], found["precision"]) == (1.0, 1.0)
    assert found["positives"] == round(20 / 64 * size)
    assert found["positives"] + found["negatives"] == size == found["notes"]["samples"]
    assert found["notes"]["trusted"] is False
    np.testing.assert_array_equal(result.weights, client_round(prepared, 1, 1, weights, {}).weights)


def test_nobody_else_looks_for_poison_in_its_data(prepared: Prepared) -> None:
    weights = flatten(prepared.new_model())
    both = searched(prepared, looking("a"))
    assert "detection" not in client_round(both, 2, 2, weights, {}).notes  # honest
    assert "detection" not in client_round(both, 0, 2, weights, {}).notes  # an attacker
    quiet = tuple(dataclasses.replace(attack, enabled=False) for attack in both.scenario.attacks)
    twin = Prepared(dataclasses.replace(both.scenario, attacks=quiet), both.federation)
    assert "detection" not in client_round(twin, 1, 1, weights, {}).notes


def test_a_detector_that_cannot_judge_a_clients_data_says_so(prepared: Prepared) -> None:
    plans = (looking("refused", refuses=True), looking("lost", value=float("nan")))
    found = client_round(searched(prepared, *plans), 1, 1, flatten(prepared.new_model()), {}).notes["detection"]
    assert found["refused"]["notes"] == {"acted": False, "reason": "not today"}
    assert found["lost"]["notes"]["acted"] is False
    assert found["lost"]["notes"]["reason"].endswith("scores are not finite")
    assert all("auc" not in entry and entry["positives"] > 0 for entry in found.values())


def distance(prepared: Prepared, weights: np.ndarray[Any, Any]) -> float:
    """Return how far the trained parameters (no running statistics) are from the initial ones."""
    model, start = prepared.new_model(), prepared.new_model()
    assign(model, weights)
    pairs = zip(model.parameters(), start.parameters(), strict=True)
    return float(torch.stack([(a - b).detach().square().sum() for a, b in pairs]).sum().sqrt())


def moved(prepared: Prepared, client: int, round_: int, mu: float) -> float:
    weights = flatten(prepared.new_model())
    return distance(prepared, client_round(prepared, client, round_, weights, {}, None, mu).weights)


def test_the_proximal_term_holds_honest_and_polluted_clients_back_and_no_attacker(prepared: Prepared) -> None:
    assert moved(prepared, 2, 1, 5.0) < 0.8 * moved(prepared, 2, 1, 0.0)  # honest
    assert moved(prepared, 1, 1, 5.0) < 0.8 * moved(prepared, 1, 1, 0.0)  # polluted
    assert moved(prepared, 0, 1, 5.0) < 0.8 * moved(prepared, 0, 1, 0.0)  # an attacker before its window
    assert moved(prepared, 0, 2, 5.0) == moved(prepared, 0, 2, 0.0)  # and in it


def test_flowers_fedprox_reaches_the_clients(tmp_path: Path) -> None:
    """The whole way: the strategy puts mu into the message, the app reads it, a large mu keeps the model in place."""

    def end(mu: float | None) -> np.ndarray[Any, Any]:
        strategy = {} if mu is None else {"strategy": {"name": "fedprox", "arguments": {"proximal_mu": mu}}}
        fields = {**RAW, "name": f"mu{mu}", "rounds": 1, "attacks": [], "engine": {"executor": "serial"}, **strategy}
        model = prepare(from_dict(RAW)).new_model()
        load_checkpoint(model, run(from_dict(fields), tmp_path).path / "model.safetensors")
        return flatten(model)

    prepared, free = prepare(from_dict(RAW)), end(None)
    assert distance(prepared, end(5.0)) < 0.8 * distance(prepared, free)
    np.testing.assert_allclose(end(1e-9), free, atol=1e-6)


@pytest.mark.parametrize("client", [0, 1, 2])
def test_dropout_depends_on_seed_round_and_client_alone(client: int, prepared: Prepared) -> None:
    """Not on the process that a client runs in and on who ran there before: engines give the same weights."""
    scenario = dataclasses.replace(prepared.scenario, model=Method("forgetful", Forgetful()))
    own = Prepared(scenario, prepared.federation)
    weights = flatten(own.new_model())
    with torch.random.fork_rng():
        torch.manual_seed(1)
        before = torch.get_rng_state()
        one = client_round(own, client, 2, weights, {}).weights
        assert torch.equal(torch.get_rng_state(), before)
        torch.manual_seed(2)
        np.testing.assert_array_equal(client_round(own, client, 2, weights, {}).weights, one)
        assert not np.array_equal(client_round(own, client, 3, weights, {}).weights, one)
