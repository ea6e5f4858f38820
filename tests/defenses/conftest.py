from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn

from fedbd.attacks.badnets import BadNets
from fedbd.attacks.grid_trigger import GridTrigger
from fedbd.models.cnn import Cnn
from fedbd.training import TrainingPlan, train
from fedbd.types import AttackContext, Samples, TrustedData

TARGET = 0
NetBuilder = Callable[[int], nn.Module]


@dataclass(frozen=True)
class Backdoored:
    """A model with a backdoor, clean trusted data, clean and triggered test images (none of the target class)."""

    model: nn.Module
    trusted: TrustedData
    clean: Samples
    triggered: Samples


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def digits() -> Samples:
    raw = load_digits()
    order = torch.randperm(len(raw.target), generator=torch.Generator().manual_seed(0))
    images = torch.from_numpy(np.rint(raw.images * 255 / 16).astype(np.uint8))[order, None]
    return Samples(images.contiguous(), torch.from_numpy(raw.target.astype(np.int64))[order])


@pytest.fixture(scope="session")
def tiny_net() -> NetBuilder:
    return lambda seed: Cnn().build((1, 8, 8), 10, torch.Generator().manual_seed(seed))


@pytest.fixture(scope="session")
def context() -> AttackContext:
    return AttackContext(trigger=GridTrigger(), target=TARGET, classes=10, global_weights=np.zeros(1, np.float32))


@pytest.fixture(scope="session")
def backdoored(digits: Samples, tiny_net: NetBuilder, context: AttackContext) -> Backdoored:
    torch.set_num_threads(1)
    model = tiny_net(0)
    own = digits.subset(torch.arange(900))
    poisoned, _ = BadNets(share=0.1, per="dataset").pollute(own, context, torch.Generator().manual_seed(1))
    train(model, poisoned, TrainingPlan(epochs=10, lr=0.05, lr_step=7), torch.Generator().manual_seed(2))
    test = digits.subset(torch.arange(1300, 1797))
    victims = test.subset(torch.nonzero(test.labels != TARGET)[:, 0])
    stamped = GridTrigger().stamp(victims.images.float() / 255).mul(255).round().to(torch.uint8)
    trusted = TrustedData(
        fit=digits.subset(torch.arange(900, 1100)), validate=digits.subset(torch.arange(1100, 1300)), classes=10
    )
    return Backdoored(model.eval(), trusted, test, Samples(stamped, victims.labels))
