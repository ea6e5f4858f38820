from __future__ import annotations

import math
import pickle
import zlib
from collections.abc import Callable
from itertools import permutations

import numpy as np
import pytest
import tenseal as ts
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from fedbd.crypto import ckks as module
from fedbd.crypto.ckks import Ckks, Evaluator, decrypt, encrypt, new_secret_context, parameters_of, public_context
from fedbd.crypto.ckks_blob import STAMP_BYTES, Figures, pack, unpack
from fedbd.crypto.grid import quantize
from fedbd.errors import SecureSumFailed, UserError

SMALL, LARGE = Ckks(), Ckks(parameters="n8192")
FIGURES = Figures(4096, 54, 40, 24)
HEAD = STAMP_BYTES + 12


@pytest.fixture(scope="module")
def secret() -> bytes:
    return new_secret_context(SMALL)


@pytest.fixture(scope="module")
def evaluator() -> Evaluator:
    return Evaluator(SMALL)


def add_all(evaluator: Evaluator, blobs: list[bytes]) -> bytes:
    total = None
    for blob in blobs:
        total = evaluator.add(total, blob)
    assert total is not None
    assert total.clients == len(blobs)
    return evaluator.serialize(total)


def tenseal_context(secret: bytes) -> ts.Context:
    return ts.context_from(secret[STAMP_BYTES:], 1)


def vector_blob(vector: ts.CKKSVector, size: int) -> bytes:
    return pack(FIGURES, size, [vector.serialize()])


# --- sums -------------------------------------------------------------------------------------------------------------


def check_sum(secret: bytes, evaluator: Evaluator, clients: int, rng: np.random.Generator, size: int) -> None:
    limit = SMALL.largest(clients) * rng.choice([1e-6, 1e-2, 1.0])
    values = [quantize(rng.uniform(-limit, limit, size), limit=limit) for _ in range(clients)]
    total, error = decrypt(add_all(evaluator, [encrypt(each, secret) for each in values]), secret)
    assert total.dtype == np.int64
    assert np.array_equal(total, np.sum(values, axis=0))
    assert error <= SMALL.noise_bound(clients) * 1.05  # two digits


@pytest.mark.parametrize("clients", [2, 10])
@settings(max_examples=6, deadline=None)
@given(seed=st.integers(0, 2**32), size=st.sampled_from([1, 2, 2047, 2048, 2049, 5000]))
def test_the_sum_is_exact(secret: bytes, evaluator: Evaluator, clients: int, seed: int, size: int) -> None:
    check_sum(secret, evaluator, clients, np.random.default_rng(seed), size)


@pytest.mark.parametrize("size", [1, 2049])
def test_the_sum_of_a_hundred_clients_is_exact(secret: bytes, evaluator: Evaluator, size: int) -> None:
    check_sum(secret, evaluator, 100, np.random.default_rng(size), size)


def test_any_order_of_arrival_gives_the_same_sum(secret: bytes, evaluator: Evaluator) -> None:
    rng = np.random.default_rng(0)
    values = [rng.integers(-(2**30), 2**30, 3000) for _ in range(4)]
    blobs = [encrypt(each, secret) for each in values]
    sums = [decrypt(add_all(evaluator, list(order)), secret)[0] for order in permutations(blobs)]
    assert all(np.array_equal(each, np.sum(values, axis=0)) for each in sums)


def test_the_larger_set_sums_exactly_with_a_finer_grid() -> None:
    fine = Ckks(parameters="n8192", grid_bits=28)
    secret, evaluator = new_secret_context(fine), Evaluator(fine)
    rng = np.random.default_rng(1)
    values = [quantize(rng.normal(size=4097), 28, limit=fine.largest(3)) for _ in range(3)]
    total, error = decrypt(add_all(evaluator, [encrypt(each, secret) for each in values]), secret)
    assert fine.problems(3) == []
    assert np.array_equal(total, np.sum(values, axis=0))
    assert error <= fine.noise_bound(3) * 1.05


def test_keys_and_noise_leave_no_trace_in_the_sum(evaluator: Evaluator) -> None:
    values = [np.arange(-5, 5, dtype=np.int64), np.arange(10, dtype=np.int64)]
    sums = []
    for secret in (new_secret_context(SMALL), new_secret_context(SMALL)):
        sums.append(decrypt(add_all(evaluator, [encrypt(each, secret) for each in values]), secret)[0].tobytes())
    assert sums[0] == sums[1]


