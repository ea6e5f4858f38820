"""Channel Lipschitzness pruning: switch off the channels whose filters amplify most, without any data.

R. Zheng, R. Tang, J. Li, L. Liu, "Data-free Backdoor Removal based on Channel Lipschitzness", ECCV 2022,
https://arxiv.org/abs/2208.03111; code https://github.com/rkteddy/channel-Lipschitzness-based-pruning.

Differs from the paper:

- The code pairs every BatchNorm with the Conv2d before it in the order of declaration, which its authors themselves say
  is wrong for pre-activation networks (their issue 2). Here the forward pass is traced, and a BatchNorm belongs to a
  convolution if nothing but it reads the convolution's output. A convolution whose output is also, or only, read by
  something else (in a Wide ResNet: the stem where a shortcut starts, the last convolution of a block, the shortcut's
  own) is judged by its filters alone, and filter and bias are set to 0; the code does not know this case.
- The bound divides by sqrt(variance + eps), as the BatchNorm does; the code leaves eps out. It is computed in float64.
- Only the abstract could be read beside the code. As in the code, the layer's standard deviation is the unbiased one,
  scale and shift of the channel's BatchNorm become 0, and Linear layers are left alone.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any

import numpy as np
import torch
from annotated_types import Ge
from numpy.typing import NDArray
from torch import fx, nn

from fedbd.defenses.cleanup.channel_masks import both
from fedbd.defenses.cleanup.channel_norms import silence
from fedbd.defenses.own_weights import need_own_weights
from fedbd.defenses.sound_model import need_sound
from fedbd.errors import MethodRefused, refusal
from fedbd.method_fields import checks_fields
from fedbd.metrics import accuracy
from fedbd.types import Clues, Notes, TrustedData

METHOD = "clp"


def norms_behind(model: nn.Module) -> dict[str, str | None]:
    """Return for each Conv2d, by name in the model's order, the BatchNorm2d that alone reads its output, or None.

    The BatchNorm must be affine, keep running statistics, and read no other convolution. The forward pass is traced
    symbolically (``torch.fx``), so that no input is needed; the model is left untouched.

    Raises:
        MethodRefused: If the model has no Conv2d, its forward pass cannot be traced, or what would be switched off is
            computed from other parameters.
    """
    modules = dict(model.named_modules())
    convolutions = [name for name, module in modules.items() if isinstance(module, nn.Conv2d)]
    if not convolutions:
        raise MethodRefused(
            f"{METHOD} judges convolutions and the model has none; take cnn, mnistnet, wrn16-1 or resnet18"
        )
    try:
        graph = fx.Tracer().trace(model)
    except Exception as error:  # whatever a model's own code raises on symbolic values
        raise MethodRefused(
            f"{METHOD} traces the forward pass to find the BatchNorm behind each convolution, and this model's cannot "
            f"be traced by torch.fx ({type(error).__name__}: {error}); write it without branches on its input"
        ) from error
    names = {id(module): name for name, module in modules.items()}  # one name for a module that has several
    calls = {node: names[id(model.get_submodule(str(node.target)))] for node in graph.nodes if node.op == "call_module"}
    readers: dict[str, set[str | None]] = {name: set() for name in modules}
    sources: dict[str, set[str | None]] = {name: set() for name in modules}
    for node, name in calls.items():
        readers[name] |= {calls.get(user) for user in node.users}
        sources[name] |= {calls.get(source) for source in node.all_input_nodes}
    found = {name: _norm_among(readers[name], sources, modules, name) for name in convolutions}
    for name, norm in found.items():
        need_own_weights(norm or name, modules[norm or name], METHOD)
    return found


def _norm_among(
    readers: set[str | None], sources: Mapping[str, set[str | None]], modules: Mapping[str, nn.Module], name: str
) -> str | None:
    """Return a convolution's only reader if it is a BatchNorm that has no other source."""
    norm = next(iter(readers)) if len(readers) == 1 else None
    module = None if norm is None else modules[norm]
    usable = isinstance(module, nn.BatchNorm2d) and module.affine and module.running_var is not None
    return norm if usable and norm is not None and sources[norm] == {name} else None


