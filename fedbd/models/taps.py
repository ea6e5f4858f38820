"""Reading what a model computes inside, at the places that it declares (see ``fedbd.models``)."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fedbd.errors import MethodRefused
from fedbd.metrics import logits
from fedbd.types import Samples

REMEDY = "take a model that declares it (cnn, wrn16-1, resnet18), or set the attribute on yours"


def declared(model: nn.Module, attribute: str, method: str) -> Any:
    """Return ``taps``, ``maps``, ``prunable``, ``channels`` or ``classifier`` of a model.

    Args:
        model: Any model.
        attribute: The declaration's name.
        method: Who asks, for the message.

    Raises:
        MethodRefused: If the model does not declare it, declares it empty, names a module that it does not have, has a
            module under the declaration's name, or is a compiled or parallel one, which hooks do not reach.
    """
    _need_plain(model, method)
    found = getattr(model, attribute, None)
    if isinstance(found, nn.Module):
        raise MethodRefused(
            f"{method} reads the model's `{attribute}`, a module's name, and the model has a module of its own there; "
            "wrap it in a module that sets the attribute and calls it"
        )
    if not found:
        raise MethodRefused(f"{method} reads the model's `{attribute}` and the model declares none; {REMEDY}")
    if attribute == "taps" and isinstance(found, str):
        raise MethodRefused(
            f"{method} reads the model's `taps`, which must be a tuple of modules' names and is the string {found!r}; "
            f"set it to ({found!r},)"
        )
    known = {name for name, _ in model.named_modules(remove_duplicate=False)}
    for name in found if attribute == "taps" else (found,):
        if name not in known:
            remedy = f"set {attribute} to what model.named_modules() names"
            raise MethodRefused(f"{method} reads the model's `{attribute}` and it has no module {name!r}; {remedy}")
    return found


def _need_plain(model: nn.Module, method: str) -> None:
    """Refuse what torch.compile or DataParallel made of a model: it calls no hooks, or has other names."""
    parallel = isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel)
    if parallel or hasattr(model, "_orig_mod"):
        inner = "module" if parallel else "_orig_mod"
        raise MethodRefused(f"{method} hooks into a model's modules; hand it the plain one, model.{inner}")
    if getattr(model, "_compiled_call_impl", None) is not None:
        raise MethodRefused(
            f"{method} hooks into a model's modules, and compile() was called on this one; hand it one that is not"
        )


def prunable(model: nn.Module, method: str) -> str:
    """Return the module whose maps' channels the model's ``channels`` switch off: ``prunable``, or else ``maps``.

    Raises:
        MethodRefused: If the model declares neither, or a module that it does not have.
    """
    return str(declared(model, "prunable" if getattr(model, "prunable", "") else "maps", method))


@contextlib.contextmanager
def outputs(model: nn.Module, names: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """Within the block, keep what the named modules put out in the last forward pass (a clone, gradient flows)."""
    kept: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, __: Any, out: Tensor) -> None:
            kept[name] = out.clone()  # what follows may work in place

        return hook

    handles = [model.get_submodule(name).register_forward_hook(keep(name)) for name in names]
    try:
        yield kept
    finally:
        for handle in handles:
            handle.remove()


class _Inner(nn.Module):
    """A model that returns a reading of what one of its modules takes in or puts out, in place of its logits."""

    def __init__(self, model: nn.Module, name: str, read: Callable[[Tensor], Tensor], inputs: bool) -> None:
        super().__init__()
        self.model, self.name, self.read, self.inputs = model, name, read, inputs

    def forward(self, x: Tensor) -> Tensor:
        found: list[Tensor] = []

        def hook(_: nn.Module, taken: Any, out: Tensor) -> None:
            found.append(self.read(taken[0] if self.inputs else out).clone())

        handle = self.model.get_submodule(self.name).register_forward_hook(hook)
        try:
            self.model(x)
        finally:
            handle.remove()
        return found[0]


def readings(
    model: nn.Module,
    name: str,
    images: Tensor | Samples,
    *,
    read: Callable[[Tensor], Tensor] = lambda out: out,
    inputs: bool = False,
    stamp: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Return what a module computes for many images, in eval mode and in the fixed chunks of ``metrics.logits``.

    Args:
        model: Left in the mode it was in.
        name: The module, e.g. ``declared(model, "maps", ...)``.
        images: (N, C, H, W), uint8 or float in [0, 1]; of samples only the images are read.
        read: Applied to each chunk's (B, ...) tensor; must keep the first dimension. Reduce here what need not be kept.
        inputs: Read what the module takes in, not what it puts out.
        stamp: Rewrites each chunk of float images first.

    Returns:
        (N, ...) on the CPU.
    """
    # One thread: hooks are registered on the one model, and chunks side by side would read each other's.
    return logits(_Inner(model, name, read, inputs), images, stamp=stamp, threads=1)


def penultimate(model: nn.Module, images: Tensor | Samples, method: str) -> Tensor:
    """Return what the classifier takes in, (N, D) float32 on the CPU: the penultimate layer's features.

    Raises:
        MethodRefused: If the model declares no ``classifier``.
    """
    features = readings(model, declared(model, "classifier", method), images, inputs=True)
    return features.flatten(1).to(torch.float32)
