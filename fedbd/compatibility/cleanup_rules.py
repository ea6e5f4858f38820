"""Cleanups: when they run, what they find and repair, what comes back. Rules of ``fedbd.compatibility``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from fedbd.compatibility.attack_rules import attackers_fit
from fedbd.config.scenario import Scenario, with_open_windows
from fedbd.defenses.trusted_data import fewest_trusted, needs_trusted
from fedbd.errors import Problem
from fedbd.registry import either
from fedbd.targets import ALL_TO_ALL, Target

GIVERS = {
    "unlearned": ["rnp", "rnp_label"],
    "recovered": ["rnp"],
    "target": ["rnp", "rnp_label"],
    "trigger": ["trigger_recovery"],
}
"""Clue -> the registered cleanups that find it."""

TARGET_REMEDY = "leave it out and put rnp_label before it, or set labels: all"

CONTROLS = ("none", "twin")
"""What the re-learning test calls its controls, beside the cleanups' labels."""


def guards_run(s: Scenario) -> Iterator[Problem]:
    """Cleanups and detectors run in some round."""
    for path, plan in s.guards:
        late = [round_ for round_ in plan.rounds or () if round_ > s.rounds]
        if late:
            expected = f"must be rounds of the run (1 to {s.rounds})"
            yield Problem(path=f"{path}.rounds", expected=expected, got=", ".join(map(str, late)))
        elif plan.rounds is None and plan.every > s.rounds:
            expected = f"must be <= rounds ({s.rounds}), or '{plan.key}' never runs"
            yield Problem(path=f"{path}.every", expected=expected, got=str(plan.every))


def one_timetable(s: Scenario) -> Iterator[Problem]:
    """Cleanups and detectors run every so many rounds, or in the rounds that are named; not both."""
    for path, plan in s.guards:
        if plan.rounds is not None and plan.every != 1:
            expected = "must be left out where rounds names the rounds: these alone count"
            yield Problem(path=f"{path}.every", expected=expected, got=str(plan.every))


def repairs_act(s: Scenario) -> Iterator[Problem]:
    """Fields of a cleanup that would do nothing are refused."""
    for i, plan in enumerate(s.cleanup):
        path = f"cleanup[{i}]"
        if plan.mode == "if_stopped_now":
            for field, default in (("rollback", 0.1), ("mask", "release"), ("server_optimizer_state", "keep")):
                if getattr(plan, field) not in (default, None):  # rollback: null says the same
                    expected = f"must be {default} unless mode is in_loop: the federation goes on without the copy"
                    yield Problem(path=f"{path}.{field}", expected=expected, got=repr(getattr(plan, field)))
        elif plan.server_optimizer_state == "reset" and s.strategy.name in ("fedavg", "fedprox"):
            expected = f"must be keep with {s.strategy.name}, which keeps neither momentum nor moments"
            yield Problem(path=f"{path}.server_optimizer_state", expected=expected, got="'reset'")
        if plan.mode == "in_loop" and plan.rollback is not None and s.trusted is None:
            expected = "must be null without trusted data: a repair is rolled back by their accuracy"
            remedy = "add trusted: {size: 500}, or set rollback: null and keep every repair"
            yield Problem(path=f"{path}.rollback", expected=expected, got=repr(plan.rollback), remedy=remedy)
        if plan.mode == "in_loop" and plan.mask == "persist" and not getattr(plan.method.impl, "prunes", False):
            expected = f"must be release: '{plan.method.name}' prunes nothing"
            yield Problem(path=f"{path}.mask", expected=expected, got="'persist'")
        if plan.mode == "in_loop" and not getattr(plan.method.impl, "repairs", True):
            expected = f"must be if_stopped_now: '{plan.method.name}' repairs nothing, it only finds clues"
            yield Problem(path=f"{path}.mode", expected=expected, got="'in_loop'")
        oracle = getattr(plan.method.impl, "oracle", False)
        if oracle and not s.attacks:
            expected = "must be false where there is no attack to know of"
            yield Problem(path=f"{path}.oracle", expected=expected, got="true")
        elif oracle and getattr(plan.method.impl, "needs_label", False) and s.attacks[0].target == ALL_TO_ALL:
            expected = f"must be false: '{plan.method.name}' is told one target label, and {ALL_TO_ALL} has none"
            remedy = "leave the cleanup out, or give the first attack a label as its target"
            yield Problem(path=f"{path}.oracle", expected=expected, got="true", remedy=remedy)


