"""Model mutation: how often an input's label flips under noise on the linear layers' weights.

J. Wang, G. Dong, J. Sun, X. Wang, P. Zhang, "Adversarial Sample Detection for Deep Neural Network through Model
Mutation Testing", ICSE 2019, https://arxiv.org/abs/1812.05793, in the form of K. Jin, T. Zhang, C. Shen, Y. Chen,
M. Fan, C. Lin, T. Liu, "Can We Mitigate Backdoor Attack Using Adversarial Detection Methods?", IEEE TDSC 2022,
https://arxiv.org/abs/2006.14871, whose code is https://github.com/kaidi-jin/backdoor_samples_detection: noise on the
dense layers alone, and its sequential probability ratio test (SPRT) to the letter. Adversarial inputs flip more often
than clean ones; backdoored inputs less often.

Differs from the paper:

- Inputs are scored by their flips, which ranks them; the test's verdict is in the notes as shares. With its constants
  it says "sensitive" at the 16th flip if that comes within 41 mutants, else at the 17th, and nothing but that.
- The authors compare a clean input with its true label; here every sample is compared with its given label, which for
  incoming inputs is the model's prediction: nobody knows more.
- The authors set the noise by hand (0.65 against backdoors, 0.3 and 0.35 against adversarial inputs). Here it is set,
  or chosen on clean validation images (compared with their predictions) so that the test finds as large a share of them
  sensitive as it does at the authors' settings.
"""

from __future__ import annotations

import bisect
import math
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
import torch
from annotated_types import Ge, Gt, Lt
from numpy.typing import NDArray
from torch import nn

from fedbd.defenses.detection.activation_spaces import trusted_parts
from fedbd.defenses.detection.mutants import Mutants, linear_layers
from fedbd.defenses.sound_model import need_scorable
from fedbd.errors import MethodRefused, refusal
from fedbd.method_fields import checks_fields
from fedbd.metrics import predict
from fedbd.types import Notes, Samples, TrustedData

RATE, RELAX = 0.0124, 0.1
P0, P1 = RATE * (1 - RELAX), RATE * (1 + RELAX)
PER_FLIP, PER_KEEP = math.log(P1 / P0), math.log((1 - P1) / (1 - P0))
ALPHA = BETA = 0.05
ACCEPT, DENY = math.log((1 - BETA) / ALPHA), math.log(BETA / (1 - ALPHA))
"""The test's constants as coded: a flip adds 0.2007 to the log ratio, none takes 0.00251; bounds are +-ln 19."""

GRID = tuple(step / 100 for step in range(1, 301))
"""Noise levels to choose from: 0.01 ... 3."""

CLEAN_SHARE = {"backdoor": 0.9, "adversarial": 0.05}
"""Share of clean inputs that the test finds sensitive, about that at the authors' 0.65 and 0.3."""


def sprt_decision(flips: NDArray[np.bool_]) -> tuple[NDArray[np.bool_], NDArray[np.int64]]:
    """Run the sequential test as coded: the ratio is looked at only on a flip, and before that flip counts as one.

    Args:
        flips: (T,) or (T, N): whether each mutant, in order, flips an input's label.

    Returns:
        Whether the input is sensitive, and how many mutants the test used; () or (N,) each.
    """
    before: NDArray[np.int64] = np.cumsum(flips, axis=0) - flips
    drawn = np.arange(1, len(flips) + 1).reshape(-1, *[1] * (flips.ndim - 1))
    ratio = before * PER_FLIP + (drawn - before) * PER_KEEP
    stops = flips & ((ratio >= ACCEPT) | (ratio <= DENY))
    first = stops.argmax(axis=0)
    stopped = stops.any(axis=0)
    # At most one bound holds, and the first stop decides.
    sensitive = stopped & (np.take_along_axis(ratio, first[None], axis=0)[0] >= ACCEPT)
    return sensitive, np.where(stopped, first + 1, len(flips))


