"""NumPy arrays in and out of Flower's ``Array`` without ``np.save``: same bytes, less time, views where possible."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, TypeVar

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from numpy.lib import format as npy
from numpy.typing import NDArray

SCENARIO = "fedbd-scenario"
"""The config entry that tells clients the scenario: part of the simulation, and of no protocol."""
_NUMPY = "numpy.ndarray"
R = TypeVar("R", ArrayRecord, MetricRecord, ConfigRecord)


def pack(array: NDArray[Any]) -> Array:
    """Return an array as Flower's ``Array`` (npy bytes, C order)."""
    array = np.ascontiguousarray(array).reshape(array.shape)
    header = _written_header(array.dtype, array.shape)
    return Array(str(array.dtype), tuple(array.shape), _NUMPY, header + array.tobytes())


@lru_cache(maxsize=4096)
def _written_header(dtype: np.dtype[Any], shape: tuple[int, ...]) -> bytes:
    header = io.BytesIO()
    npy.write_array_header_1_0(header, {"descr": npy.dtype_to_descr(dtype), "fortran_order": False, "shape": shape})
    return header.getvalue()


@lru_cache(maxsize=4096)
def _read_header(head: bytes) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Return shape, order and dtype; cached, since a model's arrays have the same few headers in all messages."""
    stream = io.BytesIO(head)
    read = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}[npy.read_magic(stream)]
    found: tuple[tuple[int, ...], bool, np.dtype[Any]] = read(stream)
    return found


def _header_bytes(data: bytes) -> int:
    """Return where the header ends; its length field is whatever a client wrote, and is held to the data's."""
    wide = data[6:7] == b"\x02"
    return (12 if wide else 10) + int.from_bytes(data[8 : 12 if wide else 10], "little")


def view(array: Array) -> NDArray[Any]:
    """Return a read-only view of an ``Array``'s bytes; nothing is allocated for a header that lies.

    Raises:
        ValueError: If the bytes are no npy array, or one of Python objects.
    """
    data = array.data
    try:
        end = min(_header_bytes(data), 1024)
        shape, fortran, dtype = _read_header(bytes(data[:end]))
        held, needed = len(data) - end, math.prod(shape) * dtype.itemsize
        if dtype.hasobject or held != needed or min(shape, default=0) < 0:
            raise ValueError(f"{dtype}{shape} does not fit {held} bytes")
        return np.frombuffer(data, dtype, offset=end).reshape(shape, order="F" if fortran else "C")
    except Exception as error:  # the header is whatever a client wrote
        raise ValueError(f"no npy array: {type(error).__name__}: {error}") from None


def pack_all(arrays: Mapping[str, NDArray[Any]]) -> ArrayRecord:
    """Return named arrays as an ``ArrayRecord``."""
    return ArrayRecord({name: pack(array) for name, array in arrays.items()})


def view_all(record: ArrayRecord) -> dict[str, NDArray[Any]]:
    """Return the arrays of a record by name, as views (see ``view``)."""
    return {name: view(array) for name, array in record.items()}


def records_of(content: RecordDict, kind: type[R]) -> dict[str, R]:
    """Return a message's records of one kind, by name.

    What ``content.array_records`` would return refers to its message, and that to it: big arrays would then stay in
    memory until the garbage collector comes, which may be dozens of clients later.
    """
    return {name: record for name, record in content.items() if isinstance(record, kind)}


def payload_bytes(content: RecordDict) -> int:
    """Return the bytes of array payloads and of config and metric values (no framing, no transport).

    ``SCENARIO`` does not count.
    """
    return sum(
        len(value.data) if isinstance(value, Array) else _scalar_bytes(value)
        for record in content.values()
        for name, value in record.items()
        if name != SCENARIO
    )


def _scalar_bytes(value: Any) -> int:
    if isinstance(value, list):
        return sum(_scalar_bytes(item) for item in value)
    if isinstance(value, str):
        return len(value.encode())
    return len(value) if isinstance(value, bytes) else 8
