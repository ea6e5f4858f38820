from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from fedbd.central.plan import (
    CentralPlan,
    assemble_central,
    draw_trusted,
    hold_out,
    identity,
    load_central,
    measure,
    new_model,
    twin_of,
)
from fedbd.central.training import LOG, MODEL, NOTES, PLAN, STATE, train_central
from fedbd.config.schema import to_plain
from fedbd.errors import RunFailed, ScenarioError, UserError
from fedbd.models.checkpoint import read_tensors, save_safetensors, save_tensors
from fedbd.seeding import torch_rng
from fedbd.types import Notes

TEXT = """\
name: tiny
seed: 3
data: digits
model: {name: cnn, width: 4}
training: {epochs: 3, batch_size: 64, lr: 0.05, nesterov: true, lr_step: 2, augment: crop_flip}
held_out: 200
poison: {name: badnets, per: dataset, share: 0.1, target: 7, trigger: {name: grid}}
"""


class Stopped(Exception):  # noqa: N818
    """What ends a training in the middle."""


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def plan(tmp_path: Path) -> CentralPlan:
    path = tmp_path / "tiny.yaml"
    path.write_text(TEXT)
    return load_central(path)


def state(folder: Path) -> bytes:
    return (folder / MODEL).read_bytes()


def test_the_file_in_the_repository_loads() -> None:
    path = Path(__file__).parents[2] / "scenarios" / "central" / "cifar10-badnets.yaml"
    assert load_central(path, ["seed=9"]).seed == 9


