"""What FGSM, PGD and CW share, and what each must do on models whose answer is known."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fedbd.attacks.adversarial import ascent_sign, margins, outcome, to_grid, to_grid_within
from fedbd.attacks.cw import CW
from fedbd.attacks.fgsm import FGSM
from fedbd.attacks.pgd import PGD
from fedbd.errors import MethodRefused
from fedbd.metrics import predict

from .conftest import Trained

SIDE = 6
ALL = [FGSM(), PGD(), CW(iterations=20, search_steps=3)]
names = pytest.mark.parametrize("attack", ALL, ids=lambda attack: type(attack).__name__)


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def linear(classes: int = 2, seed: int = 0, scale: float = 1.0) -> nn.Sequential:
    net = nn.Sequential(nn.Flatten(), nn.Linear(SIDE * SIDE, classes))
    with torch.no_grad():
        net[1].weight.copy_(torch.randn(classes, SIDE * SIDE, generator=rng(seed)) * scale)
        net[1].bias.zero_()
    return net.eval()


def gray(count: int, seed: int = 1) -> Tensor:
    """Pictures on the uint8 grid, away from black and white."""
    return torch.randint(90, 166, (count, 1, SIDE, SIDE), generator=rng(seed)).float() / 255


def label_of(model: nn.Module, images: Tensor) -> Tensor:
    return torch.from_numpy(predict(model, images))


def apart(model: nn.Sequential, images: Tensor) -> Tensor:
    """Return each image's Euclidean distance to the boundary of a linear model of two classes."""
    w, b = (entry[1] - entry[0] for entry in (model[1].weight.detach(), model[1].bias.detach()))
    return (images.flatten(1) @ w + b).abs() / w.norm()


# What they share.


def test_margins_by_hand() -> None:
    logits = torch.tensor([[1.0, 4.0, 2.0], [3.0, 0.0, -1.0]])
    assert margins(logits, torch.tensor([0, 0])).tolist() == [3.0, -3.0]
    assert margins(logits, torch.tensor([1, 2])).tolist() == [-2.0, 4.0]


def test_the_sign_is_that_of_the_cross_entropy_gradient(trained: Trained) -> None:
    x = trained.images.double().requires_grad_(True)
    exact = copy.deepcopy(trained.model).double()
    (gradient,) = torch.autograd.grad(nn.functional.cross_entropy(exact(x), trained.labels, reduction="sum"), x)
    clear = gradient.abs() > 1e-9
    assert clear.float().mean() > 0.5
    assert torch.equal(
        ascent_sign(trained.model, trained.images, trained.labels)[clear], gradient.sign()[clear].float()
    )


def test_the_sign_does_not_vanish_where_the_model_is_sure() -> None:
    model, x = linear(scale=1e4), gray(3)
    y = label_of(model, x)
    loss = nn.functional.cross_entropy(model(x), y)
    assert loss == 0  # its own gradient would be 0, too
    assert (ascent_sign(model, x, y) != 0).all()


def test_rounding_keeps_to_grid_and_ball() -> None:
    x = gray(4)
    for eps in (0.5 / 255, 1 / 255, 8 / 255, 0.05):
        moved = (x + eps * (2 * torch.rand(x.shape, generator=rng(2)) - 1)).clamp(0, 1)
        rounded = to_grid_within(moved, x, eps)
        assert torch.equal(rounded, (rounded * 255).round().to(torch.uint8).float().div(255))
        assert (rounded - x).abs().max() <= eps + 1e-6
    full = to_grid_within(x + 8 / 255, x, 8 / 255)
    assert torch.allclose(full, x + 8 / 255)
    every = torch.arange(256, dtype=torch.uint8).float().div(255)
    assert torch.equal(to_grid(every), every)


