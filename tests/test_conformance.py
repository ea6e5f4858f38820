"""What every method of a kind must do, whoever wrote it: one row per method (or per mode of one) in ``ROWS``."""

from __future__ import annotations

import copy
import dataclasses
import importlib
import importlib.util
import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fedbd.attacks.grid_trigger import GridTrigger
from fedbd.config.schema import Method, parse
from fedbd.defenses.trusted_data import needs_classes
from fedbd.errors import MethodRefused
from fedbd.models.cnn import Cnn
from fedbd.params import assign, flatten
from fedbd.records.record import plain
from fedbd.registry import METHODS, resolve
from fedbd.training import TrainingPlan
from fedbd.types import (
    Aggregator,
    Attack,
    AttackContext,
    CentralDefense,
    Cleanup,
    Clues,
    Cohort,
    Detector,
    Evasion,
    LocalDefense,
    ModelFamily,
    Need,
    Partitioner,
    Samples,
    Trigger,
    TrustedData,
)


@dataclass(frozen=True)
class Row:
    """A method as a scenario names it, with fields that make it act on the small data below."""

    kind: str
    name: str
    fields: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return "-".join([self.name, *(f"{key}={value}" for key, value in self.fields.items())])


ROWS = [
    Row("partition", "iid"),
    Row("partition", "dirichlet", {"alpha": 0.5}),
    Row("partition", "shards"),
    Row("partition", "pathological"),
    Row("partition", "quantity"),
    Row("partition", "quantity", {"law": "power", "alpha": 1.0, "minimum": 3}),
    Row("partition", "natural"),
    Row("partition", "natural", {"deal": "even"}),
    Row("partition", "flwr_datasets", {"partitioner": "DealingPartitioner"}),
    Row("model", "cnn", {"width": 4}),
    Row("model", "mlp", {"hidden": [8]}),
    Row("model", "mnistnet"),
    Row("model", "wrn16-1", {"depth": 10}),
    Row("model", "resnet18", {"width": 4}),
    Row("model", "preact_resnet18", {"width": 4}),
    Row("model", "vit", {"width": 16, "depth": 2}),
    Row("model", "torchvision", {"architecture": "shufflenet_v2_x0_5", "resize": 64}),
    Row("trigger", "grid"),
    Row("trigger", "grid", {"margin": 2}),
    Row("trigger", "square"),
    Row("trigger", "square", {"size": 4, "margin": 0, "value": 0.0}),
    Row("trigger", "four_corners"),
    Row("trigger", "single_pixel"),
    Row("trigger", "trojan_patch"),
    Row("trigger", "trojan_patch", {"size": 12, "margin": 0, "strength": 0.2}),
    Row("trigger", "blend"),
    Row("trigger", "blend", {"alpha": 0.5, "seed": 7}),
    Row("trigger", "sig"),
    Row("trigger", "low_frequency"),
    Row("trigger", "wanet"),
    Row("trigger", "wanet", {"k": 2, "s": 3.0}),
    Row("trigger", "object_overlay"),
    Row("trigger", "object_overlay", {"object": "sticker", "width": 0.6}),
    Row("attack", "badnets"),
    Row("attack", "badnets", {"per": "dataset", "share": 0.5}),
    Row("attack", "badnets", {"labels": "clean", "share": 0.5}),
    Row("attack", "badnets", {"labels": "clean", "per": "dataset", "share": 1.0}),
    Row("evasion", "fgsm"),
    Row("evasion", "pgd", {"steps": 3}),
    Row("evasion", "cw", {"search_steps": 2, "iterations": 10}),
    Row("local_defense", "abl", {"isolate_after": 1, "confidence": None}),
    Row("local_defense", "abl", {"isolate_after": 1, "confidence": None, "objective": "joint"}),
    Row(
        "central_defense", "abl_central", {"tuning_epochs": 1, "finetune_epochs": 2, "unlearn_epochs": 1, "ratio": 0.1}
    ),
    Row("aggregation", "mean"),
    Row("aggregation", "norm_clip", {"bound": 100.0}),
    Row("aggregation", "norm_clip", {"bound": 100.0, "where": "client"}),
    Row("aggregation", "median"),
    Row("aggregation", "masa", {"unlearn_epochs": 2}),
    Row("cleanup", "rnp", {"unlearn_lr": 0.05, "batch_size": 8, "unlearn_stop": 0.3, "recover_epochs": 2}),
    Row("cleanup", "rnp_label", {"unlearn_lr": 0.05, "batch_size": 8, "unlearn_stop": 0.3}),
    Row("cleanup", "trigger_recovery", {"target": 1, "passes": 8, "batch_size": 8, "success": 0.5}),
    Row("cleanup", "trigger_recovery", {"labels": "all", "passes": 4, "batch_size": 8, "success": 0.5}),
    Row("cleanup", "linf_pruning", {"keep_within": 0.5}),
    Row("cleanup", "linf_pruning", {"knowledge": "inputs", "oracle": True, "count": 3, "by": "ratio"}),
    Row("cleanup", "clp", {"u": 0.5}),
    Row("cleanup", "finetune", {"epochs": 2, "batch_size": 16, "lr": 0.02}),
    Row("cleanup", "nad", {"epochs": 2, "teacher_epochs": 1, "batch_size": 16, "lr": 0.02, "teacher_lr": 0.02}),
    Row("cleanup", "fine_pruning", {"keep_within": 0.1, "epochs": 2, "batch_size": 16, "lr": 0.02}),
    Row("cleanup", "flain", {"bound": 0.3}),
    Row("detection", "abl_isolation"),
    Row("detection", "abl_isolation", {"by": "class_rank", "tune_epochs": 1, "batch_size": 8}),
    Row("detection", "activation_clustering", {"minimum": 5}),
    Row("detection", "activation_clustering", {"minimum": 5, "reduce": "pca", "suspect": "excess"}),
    Row("detection", "frequency", {"width": 4, "epochs": 2}),
    Row("detection", "frequency", {"network": "linear", "transform": "log", "epochs": 2}),
    Row("detection", "kernel_density"),
    Row("detection", "label_switching"),
    Row("detection", "label_switching", {"pool": "flat", "components": 4, "likelihood": "labels"}),
    Row("detection", "lid", {"neighbors": 10}),
    Row("detection", "lid", {"neighbors": 10, "direction": "both", "reference": None}),
    Row("detection", "model_mutation"),
    Row("detection", "model_mutation", {"seeks": "adversarial", "noise": 0.5}),
    Row("detection", "rnp_unlearned", {"unlearn_lr": 0.05, "batch_size": 8, "unlearn_stop": 0.3}),
    Row("detection", "spectral_signatures", {"minimum": 5}),
    Row("detection", "spectral_signatures", {"minimum": 5, "center": "trusted", "projected": "raw"}),
    Row("detection", "strip"),
    Row("detection", "strip", {"overlays": 3, "blend": "average"}),
]

