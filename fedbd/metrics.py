"""What one model is worth: its accuracy and what an attack gets out of it.

Every share is a fraction of 1, and a share over nothing is None, never 0. Predictions are made in fixed chunks, each on
one thread, so that their bits depend neither on the number of cores nor on how many chunks run at once.

Measures of scores and counts (``fedbd.scores``, ``fedbd.summary``) have their names here, too.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any, TypedDict

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fedbd.scores import precision_at, roc_auc, score_measures, tpr_at_fpr
from fedbd.summary import binomial_interval
from fedbd.targets import ALL_TO_ALL, Target, victims, wanted_labels
from fedbd.training import evaluating, memory_format_of
from fedbd.types import Samples, Trigger

__all__ = [
    "AttackMeasures",
    "Evaluation",
    "Stamp",
    "Target",
    "accuracy",
    "binomial_interval",
    "evaluate",
    "is_collapsed",
    "is_finite",
    "logits",
    "precision_at",
    "predict",
    "right",
    "roc_auc",
    "score_measures",
    "tpr_at_fpr",
]

Stamp = Callable[[Tensor], Tensor]

COLLAPSED_SHARE = 0.95
COLLAPSED_MARGIN = 0.02
BRIEF = (
    "clean_accuracy",
    "clean_accuracy_without_target",
    "target_class_accuracy",
    "attack_success",
    "robust_accuracy",
    "collapsed",
)
"""What is recorded of a model before and after a repair."""


def logits(
    model: nn.Module,
    images: Tensor | Samples,
    *,
    stamp: Stamp | None = None,
    threads: int | None = None,
    chunk: int = 250,
) -> Tensor:
    """Return a model's outputs in eval mode; afterwards every module is in the mode it was in.

    Args:
        model: A classifier of (N, C, H, W) float32 images in [0, 1].
        images: (N, C, H, W), uint8 or float in [0, 1]; of samples only the images are read.
        stamp: Rewrites each chunk of float images (``Trigger.stamp``).
        threads: Chunks evaluated at once, default the cores this process may use. The bits do not depend on it. On an
            accelerator chunks run one after the other.
        chunk: Images per forward pass. The bits may depend on it.

    Returns:
        (N, classes) on the CPU, in the model's dtype; shape (0,) where there are no images.
    """
    pixels = images.images if isinstance(images, Samples) else images
    if pixels.shape[0] == 0:
        return torch.empty(0)
    entry = next(model.parameters(), None)
    device = pixels.device if entry is None else entry.device
    layout = memory_format_of(model)

    def forward(start: int) -> Tensor:
        with torch.inference_mode():
            x = pixels[start : start + chunk].to(device)
            x = x.to(torch.float32).div_(255.0) if x.dtype == torch.uint8 else x
            x = x if stamp is None else stamp(x)
            out: Tensor = model(x.contiguous(memory_format=layout))
            return out.cpu()

    workers = 1 if device.type != "cpu" else threads or len(os.sched_getaffinity(0))
    intra_op = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with evaluating(model):
            return torch.cat(_spread(forward, range(0, pixels.shape[0], chunk), workers))
    finally:
        torch.set_num_threads(intra_op)


def _spread(forward: Callable[[int], Tensor], starts: range, workers: int) -> list[Tensor]:
    """Return ``forward`` of every start, in order."""
    if min(workers, len(starts)) <= 1:
        return [forward(start) for start in starts]
    # OpenMP keeps its thread count per thread: what the caller set does not reach the pool's threads by itself.
    with ThreadPoolExecutor(min(workers, len(starts)), initializer=torch.set_num_threads, initargs=(1,)) as pool:
        return list(pool.map(forward, starts))


def predict(
    model: nn.Module,
    images: Tensor | Samples,
    *,
    stamp: Stamp | None = None,
    threads: int | None = None,
    chunk: int = 250,
) -> NDArray[np.int64]:
    """Return the predicted labels, (N,) int64; arguments as in ``logits``.

    An output with a NaN predicts nothing and is -1: a diverged model hits neither the true label nor a target.
    """
    out = logits(model, images, stamp=stamp, threads=threads, chunk=chunk)
    if out.shape[0] == 0:
        return np.empty(0, dtype=np.int64)
    labels = out.argmax(dim=1).masked_fill_(out.isnan().any(dim=1), -1)
    return labels.numpy().astype(np.int64, copy=False)


def right(model: nn.Module, data: Samples) -> int:
    """Return how many samples a model gets right, in eval mode; it is left in its mode."""
    return int(np.count_nonzero(predict(model, data) == data.labels.cpu().numpy()))


def accuracy(model: nn.Module, data: Samples) -> float:
    """Return the share of samples, at least one, that a model gets right; see ``right``."""
    return right(model, data) / len(data)


def is_finite(model: nn.Module) -> bool:
    """Return whether all of a model's float parameters and buffers are finite: training did not diverge."""
    return all(bool(torch.isfinite(entry).all()) for entry in model.state_dict().values() if entry.is_floating_point())


