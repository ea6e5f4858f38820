"""STRIP: an input whose prediction survives being superimposed with other images carries a trigger.

Y. Gao, C. Xu, D. Wang, S. Chen, D. C. Ranasinghe, S. Nepal, "STRIP: A Defence Against Trojan Attacks on Deep Neural
Networks", ACSAC 2019, https://arxiv.org/abs/1902.06531, section 4; code https://github.com/garrisongys/STRIP.

Differs from the paper:

- 10 overlays by default, the paper takes 100 (``overlays: 100``); ``entropy_margin`` in the notes says how sure the
  means are.
- The authors' code adds image and overlay without a limit; here the sum saturates at white, as images are in [0, 1]
  (``blend: add``). ``blend: average`` is the mean of both, which many re-implementations use.
- No threshold is set here; the paper takes a quantile of the entropies of clean inputs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
import torch
from annotated_types import Ge
from numpy.typing import NDArray
from torch import Tensor, nn

from fedbd.defenses.sound_model import need_scorable
from fedbd.defenses.trusted_data import required
from fedbd.errors import MethodRefused
from fedbd.method_fields import checks_fields
from fedbd.metrics import logits
from fedbd.types import Notes, Samples, TrustedData

METHOD = "strip"

BLOCK = 2000
"""Images superimposed at once: bounds the memory that float copies take."""


def superimpose(images: Tensor, overlays: Tensor, blend: Literal["add", "average"]) -> Tensor:
    """Return images with one overlay each.

    Args:
        images: (N, C, H, W) uint8.
        overlays: The same shape and dtype.
        blend: ``add``: their sum, at most 1. ``average``: their mean.

    Returns:
        (N, C, H, W) float32 in [0, 1].
    """
    total = images.to(torch.float32).add_(overlays).div_(255.0)
    return total.clamp_(max=1.0) if blend == "add" else total.div_(2.0)


def entropy(outputs: Tensor) -> Tensor:
    """Return the entropy of each softmax distribution in bits, (N,) float64, of (N, classes) logits."""
    logs = outputs.to(torch.float64).log_softmax(1)
    return -(logs.exp() * logs).sum(1) / math.log(2)


@dataclass(frozen=True, kw_only=True)
@checks_fields
class STRIP:
    """Scores an input by minus the mean entropy of the predictions for it under overlays of trusted images.

    Attributes:
        overlays: Overlays per input, drawn for each input anew, with replacement, from the trusted images.
        blend: ``add``: image plus overlay, saturated, as in the authors' code. ``average``: the mean of both.
    """

    overlays: Annotated[int, Ge(1)] = 10
    blend: Literal["add", "average"] = "add"

    @property
    def needs_trusted(self) -> bool:
        """The overlays are clean images."""
        return True

    @property
    def needs_classes(self) -> bool:
        """Overlays may be of one class."""
        return False

    def score(
        self, model: nn.Module, data: Samples, trusted: TrustedData | None, rng: torch.Generator
    ) -> tuple[NDArray[np.float64], Notes]:
        """Score samples.

        Args:
            model: Left untouched; evaluated in eval mode.
            data: Only the images are read.
            trusted: ``fit`` gives the overlays.
            rng: Draws them: one (N, overlays) table.

        Returns:
            (N,) float64, from minus log2(classes) to 0, higher is more suspicious, and notes: ``mean_entropy`` in bits,
            ``entropy_margin`` (root mean square over the inputs of the standard error of their mean entropy; None with
            one overlay) and ``trusted`` (how many images overlays were drawn from).

        Raises:
            MethodRefused: Without trusted data or samples, or if the model's outputs are not finite.
        """
        overlays = required(trusted, METHOD, "superimposes", several=self.needs_classes).fit.images
        need_scorable(model, METHOD, data)
        drawn = torch.randint(len(overlays), (len(data), self.overlays), generator=rng)
        found = torch.cat(
            [
                self._entropies(model, data.images[start : start + BLOCK], overlays, drawn[start : start + BLOCK])
                for start in range(0, len(data), BLOCK)
            ]
        )
        means: NDArray[np.float64] = found.mean(1).numpy()
        margin = float((found.var(1) / self.overlays).mean().sqrt()) if self.overlays > 1 else None
        notes: Notes = {"mean_entropy": float(means.mean()), "entropy_margin": margin, "trusted": len(overlays)}
        return -means, notes

    def _entropies(self, model: nn.Module, images: Tensor, overlays: Tensor, drawn: Tensor) -> Tensor:
        """Return the entropy of each image under each of its overlays, (N, overlays) float64."""
        found = []
        for index in drawn.T:
            out = logits(model, superimpose(images, overlays[index], self.blend))
            if not bool(torch.isfinite(out).all()):
                raise MethodRefused(f"{METHOD}: the model's outputs are not finite; take one that has not diverged")
            found.append(entropy(out))
        return torch.stack(found, 1)
