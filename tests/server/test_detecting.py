"""Incoming inputs: half of them triggered, mixed, with the labels that the served model gives."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fedbd.config.plans import DetectionPlan, EvasionPlan
from fedbd.config.scenario import from_dict
from fedbd.config.schema import Method
from fedbd.errors import MethodRefused
from fedbd.flower.app_loader import load_component
from fedbd.metrics import predict
from fedbd.prepared import Prepared, prepare
from fedbd.running.engines import flower_app_dir
from fedbd.seeding import torch_rng
from fedbd.training import TrainingPlan, train
from fedbd.types import Samples

detect: Any = load_component(flower_app_dir(), "server", "detecting", "detect")
incoming: Any = load_component(flower_app_dir(), "server", "detecting", "incoming")
ATTACK = {"name": "badnets", "clients": {"ids": [0]}, "target": 3, "trigger": {"name": "grid"}}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Corner:
    """A detector that looks at the lower right corner: 3 white pixels of the grid."""

    sign: float = 1.0

    def score(self, model: Any, data: Samples, trusted: Any, rng: torch.Generator) -> Any:
        corner = data.images[:, 0, -3:, -3:].to(torch.float64)
        grid = torch.tensor([[0, 0, 1], [0, 1, 0], [1, 0, 1]], dtype=torch.float64) * 255
        return -self.sign * (corner - grid).abs().sum((1, 2)).numpy(), {"seen": len(data)}


@pytest.fixture(scope="module")
def prepared() -> Prepared:
    raw = {
        "name": "detect",
        "rounds": 1,
        "data": {"name": "digits"},
        "partition": {"name": "iid", "clients": 2},
        "model": {"name": "cnn", "width": 4},
        "attacks": [ATTACK],
    }
    return prepare(from_dict(raw))


def plan(impl: Any, samples: int = 100) -> DetectionPlan:
    return DetectionPlan(method=Method("corner", impl), samples=samples)


def test_inputs_are_mixed_and_labeled_by_the_model(prepared: Prepared) -> None:
    model = prepared.new_model().eval()
    inputs, triggered = incoming(prepared, plan(Corner()), model, 1)
    assert len(inputs) == 200
    assert triggered.sum() == 100
    assert 20 < triggered[:100].sum() < 80  # mixed, not one after the other
    np.testing.assert_array_equal(inputs.labels.numpy(), predict(model, inputs))
    corner = inputs.images[torch.as_tensor(triggered)][:, 0, -3:, -3:]
    assert corner.eq(torch.tensor([[0, 0, 255], [0, 255, 0], [255, 0, 255]])).all()


def test_all_to_all_inputs_of_every_class_are_triggered(prepared: Prepared) -> None:
    attack = dataclasses.replace(prepared.scenario.attacks[0], target="all_to_all")
    every = Prepared(dataclasses.replace(prepared.scenario, attacks=(attack,)), prepared.federation)
    inputs, triggered = incoming(every, plan(Corner(), 10_000), prepared.new_model().eval(), 1)
    order = torch.randperm(len(prepared.dataset.test), generator=torch_rng(0, "incoming", 1))
    assert int(triggered.sum()) == len(order) // 2
    some, fewer = incoming(prepared, plan(Corner(), 10_000), prepared.new_model().eval(), 1)
    assert int(fewer.sum()) < int(triggered.sum())
    assert len(some) < len(inputs)


def test_all_detectors_of_a_round_get_the_same_inputs_and_draws(prepared: Prepared) -> None:
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    class Looks:
        def score(self, model: Any, data: Samples, trusted: Any, rng: torch.Generator) -> Any:
            seen.append((data.images, torch.rand(4, generator=rng)))
            return np.zeros(len(data)), {}

    for label, round_ in (("one", 1), ("two", 1), ("one", 2)):
        looks = DetectionPlan(method=Method("looks", Looks()), label=label, samples=50)
        detect(prepared, looks, prepared.new_model().eval(), round_)
    assert all(torch.equal(*pair) for pair in zip(seen[0], seen[1], strict=True))
    assert not torch.equal(seen[0][0], seen[2][0]) and not torch.equal(seen[0][1], seen[2][1])


def test_triggered_inputs_are_of_other_classes_and_no_clean_twin_is_among_the_negatives(prepared: Prepared) -> None:
    inputs, triggered = incoming(prepared, plan(Corner(), 10_000), prepared.new_model().eval(), 1)
    test = prepared.dataset.test
    pairs = zip(test.images, test.labels, strict=True)
    bodies = {image[:, :-3, :].numpy().tobytes(): int(label) for image, label in pairs}
    positives = [image[:, :-3, :].numpy().tobytes() for image in inputs.images[torch.as_tensor(triggered)]]
    assert all(bodies[body] != 3 for body in positives)
    negatives = {image[:, :-3, :].numpy().tobytes() for image in inputs.images[torch.as_tensor(~triggered)]}
    assert len(negatives & set(positives)) <= 2  # digits holds a few near copies


def test_scores_become_measures(prepared: Prepared) -> None:
    model = prepared.new_model().eval()
    good, bad = (detect(prepared, plan(Corner(sign=sign)), model, 1) for sign in (1.0, -1.0))
    assert good["auc"] == 1.0
    assert good["precision"] == 1.0
    assert good["tpr_at_fpr_5"] is None  # 100 negatives are fewer than 10 / 0.05
    assert bad["auc"] == 0.0
    assert good["positives"] == good["negatives"] == 100
    assert good["notes"] == {"seen": 200}


def test_without_an_attack_there_is_nothing_to_detect(prepared: Prepared) -> None:
    quiet = Prepared(dataclasses.replace(prepared.scenario, attacks=()), prepared.federation)
    found = detect(quiet, plan(Corner()), prepared.new_model(), 1)
    assert found["auc"] is None
    assert found["positives"] == 0


# Both kinds of malicious inputs.


@dataclasses.dataclass(frozen=True, kw_only=True)
class White:
    """An evasion that paints images white but for the trigger's own pixels, and keeps what it was given."""

    given: list[Any] = dataclasses.field(default_factory=list)

    def perturb(self, model: Any, images: Any, labels: Any, rng: torch.Generator) -> Any:
        self.given.append((images, labels))
        white = torch.ones_like(images)
        white[:, :, -3:, -3:] -= torch.tensor([[0.0, 0, 1], [0, 1, 0], [1, 0, 1]])
        return white, {"steps": 1}