def test_mistakes_in_a_file_come_at_once(tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(TEXT.replace("lr: 0.05", "lr: fast").replace("target: 7", "target: -1"))
    with pytest.raises(ScenarioError) as refused:
        load_central(path)
    assert [problem.path for problem in refused.value.problems] == ["training.lr", "poison.target"]
    path.write_text(TEXT.replace("per: dataset", "per: batch"))
    with pytest.raises(ScenarioError, match=r"poison\.per: must be dataset"):
        load_central(path)


def test_what_cannot_work_together_in_a_poisoning_comes_at_once(tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(TEXT.replace("target: 7", "target: all_to_all, labels: clean").replace("per: dataset, ", ""))
    with pytest.raises(ScenarioError) as refused:
        load_central(path)
    assert [problem.path for problem in refused.value.problems] == ["poison.target", "poison.per"]
    path.write_text(TEXT.replace("share: 0.1", "share: 0.1, cover: 2"))
    with pytest.raises(ScenarioError, match=r"poison\.cover: must be 0: the trigger 'grid' has no disturbed copies"):
        load_central(path)


def test_an_all_to_all_and_a_clean_label_poisoning(tmp_path: Path) -> None:
    path = tmp_path / "tiny.yaml"
    path.write_text(TEXT.replace("target: 7", "target: all_to_all"))
    plan = load_central(path)
    data = assemble_central(plan)
    _, rest = hold_out(plan.seed, plan.held_out, len(data.dataset.train))
    before, after = data.dataset.train.subset(rest).labels[data.poisoned], data.train.labels[data.poisoned]
    assert torch.equal(after, (before + 1) % 10)
    measured = measure(plan, data, new_model(plan, data.dataset))
    assert measured["clean_accuracy_without_target"] is None
    assert measured["attack_success"] is not None
    path.write_text(TEXT.replace("target: 7", "target: 7, labels: clean"))
    plan = load_central(path)
    data = assemble_central(plan)
    clean = data.dataset.train.subset(rest)
    assert torch.equal(data.train.labels, clean.labels)
    assert len(data.poisoned) == round(0.1 * int((clean.labels == 7).sum()))
    assert (clean.labels[data.poisoned] == 7).all()


def test_a_triggers_file_counts_by_its_content(tmp_path: Path) -> None:
    path = tmp_path / "tiny.yaml"
    path.write_text(TEXT.replace("{name: grid}", f"{{name: blend, file: '{tmp_path / 'a.png'}'}}"))
    (tmp_path / "a.png").write_bytes(b"one")
    first = identity(load_central(path))
    (tmp_path / "a.png").write_bytes(b"two")
    assert identity(load_central(path)) != first


def test_poisoned_indices_are_the_ground_truth(plan: CentralPlan) -> None:
    data = assemble_central(plan)
    clean = data.dataset.train.subset(np.setdiff1d(np.arange(len(data.dataset.train)), data.held_out))
    changed = (data.train.images != clean.images).flatten(1).any(1) | (data.train.labels != clean.labels)
    assert len(data.poisoned) == round(0.1 * len(data.train))
    assert set(torch.nonzero(changed)[:, 0].tolist()) <= set(data.poisoned.tolist())
    assert (data.train.labels[data.poisoned] == 7).all()
    stamped = plan.poison.trigger.impl.stamp(clean.batch(torch.from_numpy(data.poisoned))[0])  # type: ignore[union-attr]
    assert torch.equal(data.train.images[data.poisoned], stamped.mul(255).round().to(torch.uint8))


def test_held_out_samples_are_not_trained_on(plan: CentralPlan) -> None:
    data = assemble_central(replace(plan, poison=None))
    assert len(data.held_out) == 200
    assert len(data.train) + 200 == len(data.dataset.train)
    out, rest = hold_out(3, 200, len(data.dataset.train))
    assert np.array_equal(out, data.held_out)
    assert sorted([*out, *rest]) == list(range(len(data.dataset.train)))
    assert torch.equal(data.train.images, data.dataset.train.images[rest])
    with pytest.raises(UserError, match="held_out: must leave samples to train on"):
        hold_out(3, 50, 50)
    assert len(hold_out(3, 0, 50)[0]) == 0


def test_held_out_samples_are_no_near_copies_of_trained_ones() -> None:
    tracks = np.random.default_rng(0).permutation(np.repeat(np.arange(40), 5))
    out, rest = hold_out(3, 52, 200, tracks)
    assert len(out) == 52
    assert len(rest) == 200 - 55  # the last track's other three frames are in neither
    assert not set(tracks[out]) & set(tracks[rest])
    assert (np.diff(out) > 0).all()
    assert (np.diff(rest) > 0).all()
    assert all(np.array_equal(a, b) for a, b in zip((out, rest), hold_out(3, 52, 200, tracks), strict=True))
    assert [len(part) for part in hold_out(3, 0, 200, tracks)] == [0, 200]
    with pytest.raises(UserError) as caught:
        hold_out(3, 198, 200, tracks)
    assert str(caught.value) == "held_out: must leave whole groups: it takes all 40, got 198; lower it"


def test_the_twin_has_the_same_draws_and_initialization_and_no_poison(plan: CentralPlan) -> None:
    data, twin = assemble_central(plan), assemble_central(twin_of(plan))
    assert len(twin.poisoned) == 0
    assert np.array_equal(data.held_out, twin.held_out)
    clean = np.setdiff1d(np.arange(len(data.train)), data.poisoned)
    assert torch.equal(data.train.images[clean], twin.train.images[clean])
    one, other = new_model(plan, data.dataset).state_dict(), new_model(twin_of(plan), twin.dataset).state_dict()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert measure(twin_of(plan), twin, new_model(plan, data.dataset))["attack_success"] is not None
    assert twin_of(replace(plan, poison=None)).poison is None
    assert identity(plan) != identity(twin_of(plan))


def test_trusted_data_are_disjoint_and_out_of_the_held_out(plan: CentralPlan) -> None:
    data = assemble_central(plan)
    pool = data.dataset.train.subset(data.held_out)
    trusted, places = draw_trusted(pool, 10, 100, 0.3, seed=5)
    assert (len(trusted.fit), len(trusted.validate), trusted.classes) == (70, 30, 10)
    assert len(set(places.tolist())) == 100

    def rows(samples: torch.Tensor) -> list[bytes]:
        return sorted(bytes(image.numpy().tobytes()) for image in samples)

    both = torch.cat([trusted.fit.images, trusted.validate.images])
    assert rows(both) == rows(pool.subset(places).images)  # each drawn sample once, in one of the parts
    again = data.trusted(100, 0.3, seed=5)
    assert torch.equal(again.fit.images, trusted.fit.images)
    assert torch.equal(again.validate.labels, trusted.validate.labels)
    assert not torch.equal(data.trusted(100, 0.3, seed=6).fit.images, trusted.fit.images)
    for size in (1, 201):
        with pytest.raises(UserError, match="trusted: must be from 2 to 200"):
            data.trusted(size, 0.5, seed=0)


@pytest.mark.parametrize("stop", [1, 2])
def test_a_resumed_training_is_the_uninterrupted_one_bit_for_bit(plan: CentralPlan, tmp_path: Path, stop: int) -> None:
    data = assemble_central(plan)
    train_central(plan, data, tmp_path / "whole")

    def break_off(line: Notes) -> None:
        if line["epoch"] == stop:
            raise Stopped

    with pytest.raises(Stopped):
        train_central(plan, data, tmp_path / "parts", break_off)
    assert not (tmp_path / "parts" / MODEL).exists()
    with open(tmp_path / "parts" / LOG, "a") as file:
        file.write('{"epoch": 9')  # a kill in the middle of a line
    seen: list[int] = []
    train_central(plan, data, tmp_path / "parts", lambda line: seen.append(line["epoch"]))
    assert seen == list(range(stop + 1, 4))
    assert state(tmp_path / "parts") == state(tmp_path / "whole")
    assert (tmp_path / "parts" / LOG).read_text() == (tmp_path / "whole" / LOG).read_text()
    assert [json.loads(line)["epoch"] for line in (tmp_path / "parts" / LOG).read_text().splitlines()] == [1, 2, 3]
    assert not (tmp_path / "parts" / STATE).exists()


def test_a_kill_before_the_state_is_saved_repeats_the_epoch_and_its_line_once(
    plan: CentralPlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fedbd.central import training as central

    data = assemble_central(plan)
    train_central(plan, data, tmp_path / "whole")
    save = central._save

    def fail(*arguments: object) -> None:
        if arguments[-1] == 2:
            raise Stopped
        save(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(central, "_save", fail)
    with pytest.raises(Stopped):
        train_central(plan, data, tmp_path / "parts")
    monkeypatch.setattr(central, "_save", save)
    train_central(plan, data, tmp_path / "parts")
    assert state(tmp_path / "parts") == state(tmp_path / "whole")
    assert (tmp_path / "parts" / LOG).read_text() == (tmp_path / "whole" / LOG).read_text()


def test_a_training_that_diverges_ends_with_the_reason_and_keeps_the_epochs_before(
    plan: CentralPlan, tmp_path: Path
) -> None:
    train_central(plan, assemble_central(plan), tmp_path / "sound")
    wild = replace(plan, training=replace(plan.training, lr=0.05, lr_step=1))
    object.__setattr__(wild.training, "lr_gamma", 1e30)  # from the second epoch on; no field takes that
    with pytest.raises(RunFailed, match=r"diverged in epoch 2 of 3: the weights are not finite; lower training\.lr"):
        train_central(wild, assemble_central(wild), tmp_path / "wild")
    lines = (tmp_path / "wild" / LOG).read_text().splitlines()
    assert lines == (tmp_path / "sound" / LOG).read_text().splitlines()[:1]
    assert read_tensors(tmp_path / "wild" / STATE)[1]["epoch"] == "1"
    assert not (tmp_path / "wild" / MODEL).exists()


def test_a_finished_training_is_loaded_not_repeated(plan: CentralPlan, tmp_path: Path) -> None:
    data = assemble_central(plan)
    first = train_central(plan, data, tmp_path / "run")
    seen: list[Notes] = []
    again = train_central(plan, data, tmp_path / "run", seen.append)
    assert seen == []
    assert not again.training
    assert all(torch.equal(a, b) for a, b in zip(first.state_dict().values(), again.state_dict().values(), strict=True))
    assert identity(load_central(tmp_path / "run" / PLAN)) == identity(plan)


@pytest.mark.parametrize("finished", [False, True])
def test_the_folder_of_another_training_is_refused(plan: CentralPlan, tmp_path: Path, finished: bool) -> None:
    data = assemble_central(plan)

    def break_off(_: Notes) -> None:
        raise Stopped

    if finished:
        train_central(plan, data, tmp_path / "run")
    else:
        with pytest.raises(Stopped):
            train_central(plan, data, tmp_path / "run", break_off)
    before = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    for other in (twin_of(plan), replace(plan, seed=4), replace(plan, training=replace(plan.training, lr=0.04))):
        with pytest.raises(ScenarioError, match="holds another training"):
            train_central(other, data, tmp_path / "run")
    labels = data.dataset.test.labels.clone()
    labels[0] = (labels[0] + 1) % 10
    changed = replace(data.dataset, test=replace(data.dataset.test, labels=labels))
    with pytest.raises(ScenarioError, match="holds a training on other data than are there now"):
        train_central(plan, replace(data, dataset=changed), tmp_path / "run")
    assert {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()} == before


ABL = """
training: null
defense:
  {name: abl_central, tuning_epochs: 2, finetune_epochs: 2, unlearn_epochs: 1, ratio: 0.05,
   batch_size: 64, lr: 0.05, late_from: 1}
"""


@pytest.fixture
def defended(tmp_path: Path) -> CentralPlan:
    path = tmp_path / "defended.yaml"
    path.write_text("".join(line for line in TEXT.splitlines(keepends=True) if "training:" not in line) + ABL)
    return load_central(path)


def test_a_defense_trains_through_its_schedule_as_it_would_by_itself(defended: CentralPlan, tmp_path: Path) -> None:
    data = assemble_central(defended)
    trained = train_central(defended, data, tmp_path / "run")
    alone = new_model(defended, data.dataset)
    _, notes = defended.defense.impl.fit(alone, data.train, torch_rng(3, "central-defense"))  # type: ignore[union-attr]
    assert all(
        torch.equal(a, b) for a, b in zip(trained.state_dict().values(), alone.state_dict().values(), strict=True)
    )
    lines = [json.loads(line) for line in (tmp_path / "run" / LOG).read_text().splitlines()]
    assert [line["stage"] for line in lines] == ["tuning", "tuning", "finetune", "finetune", "unlearn"]
    assert [line["epoch"] for line in lines] == [1, 2, 3, 4, 5] == list(range(1, defended.epochs + 1))
    assert json.loads((tmp_path / "run" / NOTES).read_text()) == notes
    hits = np.isin(notes["isolated"], data.poisoned).mean()
    assert [line.get("isolation_precision") for line in lines] == [None, hits, None, None, None]
    assert lines[1]["isolated"] == len(notes["isolated"]) == int(0.05 * len(data.train))


@pytest.mark.parametrize("stop", [1, 2, 3, 4])
def test_a_resumed_defense_is_the_uninterrupted_one(defended: CentralPlan, tmp_path: Path, stop: int) -> None:
    data = assemble_central(defended)

    def break_off(line: Notes) -> None:
        if line["epoch"] == stop:
            raise Stopped

    train_central(defended, data, tmp_path / "whole")
    with pytest.raises(Stopped):
        train_central(defended, data, tmp_path / "parts", break_off)
    train_central(defended, data, tmp_path / "parts")
    for name in (MODEL, LOG, NOTES):
        assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_central_training_has_one_way_to_train(tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(TEXT + "defense: abl_central\n")
    with pytest.raises(ScenarioError, match=r"training: must be given, or a defense.*there are both"):
        load_central(path)
    with pytest.raises(ScenarioError, match="there are neither"):
        load_central(path, ["training=null", "defense=null"])
    with pytest.raises(ScenarioError, match=r"defense\.tuning_epochs: must be above 0 here"):
        load_central(path, ["training=null", "defense.tuning_epochs=0"])
    assert load_central(path, ["training=null"]).epochs == 10 + 60 + 4


def test_a_field_that_came_later_leaves_the_identity_of_older_trainings(
    plan: CentralPlan, defended: CentralPlan
) -> None:
    old = to_plain(plan)
    assert old.pop("defense") is None
    del old["data"]["root"]
    assert identity(plan) == hashlib.sha256(json.dumps(old, sort_keys=True).encode()).hexdigest()
    assert len({identity(plan), identity(defended), identity(twin_of(defended))}) == 3


def test_a_state_of_another_form_is_refused(plan: CentralPlan, tmp_path: Path) -> None:
    data = assemble_central(plan)

    def break_off(_: Notes) -> None:
        raise Stopped

    with pytest.raises(Stopped):
        train_central(plan, data, tmp_path / "run", break_off)
    tensors, marks = read_tensors(tmp_path / "run" / STATE)
    save_tensors(tensors, tmp_path / "run" / STATE, {**marks, "form": "1"})
    with pytest.raises(ScenarioError, match="holds what another version of fedbd began"):
        train_central(plan, data, tmp_path / "run")


def test_a_model_that_nothing_explains_is_refused(plan: CentralPlan, tmp_path: Path) -> None:
    data = assemble_central(plan)
    save_safetensors(new_model(plan, data.dataset), tmp_path / MODEL)
    with pytest.raises(ScenarioError, match=r"holds a model without central\.yaml"):
        train_central(plan, data, tmp_path)
