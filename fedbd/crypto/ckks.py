"""The encrypted sum under one shared CKKS key, by TenSEAL; the only module that imports it.

Cheon, Kim, Kim, Song, "Homomorphic Encryption for Arithmetic of Approximate Numbers", Asiacrypt 2017,
https://eprint.iacr.org/2016/421. All clients hold the same key; the server holds none and adds ciphertexts.

Differs from the paper: encryption is symmetric (half the time and an eighth of the noise of a public key, which nobody
here needs); values lie on a grid and the decrypted sum is rounded to it (``fedbd.crypto.grid``); of CKKS only addition
is used, so two primes suffice: one for the data, one that TenSEAL demands for keys that are never made.

Trust: a client that colludes with the server opens every update, and only the client itself limits its values.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import tenseal as ts
from annotated_types import Ge, Le
from numpy.typing import NDArray

from fedbd.crypto.ckks_blob import KEY, STAMP_BYTES, Blob, Figures, pack, read_stamp, stamp, unpack
from fedbd.crypto.grid import GRID_BITS
from fedbd.errors import Problem, SecureSumFailed, UserError

# SEAL draws errors from a centered binomial with 2 * 21 bits; encoding rounds each coefficient to an integer.
_DRAWN_VARIANCE, _ROUNDING_VARIANCE = 21 / 2, 1 / 12
_Name = Literal["n4096", "n8192"]
_GRID_RANGE = (8, 32)


class _Set(NamedTuple):
    """One parameter set: ring degree, bits of the two primes, log2 of the scale."""

    degree: int
    data_bits: int
    special_bits: int
    scale_bits: int


# Both primes together: 109 of 109 bits at degree 4096 is the 128-bit row of the Homomorphic Encryption Standard, 116 of
# 118 at 8192 the 256-bit row; ciphertexts use the first prime alone. Both leave 2**12 for a value, 2**13 for a sum.
_SETS: dict[_Name, _Set] = {"n4096": _Set(4096, 54, 55, 40), "n8192": _Set(8192, 58, 58, 44)}


@dataclass(frozen=True, kw_only=True)
class Ckks:
    """Sums under one CKKS key that all clients share and the server lacks.

    Attributes:
        parameters: ``n4096``: primes of 54 and 55 bits, scale 2**40, 128-bit security, 30.5 bytes per value.
            ``n8192``: 58 and 58 bits, scale 2**44, 256-bit security, 31.2 bytes per value, a tenth of the noise.
        grid_bits: Values are rounded to multiples of 2**-grid_bits.
    """

    parameters: _Name = "n4096"
    grid_bits: Annotated[int, Ge(_GRID_RANGE[0]), Le(_GRID_RANGE[1])] = GRID_BITS

    def __post_init__(self) -> None:
        """Refuse what no field may be, by hand: the process that holds the key loads neither pydantic nor torch."""
        wrong = []
        if self.parameters not in tuple(_SETS):  # a list has no hash
            known = ", ".join(map(repr, _SETS))
            wrong.append(Problem(path="parameters", expected=f"must be one of {known}", got=repr(self.parameters)))
        if not _grid_fits(self.grid_bits):
            low, high = _GRID_RANGE
            expected = f"must be an integer from {low} to {high}"
            wrong.append(Problem(path="grid_bits", expected=expected, got=repr(self.grid_bits)))
        if wrong:
            raise UserError(wrong, "Ckks cannot be made of these fields:")

    @property
    def slice_values(self) -> int:
        """Values in one ciphertext: half the ring degree."""
        return _SETS[self.parameters].degree // 2

    def noise_bound(self, clients: int) -> float:
        """Return six standard deviations of the error of a sum of fresh ciphertexts, in value units.

        Decoding evaluates the error polynomial at roots of unity and keeps the real part, so a value's error has
        variance degree / 2 times that of a coefficient, over scale**2. What clients draw is independent; what encoding
        rounds is the same for equal values, and adds up. A slice that is equal in all clients is no rarity: the last
        one may hold their weight alone.

        Args:
            clients: Number of ciphertexts in the sum, at least 1.
        """
        chosen = _SETS[self.parameters]
        coefficient = clients * _DRAWN_VARIANCE + clients**2 * _ROUNDING_VARIANCE
        return 6 * math.sqrt(chosen.degree / 2 * coefficient) / 2.0**chosen.scale_bits

    def largest(self, clients: int) -> float:
        """Return the largest magnitude of a client's value at which neither it nor the sum overflows.

        Args:
            clients: Number of ciphertexts in the sum, at least 1.
        """
        chosen = _SETS[self.parameters]
        fresh = 2.0 ** (chosen.data_bits - chosen.scale_bits - 2)  # what SEAL's encoder accepts
        # The sum lives modulo a prime just below 2**data_bits; a thousandth covers that, rounding and noise.
        total = 2.0 ** (chosen.data_bits - chosen.scale_bits - 1) * (1 - 2.0**-10)
        return min(fresh, total / clients)

    def problems(self, clients: int) -> list[tuple[str, str]]:
        """Return (field, sentence) for what cannot work with that many clients in a sum; empty if all is well."""
        bound, half = self.noise_bound(clients), 2.0 ** -(self.grid_bits + 1)
        if half > bound:
            return []
        remedy = f"use at most {_finest(bound)}"
        if self.parameters == "n4096":
            finer = _finest(Ckks(parameters="n8192").noise_bound(clients))
            remedy += f" or, with parameters: n8192, at most {min(finer, _GRID_RANGE[1])}"
        sentence = f"half a grid step ({half:.3g}) must exceed the noise of {clients} clients ({bound:.3g}); {remedy}"
        return [("grid_bits", sentence)]


def _grid_fits(bits: object) -> bool:
    whole = isinstance(bits, int | np.integer) and not isinstance(bits, bool)
    return whole and _GRID_RANGE[0] <= bits <= _GRID_RANGE[1]  # type: ignore[operator]


def _finest(bound: float) -> int:
    """Return the most grid bits with which half a step still exceeds a noise bound."""
    return math.ceil(-math.log2(bound)) - 2


@dataclass(frozen=True)
class EncryptedSum:
    """What an ``Evaluator`` has added up so far.

    Attributes:
        size: D, the number of values.
        clients: Number of ciphertexts in the sum.
        slices: TenSEAL vectors of at most ``Ckks.slice_values`` values, linked to a context without keys.
    """

    size: int
    clients: int
    slices: tuple[Any, ...]


class Evaluator:
    """All that a server gets: it adds ciphertexts, holds no key and has nothing to decrypt with."""

    def __init__(self, ckks: Ckks) -> None:
        """Build from the parameters alone."""
        self.ckks = ckks
        self._context = ts.context_from(public_context(ckks), 1)

    def __reduce__(self) -> tuple[type[Evaluator], tuple[Ckks]]:
        """Travel as the parameters."""
        return Evaluator, (self.ckks,)

    def add(self, total: EncryptedSum | None, blob: Blob) -> EncryptedSum:
        """Return the sum with one client's ciphertext added; ``total`` is left as it was.

        Args:
            total: The sum so far; None at first.
            blob: What ``encrypt`` returned.

        Raises:
            SecureSumFailed: If the ciphertext is damaged, of other parameters or of another length.
        """
        size, parts = unpack(blob, _figures(self.ckks))
        if total is not None and size != total.size:
            raise SecureSumFailed(f"ciphertext: expected {total.size} values as in the sum so far, got {size}")
        fresh = _vectors(self.ckks, self._context, size, parts)
        if total is None:
            return EncryptedSum(size, 1, tuple(fresh))
        try:
            added = tuple(old.add(new) for old, new in zip(total.slices, fresh, strict=True))
        except RuntimeError as fault:  # SEAL refuses a sum whose second half cancels
            raise SecureSumFailed(f"ciphertext: cannot be added: {fault}") from fault
        return EncryptedSum(size, total.clients + 1, added)

    def serialize(self, total: EncryptedSum) -> bytes:
        """Return the sum in the form that ``decrypt`` reads."""
        return pack(_figures(self.ckks), total.size, [part.serialize() for part in total.slices])


def new_secret_context(ckks: Ckks) -> bytes:
    """Make a key and return it with its parameters, as ``encrypt`` and ``decrypt`` want it: a secret."""
    context = _new_context(ckks).serialize(
        save_secret_key=True, save_public_key=False, save_galois_keys=False, save_relin_keys=False
    )
    return stamp(KEY, _figures(ckks)) + bytes(context)


def public_context(ckks: Ckks) -> bytes:
    """Return the TenSEAL context without any key; it depends on the parameters alone."""
    # TenSEAL makes a context only together with a key. This one is dropped at once and encrypts nothing.
    return bytes(
        _new_context(ckks).serialize(
            save_secret_key=False, save_public_key=False, save_galois_keys=False, save_relin_keys=False
        )
    )


def parameters_of(secret_ctx: bytes) -> Ckks:
    """Return the parameters that a key was made for.

    Raises:
        SecureSumFailed: If the bytes are no key of this format.
    """
    found = read_stamp(KEY, secret_ctx, "key")
    names = tuple(_SETS) if _grid_fits(found.grid_bits) else ()
    known = (Ckks(parameters=name, grid_bits=found.grid_bits) for name in names)
    fitting = next((ckks for ckks in known if _figures(ckks) == found), None)
    if fitting is None:
        raise SecureSumFailed(f"key: unknown parameters {found}; make a new one for every client")
    return fitting


def encrypt(values: NDArray[np.int64], secret_ctx: bytes) -> bytes:
    """Encrypt one client's values.

    Args:
        values: (D,) int64 in grid steps (``grid.quantize``), D at least 1.
        secret_ctx: What ``new_secret_context`` returned.

    Returns:
        A header (format version, parameters, D, checksum) and one length-prefixed ciphertext per slice.

    Raises:
        SecureSumFailed: If a value is too large to encrypt, the vector empty or the key damaged.
    """
    ckks, context = _open(secret_ctx)
    steps = np.asarray(values)
    if steps.ndim != 1 or steps.size == 0 or steps.dtype != np.int64:
        raise SecureSumFailed(f"values: expected (D,) int64 with D >= 1, got {steps.shape} {steps.dtype}")
    limit, worst = ckks.largest(1), max(-int(steps.min()), int(steps.max())) / 2.0**ckks.grid_bits
    if worst > limit:
        raise SecureSumFailed(f"values: expected magnitudes of at most {limit:g}, got {worst:g}; clip the update")
    plain = np.ldexp(steps.astype(np.float64), -ckks.grid_bits)
    cuts = range(0, plain.size, ckks.slice_values)
    # A plain tensor takes a fifth less time than a raw array.
    tensors = (ts.plain_tensor(plain[start : start + ckks.slice_values]) for start in cuts)
    return pack(_figures(ckks), plain.size, [ts.ckks_vector(context, tensor).serialize() for tensor in tensors])


def decrypt(blob: Blob, secret_ctx: bytes) -> tuple[NDArray[np.int64], float]:
    """Decrypt a sum and round it to the grid.

    Args:
        blob: What ``Evaluator.serialize`` (or ``encrypt``) returned.
        secret_ctx: The key under which every summand was encrypted.

    Returns:
        (D,) int64 in grid steps, and the largest distance of a decrypted value from the grid, in value units, to two
        digits (more would tell about the noise, and so about the key). Beyond ``Ckks.noise_bound`` of the clients in
        the sum the result is worthless: another key, or a summand that was tampered with.

    Raises:
        SecureSumFailed: If the ciphertext is damaged or of other parameters, or the key damaged.
    """
    ckks, context = _open(secret_ctx)
    size, parts = unpack(blob, _figures(ckks))
    total = np.empty(size, dtype=np.int64)
    worst = 0.0
    for index, vector in enumerate(_vectors(ckks, context, size, parts)):
        steps = np.ldexp(np.array(vector.decrypt(), dtype=np.float64), ckks.grid_bits)
        rounded = np.rint(steps)
        worst = max(worst, float(np.abs(steps - rounded).max()))
        total[index * ckks.slice_values : (index + 1) * ckks.slice_values] = rounded.astype(np.int64)
    return total, float(f"{worst * 2.0**-ckks.grid_bits:.1e}")


def _new_context(ckks: Ckks) -> Any:
    """Return a TenSEAL context with a fresh key, one thread and no automatic operations."""
    chosen = _SETS[ckks.parameters]
    context = ts.context(
        ts.SCHEME_TYPE.CKKS,
        chosen.degree,
        coeff_mod_bit_sizes=[chosen.data_bits, chosen.special_bits],
        encryption_type=ts.ENCRYPTION_TYPE.SYMMETRIC,
        n_threads=1,
    )
    context.global_scale = 2.0**chosen.scale_bits
    context.auto_relin = context.auto_rescale = context.auto_mod_switch = False
    return context


def _open(secret_ctx: bytes) -> tuple[Ckks, Any]:
    """Return a key's parameters and its TenSEAL context."""
    ckks = parameters_of(secret_ctx)
    try:
        context = ts.context_from(secret_ctx[STAMP_BYTES:], 1)
    except Exception as fault:
        raise SecureSumFailed(f"key: damaged ({fault}); make a new one for every client") from fault
    if not context.has_secret_key():
        raise SecureSumFailed("key: expected a context with a secret key, got one without")
    return ckks, context


