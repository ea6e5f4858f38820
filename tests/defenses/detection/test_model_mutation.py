from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from fedbd.defenses.detection import model_mutation
from fedbd.defenses.detection.model_mutation import GRID, ModelMutation, sprt_decision
from fedbd.defenses.detection.mutants import Mutants, split_before_linear
from fedbd.errors import MethodRefused, UserError
from fedbd.metrics import predict
from fedbd.models.cnn import Cnn
from fedbd.models.mlp import Mlp
from fedbd.models.mnistnet import MnistNet
from fedbd.models.wrn import Wrn
from fedbd.types import Samples, TrustedData


def generator(seed: int = 3) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def simulated(flips: list[bool]) -> tuple[bool, int, int]:
    """The test one mutant after the other: (sensitive, flips seen, mutants used)."""
    low, high = 0.0124 - 0.00124, 0.0124 + 0.00124
    seen = 0
    for number, flip in enumerate(flips, 1):
        ratio = seen * math.log(high / low) + (number - seen) * math.log((1 - high) / (1 - low))
        if flip:
            seen += 1
            if ratio >= math.log(0.95 / 0.05):
                return True, seen, number
            if ratio <= math.log(0.05 / 0.95):
                return False, seen, number
    return False, seen, len(flips)


def random_flips(mutants: int, inputs: int) -> np.ndarray:
    rng = np.random.default_rng(0)
    return rng.random((mutants, inputs)) < np.linspace(0, 0.6, inputs)


def test_the_constants_are_the_authors() -> None:
    assert pytest.approx(0.01116) == model_mutation.P0
    assert pytest.approx(0.01364) == model_mutation.P1
    assert pytest.approx(math.log(19)) == model_mutation.ACCEPT
    assert pytest.approx(-math.log(19)) == model_mutation.DENY
    assert pytest.approx(0.2007, abs=5e-5) == model_mutation.PER_FLIP
    assert pytest.approx(-0.00251, abs=5e-6) == model_mutation.PER_KEEP


@pytest.mark.parametrize("mutants", [100, 3000])
def test_the_decision_is_the_step_by_step_test(mutants: int) -> None:
    flips = random_flips(mutants, 150)
    flips[:, 1] = False
    flips[1500:, 1] = True  # long after the deny bound is crossed
    sensitive, used = sprt_decision(flips)
    assert 0 < sensitive.sum() < 150
    for i in range(150):
        wanted, _, number = simulated(flips[:, i].tolist())
        assert (bool(sensitive[i]), int(used[i])) == (wanted, number)
        alone = sprt_decision(flips[:, i])
        assert (bool(alone[0]), int(alone[1])) == (wanted, number)


@given(st.lists(st.booleans(), min_size=1, max_size=100) | st.sets(st.integers(0, 99), max_size=20))
def test_within_100_mutants_the_16th_or_a_late_17th_flip_decides(given_flips: list[bool] | set[int]) -> None:
    flips = [i in given_flips for i in range(100)] if isinstance(given_flips, set) else given_flips
    at = [number for number, flip in enumerate(flips, 1) if flip]
    sensitive, used = sprt_decision(np.array(flips))
    # 15 flips before this one and `number - 15` mutants that kept the label suffice up to this number.
    late = 15 + math.floor((15 * math.log(0.01364 / 0.01116) - math.log(19)) / math.log((1 - 0.01116) / (1 - 0.01364)))
    stop = at[15] if len(at) > 15 and at[15] <= late else at[16] if len(at) > 16 else None
    assert bool(sensitive) == (stop is not None)
    assert int(used) == (stop or len(flips))


def test_15_flips_never_suffice_and_17_always_do() -> None:
    for count, start, wanted in [(15, 0, False), (16, 0, True), (16, 84, False), (17, 83, True)]:
        flips = np.zeros(100, dtype=bool)
        flips[start : start + count] = True
        assert bool(sprt_decision(flips)[0]) is wanted


def slow_flips(model: nn.Module, data: Samples, noise: float, shift: bool, rng: torch.Generator, mutants: int) -> Any:
    """Every mutant a whole model, run from the images on."""
    rng = generator(int(torch.randint(2**63 - 1, (), generator=rng)))
    flips = []
    for _ in range(mutants):
        mutant = copy.deepcopy(model)
        for layer in mutant.modules():
            if isinstance(layer, nn.Linear):
                weight = layer.weight.detach()
                noisy = weight + weight.max() * noise * torch.randn(weight.shape, generator=rng)
                layer.weight.data = noisy + weight.mean() if shift else noisy
        flips.append(predict(mutant, data) != data.labels.numpy())
    return np.array(flips)


