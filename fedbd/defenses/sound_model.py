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
        MethodRefused: If a weight or buffer is of another float type than float32 or not finite, if the model does not
            take the images, or gives no (N, classes) tensor for them.
    """
    for name, entry in model.state_dict().items():
        if not isinstance(entry, Tensor) or not entry.is_floating_point():
            continue
        if entry.dtype != torch.float32:
            raise MethodRefused(f"{method}: `{name}` is {entry.dtype}, expected torch.float32; hand it model.float()")
        if not bool(torch.isfinite(entry).all()):
            raise MethodRefused(f"{method}: `{name}` is not finite; the model has diverged")
    if seen is not None and len(seen):
        _need_logits(model, method, seen.images[:2], classes)


def _need_logits(model: nn.Module, method: str, images: Tensor, classes: int) -> None:
    entry = next(model.parameters(), None)
    x = images.to(images.device if entry is None else entry.device).to(torch.float32).div_(255.0)
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
    if out.dim() != 2 or len(out) != len(x) or out.shape[1] < classes:
        got = tuple(out.shape)
        raise MethodRefused(f"{method}: the model returns {got} for {len(x)} images, expected ({len(x)}, {classes})")
