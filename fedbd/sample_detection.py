"""What a sample detector is tried on: clean, triggered and adversarial inputs, as a served model would get them.

The detector sees images and the labels that the model gives them, mixed, and trusted data; which inputs are of which
kind only the scoring here knows. Malicious inputs of both kinds are the question of K. Jin et al.,
https://arxiv.org/abs/2006.14871.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fedbd.errors import MethodRefused
from fedbd.metrics import predict
from fedbd.scores import roc_auc, score_measures, scores_of
from fedbd.targets import Target, victims
from fedbd.types import Detector, Evasion, Notes, Samples, Trigger, TrustedData, quantized

MEASURES = ("auc", "auc_shuffled", "tpr_at_fpr_1", "tpr_at_fpr_5", "precision")
PAIRS = {"clean_adversarial": (0, 1), "clean_backdoor": (0, 2), "adversarial_backdoor": (1, 2)}
"""Name -> the kind with lower and the kind with higher scores if the AUC is above 1/2."""

FEWEST = 10
"""An AUC over fewer images of one kind is not given: it would say nothing."""

Planted = tuple[Trigger, Target]


@dataclass(frozen=True, kw_only=True)
class Served:
    """A model with what a detector of it may hold, and what it is tried on.

    Attributes:
        model: In eval mode.
        test: Clean images with their true labels.
        trusted: What the detector gets; None for none.
    """

    model: nn.Module
    test: Samples
    trusted: TrustedData | None


def as_served(model: nn.Module, images: Tensor) -> Samples:
    """Return inputs with the labels that a model predicts."""
    labels = predict(model, Samples(images, torch.zeros(len(images), dtype=torch.int64)))
    return Samples(images, torch.as_tensor(labels))


def incoming(
    served: Served, attacks: Sequence[Planted], samples: int, rng: torch.Generator
) -> tuple[Samples, NDArray[np.bool_], NDArray[np.int64]]:
    """Return mixed inputs with predicted labels, which of them are triggered, and which test image each is made of.

    Args:
        served: The model and its test images.
        attacks: Triggers that take turns, each on images that its attack wants another label of; empty: all are clean.
        samples: So many clean and so many triggered ones; fewer where there are fewer images.
        rng: Draws and mixes them.
    """
    test = served.test
    order = torch.randperm(len(test), generator=rng)
    half = min(samples, len(test) // 2) if attacks else min(samples, len(test))
    rest, most = order[half:], max(1, half // max(1, len(attacks)))
    places, parts = [order[:half]], [test.images[order[:half]]]
    for turn, (trigger, target) in enumerate(attacks):
        chosen = rest[torch.nonzero(victims(test.labels[rest], target))[:, 0]][turn :: len(attacks)][:most]
        places.append(chosen)
        parts.append(quantized(trigger.stamp(test.images[chosen].to(torch.float32) / 255)))
    images, place = torch.cat(parts), torch.cat(places)
    truth = torch.cat([torch.zeros(half, dtype=torch.bool), torch.ones(len(images) - half, dtype=torch.bool)])
    mixed = torch.randperm(len(images), generator=rng)
    return as_served(served.model, images[mixed]), truth[mixed].numpy(), place[mixed].numpy()


def tried(
    served: Served,
    detector: Detector,
    inputs: Samples,
    triggered: NDArray[np.bool_],
    rng: torch.Generator,
    shuffle: np.random.Generator,
) -> tuple[NDArray[np.float64] | None, Notes]:
    """Return a detector's scores of some inputs, None where it cannot act, and the measures of them.

    Args:
        served: The model, and what the detector holds.
        detector: A sample detector.
        inputs: What comes in.
        triggered: (N,) bool, the truth.
        rng: The detector's.
        shuffle: Shuffles the truth for the control.

    Returns:
        The scores, and ``MEASURES`` (None where there are no scores), ``positives``, ``negatives``, ``seconds`` and
        ``notes``.
    """
    started = time.perf_counter()
    counts = {"positives": int(triggered.sum()), "negatives": int((~triggered).sum())}
    scores, notes = scores_of(detector, served.model, inputs, served.trusted, rng)
    line: Notes = {**dict.fromkeys(MEASURES), **counts, "seconds": time.perf_counter() - started, "notes": notes}
    return scores, line if scores is None else {**line, **score_measures(scores, triggered, shuffle)}


def three_ways(
    served: Served,
    detector: Detector,
    evasions: Mapping[str, Evasion],
    triggered: Tensor,
    samples: int,
    order: torch.Generator,
    rng_of: Callable[[str], torch.Generator],
) -> Notes:
    """Return per evasion how well one detector tells clean, triggered and adversarial inputs apart, pair by pair.

    One pass over a mixture of all three, so that each pair is compared on scores of one kind. Only adversarial examples
    that the model gets wrong, of images that it gets right, count; clean images are others than those attacked.

    Args:
        served: The model, its test images, and what the detector holds.
        detector: A sample detector.
        evasions: By name.
        triggered: (N, C, H, W) uint8, triggered inputs.
        samples: Most images of a kind.
        order: Draws the test images.
        rng_of: An evasion's name -> its generator, which then mixes and is the detector's.

    Returns:
        Per evasion the AUCs of ``PAIRS`` (None with under ``FEWEST`` images of a kind), ``examples``, ``success`` and
        ``notes``; where evasion or detector cannot act, the ``reason``.
    """
    model, test = served.model, served.test
    drawn = torch.randperm(len(test), generator=order)
    right = torch.as_tensor(predict(model, test)) == test.labels
    eligible = drawn[right[drawn]]
    count = min(samples, len(eligible) // 2)
    if count == 0:
        return {name: {**dict.fromkeys(PAIRS), "examples": 0, "success": None} for name in evasions}
    clean, attacked = test.subset(eligible[:count]), test.subset(eligible[count : 2 * count])
    found: Notes = {}
    for name, evasion in evasions.items():
        rng = rng_of(name)
        try:
            perturbed, notes = evasion.perturb(model, attacked.images.float() / 255, attacked.labels, rng)
        except MethodRefused as refusal:
            found[name] = {**dict.fromkeys(PAIRS), "examples": 0, "success": None, "reason": str(refusal)}
            continue
        images = quantized(perturbed)
        fooled = images[torch.as_tensor(predict(model, images)) != attacked.labels]
        found[name] = {
            **_pairs(served, detector, [clean.images, fooled, triggered[:count]], rng),
            "examples": len(fooled),
            "success": len(fooled) / max(1, len(images)),
            "notes": notes,
        }
    return found


def _pairs(served: Served, detector: Detector, kinds: list[Tensor], rng: torch.Generator) -> Notes:
    counts = [len(each) for each in kinds]
    if sum(count >= FEWEST for count in counts) < 2:
        return dict.fromkeys(PAIRS)
    images, kind = torch.cat(kinds), np.repeat(np.arange(len(kinds)), counts)
    mixed = torch.randperm(len(images), generator=rng)
    inputs, kind = as_served(served.model, images[mixed]), kind[mixed.numpy()]
    scores, notes = scores_of(detector, served.model, inputs, served.trusted, rng)
    if scores is None:
        return {**dict.fromkeys(PAIRS), "reason": notes.get("reason")}
    return {
        name: roc_auc(scores[kind == high], scores[kind == low]) if min(counts[low], counts[high]) >= FEWEST else None
        for name, (low, high) in PAIRS.items()
    }