def test_equal_values_have_unequal_ciphertexts(secret: bytes) -> None:
    values = np.zeros(100, dtype=np.int64)
    assert encrypt(values, secret)[HEAD:] != encrypt(values, secret)[HEAD:]


# --- bounds -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ckks", [SMALL, LARGE], ids=lambda ckks: ckks.parameters)
def test_the_noise_is_what_theory_says(ckks: Ckks) -> None:
    context = tenseal_context(new_secret_context(ckks))
    rng = np.random.default_rng(2)
    plain = rng.normal(size=(20, ckks.slice_values))
    errors = [np.array(ts.ckks_vector(context, ts.plain_tensor(row)).decrypt()) - row for row in plain]
    # 40960 errors: the standard deviation is known to 0.35 %, so 3 % is over eight of its standard errors.
    assert np.std(errors) == pytest.approx(ckks.noise_bound(1) / 6, rel=0.03)
    assert abs(np.mean(errors)) < ckks.noise_bound(1) / 6 * 0.05


def test_noise_of_a_hundred_clients_stays_within_the_bound_and_near_it(secret: bytes, evaluator: Evaluator) -> None:
    blobs = [encrypt(np.zeros(2048, dtype=np.int64), secret) for _ in range(100)]
    _, error = decrypt(add_all(evaluator, blobs), secret)
    assert SMALL.noise_bound(100) / 3 < error < SMALL.noise_bound(100)


def test_rounding_that_is_the_same_in_all_clients_stays_within_the_bound(secret: bytes, evaluator: Evaluator) -> None:
    # A slice with nothing but the weight of a client, 1.0: so ends a model of a multiple of 2048 values.
    blobs = [encrypt(np.array([1 << 24]), secret) for _ in range(250)]
    total, error = decrypt(add_all(evaluator, blobs), secret)
    assert total.tolist() == [250 << 24]
    # Each coefficient of it is 2**40 / 2048 times a cosine, rounded: the errors of these add up 250 times.
    ends = np.exp(2j * np.pi * np.arange(4096) / 8192)
    fresh = SMALL.noise_bound(1) / 6
    alike = abs(250 * rounding_error(ends))
    assert alike - 6 * fresh * 250**0.5 < error < min(alike + 6 * fresh * 250**0.5, SMALL.noise_bound(250) * 1.05)


def rounding_error(roots: np.ndarray) -> float:
    """What one rounded encoding of a single 1.0 decodes to, less 1.0; ``roots``: the powers of the slot's root."""
    coefficients = 2.0**40 / 2048 * roots.real
    return float(((np.rint(coefficients) - coefficients) * roots.real).sum() / 2.0**40)


def test_the_noise_of_many_clients_is_bounded_by_what_they_draw_and_what_they_share() -> None:
    one, many = SMALL.noise_bound(1) ** 2, SMALL.noise_bound(300) ** 2
    drawn, shared = 10.5 / (10.5 + 1 / 12), (1 / 12) / (10.5 + 1 / 12)
    assert many == pytest.approx(one * (300 * drawn + 300**2 * shared))
    assert SMALL.problems(350) == []
    ((_, sentence),) = SMALL.problems(400)
    assert sentence.endswith("use at most 23 or, with parameters: n8192, at most 27")


@pytest.mark.parametrize("clients", [1, 2, 3, 10])
@pytest.mark.parametrize("sign", [1, -1])
def test_the_largest_values_fit(secret: bytes, evaluator: Evaluator, clients: int, sign: int) -> None:
    limit = SMALL.largest(clients)
    # A constant vector has its whole weight in one coefficient: the worst case.
    values = quantize(np.full(10, sign * limit), limit=limit)
    total, _ = decrypt(add_all(evaluator, [encrypt(values, secret)] * clients), secret)
    assert np.array_equal(total, clients * values)


