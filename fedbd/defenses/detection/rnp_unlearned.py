"""Sample detection with RNP's unlearned model: what it still classifies as labeled is what the trigger drives.

Y. Li, X. Lyu, X. Ma, N. Koren, L. Lyu, B. Li, Y. Jiang, "Reconstructive Neuron Pruning for Backdoor Defense", ICML 2023,
https://arxiv.org/abs/2305.14876, abstract and section 4.4 (the unlearned model detects backdoored samples).

Differs from the paper: its authors published no code for this use, so the score is ours.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
import torch
from annotated_types import Ge, Gt, Lt
from numpy.typing import NDArray
from torch import nn

from fedbd.defenses.cleanup.rnp import ascent_plan
from fedbd.defenses.cleanup.unlearning import modal_prediction, unlearn
from fedbd.defenses.losses import cross_entropy, log_odds_against
from fedbd.errors import MethodRefused
from fedbd.metrics import logits
from fedbd.types import Notes, Samples, TrustedData


@dataclass(frozen=True, kw_only=True)
class RnpUnlearned:
    """Scores a sample by how well the unlearned model still knows its given label.

    Attributes:
        score: ``logit``: the label's logit. ``loss``: minus the cross-entropy. Both of the unlearned model, in float64.
        unlearn_lr: See ``cleanup.rnp.RNP``, as for the fields below.
        unlearn_epochs: Most epochs of ascent.
        unlearn_stop: Running accuracy on the trusted set at which the ascent ends.
        batch_size: Of the ascent.
        momentum: Of the ascent.
        weight_decay: Of the ascent.
        augment: Of the ascent.
    """

    score: Literal["logit", "loss"] = "loss"
    unlearn_lr: Annotated[float, Gt(0)] = 0.01
    unlearn_epochs: Annotated[int, Ge(1)] = 20
    unlearn_stop: Annotated[float, Ge(0), Lt(1)] = 0.2
    batch_size: Annotated[int, Ge(1)] = 128
    momentum: Annotated[float, Ge(0), Lt(1)] = 0.9
    weight_decay: Annotated[float, Ge(0)] = 5e-4
    augment: Literal["none", "crop_flip"] = "crop_flip"

    @property
    def needs_trusted(self) -> bool:
        """It trains on clean data."""
        return True
