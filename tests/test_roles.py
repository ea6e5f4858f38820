from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chi2

from fedbd.config.scenario import AttackPlan, Scenario, from_dict, twin_of
from fedbd.roles import (
    active,
    assignment,
    attack_window,
    draw_cohort,
    locally_defended,
    members,
    planned_window,
    role_of,
    roles_in,
)
from fedbd.types import Role

MINIMAL: dict[str, Any] = {"name": "t", "rounds": 8, "data": {"name": "digits"}, "model": {"name": "mlp"}}


def attack(label: str, clients: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"name": "badnets", "label": label, "clients": clients, "target": 0, "trigger": {"name": "grid"}, **more}


def scenario(*attacks: dict[str, Any], clients: int = 20, seed: int = 3, **more: Any) -> Scenario:
    partition = {"name": "iid", "clients": clients}
    return from_dict({**MINIMAL, "seed": seed, "partition": partition, "attacks": list(attacks), **more})


def groups(s: Scenario) -> dict[str, set[int]]:
    found: dict[str, set[int]] = {plan.key: set() for plan in s.attacks}
    for client, plan in assignment(s).items():
        found[plan.key].add(client)
    return found


# Who belongs to which attack.


def test_the_same_scenario_gives_the_same_assignment_and_another_seed_another() -> None:
    s = scenario(attack("a", {"count": 5}), attack("b", {"count": 5}))
    assert groups(s) == groups(dataclasses.replace(s))
    assert len({frozenset(groups(dataclasses.replace(s, seed=seed))["a"]) for seed in range(20)}) > 15


@settings(max_examples=60, deadline=None)
@given(
    st.integers(6, 40),
    st.integers(0, 2**64),
    st.lists(st.sampled_from(["count", "share", "ids"]), min_size=1, max_size=3),
    st.data(),
)
def test_no_client_serves_two_attacks_and_each_gets_as_many_as_it_wants(
    clients: int, seed: int, kinds: list[str], data: st.DataObject
) -> None:
    each = clients // len(kinds)
    listed = data.draw(st.permutations(range(clients)))
    attacks = []
    for i, kind in enumerate(kinds):
        choice = {
            "count": {"count": data.draw(st.integers(1, each))},
            "share": {"share": data.draw(st.integers(1, each)) / clients},
            "ids": {"ids": listed[i * each : i * each + data.draw(st.integers(1, each))]},
        }
        attacks.append(attack(f"a{i}", choice[kind]))
    s = scenario(*attacks, clients=clients, seed=seed)
    found = groups(s)
    assert sum(len(group) for group in found.values()) == len(assignment(s))  # pairwise disjoint
    for plan in s.attacks:
        assert len(found[plan.key]) == members(plan, clients)
        assert found[plan.key] <= set(range(clients))
        if plan.clients.ids is not None:
            assert found[plan.key] == set(plan.clients.ids)


def test_listed_clients_are_never_drawn_by_an_attack_that_comes_first() -> None:
    for seed in range(30):
        s = scenario(attack("drawn", {"count": 3}), attack("listed", {"ids": [1, 2]}), clients=6, seed=seed)
        assert groups(s)["listed"] == {1, 2}
        assert groups(s)["drawn"] <= {0, 3, 4, 5}


def test_an_attack_that_is_added_at_the_end_leaves_the_others_as_they_were() -> None:
    alone = scenario(attack("a", {"count": 4}))
    both = scenario(attack("a", {"count": 4}), attack("b", {"count": 4}))
    assert groups(both)["a"] == groups(alone)["a"]


def test_nobody_is_assigned_without_attacks() -> None:
    assert assignment(scenario()) == {}


@pytest.mark.parametrize(
    ("share", "clients", "expected"),
    [
        (0.2, 10, 2),
        (0.25, 10, 2),
        (0.26, 10, 3),
        (0.35, 10, 4),
        (0.01, 10, 1),
        (1.0, 7, 7),
        (0.1, 100, 10),
        (0.07, 100, 7),
    ],
)
def test_a_share_is_rounded_and_is_at_least_one_client(share: float, clients: int, expected: int) -> None:
    s = scenario(attack("a", {"share": share}), clients=clients)
    assert members(s.attacks[0], clients) == expected == len(assignment(s))


# What they are in a round.


def test_attackers_act_in_their_window_only() -> None:
    s = scenario(attack("a", {"ids": [4]}, rounds={"first": 3, "last": 5}))
    assert [role_of(s.attacks[0], round_) for round_ in range(1, 8)] == [
        Role.HONEST,
        Role.HONEST,
        Role.ATTACKER,
        Role.ATTACKER,
        Role.ATTACKER,
        Role.HONEST,
        Role.HONEST,
    ]
    assert [active(s.attacks[0], round_) for round_ in (2, 3, 5, 6)] == [False, True, True, False]