FAMILIES = [Cnn(width=4), Mlp(hidden=(20, 10)), MnistNet(), Wrn(depth=10)]


def incoming(model: nn.Module, count: int = 40) -> Samples:
    images = torch.randint(0, 256, (count, 1, 16, 16), generator=generator(1), dtype=torch.uint8)
    return Samples(images, torch.from_numpy(predict(model, images)))


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: type(family).__name__)
@pytest.mark.parametrize("shift", [True, False])
def test_scores_are_those_of_whole_mutants(family: Any, shift: bool) -> None:
    model = family.build((1, 16, 16), 10, generator()).eval()
    data = incoming(model)
    wanted = slow_flips(model, data, 0.4, shift, generator(5), 20)
    detector = ModelMutation(mutants=20, noise=0.4, mean_shift=shift)
    before = copy.deepcopy(model.state_dict())
    scores, notes = detector.score(model, data, None, generator(5))
    assert 0 < wanted.sum() < wanted.size
    assert np.array_equal(scores, -wanted.sum(0).astype(float))
    assert notes["mutated_from"] == "linear"
    assert notes["mean_flips"] == pytest.approx(wanted.sum(0).mean())
    assert all(torch.equal(entry, before[name]) for name, entry in model.state_dict().items())
    many, _ = ModelMutation(mutants=20, noise=0.4, mean_shift=shift, seeks="adversarial").score(
        model, data, None, generator(5)
    )
    assert np.array_equal(many, -scores)


def test_the_shift_matters_before_another_layer_and_not_in_the_last() -> None:
    for family, matters in [(Mlp(hidden=()), False), (Mlp(hidden=(20, 20)), True)]:
        model = family.build((1, 16, 16), 10, generator()).eval()
        with torch.no_grad():
            for layer in model.modules():
                if isinstance(layer, nn.Linear):
                    layer.weight.add_(0.02)
        data = incoming(model)
        shifted, plain = (
            ModelMutation(mutants=20, noise=0.3, mean_shift=shift).score(model, data, None, generator())[0]
            for shift in (True, False)
        )
        assert np.array_equal(shifted, plain) != matters


