"""Frequency detector: a classifier that knows triggers by what they leave in an image's discrete cosine transform.

Y. Zeng, W. Park, Z. M. Mao, R. Jia, "Rethinking the Backdoor Attacks' Triggers: A Frequency Perspective", ICCV 2021,
https://arxiv.org/abs/2104.03413, section 4; code https://github.com/YiZeng623/frequency-backdoor.

Differs from the paper:

- It trains on the server's trusted images, some hundred, not on a whole training set; therefore mirrored and turned
  copies, coefficients scaled by their mean and deviation on the trusted images, a network of half the width, and AdamW
  in place of Adadelta. Defaults were chosen on the validation accuracy on synthetic triggers (CIFAR-10, 250 images).
- No dropout, which draws from the global random state.
- The five kinds of synthetic trigger are the code's (a white patch, a patch of noise, noise all over, a shadow, another
  image added), drawn by fedbd's own generator; patches grow with the image.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
import scipy.fft
import torch
import torch.nn.functional as F  # noqa: N812 - the name that every PyTorch user reads
from annotated_types import Ge, Gt
from numpy.typing import NDArray
from torch import Tensor, nn

from fedbd.defenses.trusted_data import required
from fedbd.errors import MethodRefused
from fedbd.method_fields import checks_fields
from fedbd.metrics import logits
from fedbd.models.initialize import initialize, materialize
from fedbd.training import learning
from fedbd.types import Notes, Samples, TrustedData

METHOD = "frequency"

FEWEST = 20
"""Trusted images to train on below which nothing is learned."""

SMALLEST = 8
"""Pixels in each direction that three poolings need."""

KINDS = ("white", "noise_patch", "noise", "shadow", "added")
"""The synthetic triggers; each image gets one of them."""


def dct(images: Tensor) -> NDArray[np.float32]:
    """Return the orthonormal two-dimensional DCT-II of each channel, (N, C, H, W) float32, of (N, C, H, W) uint8.

    Of pixel values 0 to 255, as in the authors' code.
    """
    pixels = images.cpu().numpy().astype(np.float32)
    found: NDArray[np.float32] = scipy.fft.dctn(pixels, type=2, axes=(2, 3), norm="ortho")
    return found


def synthetic(images: Tensor, rng: torch.Generator) -> Tensor:
    """Return copies of images with a random synthetic trigger each (see ``KINDS``).

    Args:
        images: (N, C, H, W) uint8; left untouched. One of them is what another gets added.
        rng: Draws the kind of each image, then all that any kind needs.

    Returns:
        (N, C, H, W) uint8: rounded, as stored images are, else the rounding alone would tell them apart.
    """
    n, channels, height, width = images.shape
    x = images.to(torch.float32)
    kind = torch.randint(len(KINDS), (n, 1, 1, 1), generator=rng)
    where = patches(n, height, width, rng)
    dotted = 255 * torch.rand(n, channels, height, width, generator=rng)
    deviation = (10 + 60 * torch.rand(n, 1, 1, 1, generator=rng)).sqrt()
    noisy = x + 25 + deviation * torch.randn(n, channels, height, width, generator=rng)
    dark = torch.where(shadows(n, height, width, rng), 0.5 * x, x)
    added = x + 0.3 * x[torch.randint(n, (n,), generator=rng)]
    for i, changed in enumerate((torch.full_like(x, 255.0), dotted, noisy, dark, added)):
        place = where if i < 2 else torch.ones_like(where)
        x = torch.where((kind == i) & place, changed, x)
    return x.round().clamp(0, 255).to(torch.uint8)


def turned(images: Tensor, turn: Tensor) -> Tensor:
    """Return images mirrored or turned: their coefficients change, what is natural about them hardly does.

    Args:
        images: (N, C, H, W).
        turn: (N,) int64 in 0 .. 7: bits for upside down, left to right, and (square images only) transposed.
    """
    by = turn[:, None, None, None]
    images = torch.where(by & 1 > 0, images.flip(2), images)
    images = torch.where(by & 2 > 0, images.flip(3), images)
    if images.shape[2] == images.shape[3]:
        images = torch.where(by & 4 > 0, images.transpose(2, 3), images)
    return images


def patches(n: int, height: int, width: int, rng: torch.Generator) -> Tensor:
    """Return a random rectangle near a random corner for each image, (N, 1, H, W) bool.

    Sides are 2 to 7 pixels of 32, the distance from the corner 0 to 5 of 32, in proportion on other images.
    """

    def along(size: int) -> Tensor:
        side = torch.randint(2, max(3, size // 4), (n, 1), generator=rng)
        margin = torch.randint(0, max(1, 6 * size // 32), (n, 1), generator=rng)
        far = torch.randint(2, (n, 1), generator=rng).bool()
        first = torch.where(far, size - margin - side, margin)
        position = torch.arange(size)[None]
        return (position >= first) & (position < first + side)

    rows, columns = along(height), along(width)
    return (rows[:, :, None] & columns[:, None, :])[:, None]


def shadows(n: int, height: int, width: int, rng: torch.Generator) -> Tensor:
    """Return a random band across each image, (N, 1, H, W) bool: any direction, a fifth to half of the image wide."""
    angle = 2 * torch.pi * torch.rand(n, 1, 1, generator=rng)
    center = torch.rand(n, 1, 1, generator=rng) - 0.5
    half = 0.1 + 0.15 * torch.rand(n, 1, 1, generator=rng)
    y = (torch.arange(height)[:, None] + 0.5) / height - 0.5
    x = (torch.arange(width)[None] + 0.5) / width - 0.5
    return ((y * angle.cos() + x * angle.sin() - center).abs() < half)[:, None]


class FrequencyModule(nn.Module):
    """Six 3x3 convolutions in pairs, each with ELU and BatchNorm, pooling after a pair, one linear layer."""

    def __init__(self, shape: tuple[int, int, int], width: int) -> None:
        """Lay out the layers for (C, H, W) coefficients."""
        super().__init__()
        layers: list[nn.Module] = []
        before = shape[0]
        for channels in (width, 2 * width, 4 * width):
            for inputs in (before, channels):
                layers += [nn.Conv2d(inputs, channels, 3, padding=1), nn.ELU(), nn.BatchNorm2d(channels)]
            layers.append(nn.MaxPool2d(2))
            before = channels
        self.features = nn.Sequential(*layers)
        self.fc = nn.Linear(before * (shape[1] // 8) * (shape[2] // 8), 2)

    def forward(self, x: Tensor) -> Tensor:
        """Return (N, 2) logits: clean, triggered."""
        out: Tensor = self.fc(self.features(x).flatten(1))
        return out


@dataclass(frozen=True)
class Scale:
    """How coefficients become a network's input.

    Attributes:
        log: Take the logarithm of 1 plus their magnitude first.
        mean: (C, H, W) float32, to subtract.
        deviation: (C, H, W) float32, to divide by.
    """

    log: bool
    mean: Tensor
    deviation: Tensor

    def apply(self, images: Tensor) -> Tensor:
        """Return (N, C, H, W) float32 of uint8 images."""
        return (_coefficients(images, self.log) - self.mean) / self.deviation


def _coefficients(images: Tensor, log: bool) -> Tensor:
    found = torch.from_numpy(dct(images))
    return found.abs_().log1p_() if log else found


def _fit_scale(images: Tensor, log: bool) -> Scale:
    coefficients = _coefficients(turned(images, torch.arange(len(images)) % 8), log)
    variance = coefficients.var(0)
    # Smoothed: a coefficient that is the same in all trusted images must not explode on others.
    return Scale(log, coefficients.mean(0), (variance + 1e-2 * variance.mean() + 1e-12).sqrt())


@dataclass(frozen=True, kw_only=True)
@checks_fields
class Frequency:
    """Scores an image by how much its DCT looks like that of an image with a synthetic trigger; ignores the model.

    Attributes:
        network: ``cnn``: the authors' six convolutions. ``linear``: logistic regression on ``log`` ones.
        width: Channels of the first pair of convolutions; 2 and 4 times as many in the others (32 in the paper).
        transform: ``raw``: the coefficients, as in the authors' code. ``log``: log(1 + magnitude) of them.
        epochs: Passes over the trusted images and as many triggered copies, drawn anew in each.
        lr: Learning rate of AdamW, falling to 0 on half a cosine.
        batch_size: Images per step, half of them triggered.
        weight_decay: Of AdamW, times the rate.
    """

    network: Literal["cnn", "linear"] = "cnn"
    width: Annotated[int, Ge(1)] = 16
    transform: Literal["raw", "log"] = "raw"
    epochs: Annotated[int, Ge(1)] = 20
    lr: Annotated[float, Gt(0)] = 2e-3
    batch_size: Annotated[int, Ge(4)] = 64
    weight_decay: Annotated[float, Ge(0)] = 0.05

    @property
    def needs_trusted(self) -> bool:
        """It trains on clean images."""
        return True

    @property
    def needs_classes(self) -> bool:
        """It reads no labels."""
        return False

    @property
    def fewest_trusted(self) -> int:
        """Trusted images to fit that it takes at least."""
        return FEWEST

    def problems(self) -> list[tuple[str, str]]:
        """Return what is wrong between the fields."""
        if self.network == "linear" and self.transform == "raw":
            return [
                ("transform", "must be log with network: linear, which cannot tell strong coefficients of any sign")
            ]
        return []

    def refusal_on(self, model: nn.Module, trusted: TrustedData) -> str | None:
        """Return why it cannot train on images of this size, None if it can: a run asks before it starts."""
        height, width = trusted.fit.images.shape[2:]
        if self.network == "linear" or min(height, width) >= SMALLEST:
            return None
        return (
            f"{METHOD}: the cnn takes images from {SMALLEST}x{SMALLEST} up, not {height}x{width}; "
            "set network: linear and transform: log"
        )

    def score(
        self, model: nn.Module, data: Samples, trusted: TrustedData | None, rng: torch.Generator
    ) -> tuple[NDArray[np.float64], Notes]:
        """Score samples.

        Args:
            model: Not used: the detector is the same for any.
            data: Only the images are read.
            trusted: The network trains on ``fit`` and is tried on ``validate``.
            rng: Draws the weights, then orders, turns and synthetic triggers.

        Returns:
            (N,) float64, the log odds of a trigger, higher is more suspicious, and notes: ``loss`` (mean of the last
            epoch), ``validation_accuracy`` (on the validation images and as many triggered copies), ``false_positive``
            (share of the clean ones called triggered) and ``detected`` (per kind of synthetic trigger the share found;
            None for a kind that no image got).

        Raises:
            MethodRefused: Without samples, for samples of another size than the trusted ones, without enough of these,
                if the fields do not fit each other, or if images are too small for the cnn.
        """
        trusted = required(trusted, METHOD, "trains on", several=self.needs_classes)
        self._refuse(model, trusted, data)
        fit = trusted.fit.images.cpu()
        scale = _fit_scale(fit, self.transform == "log")
        net, loss = self._train(fit, scale, rng)
        notes: Notes = {"loss": loss, **_try_out(net, scale, trusted.validate.images.cpu(), rng)}
        return _log_odds(net, scale, data.images.cpu()), notes

    def _refuse(self, model: nn.Module, trusted: TrustedData, data: Samples) -> None:
        if len(data) == 0:
            raise MethodRefused(f"{METHOD}: there are no samples to score; give it at least one")
        if len(trusted.fit) < FEWEST:
            raise MethodRefused(
                f"{METHOD} trains on at least {FEWEST} trusted images and there are {len(trusted.fit)}; raise "
                "trusted.size"
            )
        own, held = tuple(data.images.shape[1:]), tuple(trusted.fit.images.shape[1:])
        if own != held:
            raise MethodRefused(f"{METHOD}: the samples are images of {own}, (C, H, W), and the trusted ones of {held}")
        small = self.refusal_on(model, trusted)
        if small is not None:
            raise MethodRefused(small)

    def _train(self, images: Tensor, scale: Scale, rng: torch.Generator) -> tuple[nn.Module, float]:
        """Return a trained network in eval mode and the mean loss of its last epoch."""
        shape = (int(images.shape[1]), int(images.shape[2]), int(images.shape[3]))
        net = materialize(lambda: _layout(self.network, shape, self.width))
        initialize(net, rng, convolutions="he")
        net.to(memory_format=torch.channels_last)
        optimizer = torch.optim.AdamW(net.parameters(), lr=self.lr, weight_decay=self.weight_decay)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.epochs)
        losses: list[float] = []
        net.train()
        with learning(rng):
            for _ in range(self.epochs):
                losses = []
                for index in torch.split(torch.randperm(len(images), generator=rng), self.batch_size // 2):
                    x, y = _batch(images[index], rng)
                    loss = F.cross_entropy(net(scale.apply(x)), y)
                    optimizer.zero_grad(set_to_none=True)
                    loss.backward()  # type: ignore[no-untyped-call]
                    optimizer.step()
                    losses.append(loss.item())
                schedule.step()
        return net.eval(), float(np.mean(losses))


def _layout(network: Literal["cnn", "linear"], shape: tuple[int, int, int], width: int) -> nn.Module:
    if network == "cnn":
        return FrequencyModule(shape, width)
    return nn.Sequential(nn.Flatten(), nn.Linear(shape[0] * shape[1] * shape[2], 2))


def _batch(images: Tensor, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return clean images, mirrored and turned at random, and triggered copies of them, with labels 0 and 1."""
    clean = turned(images, torch.randint(8, (len(images),), generator=rng))
    labels = torch.arange(2).repeat_interleave(len(images))
    return torch.cat([clean, synthetic(clean, rng)]), labels


def _log_odds(net: nn.Module, scale: Scale, images: Tensor) -> NDArray[np.float64]:
    """Return each image's log odds of a trigger, (N,) float64."""
    found = [logits(net, scale.apply(part), threads=1) for part in torch.split(images, 1000)]
    out = torch.cat(found).to(torch.float64)
    odds: NDArray[np.float64] = (out[:, 1] - out[:, 0]).numpy()
    return odds


def _try_out(net: nn.Module, scale: Scale, images: Tensor, rng: torch.Generator) -> Notes:
    """Return how well a network tells held-out images from triggered copies of them."""
    peek = torch.Generator()
    peek.set_state(rng.get_state())
    kind = torch.randint(len(KINDS), (len(images),), generator=peek).numpy()  # what ``synthetic`` draws first
    hit = _log_odds(net, scale, synthetic(images, rng)) > 0
    alarm = _log_odds(net, scale, images) > 0
    return {
        "validation_accuracy": float((hit.mean() + 1 - alarm.mean()) / 2),
        "false_positive": float(alarm.mean()),
        "detected": {name: float(hit[kind == i].mean()) if (kind == i).any() else None for i, name in enumerate(KINDS)},
    }