@pytest.fixture(scope="module")
def taught(prepared: Prepared) -> nn.Module:
    """A model that gets most test images right, so that there are enough of every kind."""
    model = prepared.new_model()
    plan = TrainingPlan(epochs=3, batch_size=32, lr=0.05)
    train(model, prepared.dataset.train, plan, torch.Generator().manual_seed(0))
    return model.eval()


def both_kinds(detector: Any, evasion: White, samples: int = 100) -> DetectionPlan:
    adversarial = (EvasionPlan(method=Method("white", evasion)),)
    return dataclasses.replace(plan(detector, samples), adversarial=adversarial)


def test_three_kinds_are_told_apart_pair_by_pair(prepared: Prepared, taught: nn.Module) -> None:
    """To ``Corner`` a triggered image is the most suspicious, and a painted one less so than any other."""
    model, evasion = taught, White()
    line = detect(prepared, both_kinds(Corner(), evasion), model, 1)
    found = line["adversarial"]["white"]
    assert found["adversarial_backdoor"] == 1.0
    assert found["clean_backdoor"] == 1.0
    assert found["clean_adversarial"] == 0.0  # painted images score lower than clean ones
    assert found["notes"] == {"steps": 1}
    turned = detect(prepared, both_kinds(Corner(sign=-1.0), White()), model, 1)["adversarial"]["white"]
    assert (turned["clean_adversarial"], turned["clean_backdoor"], turned["adversarial_backdoor"]) == (1.0, 0.0, 0.0)
    plain = detect(prepared, plan(Corner()), model, 1)
    assert {name: line[name] for name in plain if name != "seconds"} == {
        name: value for name, value in plain.items() if name != "seconds"
    }


def test_a_pair_with_too_few_images_has_no_figure(prepared: Prepared, taught: nn.Module) -> None:
    found = detect(prepared, both_kinds(Corner(), White(), samples=9), taught, 1)["adversarial"]["white"]
    assert found == {**found, **dict.fromkeys(["clean_adversarial", "clean_backdoor", "adversarial_backdoor"])}
    assert 0 < found["examples"] <= 9
    more = detect(prepared, both_kinds(Corner(), White(), samples=10), taught, 1)["adversarial"]["white"]
    assert more["clean_backdoor"] == 1.0


