from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fedbd.params import Layout, assign, flatten, is_weight, join, layout_of, sha256, split


class Small(nn.Module):
    """Two floats kinds, an integer buffer, a bool buffer, a scalar and an empty parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 3, 3)
        self.bn = nn.BatchNorm2d(3)
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.none = nn.Parameter(torch.empty(0))
        self.register_buffer("mask", torch.tensor([True, False]))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * self.bn(self.conv(x))


def small(seed: int = 0) -> Small:
    torch.manual_seed(seed)
    model = Small()
    model.train()
    model(torch.rand(4, 2, 5, 5))  # moves the running statistics and num_batches_tracked
    return model


NAMES = ("scale", "none", "conv.weight", "conv.bias", "bn.weight", "bn.bias", "bn.running_mean", "bn.running_var")


def test_the_layout_is_that_of_the_float_entries_in_their_order() -> None:
    model = small()
    layout = layout_of(model.state_dict())
    assert layout.names == NAMES
    assert layout.shapes == ((), (0,), (3, 2, 3, 3), (3,), (3,), (3,), (3,), (3,))
    assert layout.sizes == (1, 0, 54, 3, 3, 3, 3, 3)
    assert layout.size == 70
    arrays = {name: entry.numpy() for name, entry in model.state_dict().items()}
    assert layout_of(arrays) == layout


@pytest.mark.parametrize(
    ("dtype", "weight"),
    [("float32", True), ("float64", True), ("float16", True), ("int64", False), ("bool", False), ("uint8", False)],
)
def test_floats_are_weights_and_nothing_else_is(dtype: str, weight: bool) -> None:
    assert is_weight(torch.zeros(2, dtype=getattr(torch, dtype))) is weight
    assert bool(is_weight(np.zeros(2, dtype=dtype))) is weight


def test_flatten_is_the_entries_one_after_the_other() -> None:
    model = small()
    state = model.state_dict()
    expected = np.concatenate([state[name].numpy().ravel() for name in NAMES])
    got = flatten(model)
    assert got.dtype == np.float32
    assert np.array_equal(got, expected)


def test_flatten_is_a_copy() -> None:
    model = nn.Linear(2, 1, bias=False)
    before = flatten(model).copy()
    flatten(model)[:] = 7
    assert np.array_equal(flatten(model), before)


def test_flatten_reads_channels_last_in_logical_order() -> None:
    model = small()
    plain = flatten(model)
    assert np.array_equal(flatten(model.to(memory_format=torch.channels_last)), plain)


def test_assign_and_flatten_are_inverse() -> None:
    one, other = small(1), small(2)
    assert not np.array_equal(flatten(one), flatten(other))
    assign(other, flatten(one))
    assert np.array_equal(flatten(one), flatten(other))
    x = torch.rand(3, 2, 5, 5)
    assert torch.equal(one.eval()(x), other.eval()(x))


def test_assign_fills_in_place_and_leaves_integers_formats_and_gradients_alone() -> None:
    model = small().to(memory_format=torch.channels_last)
    model(torch.rand(4, 2, 5, 5)).sum().backward()
    tensors = {name: entry.data_ptr() for name, entry in model.state_dict().items()}
    gradient = model.conv.weight.grad.clone()
    vector = np.arange(70, dtype=np.float32)
    assign(model, vector)
    assert {name: entry.data_ptr() for name, entry in model.state_dict().items()} == tensors
    assert model.conv.weight.is_contiguous(memory_format=torch.channels_last)
    assert model.bn.num_batches_tracked == 2
    assert model.mask.tolist() == [True, False]
    assert torch.equal(model.conv.weight.grad, gradient)
    assert model.conv.weight.requires_grad
    assert np.array_equal(flatten(model), vector)


def test_assign_takes_a_read_only_vector_and_keeps_nothing_of_it() -> None:
    model, vector = small(), np.arange(70, dtype=np.float32)
    vector.flags.writeable = False
    assign(model, vector)
    vector.flags.writeable = True
    vector[:] = 0
    assert np.array_equal(flatten(model), np.arange(70, dtype=np.float32))


@pytest.mark.parametrize("shape", [(69,), (71,), (0,), (70, 1)])
def test_assign_refuses_another_length(shape: tuple[int, ...]) -> None:
    model = small()
    before = flatten(model)
    with pytest.raises(ValueError, match=r"vector: expected shape \(70,\), got"):
        assign(model, np.zeros(shape, np.float32))
    assert np.array_equal(flatten(model), before)


SHAPES = st.lists(st.lists(st.integers(0, 4), max_size=3).map(tuple), min_size=1, max_size=6)


@settings(max_examples=80, deadline=None)
@given(SHAPES, st.integers(0, 2**32 - 1))
def test_split_and_join_are_inverse(shapes: list[tuple[int, ...]], seed: int) -> None:
    layout = Layout(tuple(f"p{i}" for i in range(len(shapes))), tuple(shapes))
    vector = np.random.default_rng(seed).normal(size=layout.size).astype(np.float32)
    parts = split(vector, layout)
    assert list(parts) == list(layout.names)
    assert [part.shape for part in parts.values()] == shapes
    assert np.array_equal(join(parts, layout), vector)
    shuffled = dict(reversed(parts.items()))  # names decide, not the order in the mapping
    assert np.array_equal(join({**shuffled, "more": np.zeros(3)}, layout), vector)


def test_split_returns_views() -> None:
    vector = np.zeros(5, np.float32)
    split(vector, Layout(("a", "b"), ((2,), (3,))))["b"][1] = 4
    assert vector.tolist() == [0, 0, 0, 4, 0]


def test_join_takes_other_floats_and_other_memory_orders() -> None:
    layout = Layout(("a",), ((2, 3),))
    array = np.asfortranarray(np.arange(6, dtype=np.float64).reshape(2, 3))
    joined = join({"a": array}, layout)
    assert (joined.dtype, joined.tolist()) == (np.float32, [0, 1, 2, 3, 4, 5])


def test_join_needs_every_name() -> None:
    with pytest.raises(KeyError, match="b"):
        join({"a": np.zeros(1)}, Layout(("a", "b"), ((1,), (1,))))


def test_split_and_join_agree_with_flatten_and_state_dict() -> None:
    model = small()
    layout = layout_of(model.state_dict())
    parts = split(flatten(model), layout)
    for name, part in parts.items():
        assert np.array_equal(part, model.state_dict()[name].numpy())
    assert np.array_equal(join(parts, layout), flatten(model))


def test_sha256_is_that_of_the_entries_bytes_one_after_the_other() -> None:
    model = small()
    digest = hashlib.sha256()
    for name in NAMES:
        digest.update(model.state_dict()[name].numpy().astype("<f4").tobytes())
    assert sha256(flatten(model)) == digest.hexdigest()


def test_sha256_sees_one_bit_and_not_the_memory() -> None:
    vector = np.arange(10, dtype=np.float32)
    other = vector.copy()
    other[3] = np.nextafter(other[3], np.float32(9))
    assert sha256(vector) != sha256(other)
    assert sha256(np.repeat(vector, 2)[::2]) == sha256(vector) == sha256(vector.astype(">f4"))
    assert sha256(np.array([0.0], np.float32)) != sha256(np.array([-0.0], np.float32))
