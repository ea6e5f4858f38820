from __future__ import annotations

import math
import threading

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fedbd.metrics import binomial_interval, evaluate, is_collapsed, logits, predict
from fedbd.types import Samples

CLASSES = 4


class Lookup(nn.Module):
    """Reads the answer off the first pixel: value v (0..255) stands for class v of the table."""

    def __init__(self, table: dict[int, int]) -> None:
        super().__init__()
        self.table = table
        self.seen: list[tuple[int, torch.dtype, bool, int, str]] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append((x.shape[0], x.dtype, self.training, torch.get_num_threads(), threading.current_thread().name))
        keys = (x[:, 0, 0, 0] * 255).round().to(torch.int64)
        answers = torch.tensor([self.table[int(key)] for key in keys])
        return nn.functional.one_hot(answers, CLASSES).to(torch.float32)


class Plus:
    """Adds to the first pixel; keeps the input as it is."""

    def __init__(self, by: int) -> None:
        self.by = by

    def stamp(self, images: Tensor) -> Tensor:
        out = images.clone()
        out[:, 0, 0, 0] += self.by / 255
        return out


def samples(keys: list[int], labels: list[int]) -> Samples:
    images = torch.zeros(len(keys), 1, 2, 2, dtype=torch.uint8)
    images[:, 0, 0, 0] = torch.tensor(keys, dtype=torch.uint8)
    return Samples(images, torch.tensor(labels))


def small_cnn() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Dropout(), nn.Flatten(), nn.Linear(16 * 100, 10)]
    return nn.Sequential(*layers).to(memory_format=torch.channels_last)


def test_predict_reads_uint8_as_unit_floats_and_keeps_the_order():
    model = Lookup({0: 2, 7: 1, 255: 3})
    data = samples([7, 255, 0, 0, 7], [0] * 5)
    got = predict(model, data, chunk=2)
    assert got.dtype == np.int64
    assert got.tolist() == [1, 3, 2, 2, 1]
    assert predict(model, data.images).tolist() == got.tolist()
    assert predict(model, data.images.to(torch.float32) / 255).tolist() == got.tolist()


def test_predict_stamps_and_leaves_the_input_alone():
    data = samples([0, 1], [0, 0])
    assert predict(Lookup({10: 3, 11: 1}), data, stamp=Plus(10).stamp).tolist() == [3, 1]
    assert data.images[:, 0, 0, 0].tolist() == [0, 1]


def test_every_chunk_is_fixed_and_runs_on_one_thread_in_eval_mode():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        model = Lookup({0: 0})
        predict(model, samples([0] * 10, [0] * 10), threads=3, chunk=4)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert sorted(size for size, *_ in model.seen) == [2, 4, 4]
    assert {seen[1:4] for seen in model.seen} == {(torch.float32, False, 1)}
    assert threading.current_thread().name not in {seen[4] for seen in model.seen}


