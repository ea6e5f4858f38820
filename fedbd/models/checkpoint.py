"""Reading and writing weights. Reading opens no pickle but PyTorch's own tensors (``weights_only=True``)."""

from __future__ import annotations

import difflib
import pickle
import re
import struct
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from fedbd.errors import CheckpointError, Problem
from fedbd.records.whole_files import whole_file

FOREIGN = re.compile(r"Unsupported global: GLOBAL (\S+)")
"""How PyTorch names what ``weights_only`` does not open."""

WRAPPERS = ("module.", "_orig_mod.")
"""How all names of a state dict begin that was taken of ``nn.DataParallel`` or of what ``torch.compile`` returned."""

PYTORCH = (b"PK", b"\x80")
"""How PyTorch's files begin: an archive since 1.6, a pickle (of which only tensors are opened) before."""


def load_checkpoint(model: nn.Module, path: str | Path) -> None:
    """Fill a model with a checkpoint's weights, in place; nothing is changed if the checkpoint does not fit.

    Args:
        model: Keeps its memory format, device and types. Where it holds another library's network under ``prefix``
            (``torchvision``), that library's own names will do, too.
        path: A safetensors file, or a PyTorch file with a state dict or a dict that holds one under ``state_dict``.
            What wrapped the network when it was saved (``WRAPPERS``) is taken off its names.

    Raises:
        CheckpointError: With every entry that is missing, unexpected, of another shape or kind, or not finite.
    """
    entries = _read(Path(path))
    entries = _unwrapped(model.state_dict(), entries)
    prefix = getattr(model, "prefix", "")
    if prefix and not any(name.startswith(prefix) for name in entries):
        entries = {f"{prefix}{name}": entry for name, entry in entries.items()}
    problems = _mismatches(model.state_dict(), entries, str(path))
    if problems:
        problems += _other_norms(model.state_dict(), entries, str(path))
        raise CheckpointError(problems, f"the checkpoint does not fit {type(model).__name__}:")
    model.load_state_dict(entries, strict=True)


