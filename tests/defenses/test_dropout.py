"""Methods that train a model with Dropout: their generator decides, and the caller's global state is left alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fedbd.defenses.aggregation.masa import MASA
from fedbd.defenses.cleanup.channel_masks import recover_masks
from fedbd.defenses.cleanup.fine_pruning import FinePruning
from fedbd.defenses.cleanup.finetune import FineTune
from fedbd.defenses.cleanup.nad import NAD
from fedbd.defenses.cleanup.trigger_search import search
from fedbd.defenses.cleanup.unlearning import unlearn
from fedbd.defenses.detection.abl_isolation import ABLIsolation
from fedbd.defenses.local.abl import ABL
from fedbd.defenses.local.abl_central import ABLCentral
from fedbd.errors import MethodRefused
from fedbd.params import assign, flatten
from fedbd.training import TrainingPlan, train
from fedbd.types import Clues, Cohort, Samples, TrustedData

PLAN = TrainingPlan(epochs=2, batch_size=8, lr=0.05)
Act = Callable[[nn.Module, Samples, torch.Generator], Any]


class Net(nn.Module):
    """A small network that forgets half of its features."""

    taps, maps, channels, classifier = ("relu",), "relu", "norm", "fc"

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.relu = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU()
        self.drop, self.fc = nn.Dropout(0.5), nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> Any:
        return self.fc(self.drop(self.relu(self.norm(self.conv(x))).mean((2, 3))))


def net() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Net()


def samples() -> Samples:
    images = torch.randint(0, 256, (20, 1, 8, 8), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    return Samples(images, torch.arange(20) % 2)


def cleaned(method: Any) -> Act:
    def act(model: nn.Module, data: Samples, rng: torch.Generator) -> Any:
        return flatten(method.clean(model, TrustedData(data, data, 2), Clues(), rng)[0])

    return act


def _train(model: nn.Module, data: Samples, rng: torch.Generator) -> Any:
    train(model, data, PLAN, rng)
    return flatten(model)


def _masa(model: nn.Module, data: Samples, rng: torch.Generator) -> Any:
    start = flatten(model)
    rows = 0.01 * np.random.default_rng(0).standard_normal((3, len(start))).astype(np.float32)

    def build(weights: Any) -> nn.Module:
        built = net()
        assign(built, weights)
        return built

    cohort = Cohort(
        updates=rows,
        mean=rows.mean(0),
        weights=np.ones(3),
        clients=3,
        ids=None,
        global_weights=start,
        trusted=TrustedData(data, data, 2),
        build=build,
    )
    return np.array(MASA(unlearn_epochs=1, batch_size=8).aggregate(cohort, {}, rng)[2]["losses"])


def _abl(model: nn.Module, data: Samples, rng: torch.Generator) -> Any:
    memory: Any = {}
    for _ in range(2):
        memory, _ = ABL(isolate_after=1, confidence=None, unlearn_epochs=1).fit(model, data, PLAN, memory, rng)
    return flatten(model)


def _abl_central(model: nn.Module, data: Samples, rng: torch.Generator) -> Any:
    ABLCentral(tuning_epochs=1, finetune_epochs=1, unlearn_epochs=1, batch_size=8, ratio=0.1).fit(model, data, rng)
    return flatten(model)


def _abl_isolation(model: nn.Module, data: Samples, rng: torch.Generator) -> Any:
    return ABLIsolation(tune_epochs=1, batch_size=8).score(model, data, None, rng)[0]


def _masks(model: nn.Module, data: Samples, rng: torch.Generator) -> Any:
    return np.concatenate(list(recover_masks(model, data, PLAN, 1.0, rng, "rnp").values()))


ACTS: dict[str, Act] = {
    "train": _train,
    "abl": _abl,
    "abl central": _abl_central,
    "abl isolation": _abl_isolation,
    "finetune": cleaned(FineTune(epochs=1, batch_size=8)),
    "fine_pruning": cleaned(FinePruning(epochs=1, batch_size=8)),
    "nad": cleaned(NAD(epochs=1, teacher_epochs=1, batch_size=8, betas=(1.0,))),
    "unlearn": lambda model, data, rng: flatten(unlearn(model, data, PLAN, 0.0, rng).model),
    "recover masks": _masks,
    "masa": _masa,
}


def act(name: str, seed: int) -> Any:
    """Do it with the global state at ``seed``, which must be where it was afterwards."""
    torch.manual_seed(seed)
    before = torch.get_rng_state()
    found = ACTS[name](net(), samples(), torch.Generator().manual_seed(3))
    assert torch.equal(torch.get_rng_state(), before)
    return found


@pytest.mark.parametrize("name", ACTS)
def test_the_generator_alone_decides(name: str) -> None:
    with torch.random.fork_rng():
        np.testing.assert_array_equal(act(name, 1), act(name, 2))


def test_dropout_is_at_work_and_another_generator_drops_others() -> None:
    plain = net()
    plain.drop = nn.Identity()
    kept, one = _train(plain, samples(), torch.Generator().manual_seed(3)), act("train", 1)
    assert not np.array_equal(kept, one)
    still = TrainingPlan(epochs=1, batch_size=20, lr=0.05)  # one batch: the order of the samples is no matter
    two, other = net(), net()
    train(two, samples(), still, torch.Generator().manual_seed(3))
    train(other, samples(), still, torch.Generator().manual_seed(4))
    assert not np.allclose(flatten(two), flatten(other), atol=1e-4)


@pytest.mark.parametrize("name", ACTS)
def test_gradients_are_computed_whatever_the_callers_mode(name: str) -> None:
    with torch.random.fork_rng():
        expected = act(name, 1)
        with torch.no_grad():
            np.testing.assert_array_equal(act(name, 1), expected)
        with torch.inference_mode(), pytest.raises(MethodRefused, match="call it outside"):
            act(name, 1)


def test_a_trigger_is_searched_whatever_the_callers_mode() -> None:
    def found() -> torch.Tensor:
        rng = torch.Generator().manual_seed(3)
        return search(net(), samples(), 0, passes=2, batch_size=8, lr=0.1, success=0.9, rng=rng).trigger.mask

    with torch.no_grad():
        quiet = found()
    assert torch.equal(quiet, found())
    with torch.inference_mode(), pytest.raises(MethodRefused, match="call it outside"):
        found()


def test_a_resumed_training_drops_what_the_whole_one_does() -> None:
    method = ABLCentral(tuning_epochs=1, finetune_epochs=2, unlearn_epochs=1, batch_size=8, ratio=0.1)
    data, rng = samples(), torch.Generator().manual_seed(3)
    states, weights = [], []

    def keep(state: Any) -> None:
        states.append(state)
        weights.append(flatten(whole))

    whole, rest = net(), net()
    method.fit(whole, data, rng, on_epoch=keep)
    assign(rest, weights[1], {name: entry.numpy() for name, entry in whole.named_buffers() if "num" in name})
    method.fit(rest, data, torch.Generator().manual_seed(99), state=states[1])
    np.testing.assert_array_equal(flatten(rest), flatten(whole))
