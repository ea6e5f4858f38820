"""torchvision's classifiers by name.

Reference: https://docs.pytorch.org/vision/stable/models.html, which names the paper of each architecture. Networks are
constructed and initialized by torchvision, from a seed of our own (``initialize.seeded``).

Differs from torchvision: the classifier is as wide as the task has classes; a gray image is given to the three input
channels alike; images may be brought to a larger size first; auxiliary heads are left out, and dropout and stochastic
depth are 0, which would draw from the global random state. State entries have torchvision's names behind ``net.``;
a checkpoint of torchvision's own loads, too.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any

import torch
import torch.nn.functional as F  # noqa: N812 - the name that every PyTorch user reads
from annotated_types import Ge
from torch import Tensor, nn

from fedbd.errors import Problem, UserError
from fedbd.method_fields import checks_fields
from fedbd.models.initialize import seeded
from fedbd.registry import near_miss

SIZES = (32, 48, 64, 96, 128, 160, 224, 299)
"""Sides in pixels that a refusal tries in order to name one that works."""

GROUPS = ("layer1", "layer2", "layer3", "layer4")


class TorchvisionModule(nn.Module):
    """A network of torchvision, ``net``, that gets its images fitted to it."""

    prefix = "net."

    def __init__(self, architecture: str, classes: int, resize: int | None, gray: bool) -> None:
        """Construct the network, initialized by torchvision on the default device, without dropout."""
        super().__init__()
        self.net = _construct(architecture, classes)
        self.resize, self.gray = resize, gray
        inside = {"taps": (), "maps": "", "channels": "", **_inside(architecture, self.net)}
        linear = [name for name, module in self.net.named_modules() if isinstance(module, nn.Linear)]
        last = linear[-1] if linear and self.net.get_submodule(linear[-1]).out_features == classes else ""
        self.taps = tuple(f"net.{name}" for name in inside["taps"])
        self.maps, self.channels, self.classifier = (
            name and f"net.{name}" for name in (inside["maps"], inside["channels"], last)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return (N, classes) logits of (N, C, H, W) images in [0, 1]."""
        if self.gray:
            x = x.expand(-1, 3, -1, -1)
        if self.resize is not None:
            x = F.interpolate(x, size=(self.resize, self.resize), mode="bilinear", align_corners=False)
        logits: Tensor = self.net(x)
        return logits


@cache
def architectures() -> tuple[str, ...]:
    """Return the names of torchvision's classifiers."""
    from torchvision import models  # noqa: PLC0415 - it takes a second

    return tuple(models.list_models(module=models))


def _construct(architecture: str, classes: int) -> nn.Module:
    from torchvision.models import get_model  # noqa: PLC0415
    from torchvision.ops import StochasticDepth  # noqa: PLC0415

    auxiliary = architecture in ("googlenet", "inception_v3")
    options: dict[str, Any] = {"aux_logits": False, "init_weights": True} if auxiliary else {}
    net: nn.Module = get_model(architecture, weights=None, num_classes=classes, **options)
    for module in net.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd | StochasticDepth):
            module.p = 0.0
    if architecture.startswith("densenet"):  # its last activation is a function, behind ``features``; twice is as once
        net.get_submodule("features").add_module("relu5", nn.ReLU())
    return net


