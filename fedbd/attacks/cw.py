"""CW: the smallest change in Euclidean norm that a model gets wrong, found by optimization.

N. Carlini, D. Wagner, "Towards Evaluating the Robustness of Neural Networks", IEEE S&P 2017,
https://arxiv.org/abs/1608.04644, the L2 attack with objective f6; code
https://github.com/carlini/nn_robust_attacks.

Differs from the paper:

- The budget is smaller: 5 search steps of 100 iterations at rate 0.1, from c = 0.1 (the code: 9 steps of 10,000
  iterations at 0.01, from 0.001). Jin et al. (https://arxiv.org/abs/2006.14871) take targets, one search step, 1,000
  iterations and rate 0.5: ``target: k``, ``search_steps: 1``, ``iterations: 1000``, ``lr: 0.5``.
- Untargeted unless ``target`` is given; the paper is targeted and derives the other from it.
- Images are in [0, 1], not [-0.5, 0.5]; distances are the same.
- With ``quantize`` the classifier sees each candidate rounded to the uint8 grid (the gradient passes through the
  rounding) and the best rounded one is kept; the paper rounds at the end and repairs what that undid by a search.
- There is no early end where the loss stands still: each image's result does not depend on the others of its batch.
- An image that was not fooled comes back as it was (the code gives zeros).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from annotated_types import Ge, Gt
from torch import Tensor, nn

from fedbd.attacks.adversarial import chunks, margins, outcome, refuse_unfit, to_grid
from fedbd.errors import MethodRefused
from fedbd.method_fields import checks_fields
from fedbd.metrics import logits
from fedbd.training import evaluating, memory_format_of
from fedbd.types import Notes

_EDGE = 1 - 1e-6
"""Pixels of 0 and 1 lie at infinity in tanh space; pulled in by this factor they can move."""

_OPEN = 1e10
"""Upper end of the search for c while no c has succeeded."""


@dataclass(frozen=True, kw_only=True)
@checks_fields
class CW:
    """Adam in tanh space on squared distance plus c times the margin, with a search for each image's smallest c.

    Attributes:
        confidence: By how much (in logits) the wrong class must lead, kappa in the paper.
        target: Class that all images shall be taken for (those that have it are left alone); null: any wrong one.
        search_steps: Values of c tried: ten times as much until one succeeds, then by bisection.
        initial_c: The first of them.
        iterations: Steps of Adam for each c.
        lr: Rate of Adam in tanh space. With few iterations a low one leaves black and white pixels where they are.
        quantize: Judge and return images rounded to the uint8 grid (k / 255).
        batch_size: Images per gradient.
    """

    confidence: Annotated[float, Ge(0)] = 0.0
    target: Annotated[int, Ge(0)] | None = None
    search_steps: Annotated[int, Ge(1)] = 5
    initial_c: Annotated[float, Gt(0)] = 0.1
    iterations: Annotated[int, Ge(1)] = 100
    lr: Annotated[float, Gt(0)] = 0.1
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
            MethodRefused: If the images are not float, the model's outputs are not finite or it has no such target.
        """
        del rng
        before = refuse_unfit(model, images, labels, "cw")
        classes = logits(model, images[:1], threads=1).shape[-1]
        if self.target is not None and len(images) and self.target >= classes:
            raise MethodRefused(f"cw: target is {self.target} and the model has {classes} classes; take one below that")
        perturbed = images.clone()
        with evaluating(model):
            for part, device in chunks(model, len(images), self.batch_size):
                found = self._search(model, images[part].to(device), labels[part].to(device))
                perturbed[part] = found.to(images.device)
        return perturbed, outcome(model, images, perturbed, labels, before, self.target)

    def _search(self, model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        """Return the nearest successful copy of each image of a batch, the image itself where there is none."""
        best, nearest = images.clone(), torch.full((len(images),), torch.inf, device=images.device)
        if self.target is not None:
            nearest[labels == self.target] = -1.0  # nothing is nearer: these stay
        c = torch.full_like(nearest, self.initial_c)
        low, high = torch.zeros_like(c), torch.full_like(c, _OPEN)
        for _ in range(self.search_steps):
            succeeded = self._descend(model, images, labels, c, best, nearest)
            high = torch.where(succeeded, torch.minimum(high, c), high)
            low = torch.where(succeeded, low, torch.maximum(low, c))
            c = torch.where(high < _OPEN, (low + high) / 2, c * 10)
        return best

    def _descend(
        self, model: nn.Module, images: Tensor, labels: Tensor, c: Tensor, best: Tensor, nearest: Tensor
    ) -> Tensor:
        """Run Adam for one c; update ``best`` and ``nearest`` in place and return which images were fooled, (N,)."""
        layout = memory_format_of(model)
        w = torch.atanh((2 * images - 1) * _EDGE).requires_grad_(True)
        origin = torch.tanh(w.detach()).add_(1).div_(2)
        optimizer = torch.optim.Adam([w], lr=self.lr)
        succeeded = torch.zeros_like(c, dtype=torch.bool)
        for _ in range(self.iterations):
            with torch.enable_grad():
                x = (torch.tanh(w) + 1) / 2
                shown = x + (to_grid(x.detach()) - x.detach()) if self.quantize else x
                margin = self._margin(model(shown.contiguous(memory_format=layout)), labels)
                distance = (x - origin).square().flatten(1).sum(1)
                loss = (distance + c * (-margin).clamp(min=-self.confidence)).sum()
                (w.grad,) = torch.autograd.grad(loss, w)
            optimizer.step()
            # Added and taken off again, the rounding's difference may leave x one bit off the grid.
            candidate = to_grid(x.detach()) if self.quantize else x.detach()
            length = (candidate - images).square().flatten(1).sum(1)
            fooled = (margin.detach() > 0) & (margin.detach() >= self.confidence)
            succeeded |= fooled
            better = fooled & (length < nearest)
            best[better], nearest[better] = candidate[better], length[better]
        return succeeded

    def _margin(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return by how much the wrong class leads, (N,): above 0 where the attack has succeeded."""
        if self.target is None:
            return margins(logits, labels)
        return -margins(logits, torch.full_like(labels, self.target))
