"""FGSM: one step along the sign of the loss's gradient.

I. Goodfellow, J. Shlens, C. Szegedy, "Explaining and Harnessing Adversarial Examples", ICLR 2015,
https://arxiv.org/abs/1412.6572, section 4.

Differs from the paper: the result is clamped to [0, 1] and by default rounded to the uint8 grid within the budget; the
default budget is the 8/255 that the field uses on CIFAR-10, not one of the paper's; the gradient's sign is taken from
the log odds, which have the sign of the cross-entropy's gradient but do not vanish where the model is sure.
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
class FGSM:
    """One step of length ``eps`` in every pixel that raises the loss of the true label.

    Attributes:
        eps: Change of each value, in units of [0, 1].
        quantize: Round to the uint8 grid (k / 255) without leaving the budget, for images that lie on it themselves; an
            ``eps`` below 1/255 then changes nothing.
        batch_size: Images per gradient.
    """

    eps: Annotated[float, Gt(0), Le(1)] = 8 / 255
    quantize: bool = True
    batch_size: Annotated[int, Ge(1)] = 128

    def perturb(self, model: nn.Module, images: Tensor, labels: Tensor, rng: torch.Generator) -> tuple[Tensor, Notes]:
        """Return adversarial copies.

        Args:
            model: Left untouched; judged in eval mode.
            images: (N, C, H, W) float32 in [0, 1]; left untouched.
            labels: (N,) int64, the true labels.
            rng: Not drawn from.

        Returns:
            The copies and the notes of ``adversarial.outcome``, measured on what is returned.

        Raises:
            MethodRefused: If the images are not float or the model's outputs are not finite.
        """
        del rng
        before = refuse_unfit(model, images, labels, "fgsm")
        perturbed = images.clone()
        with evaluating(model):
            for part, device in chunks(model, len(images), self.batch_size):
                x = images[part].to(device)
                step = self.eps * ascent_sign(model, x, labels[part].to(device))
                x = x.add(step).clamp_(0.0, 1.0).to(images.device)
                perturbed[part] = to_grid_within(x, images[part], self.eps) if self.quantize else x
        return perturbed, outcome(model, images, perturbed, labels, before)
