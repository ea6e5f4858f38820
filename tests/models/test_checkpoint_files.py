from __future__ import annotations

import contextlib
import os
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn

from fedbd.errors import CheckpointError
from fedbd.models.checkpoint import load_checkpoint, save_safetensors
from fedbd.models.mlp import Mlp
from fedbd.models.wrn import Wrn
from fedbd.training import memory_format_of


def wrn(seed: int = 0) -> nn.Module:
    return Wrn(depth=10).build((3, 16, 16), 10, torch.Generator().manual_seed(seed))


def mlp(seed: int = 0) -> nn.Module:
    return Mlp(hidden=(3,)).build((1, 2, 2), 2, torch.Generator().manual_seed(seed))


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


WRITERS = {
    "safetensors": save_safetensors,
    "state dict": lambda model, path: torch.save(model.state_dict(), path),
    "under state_dict": lambda model, path: torch.save({"state_dict": model.state_dict(), "epoch": 3}, path),
    "before torch 1.6": lambda model, path: torch.save(
        {"state_dict": model.state_dict(), "epoch": 3}, path, _use_new_zipfile_serialization=False
    ),
}


@pytest.mark.parametrize("form", WRITERS)
def test_every_form_comes_back(form, tmp_path):
    source, target = wrn(1), wrn(2)
    source(torch.rand(4, 3, 16, 16))  # moves the statistics
    WRITERS[form](source, tmp_path / "model")  # the name does not tell the form
    load_checkpoint(target, tmp_path / "model")
    assert same(source, target)
    assert memory_format_of(target) is torch.channels_last


@pytest.mark.parametrize("wrapper", ["module.", "_orig_mod.", "_orig_mod.module.", "module._orig_mod."])
def test_what_wrapped_a_network_is_taken_off_its_names(wrapper, tmp_path):
    source, target = mlp(1), mlp(2)
    torch.save({wrapper + name: entry for name, entry in source.state_dict().items()}, tmp_path / "model.pt")
    load_checkpoint(target, tmp_path / "model.pt")
    assert same(source, target)


def test_a_network_whose_own_names_begin_so_keeps_them(tmp_path):
    source, target = nn.DataParallel(mlp(1)), nn.DataParallel(mlp(2))
    save_safetensors(source, tmp_path / "model")
    load_checkpoint(target, tmp_path / "model")
    assert same(source, target)


