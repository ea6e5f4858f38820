from __future__ import annotations

import hashlib
import itertools
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedbd.seeding import derive, layers_draw_from, numpy_rng, torch_rng


def test_a_seed_is_the_top_63_bits_of_a_hash_of_what_it_is_for() -> None:
    digest = hashlib.sha256(b"7/train/3/12").hexdigest()
    assert derive(7, "train", 3, 12) == int(digest[:16], 16) >> 1


@given(st.integers(), st.text(st.characters(codec="utf-8"), max_size=20), st.lists(st.integers(), max_size=4))
def test_every_seed_fits_every_generator(seed: int, purpose: str, where: list[int]) -> None:
    value = derive(seed, purpose, *where)
    assert 0 <= value < 2**63
    assert torch_rng(seed, purpose, *where).initial_seed() == value
    numpy_rng(seed, purpose, *where).random()


def test_nothing_shares_a_stream() -> None:
    places = [(), (1,), (2,), (1, 1), (1, 2), (12,), (1, 2, 3), (12, 3), (-1,)]
    made = [
        derive(seed, purpose, *where)
        for seed, purpose, where in itertools.product(
            [0, 1, 12, -1, 2**80], ["train", "cohort", "trai", "init"], places
        )
    ]
    assert len(set(made)) == len(made) == 180


def test_streams_repeat_and_purposes_are_unrelated() -> None:
    one, again, other = (torch.rand(1000, generator=torch_rng(5, purpose, 1)) for purpose in ("a", "a", "b"))
    assert torch.equal(one, again)
    assert abs(float(torch.corrcoef(torch.stack([one, other]))[0, 1])) < 0.15
    x, y, z = (numpy_rng(5, purpose, 1).random(1000) for purpose in ("a", "a", "b"))
    assert np.array_equal(x, y)
    assert abs(float(np.corrcoef(x, z)[0, 1])) < 0.15


def test_generators_are_of_the_documented_kind() -> None:
    assert torch_rng(1, "x").device.type == "cpu"
    assert type(numpy_rng(1, "x").bit_generator).__name__ == "PCG64"


def test_drawing_from_one_generator_leaves_the_next_and_the_global_ones_alone() -> None:
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    torch.rand(5, generator=torch_rng(1, "a"))
    assert torch.equal(torch.rand(2), expected)
    assert numpy_rng(1, "a").random() == numpy_rng(1, "a").random()


def test_another_process_derives_the_same() -> None:
    code = "from fedbd.seeding import derive, numpy_rng; print(derive(9, 'cohort', 4), numpy_rng(9, 'x').random())"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
        env={**os.environ, "PYTHONHASHSEED": "77"},
    )
    assert done.stdout.split() == [str(derive(9, "cohort", 4)), str(numpy_rng(9, "x").random())]


def test_layers_draw_what_the_generator_decides_and_nothing_is_drawn_from_it() -> None:
    def dropped(seed: int, world: int) -> torch.Tensor:
        rng = torch_rng(seed, "a")
        state = rng.get_state()
        torch.manual_seed(world)
        outside = torch.get_rng_state()
        with layers_draw_from(rng):
            found = torch.nn.functional.dropout(torch.ones(200))
        assert torch.equal(torch.get_rng_state(), outside)
        assert torch.equal(rng.get_state(), state)
        return found

    assert torch.equal(dropped(1, 5), dropped(1, 6))
    assert not torch.equal(dropped(1, 5), dropped(2, 5))


def test_layers_draw_other_numbers_than_the_generator() -> None:
    rng = torch_rng(1, "a")
    with layers_draw_from(rng):
        inside = torch.rand(1000)
    assert abs(float(torch.corrcoef(torch.stack([inside, torch.rand(1000, generator=rng)]))[0, 1])) < 0.15


def test_the_global_state_is_restored_after_an_error() -> None:
    before = torch.get_rng_state()
    with pytest.raises(ZeroDivisionError), layers_draw_from(torch_rng(1, "a")):
        torch.rand(3)
        raise ZeroDivisionError
    assert torch.equal(torch.get_rng_state(), before)
