from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fedbd.crypto.grid import GRID_BITS, dequantize, quantize
from fedbd.errors import SecureSumFailed


@given(hnp.arrays(np.float32, st.integers(0, 9), elements=st.floats(-80, 80, width=32)), st.integers(8, 30))
def test_quantize_is_the_nearest_step_in_exact_arithmetic(values: np.ndarray, bits: int) -> None:
    exact = [round(Fraction(float(value)) * 2**bits) for value in values]
    steps = quantize(values, bits, limit=80)
    assert steps.dtype == np.int64
    assert steps.tolist() == exact


@given(hnp.arrays(np.int64, 5, elements=st.integers(-(2**50), 2**50)), st.integers(8, 30))
def test_dequantize_is_exact_and_quantize_undoes_it(total: np.ndarray, bits: int) -> None:
    values = dequantize(total, bits)
    assert [Fraction(value) for value in values.tolist()] == [Fraction(step, 2**bits) for step in total.tolist()]
    assert quantize(values, bits, limit=2.0 ** (53 - bits)).tolist() == total.tolist()


def test_default_grid_keeps_float32_values_of_magnitude_one_and_up() -> None:
    values = np.random.default_rng(0).uniform(1, 2, 1000).astype(np.float32)
    assert GRID_BITS == 24
    assert np.array_equal(dequantize(quantize(values, limit=4)).astype(np.float32), values)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 4.0000001, -5.0])
def test_values_that_cannot_be_encrypted_are_refused_with_their_place(bad: float) -> None:
    with pytest.raises(SecureSumFailed, match=r"1 of 3 values .* at most 4, got .* at position 2"):
        quantize(np.array([4.0, -4.0, bad]), limit=4)


def test_a_limit_beyond_float64_is_a_programming_error() -> None:
    with pytest.raises(ValueError, match="limit"):
        quantize(np.zeros(1), 24, limit=2.0**30)
