"""What becomes of BatchNorm, over whole runs: what travels, what stays, what is evaluated, on every engine the same."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import RecordDict
from torch import nn

from fedbd.central.subject import Asked, load_subject
from fedbd.config.scenario import Scenario, from_dict
from fedbd.defenses.cleanup.channel_masks import recalibrate
from fedbd.flower.arrays import pack_all, payload_bytes
from fedbd.metrics import accuracy
from fedbd.models.checkpoint import load_checkpoint, save_safetensors
from fedbd.params import assign, flatten, sha256
from fedbd.prepared import Prepared, prepare
from fedbd.records.record import same_records
from fedbd.roles import draw_cohort
from fedbd.running.runs import RunResult, run
from fedbd.seeding import torch_rng
from fedbd.training import train

RAW: dict[str, Any] = {
    "name": "norms",
    "seed": 4,
    "rounds": 3,
    "data": {"name": "digits"},
    "partition": {"name": "dirichlet", "alpha": 0.5, "clients": 3},
    "trusted": {"size": 60},
    "model": {"name": "cnn", "width": 4},
    "training": {"epochs": 1, "batch_size": 64, "lr": 0.05},
    "cohort": {"size": 2},
    "evaluation": {"twin": False},
    "engine": {"executor": "serial"},
}
ATTACK = {"name": "badnets", "clients": {"ids": [1]}, "target": 0, "trigger": {"name": "grid"}}
CKKS = {"secure_sum": {"name": "ckks"}}


def scenario(policy: str, **fields: Any) -> Scenario:
    return from_dict({**RAW, "batch_norm": policy, **fields})


def model_of(result: RunResult, prepared: Prepared) -> nn.Module:
    model = prepared.new_model()
    load_checkpoint(model, result.path / "model.safetensors")
    return model.eval()


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained model with statistics of its own."""
    prepared = prepare(scenario("average"))
    model = prepared.new_model()
    train(model, prepared.federation.client(0), prepared.scenario.training, torch.Generator().manual_seed(0))
    file = tmp_path_factory.mktemp("start") / "model.safetensors"
    save_safetensors(model, file)
    return file


def fedbn(prepared: Prepared, start: nn.Module) -> tuple[nn.Module, dict[int, nn.Module]]:
    """FedBN written down as its algorithm 1: one whole model per client, everything but BatchNorm averaged."""
    own = {client: copy.deepcopy(start) for client in range(3)}
    center = copy.deepcopy(start)
    names = [name for name, _ in center.named_parameters() if ".bn." not in name]
    for round_ in (1, 2, 3):
        cohort = draw_cohort(prepared.scenario, round_)
        for client in cohort:
            with torch.no_grad():
                for name in names:
                    own[client].get_parameter(name).copy_(center.get_parameter(name))
            rng = torch_rng(prepared.scenario.seed, "train", round_, client)
            train(own[client], prepared.federation.client(client), prepared.scenario.training, rng)
        with torch.no_grad():
            for name in names:
                center.get_parameter(name).copy_(sum(own[client].get_parameter(name) for client in cohort) / 2)
    return center, own


@pytest.mark.parametrize("begin", ["fresh", "checkpoint"])
def test_local_is_fedbn(begin: str, start: Path, tmp_path: Path) -> None:
    fields = {} if begin == "fresh" else {"start": {"checkpoint": str(start)}}
    made = scenario("local", **fields)
    prepared = prepare(made)
    result = run(made, tmp_path)
    torch.set_num_threads(1)
    begun = prepared.start_model()
    center, own = fedbn(prepared, begun)
    served = model_of(result, prepared)
    for name, entry in served.named_parameters():
        if ".bn." in name:  # the start's scales and shifts
            assert torch.equal(entry, begun.get_parameter(name))
        else:
            assert torch.allclose(entry, center.get_parameter(name), atol=1e-5)
    recalibrate(center, prepared.federation.trusted.fit)
    for name, entry in served.named_buffers():
        if entry.is_floating_point():  # statistics of the trusted data
            assert torch.allclose(entry, center.get_buffer(name), rtol=1e-4, atol=1e-5)
    last = result.rounds[-1]
    assert last["clean_accuracy"] == accuracy(served, prepared.dataset.test)
    assert last["weights_sha256"] == sha256(flatten(served))
    moved = own[draw_cohort(made, 3)[0]].state_dict()["block1.bn.running_mean"]
    assert not torch.allclose(moved, served.state_dict()["block1.bn.running_mean"], atol=1e-3)


