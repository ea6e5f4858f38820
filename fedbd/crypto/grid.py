"""The grid on which encrypted values lie: what makes a released sum exact and independent of keys and noise.

CKKS and xMK-CKKS decrypt to the sum plus noise that depends on the key. Clients therefore round their values to a grid
before they encrypt, and the decrypted sum is rounded to the same grid: as long as half a grid step exceeds the noise,
the released sum is the sum of the rounded values, to the last bit. Rounding also hides the noise, from which an exact
decryption would give the key away (Li and Micciancio, "On the Security of Homomorphic Encryption on Approximate
Numbers", Eurocrypt 2021); that is a mitigation, not a proof.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fedbd.errors import SecureSumFailed

GRID_BITS = 24
"""Default grid: one step is 2**-24, below the rounding of a float32 whose magnitude is 1."""


def quantize(
    values: NDArray[np.float32] | NDArray[np.float64], bits: int = GRID_BITS, *, limit: float
) -> NDArray[np.int64]:
    """Round values to the grid (half to even).

    Args:
        values: (D,) float32 or float64.
        bits: The grid step is 2**-bits.
        limit: Largest magnitude that the encryption takes, in value units (``Ckks.largest``).

    Returns:
        (D,) int64, in grid steps.

    Raises:
        SecureSumFailed: If a value is not finite or above ``limit`` in magnitude.
        ValueError: If ``limit`` is beyond 2**(53 - bits), where float64 no longer resolves the grid.
    """
    if not limit * 2.0**bits <= 2.0**53:
        raise ValueError(f"limit: expected at most 2**{53 - bits}, got {limit}")
    wide = np.asarray(values, dtype=np.float64)
    unfit = ~(np.abs(wide) <= limit)  # NaN compares false, so it is unfit too
    if unfit.any():
        where = int(np.flatnonzero(unfit)[0])
        diverged = not np.isfinite(wide).all()
        raise SecureSumFailed(
            f"{int(unfit.sum())} of {wide.size} values of the update cannot be summed exactly: expected finite numbers "
            f"of magnitude at most {limit:g}, got {wide.flat[where]:g} at position {where}; "
            + ("training diverged: lower the learning rate" if diverged else "clip the update")
        )
    # A power of two changes no bit of the mantissa, so the only rounding is rint's own.
    return np.rint(np.ldexp(wide, bits)).astype(np.int64)


def dequantize(total: NDArray[np.int64], bits: int = GRID_BITS) -> NDArray[np.float64]:
    """Return grid steps as values.

    Args:
        total: (D,) int64, a sum of ``quantize``'d vectors.
        bits: The grid step is 2**-bits.

    Returns:
        (D,) float64; exact while magnitudes stay below 2**53 steps.
    """
    return np.ldexp(np.asarray(total, dtype=np.int64).astype(np.float64), -bits)
