"""l-infinity neuron pruning: switch off the channels of the last maps that a trigger excites most.

H. Cheng, K. Xu, S. Liu, P.-Y. Chen, P. Zhao, X. Lin, "Defending against Backdoor Attack on Deep Neural Networks", 2020,
https://arxiv.org/abs/2002.12162.

Differs from the paper: no code was published and only the abstract and summaries of the text could be read, so that
what follows is fedbd's reading of it. The authors prune neurons of the final convolutional layer whose l-infinity norm
stands out under a reverse-engineered trigger. Here a channel's score is the mean norm on triggered images minus, or
divided by, that on clean ones; the number of channels is fixed, or the most that keep accuracy on the validation part
of the trusted set (the authors' threshold could not be verified). l1 and l2 are there to be compared. A channel is
switched off by the scale and shift of its BatchNorm (or its filter and bias), so that it is exactly 0 after ReLU. Of a
residual network whose last map is a shortcut's sum the channels are those inside its last block (``prunable``).
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Annotated, Literal

import numpy as np
import torch
from annotated_types import Ge, Le
from numpy.typing import NDArray
from torch import nn

from fedbd.defenses.cleanup.channel_curve import pruning_curve
from fedbd.defenses.cleanup.channel_masks import both
from fedbd.defenses.cleanup.channel_norms import (
    Norms,
    Switch,
    bias_claim,
    channel_norms,
    channels_module,
    need_same_layer,
    norm_ratios,
    silence,
)
from fedbd.defenses.sound_model import need_sound
from fedbd.defenses.trusted_data import required
from fedbd.errors import MethodRefused, refusal
from fedbd.method_fields import checks_fields
from fedbd.models.taps import prunable
from fedbd.types import Clues, Notes, Samples, TrustedData

METHOD = "linf_pruning"


@dataclass(frozen=True, kw_only=True)
@checks_fields
class LinfPruning:
    """Prunes the channels of the last maps whose norm a trigger raises most.

    Attributes:
        knowledge: What it knows of the attack. ``recovered``: the trigger that a trigger recovery before it found
            (``clues.trigger``), stamped on trusted images. ``inputs``: triggered inputs without their clean originals
            (``clues.triggered``), compared with trusted images. ``real``: the real trigger. The last two need
            ``oracle``.
        oracle: Lets it see the truth of the attack; true for ``inputs`` and ``real`` and for no other.
        norm: Of a channel's activation map; ``linf`` is the paper's.
        by: How norms are compared: ``difference`` (triggered minus clean) or ``ratio`` (triggered / clean, a channel
            silent on clean images first).
        count: Channels to prune; null: choose by ``keep_within``.
        keep_within: Prune as many channels, in the order of their scores, as leave accuracy on the validation part no
            more than this below what it was (fraction of 1). Only channels that the trigger raises are candidates.
            Accuracy is measured after every one of them.
    """

    knowledge: Literal["recovered", "inputs", "real"] = "recovered"
    oracle: bool = False
    norm: Literal["linf", "l1", "l2"] = "linf"
    by: Literal["difference", "ratio"] = "difference"
    count: Annotated[int, Ge(1)] | None = None
    keep_within: Annotated[float, Ge(0), Le(1)] = 0.02

    @property
    def needs_trusted(self) -> bool:
        """Clean images are one side of every comparison."""
        return True

    @property
    def needs_clue(self) -> str | None:
        """What an earlier method must have found."""
        return "trigger" if self.knowledge == "recovered" else None

    @property
    def prunes(self) -> bool:
        """It names what it switched off in ``clues.pruned``."""
        return True

    def problems(self) -> list[tuple[str, str]]:
        """Return what is wrong between the fields."""
        if self.knowledge != "recovered" and not self.oracle:
            return [("oracle", f"must be true with knowledge: {self.knowledge}, which is the truth of the attack")]
        if self.knowledge == "recovered" and self.oracle:
            return [("oracle", "must be false with knowledge: recovered, which needs no truth of the attack")]
        return []

    def refusal(self, model: nn.Module) -> str | None:
        """Return why a model cannot be repaired, None if it can: a run asks before it starts."""
        return refusal(lambda: (prunable(model, METHOD), self._channels(model)))

    def clean(
        self, model: nn.Module, trusted: TrustedData | None, clues: Clues, rng: torch.Generator
    ) -> tuple[nn.Module, Clues, Notes]:
        """Return a pruned copy of a model.

        Args:
            model: Declares ``maps`` and ``channels``; left untouched.
            trusted: Norms are taken on ``fit``, the number of channels is chosen on ``validate`` (without a trigger).
            clues: ``trigger`` or ``triggered``, as ``knowledge`` says; passed on with ``pruned``.
            rng: Not used.

        Returns:
            The copy in the model's mode, the clues, and notes: ``acted``, ``reason`` (why not), ``channels`` (how many
            there are), ``candidates`` (how many the trigger raises), ``pruned`` (their number), ``chosen`` (their
            indices, highest score first), ``ratios`` (see ``channel_norms.bias_claim``), ``validation_before``,
            ``validation_after`` and the whole ``curve``.

        Raises:
            MethodRefused: Without trusted data or the clue, or if the model declares no ``maps`` or ``channels``, or
                has fewer channels than ``count``.
        """
        trusted = required(trusted, METHOD, "compares with")
        need_sound(model, METHOD, trusted.fit, trusted.classes)
        name, _ = self._channels(model)
        clean = channel_norms(model, trusted.fit, method=METHOD)
        need_same_layer(model, len(clean["linf"]), METHOD)
        if not all(np.isfinite(norms).all() for norms in clean.values()):
            raise MethodRefused(f"{METHOD}: the model's maps are not finite, so that channels cannot be ranked")
        triggered = self._triggered(model, trusted.fit, clues)
        ratios = norm_ratios(clean, triggered)
        order, candidates = self._order(clean, triggered, ratios)
        notes: Notes = {"channels": len(order), "candidates": candidates, "ratios": bias_claim(ratios)}
        most = candidates if self.count is None else self.count
        curve = pruning_curve(model, order[:most], trusted.validate)
        chosen = self._chosen(curve, len(trusted.validate)) if self.count is None else self.count
        notes |= {
            "pruned": chosen,
            "chosen": order[:chosen].tolist(),
            "validation_before": curve[0] / len(trusted.validate),
            "validation_after": curve[chosen] / len(trusted.validate),
            "curve": [
                {"pruned": pruned, "accuracy": right / len(trusted.validate)} for pruned, right in enumerate(curve)
            ],
        }
        repaired = copy.deepcopy(model)
        if chosen == 0:
            reason = f"every pruning costs more than {self.keep_within:g} of validation accuracy: raise keep_within"
            reason = reason if candidates else f"the trigger raises the {self.norm} norm of no channel"
            return repaired, clues, {"acted": False, "reason": reason, **notes}
        off = np.zeros(len(order), dtype=np.bool_)
        off[order[:chosen]] = True
        silence(repaired, {name: off})
        pruned = both(clues.pruned, {name: off})
        return repaired, replace(clues, pruned=pruned), {"acted": True, **notes}

    def _channels(self, model: nn.Module) -> tuple[str, Switch]:
        """Return the module that switches channels off, and its name; a count above their number is refused."""
        name, module = channels_module(model, METHOD)
        channels = len(module.weight)
        if self.count is not None and self.count > channels:
            raise MethodRefused(f"{METHOD}: the model has {channels} channels and count is {self.count}; lower count")
        return name, module

    def _triggered(self, model: nn.Module, fit: Samples, clues: Clues) -> Norms:
        """Return the norms under the trigger that ``knowledge`` gives."""
        if self.knowledge == "inputs":
            if clues.triggered is None or len(clues.triggered) == 0:
                raise MethodRefused(f"{METHOD} with knowledge: inputs needs triggered inputs and was given none")
            return channel_norms(model, clues.triggered, method=METHOD)
        if clues.trigger is None:
            remedy = (
                "put a trigger recovery that finds one before it"
                if self.knowledge == "recovered"
                else "run it where one is real"
            )
            raise MethodRefused(f"{METHOD} needs a trigger and was given none; {remedy}")
        return channel_norms(model, fit, stamp=clues.trigger.stamp, method=METHOD)

    def _order(self, clean: Norms, triggered: Norms, ratios: Norms) -> tuple[NDArray[np.int64], int]:
        """Return the channels, highest score first (ties by index), and how many of them the trigger raises."""
        difference = triggered[self.norm] - clean[self.norm]
        score = difference if self.by == "difference" else ratios[self.norm]
        # Among channels with an infinite ratio the difference decides.
        order = np.lexsort((-difference, -score)).astype(np.int64)
        return order, int((difference > 0).sum())

    def _chosen(self, curve: list[int], samples: int) -> int:
        """Return the largest number of channels within the allowed loss; the curve need not fall steadily."""
        allowed = self.keep_within * samples + 1e-9
        return max(pruned for pruned, right in enumerate(curve) if curve[0] - right <= allowed)