def no_target_told(s: Scenario) -> Iterator[Problem]:
    """No cleanup is told the label that an attack aims at: that would be an oracle, and not marked as one."""
    for i, plan in enumerate(s.cleanup):
        told = told_target(plan.method.impl, [attack.target for attack in s.attacks])
        if told is not None:
            expected = "must not be the label that an attack aims at, which no defender knows"
            yield Problem(path=f"cleanup[{i}].target", expected=expected, got=str(told), remedy=TARGET_REMEDY)


def told_target(method: object, targets: Sequence[Target | None]) -> int | None:
    """Return the ``target`` that a method names where an attack has it, too, None where none does."""
    named = getattr(method, "target", None)
    return named if isinstance(named, int) and named in targets else None


def clues_come_first(s: Scenario) -> Iterator[Problem]:
    """What a cleanup takes from another one is found before it, in every round in which it runs."""
    for i, plan in enumerate(s.cleanup):
        clue = getattr(plan.method.impl, "needs_clue", None)
        if clue is None:
            continue
        givers = [other for other in s.cleanup[:i] if clue in getattr(other.method.impl, "gives_clues", ())]
        lacking = [r for r in range(1, s.rounds + 1) if plan.due(r) and not any(other.due(r) for other in givers)]
        if lacking:
            yield Problem(
                path=f"cleanup[{i}]",
                expected=f"'{plan.method.name}' uses the {clue} that a cleanup before it finds, and none does in round "
                f"{lacking[0]}",
                remedy=f"put {either(GIVERS.get(clue, ['one that does']))} before it, in the same rounds",
            )


def trusted_there(s: Scenario) -> Iterator[Problem]:
    """Methods that need clean data have them, and enough to fit on."""
    fit = 0 if s.trusted is None else s.trusted.size - s.trusted.validate_size
    for path, plan in s.guards:
        if s.trusted is None and needs_trusted(plan.method.impl):
            expected = f"'{plan.method.name}' needs trusted data, and trusted is null"
            remedy = "add trusted: {size: 500}, or take a method that needs no data"
            yield Problem(path=path, expected=expected, remedy=remedy)
        elif s.trusted is not None and fit < fewest_trusted(plan.method.impl):
            expected = f"'{plan.method.name}' needs {fewest_trusted(plan.method.impl)} trusted samples to fit on"
            remedy = "raise trusted.size or lower trusted.validate_share"
            yield Problem(path=path, expected=expected, got=str(fit), remedy=remedy)


def relearning_can_run(s: Scenario) -> Iterator[Problem]:
    """The re-learning test has something to test, and clients that can go on from another model."""
    if s.evaluation.relearn is None:
        return
    path = "evaluation.relearn"
    if not s.attacks:
        yield Problem(path=path, expected="must be null where there are no attacks to re-learn from")
    if s.local_defense is not None:
        expected = "must be null with a local defense: its clients' memory belongs to the run, not to a repaired model"
        yield Problem(path=path, expected=expected)
    if not any(getattr(plan.method.impl, "repairs", True) for plan in s.cleanup):
        expected = "must be null where no cleanup repairs a model to go on from"
        yield Problem(path=path, expected=expected, remedy="add one (cleanup: [finetune])")
    for i, plan in enumerate(s.cleanup):
        if plan.key in CONTROLS:
            expected = "must be another name: the re-learning test has a control of that name"
            yield Problem(path=f"cleanup[{i}].label", expected=expected, got=repr(plan.key))
    known = list(attackers_fit(s))
    for problem in attackers_fit(with_open_windows(s)):
        if problem not in known:  # attacks that follow each other in the run go on side by side
            yield replace(problem, expected=f"{problem.expected} (all attacks go on in evaluation.relearn)")


CHECKS = (
    guards_run,
    one_timetable,
    repairs_act,
    no_target_told,
    clues_come_first,
    trusted_there,
    relearning_can_run,
)