class Net(nn.Module):
    """Takes 1x16x16 images; ``how`` decides how its two layers are reached."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        torch.manual_seed(0)
        self.conv, self.hidden, self.fc = nn.Conv2d(1, 4, 3), nn.Linear(4, 4), nn.Linear(4, 10)

    def forward(self, x: Tensor) -> Tensor:
        mean = self.conv(x).relu().mean((2, 3))
        if self.how == "data" and float(mean.sum()) > 1e9:
            return mean
        out = self.hidden(mean) if self.how != "weight" else F.linear(mean, self.hidden.weight, self.hidden.bias)
        if self.how == "in place":
            out = mean.add_(out)
        elif self.how == "reordered":
            mean.mul_(-0.5)
            out = out + mean
        elif self.how == "two":
            out = out.relu() + x.mean((2, 3))
        result: Tensor = self.fc(out.relu())
        return result


@pytest.mark.parametrize(
    ("how", "start"),
    [
        ("chain", "linear"),
        ("weight", "linear"),
        ("in place", "linear"),
        ("data", "images"),
        ("two", "images"),
        ("reordered", "images"),
    ],
)
def test_a_model_that_cannot_be_split_is_run_whole_with_the_same_flips(how: str, start: str) -> None:
    model = Net(how).eval()
    data = incoming(model)
    wanted = slow_flips(model, data, 0.8, True, generator(5), 20)
    scores, notes = ModelMutation(mutants=20, noise=0.8).score(model, data, None, generator(5))
    assert wanted.any()
    assert np.array_equal(scores, -wanted.sum(0).astype(float))
    assert notes["mutated_from"] == start


def test_a_tail_that_works_in_place_leaves_what_it_was_given() -> None:
    model = Net("in place").eval()
    data = incoming(model)
    mutants = Mutants(model, 3, 0, True)
    inputs = mutants.inputs(data)
    given_before = inputs.clone()
    assert mutants.start == "linear"
    first = mutants.flips(inputs, data.labels.numpy(), 0.5)
    assert torch.equal(inputs, given_before)
    assert np.array_equal(first, mutants.flips(inputs, data.labels.numpy(), 0.5))


def test_the_two_halves_are_the_model() -> None:
    for family in FAMILIES:
        model = family.build((1, 16, 16), 10, generator()).eval()
        halves = split_before_linear(model)
        assert halves is not None
        x = torch.rand(3, 1, 16, 16, generator=generator())
        assert torch.equal(halves[1](halves[0](x)), model(x))
        with torch.no_grad():
            model.fc2.bias.add_(1) if isinstance(family, MnistNet) else model.fc.bias.add_(1)
        assert torch.equal(halves[1](halves[0](x)), model(x))
        assert not any(isinstance(module, nn.Linear) for module in halves[0].modules())


def test_what_is_far_from_the_boundary_flips_less() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(2, 2)).eval()
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([[1.0, -1.0], [-1.0, 1.0]]))
        model[1].bias.zero_()
    images = torch.tensor([[255, 0], [140, 110]], dtype=torch.uint8)[:, :, None, None]
    data = Samples(images, torch.zeros(2, dtype=torch.int64))
    scores, _ = ModelMutation(noise=0.5).score(model, data, None, generator())
    assert scores[0] > scores[1]
    scores, _ = ModelMutation(noise=0.5, seeks="adversarial").score(model, data, None, generator())
    assert scores[0] < scores[1]


@pytest.mark.parametrize(("seeks", "wanted"), [("backdoor", 0.9), ("adversarial", 0.05)])
def test_the_level_is_the_one_that_clean_data_ask_for(seeks: Any, wanted: float, backdoored: Any) -> None:
    clean = backdoored.trusted.validate
    clean = Samples(clean.images, torch.from_numpy(predict(backdoored.model, clean)))
    scores, notes = ModelMutation(seeks=seeks).score(backdoored.model, clean, backdoored.trusted, generator())
    place = GRID.index(notes["noise"])
    around = [place - 1, place] if seeks == "backdoor" else [place, place + 1]
    shares = []
    for level in around:
        flips = slow_flips(backdoored.model, clean, GRID[level], True, generator(), 100)
        shares.append(np.mean([simulated(column.tolist())[0] for column in flips.T]))
    low, high = shares
    assert low < wanted <= high if seeks == "backdoor" else low <= wanted < high
    assert notes["sensitive"] == pytest.approx(high if seeks == "backdoor" else low)
    assert {"noise": notes["noise"], "sensitive": notes["sensitive"]} in notes["levels"]
    assert len(scores) == len(clean)


def test_triggered_inputs_flip_less(backdoored: Any) -> None:
    images = torch.cat([backdoored.clean.images, backdoored.triggered.images])
    data = Samples(images, torch.from_numpy(predict(backdoored.model, images)))
    scores, _ = ModelMutation().score(backdoored.model, data, backdoored.trusted, generator())
    hot, cold = scores[len(backdoored.clean) :][:, None], scores[: len(backdoored.clean)][None]
    assert ((hot > cold) + 0.5 * (hot == cold)).mean() > 0.6


def test_it_refuses_what_it_cannot_do(backdoored: Any) -> None:
    detector = ModelMutation()
    assert detector.needs_trusted
    assert not ModelMutation(noise=0.5).needs_trusted
    assert detector.refusal(backdoored.model) is None
    assert "Linear" in (detector.refusal(nn.Conv2d(1, 1, 1)) or "")
    with pytest.raises(UserError, match="mutants: must be at least 17 where noise is null"):
        ModelMutation(mutants=16)
    with pytest.raises(UserError, match="clean_share: must be left out where noise is set"):
        ModelMutation(noise=1.0, clean_share=0.5)
    assert detector.problems() == ModelMutation(mutants=1, noise=1.0).problems() == []
    with pytest.raises(MethodRefused, match="Linear"):
        detector.score(nn.Flatten(), backdoored.clean, backdoored.trusted, generator())
    with pytest.raises(MethodRefused, match="trusted"):
        detector.score(backdoored.model, backdoored.clean, None, generator())
    flat = copy.deepcopy(backdoored.model)
    with torch.no_grad():
        flat.fc.weight.zero_()
    few = TrustedData(backdoored.trusted.fit, backdoored.trusted.validate.subset(torch.arange(20)), 10)
    with pytest.raises(MethodRefused, match="set noise"):
        detector.score(flat, backdoored.clean, few, generator())
