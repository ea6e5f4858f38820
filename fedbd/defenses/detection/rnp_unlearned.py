"""Sample detection with RNP's unlearned model: what it still classifies as labeled is what the trigger drives.

Y. Li, X. Lyu, X. Ma, N. Koren, L. Lyu, B. Li, Y. Jiang, "Reconstructive Neuron Pruning for Backdoor Defense", ICML
2023, https://arxiv.org/abs/2305.14876, whose abstract names this use of the unlearned model.

Differs from the paper: its authors published no code for this use; the scores are fedbd's own reading. So is
the accuracy that a model must have before it is unlearned (``cleanup.unlearning.fewest``).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
import torch
from annotated_types import Ge, Gt, Le, Lt
from numpy.typing import NDArray
from torch import nn

from fedbd.defenses.cleanup.unlearning import ascent_plan, modal_prediction, unlearn
from fedbd.defenses.losses import log_odds_against
from fedbd.defenses.sound_model import need_scorable, need_sound
from fedbd.defenses.trusted_data import required
from fedbd.errors import MethodRefused
from fedbd.method_fields import checks_fields
from fedbd.metrics import logits
from fedbd.types import Notes, Samples, TrustedData


@dataclass(frozen=True, kw_only=True)
@checks_fields
class RNPUnlearned:
    """Scores a sample by how well the unlearned model still knows its given label.

    Attributes:
        by: ``logit``: the label's logit. ``loss``: minus the log odds against the label, which rank as the loss and
            do not tie at 0 where logits are large, as an unlearned model's can be. Both in float64.
        unlearn_lr: See ``cleanup.rnp.RNP``, as for the fields below.
        unlearn_epochs: Most epochs of ascent.
        unlearn_stop: Running accuracy on the trusted set at which the ascent ends.
        batch_size: Of the ascent.
        momentum: Of the ascent.
        weight_decay: Of the ascent.
        augment: Of the ascent.
    """

    by: Literal["logit", "loss"] = "logit"
    unlearn_lr: Annotated[float, Gt(0)] = 0.01
    unlearn_epochs: Annotated[int, Ge(1)] = 20
    unlearn_stop: Annotated[float, Ge(0), Le(0.5)] = 0.2
    batch_size: Annotated[int, Ge(1)] = 128
    momentum: Annotated[float, Ge(0), Lt(1)] = 0.9
    weight_decay: Annotated[float, Ge(0)] = 5e-4
    augment: Literal["none", "crop_flip"] = "none"

    @property
    def needs_trusted(self) -> bool:
        """It trains on clean data."""
        return True

    def score(
        self, model: nn.Module, data: Samples, trusted: TrustedData | None, rng: torch.Generator
    ) -> tuple[NDArray[np.float64], Notes]:
        """Score samples with an unlearned copy of a model.

        Args:
            model: Left untouched.
            data: The samples with their labels as given or, for incoming inputs, as ``model`` predicts them.
            trusted: The unlearning uses ``fit``, the target label ``validate``.
            rng: Draws orders and augmentation.

        Returns:
            (N,) float64, higher is more suspicious, and notes: ``unlearning``, ``target`` (the class that the unlearned
            model predicts most often on clean data) and ``target_share``.

        Raises:
            MethodRefused: Without trusted data or samples, or if the unlearning fails: a model that did not unlearn
                ranks by how easy a sample is.
        """
        trusted = required(trusted, "rnp_unlearned", "unlearns")
        need_sound(model, "rnp_unlearned", trusted.fit, trusted.classes)
        need_scorable(model, "rnp_unlearned", data)
        unlearned = unlearn(model, trusted.fit, ascent_plan(self), self.unlearn_stop, rng)
        if not unlearned.reached:
            raise MethodRefused(f"rnp_unlearned: {unlearned.reason}")
        target, share = modal_prediction(unlearned.model, trusted.validate)
        out = logits(unlearned.model, data)
        notes: Notes = {"unlearning": unlearned.as_notes(), "target": target, "target_share": share}
        if self.by == "logit":
            own = out.to(torch.float64).gather(1, data.labels.cpu()[:, None])[:, 0]
            return own.numpy(), notes
        return -log_odds_against(out, data.labels), notes