def test_saving_changes_neither_the_model_nor_a_second_time_the_bytes(tmp_path):
    model = wrn()
    save_safetensors(model, tmp_path / "a")
    save_safetensors(model, tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert memory_format_of(model) is torch.channels_last
    held = safetensors.torch.load_file(tmp_path / "a")
    assert held.keys() == model.state_dict().keys()


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "model.safetensors"
    save_safetensors(mlp(1), path)
    before = path.read_bytes()

    def fail(handle):
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        save_safetensors(mlp(2), path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_model_is_as_readable_as_any_new_file(tmp_path):
    save_safetensors(mlp(1), tmp_path / "model.safetensors")
    (tmp_path / "other").touch()
    modes = {path.stat().st_mode for path in tmp_path.iterdir()}
    assert len(modes) == 1


def changed(**changes):
    """Write the state of an Mlp with entries replaced, or left out where None."""

    def write(path: Path) -> None:
        state = mlp(1).state_dict() | {name.replace("__", "."): entry for name, entry in changes.items()}
        torch.save({name: entry for name, entry in state.items() if entry is not None}, path)

    return write


class Anything:
    """A class that no checkpoint may bring with it."""


NUMPY = np.float64(0).__reduce__()[0].__module__.removesuffix(".multiarray")
FORM = "must be a safetensors file or a PyTorch state dict, alone or under 'state_dict'"
HEAD = "the checkpoint does not fit MlpModule:\n"
CASES = {
    "missing file": (lambda path: None, "model.pt: must be a file, got nothing of that name"),
    "a folder": (lambda path: path.mkdir(), "model.pt: must be a file, got a folder; name the file in it"),
    "text": (lambda path: path.write_text("no model"), f"model.pt: {FORM}, got a damaged or other file"),
    "empty": (lambda path: path.touch(), f"model.pt: {FORM}, got a damaged or other file"),
    "cut short": (
        lambda path: (changed()(path), path.write_bytes(path.read_bytes()[:-300])),
        f"model.pt: {FORM}, got a damaged or other file",
    ),
    "safetensors cut short": (
        lambda path: (save_safetensors(mlp(), path), path.write_bytes(path.read_bytes()[:-3])),
        f"model.pt: {FORM}, got a damaged or other file",
    ),
    "a whole model": (
        lambda path: torch.save(mlp(), path),
        f"model.pt: {FORM}, got a file that holds a fedbd.models.mlp.MlpModule, too; save its state_dict alone, with "
        "safetensors or torch.save",
    ),
    "an object beside the weights": (
        lambda path: torch.save({"state_dict": mlp().state_dict(), "args": Anything()}, path),
        f"model.pt: {FORM}, got a file that holds a {__name__}.Anything, too; save its state_dict alone, with "
        "safetensors or torch.save",
    ),
    "a number of NumPy beside the weights": (
        lambda path: torch.save({"state_dict": mlp().state_dict(), "best_acc": np.float64(0.5)}, path),
        f"model.pt: {FORM}, got a file that holds a {NUMPY}.multiarray.scalar, too; save its state_dict alone, with "
        "safetensors or torch.save",
    ),
    "a tensor": (
        lambda path: torch.save(torch.zeros(3), path),
        f"model.pt: {FORM}, got a Tensor; save model.state_dict()",
    ),
    "another dict": (
        lambda path: torch.save({"model": mlp().state_dict(), "epoch": 3}, path),
        f"model.pt: {FORM}, got a dict whose 'model' is a OrderedDict; save model.state_dict()",
    ),
    "everything that does not fit": (
        changed(
            hidden__0__0__weight=None, hidden__0__weight=torch.zeros(3, 4), fc__bias=torch.zeros(3), extra=torch.ones(1)
        ),
        HEAD + "  model.pt:hidden.0.0.weight: is missing\n"
        "  model.pt:fc.bias: must have shape (2,), got (3,)\n"
        "  model.pt:hidden.0.weight: is not an entry of the model; did you mean 'hidden.0.0.weight'?\n"
        "  model.pt:extra: is not an entry of the model",
    ),
    "no entry": (
        lambda path: torch.save({}, path),
        f"model.pt: {FORM}, got one without a single entry; save model.state_dict()",
    ),
    "no entry in safetensors": (
        lambda path: safetensors.torch.save_file({}, path),
        f"model.pt: {FORM}, got one without a single entry; save model.state_dict()",
    ),
    "sparse": (
        changed(fc__weight=torch.eye(2, 3).to_sparse()),
        HEAD + "  model.pt:fc.weight: must be a dense tensor, got sparse_coo; save entry.to_dense()",
    ),
    "compressed": (
        changed(fc__weight=torch.eye(2, 3).to_sparse_csr()),
        HEAD + "  model.pt:fc.weight: must be a dense tensor, got sparse_csr; save entry.to_dense()",
    ),
    "TorchScript": (
        lambda path: torch.jit.script(nn.Linear(2, 2)).save(str(path)),
        f"model.pt: {FORM}, got a damaged or other file",
    ),
    "integers": (
        changed(fc__bias=torch.zeros(2, dtype=torch.int64)),
        HEAD + "  model.pt:fc.bias: must be float32, got int64",
    ),
    "not finite": (
        changed(fc__bias=torch.tensor([0.0, torch.nan])),
        HEAD + "  model.pt:fc.bias: must be finite, got NaN or infinity",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_the_message_is_exact_and_the_model_untouched(case, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write, expected = CASES[case]
    write(Path("model.pt"))
    model = mlp(5)
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(model, Path("model.pt"))
    assert str(caught.value) == expected
    assert same(model, mlp(5))


def test_torch_says_nothing_of_its_own_about_a_file(tmp_path, recwarn):
    torch.jit.script(nn.Linear(2, 2)).save(str(tmp_path / "script.pt"))
    torch.save(mlp().state_dict(), tmp_path / "four.pt", pickle_protocol=4, _use_new_zipfile_serialization=False)
    recwarn.clear()
    for name in ("script.pt", "four.pt"):
        with contextlib.suppress(CheckpointError):
            load_checkpoint(mlp(), tmp_path / name)
    assert [str(warning.message) for warning in recwarn] == []


def test_a_prefix_that_not_all_names_have_stays(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    state = {f"module.{name}": entry for name, entry in mlp().state_dict().items()}
    torch.save({**state, "extra": torch.zeros(1)}, "model.pt")
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(mlp(), Path("model.pt"))
    assert "  model.pt:module.fc.bias: is not an entry of the model; did you mean 'fc.bias'?" in str(caught.value)


def test_half_precision_weights_load(tmp_path):
    torch.save({name: entry.half() for name, entry in mlp(1).state_dict().items()}, tmp_path / "model.pt")
    model = mlp(2)
    load_checkpoint(model, tmp_path / "model.pt")
    assert torch.equal(model.fc.weight, mlp(1).fc.weight.half().float())
    assert model.fc.weight.dtype == torch.float32


def test_a_file_that_may_not_be_read_is_told(tmp_path, monkeypatch):
    def locked(self, mode="r", *args, **kwargs):
        raise PermissionError(13, "Permission denied")

    save_safetensors(mlp(), tmp_path / "model.pt")
    monkeypatch.setattr(Path, "open", locked)
    with pytest.raises(CheckpointError, match=r"must be a file that can be read, got .*Permission denied"):
        load_checkpoint(mlp(), tmp_path / "model.pt")
