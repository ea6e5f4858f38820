"""FLAIN: turn the training of the input neurons round that clean data leave almost silent.

B. Ding, P. Yang, S.-J. Huang, "FLAIN: Mitigating Backdoor Attacks in Federated Learning via Flipping Weight Updates of
Low-Activation Input Neurons", ICMR 2025, https://arxiv.org/abs/2408.08655; code https://github.com/dingbinb/FLAIN.

Differs from the paper: of the text only the abstract could be read; the algorithm is that of the code. The code flips
the first fully connected layer and no other, keeps the first threshold at which accuracy has fallen to the bound (not
the last before it: ``take`` offers both) and then gives the layer's weights their old Frobenius norm back; whether the
paper does all three could not be verified. Differs from the code: activations are averaged on the fitting part of the
trusted set and accuracy is measured on the validation part (the code has one auxiliary set, of 80 test images per
class); thresholds between which no neuron lies are not measured again; where the bound is never reached the code stops
with an error, here the last threshold stands. The bound is 0, 0.001 or 0.024 in the code, by data set; here it is 0.02.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
import torch
from annotated_types import Ge, Gt, Le
from numpy.typing import NDArray
from torch import Tensor, nn

from fedbd.defenses.cleanup.input_neurons import (
    NO_LINEAR,
    changing_thresholds,
    first_linear,
    flipped,
    input_activations,
    low,
    weight_of,
)
from fedbd.defenses.own_weights import need_own_weights
from fedbd.defenses.sound_model import need_sound
from fedbd.defenses.trusted_data import required
from fedbd.errors import MethodRefused
from fedbd.method_fields import checks_fields
from fedbd.metrics import right
from fedbd.types import Clues, Notes, Samples, TrustedData

METHOD = "flain"


@dataclass(frozen=True)
class Point:
    """One threshold's outcome: input neurons flipped and images of the validation part that are right."""

    threshold: float
    flipped: int
    right: int