def test_roles_of_a_round() -> None:
    s = scenario(
        attack("a", {"ids": [4]}),
        attack("p", {"ids": [5]}, role="polluted", per="dataset", rounds={"first": 2}),
        attack("off", {"ids": [6]}, enabled=False),
    )
    assert roles_in(s, 1, (3, 4, 5, 6)) == {3: Role.HONEST, 4: Role.ATTACKER, 5: Role.HONEST, 6: Role.HONEST}
    assert roles_in(s, 2, (3, 4, 5)) == {3: Role.HONEST, 4: Role.ATTACKER, 5: Role.POLLUTED}
    assert role_of(None, 2) is Role.HONEST


def test_the_attack_window_spans_what_enabled_attacks_do_within_the_run() -> None:
    first = attack("a", {"count": 1}, rounds={"first": 3, "last": 4})
    assert attack_window(scenario(first)) == (3, 4)
    assert attack_window(scenario(first, attack("b", {"count": 1}, rounds={"first": 6}))) == (3, 8)
    assert attack_window(scenario(first, attack("b", {"count": 1}, rounds={"first": 2, "last": 99}))) == (2, 8)
    assert attack_window(scenario(first, attack("b", {"count": 1}, enabled=False))) == (3, 4)
    assert attack_window(twin_of(scenario(first))) is None
    assert attack_window(scenario()) is None


def test_the_planned_window_is_the_same_for_a_run_and_its_twin() -> None:
    first = attack("a", {"count": 2}, rounds={"first": 3, "last": 4})
    assert planned_window(scenario(first)) == planned_window(twin_of(scenario(first))) == (3, 4)
    assert planned_window(scenario(first, attack("b", {"count": 1}, rounds={"first": 6}, enabled=False))) == (3, 8)
    assert planned_window(scenario()) is None


# Who takes part.


def test_a_cohort_is_a_pure_function_of_scenario_and_round() -> None:
    s = scenario(clients=50, cohort={"size": 7})
    forward = [draw_cohort(s, round_) for round_ in range(1, 30)]
    backward = [draw_cohort(s, round_) for round_ in range(29, 0, -1)]
    assert forward == backward[::-1]
    assert len(set(forward)) > 25
    for cohort in forward:
        assert list(cohort) == sorted(set(cohort))
        assert len(cohort) == 7
        assert set(cohort) <= set(range(50))
        assert all(type(client) is int for client in cohort)


def test_everybody_takes_part_by_default() -> None:
    assert draw_cohort(scenario(clients=6), 4) == (0, 1, 2, 3, 4, 5)


SPLIT = (
    attack("early", {"count": 4}, rounds={"first": 2, "last": 4}),
    attack("late", {"ids": [0, 1, 2]}, rounds={"first": 6}, role="polluted", per="dataset"),
)


def test_an_arm_and_its_twin_draw_the_same_cohorts_whatever_their_defenses() -> None:
    for cohort in ({"size": 5}, {"size": 5, "attackers_per_round": 2}):
        s = scenario(*SPLIT, cohort=cohort)
        defended = dataclasses.replace(
            s, aggregation=from_dict({**MINIMAL, "aggregation": "median"}).aggregation, server_rate=0.5
        )
        for round_ in range(1, 9):
            assert draw_cohort(s, round_) == draw_cohort(twin_of(s), round_) == draw_cohort(defended, round_)
        assert assignment(s).keys() == assignment(twin_of(s)).keys()


@pytest.mark.parametrize("fixed", [0, 1, 2, 3])
def test_so_many_attackers_take_part_in_each_round_of_their_window(fixed: int) -> None:
    for seed in range(25):
        s = scenario(*SPLIT, cohort={"size": 5, "attackers_per_round": fixed}, seed=seed)
        for arm in (s, twin_of(s)):
            belongs = assignment(arm)
            for round_ in (2, 3, 4, 6, 7, 8):
                cohort = draw_cohort(arm, round_)
                key = "early" if round_ < 5 else "late"
                assert sum(belongs[client].key == key for client in cohort if client in belongs) == fixed
                assert len(set(cohort)) == 5
        acting = [role for role in roles_in(s, 3, draw_cohort(s, 3)).values() if role is not Role.HONEST]
        assert len(acting) == fixed