def test_the_largest_values_are_not_far_from_where_it_breaks(secret: bytes, evaluator: Evaluator) -> None:
    limit = SMALL.largest(1)
    assert limit == 4096
    with pytest.raises(SecureSumFailed, match="at most 4096, got 4097"):
        encrypt(np.array([0, -4097 << 24]), secret)
    with pytest.raises(ValueError, match="too large"):  # what SEAL itself says of a constant vector
        ts.ckks_vector(tenseal_context(secret), ts.plain_tensor([4097.0] * 2048))
    values = np.full(10, 4096 << 24)
    total, _ = decrypt(add_all(evaluator, [encrypt(values, secret)] * 2), secret)
    assert not np.array_equal(total, 2 * values)  # 8192 is one step of the modulus too many
    assert SMALL.largest(2) == pytest.approx(4096, rel=0.002)
    assert SMALL.largest(100) == pytest.approx(81.92, rel=0.002)


@pytest.mark.parametrize("ckks", [SMALL, LARGE, Ckks(grid_bits=28)], ids=str)
def test_problems_name_the_finest_grid_that_works(ckks: Ckks) -> None:
    for clients in (1, 10, 350, 400, 10**6):
        half = 2.0 ** -(ckks.grid_bits + 1)
        problems = ckks.problems(clients)
        assert bool(problems) == (half <= ckks.noise_bound(clients))
        if problems:
            ((field, sentence),) = problems
            assert field == "grid_bits"
            best = int(sentence.partition("at most ")[2].split()[0])
            assert Ckks(parameters=ckks.parameters, grid_bits=best).problems(clients) == []
            assert Ckks(parameters=ckks.parameters, grid_bits=best + 1).problems(clients)


def test_a_grid_finer_than_the_noise_would_be_inexact(secret: bytes) -> None:
    # The control for ``problems``: the same ciphertext noise, read on a grid that problems() refuses.
    ckks = Ckks(grid_bits=32)
    assert ckks.problems(1)
    key = new_secret_context(ckks)
    values = np.arange(2048, dtype=np.int64)
    total, _ = decrypt(encrypt(values, key), key)
    assert not np.array_equal(total, values)


def test_scenario_fields_are_validated() -> None:
    adapter = TypeAdapter(Ckks, config=None)
    assert adapter.validate_python({"parameters": "n8192", "grid_bits": 20}) == Ckks(parameters="n8192", grid_bits=20)
    for wrong in ({"parameters": "n1024"}, {"grid_bits": 7}, {"grid_bits": 33}, {"grid_bits": 24.5}):
        with pytest.raises(ValidationError):
            adapter.validate_python(wrong)


# --- keys -------------------------------------------------------------------------------------------------------------


def test_another_key_gives_noise(secret: bytes) -> None:
    values = quantize(np.random.default_rng(3).normal(size=4096), limit=10)
    total, error = decrypt(encrypt(values, secret), new_secret_context(SMALL))
    assert np.sqrt(np.mean((total / 2**24) ** 2)) > 1e4
    assert abs(np.corrcoef(total, values)[0, 1]) < 0.1  # its standard error is 0.016
    assert error > 30 * SMALL.noise_bound(1)


def test_the_server_context_depends_on_parameters_alone() -> None:
    context = public_context(SMALL)
    assert context == public_context(SMALL)
    assert len(context) < 200
    loaded = ts.context_from(context, 1)
    assert not loaded.has_secret_key()
    assert not loaded.has_galois_keys()


def test_the_evaluator_has_nothing_to_decrypt_with(secret: bytes, evaluator: Evaluator) -> None:
    assert not [name for name in dir(evaluator) if any(word in name for word in ("key", "secret", "decrypt"))]
    total = evaluator.add(None, encrypt(np.ones(3, dtype=np.int64), secret))
    with pytest.raises(ValueError, match="secret_key"):
        total.slices[0].decrypt()
    assert len(pickle.dumps(evaluator)) < 300
    again = pickle.loads(pickle.dumps(evaluator))
    assert again.ckks == SMALL
    assert decrypt(again.serialize(total), secret)[0].tolist() == [1, 1, 1]