def _inside(architecture: str, net: nn.Module) -> dict[str, Any]:
    """Return what defenses may look into (see ``fedbd.models``), as far as the network's family is known here."""
    if all(hasattr(net, name) for name in GROUPS):
        return {"taps": GROUPS, "maps": GROUPS[-1]}
    if architecture.startswith(("vgg", "alexnet")):
        features = list(net.get_submodule("features").children())
        pools = [i for i, module in enumerate(features) if isinstance(module, nn.MaxPool2d)]
        # The last pooling stands behind a ReLU, and that behind the module whose channels it activates.
        return {
            "taps": tuple(f"features.{i}" for i in pools),
            "maps": f"features.{pools[-1] - 1}",
            "channels": f"features.{pools[-1] - 2}",
        }
    if architecture.startswith(("mobilenet", "efficientnet")):
        last = len(list(net.get_submodule("features").children())) - 1
        return {"maps": f"features.{last}", "channels": f"features.{last}.1"}
    if architecture.startswith("shufflenet"):
        return {"taps": ("stage2", "stage3", "stage4"), "maps": "conv5", "channels": "conv5.1"}
    if architecture.startswith("densenet"):
        taps = tuple(f"features.denseblock{i}" for i in range(1, 5))
        return {"taps": taps, "maps": "features.relu5", "channels": "features.norm5"}
    return {}


@cache
def _trouble(architecture: str, shape: tuple[int, int, int], classes: int, resize: int | None) -> str:
    """Return why a network cannot train on one image of a shape, or the empty string; only shapes are computed."""
    net = seeded(lambda: TorchvisionModule(architecture, classes, resize, shape[0] == 1), torch.Generator())
    try:
        out = net.to("meta")(torch.zeros(1, *shape, device="meta"))
    except (RuntimeError, ValueError, AssertionError) as error:
        return str(error).partition("\n")[0] or type(error).__name__
    return "" if tuple(out.shape) == (1, classes) else f"it returns {tuple(out.shape)}"


@dataclass(frozen=True, kw_only=True)
@checks_fields
class Torchvision:
    """One of torchvision's classifiers, by name: its own initialization, channels_last.

    Attributes:
        architecture: Its name in torchvision: ``resnet18``, ``vgg11_bn``, ``mobilenet_v3_small``, ...
        weights: Null; fedbd downloads nothing. A file of weights goes into ``start.checkpoint``.
        resize: Bring images to so many pixels a side first (bilinear); null: as they are. Most of these networks
            halve images five times and were made for 224.
    """

    architecture: str
    weights: str | None = None
    resize: Annotated[int, Ge(1)] | None = None

    def problems(self) -> list[tuple[str, str]]:
        """Return what is wrong with the fields."""
        found = []
        if self.architecture not in architectures():
            hint = near_miss(self.architecture, architectures()) or "fedbd show torchvision names the page with all"
            found.append(("architecture", f"must be a classifier of torchvision, got {self.architecture!r}; {hint}"))
        if self.weights is not None:
            remedy = "save them with torchvision's own tools and name the file in start.checkpoint"
            found.append(("weights", f"must be null, since fedbd downloads nothing, got {self.weights!r}; {remedy}"))
        return found

    def build(self, shape: tuple[int, int, int], classes: int, rng: torch.Generator) -> TorchvisionModule:
        """Return a fresh model (see ``types.ModelFamily``).

        Raises:
            UserError: If the network does not take such images, or BatchNorm would be left with single values.
        """
        problems = self._misfit(shape, classes)
        if problems:
            raise UserError(problems)
        model = seeded(lambda: TorchvisionModule(self.architecture, classes, self.resize, shape[0] == 1), rng)
        return model.to(memory_format=torch.channels_last)

    def _misfit(self, shape: tuple[int, int, int], classes: int) -> list[Problem]:
        size = f"{shape[1]}x{shape[2]}"
        if shape[0] not in (1, 3):
            expected = "torchvision's networks take images of 1 or 3 channels"
            return [Problem(path="model", expected=expected, got=str(shape[0]))]
        trouble = _trouble(self.architecture, shape, classes, self.resize)
        if not trouble:
            return []
        wanted = next((side for side in SIZES if not _trouble(self.architecture, shape, classes, side)), None)
        remedy = "" if wanted is None else f"set model.resize to {wanted}"
        taken = size if self.resize is None else f"{size}, resized to {self.resize}x{self.resize}"
        expected = f"{self.architecture} cannot train on images of {taken}: {trouble}"
        return [Problem(path="model", expected=expected, remedy=remedy)]