def test_only_images_that_the_model_gets_right_are_attacked_and_only_those_it_then_gets_wrong_count(
    prepared: Prepared,
) -> None:
    model, evasion = prepared.new_model().eval(), White()
    found = detect(prepared, both_kinds(Corner(), evasion), model, 1)["adversarial"]["white"]
    ((images, labels),) = evasion.given
    assert (images.min() >= 0) and (images.max() <= 1)
    np.testing.assert_array_equal(predict(model, images), labels.numpy())
    white = int(predict(model, White().perturb(model, images[:1], labels[:1], torch.Generator())[0])[0])
    wrong = int((labels != white).sum())
    assert found["examples"] == wrong
    assert found["success"] == pytest.approx(wrong / len(labels))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Watching:
    """A detector that keeps what it was shown."""

    shown: list[Samples] = dataclasses.field(default_factory=list)

    def score(self, model: Any, data: Samples, trusted: Any, rng: torch.Generator) -> Any:
        self.shown.append(data)
        return np.zeros(len(data)), {}


def test_the_attacked_images_are_not_those_that_stand_for_clean_ones(prepared: Prepared, taught: nn.Module) -> None:
    test = prepared.dataset.test
    images = test.images.clone()  # no two alike: the first two pixels count
    images[:, 0, 0, 0], images[:, 0, 0, 1] = torch.arange(len(test)) % 256, torch.arange(len(test)) // 256
    dataset = dataclasses.replace(prepared.dataset, test=Samples(images, test.labels))
    marked = Prepared(prepared.scenario, dataclasses.replace(prepared.federation, dataset=dataset))
    detector, evasion = Watching(), White()
    detect(marked, both_kinds(detector, evasion), taught, 1)
    victims = {image.numpy().tobytes() for image in (evasion.given[0][0] * 255).round().to(torch.uint8)}
    mixed = {image.numpy().tobytes() for image in detector.shown[1].images}
    assert victims
    assert victims.isdisjoint(mixed)
    assert len(mixed & {image.numpy().tobytes() for image in images}) == len(victims)  # as many clean ones beside


def test_without_a_right_answer_nothing_can_be_attacked(prepared: Prepared) -> None:
    model, evasion = prepared.new_model().eval(), White()
    test = prepared.dataset.test
    wrong = Samples(test.images, (torch.as_tensor(predict(model, test)) + 1) % 10)
    dataset = dataclasses.replace(prepared.dataset, test=wrong)
    lost = Prepared(prepared.scenario, dataclasses.replace(prepared.federation, dataset=dataset))
    found = detect(lost, both_kinds(Corner(), evasion), model, 1)["adversarial"]["white"]
    assert evasion.given == []
    assert found == {**dict.fromkeys(found), "examples": 0}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Unable:
    """An evasion that refuses."""

    def perturb(self, model: Any, images: Any, labels: Any, rng: torch.Generator) -> Any:
        raise MethodRefused("nothing to climb")


def test_an_evasion_that_refuses_leaves_a_reason_and_the_rest_of_the_record(
    prepared: Prepared, taught: nn.Module
) -> None:
    model, evasion = taught, White()
    adversarial = (
        EvasionPlan(method=Method("unable", Unable())),
        EvasionPlan(method=Method("white", evasion)),
    )
    line = detect(prepared, dataclasses.replace(plan(Corner()), adversarial=adversarial), model, 1)
    assert line["auc"] == 1.0
    pairs = dict.fromkeys(["clean_adversarial", "clean_backdoor", "adversarial_backdoor"])
    assert line["adversarial"]["unable"] == {**pairs, "examples": 0, "success": None, "reason": "nothing to climb"}
    assert line["adversarial"]["white"]["clean_backdoor"] == 1.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lost:
    """A detector some of whose scores are no numbers."""

    def score(self, model: Any, data: Samples, trusted: Any, rng: torch.Generator) -> Any:
        return np.where(np.arange(len(data)) < 2, np.nan, 0.0), {"seen": len(data)}


def test_scores_that_are_no_numbers_are_told_and_not_measured(prepared: Prepared) -> None:
    found = detect(prepared, plan(Lost()), prepared.new_model().eval(), 1)
    assert found["auc"] is None
    assert found["notes"] == {"seen": 200, "acted": False, "reason": "2 of 200 scores are not finite"}
    assert found["positives"] == 100
