import copy
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fedbd.attacks.cw import CW
from fedbd.attacks.fgsm import FGSM
from fedbd.attacks.pgd import PGD
from fedbd.defenses.cleanup import RNP, FineTune
from fedbd.defenses.gradcam import gradcam
from fedbd.defenses.sound_model import need_sound
from fedbd.errors import MethodRefused
from fedbd.models.cnn import Cnn
from fedbd.registry import METHODS, resolve
from fedbd.types import Clues, Samples, TrustedData


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


DATA = Samples(
    torch.randint(256, (90, 1, 8, 8), generator=rng(1), dtype=torch.uint8), torch.arange(90, dtype=torch.int64) % 3
)
TRUSTED = TrustedData(DATA.subset(torch.arange(60)), DATA.subset(torch.arange(60, 90)), 3)
CLEANUPS = [resolve("cleanup", name, name) for name in METHODS["cleanup"]]
DETECTORS = [resolve("detection", name, name) for name in METHODS["detection"] if name != "frequency"]  # needs no model


class Tuple(nn.Module):
    """A model of the kind that returns its features, too."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.inner(x), x


def model() -> nn.Module:
    return Cnn(width=4).build((1, 8, 8), 3, rng())


def diverged() -> nn.Module:
    net = model()
    with torch.no_grad():
        list(net.parameters())[-1][0] = torch.inf
    return net


UNSOUND: list[tuple[Callable[[], nn.Module], str]] = [
    (lambda: model().double(), r"is torch\.float64, expected torch\.float32; hand it model\.float\(\)"),
    (diverged, "is not finite; the model has diverged"),
]
OF_OUTPUTS: list[tuple[Callable[[], nn.Module], str]] = [
    (lambda: Tuple(model()), "returns a tuple, expected a tensor of logits"),
    (lambda: Cnn(width=4).build((3, 8, 8), 3, rng()), r"does not take images of \(1, 8, 8\), \(C, H, W\)"),
    (lambda: nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3)), r"returns \(2, 3, 6, 6\) for 2 images"),
]


@pytest.mark.parametrize(("make", "says"), UNSOUND + OF_OUTPUTS)
@pytest.mark.parametrize("method", [*CLEANUPS, *DETECTORS], ids=lambda cls: cls.__name__)
def test_every_method_refuses_an_unsound_model_by_name(
    method: type[Any], make: Callable[[], nn.Module], says: str
) -> None:
    net = make()
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(MethodRefused, match=says):
        if method in CLEANUPS:
            method().clean(net, TRUSTED, Clues(reference=model()), rng())
        else:
            method().score(net, DATA, TRUSTED, rng())
    assert all(torch.equal(entry, before[name]) for name, entry in net.state_dict().items())
    assert net.training


def test_a_model_with_fewer_outputs_than_classes_is_refused_and_one_with_more_is_not() -> None:
    few = Cnn(width=4).build((1, 8, 8), 2, rng())
    with pytest.raises(MethodRefused, match=r"rnp: the model returns \(2, 2\) for 2 images, expected \(2, 3\)"):
        RNP().clean(few, TRUSTED, Clues(), rng())
    need_sound(Cnn(width=4).build((1, 8, 8), 5, rng()), "rnp", DATA, 3)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:FutureWarning")
@pytest.mark.parametrize("method", [*CLEANUPS, *DETECTORS], ids=lambda cls: cls.__name__)
def test_a_scripted_model_is_refused(method: type[Any]) -> None:
    net = torch.jit.trace(model().eval(), torch.zeros(1, 1, 8, 8))
    with pytest.raises(MethodRefused, match=r"compiled by torch\.jit; hand it the Python module"):
        if method in CLEANUPS:
            method().clean(net, TRUSTED, Clues(reference=model()), rng())
        else:
            method().score(net, DATA, TRUSTED, rng())


@pytest.mark.parametrize("name", METHODS["detection"])
@pytest.mark.parametrize(
    ("data", "says"),
    [
        (DATA.subset(torch.arange(0)), "there are no samples to score"),
        (Samples(DATA.images.repeat(1, 1, 2, 2), DATA.labels), "does not take images|the samples are images of"),
    ],
)
def test_every_detector_refuses_samples_that_it_cannot_score(name: str, data: Samples, says: str) -> None:
    linear = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
    linear.classifier, linear.taps = "1", ("1",)  # type: ignore[assignment]
    with pytest.raises(MethodRefused, match=says):
        resolve("detection", name, name)().score(linear, data, TRUSTED, rng())


@pytest.mark.parametrize("method", DETECTORS, ids=lambda cls: cls.__name__)
@pytest.mark.parametrize("wrong", [90, -1])
def test_every_detector_refuses_labels_that_are_no_classes(method: type[Any], wrong: int) -> None:
    labels = DATA.labels.clone()
    labels[-1] = wrong
    with pytest.raises(MethodRefused, match=r"the labels are (-1|0) to (2|90), and the model's classes 0 to 2"):
        method().score(model(), Samples(DATA.images, labels), TRUSTED, rng())


def test_a_sound_model_is_left_as_it_was() -> None:
    net = model().train()
    net.extra = nn.BatchNorm1d(3).eval()  # type: ignore[assignment] # a mode of its own
    before = copy.deepcopy(net.state_dict())
    need_sound(net, "rnp", DATA, 3)
    assert all(torch.equal(entry, before[name]) for name, entry in net.state_dict().items())
    assert net.training
    assert not net.extra.training


class Keeps(nn.Module):
    """A model that keeps its last outputs, which with a gradient torch does not copy."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        self.last = self.inner(x)
        return self.last


def test_a_model_that_keeps_outputs_of_its_training_can_be_repaired_again() -> None:
    net = Keeps(model())
    net(DATA.batch(torch.arange(5))[0]).sum().backward()
    with pytest.raises(RuntimeError, match="deepcopy"):
        copy.deepcopy(net)
    once, clues, _ = FineTune(epochs=1).clean(net, TRUSTED, Clues(), rng())
    twice, _, notes = RNP(unlearn_epochs=1).clean(once, TRUSTED, clues, rng())
    assert twice is not once
    assert "validation_before" in notes or not notes["acted"]


@pytest.mark.parametrize("method", [*CLEANUPS, *DETECTORS], ids=lambda cls: cls.__name__)
def test_under_inference_mode_a_method_works_or_refuses(method: type[Any]) -> None:
    net = model()
    with torch.inference_mode(), suppress(MethodRefused):  # no error of torch's
        if method in CLEANUPS:
            method().clean(net, TRUSTED, Clues(reference=model()), rng())
        else:
            method().score(net, DATA, TRUSTED, rng())


@pytest.mark.parametrize("attack", [FGSM, PGD, CW])
def test_what_needs_gradients_says_so_under_inference_mode(attack: type[Any]) -> None:
    x, y = DATA.batch(torch.arange(4))
    with torch.inference_mode():
        with pytest.raises(MethodRefused, match="cannot compute gradients under"):
            attack().perturb(model(), x, y, rng())
        with pytest.raises(MethodRefused, match="gradcam cannot compute gradients under"):
            gradcam(model(), x, y)