def _unwrapped(own: Mapping[str, Tensor], entries: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return a checkpoint's entries under the names of the network itself, whatever wrapped it.

    Nothing is lost by that: names and shapes must fit afterwards, every one.
    """
    for _ in range(len(WRAPPERS)):
        for wrapper in WRAPPERS:
            wrapped = bool(entries) and all(name.startswith(wrapper) for name in entries)
            if wrapped and not any(name.startswith(wrapper) for name in own):
                entries = {name.removeprefix(wrapper): entry for name, entry in entries.items()}
    return entries


def save_safetensors(model: nn.Module, path: Path) -> None:
    """Write a model's state as safetensors (contiguous, on the CPU); the file appears whole or not at all.

    Args:
        model: Left untouched.
        path: Where to write; its folder must exist.

    Raises:
        OSError: If it cannot be written.
    """
    save_tensors(model.state_dict(), path, {})


def save_tensors(tensors: Mapping[str, Tensor], path: Path, marks: Mapping[str, str]) -> None:
    """Write named tensors and text marks as safetensors, as ``save_safetensors`` does."""
    state = {name: entry.detach().cpu().contiguous() for name, entry in tensors.items()}
    data = safetensors.torch.save(state, metadata={"format": "pt", **marks})
    with whole_file(path) as file:
        file.write(data)


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return what ``save_tensors`` wrote: the tensors (contiguous, on the CPU) and the marks.

    Raises:
        CheckpointError: If the file is damaged or another.
    """
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
    except (SafetensorError, OSError):
        raise CheckpointError([_other_form(str(path), "a damaged or other file")]) from None


def _read(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a checkpoint file."""
    where = str(path)
    if not path.is_file():
        folder = path.is_dir()
        got, remedy = ("a folder", "name the file in it") if folder else ("nothing of that name", "")
        raise CheckpointError([Problem(path=where, expected="must be a file", got=got, remedy=remedy)])
    try:
        with path.open("rb") as file:
            start = file.read(9)
    except OSError as error:
        expected = "must be a file that can be read"
        raise CheckpointError([Problem(path=where, expected=expected, got=str(error))]) from None
    if _is_safetensors(start, path.stat().st_size):
        try:
            return _some(dict(safetensors.torch.load_file(path)), where)
        except SafetensorError:
            raise CheckpointError([_other_form(where, "a damaged or other file")]) from None
    if not start.startswith(PYTORCH):
        raise CheckpointError([_other_form(where, "a damaged or other file")])
    content = _load_pytorch(path)
    state = content.get("state_dict", content) if isinstance(content, dict) else content
    if not isinstance(state, Mapping) or not all(isinstance(entry, Tensor) for entry in state.values()):
        raise CheckpointError([_other_form(where, _describe(state), "save model.state_dict()")])
    return _some({str(name): entry for name, entry in state.items()}, where)


def _some(entries: dict[str, Tensor], where: str) -> dict[str, Tensor]:
    """Return the entries; one sentence says that there are none, not one for each that the model has."""
    if not entries:
        raise CheckpointError([_other_form(where, "one without a single entry", "save model.state_dict()")])
    return entries


def _load_pytorch(path: Path) -> Any:
    """Return what ``torch.save`` wrote, if it is tensors and plain containers."""
    try:
        with warnings.catch_warnings():  # what is wrong with a file is said below, once and in fedbd's words
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        remedy = "save its state_dict alone, with safetensors or torch.save"
        named = FOREIGN.search(str(error))
        got = (
            f"a file that holds a {named[1]}, too"
            if named
            else "a file that holds other Python objects, or a damaged one"
        )
        raise CheckpointError([_other_form(str(path), got, remedy)]) from None
    except Exception:  # damage makes the unpickler trip in many ways: KeyError, IndexError, AssertionError, ...
        raise CheckpointError([_other_form(str(path), "a damaged or other file")]) from None


def _other_form(where: str, got: str, remedy: str = "") -> Problem:
    expected = "must be a safetensors file or a PyTorch state dict, alone or under 'state_dict'"
    return Problem(path=where, expected=expected, got=got, remedy=remedy)


def _is_safetensors(start: bytes, size: int) -> bool:
    """Return whether a file begins like safetensors: the length of a header that fits the file, and a brace."""
    return len(start) == 9 and start[8:] == b"{" and struct.unpack("<Q", start[:8])[0] <= size - 8


def _describe(state: Any) -> str:
    if not isinstance(state, Mapping):
        return f"a {type(state).__name__}"
    other = next(name for name, entry in state.items() if not isinstance(entry, Tensor))
    return f"a dict whose {other!r} is a {type(state[other]).__name__}"


def _mismatches(own: Mapping[str, Tensor], entries: Mapping[str, Tensor], where: str) -> list[Problem]:
    """Return one problem per entry that does not fit."""
    missing = [name for name in own if name not in entries]
    problems = [Problem(path=f"{where}:{name}", expected="is missing") for name in missing]
    for name, entry in entries.items():
        at = f"{where}:{name}"
        if name not in own:
            near = difflib.get_close_matches(name, missing, n=1, cutoff=0.6)
            remedy = f"did you mean '{near[0]}'?" if near else ""
            problems.append(Problem(path=at, expected="is not an entry of the model", remedy=remedy))
        elif entry.shape != own[name].shape:
            expected, got = f"must have shape {tuple(own[name].shape)}", str(tuple(entry.shape))
            problems.append(Problem(path=at, expected=expected, got=got))
        elif entry.is_floating_point() != own[name].is_floating_point():
            expected, got = f"must be {_name(own[name].dtype)}", _name(entry.dtype)
            problems.append(Problem(path=at, expected=expected, got=got))
        elif entry.layout != torch.strided:
            got, remedy = _name(entry.layout), "save entry.to_dense()"
            problems.append(Problem(path=at, expected="must be a dense tensor", got=got, remedy=remedy))
        elif entry.is_floating_point() and not torch.isfinite(entry).all():
            problems.append(Problem(path=at, expected="must be finite", got="NaN or infinity"))
    return problems


def _other_norms(own: Mapping[str, Tensor], entries: Mapping[str, Tensor], where: str) -> list[Problem]:
    """Return what to say where model and checkpoint differ in having BatchNorm's running statistics."""
    ours, theirs = (any(name.endswith("running_mean") for name in state) for state in (own, entries))
    if ours == theirs:
        return []
    expected = (
        "is of a network with BatchNorm, and the model has none" if theirs else "is of a network without BatchNorm"
    )
    remedy = (
        "a scenario's batch_norm must be the one that the checkpoint was trained with: group_norm replaces BatchNorm"
    )
    return [Problem(path=where, expected=expected, remedy=remedy)]


def _name(kind: torch.dtype | torch.layout) -> str:
    return str(kind).removeprefix("torch.")
