"""What follows aggregation: which model is served, what is measured on which, and what the record says was seen."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fedbd.config.run_text import message_text
from fedbd.config.scenario import from_dict, twin_of
from fedbd.config.schema import Method
from fedbd.errors import MethodRefused
from fedbd.flower.app_loader import load_component
from fedbd.flower.mods import checksum
from fedbd.flower.outcome import Outcome
from fedbd.params import flatten
from fedbd.prepared import Prepared, prepare
from fedbd.records.record import RunFolder, read_rounds
from fedbd.running.engines import flower_app_dir
from fedbd.types import Clues, TrustedData

Rounds: Any = load_component(flower_app_dir(), "server", "step", "Rounds")
RAW: dict[str, Any] = {
    "name": "server",
    "rounds": 3,
    "data": {"name": "digits"},
    "partition": {"name": "iid", "clients": 4},
    "trusted": {"size": 100},
    "model": {"name": "cnn", "width": 4},
    "attacks": [
        {"name": "badnets", "clients": {"ids": [0]}, "target": 3, "trigger": {"name": "grid"}, "rounds": {"first": 2}}
    ],
    "evaluation": {"twin": False},
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Constant:
    """A cleanup that makes the model predict one class."""

    label: int = 3

    def clean(
        self, model: nn.Module, trusted: TrustedData | None, clues: Clues, rng: torch.Generator
    ) -> tuple[nn.Module, Clues, dict[str, Any]]:
        import copy

        broken = copy.deepcopy(model)
        last = [module for module in broken.modules() if isinstance(module, nn.Linear)][-1]
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        last.bias.data[self.label] = 1
        return broken, Clues(target=self.label), {"saw_target": clues.target}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Refusing:
    """A cleanup and detector that cannot act."""

    def clean(self, model: nn.Module, trusted: Any, clues: Clues, rng: torch.Generator) -> Any:
        raise MethodRefused("there is nothing to hold on to")

    def score(self, model: nn.Module, data: Any, trusted: Any, rng: torch.Generator) -> Any:
        raise MethodRefused("there is nothing to hold on to")


def prepared_with(**fields: Any) -> Prepared:
    return prepare(from_dict({**RAW, **fields}))


def with_cleanups(prepared: Prepared, *plans: tuple[Any, str, float | None]) -> Prepared:
    from fedbd.config.plans import CleanupPlan

    cleanups = tuple(
        CleanupPlan(method=Method("x", impl), label=f"c{i}", mode=mode, rollback=rollback)  # type: ignore[arg-type]
        for i, (impl, mode, rollback) in enumerate(plans)
    )
    return Prepared(dataclasses.replace(prepared.scenario, cleanup=cleanups), prepared.federation)


def outcome(prepared: Prepared, round_: int = 2, **fields: Any) -> Outcome:
    weights = flatten(prepared.new_model())
    row = np.zeros(weights.size + 1, np.int64)
    values: dict[str, Any] = {
        "round": round_,
        "participants": (0, 1, 2, 3),
        "accepted": (0, 1, 2, 3),
        "rejected": None,
        "faults": {},
        "buckets": ((0,), (1,), (2,), (3,)),
        "decryptors": (),
        "asked": fields.get("decryptors", ()),
        "start": weights,
        "weights": weights,
        "seconds": {"train": 1.0, "decrypt": 0.0, "aggregate": 0.5},
        "bytes_up": 10,
        "bytes_down": 20,
        "ciphertext_bytes": 0,
        "noise": None,
        "totals": {0: row},
        "notes": {},
    }
    return Outcome(**{**values, **fields})


def rounds_of(prepared: Prepared, folder: Path, observed: Any = None, twin: Any = None) -> Any:
    return Rounds(
        prepared=prepared,
        folder=RunFolder(folder),
        twin=twin or {},
        collect=lambda round_: observed or {},
        checksum=checksum,
    )


def test_a_copy_is_cleaned_and_the_loop_goes_on_without_it(tmp_path: Path) -> None:
    prepared = with_cleanups(prepared_with(), (Constant(), "if_stopped_now", None))
    assert rounds_of(prepared, tmp_path).after_round(outcome(prepared)) is None
    line = read_rounds(tmp_path)[0]
    entry = line["cleanup"]["c0"]
    assert entry["mode"] == "if_stopped_now"
    assert entry["after"]["attack_success"] == 1.0
    assert entry["after"]["collapsed"] is True
    assert entry["before"]["clean_accuracy"] == line["clean_accuracy"] != entry["after"]["clean_accuracy"]


def test_in_the_loop_the_repaired_model_is_served_and_measured(tmp_path: Path) -> None:
    prepared = with_cleanups(prepared_with(), (Constant(), "in_loop", None))
    served = rounds_of(prepared, tmp_path).after_round(outcome(prepared))
    line = read_rounds(tmp_path)[0]
    assert served is not None
    assert line["attack_success"] == 1.0
    assert line["cleanup"]["c0"]["after"]["attack_success"] == 1.0
    assert line["cleanup"]["c0"]["before"]["attack_success"] != 1.0


def test_a_repair_that_costs_too_much_is_rolled_back(tmp_path: Path) -> None:
    prepared = prepared_with()
    images, labels = prepared.federation.trusted.validate.images, prepared.federation.trusted.validate.labels
    worst = int(torch.bincount(labels, minlength=10).argmin())
    model = prepared.new_model()
    for module in model.modules():  # a model that is right on the most frequent class of the validation part
        if isinstance(module, nn.Linear):
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)
            module.bias.data[int(torch.bincount(labels).argmax())] = 1
    assert len(images) == len(labels)
    prepared = with_cleanups(prepared, (Constant(label=worst), "in_loop", 0.0))
    weights = flatten(model)
    assert rounds_of(prepared, tmp_path).after_round(outcome(prepared, weights=weights, start=weights)) is None
    entry = read_rounds(tmp_path)[0]["cleanup"]["c0"]
    assert entry["acted"] is False
    assert entry["notes"]["rolled_back"] is True
    assert entry["notes"]["validation_loss"] > 0


def test_cleanups_chain_their_clues_and_in_loop_models(tmp_path: Path) -> None:
    prepared = with_cleanups(
        prepared_with(), (Constant(label=5), "in_loop", None), (Constant(label=7), "if_stopped_now", None)
    )
    rounds_of(prepared, tmp_path).after_round(outcome(prepared))
    cleanup = read_rounds(tmp_path)[0]["cleanup"]
    assert cleanup["c0"]["notes"]["saw_target"] is None
    assert cleanup["c1"]["notes"]["saw_target"] == 5
    assert cleanup["c1"]["before"] == cleanup["c0"]["after"]


def test_a_method_that_cannot_act_says_so(tmp_path: Path) -> None:
    from fedbd.config.plans import DetectionPlan

    prepared = with_cleanups(prepared_with(), (Refusing(), "in_loop", 0.1))
    plan = DetectionPlan(method=Method("x", Refusing()), samples=20)
    prepared = Prepared(dataclasses.replace(prepared.scenario, detection=(plan,)), prepared.federation)
    assert rounds_of(prepared, tmp_path).after_round(outcome(prepared)) is None
    line = read_rounds(tmp_path)[0]
    assert line["cleanup"]["c0"]["acted"] is False
    assert line["cleanup"]["c0"]["notes"]["reason"] == "there is nothing to hold on to"
    assert line["detection"]["x"]["auc"] is None
    assert line["detection"]["x"]["notes"]["reason"] == "there is nothing to hold on to"


def test_what_was_seen_in_the_clear_and_in_sums(tmp_path: Path) -> None:
    prepared = prepared_with()
    rounds_of(prepared, tmp_path / "plain").after_round(outcome(prepared))
    saw = read_rounds(tmp_path / "plain")[0]["server_saw"]
    assert saw["kind"] == "updates"
    assert saw["contaminated_sums"] == 1
    assert saw["honest_per_sum_min"] == 1  # of the sums with somebody in them to protect
    prepared = prepared_with(secure_sum={"name": "ckks"}, bucket_size=2)
    found = outcome(prepared, buckets=((0, 2), (1, 3)), decryptors=(1, 2), ciphertext_bytes=7, noise=1e-9)
    rounds_of(prepared, tmp_path / "sums").after_round(found)
    line = read_rounds(tmp_path / "sums")[0]
    assert line["server_saw"]["kind"] == "bucket_sums"
    assert line["server_saw"]["clients_per_sum"] == [2, 2]
    assert line["server_saw"]["honest_per_sum_min"] == 1
    assert line["clients_saw"] == [{"client": 1, "kind": "bucket_sums"}, {"client": 2, "kind": "bucket_sums"}]
    assert line["bit_exact"] is None  # nobody observed what the clients sent


@pytest.mark.parametrize("error", [0, 1])
def test_the_opened_sum_is_checked_against_what_clients_sent(error: int, tmp_path: Path) -> None:
    prepared = prepared_with(secure_sum={"name": "ckks"})
    rng = np.random.Generator(np.random.PCG64(3))
    rows = [rng.integers(-(2**30), 2**30, prepared.layout.size + 1) for _ in range(4)]
    total = np.sum(rows, axis=0)
    total[17] += error
    observed = {i: {"encrypt": {"seconds": 0.1, "checksum": checksum(row)}} for i, row in enumerate(rows)}
    found = outcome(prepared, buckets=((0, 1, 2, 3),), decryptors=(1, 2), noise=1e-9, totals={0: total})
    rounds_of(prepared, tmp_path, observed).after_round(found)
    line = read_rounds(tmp_path)[0]
    assert line["bit_exact"] is (error == 0)
    assert line["cipher_error"] == (0.0 if error == 0 else None)
    assert line["seconds"]["encrypt"] == pytest.approx(0.4)


def test_floor_and_twin_come_from_the_twins_round(tmp_path: Path) -> None:
    prepared = with_cleanups(prepared_with(), (Constant(), "if_stopped_now", None))
    twin = {
        2: {
            "attack_success": 0.125,
            "clean_accuracy": 0.5,
            "per_attack": {"badnets": {"attack_success": 0.125}},
            "cleanup": {"c0": {"after": {"clean_accuracy": 0.25, "attack_success": 0.0}}},
        }
    }
    rounds_of(prepared, tmp_path, twin=twin).after_round(outcome(prepared))
    line = read_rounds(tmp_path)[0]
    assert line["attack_success_floor"] == 0.125
    assert line["per_attack"]["badnets"]["attack_success_floor"] == 0.125
    assert line["cleanup"]["c0"]["twin_after"]["clean_accuracy"] == 0.25
    assert line["notes"]["twin"] == {"clean_accuracy": 0.5}


def test_roles_are_the_scenarios_not_the_strategys(tmp_path: Path) -> None:
    prepared = prepared_with()
    rounds = rounds_of(prepared, tmp_path)
    rounds.after_round(outcome(prepared, round_=1))
    rounds.after_round(outcome(prepared, round_=2, rejected=(0,), accepted=(1, 2, 3), faults={3: "late"}))
    first, second = read_rounds(tmp_path)
    assert first["attackers"] == []
    assert second["attackers"] == [0]
    assert second["rejected"] == [0]
    assert second["notes"]["faults"] == {"3": "late"}


def test_the_floor_is_that_of_the_worst_attack_and_none_of_a_collapsed_twin(tmp_path: Path) -> None:
    grid = {"trigger": {"name": "grid"}, "clients": {"count": 1}}
    attacks = [{"name": "badnets", "label": name, "target": target, **grid} for name, target in (("a", 1), ("b", 2))]
    prepared = with_cleanups(prepared_with(attacks=attacks), (Constant(label=2), "in_loop", None))
    floors = {"a": {"attack_success": 0.9}, "b": {"attack_success": 0.1}}
    twin = {"attack_success": 0.9, "clean_accuracy": 0.5, "per_attack": floors, "collapsed": False}
    rounds_of(prepared, tmp_path / "one", twin={2: twin}).after_round(outcome(prepared))
    line = read_rounds(tmp_path / "one")[0]
    assert line["attack_success"] == line["per_attack"]["b"]["attack_success"] == 1.0
    assert line["attack_success_floor"] == 0.1
    rounds_of(prepared, tmp_path / "two", twin={2: {**twin, "collapsed": True}}).after_round(outcome(prepared))
    assert read_rounds(tmp_path / "two")[0]["attack_success_floor"] is None


# Masks, knowledge and what the re-learning test goes on from.


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pruner:
    """A cleanup that switches the first channel of the first BatchNorm off."""

    prunes: bool = True
    oracle: bool = False

    def clean(
        self, model: nn.Module, trusted: TrustedData | None, clues: Clues, rng: torch.Generator
    ) -> tuple[nn.Module, Clues, dict[str, Any]]:
        import copy

        pruned = copy.deepcopy(model)
        name, norm = next((n, m) for n, m in pruned.named_modules() if isinstance(m, nn.BatchNorm2d))
        with torch.no_grad():
            norm.weight[0] = 0.0
        off = np.arange(norm.num_features) == 0
        knew = {"knew": clues.trigger is not None, "caught": None if clues.triggered is None else len(clues.triggered)}
        return pruned, dataclasses.replace(clues, pruned={name: off}), {"acted": True, **knew}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Told:
    """A cleanup that says what it was told."""

    oracle: bool = True
    repairs: bool = False

    def clean(self, model: nn.Module, trusted: Any, clues: Clues, rng: torch.Generator) -> Any:
        caught = None if clues.triggered is None else len(clues.triggered)
        said = {"acted": True, "label": clues.target, "trigger": clues.trigger is not None, "caught": caught}
        return model, clues, said


@dataclasses.dataclass(frozen=True, kw_only=True)
class Finder:
    """A cleanup that repairs nothing."""

    repairs: bool = False

    def clean(
        self, model: nn.Module, trusted: TrustedData | None, clues: Clues, rng: torch.Generator
    ) -> tuple[nn.Module, Clues, dict[str, Any]]:
        import copy

        return copy.deepcopy(model), clues, {"acted": True, "target": 3, "knew": clues.trigger is not None}


def with_plans(prepared: Prepared, *plans: Any) -> Prepared:
    return Prepared(dataclasses.replace(prepared.scenario, cleanup=plans), prepared.federation)


def first_scales(weights: Any, prepared: Prepared) -> Any:
    from fedbd.params import assign

    model = prepared.new_model()
    assign(model, weights)
    return next(m.weight.detach().clone() for m in model.modules() if isinstance(m, nn.BatchNorm2d))


@pytest.mark.parametrize("mask", ["persist", "release"])
def test_a_mask_persists_or_is_released(mask: str, tmp_path: Path) -> None:
    from fedbd.config.plans import CleanupPlan

    prepared = prepared_with()
    plan = CleanupPlan(method=Method("x", Pruner()), mode="in_loop", rounds=(2,), rollback=None, mask=mask)  # type: ignore[arg-type]
    prepared = with_plans(prepared, plan)
    rounds = rounds_of(prepared, tmp_path)
    after = rounds.after_round(outcome(prepared, 2))
    assert first_scales(after.weights, prepared)[0] == 0.0
    later = rounds.after_round(outcome(prepared, 3))  # the clients have trained the channel on: its scale is 1 again
    if mask == "release":
        assert later is None
        return
    scales = first_scales(later.weights, prepared)
    assert scales[0] == 0.0
    assert (scales[1:] == 1.0).all()
    lines = read_rounds(tmp_path)
    assert lines[0]["weights_sha256"] == lines[1]["weights_sha256"]


def test_only_an_oracle_is_told_the_trigger_and_it_tells_nobody(tmp_path: Path) -> None:
    from fedbd.config.plans import CleanupPlan

    prepared = prepared_with()
    plans = (
        CleanupPlan(method=Method("a", Pruner(oracle=True)), label="oracle"),
        CleanupPlan(method=Method("b", Pruner()), label="blind"),
        CleanupPlan(method=Method("c", Finder()), label="finder"),
    )
    rounds_of(with_plans(prepared, *plans), tmp_path).after_round(outcome(prepared))
    cleanup = read_rounds(tmp_path)[0]["cleanup"]
    assert cleanup["oracle"]["notes"]["knew"] is True
    assert cleanup["oracle"]["notes"]["caught"] == 100
    assert cleanup["blind"]["notes"] == {"acted": True, "knew": False, "caught": None}
    assert cleanup["finder"]["notes"]["knew"] is False


def test_a_method_that_only_finds_clues_has_no_before_and_after(tmp_path: Path) -> None:
    from fedbd.config.plans import CleanupPlan

    prepared = prepared_with()
    prepared = with_plans(prepared, CleanupPlan(method=Method("c", Finder()), label="finder"))
    rounds_of(prepared, tmp_path).after_round(outcome(prepared))
    entry = read_rounds(tmp_path)[0]["cleanup"]["finder"]
    assert entry["before"] is entry["after"] is None
    assert entry["acted"] is True
    assert entry["target_is_right"] is True


def test_all_to_all_has_no_right_label_and_tells_an_oracle_none(tmp_path: Path) -> None:
    from fedbd.config.plans import CleanupPlan

    prepared = prepared_with(attacks=[{**RAW["attacks"][0], "target": "all_to_all"}])
    plans = (
        CleanupPlan(method=Method("c", Finder()), label="finder"),
        CleanupPlan(method=Method("o", Told()), label="told"),
    )
    rounds_of(with_plans(prepared, *plans), tmp_path).after_round(outcome(prepared))
    line = read_rounds(tmp_path)[0]
    assert "target_is_right" not in line["cleanup"]["finder"]
    assert line["cleanup"]["told"]["notes"] == {"acted": True, "label": None, "trigger": True, "caught": 100}
    assert line["clean_accuracy_without_target"] is None
    assert line["per_attack"]["badnets"]["evaluated_samples"] == len(prepared.dataset.test)


def test_relearning_goes_on_from_what_acted_and_from_what_nothing_repaired(tmp_path: Path) -> None:
    from fedbd.config.plans import CleanupPlan, EvaluationPlan

    prepared = prepared_with()
    scenario = dataclasses.replace(prepared.scenario, evaluation=EvaluationPlan(twin=False, relearn=(1,)))
    plans = (
        CleanupPlan(method=Method("a", Pruner()), label="pruner"),
        CleanupPlan(method=Method("b", Refusing()), label="refusing"),
        CleanupPlan(method=Method("c", Finder()), label="finder"),
    )
    prepared = with_plans(Prepared(scenario, prepared.federation), *plans)
    rounds = rounds_of(prepared, tmp_path)
    given = outcome(prepared, 2)
    rounds.after_round(given)
    assert set(rounds.repaired) == {"pruner"}
    assert np.array_equal(rounds.unrepaired[2].weights, given.weights)
    assert first_scales(rounds.repaired["pruner"].weights, prepared)[0] == 0.0
    assert rounds.repaired["pruner"].round == 2


def test_polluted_clients_detections_are_pooled(tmp_path: Path) -> None:
    from fedbd.config.plans import DetectionPlan

    prepared = prepared_with()
    plan = DetectionPlan(method=Method("x", Refusing()), where="training")
    prepared = Prepared(dataclasses.replace(prepared.scenario, detection=(plan,)), prepared.federation)
    entry = {"auc": 0.75, "auc_shuffled": 0.5, "tpr_at_fpr_1": None, "tpr_at_fpr_5": 0.5, "precision": 1.0}
    counts = {"positives": 5, "negatives": 45, "seconds": 2.0, "notes": {}}
    observed = {
        0: {"train": {"loss": 1.0, "detection": {"x": {**entry, **counts}}}},
        1: {"train": {"loss": 1.0, "detection": {"x": {**entry, **counts, "auc": 0.25}}}},
        2: {"train": {"loss": 1.0}},
    }
    rounds_of(prepared, tmp_path, observed).after_round(outcome(prepared))
    found = read_rounds(tmp_path)[0]["detection"]["x"]
    assert (found["where"], found["auc"], found["tpr_at_fpr_1"], found["precision"]) == ("training", 0.5, None, 1.0)
    assert (found["positives"], found["negatives"], found["seconds"]) == (10, 90, 4.0)
    assert set(found["notes"]["clients"]) == {"0", "1"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Regrowing:
    """A cleanup that trains every channel on: all scales are 2."""

    acts: bool = True

    def clean(
        self, model: nn.Module, trusted: TrustedData | None, clues: Clues, rng: torch.Generator
    ) -> tuple[nn.Module, Clues, dict[str, Any]]:
        import copy

        grown = copy.deepcopy(model)
        if self.acts:
            for module in grown.modules():
                if isinstance(module, nn.BatchNorm2d):
                    nn.init.constant_(module.weight, 2.0)
        return grown, clues, {"acted": self.acts}


def test_a_mask_holds_for_the_methods_behind_it_and_in_the_relearning_test(tmp_path: Path) -> None:
    from fedbd.config.plans import CleanupPlan, EvaluationPlan

    in_loop: dict[str, Any] = {"mode": "in_loop", "rollback": None}
    prepared = prepared_with()
    scenario = dataclasses.replace(prepared.scenario, evaluation=EvaluationPlan(twin=False, relearn=(1,)))
    plans = (
        CleanupPlan(method=Method("a", Pruner()), label="pruner", mask="persist", rounds=(2,), **in_loop),
        CleanupPlan(method=Method("b", Regrowing()), label="grown", **in_loop),
        CleanupPlan(method=Method("b", Regrowing()), label="copy", rounds=(3,)),
    )
    prepared = with_plans(Prepared(scenario, prepared.federation), *plans)
    rounds = rounds_of(prepared, tmp_path)
    scales = first_scales(rounds.after_round(outcome(prepared, 2)).weights, prepared)
    assert scales[0] == 0.0
    assert (scales[1:] == 2.0).all()
    assert rounds.unrepaired[2].mask == {}  # what the round began with
    names = set(rounds.repaired["pruner"].mask)
    assert names
    assert set(rounds.repaired["grown"].mask) == names
    rounds.after_round(outcome(prepared, 3))
    assert set(rounds.repaired["copy"].mask) == set(rounds.unrepaired[3].mask) == names
    assert first_scales(rounds.unrepaired[3].weights, prepared)[0] == 0.0


@pytest.mark.parametrize("acts", [True, False])
def test_the_optimizer_is_reset_where_something_was_repaired(acts: bool, tmp_path: Path) -> None:
    from fedbd.config.plans import CleanupPlan

    prepared = prepared_with()
    method = Method("b", Regrowing(acts=acts))
    plan = CleanupPlan(method=method, mode="in_loop", rollback=None, server_optimizer_state="reset")
    replaced = rounds_of(with_plans(prepared, plan), tmp_path).after_round(outcome(prepared))
    assert replaced.reset_optimizer is acts


def test_models_of_chosen_rounds_are_kept_and_inspected_by_themselves(tmp_path: Path) -> None:
    from fedbd.central.subject import Asked, load_subject
    from fedbd.config.plans import EvaluationPlan
    from fedbd.config.run_text import scenario_text
    from fedbd.models.checkpoint import load_checkpoint

    prepared = prepared_with()
    scenario = dataclasses.replace(prepared.scenario, evaluation=EvaluationPlan(twin=False, keep_models=(2,)))
    prepared = Prepared(scenario, prepared.federation)
    rounds = rounds_of(prepared, tmp_path)
    rounds.folder.write_scenario(scenario_text(scenario))
    weights = flatten(prepared.new_model()) + np.float32(0.25)
    rounds.after_round(outcome(prepared, 1))
    rounds.after_round(outcome(prepared, 2, weights=weights))
    assert [path.name for path in (tmp_path / "models").iterdir()] == ["round-2.safetensors"]
    kept = prepared.new_model()
    load_checkpoint(kept, tmp_path / "models" / "round-2.safetensors")
    assert np.array_equal(flatten(kept), weights)
    problems: list[Any] = []
    subject = load_subject(Asked(checkpoint=tmp_path / "models" / "round-2.safetensors"), problems)
    assert problems == []
    assert subject is not None
    assert subject.target == 3
    assert np.array_equal(flatten(subject.model), weights)


def test_a_roll_back_judges_what_would_be_served(tmp_path: Path) -> None:
    """Behind a mask that persists a method that needs the masked channels is judged without them."""
    from fedbd.config.plans import CleanupPlan

    prepared = prepared_with()
    counts = torch.bincount(prepared.federation.trusted.validate.labels)
    assert counts[0] < counts.max()  # a silent model says 0
    in_loop: dict[str, Any] = {"mode": "in_loop"}
    plans = (
        CleanupPlan(method=Method("a", Silencer()), label="silencer", mask="persist", rollback=None, **in_loop),
        CleanupPlan(method=Method("b", Perfect()), label="perfect", rollback=1.0, **in_loop),
    )
    prepared = with_plans(prepared, *plans)
    rounds_of(prepared, tmp_path).after_round(outcome(prepared, 2))
    cleanup = read_rounds(tmp_path)[0]["cleanup"]
    # Perfect's bias alone decides; the mask is over all classes' weights and biases, so nothing of it is served.
    assert cleanup["perfect"]["notes"]["validation_loss"] == 0.0


def last_linear(model: nn.Module) -> tuple[str, nn.Linear]:
    return [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear)][-1]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Silencer:
    """A pruning of all outputs of the classifier."""

    prunes: bool = True

    def clean(self, model: nn.Module, trusted: Any, clues: Clues, rng: torch.Generator) -> Any:
        import copy

        silent = copy.deepcopy(model)
        name, layer = last_linear(silent)
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
        off = np.ones(layer.out_features, dtype=bool)
        return silent, dataclasses.replace(clues, pruned={name: off}), {"acted": True}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Perfect:
    """A repair that says the most frequent class of the validation part: better than a silent model, without a mask."""

    def clean(self, model: nn.Module, trusted: Any, clues: Clues, rng: torch.Generator) -> Any:
        import copy

        repaired = copy.deepcopy(model)
        last_linear(repaired)[1].bias.data[int(torch.bincount(trusted.validate.labels).argmax())] = 1.0
        return repaired, clues, {"acted": True}


# When and on what a model is measured.

NOTHING = {
    **dict.fromkeys(("clean_accuracy", "clean_accuracy_without_target", "attack_success", "attack_success_floor")),
    **dict.fromkeys(("robust_accuracy", "collapsed", "evaluated_samples")),
    "per_attack": {},
}


def test_every_second_round_the_start_the_end_and_where_something_is_due_are_measured() -> None:
    detector = {"name": "strip", "rounds": [3]}
    scenario = prepared_with(rounds=7, evaluation={"every": 2, "twin": False}, detection=[detector]).scenario
    assert [round_ for round_ in range(8) if scenario.measured(round_)] == [0, 2, 3, 4, 6, 7]


def test_a_round_that_is_not_measured_has_nulls_and_the_others_what_they_had(tmp_path: Path) -> None:
    seldom = prepared_with(evaluation={"every": 2, "twin": False})
    for prepared, folder in ((seldom, "seldom"), (prepared_with(), "always")):
        rounds = rounds_of(prepared, tmp_path / folder)
        rounds.start(flatten(prepared.new_model()))
        for round_ in (1, 2, 3):
            rounds.after_round(outcome(prepared, round_))
    pairs = zip(read_rounds(tmp_path / "seldom"), read_rounds(tmp_path / "always"), strict=True)
    for line, whole in pairs:
        del line["seconds"], whole["seconds"]
        assert line == ({**whole, **NOTHING} if line["round"] == 1 else whole)
        assert whole["evaluated_samples"] == 449


def test_the_twin_is_measured_at_the_same_rounds_on_the_same_images() -> None:
    scenario = prepared_with(evaluation={"every": 2, "samples": 50}).scenario
    twin = twin_of(scenario)
    assert (twin.evaluation.every, twin.evaluation.samples) == (2, 50)
    ours, theirs = (prepare(s).measured for s in (scenario, twin))
    assert torch.equal(ours.images, theirs.images)


def test_a_subset_of_the_test_set_has_the_classes_shares_and_is_the_seeds() -> None:
    prepared = prepared_with(evaluation={"samples": 55})
    whole, drawn = prepared.dataset.test, prepared.measured
    exact = 55 * torch.bincount(whole.labels, minlength=10) / len(whole)
    assert len(drawn) == 55
    assert bool(((torch.bincount(drawn.labels, minlength=10) - exact).abs() < 1).all())
    inside = [(whole.images == image).flatten(1).all(1) for image in drawn.images]
    assert all(label in whole.labels[hit] for hit, label in zip(inside, drawn.labels, strict=True))
    assert len({image.numpy().tobytes() for image in drawn.images}) == 55
    assert torch.equal(prepared_with(evaluation={"samples": 55}, name="other").measured.images, drawn.images)
    assert not torch.equal(prepared_with(evaluation={"samples": 55}, seed=9).measured.images, drawn.images)


def test_what_is_recorded_comes_from_the_subset(tmp_path: Path) -> None:
    prepared = prepared_with(evaluation={"samples": 55, "twin": False})
    rounds_of(prepared, tmp_path).after_round(outcome(prepared))
    (line,) = read_rounds(tmp_path)
    model = prepared.new_model().eval()
    x, y = prepared.measured.batch(torch.arange(55))
    with torch.no_grad():
        assert line["clean_accuracy"] == pytest.approx(float((model(x).argmax(1) == y).float().mean()))
    assert (line["evaluated_samples"], line["per_attack"]["badnets"]["evaluated_samples"]) == (55, int((y != 3).sum()))


def test_clients_are_not_told_when_and_on_what_the_server_measures() -> None:
    plain, seldom = (prepared_with(evaluation=e).scenario for e in ({}, {"every": 3, "samples": 50}))
    assert message_text(plain) == message_text(seldom)