PROTOCOLS = {
    "partition": Partitioner,
    "model": ModelFamily,
    "trigger": Trigger,
    "attack": Attack,
    "evasion": Evasion,
    "local_defense": LocalDefense,
    "central_defense": CentralDefense,
    "aggregation": Aggregator,
    "cleanup": Cleanup,
    "detection": Detector,
}
CLASSES, PIXELS, TARGET = 4, 8, 1
PLAN = TrainingPlan(epochs=1, batch_size=16, lr=0.05)


@pytest.fixture(autouse=True)
def stand_in_for_flwr_datasets(monkeypatch: pytest.MonkeyPatch) -> None:
    path = Path(__file__).parent / "data" / "fake_flwr_datasets.py"
    spec = importlib.util.spec_from_file_location("fake_flwr_datasets", path)
    assert spec is not None
    assert spec.loader is not None
    fake = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fake)
    fake.install(monkeypatch)


def build(row: Row) -> Any:
    problems: list[Any] = []
    impl = parse(resolve(row.kind, row.name, row.kind), dict(row.fields), row.kind, problems)
    assert problems == []
    return impl


def of(kind: str) -> Any:
    return pytest.mark.parametrize("row", [row for row in ROWS if row.kind == kind], ids=str)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def samples(count: int, seed: int = 0) -> Samples:
    """Gray pictures with one bright quarter, which is their class."""
    images = torch.randint(60, 120, (count, 1, PIXELS, PIXELS), generator=generator(seed), dtype=torch.uint8)
    labels = torch.arange(count) % CLASSES
    half = PIXELS // 2
    for image, label in zip(images, labels.tolist(), strict=True):
        image[0, half * (label // 2) :, half * (label % 2) :][:half, :half] += 120
    return Samples(images, labels)


def trained() -> nn.Module:
    from fedbd.training import train

    model = Cnn(width=4).build((1, PIXELS, PIXELS), CLASSES, generator())
    train(model, samples(160), TrainingPlan(epochs=6, batch_size=16, lr=0.05), generator())
    return model.eval()


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return trained()


@pytest.fixture(scope="module")
def trusted() -> TrustedData:
    return TrustedData(samples(40, 2), samples(40, 3), CLASSES)


def context() -> AttackContext:
    return AttackContext(
        trigger=GridTrigger(), target=TARGET, classes=CLASSES, global_weights=np.zeros(5, np.float32), cohort_size=4
    )


def clues() -> Clues:
    """What cleanups before it, or a run, would have told a cleanup."""
    start = Cnn(width=4).build((1, PIXELS, PIXELS), CLASSES, generator()).eval()
    return Clues(target=TARGET, trigger=GridTrigger(), triggered=samples(20, 4).images, reference=start)


def state(thing: nn.Module | Samples) -> list[Tensor]:
    held = [thing.images, thing.labels] if isinstance(thing, Samples) else list(thing.state_dict().values())
    return [tensor.clone() for tensor in held]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def json_values(notes: object) -> object:
    assert plain(notes) == notes
    return notes


@pytest.mark.parametrize("kind", PROTOCOLS)
def test_every_registered_method_has_a_row(kind: str) -> None:
    assert {row.name for row in ROWS if row.kind == kind} == set(METHODS[kind])


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_is_a_frozen_dataclass_that_obeys_its_protocol_and_names_its_source(row: Row) -> None:
    impl = build(row)
    assert isinstance(impl, PROTOCOLS[row.kind])
    assert type(impl).__dataclass_params__.frozen
    assert all(spec.kw_only for spec in dataclasses.fields(impl))
    if row.kind != "model":  # a small network of our own has no paper
        assert "https://" in (importlib.import_module(type(impl).__module__).__doc__ or "") + (type(impl).__doc__ or "")
    for spec in dataclasses.fields(impl):
        assert f"{spec.name}: " in (inspect.getdoc(type(impl)) or "")
    assert Method(row.name, impl) == Method(row.name, build(row))


@of("partition")
def test_partition_gives_every_sample_once_and_each_client_one(row: Row) -> None:
    labels, rule = np.arange(100, dtype=np.int64) % CLASSES, build(row)
    groups = {"groups": np.arange(100) // 5} if getattr(rule, "takes_groups", False) else {}
    parts = rule.split(labels, 7, np.random.default_rng(3), **groups)
    assert np.array_equal(np.sort(np.concatenate(parts)), np.arange(100))
    assert len(parts) == 7
    assert all(len(part) and (np.diff(part) > 0).all() for part in parts)
    again = build(row).split(labels, 7, np.random.default_rng(3), **groups)
    assert all(np.array_equal(a, b) for a, b in zip(parts, again, strict=True))


@of("model")
def test_model_is_decided_by_the_generator_and_gives_logits(row: Row) -> None:
    shape = (1, 28, 28)
    built = build(row).build(shape, CLASSES, generator(1))
    assert built.training
    assert np.array_equal(flatten(build(row).build(shape, CLASSES, generator(1))), flatten(built))
    assert not np.array_equal(flatten(build(row).build(shape, CLASSES, generator(2))), flatten(built))
    assert built(torch.zeros(2, *shape)).shape == (2, CLASSES)


@of("trigger")
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_trigger_changes_every_picture_within_bounds_and_leaves_the_input(
    row: Row, channels: int, layout: torch.memory_format
) -> None:
    images = torch.rand(5, channels, 12, 14, generator=generator()).contiguous(memory_format=layout)
    before = images.clone()
    stamped = build(row).stamp(images)
    assert torch.equal(images, before)
    assert stamped.shape == images.shape
    assert stamped.dtype == images.dtype
    assert stamped.stride() == images.stride()
    assert stamped.min() >= 0
    assert stamped.max() <= 1
    assert (stamped != images).flatten(1).any(1).all()


@of("trigger")
def test_trigger_is_decided_by_the_image_alone(row: Row) -> None:
    images = torch.rand(5, 3, 12, 12, generator=generator())
    stamped = build(row).stamp(images)
    assert torch.equal(stamped, build(row).stamp(images))
    assert torch.equal(stamped, torch.cat([build(row).stamp(images[:1]), build(row).stamp(images[1:])]))
    assert build(row).stamp(images[:0]).shape == (0, 3, 12, 12)
    assert build(row).stamp(images.double()).dtype == torch.float64


@of("attack")
def test_attack_poisons_for_its_target_and_repeats_itself(row: Row) -> None:
    attack, data = build(row), samples(48)
    before = state(data)
    polluted, index = attack.pollute(data, context(), generator(4))
    untouched = np.setdiff1d(np.arange(len(data)), index)
    assert (np.diff(index) > 0).all()
    assert (polluted.labels[index] == TARGET).all()
    assert torch.equal(polluted.images[untouched], data.images[untouched])
    fitted = []
    for _ in range(2):
        net = Cnn(width=4).build((1, PIXELS, PIXELS), CLASSES, generator())
        start = flatten(net)
        notes = json_values(attack.fit(net, data, PLAN, context(), generator(5)))
        assert not np.array_equal(flatten(net), start)
        fitted.append((flatten(net).tobytes(), notes))
    assert fitted[0] == fitted[1]
    assert same(state(data), before)
    delta = np.linspace(-1, 1, 5, dtype=np.float32)
    given = delta.copy()
    sent = attack.tamper(delta, context(), generator(6))
    assert np.array_equal(delta, given)
    assert (sent.shape, sent.dtype) == (delta.shape, np.float32)
    assert np.array_equal(sent, attack.tamper(delta, context(), generator(6)))


@of("central_defense")
def test_central_defense_goes_through_its_schedule_and_goes_on_from_any_epoch(row: Row) -> None:
    data, defense = samples(48), build(row)
    before = state(data)
    whole, parts = (Cnn(width=4).build((1, PIXELS, PIXELS), CLASSES, generator()) for _ in range(2))
    states = list(defense.epochs(whole, data, rng := generator(7), defense.start(data, rng)))
    assert [now.done for now in states] == list(range(1, len(defense.schedule) + 1))
    now = defense.start(data, generator(7))
    for _ in defense.schedule:  # a fresh generator each time: a process of its own
        now = next(iter(build(row).epochs(parts, data, generator(99), type(now).from_tensors(now.tensors()))))
    assert flatten(parts).tobytes() == flatten(whole).tobytes()
    assert json_values(defense.notes(now)) == defense.notes(states[-1])
    assert not defense.needs_isolated
    assert same(state(data), before)


@of("local_defense")
def test_local_defense_trains_keeps_arrays_and_repeats_itself(row: Row) -> None:
    data = samples(48)
    before = state(data)
    runs = []
    for _ in range(2):
        net, memory = Cnn(width=4).build((1, PIXELS, PIXELS), CLASSES, generator()), {}
        for turn in range(3):
            start = flatten(net)
            memory, notes = build(row).fit(net, data, PLAN, memory, generator(turn))
            json_values(notes)
            assert not np.array_equal(flatten(net), start)
        assert all(isinstance(array, np.ndarray) and array.dtype != object for array in memory.values())
        runs.append((flatten(net).tobytes(), notes))
    assert runs[0] == runs[1]
    assert same(state(data), before)


@of("evasion")
def test_evasion_stays_in_range_repeats_itself_and_leaves_its_input(row: Row, model: nn.Module) -> None:
    images, labels = samples(20, 11).batch(torch.arange(20))
    given, before = images.clone(), state(model)
    gradients = [None if entry.grad is None else entry.grad.clone() for entry in model.parameters()]
    perturbed, notes = build(row).perturb(model, images, labels, generator(3))
    json_values(notes)
    assert (perturbed.shape, perturbed.dtype) == (images.shape, images.dtype)
    assert 0 <= perturbed.min() <= perturbed.max() <= 1
    assert torch.equal(perturbed, build(row).perturb(model, images, labels, generator(3))[0])
    assert torch.equal(images, given)
    assert same(state(model), before)
    assert not model.training
    for entry, gradient in zip(model.parameters(), gradients, strict=True):
        assert entry.requires_grad
        assert entry.grad is gradient is None or torch.equal(entry.grad, gradient)


def two_pixels(count: int) -> Samples:
    images = torch.randint(0, 256, (count, 1, 1, 2), generator=generator(count), dtype=torch.uint8)
    return Samples(images, torch.arange(count) % 2)


def linear_of_six(weights: np.ndarray[Any, Any]) -> nn.Module:
    net = nn.Sequential(nn.Flatten(), nn.Linear(2, 2))
    assign(net, weights)
    return net.eval()


@of("aggregation")
def test_aggregation_gives_what_all_send_and_leaves_its_input(row: Row) -> None:
    rule = build(row)
    one = np.linspace(-1, 1, 6, dtype=np.float32)
    rows = np.tile(one, (max(rule.minimum_rows, 4), 1))
    weights = np.ones(len(rows))
    seen = Cohort(
        updates=rows if Need.INDIVIDUAL in rule.needs else None,
        mean=one,
        weights=weights,
        clients=len(rows),
        ids=tuple(range(len(rows))),
        global_weights=np.zeros_like(one),
        trusted=TrustedData(two_pixels(6), two_pixels(4), classes=2),
        build=linear_of_six,
    )
    aggregate, memory, notes = rule.aggregate(seen, {}, generator())
    json_values(notes)
    assert aggregate.delta.dtype == np.float32
    assert np.allclose(aggregate.delta, one, atol=1e-6)
    assert aggregate.accepted is None or len(aggregate.accepted) == len(rows)
    assert all(isinstance(array, np.ndarray) for array in memory.values())
    assert np.array_equal(rows, np.tile(one, (len(rows), 1)))


@of("cleanup")
def test_cleanup_returns_a_copy_and_repeats_itself(row: Row, model: nn.Module, trusted: TrustedData) -> None:
    before = state(model)
    runs = []
    for _ in range(2):
        repaired, _, notes = build(row).clean(model, trusted, clues(), generator(7))
        json_values(notes)
        runs.append((flatten(repaired).tobytes(), notes))
        assert repaired is not model
    assert runs[0] == runs[1]
    assert same(state(model), before)
    assert not model.training


@of("detection")
def test_detector_scores_every_sample_and_repeats_itself(row: Row, model: nn.Module, trusted: TrustedData) -> None:
    data, before = samples(30, 8), state(model)
    original = copy.deepcopy(state(data))
    scores, notes = build(row).score(model, data, trusted, generator(9))
    json_values(notes)
    assert scores.shape == (30,)
    assert scores.dtype == np.float64
    assert not np.isnan(scores).any()
    assert np.array_equal(scores, build(row).score(model, data, trusted, generator(9))[0])
    assert same(state(model), before)
    assert same(state(data), original)


ONE_CLASS = pytest.mark.parametrize("row", [row for row in ROWS if row.kind in ("cleanup", "detection")], ids=str)


@ONE_CLASS
def test_what_a_method_says_of_trusted_data_of_one_class_is_what_it_does(
    row: Row, model: nn.Module, trusted: TrustedData
) -> None:
    """A scenario is refused by ``needs_classes`` alone: it must neither pass what refuses nor stop what acts."""
    ones = TrustedData(samples(160, 2).subset(torch.arange(1, 160, CLASSES)), trusted.validate, CLASSES)
    method = build(row)
    act = method.clean if row.kind == "cleanup" else method.score
    argument = clues() if row.kind == "cleanup" else None
    call = (model, ones, argument) if row.kind == "cleanup" else (model, samples(30, 8), ones)
    if needs_classes(method):
        with pytest.raises(MethodRefused, match=r"one class|all of one"):
            act(*call, generator(7))
        return
    act(*call, generator(7))