def test_outside_of_every_window_attackers_come_as_they_are_drawn() -> None:
    s = scenario(*SPLIT, cohort={"size": 5, "attackers_per_round": 3})
    plain = scenario(*SPLIT, cohort={"size": 5})
    assert [draw_cohort(s, r) for r in (1, 5)] == [draw_cohort(plain, r) for r in (1, 5)]


# Are the draws fair? Seeds are fixed, so these never flicker; the bounds are two-sided: too even a draw fails as well.


def fair(counts: list[int], draws: int, size: int) -> bool:
    """Return whether clients were drawn equally often: chi-square, scaled for draws of ``size`` without replacement."""
    n = len(counts)
    p = size / n
    statistic = sum((count - draws * p) ** 2 for count in counts) / (draws * p * (1 - p)) * (n - 1) / n
    return bool(0.001 < chi2.cdf(statistic, n - 1) < 0.999)


def test_the_check_itself_can_fail() -> None:
    rng = np.random.default_rng(0)
    weights = np.ones(20) / 20
    weights[0] += 0.02
    weights[1:] -= 0.02 / 19
    skewed = Counter(int(c) for _ in range(2000) for c in rng.choice(20, 5, replace=False, p=weights))
    assert not fair([skewed[client] for client in range(20)], 2000, 5)
    assert not fair([500] * 20, 2000, 5)


def test_cohorts_are_drawn_evenly() -> None:
    s = scenario(cohort={"size": 5})
    counts = Counter(client for round_ in range(1, 2001) for client in draw_cohort(s, round_))
    assert fair([counts[client] for client in range(20)], 2000, 5)


def test_attackers_are_drawn_evenly_over_seeds() -> None:
    s = scenario(attack("a", {"count": 2}), attack("b", {"count": 3}))
    for key, size in (("a", 2), ("b", 3)):
        counts = Counter(client for seed in range(1000) for client in groups(dataclasses.replace(s, seed=seed))[key])
        assert fair([counts[client] for client in range(20)], 1000, size)


def test_cohorts_with_a_fixed_number_of_attackers_are_drawn_evenly_within_both_groups() -> None:
    s = dataclasses.replace(
        scenario(attack("a", {"ids": [0, 1, 2, 3, 4, 5]}), cohort={"size": 5, "attackers_per_round": 2}), rounds=2000
    )
    counts = Counter(client for round_ in range(1, 2001) for client in draw_cohort(s, round_))
    assert fair([counts[client] for client in range(6)], 2000, 2)
    assert fair([counts[client] for client in range(6, 20)], 2000, 3)


def test_whether_two_clients_meet_is_as_likely_as_it_should_be() -> None:
    s = scenario(clients=8, cohort={"size": 3})
    met: Counter[tuple[int, int]] = Counter()
    for round_ in range(1, 3001):
        cohort = draw_cohort(s, round_)
        met.update((a, b) for a in cohort for b in cohort if a < b)
    expected = 3000 * (3 * 2) / (8 * 7)
    assert len(met) == 28
    assert all(abs(count - expected) < 5 * expected**0.5 for count in met.values())


def test_an_attack_plan_is_what_the_assignment_returns() -> None:
    plans = set(map(id, assignment(scenario(attack("a", {"count": 3}))).values()))
    assert len(plans) == 1
    assert all(isinstance(plan, AttackPlan) for plan in assignment(scenario(attack("a", {"count": 3}))).values())


# Who runs the local defense.


def defended(chosen: dict[str, Any] | None, *attacks: dict[str, Any], seed: int = 3) -> frozenset[int]:
    return locally_defended(scenario(*attacks, seed=seed, local_defense={"name": "abl"}, local_defense_clients=chosen))


def test_the_local_defense_is_run_by_all_or_by_those_who_are_chosen() -> None:
    assert locally_defended(scenario()) == frozenset()
    assert defended(None) == frozenset(range(20))
    assert defended({"ids": [3, 5]}) == {3, 5}
    assert len(defended({"count": 7})) == 7
    assert len(defended({"share": 0.25})) == 5
    assert defended({"share": 1.0}) == frozenset(range(20))


def test_the_draw_of_defended_clients_comes_from_the_seed_and_not_from_the_attacks() -> None:
    chosen = {"count": 6}
    assert defended(chosen) == defended(chosen, attack("a", {"count": 5}), attack("b", {"ids": [1, 2]}))
    assert len({defended(chosen, seed=seed) for seed in range(20)}) > 15
    attacked = frozenset(client for client in assignment(scenario(attack("a", {"count": 6}))))
    assert defended(chosen) != attacked  # a draw of its own, not the attackers' once more
