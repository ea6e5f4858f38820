"""ABL's isolation as a sample detector: what a model learned too well is suspicious.

Y. Li, X. Lyu, N. Koren, L. Lyu, B. Li, X. Ma, "Anti-Backdoor Learning: Training Clean Models on Poisoned Data",
NeurIPS 2021, https://arxiv.org/abs/2110.11571, section 3; code https://github.com/bboylyg/ABL.

Differs from the paper:

- The paper isolates a fixed share of the lowest losses after epochs under the loss control. Here every sample gets a
  score, and by default the model is taken as it is: over incoming inputs, whose labels are its own predictions, the
  score is the confidence of the prediction. ``tune_epochs`` trains a copy under the loss control first; it wants the
  samples' given labels, a client's own data.
- That training is in a fresh order every epoch, the authors' is not shuffled.
- Losses are ranked in float64; float32 cross-entropy ties at 0. The rank within the label is not in the paper.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
import torch
from annotated_types import Ge, Gt, Lt
from numpy.typing import NDArray
from torch import nn

from fedbd.defenses.local.isolation import class_rank
from fedbd.defenses.local.objectives import CONTROLS
from fedbd.defenses.losses import cross_entropy, log_odds_against
from fedbd.defenses.sound_model import need_scorable
from fedbd.errors import MethodRefused
from fedbd.method_fields import checks_fields
from fedbd.metrics import logits
from fedbd.training import TrainingPlan, train
from fedbd.types import Notes, Samples, TrustedData

METHOD = "abl_isolation"


@dataclass(frozen=True, kw_only=True)
@checks_fields
class ABLIsolation:
    """Scores a sample by how well a model knows its given label.

    Attributes:
        by: ``loss``: minus the cross-entropy, as in the paper. ``class_rank``: minus its rank within the given label, a
            share in (0, 1), where classes differ in loss by themselves.
        tune_epochs: Epochs under the loss control that a copy of the model is trained for first, on the scored samples
            (the authors' 10 start from scratch); 0: the model as it is. The fields below are then not read.
        control: ``lga`` or ``flooding``, both on the mean loss of a batch (see ``local.objectives``).
        gamma: The loss that the control holds a batch at.
        tune_lr: Learning rate of the training.
        batch_size: Of the training.
        momentum: Of the training, in Nesterov's form where above 0.
        weight_decay: Of the training.
    """

    by: Literal["loss", "class_rank"] = "loss"
    tune_epochs: Annotated[int, Ge(0)] = 0
    control: Literal["lga", "flooding"] = "lga"
    gamma: Annotated[float, Gt(0)] = 0.5
    tune_lr: Annotated[float, Gt(0)] = 0.1
    batch_size: Annotated[int, Ge(1)] = 128
    momentum: Annotated[float, Ge(0), Lt(1)] = 0.9
    weight_decay: Annotated[float, Ge(0)] = 1e-4

    @property
    def needs_trusted(self) -> bool:
        """It looks at the scored samples alone."""
        return False

    def score(
        self, model: nn.Module, data: Samples, trusted: TrustedData | None, rng: torch.Generator
    ) -> tuple[NDArray[np.float64], Notes]:
        """Score samples.

        Args:
            model: Left untouched; evaluated in eval mode.
            data: The samples with their labels as given or, for incoming inputs, as ``model`` predicts them.
            trusted: Not used.
            rng: Draws the orders of the training; not used without one.

        Returns:
            (N,) float64, higher is more suspicious, and notes: ``mean_loss`` (cross-entropy with the given labels) and,
            after a training, ``tuned_loss`` (mean objective of its last epoch).

        Raises:
            MethodRefused: Without samples, if the outputs of the model, or of its copy, are not finite, or where a copy
                is to be trained, if all its weights are frozen.
        """
        need_scorable(model, METHOD, data)
        notes: Notes = {}
        if self.tune_epochs:
            model = copy.deepcopy(model)
            notes["tuned_loss"] = self._tune(model, data, rng)
        out = logits(model, data, threads=1)
        if not bool(torch.isfinite(out).all()):
            remedy = "lower tune_lr" if self.tune_epochs else "take a model that has not diverged"
            raise MethodRefused(f"{METHOD}: the model's outputs are not finite, so that losses mean nothing; {remedy}")
        losses = cross_entropy(log_odds_against(out, data.labels))
        notes["mean_loss"] = float(losses.mean())
        labels = data.labels.cpu().numpy()
        return -(losses if self.by == "loss" else class_rank(losses, labels)), notes

    def _tune(self, model: nn.Module, data: Samples, rng: torch.Generator) -> float | None:
        """Train a model in place under the loss control; return its last loss, None if that is not finite."""
        if not any(entry.requires_grad for entry in model.parameters()):
            raise MethodRefused(f"{METHOD} trains a copy and all weights are frozen; call model.requires_grad_(True)")
        plan = TrainingPlan(
            epochs=self.tune_epochs,
            batch_size=self.batch_size,
            lr=self.tune_lr,
            momentum=self.momentum,
            nesterov=self.momentum > 0,
            weight_decay=self.weight_decay,
        )
        loss = CONTROLS[self.control]
        last = float(train(model, data, plan, rng, objective=lambda out, y: loss(out, y, self.gamma))["loss"])
        return last if np.isfinite(last) else None
