"""Looks for a secret key where none may be: in Python objects, in a process's memory, in files.

Self-contained; other tests load it with importlib. A hunt that finds nothing means little unless the same hunt finds a
planted key: ``test_key_hunt.py`` shows that for every place searched here.

What it cannot see: a key that was transformed (encrypted, compressed, split into pieces below ``WINDOW`` bytes).
"""

from __future__ import annotations

import base64
import contextlib
import gc
import io
import os
import re
import sys
import types
import zipfile
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

WINDOW = 48
_STAMP_BYTES = 12  # fedbd's header before the TenSEAL context
_CHUNK = 1 << 20
_SKIPPED = (
    types.ModuleType,
    type,
    types.CodeType,
    types.BuiltinFunctionType,
    types.WrapperDescriptorType,
    types.MethodDescriptorType,
    types.GetSetDescriptorType,
    types.MemberDescriptorType,
)


class KeyHunt:
    """Searches for the byte patterns of one key."""

    def __init__(self, forms: Mapping[str, bytes], windows: int = 8) -> None:
        """Cut each form of the key into evenly spaced windows, any of which counts as a hit.

        Args:
            forms: Name of a form ("serialized", "words in memory") to its bytes, without anything public in them.
            windows: Windows per form.
        """
        self.patterns: dict[bytes, str] = {}
        for name, raw in forms.items():
            if len(raw) < WINDOW:
                self._add(name, raw)
                continue
            step = max(1, (len(raw) - WINDOW) // max(1, windows - 1))
            for start in range(0, len(raw) - WINDOW + 1, step):
                self._add(f"{name}[{start}]", raw[start : start + WINDOW])

    @classmethod
    def for_secret(cls, secret_ctx: bytes) -> KeyHunt:
        """Return a hunt for the key in ``ckks.new_secret_context``'s bytes: as serialized, and as SEAL holds it."""
        import tenseal as ts

        context = ts.context_from(secret_ctx[_STAMP_BYTES:], 1)
        keyless = context.serialize(
            save_public_key=False, save_secret_key=False, save_galois_keys=False, save_relin_keys=False
        )
        key = context.secret_key()
        native = key.data
        plain = native.data()  # a bare pointer into ``native``
        words = b"".join(int(plain[i]).to_bytes(8, "little") for i in range(plain.coeff_count()))
        # Past the public parameters and SEAL's own header, which every key shares.
        return cls({"serialized": secret_ctx[_STAMP_BYTES + len(keyless) + 64 :], "words": words})

    def _add(self, name: str, raw: bytes) -> None:
        """Add a window as it is and as text: hexadecimal and the three alignments of base64."""
        self.patterns[raw] = name
        self.patterns[raw.hex().encode()] = f"{name} as hex"
        for shift in range(3):
            # Of a base64 run only the middle is independent of what stands before and after.
            whole = base64.b64encode(bytes(shift) + raw)
            self.patterns[whole[4 : len(whole) // 4 * 4 - 4]] = f"{name} as base64"

    def search_bytes(self, data: bytes | bytearray | memoryview) -> list[str]:
        """Return the names of the patterns that occur in ``data``."""
        held = data if isinstance(data, bytes | bytearray) else bytes(data)
        return [name for pattern, name in self.patterns.items() if pattern in held]

    def search_object(self, root: Any) -> list[str]:
        """Return the paths of everything reachable from ``root`` that holds the key.

        It follows references (``gc.get_referents``), attributes and slots, containers, closures and bound objects, and
        reads strings, buffers, NumPy and torch storage whole, also around views. Modules, classes and the globals of
        functions are not followed: from any object they lead to the whole interpreter.
        """
        hits: list[str] = []
        seen: set[int] = {id(self), id(self.patterns)}
        keep: list[Any] = []  # ids are only unique among living objects
        queue: deque[tuple[str, Any]] = deque([("root", root)])
        while queue:
            path, thing = queue.popleft()
            if id(thing) in seen or isinstance(thing, _SKIPPED):
                continue
            seen.add(id(thing))
            keep.append(thing)
            hits.extend(f"{path}: {what}" for what in self._inspect(thing))
            queue.extend((path + step, child) for step, child in _children(thing))
        return hits

    def _inspect(self, thing: Any) -> list[str]:
        """Return what a single object holds of the key."""
        found = [name for data in _buffers(thing) for name in self.search_bytes(data)][:3]
        holds = getattr(thing, "has_secret_key", None)
        if callable(holds) and holds():
            found.append(f"a {type(thing).__name__} with a secret key")
        return found

    def search_process(self, pid: int) -> list[str]:
        """Return the places in a process's memory that hold the key.

        Args:
            pid: Another process; this one holds the patterns themselves.

        Raises:
            PermissionError: If the memory cannot be read, rather than finding nothing.
            ValueError: If nothing at all could be read.
        """
        hits, read = [], 0
        # Long forms are in memory as they are; as text they would be found in messages and files.
        patterns = {raw: name for raw, name in self.patterns.items() if " as " not in name}
        with open(f"/proc/{pid}/mem", "rb", buffering=0) as memory:
            for low, high, label in _regions(pid):
                for start in range(low, high, _CHUNK):
                    try:
                        data = os.pread(memory.fileno(), min(_CHUNK + WINDOW, high - start), start)
                    except OSError:
                        continue  # a guard page, or unmapped since
                    read += len(data)
                    if data.count(0) == len(data):
                        continue  # most of what is mapped was never touched
                    hits += [
                        f"{start + data.index(raw):#x} {label}: {name}" for raw, name in patterns.items() if raw in data
                    ]
        if read == 0:
            raise ValueError(f"process {pid}: no memory could be read")
        return hits

    def search_files(self, folder: Path) -> list[str]:
        """Return the files under ``folder`` that hold the key, also inside zip archives (npz)."""
        hits = []
        for path in sorted(folder.rglob("*")):
            if path.is_symlink() or not path.is_file():
                continue
            hits += [f"{path}: {name}" for name in self.search_bytes(path.read_bytes())]
            if zipfile.is_zipfile(path):
                with zipfile.ZipFile(path) as archive:
                    for member in archive.namelist():
                        hits += [f"{path}!{member}: {name}" for name in self.search_bytes(archive.read(member))]
        return hits


def _regions(pid: int) -> Iterator[tuple[int, int, str]]:
    """Yield the mappings that can hold data: readable, and writable or not backed by a file."""
    for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
        bounds, mode, _, _, inode, *rest = line.split(maxsplit=5)
        label = rest[0] if rest else "anonymous"
        if mode[0] != "r" or label in ("[vvar]", "[vsyscall]", "[vvar_vclock]"):
            continue
        if "w" in mode or mode[3] == "s" or inode == "0":
            low, high = (int(bound, 16) for bound in bounds.split("-"))
            yield low, high, label


def _buffers(thing: Any) -> Iterator[bytes | bytearray | memoryview]:
    """Yield the raw bytes that an object holds by itself."""
    if isinstance(thing, str):
        yield thing.encode("utf-8", "surrogatepass")
        with contextlib.suppress(UnicodeEncodeError):
            yield thing.encode("latin-1")
    elif isinstance(thing, bytes | bytearray):
        yield thing
    elif isinstance(thing, int) and not isinstance(thing, bool) and thing.bit_length() > 8 * WINDOW:
        for order in ("little", "big"):
            yield abs(thing).to_bytes((thing.bit_length() + 7) // 8, order)
    elif isinstance(thing, io.BytesIO):
        yield thing.getvalue()
    elif (torch := sys.modules.get("torch")) is not None and isinstance(thing, torch.Tensor):
        storage = thing.detach().cpu().untyped_storage()
        yield torch.empty(0, dtype=torch.uint8).set_(storage).numpy().tobytes()
    elif (numpy := sys.modules.get("numpy")) is not None and isinstance(thing, numpy.ndarray | numpy.generic):
        yield b"" if thing.dtype.hasobject else thing.tobytes()
    else:
        with contextlib.suppress(TypeError, ValueError, BufferError):
            yield memoryview(thing).tobytes()


def _children(thing: Any) -> Iterator[tuple[str, Any]]:
    """Yield (step, object) for everything one reference away."""
    if isinstance(thing, str | bytes | bytearray | int | float | complex | bool | None):
        return
    if isinstance(thing, Mapping):
        with contextlib.suppress(Exception):
            for key, value in list(thing.items()):
                yield f"[{_short(key)}]", value
                yield f".key({_short(key)})", key
    if isinstance(thing, types.FunctionType):
        yield ".__closure__", thing.__closure__
        yield ".__defaults__", thing.__defaults__
        yield ".__kwdefaults__", thing.__kwdefaults__
        yield ".__dict__", thing.__dict__
        return
    if isinstance(thing, memoryview):
        yield ".obj", thing.obj
    if type(thing).__module__.partition(".")[0] in ("tenseal", "_tenseal_cpp") and hasattr(thing, "context"):
        yield ".context()", thing.context()  # a vector's link to it is native
    numpy = sys.modules.get("numpy")
    if numpy is not None and isinstance(thing, numpy.ndarray):
        yield ".base", thing.base
        if thing.dtype.hasobject:
            yield ".tolist()", thing.tolist()
    for name in _attribute_names(thing):
        with contextlib.suppress(Exception):
            yield f".{name}", object.__getattribute__(thing, name)
    for number, child in enumerate(gc.get_referents(thing)):
        yield f".<{number}>", child


def _attribute_names(thing: Any) -> Iterable[str]:
    """Return the names of instance attributes and slots."""
    names = list(getattr(thing, "__dict__", None) or ())
    for kind in type(thing).__mro__:
        slots = kind.__dict__.get("__slots__", ())
        for slot in (slots,) if isinstance(slots, str) else slots:
            private = slot.startswith("__") and not slot.endswith("__")
            names.append(f"_{kind.__name__.lstrip('_')}{slot}" if private else slot)
    return [name for name in names if isinstance(name, str)]


def _short(key: Any) -> str:
    """Return a key as it may stand in a path."""
    return re.sub(r"\s+", " ", repr(key))[:40]
