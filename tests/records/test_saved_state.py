"""What a checkpoint's tree and arrays give back is what went in, to the type and the bit; the rest is refused."""

from __future__ import annotations

import json
import math
from collections import OrderedDict
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays_of

from fedbd.records.saved_state import DEEPEST, Arrays, Unsaveable, decode, encode

DTYPES = st.one_of(
    arrays_of.boolean_dtypes(),
    arrays_of.integer_dtypes(endianness="?"),
    arrays_of.unsigned_integer_dtypes(endianness="?"),
    arrays_of.floating_dtypes(endianness="?"),
    arrays_of.complex_number_dtypes(),
    arrays_of.unicode_string_dtypes(),
    arrays_of.byte_string_dtypes(),
    arrays_of.datetime64_dtypes(),
)
ARRAYS = DTYPES.flatmap(lambda dtype: arrays_of.arrays(dtype, arrays_of.array_shapes(min_dims=0, min_side=0)))
SCALARS = st.sampled_from([np.float32, np.float64, np.int8, np.uint64, np.bool_]).flatmap(
    lambda kind: st.sampled_from([kind(0), kind(1)])
)
LEAVES = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(), st.binary(), ARRAYS, SCALARS)
KEYS = st.one_of(st.text(), st.integers(), st.none(), st.booleans(), st.tuples(st.integers(), st.text()))
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.lists(inner, max_size=4).map(tuple),
        st.dictionaries(KEYS, inner, max_size=4),
    ),
    max_leaves=20,
)


def equal(a: Any, b: Any) -> bool:
    """Whether two values are the same in type, order, shape and bits."""
    if type(a) is not type(b):
        return False
    if isinstance(a, np.ndarray | np.generic):
        return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    if isinstance(a, dict):
        return equal(list(a.items()), list(b.items()))
    return (
        (math.isnan(a) and math.isnan(b)) or (a == b and math.copysign(1, a) == math.copysign(1, b))
        if isinstance(a, float)
        else bool(a == b)
    )


@settings(max_examples=300, deadline=None)
@given(VALUES)
def test_what_goes_in_comes_out(value: Any) -> None:
    held: Arrays = {}
    text = json.dumps(encode(value, held), allow_nan=False)
    assert not any(array.dtype.hasobject for array in held.values())
    assert equal(decode(json.loads(text), held), value)


class Shouts(str):
    """A text that is more than a text."""


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ({"a": [object()]}, "a[0] is a builtins.object"),
        ({"rng": np.random.default_rng(0)}, "rng is a numpy.random._generator.Generator"),
        ({1, 2}, "the state is a builtins.set"),
        (OrderedDict(a=1), "the state is a collections.OrderedDict"),
        ({"x": Shouts("a")}, "Shouts"),
        ({"x": np.array([None])}, "x is an array of object"),
        ({"x": np.zeros(2, [("a", "i4")])}, "x is an array of [('a', '<i4')]"),
        ({"x": np.ma.masked_array([1], [True])}, "x is a numpy.ma"),
        ({"x": {frozenset(): 1}}, "a key of x is a builtins.frozenset"),
        ({"f": print}, "f is a builtins.builtin_function_or_method"),
    ],
)
def test_what_would_not_come_back_whole_is_refused_with_its_place(value: Any, reason: str) -> None:
    with pytest.raises(Unsaveable) as refused:
        encode(value, {})
    assert reason in str(refused.value)


def test_a_list_that_holds_itself_has_an_end() -> None:
    endless: list[Any] = []
    endless.append(endless)
    with pytest.raises(Unsaveable, match=f"more than {DEEPEST} levels"):
        encode(endless, {})