def test_a_key_says_what_it_is_for(secret: bytes) -> None:
    assert parameters_of(secret) == SMALL
    assert parameters_of(new_secret_context(LARGE)) == LARGE
    assert new_secret_context(SMALL) != secret


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda key: key[:5], "something else"),
        (lambda key: b"FBCT" + key[4:], "something else"),
        (lambda key: key[:4] + b"\x07\x00" + key[6:], "format 1, got 7"),
        (lambda key: key[:6] + b"\x00\x08" + key[8:], "unknown parameters"),
        (lambda key: key[:10] + b"\xff" + key[11:], "unknown parameters"),
        (lambda key: key[:1000], "damaged"),
        (lambda key: key[:STAMP_BYTES], "damaged"),
        (lambda key: key[:STAMP_BYTES] + public_context(SMALL), "without"),
    ],
)
def test_a_damaged_key_is_refused(secret: bytes, damage: Callable[[bytes], bytes], says: str) -> None:
    with pytest.raises(SecureSumFailed, match=f"key: .*{says}"):
        encrypt(np.zeros(3, dtype=np.int64), damage(secret))


# --- damaged and foreign ciphertexts ----------------------------------------------------------------------------------


def reseal(blob: bytes, body: bytes, size: int | None = None) -> bytes:
    """A blob whose checksum fits: what a hostile client can make."""
    kept = int.from_bytes(blob[STAMP_BYTES : STAMP_BYTES + 8], "little") if size is None else size
    return blob[:STAMP_BYTES] + kept.to_bytes(8, "little") + zlib.crc32(body).to_bytes(4, "little") + body


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda blob: b"", "0 bytes of something else"),
        (lambda blob: b"PK\x03\x04" + blob[4:], "something else"),
        (lambda blob: blob[:4] + b"\x02\x00" + blob[6:], "format 1, got 2"),
        (lambda blob: blob[:6] + b"\x00\x20" + blob[8:], "degree=8192"),
        (lambda blob: blob[: HEAD - 3], "cut off inside its header"),
        (lambda blob: blob[:-1], "damaged or cut off"),
        (lambda blob: blob + b"\0", "damaged or cut off"),
        (lambda blob: blob[:500] + bytes([blob[500] ^ 1]) + blob[501:], "damaged or cut off"),
        (lambda blob: reseal(blob, blob[HEAD:-9]), "a slice ends 9 bytes beyond the end"),
        (lambda blob: reseal(blob, blob[HEAD:] + b"\0"), "beyond the end"),
        (lambda blob: reseal(blob, blob[HEAD:] * 2), "expected 2 slices for 3000 values, got 4"),
        (lambda blob: reseal(blob, b""), "expected 2 slices for 3000 values, got 0"),
        (lambda blob: reseal(blob, b"", size=0), "for 0 values"),
        (lambda blob: reseal(blob, blob[HEAD:], size=3001), r"slice 2 of 2: expected 953 values, got 952"),
        (lambda blob: reseal(blob, blob[HEAD:], size=2**63), "got 2"),
        (lambda blob: pack(FIGURES, 3000, [b"", b""]), "slice 1 of 2: expected 2048 values, got 0"),
        (lambda blob: pack(FIGURES, 3000, [b"\xff" * 99, b""]), "slice 1 of 2 is damaged"),
        (lambda blob: pack(FIGURES, 3000, [bytes(p)[:-20] for p in unpack(blob, FIGURES)[1]]), "1 of 2 is damaged"),
    ],
)
def test_a_damaged_ciphertext_is_refused_and_named(
    secret: bytes, evaluator: Evaluator, damage: Callable[[bytes], bytes], says: str
) -> None:
    blob = encrypt(np.arange(3000, dtype=np.int64), secret)
    total = evaluator.add(None, blob)
    for refuse in (lambda bad: evaluator.add(None, bad), lambda bad: decrypt(bad, secret)):
        with pytest.raises(SecureSumFailed, match=says):
            refuse(damage(blob))
    with pytest.raises(SecureSumFailed, match="ciphertext"):
        evaluator.add(total, damage(blob))
    assert total.clients == 1
    assert np.array_equal(decrypt(evaluator.serialize(total), secret)[0], np.arange(3000))


def test_a_vector_of_another_length_is_refused(secret: bytes, evaluator: Evaluator) -> None:
    total = evaluator.add(None, encrypt(np.zeros(10, dtype=np.int64), secret))
    with pytest.raises(SecureSumFailed, match="expected 10 values as in the sum so far, got 11"):
        evaluator.add(total, encrypt(np.zeros(11, dtype=np.int64), secret))


def test_a_ciphertext_of_other_parameters_is_refused(evaluator: Evaluator) -> None:
    for other in (LARGE, Ckks(grid_bits=20)):
        with pytest.raises(SecureSumFailed, match="every party needs the same scenario"):
            evaluator.add(None, encrypt(np.zeros(3, dtype=np.int64), new_secret_context(other)))


