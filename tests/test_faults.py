"""Who fails how in which round: a pure function of the scenario, shared by a run and its twin."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from typing import Any, get_args, get_type_hints

import numpy as np

from fedbd.config.plans import FAULT_STAGES, FaultPlan
from fedbd.config.run_text import message_text
from fedbd.config.scenario import Scenario, fingerprint, from_dict, to_dict, twin_of
from fedbd.faults import chosen, fault_of, simulated
from fedbd.roles import assignment, draw_cohort

ATTACK = {"name": "badnets", "clients": {"count": 5}, "target": 0, "trigger": "grid"}


def scenario(*faults: dict[str, Any], **fields: Any) -> Scenario:
    raw = {"name": "f", "rounds": 50, "data": "digits", "model": "mlp", "partition": {"name": "iid", "clients": 20}}
    return from_dict({**raw, "engine": {"timeout": 5}, "faults": list(faults), **fields})


def failing(s: Scenario, round_: int, stage: Any = "train") -> set[int]:
    return {client for client in range(s.partition.clients) if fault_of(s, round_, client, stage) is not None}


def test_every_kind_has_its_stages() -> None:
    assert set(get_args(get_type_hints(FaultPlan)["kind"])) == set(FAULT_STAGES)
    assert all("train" in stages for stages in FAULT_STAGES.values())


def test_listed_clients_fail_in_their_rounds_and_nobody_else() -> None:
    s = scenario({"kind": "raise", "clients": {"ids": [3, 7]}, "rounds": {"first": 2, "last": 4}})
    assert [failing(s, round_) for round_ in (1, 2, 3, 4, 5)] == [set(), {3, 7}, {3, 7}, {3, 7}, set()]
    assert fault_of(s, 3, 3, "train") == "raise"
    assert fault_of(s, 3, 3, "decrypt") is None


def test_a_share_is_drawn_once_for_all_rounds_and_from_the_seed() -> None:
    plan = {"kind": "nan", "clients": {"share": 0.2}}
    s = scenario(plan)
    assert {frozenset(failing(s, round_)) for round_ in range(1, 51)} == {chosen(s, 0)}
    assert len(chosen(s, 0)) == 4
    assert len({chosen(scenario(plan, seed=seed), 0) for seed in range(20)}) > 10
    # The draw, worked out again: the purpose's hash seeds PCG64, which chooses without replacement.
    seed = int.from_bytes(hashlib.sha256(b"0/faults/0").digest()[:8], "big") >> 1
    expected = np.random.Generator(np.random.PCG64(seed)).choice(20, 4, replace=False)
    assert chosen(s, 0) == set(expected.tolist())


def test_a_probability_is_drawn_per_round_and_client() -> None:
    s = scenario({"kind": "vanish", "clients": {"share": 1.0}, "probability": 0.3})
    times = Counter(client for round_ in range(1, 51) for client in failing(s, round_))
    # 1,000 independent draws: 300 expected, 14.5 is one standard deviation.
    assert 240 < sum(times.values()) < 360
    assert len(times) == 20
    assert max(times.values()) < 35  # nobody fails always: 15 expected, 3.2 is one standard deviation
    assert len({frozenset(failing(s, round_)) for round_ in range(1, 51)}) > 45


def test_two_plans_draw_apart_and_the_first_listed_wins() -> None:
    s = scenario(
        {"kind": "raise", "clients": {"share": 0.5}, "probability": 0.5},
        {"kind": "nan", "clients": {"share": 0.5}, "probability": 0.5},
    )
    assert chosen(s, 0) != chosen(s, 1)
    both = scenario({"kind": "raise", "clients": {"ids": [1]}}, {"kind": "nan", "clients": {"ids": [1, 2]}})
    assert (fault_of(both, 1, 1, "train"), fault_of(both, 1, 2, "train")) == ("raise", "nan")


def test_faults_change_no_other_draw() -> None:
    without = scenario(attacks=[ATTACK], cohort={"size": 6})
    with_faults = scenario({"kind": "raise", "clients": {"share": 0.5}}, attacks=[ATTACK], cohort={"size": 6})
    assert assignment(without).keys() == assignment(with_faults).keys()
    assert all(draw_cohort(without, round_) == draw_cohort(with_faults, round_) for round_ in range(1, 20))


def test_the_twin_has_the_same_faults_and_the_encryption_that_they_act_on() -> None:
    plan = {"kind": "raise", "clients": {"share": 0.5}, "probability": 0.5}
    late = {**plan, "stage": "decrypt"}
    s = scenario(plan, late, attacks=[ATTACK], secure_sum="ckks")
    twin = twin_of(s)
    assert twin.faults == s.faults
    assert twin.secure_sum == s.secure_sum
    for round_ in range(1, 20):
        for stage in ("train", "decrypt"):
            assert failing(twin, round_, stage) == failing(s, round_, stage) != set()
    assert twin_of(scenario(attacks=[ATTACK], secure_sum="ckks")).secure_sum is None


def test_the_fingerprint_counts_faults_and_is_what_it_was_without() -> None:
    plan = {"kind": "raise", "clients": {"ids": [1]}}
    prints = [fingerprint(scenario(*plans)) for plans in ((), (plan,), ({**plan, "probability": 0.5},), (plan, plan))]
    assert len(set(prints)) == 4
    assert from_dict(to_dict(scenario(plan))) == scenario(plan)


def test_a_message_without_faults_is_as_long_as_before_and_one_with_them_can_be_read() -> None:
    assert "faults" not in message_text(scenario())
    with_faults = scenario({"kind": "hang", "clients": {"ids": [1]}})
    read = from_dict(json.loads(message_text(with_faults)))
    assert read.faults == with_faults.faults
    slow = scenario({"kind": "hang", "clients": {"ids": [1]}}, engine={"timeout": 600, "workers": 3})
    assert message_text(slow) == message_text(with_faults)  # no engine changes a byte of it


def test_what_is_recorded_is_what_was_acted_out() -> None:
    s = scenario(
        {"kind": "extra_metric", "clients": {"ids": [0, 1]}},
        {"kind": "raise", "clients": {"ids": [2]}},
        {"kind": "garbage", "clients": {"ids": [0, 2]}, "stage": "encrypt"},
        {"kind": "wrong_shape", "clients": {"ids": [1, 3]}, "stage": "decrypt"},
        secure_sum="ckks",
    )
    assert simulated(s, 1, (0, 1, 2, 4), asked=(1, 4)) == {
        0: {"train": "extra_metric", "encrypt": "garbage"},
        1: {"train": "extra_metric", "decrypt": "wrong_shape"},
        2: {"train": "raise"},  # it never came to encrypt
    }
    assert simulated(s, 1, (4, 5), asked=(4, 5)) == {}
