"""What every method asks of a model before it looks at it, so that no error of torch's comes up from deep within."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fedbd.errors import MethodRefused
from fedbd.training import evaluating, memory_format_of
from fedbd.types import Samples


def need_sound(model: nn.Module, method: str, seen: Samples | None = None, classes: int = 1) -> None:
    """Refuse a model that no method can repair or judge.

    Args:
        model: Left untouched, in the mode it was in.
        method: Who asks, for the message.
        seen: Samples whose first images are shown to the model; None or none: only its weights are looked at.
        classes: How many outputs it must have at least.

    Raises:
        MethodRefused: If it is a TorchScript module, if a weight or buffer is of another float type than float32 or not
            finite, if the model does not take the images, or gives no (N, classes) tensor for them.
    """
    if isinstance(model, torch.jit.ScriptModule):
        raise MethodRefused(
            f"{method} looks into a model's modules, and this one is compiled by torch.jit; hand it the Python module"
        )
    for name, entry in model.state_dict().items():
        if not isinstance(entry, Tensor) or not entry.is_floating_point():
            continue
        if entry.dtype != torch.float32:
            raise MethodRefused(f"{method}: `{name}` is {entry.dtype}, expected torch.float32; hand it model.float()")
        if not bool(torch.isfinite(entry).all()):
            raise MethodRefused(f"{method}: `{name}` is not finite; the model has diverged")
    if seen is not None and len(seen):
        _need_logits(model, method, seen.images[:2], classes)


def need_scorable(model: nn.Module, method: str, data: Samples) -> None:
    """Refuse samples that no detector can score with a model, and a model that ``need_sound`` refuses.

    Args:
        model: Left untouched, in the mode it was in.
        method: Who asks, for the message.
        data: The samples to score.

    Raises:
        MethodRefused: If there are none, or a label is none of the model's classes; see ``need_sound``, too.
    """
    if len(data) == 0:
        raise MethodRefused(f"{method}: there are no samples to score; give it at least one")
    need_sound(model, method)
    need_known_labels(model, method, data.images[:2].to(torch.float32).div(255.0), data.labels)


def need_known_labels(model: nn.Module, method: str, images: Tensor, labels: Tensor) -> None:
    """Refuse labels that are none of a model's classes.

    Args:
        model: Left untouched, in the mode it was in.
        method: Who asks, for the message.
        images: (N, C, H, W) float32 in [0, 1], one or more to count the model's outputs with.
        labels: (N,) int64.

    Raises:
        MethodRefused: If one is; or if the model gives no (N, classes) tensor for the images.
    """
    known = _outputs(model, method, images)
    low, high = int(labels.min()), int(labels.max())
    if not 0 <= low <= high < known:
        raise MethodRefused(f"{method}: the labels are {low} to {high}, and the model's classes 0 to {known - 1}")


def _need_logits(model: nn.Module, method: str, images: Tensor, classes: int) -> None:
    known = _outputs(model, method, images.to(torch.float32).div(255.0))
    if known < classes:
        raise MethodRefused(
            f"{method}: the model returns {(len(images), known)} for {len(images)} images, expected "
            f"({len(images)}, {classes})"
        )


def _outputs(model: nn.Module, method: str, images: Tensor) -> int:
    """Return how many outputs a model has."""
    entry = next(model.parameters(), None)
    x = images.to(images.device if entry is None else entry.device)
    try:
        with evaluating(model), torch.no_grad():
            out = model(x.contiguous(memory_format=memory_format_of(model)))
    except (RuntimeError, TypeError, ValueError) as error:
        shape = tuple(x.shape[1:])
        raise MethodRefused(f"{method}: the model does not take images of {shape}, (C, H, W): {error}") from error
    if not isinstance(out, Tensor):
        what = f"a {type(out).__name__}"
        raise MethodRefused(
            f"{method}: the model returns {what}, expected a tensor of logits; wrap it in a module "
            "whose forward returns them alone"
        )
    if out.dim() != 2 or len(out) != len(x):
        got = tuple(out.shape)
        raise MethodRefused(f"{method}: the model returns {got} for {len(x)} images, expected ({len(x)}, classes)")
    return out.shape[1]