@dataclass(frozen=True, kw_only=True)
@checks_fields
class ModelMutation:
    """Scores an input by how many mutants of the model give it another label.

    Attributes:
        seeks: ``backdoor``: few flips are suspicious. ``adversarial``: many are.
        mutants: Mutated copies of the model.
        noise: v: each linear layer's weights get Gaussian noise with deviation v times their largest (signed) value.
            None (default) chooses the level on trusted validation images: against backdoors the smallest that makes at
            least ``clean_share`` of them sensitive, against adversarial inputs the largest that makes at most that.
        mean_shift: The noise's mean is the layer's mean weight, as in the authors' code, which so shifts all weights.
            False: it is 0. In the last layer the shift moves all logits alike, so with one layer nothing changes.
        clean_share: See ``noise``; None for 0.9 against backdoors and 0.05 against adversarial inputs.
    """

    seeks: Literal["backdoor", "adversarial"] = "backdoor"
    mutants: Annotated[int, Ge(1)] = 100
    noise: Annotated[float, Gt(0)] | None = None
    mean_shift: bool = True
    clean_share: Annotated[float, Gt(0), Lt(1)] | None = None

    def problems(self) -> list[tuple[str, str]]:
        """Return what is wrong between the fields."""
        found = []
        if self.noise is None and self.mutants < 17:
            found.append(("mutants", "must be at least 17 where noise is null: fewer make no input sensitive"))
        if self.noise is not None and self.clean_share is not None:
            found.append(("clean_share", "must be left out where noise is set: it chooses the noise"))
        return found

    @property
    def needs_trusted(self) -> bool:
        """Clean data choose the noise level; where it is set, nothing else needs them."""
        return self.noise is None

    @property
    def needs_classes(self) -> bool:
        """The noise level is chosen on any clean images."""
        return False

    def refusal(self, model: nn.Module) -> str | None:
        """Return why a model cannot be mutated, None if it can: a run asks before it starts."""
        return refusal(lambda: linear_layers(model))

    def score(
        self, model: nn.Module, data: Samples, trusted: TrustedData | None, rng: torch.Generator
    ) -> tuple[NDArray[np.float64], Notes]:
        """Score samples.

        Args:
            model: Has a Linear layer; left untouched.
            data: The samples with their labels as given or, for incoming inputs, as ``model`` predicts them.
            trusted: ``validate`` chooses the noise level; not read where ``noise`` is set.
            rng: Draws the mutants; the level is chosen with the same ones.

        Returns:
            (N,) float64, flips or minus flips, and notes: ``noise``, ``levels`` (those tried on clean data, each with
            the share found sensitive), ``mean_flips``, ``sensitive`` (share of the samples), ``mean_mutants_used`` (by
            the test), ``mutants``, ``seeks`` and ``mutated_from`` (``linear``: what comes before the linear layers was
            computed once; ``images``: the model could not be split there).

        Raises:
            MethodRefused: If the model has no Linear layer, or one with a computed weight; if no level does what
                ``noise`` says; without trusted data where they are needed.
        """
        need_scorable(model, "model_mutation", data)
        levels: list[dict[str, float]] = []
        mutants = Mutants(model, self.mutants, int(torch.randint(2**63 - 1, (), generator=rng)), self.mean_shift)
        noise = self._choose(model, mutants, trusted, levels) if self.noise is None else self.noise
        flips = mutants.flips(mutants.inputs(data), data.labels.cpu().numpy(), noise)
        count = flips.sum(axis=0).astype(np.float64)
        sensitive, used = sprt_decision(flips)
        notes: Notes = {
            "noise": noise,
            "levels": levels,
            "mean_flips": float(count.mean()) if len(data) else None,
            "sensitive": float(sensitive.mean()) if len(data) else None,
            "mean_mutants_used": float(used.mean()) if len(data) else None,
            "mutants": self.mutants,
            "seeks": self.seeks,
            "mutated_from": mutants.start,
        }
        return (-count if self.seeks == "backdoor" else count), notes

    def _choose(
        self, model: nn.Module, mutants: Mutants, trusted: TrustedData | None, levels: list[dict[str, float]]
    ) -> float:
        """Return the noise level that clean validation images ask for, by bisection: the share grows with the level."""
        clean = trusted_parts(trusted, "model_mutation").validate
        labels = predict(model, clean)
        inputs = mutants.inputs(clean)

        def share(level: float) -> float:
            sensitive, _ = sprt_decision(mutants.flips(inputs, labels, level))
            levels.append({"noise": level, "sensitive": float(sensitive.mean())})
            return levels[-1]["sensitive"]

        wanted = CLEAN_SHARE[self.seeks] if self.clean_share is None else self.clean_share
        if self.seeks == "backdoor":
            place = bisect.bisect_left(GRID, wanted, key=share)
        else:
            place = bisect.bisect_right(GRID, wanted, key=share) - 1
        if 0 <= place < len(GRID):
            return GRID[place]
        least = f"at {'least' if self.seeks == 'backdoor' else 'most'} {wanted:g}"
        reason = f"no noise from {GRID[0]:g} to {GRID[-1]:g} makes {least} of the validation images sensitive"
        raise MethodRefused(f"model_mutation: {reason}; set noise or clean_share")
