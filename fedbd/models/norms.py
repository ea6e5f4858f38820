"""What becomes of BatchNorm in a federation: replaced by GroupNorm, frozen, or kept by each client.

- X. Li, M. Jiang, X. Zhang, M. Kamp, Q. Dou, "FedBN: Federated Learning on Non-IID Features via Local Batch
  Normalization", ICLR 2021, https://arxiv.org/abs/2102.07623, algorithm 1: all entries of BatchNorm layers, scales and
  shifts as well as running statistics, stay with the client.
- Y. Wu, K. He, "Group Normalization", ECCV 2018, https://arxiv.org/abs/1803.08494; that it replaces BatchNorm where
  clients' data differ is the advice of K. Hsieh et al., "The Non-IID Data Quagmire of Decentralized Machine Learning",
  ICML 2020, https://arxiv.org/abs/1910.00189, section 5.

Differs from the papers: FedBN has no global model to evaluate; here the server's has statistics of the trusted data
(``Rounds`` in ``server/step.py``). GroupNorm has up to 32 groups of at least two channels, since its paper's 32 groups
do not divide narrow layers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Self

from torch import nn

GROUPS = 32
"""Most groups of a GroupNorm, the paper's default."""


def has_batch_norm(model: nn.Module) -> bool:
    """Return whether there is a BatchNorm2d in a model."""
    return any(isinstance(module, nn.BatchNorm2d) for module in model.modules())


def batch_norm_entries(model: nn.Module) -> tuple[str, ...]:
    """Return the names of all state entries of a model's BatchNorm2d layers, counters too, in the state's order."""
    every = model.named_modules(remove_duplicate=False)  # the state has an entry for each of a layer's names
    layers = {name for name, module in every if isinstance(module, nn.BatchNorm2d)}
    return tuple(entry for entry in model.state_dict() if entry.rpartition(".")[0] in layers)


def groups_of(channels: int) -> int:
    """Return the largest number of groups up to 32 that divides the channels into groups of two or more."""
    fitting = [count for count in range(1, min(GROUPS, channels // 2) + 1) if channels % count == 0]
    return max(fitting, default=1)


def replace_modules(model: nn.Module, others: Mapping[nn.Module, nn.Module]) -> None:
    """Put other modules in the place of some of a model's, in place, under every name that these have in it."""
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if module in others:
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, others[module])


def with_group_norm(model: nn.Module) -> nn.Module:
    """Replace every BatchNorm2d of a fresh model by a fresh GroupNorm, in place; return the model.

    A layer keeps its name, so that ``bn1.weight`` and ``bn1.bias`` remain and the entries of running statistics go.
    Nothing is drawn: all other weights are those of the model with BatchNorm.
    """
    layers = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    replace_modules(model, {layer: _group_norm(layer) for layer in layers})
    return model


def _group_norm(layer: nn.BatchNorm2d) -> nn.GroupNorm:
    return nn.GroupNorm(groups_of(layer.num_features), layer.num_features, layer.eps, layer.affine)


class FrozenBatchNorm(nn.BatchNorm2d):
    """A BatchNorm2d that stays in eval mode: it uses its running statistics, and they do not move."""

    def train(self, mode: bool = True) -> Self:
        """Stay in eval mode."""
        del mode
        return super().train(False)


def freeze_batch_norm(model: nn.Module) -> nn.Module:
    """Keep every BatchNorm2d of a model as it is, in place: statistics, scales and shifts; return the model."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.__class__ = FrozenBatchNorm  # names, entries and isinstance stay
            module.requires_grad_(False)
            module.eval()
    return model