@dataclass(frozen=True, kw_only=True)
@checks_fields
class FLAIN:
    """Flips the weight updates of low-activation input neurons of the first fully connected layer.

    Attributes:
        start: The first threshold on a neuron's mean input; neurons from 0 up to it are flipped (never those below 0).
        step: By how much the threshold rises; the code has 0.001 or 0.0001.
        cap: The last threshold. Activations are not scaled: where ReLU features go far above 1, raise it.
        bound: Loss of accuracy on the validation part (fraction of 1) at which the rise ends.
        take: Which flip stands: ``at_bound``, the first whose loss reaches the bound, as in the code (the loss may be
            far above it where few neurons carry much); ``within_bound``, the last before it.
        rescale: Give the layer's weights the Frobenius norm back that they had before.
    """

    start: Annotated[float, Ge(0)] = 0.001
    step: Annotated[float, Gt(0)] = 0.0001
    cap: Annotated[float, Gt(0)] = 1.0
    bound: Annotated[float, Ge(0), Le(1)] = 0.02
    take: Literal["at_bound", "within_bound"] = "at_bound"
    rescale: bool = True

    @property
    def needs_trusted(self) -> bool:
        """Clean data tell which neurons they leave silent."""
        return True

    @property
    def needs_reference(self) -> bool:
        """It flips what was trained since the start."""
        return True

    def problems(self) -> list[tuple[str, str]]:
        """Return what is wrong between the fields."""
        return [("cap", f"must be at least start ({self.start:g})")] if self.cap < self.start else []

    def refusal(self, model: nn.Module) -> str | None:
        """Return why a model cannot be repaired, None if it can: a run asks before it starts."""
        return None if any(isinstance(module, nn.Linear) for module in model.modules()) else NO_LINEAR

    def clean(
        self, model: nn.Module, trusted: TrustedData | None, clues: Clues, rng: torch.Generator
    ) -> tuple[nn.Module, Clues, Notes]:
        """Return a copy of a model with some weight updates flipped.

        Args:
            model: Has a Linear; left untouched.
            trusted: Activations are averaged on ``fit``, accuracy is measured on ``validate``.
            clues: ``reference`` is the model that training started from; passed on as they are.
            rng: Not used.

        Returns:
            The copy in the model's mode, the clues, and notes: ``acted``, ``reason`` (why not), ``layer``, ``neurons``
            and ``flipped`` (numbers), ``threshold``, ``bound_reached``, ``scale`` (of the layer's weights),
            ``validation_before``, ``validation_after`` (of what is returned) and the ``curve`` (before rescaling).

        Raises:
            MethodRefused: Without trusted data or ``clues.reference``, if the model has no Linear, or one whose weight
                is computed from other parameters, or the reference not the same one, or if its weights are not finite.
        """
        trusted = required(trusted, METHOD, "reads activations on")
        need_sound(model, METHOD, trusted.fit, trusted.classes)
        if clues.reference is None:
            raise MethodRefused(
                f"{METHOD} flips what was trained since the start and was given no model from before; name the "
                "model that training started from (--reference, in Python Clues(reference=...))"
            )
        if not isinstance(clues.reference, nn.Module):
            raise MethodRefused(
                f"{METHOD}: clues.reference must be a model and is a {type(clues.reference).__name__}; build the model "
                "anew and fill it with load_state_dict"
            )
        layer = first_linear(model, trusted.fit)
        need_own_weights(layer, model.get_submodule(layer), METHOD)
        weight = weight_of(model, layer)
        if not bool(torch.isfinite(weight.detach().norm())):  # the norm is what the weights are scaled back to
            raise MethodRefused(f"{METHOD}: the weights of {layer} are not finite or too large; the model has diverged")
        start = weight_of(clues.reference, layer, weight.shape)
        means = input_activations(model, layer, trusted.fit)
        curve, reached = self._curve(model, layer, start, means, trusted.validate)
        chosen = curve[-2 if reached and self.take == "within_bound" else -1]
        count = len(trusted.validate)
        notes: Notes = {
            "layer": layer,
            "neurons": len(means),
            "flipped": chosen.flipped,
            "threshold": chosen.threshold,
            "bound_reached": reached,
            "scale": 1.0,
            "validation_before": curve[0].right / count,
            "validation_after": chosen.right / count,
            "curve": [{"threshold": p.threshold, "flipped": p.flipped, "accuracy": p.right / count} for p in curve[1:]],
        }
        repaired = copy.deepcopy(model)
        if chosen.flipped == 0:
            none = f"no neuron's mean input is between 0 and {self.cap:g}: raise cap"
            costly = f"accuracy has fallen by the bound of {self.bound:g} before any flip may stand: raise bound"
            return repaired, clues, {"acted": False, "reason": costly if reached else none, **notes}
        notes["scale"] = self._flip(repaired, layer, start, low(means, chosen.threshold))
        notes["validation_after"] = right(repaired, trusted.validate) / count
        return repaired, clues, {"acted": True, **notes}

    def _curve(
        self, model: nn.Module, layer: str, start: Tensor, means: NDArray[np.float64], validate: Samples
    ) -> tuple[list[Point], bool]:
        """Return the unflipped model's point, then one per threshold, and whether the bound ended the rise."""
        before = right(model, validate)
        trained = weight_of(model, layer).detach()
        trial = copy.deepcopy(model)
        curve = [Point(0.0, 0, before)]
        for threshold in changing_thresholds(means, self.start, self.step, self.cap):
            neurons = low(means, threshold)
            with torch.no_grad():
                weight_of(trial, layer).copy_(flipped(trained, start, neurons))
            curve.append(Point(threshold, int(neurons.sum()), right(trial, validate)))
            if before - curve[-1].right >= self.bound * len(validate) - 1e-9:
                return curve, True
        return curve, False

    def _flip(self, model: nn.Module, layer: str, start: Tensor, neurons: NDArray[np.bool_]) -> float:
        """Flip neurons in place and return the factor that the layer's weights were scaled by."""
        weight = weight_of(model, layer)
        norm = weight.detach().norm()
        with torch.no_grad():
            weight.copy_(flipped(weight, start, neurons))
            now = weight.norm()
            factor = float(norm / now) if self.rescale and now > 0 else 1.0
            weight.mul_(factor)
        return factor