def channel_bounds(convolution: nn.Conv2d, norm: nn.BatchNorm2d | None) -> NDArray[np.float64]:
    """Return the upper bound of each output channel's Lipschitz constant (the paper's UCLC), (C,) float64.

    Args:
        convolution: Of finite filters. That of one channel is read as an (inputs / groups, height * width) matrix,
            whose largest singular value is taken.
        norm: The BatchNorm behind it, whose ``|scale| / sqrt(running variance + eps)`` multiplies; None for none.
    """
    filters = convolution.weight.detach().to("cpu", torch.float64)
    bounds = torch.linalg.matrix_norm(filters.flatten(2), ord=2)
    if norm is not None:
        assert norm.running_var is not None
        variance = norm.running_var.detach().to("cpu", torch.float64)
        bounds = bounds * norm.weight.detach().to("cpu", torch.float64).abs() / torch.sqrt(variance + norm.eps)
    return np.asarray(bounds.numpy(), dtype=np.float64)


def outliers(bounds: NDArray[np.float64], u: float) -> NDArray[np.bool_]:
    """Return which of a layer's channels are above mean + u * unbiased standard deviation, (C,) bool."""
    if bounds.size < 2:
        return np.zeros(bounds.shape, dtype=np.bool_)
    return np.asarray(bounds > bounds.mean() + u * bounds.std(ddof=1))


@dataclass(frozen=True, kw_only=True)
@checks_fields
class CLP:
    """Prunes the channels whose Lipschitz bound is an outlier in their layer.

    Attributes:
        u: Standard deviations above the layer's mean from which a channel is pruned. Of n channels none can be more
            than (n - 1) / sqrt(n) above: with the default a layer of 10 channels or fewer is never pruned.
    """

    u: Annotated[float, Ge(0)] = 3.0

    @property
    def needs_trusted(self) -> bool:
        """It reads weights alone."""
        return False

    @property
    def reads_batch_norm(self) -> bool:
        """Its masks are on BatchNorm scales, or weigh them."""
        return True

    @property
    def prunes(self) -> bool:
        """It names what it switched off in ``clues.pruned``."""
        return True

    def refusal(self, model: nn.Module) -> str | None:
        """Return why a model cannot be repaired, None if it can: a run asks before it starts."""
        return refusal(lambda: norms_behind(model))

    def clean(
        self, model: nn.Module, trusted: TrustedData | None, clues: Clues, rng: torch.Generator
    ) -> tuple[nn.Module, Clues, Notes]:
        """Return a pruned copy of a model.

        Args:
            model: Has convolutions; left untouched.
            trusted: Accuracy before and after is recorded on ``validate`` where there is one; it decides nothing.
            clues: Passed on with ``pruned``: by the BatchNorm's name, or the convolution's where there is none.
            rng: Not used.

        Returns:
            The copy in the model's mode, the clues, and notes: ``acted``, ``reason`` (why not), ``channels`` and
            ``pruned`` (numbers over all layers), per layer (by the convolution's name) the ``norm`` behind it,
            ``channels``, ``mean`` and ``largest`` bound and the ``pruned`` indices, and with trusted data
            ``validation_before`` and ``validation_after`` (accuracies).

        Raises:
            MethodRefused: If the model is none that ``norms_behind`` takes, or a bound is not finite.
        """
        need_sound(model, METHOD, None if trusted is None else trusted.validate)
        off: dict[str, NDArray[np.bool_]] = {}
        layers: Notes = {}
        modules: dict[str | None, Any] = {None: None, **dict(model.named_modules())}
        for name, norm in norms_behind(model).items():
            bounds = channel_bounds(modules[name], modules[norm])
            if not np.isfinite(bounds).all():
                raise MethodRefused(f"{METHOD}: the weights of {name} are not finite; the model diverged")
            found = outliers(bounds, self.u)
            layers[name] = {
                "norm": norm,
                "channels": len(bounds),
                "mean": float(bounds.mean()),
                "largest": float(bounds.max()),
                "pruned": np.flatnonzero(found).tolist(),
            }
            if found.any():
                off[norm or name] = found
        repaired = copy.deepcopy(model)
        silence(repaired, off)
        notes: Notes = {
            "channels": sum(layer["channels"] for layer in layers.values()),
            "pruned": sum(int(found.sum()) for found in off.values()),
            "layers": layers,
        }
        if trusted is not None and len(trusted.validate):
            notes["validation_before"] = accuracy(model, trusted.validate)
            notes["validation_after"] = accuracy(repaired, trusted.validate) if off else notes["validation_before"]
        if not off:
            reason = f"no channel's bound is {self.u:g} standard deviations above its layer's mean: lower u"
            return repaired, clues, {"acted": False, "reason": reason, **notes}
        pruned = both(clues.pruned, off)
        return repaired, replace(clues, pruned=pruned), {"acted": True, **notes}
