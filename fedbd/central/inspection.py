"""What a trigger does inside of a model: norms of the last channels, the paper's claim about them, Grad-CAM maps.

The claim: H. Cheng, K. Xu, S. Liu, P.-Y. Chen, P. Zhao, X. Lin, "Defending against Backdoor Attack on Deep Neural
Networks", 2020, https://arxiv.org/abs/2002.12162 (abstract): a trigger shifts the l-inf norm of the final
convolution's activation maps far more than their l1 and l2 norms. The abstract puts no number to "far more"; ``FAR``
is ours, and every report prints it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from fedbd import targets
from fedbd.defenses.cleanup.channel_norms import Norms, channel_norms, norm_ratios
from fedbd.defenses.gradcam import gradcam
from fedbd.metrics import Stamp, predict
from fedbd.targets import Target
from fedbd.types import Samples

FAR = 2.0
"""The largest l-inf excess (ratio - 1) must be at least so many times the larger one of l1 and l2."""


@dataclass(frozen=True, kw_only=True)
class Claim:
    """Whether the paper's claim holds on a model.

    Attributes:
        largest: By norm, the largest finite ratio triggered / clean over the channels, at least 1; 1 is no change.
        factor: The l-inf excess over the larger one of l1 and l2; None where neither has any.
        most: The l-inf norm is shifted more than the others.
        reproduced: It is, and ``factor`` is None or at least ``FAR``.
    """

    largest: dict[str, float]
    factor: float | None
    most: bool
    reproduced: bool


def judge_claim(ratios: Norms) -> Claim:
    """Return whether the largest l-inf shift stands out over those of l1 and l2.

    Args:
        ratios: Of ``channel_norms.norm_ratios``; channels silent on clean images (infinite) are left out.
    """
    largest = {name: max([1.0, *values[np.isfinite(values)].tolist()]) for name, values in ratios.items()}
    other = max(largest["l1"], largest["l2"]) - 1.0
    excess = largest["linf"] - 1.0
    factor = excess / other if other > 0 else None
    most = excess > other
    return Claim(largest=largest, factor=factor, most=most, reproduced=most and (factor is None or factor >= FAR))


def top_channels(ratios: Norms, count: int) -> list[int]:
    """Return the channels with the largest l-inf ratios, largest first; equal ones in their order."""
    return [int(channel) for channel in np.argsort(-ratios["linf"], kind="stable")[:count]]


@dataclass(frozen=True, kw_only=True)
class Shifts:
    """Channel norms of clean and of triggered inputs (see ``channel_norms``), and their ratios.

    Attributes:
        clean: Of clean inputs.
        triggered: Of the same inputs, triggered.
        ratios: Triggered over clean.
        inputs: Number of inputs.
    """

    clean: Norms
    triggered: Norms
    ratios: Norms
    inputs: int


def victims(samples: Samples, target: Target | None, most: int) -> Samples:
    """Return the first ``most`` samples that do not have the target label; of all without a single one."""
    return samples.subset(torch.nonzero(targets.victims(samples.labels, target))[:most, 0])


def one_of_each(samples: Samples, most: int) -> Samples:
    """Return up to ``most`` samples: the first of each label, ascending, then others in their order."""
    labels = samples.labels.tolist()
    firsts = [labels.index(label) for label in sorted(set(labels))]
    taken = set(firsts)
    others = [place for place in range(len(labels)) if place not in taken]
    return samples.subset(torch.tensor([*firsts, *others][:most], dtype=torch.int64))


def shifts(model: nn.Module, samples: Samples, stamp: Stamp) -> Shifts:
    """Return how a trigger shifts the channels' norms.

    Args:
        model: Declares ``maps``.
        samples: Clean inputs (without the target class).
        stamp: ``Trigger.stamp``.

    Raises:
        MethodRefused: If the model declares no ``maps``.
    """
    clean, triggered = channel_norms(model, samples), channel_norms(model, samples, stamp=stamp)
    return Shifts(clean=clean, triggered=triggered, ratios=norm_ratios(clean, triggered), inputs=len(samples))


def looked_at(model: nn.Module, images: Tensor) -> tuple[Tensor, list[int]]:
    """Return the Grad-CAM maps of float images for the class that the model predicts, and these classes.

    Raises:
        MethodRefused: If the model has no maps with positions.
    """
    predicted = predict(model, images).tolist()
    return gradcam(model, images, torch.tensor(predicted).clamp_min(0)), predicted
