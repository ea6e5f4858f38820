"""PGD: steps along the sign of the loss's gradient, projected to a ball around the image.

A. Madry, A. Makelov, L. Schmidt, D. Tsipras, A. Vladu, "Towards Deep Learning Models Resistant to Adversarial Attacks",
ICLR 2018, https://arxiv.org/abs/1706.06083, section 2.1.

Differs from the paper: one random start (the paper also restarts) and, as there, the last iterate counts, not the best;
10 steps of 2/255 in a ball of 8/255 are usual for CIFAR-10; by default the result is rounded to the uint8 grid within
the ball; the gradient's sign is taken from the log odds, which have the sign of the cross-entropy's gradient but do not
vanish where the model is sure.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from annotated_types import Ge, Gt, Le
from torch import Tensor, nn

from fedbd.attacks.adversarial import ascent_sign, chunks, outcome, refuse_unfit, to_grid_within
from fedbd.method_fields import checks_fields
from fedbd.training import evaluating
from fedbd.types import Notes


@dataclass(frozen=True, kw_only=True)
@checks_fields
class PGD:
    """Repeated sign steps within ``eps`` of the image in every pixel, from a random start.

    Attributes:
        eps: Largest change of each value, in units of [0, 1].
        alpha: Length of a step.
        steps: How many.
        random_start: Begin at a uniform draw from the ball, else at the image itself.
        quantize: Round the last iterate to the uint8 grid (k / 255) without leaving the ball, for images that lie on it
            themselves; an ``eps`` below 1/255 then changes nothing.
        batch_size: Images per gradient.
    """

    eps: Annotated[float, Gt(0), Le(1)] = 8 / 255
    alpha: Annotated[float, Gt(0), Le(1)] = 2 / 255
    steps: Annotated[int, Ge(1)] = 10
    random_start: bool = True
    quantize: bool = True
    batch_size: Annotated[int, Ge(1)] = 128

    def perturb(self, model: nn.Module, images: Tensor, labels: Tensor, rng: torch.Generator) -> tuple[Tensor, Notes]:
        """Return adversarial copies.

        Args:
            model: Left untouched; judged in eval mode.
            images: (N, C, H, W) float32 in [0, 1]; left untouched.
            labels: (N,) int64, the true labels.
            rng: Draws the start, on the CPU; the draw does not depend on ``batch_size``.

        Returns:
            The copies and the notes of ``adversarial.outcome``, measured on what is returned.

        Raises:
            MethodRefused: If the images are not float or the model's outputs are not finite.
        """
        before = refuse_unfit(model, images, labels, "pgd")
        perturbed = images.clone()
        if self.random_start:
            noise = torch.rand(images.shape, generator=rng, dtype=images.dtype).to(images.device)
            perturbed = perturbed.add_(noise.mul_(2).sub_(1), alpha=self.eps).clamp_(0.0, 1.0)
        with evaluating(model):
            for part, device in chunks(model, len(images), self.batch_size):
                x = self._climb(model, perturbed[part].to(device), images[part].to(device), labels[part].to(device))
                x = x.to(images.device)
                perturbed[part] = to_grid_within(x, images[part], self.eps) if self.quantize else x
        return perturbed, outcome(model, images, perturbed, labels, before)

    def _climb(self, model: nn.Module, start: Tensor, images: Tensor, labels: Tensor) -> Tensor:
        low, high = (images - self.eps).clamp_(min=0.0), (images + self.eps).clamp_(max=1.0)
        x = start
        for _ in range(self.steps):
            x = x + self.alpha * ascent_sign(model, x, labels)
            x = torch.minimum(torch.maximum(x, low), high)
        return x
