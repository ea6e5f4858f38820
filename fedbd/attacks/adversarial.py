"""Plain functions that the makers of adversarial examples share: gradients with respect to the input, grid, notes."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fedbd.defenses.sound_model import need_known_labels, need_sound
from fedbd.errors import MethodRefused
from fedbd.metrics import predict
from fedbd.training import memory_format_of, need_gradients
from fedbd.types import Notes

LEVELS = 255.0
"""Steps of the uint8 grid in [0, 1]."""


def refuse_unfit(model: nn.Module, images: Tensor, labels: Tensor, attack: str) -> NDArray[np.int64]:
    """Return a model's predictions, (N,) int64, or refuse what cannot be perturbed.

    Args:
        model: The model to fool.
        images: (N, C, H, W) float in [0, 1].
        labels: (N,) int64, each a class of the model.
        attack: The attack's name, for the message.

    Raises:
        MethodRefused: If the images are not float32 or not in [0, 1], the model is unsound (``need_sound``), a label is
            none of its classes, its outputs are not numbers, or under ``torch.inference_mode()``.
    """
    need_gradients(f"{attack} cannot compute gradients")
    if images.dtype != torch.float32:
        raise MethodRefused(f"{attack} perturbs float32 images in [0, 1], got {images.dtype}: take Samples.batch")
    if images.numel() and not 0 <= float(images.min()) <= float(images.max()) <= 1:
        found = f"{float(images.min()):.3g} to {float(images.max()):.3g}"
        raise MethodRefused(f"{attack} perturbs float images in [0, 1], got {found}: take Samples.batch")
    need_sound(model, attack)
    if len(labels):
        need_known_labels(model, attack, images[:2], labels)
    predicted = predict(model, images, threads=1)
    if (predicted < 0).any():
        raise MethodRefused(f"{attack} needs a model whose outputs are finite; this one has diverged")
    return predicted


def margins(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the largest other logit minus the label's, (N,): above 0 where the prediction is another class."""
    own = logits.gather(1, labels[:, None])[:, 0]
    return logits.scatter(1, labels[:, None], -torch.inf).amax(1) - own


def ascent_sign(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """Return the sign of the cross-entropy's gradient with respect to the input, (N, C, H, W), entries -1, 0 and 1.

    It is taken from the log odds against the label, of which the cross-entropy is a rising function: the same sign, but
    it does not vanish in float32 where the model is sure. Parameters get no gradient.

    Args:
        model: In eval mode.
        images: (N, C, H, W) float in [0, 1], on the model's device.
        labels: (N,) int64.
    """
    with torch.enable_grad():
        x = images.detach().contiguous(memory_format=memory_format_of(model)).requires_grad_(True)
        logits = model(x)
        own = logits.gather(1, labels[:, None])[:, 0]
        odds = logits.scatter(1, labels[:, None], -torch.inf).logsumexp(1) - own
        (gradient,) = torch.autograd.grad(odds.sum(), x)
    return gradient.sign()


def chunks(model: nn.Module, count: int, size: int) -> Iterator[tuple[slice, torch.device]]:
    """Return the slices of at most ``size`` of ``count`` images, and the model's device."""
    entry = next(model.parameters(), None)
    device = torch.device("cpu") if entry is None else entry.device
    for start in range(0, count, size):
        yield slice(start, start + size), device


def to_grid(images: Tensor) -> Tensor:
    """Return images rounded to the values that a uint8 image has, k / 255."""
    return images.mul(LEVELS).round_().clamp_(0.0, LEVELS).div_(LEVELS)


def to_grid_within(perturbed: Tensor, images: Tensor, eps: float) -> Tensor:
    """Return images rounded to k / 255 and at most ``eps`` from the original ones, which lie on that grid, too.

    Args:
        perturbed: (N, C, H, W) in [0, 1].
        images: The original ones.
        eps: Largest change of a value.
    """
    slack = 1e-3  # of a grid step: eps * 255 = 8 must not become 7 by float32 rounding
    reach = float(np.floor(eps * LEVELS + slack))
    center = images.mul(LEVELS).round_()
    level = perturbed.mul(LEVELS).round_().clamp_(0.0, LEVELS)
    return torch.minimum(torch.maximum(level, center - reach), center + reach).div_(LEVELS)


def outcome(
    model: nn.Module,
    images: Tensor,
    perturbed: Tensor,
    labels: Tensor,
    before: NDArray[np.int64],
    target: int | None = None,
) -> Notes:
    """Return what an attack reached, measured on the images as they are handed out.

    Args:
        model: The model to fool.
        images: (N, C, H, W), the original ones.
        perturbed: The same size.
        labels: (N,) int64, the true labels.
        before: (N,) the model's predictions of the original ones.
        target: The class that all images shall be taken for; None: any but the true one.

    Returns:
        ``images`` (how many were attacked: all, or those whose label is not the target), ``success_rate`` (their share
        that has a wrong label, or the target's), ``success_before`` (the same of the unperturbed ones), ``fooled`` (how
        many succeed by the perturbation only), and ``mean_linf`` and ``mean_l2`` over the fooled, in units of [0, 1].
        What is over nothing is None.
    """
    truth = labels.cpu().numpy()
    after = predict(model, perturbed, threads=1)
    attacked = np.ones(len(truth), bool) if target is None else truth != target
    hit, already = (found != truth if target is None else found == target for found in (after, before))
    count = int(attacked.sum())
    fooled = attacked & hit & ~already
    change = (perturbed - images).flatten(1)[torch.from_numpy(fooled)].to("cpu", torch.float64)
    return {
        "images": count,
        "success_rate": float((attacked & hit).sum() / count) if count else None,
        "success_before": float((attacked & already).sum() / count) if count else None,
        "fooled": int(fooled.sum()),
        "mean_linf": float(change.abs().amax(1).mean()) if len(change) else None,
        "mean_l2": float(change.norm(dim=1).mean()) if len(change) else None,
    }