def test_forms_that_seal_accepts_but_the_sum_does_not(secret: bytes, evaluator: Evaluator) -> None:
    context = tenseal_context(secret)
    coarse = ts.ckks_vector(context, [1.0, 2.0], scale=2.0**30)
    with pytest.raises(SecureSumFailed, match=r"fresh ciphertext at scale 2\*\*40"):
        evaluator.add(None, vector_blob(coarse, 2))
    short = ts.ckks_vector(context, [1.0, 2.0])
    with pytest.raises(SecureSumFailed, match="expected 5 values, got 2"):
        evaluator.add(None, vector_blob(short, 5))
    total = evaluator.add(None, vector_blob(short, 2))
    with pytest.raises(SecureSumFailed, match=r"cannot be added: .*transparent"):  # a copy, negated: the mask cancels
        evaluator.add(total, vector_blob(short.neg(), 2))


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_random_damage_behind_a_right_checksum_never_crashes(
    secret: bytes, evaluator: Evaluator, data: st.DataObject
) -> None:
    blob = encrypt(np.arange(5, dtype=np.int64), secret)
    body = bytearray(blob[HEAD:])
    limit = data.draw(st.sampled_from([16, 80, 300, 60000]))  # most of what a parser reads stands in front
    for _ in range(data.draw(st.integers(1, 4))):
        body[data.draw(st.integers(0, limit - 1))] = data.draw(st.integers(0, 255))
    try:
        total = evaluator.add(evaluator.add(None, blob), reseal(blob, bytes(body)))
    except SecureSumFailed as fault:
        assert "ciphertext" in str(fault)
    else:
        assert decrypt(evaluator.serialize(total), secret)[0].shape == (5,)


@settings(deadline=None)
@given(raw=st.binary(max_size=300))
def test_random_bytes_are_refused(evaluator: Evaluator, raw: bytes) -> None:
    for bad in (raw, pack(FIGURES, 7, [raw])):
        with pytest.raises(SecureSumFailed):
            evaluator.add(None, bad)


@pytest.mark.parametrize(
    "values", [np.zeros(0, dtype=np.int64), np.zeros((2, 2), dtype=np.int64), np.zeros(3), np.zeros(3, dtype=np.int32)]
)
def test_only_int64_vectors_are_encrypted(secret: bytes, values: np.ndarray) -> None:
    with pytest.raises(SecureSumFailed, match=r"expected \(D,\) int64"):
        encrypt(values, secret)


def test_figures_in_the_docstring(secret: bytes) -> None:
    values = np.zeros(4 * 2048, dtype=np.int64)
    assert len(encrypt(values, secret)) / values.size == pytest.approx(30.5, abs=0.1)
    assert len(encrypt(values, new_secret_context(LARGE))) / values.size == pytest.approx(31.2, abs=0.1)
    assert math.log2(LARGE.largest(1)) == math.log2(SMALL.largest(1)) == 12
    assert module.Ckks().grid_bits == 24


@pytest.mark.parametrize("parameters", [SMALL, LARGE])
def test_length_does_not_depend_on_randomness(parameters: Ckks) -> None:
    secrets = [new_secret_context(parameters) for _ in range(3)]
    values = np.arange(-5000, 5000, dtype=np.int64) * 1000
    sums = []
    lengths = set()
    for secret_ctx in secrets:
        evaluator, total = Evaluator(parameters), None
        for _ in range(4):
            blob = encrypt(values, secret_ctx)
            lengths.add(len(blob))
            total = evaluator.add(total, blob)
        assert total is not None
        sums.append(len(evaluator.serialize(total)))
    assert len(lengths) == 1
    assert set(sums) == lengths


def test_parameters_are_taken_by_their_fields_only() -> None:
    assert Ckks(grid_bits=np.int64(20)).grid_bits == 20  # type: ignore[arg-type]
    for bits in (7, 33, 16.0, True, "16", None):
        with pytest.raises(UserError, match="grid_bits: must be an integer from 8 to 32"):
            Ckks(grid_bits=bits)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="parameters: must be one of 'n4096', 'n8192'"):
        Ckks(parameters="n2048")  # type: ignore[arg-type]