def test_outcome_by_hand() -> None:
    """A model that says 1 where the first pixel is above 1/2."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(2, 2))
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([[0.0, 0.0], [2.0, 0.0]]))
        model[1].bias.copy_(torch.tensor([0.0, -1.0]))
    before = torch.tensor([[0.2, 0.0], [0.2, 0.0], [0.9, 0.0], [0.9, 0.0]]).reshape(4, 1, 1, 2)
    after = torch.tensor([[0.6, 0.3], [0.2, 0.1], [0.9, 0.0], [0.4, 0.0]]).reshape(4, 1, 1, 2)
    labels = torch.tensor([0, 0, 0, 1])
    notes = outcome(model, before, after, labels, predict(model, before))
    assert (notes["images"], notes["fooled"]) == (4, 2)
    assert notes["success_rate"] == 0.75
    assert notes["success_before"] == 0.25
    assert notes["mean_linf"] == pytest.approx((0.4 + 0.5) / 2)
    assert notes["mean_l2"] == pytest.approx((0.5 + 0.5) / 2)
    toward = outcome(model, before, after, labels, predict(model, before), target=1)
    assert (toward["images"], toward["fooled"]) == (3, 1)
    assert toward["success_rate"] == pytest.approx(2 / 3)
    none = outcome(model, before[:0], after[:0], labels[:0], np.empty(0, np.int64))
    assert none["success_rate"] is none["success_before"] is none["mean_l2"] is None


def test_every_trigger_attack_and_evasion_comes_out_of_the_package() -> None:
    from fedbd import attacks
    from fedbd.attacks import CW as FOUND
    from fedbd.attacks import BadNets, GridTrigger
    from fedbd.registry import METHODS

    assert FOUND is CW
    assert BadNets.__module__ == "fedbd.attacks.badnets"
    assert GridTrigger.__module__ == "fedbd.attacks.grid_trigger"
    assert len(dir(attacks)) == sum(len(METHODS[kind]) for kind in ("trigger", "attack", "evasion"))
    with pytest.raises(AttributeError, match=r"module 'fedbd\.attacks' has no attribute 'Nothing'"):
        _ = attacks.Nothing


@names
def test_the_model_and_the_input_stay_as_they_were(attack: Any, trained: Trained) -> None:
    model = copy.deepcopy(trained.model).train()
    model.get_submodule(next(name for name, _ in model.named_children())).eval()
    next(model.parameters()).requires_grad_(False)
    modes, flags = [m.training for m in model.modules()], [p.requires_grad for p in model.parameters()]
    state, given = copy.deepcopy(model.state_dict()), trained.images.clone()
    perturbed, _ = attack.perturb(model, trained.images[:20], trained.labels[:20], rng())
    assert [m.training for m in model.modules()] == modes
    assert [p.requires_grad for p in model.parameters()] == flags
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert torch.equal(trained.images, given)
    assert not perturbed.requires_grad
    # the mode that counts is eval: the same as on the model in eval mode
    assert torch.equal(perturbed, attack.perturb(trained.model, trained.images[:20], trained.labels[:20], rng())[0])


@names
def test_outputs_lie_on_the_grid_and_the_notes_are_those_of_the_outputs(attack: Any, trained: Trained) -> None:
    perturbed, notes = attack.perturb(trained.model, trained.images, trained.labels, rng())
    stored = (perturbed * 255).round().to(torch.uint8)
    assert torch.equal(stored.float().div(255), perturbed)
    wrong = predict(trained.model, stored) != trained.labels.numpy()
    assert notes["success_rate"] == wrong.mean()
    assert notes["success_rate"] > notes["success_before"]


@names
def test_the_batch_size_decides_nothing(attack: Any, trained: Trained) -> None:
    whole, _ = attack.perturb(trained.model, trained.images[:12], trained.labels[:12], rng())
    parts, _ = dataclasses.replace(attack, batch_size=5).perturb(
        trained.model, trained.images[:12], trained.labels[:12], rng()
    )
    # Sums of another order may turn a sign or a rounding here and there.
    assert (whole == parts).float().mean() > 0.95


@names
def test_works_where_gradients_are_off_and_on_no_images(attack: Any, trained: Trained) -> None:
    with torch.no_grad():
        _, notes = attack.perturb(trained.model, trained.images[:8], trained.labels[:8], rng())
    assert notes["fooled"] > 0
    empty, notes = attack.perturb(trained.model, trained.images[:0], trained.labels[:0], rng())
    assert empty.shape == (0, 1, 8, 8)
    assert notes["success_rate"] is None


@names
def test_refuses_bytes_and_diverged_models(attack: Any, trained: Trained) -> None:
    bytes_ = (trained.images * 255).to(torch.uint8)
    with pytest.raises(MethodRefused, match=r"float32 images in \[0, 1\], got torch.uint8"):
        attack.perturb(trained.model, bytes_, trained.labels, rng())
    with pytest.raises(MethodRefused, match=r"float32 images in \[0, 1\], got torch.float64"):
        attack.perturb(trained.model, trained.images.double(), trained.labels, rng())
    with pytest.raises(MethodRefused, match=r"hand it model.float\(\)"):
        attack.perturb(copy.deepcopy(trained.model).double(), trained.images, trained.labels, rng())
    for wrong in (99, -1):
        labels = trained.labels.clone()
        labels[-1] = wrong
        with pytest.raises(MethodRefused, match=r"the labels are .* and the model's classes 0 to"):
            attack.perturb(trained.model, trained.images, labels, rng())
    broken = copy.deepcopy(trained.model)
    torch.nn.init.constant_(next(iter(broken.parameters())), float("nan"))
    with pytest.raises(MethodRefused, match="has diverged"):
        attack.perturb(broken, trained.images, trained.labels, rng())


# FGSM.


@pytest.mark.parametrize("quantize", [True, False])
def test_fgsm_is_the_closed_form_on_a_linear_model(quantize: bool) -> None:
    model, x = linear(), gray(9)
    y = torch.arange(9) % 2
    w = model[1].weight.detach()
    toward = torch.stack([(w[1 - label] - w[label]).sign() for label in y.tolist()]).reshape(x.shape)
    found, _ = FGSM(eps=20 / 255, quantize=quantize).perturb(model, x, y, rng())
    assert torch.allclose(found, (x + 20 / 255 * toward).clamp(0, 1), atol=1e-6)
    clamped, _ = FGSM(eps=0.9, quantize=quantize).perturb(model, x, y, rng())
    assert set(clamped.unique().tolist()) == {0.0, 1.0}


# PGD.


def test_pgd_stays_in_ball_and_range_and_beats_fgsm(trained: Trained) -> None:
    for quantize in (True, False):
        eps = 20 / 255
        attack = PGD(eps=eps, alpha=4 / 255, quantize=quantize)
        found, notes = attack.perturb(trained.model, trained.images, trained.labels, rng())
        assert (found - trained.images).abs().max() <= eps + 1e-6
        assert 0 <= found.min() <= found.max() <= 1
        _, once = FGSM(eps=eps, quantize=quantize).perturb(trained.model, trained.images, trained.labels, rng())
        assert notes["success_rate"] >= once["success_rate"] > 0.1


def test_pgd_reaches_the_corner_of_the_ball_on_a_linear_model() -> None:
    """The worst point of a linear model in the ball is a corner, which 10 steps of a quarter of eps reach."""
    model, x = linear(), gray(6)
    w = (model[1].weight[1] - model[1].weight[0]).detach().sign().reshape(1, 1, SIDE, SIDE)
    found, _ = PGD(eps=8 / 255, alpha=2 / 255).perturb(model, x, torch.zeros(6, dtype=torch.int64), rng())
    assert torch.allclose(found, x + 8 / 255 * w, atol=1e-6)


def test_pgd_draws_its_start_from_the_generator_only(trained: Trained) -> None:
    attack = PGD(steps=1, alpha=1e-4, eps=8 / 255, quantize=False)
    runs = [attack.perturb(trained.model, trained.images, trained.labels, rng(seed))[0] for seed in (5, 5, 6)]
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])
    shift = runs[0] - trained.images
    inside = (trained.images > 8 / 255) & (trained.images < 1 - 8 / 255)
    assert abs(float(shift[inside].mean())) < 1 / 255  # uniform around the image, not to one side
    assert float(shift[inside].abs().mean()) == pytest.approx(4 / 255, rel=0.15)
    still = PGD(steps=1, alpha=1e-4, random_start=False, quantize=False)
    fixed = [still.perturb(trained.model, trained.images, trained.labels, rng(seed))[0] for seed in (5, 6)]
    assert torch.equal(*fixed)


# CW.


def test_cw_finds_the_distance_to_the_boundary_of_a_linear_model() -> None:
    model, x = linear(), gray(8)
    y = label_of(model, x)
    exact = apart(model, x)
    attack = CW(search_steps=8, iterations=150, lr=0.01, quantize=False)
    found, notes = attack.perturb(model, x, y, rng())
    length = (found - x).flatten(1).norm(dim=1)
    assert notes["success_rate"] == 1.0
    assert (length >= exact - 1e-4).all()
    assert (length <= 1.05 * exact + 1e-3).all()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scripted(CW):
    """CW whose descents succeed from a known c of each image on."""

    needed: tuple[float, ...] = ()
    tried: list[list[float]] = dataclasses.field(default_factory=list)

    def _descend(self, model: nn.Module, images: Tensor, labels: Tensor, c: Tensor, best: Any, nearest: Any) -> Tensor:
        self.tried.append(c.tolist())
        return c >= torch.tensor(self.needed)


def test_cw_searches_c_by_tens_then_by_halves() -> None:
    """By hand, for images that need c = 3, c = 0.07 (the first c does), and one that no c fools."""
    attack = Scripted(search_steps=7, initial_c=0.1, needed=(3.0, 0.07, 1e30))
    attack.perturb(linear(), gray(3), torch.zeros(3, dtype=torch.int64), rng())
    first, second, never = (list(column) for column in zip(*attack.tried, strict=True))
    assert first == pytest.approx([0.1, 1, 10, 5.5, 3.25, 2.125, 2.6875])
    assert second == pytest.approx([0.1, 0.05, 0.075, 0.0625, 0.06875, 0.071875, 0.0703125])
    assert never == pytest.approx([0.1, 1, 10, 100, 1e3, 1e4, 1e5])


def test_cw_on_the_grid_still_succeeds_and_pays_for_it() -> None:
    model, x = linear(), gray(8)
    y = label_of(model, x)
    found, notes = CW(search_steps=6, iterations=100, lr=0.02).perturb(model, x, y, rng())
    assert notes["success_rate"] == 1.0
    length = (found - x).flatten(1).norm(dim=1)
    assert (length >= apart(model, x) - 1e-4).all()
    # rounding moves each pixel by half a step at most
    assert (length <= 1.1 * apart(model, x) + 0.5 / 255 * SIDE).all()


def test_cw_confidence_is_the_lead_of_the_wrong_class() -> None:
    model, x = linear(), gray(8)
    y = label_of(model, x)
    w = (model[1].weight[1] - model[1].weight[0]).detach()
    attack = CW(confidence=3.0, search_steps=7, iterations=120, lr=0.02, quantize=False)
    found, notes = attack.perturb(model, x, y, rng())
    assert notes["success_rate"] == 1.0
    assert (margins(model(found), y) >= 3.0).all()
    exact = apart(model, x) + 3.0 / w.norm()
    assert ((found - x).flatten(1).norm(dim=1) <= 1.1 * exact + 1e-3).all()


def test_cw_leaves_what_is_wrong_already_or_cannot_be_fooled() -> None:
    model, x = linear(), gray(6)
    wrong = 1 - label_of(model, x)
    found, notes = CW(iterations=5, search_steps=2).perturb(model, x, wrong, rng())
    assert torch.equal(found, x)
    assert (notes["success_rate"], notes["success_before"], notes["fooled"]) == (1.0, 1.0, 0)
    stubborn = linear(scale=0.0)
    with torch.no_grad():
        stubborn[1].bias.copy_(torch.tensor([5.0, 0.0]))
    found, notes = CW(iterations=5, search_steps=3).perturb(stubborn, x, torch.zeros(6, dtype=torch.int64), rng())
    assert torch.equal(found, x)
    assert notes["success_rate"] == 0.0


def test_cw_toward_a_target(trained: Trained) -> None:
    attack = CW(target=4, search_steps=4, iterations=60)
    found, notes = attack.perturb(trained.model, trained.images[:30], trained.labels[:30], rng())
    own = trained.labels[:30] == 4
    assert own.any()
    assert torch.equal(found[own], trained.images[:30][own])
    assert notes["images"] == int((~own).sum())
    hit = predict(trained.model, found)[~own.numpy()] == 4
    assert notes["success_rate"] == hit.mean()
    assert notes["success_rate"] > 0.9
    with pytest.raises(MethodRefused, match="target is 10 and the model has 10 classes"):
        CW(target=10).perturb(trained.model, trained.images, trained.labels, rng())


def test_cw_is_nearer_than_fgsm(trained: Trained) -> None:
    _, once = FGSM(eps=60 / 255).perturb(trained.model, trained.images[:30], trained.labels[:30], rng())
    _, best = CW(search_steps=4, iterations=60).perturb(trained.model, trained.images[:30], trained.labels[:30], rng())
    assert best["success_rate"] >= once["success_rate"]
    assert best["mean_l2"] < once["mean_l2"]