class AttackMeasures(TypedDict):
    """What one attack does to one model.

    Attributes:
        attack_success: Share of triggered images, whose true label is not the target, that get the target.
        robust_accuracy: Share of the same images that get their true label.
        clean_accuracy_without_target: Accuracy on clean images whose true label is not the target; None all-to-all.
        target_class_accuracy: Accuracy on clean images whose true label is the target; None all-to-all.
        evaluated_samples: Number of triggered images.
    """

    attack_success: float | None
    robust_accuracy: float | None
    clean_accuracy_without_target: float | None
    target_class_accuracy: float | None
    evaluated_samples: int


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """One model on the test set, with names as in a round's record.

    Attributes:
        clean_accuracy: Accuracy on the whole clean test set.
        clean_accuracy_without_target: The same without the first attack's target class; None without an attack.
        target_class_accuracy: The same of that class alone.
        attack_success: The worst (largest) over attacks; None without an attack.
        robust_accuracy: That of the worst attack.
        per_attack: Every attack's own measures, by its name.
        collapsed: One class predicted for over 95 % of clean images, or a clean accuracy at most 2 points above chance.
        evaluated_samples: Number of clean test images.
    """

    clean_accuracy: float | None
    clean_accuracy_without_target: float | None
    target_class_accuracy: float | None
    attack_success: float | None
    robust_accuracy: float | None
    per_attack: Mapping[str, AttackMeasures]
    collapsed: bool | None
    evaluated_samples: int

    def as_record(self) -> dict[str, Any]:
        """Return all measures as plain values, ready for ``record.round_record``."""
        return asdict(self)

    def brief(self) -> dict[str, Any]:
        """Return ``BRIEF``: what ``before``, ``after`` and ``twin_after`` of a cleanup's record hold."""
        return {name: getattr(self, name) for name in BRIEF}


def evaluate(
    model: nn.Module,
    test: Samples,
    triggers: Mapping[str, tuple[Trigger, Target]],
    classes: int,
    *,
    held_out: Mapping[str, Samples] | None = None,
    threads: int | None = None,
) -> Evaluation:
    """Measure a model.

    Args:
        model: Left as it is.
        test: The clean test set with true labels.
        triggers: Per targeted attack its trigger and target. Untargeted attacks have no attack success and stay out.
        classes: Number of classes of the task.
        held_out: The own test sets, with true labels, of attacks that do not act on ordinary images (semantic,
            edge-case); their trigger stamps those.
        threads: As in ``logits``.
    """
    truth = _labels(test)
    clean = predict(model, test, threads=threads)
    measured: dict[str, AttackMeasures] = {}
    for name, (trigger, target) in triggers.items():
        own = (held_out or {}).get(name, test)
        chosen = victims(own.labels.cpu(), target)
        rows, wanted = chosen.nonzero()[:, 0].numpy(), wanted_labels(own.labels.cpu()[chosen], target, classes).numpy()
        hit = predict(model, own.subset(rows), stamp=trigger.stamp, threads=threads)
        measured[name] = {
            "attack_success": _share(hit == wanted),
            "robust_accuracy": _share(hit == _labels(own)[rows]),
            "clean_accuracy_without_target": None if target == ALL_TO_ALL else _share(clean == truth, truth != target),
            "target_class_accuracy": None if target == ALL_TO_ALL else _share(clean == truth, truth == target),
            "evaluated_samples": int(rows.size),
        }
    first = next(iter(measured.values()), None)
    worst = max(measured.values(), key=_harm, default=None)
    return Evaluation(
        clean_accuracy=_share(clean == truth),
        clean_accuracy_without_target=first and first["clean_accuracy_without_target"],
        target_class_accuracy=first and first["target_class_accuracy"],
        attack_success=worst and worst["attack_success"],
        robust_accuracy=worst and worst["robust_accuracy"],
        per_attack=measured,
        collapsed=is_collapsed(clean, truth, classes),
        evaluated_samples=len(test),
    )


def _harm(measures: AttackMeasures) -> float:
    return -1.0 if measures["attack_success"] is None else measures["attack_success"]


def _labels(samples: Samples) -> NDArray[np.int64]:
    return samples.labels.cpu().numpy()


def _share(hits: NDArray[np.bool_], among: NDArray[np.bool_] | None = None) -> float | None:
    """Return the share of hits among the chosen entries, None where none is chosen."""
    chosen = hits if among is None else hits[among]
    return float(np.count_nonzero(chosen)) / chosen.size if chosen.size else None


def is_collapsed(predicted: NDArray[np.int64], truth: NDArray[np.int64], classes: int) -> bool | None:
    """Say whether a model collapsed, from its predictions on clean images; None without images.

    Collapsed: one class is predicted for over 95 % of the images, or the accuracy is at most 2 points above chance
    (below chance counts, too: no such model may pass for a defended one).
    """
    if predicted.size == 0:
        return None
    commonest = np.unique(predicted, return_counts=True)[1].max() / predicted.size
    accuracy = np.count_nonzero(predicted == truth) / predicted.size
    return bool(commonest > COLLAPSED_SHARE or accuracy <= 1 / classes + COLLAPSED_MARGIN + 1e-12)