def test_local_sends_no_batch_norm(tmp_path: Path) -> None:
    averaged, local = run(scenario("average"), tmp_path / "a"), run(scenario("local"), tmp_path / "b")
    model = prepare(scenario("average")).new_model()
    entries = {name: entry.numpy() for name, entry in model.state_dict().items() if ".bn." in name}
    spared = payload_bytes(RecordDict({"arrays": pack_all(entries)}))
    assert spared > 4 * 3 * 28
    for one, other in zip(averaged.rounds[1:], local.rounds[1:], strict=True):
        assert one["bytes_up"] - other["bytes_up"] == 2 * spared
    assert averaged.rounds[-1]["weights_sha256"] != local.rounds[-1]["weights_sha256"]


@pytest.mark.parametrize("policy", ["local", "group_norm"])
def test_every_engine_and_encryption_give_the_same_records(policy: str, tmp_path: Path) -> None:
    fields: dict[str, Any] = {"attacks": [ATTACK], "rounds": 2, "start": {"warm_up": 1}}
    reference = run(scenario(policy, **fields), tmp_path / "serial")
    workers = run(scenario(policy, **fields, engine={"workers": 2}), tmp_path / "workers")
    assert same_records(reference.path, workers.path) == []
    encrypted = run(scenario(policy, **fields, **CKKS, engine={"workers": 2}), tmp_path / "ckks")
    assert same_records(reference.path, encrypted.path, across_secure_sum=True) == []
    assert [line["bit_exact"] for line in encrypted.rounds[1:]] == [True, True]


@pytest.mark.flower
@pytest.mark.parametrize("engine", ["ray", "deployment"])
def test_flowers_engines_keep_a_clients_batch_norm(engine: str, tmp_path: Path) -> None:
    fields: dict[str, Any] = {"rounds": 3, "attacks": [ATTACK]}
    reference = run(scenario("local", **fields), tmp_path / "serial")
    other = run(scenario("local", **fields, engine={"name": engine, "workers": 2}), tmp_path / engine)
    assert same_records(reference.path, other.path) == []


def test_frozen_keeps_the_starts_batch_norm_whatever_is_sent(start: Path, tmp_path: Path) -> None:
    made = scenario("frozen", start={"checkpoint": str(start)}, strategy={"name": "fedadam"}, attacks=[ATTACK])
    prepared = prepare(made)
    served, begun = model_of(run(made, tmp_path), prepared), prepared.start_model()
    for name, entry in served.state_dict().items():
        assert torch.equal(entry, begun.state_dict()[name]) == (".bn." in name), name


def test_frozen_entries_are_those_of_every_batch_norm() -> None:
    made = scenario("frozen", start={"warm_up": 1})
    prepared = prepare(made)
    names = prepared.batch_norm_names
    assert len(names) == 15
    kept = prepared.whole(flatten(prepared.new_model()), {})
    assert np.array_equal(kept, flatten(prepared.new_model()))


def test_group_norm_trains_without_statistics_and_is_read_back(tmp_path: Path) -> None:
    made = scenario("group_norm")
    result = run(made, tmp_path)
    served = model_of(result, prepare(made))
    assert not any("running" in name for name in served.state_dict())
    assert result.rounds[-1]["clean_accuracy"] > result.rounds[0]["clean_accuracy"]
    problems: list[Any] = []
    subject = load_subject(Asked(checkpoint=result.path), problems)
    assert problems == []
    assert subject is not None
    assert accuracy(subject.model, subject.dataset.test) == result.rounds[-1]["clean_accuracy"]


def test_the_default_leaves_what_travels_and_the_fingerprint_as_they_were() -> None:
    from fedbd.config.run_text import message_text
    from fedbd.config.scenario import fingerprint

    assert "batch_norm" not in message_text(scenario("average"))
    assert fingerprint(scenario("average")) != fingerprint(scenario("group_norm"))
    weights = flatten(prepare(scenario("average")).new_model())
    prepared = prepare(scenario("average"))
    assert prepared.sent(weights) is weights
    assert prepared.whole(weights, {}) is weights
    model = prepared.new_model()
    assign(model, weights)
    assert prepared.own_entries(model) == {}