def _figures(ckks: Ckks) -> Figures:
    """Return the parameters as they stand in headers."""
    chosen = _SETS[ckks.parameters]
    return Figures(chosen.degree, chosen.data_bits, chosen.scale_bits, ckks.grid_bits)


def _vectors(ckks: Ckks, context: Any, size: int, parts: Sequence[memoryview]) -> Iterator[Any]:
    """Parse the slices; refuse any that is not a fresh-level ciphertext of the right length."""
    chosen, level = _SETS[ckks.parameters], context.seal_context().data.first_parms_id()
    for index, part in enumerate(parts):
        where = f"ciphertext: slice {index + 1} of {len(parts)}"
        values = min(ckks.slice_values, size - index * ckks.slice_values)
        try:
            vector = ts.ckks_vector_from(context, bytes(part))
            pieces = vector.ciphertext()
        except Exception as fault:
            raise SecureSumFailed(f"{where} is damaged: {fault}") from fault
        # The vector's own length is outside the part that SEAL validates, and it decides what decryption returns.
        if vector.size() != values or len(pieces) != 1:
            raise SecureSumFailed(f"{where}: expected {values} values, got {vector.size()} in {len(pieces)} pieces")
        (piece,) = pieces
        if piece.size() != 2 or piece.parms_id() != level or piece.scale != 2.0**chosen.scale_bits:
            raise SecureSumFailed(f"{where}: expected a fresh ciphertext at scale 2**{chosen.scale_bits}")
        yield vector