def test_bits_do_not_depend_on_the_number_of_threads():
    model = small_cnn()
    images = torch.randint(0, 256, (70, 3, 12, 12), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    one = logits(model, images, threads=1, chunk=16)
    assert one.shape == (70, 10)
    for threads in (2, 4):
        for _ in range(3):
            assert torch.equal(one, logits(model, images, threads=threads, chunk=16))


def test_modes_come_back_module_by_module_even_after_an_error():
    model = small_cnn().train()
    model[1].eval()
    modes = [module.training for module in model.modules()]
    predict(model, torch.zeros(3, 3, 12, 12, dtype=torch.uint8))
    assert [module.training for module in model.modules()] == modes
    with pytest.raises(RuntimeError):
        predict(model, torch.zeros(3, 5, 12, 12, dtype=torch.uint8))
    assert [module.training for module in model.modules()] == modes


def test_a_diverged_model_predicts_nothing():
    class Diverged(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.full((x.shape[0], CLASSES), math.nan)

    data = samples([0, 0, 0], [0, 1, 2])
    assert predict(Diverged(), data).tolist() == [-1, -1, -1]
    found = evaluate(Diverged(), data, {"badnets": (Plus(1), 0)}, CLASSES)
    assert (found.clean_accuracy, found.attack_success, found.collapsed) == (0.0, 0.0, True)


def world() -> tuple[Lookup, Samples]:
    """Eight images, keys 1..8; +100 is a strong trigger for class 0, +200 a weak one for class 1."""
    truth = [0, 0, 1, 1, 2, 2, 3, 3]
    clean = [0, 1, 1, 1, 2, 2, 3, 0]
    strong = [1, 1, 0, 0, 0, 2, 3, 1]
    weak = [0, 1, 2, 2, 2, 2, 3, 1]
    table = {key + by: row[key - 1] for key in range(1, 9) for by, row in ((0, clean), (100, strong), (200, weak))}
    return Lookup(table), samples(list(range(1, 9)), truth)


def test_evaluate_against_hand_counts():
    model, data = world()
    found = evaluate(model, data, {"weak": (Plus(200), 1), "strong": (Plus(100), 0)}, CLASSES)
    assert found.per_attack == {
        # classes 0, 2, 3 answer [0, 1, 2, 2, 3, 1]: target 1 twice, truth [0, 0, 2, 2, 3, 3] four times
        "weak": {
            "attack_success": 2 / 6,
            "robust_accuracy": 4 / 6,
            "clean_accuracy_without_target": 4 / 6,  # clean answers [0, 1, 2, 2, 3, 0]
            "target_class_accuracy": 2 / 2,  # clean answers [1, 1]
            "evaluated_samples": 6,
        },
        # classes 1, 2, 3 answer [0, 0, 0, 2, 3, 1]: target 0 three times, truth [1, 1, 2, 2, 3, 3] twice
        "strong": {
            "attack_success": 3 / 6,
            "robust_accuracy": 2 / 6,
            "clean_accuracy_without_target": 5 / 6,  # clean answers [1, 1, 2, 2, 3, 0]
            "target_class_accuracy": 1 / 2,  # clean answers [0, 1]
            "evaluated_samples": 6,
        },
    }
    assert (found.attack_success, found.robust_accuracy) == (3 / 6, 2 / 6)  # the worst attack's pair
    assert (found.clean_accuracy, found.clean_accuracy_without_target) == (6 / 8, 4 / 6)
    assert (found.collapsed, found.evaluated_samples) == (False, 8)
    assert list(found.as_record()) == [
        "clean_accuracy",
        "clean_accuracy_without_target",
        "target_class_accuracy",
        "attack_success",
        "robust_accuracy",
        "per_attack",
        "collapsed",
        "evaluated_samples",
    ]
    assert found.brief() == {
        "clean_accuracy": 6 / 8,
        "clean_accuracy_without_target": 4 / 6,
        "target_class_accuracy": 1.0,  # both of the first attack's
        "attack_success": 3 / 6,
        "robust_accuracy": 2 / 6,
        "collapsed": False,
    }


def test_all_to_all_wants_the_next_class_of_every_image():
    model, data = world()
    found = evaluate(model, data, {"a2a": (Plus(100), "all_to_all")}, CLASSES)
    # wanted [1, 1, 2, 2, 3, 3, 0, 0], answers [1, 1, 0, 0, 0, 2, 3, 1]
    assert found.attack_success == 2 / 8
    assert found.per_attack["a2a"]["clean_accuracy_without_target"] is None
    assert found.per_attack["a2a"]["target_class_accuracy"] is None
    assert found.per_attack["a2a"]["evaluated_samples"] == 8


def test_a_semantic_attack_is_measured_on_its_own_set():
    model, data = world()
    own = samples([1, 2, 3], [2, 2, 0])  # answers [0, 1, 1]
    found = evaluate(model, data, {"semantic": (Plus(0), 0)}, CLASSES, held_out={"semantic": own})
    assert (found.attack_success, found.per_attack["semantic"]["evaluated_samples"]) == (1 / 2, 2)
    assert found.clean_accuracy == 6 / 8


def test_nothing_measured_is_none_never_zero():
    model, data = world()
    none = evaluate(model, data, {}, CLASSES)
    assert (none.attack_success, none.robust_accuracy, none.clean_accuracy_without_target) == (None, None, None)
    assert none.target_class_accuracy is None
    only_target = evaluate(model, data.subset(np.array([0, 1])), {"x": (Plus(100), 0)}, CLASSES)
    assert only_target.attack_success is None
    assert only_target.per_attack["x"]["evaluated_samples"] == 0
    empty = evaluate(model, data.subset(np.array([], dtype=np.int64)), {"x": (Plus(100), 0)}, CLASSES)
    assert (empty.clean_accuracy, empty.attack_success, empty.collapsed, empty.evaluated_samples) == (
        None,
        None,
        None,
        0,
    )


@pytest.mark.parametrize(
    ("predicted", "truth", "collapsed"),
    [
        ([0] * 96 + [1] * 4, [0] * 96 + [1] * 4, True),  # one class for 96 %
        ([0] * 95 + [1] * 5, [0] * 95 + [1] * 5, False),  # for exactly 95 %
        ([1] * 50 + [2] * 50, [1] * 12 + [0] * 88, True),  # 12 % right of 10 classes: 2 points above chance
        ([1] * 50 + [2] * 50, [1] * 13 + [0] * 87, False),
        ([1] * 50 + [2] * 50, [3] * 100, True),  # worse than chance
    ],
)
def test_collapsed(predicted, truth, collapsed):
    assert is_collapsed(np.array(predicted), np.array(truth), 10) is collapsed


def test_binomial_interval_has_its_name_here_too():
    low, high = binomial_interval(0, 10)
    assert low == 0.0
    assert high == pytest.approx(1 - 0.025 ** (1 / 10))  # closed form of Clopper-Pearson at zero
