"""What cannot work together is refused when the scenario loads, with the reason and the remedy.

Each check yields problems and knows only the scenario, so that they read like a list of rules.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace

from fedbd import fault_rules
from fedbd.attacks.poisoning import cover_problem
from fedbd.defenses.trusted_data import fewest_trusted, needs_trusted
from fedbd.errors import Problem, ScenarioError
from fedbd.field_values import shown
from fedbd.registry import either, location
from fedbd.roles import assignment, locally_defended, members, planned_window, role_of, selected
from fedbd.scenario import SHARED, TWIN, WARM_UP, Scenario, memory_in_reach, with_open_windows
from fedbd.summary import LAST_ROUNDS
from fedbd.targets import ALL_TO_ALL, target_problem
from fedbd.types import Need, Role

Check = Callable[[Scenario], Iterator[Problem]]
LONGEST = 200
"""Bytes of a scenario's name, which is a folder's."""
GIVERS = {
    "unlearned": ["rnp", "rnp_label"],
    "recovered": ["rnp"],
    "target": ["rnp", "rnp_label"],
    "trigger": ["trigger_recovery"],
}
"""Clue -> the registered cleanups that find it."""

CONTROLS = ("none", "twin")
"""What the re-learning test calls its controls, beside the cleanups' labels."""


def check(scenario: Scenario) -> list[Problem]:
    """Return every combination in a scenario that cannot work."""
    return [problem for rule in CHECKS for problem in rule(scenario)]


def cohort_fits(s: Scenario) -> Iterator[Problem]:
    """The cohort is no larger than the population."""
    if s.cohort_size > s.partition.clients:
        expected = f"must be <= partition.clients ({s.partition.clients})"
        yield Problem(path="cohort.size", expected=expected, got=str(s.cohort_size))


def name_is_a_folder(s: Scenario) -> Iterator[Problem]:
    """The name can be that of the folder in which the records go."""
    name = s.name.removesuffix(TWIN).removesuffix(WARM_UP)
    if re.search(r"[/\\\x00-\x1f]", name) or name[:1] in ".~" or name != name.strip() or name in SHARED:
        kept = either(SHARED)
        expected = f"must be fit for a folder: no / or \\, no dot or ~ in front, no space around it, and not {kept}"
        yield Problem(path="name", expected=expected, got=repr(s.name))
    elif len(os.fsencode(name)) > LONGEST:
        yield Problem(path="name", expected=f"must be fit for a folder: at most {LONGEST} bytes", got=shown(s.name))


def clients_listed(s: Scenario) -> Iterator[Problem]:
    """Listed attackers are clients, each once."""
    clients = s.partition.clients
    seen: dict[int, int] = {}
    for i, attack in enumerate(s.attacks):
        path = f"attacks[{i}].clients.ids"
        for client in attack.clients.ids or ():
            if client >= clients:
                expected = f"must be clients from 0 to {clients - 1} (partition.clients is {clients})"
                yield Problem(path=path, expected=expected, got=str(client))
            if client in seen:
                got = f"{client} twice" if seen[client] == i else f"{client} as in attacks[{seen[client]}]"
                yield Problem(path=path, expected="must list clients that no attack has yet", got=got)
            seen.setdefault(client, i)


def attackers_fit(s: Scenario) -> Iterator[Problem]:
    """Attacks find their clients, and the cohort its attackers in each round of an attack window."""
    clients, fixed = s.partition.clients, s.cohort.attackers_per_round
    total = sum(members(attack, clients) for attack in s.attacks)
    if total > clients:
        expected = f"must take at most partition.clients ({clients}) clients together"
        yield Problem(path="attacks", expected=expected, got=str(total))
    if fixed is None or total > clients or s.cohort_size > clients:
        return
    path = "cohort.attackers_per_round"
    if not s.attacks:
        yield Problem(path=path, expected="must be null where there are no attacks", got=str(fixed))
        return
    acting = _acting(s)
    most = min(*acting, s.cohort_size)
    least = s.cohort_size - clients + max(acting)
    if fixed > most:
        expected = f"must be <= {most}: the attacks have {min(acting)} clients and the cohort is of {s.cohort_size}"
        yield Problem(path=path, expected=expected, got=str(fixed))
    elif fixed < least:
        others = clients - max(acting)
        expected = f"must be >= {least}: a cohort of {s.cohort_size} finds only {others} clients that do not attack"
        yield Problem(path=path, expected=expected, got=str(fixed), remedy=f"or set cohort.size to {others + fixed}")


def _acting(s: Scenario) -> list[int]:
    """Return how many clients the attacks of a round have together, for each such number that occurs."""
    windows = [attack.rounds for attack in s.attacks]
    turns = {window.first for window in windows} | {window.last + 1 for window in windows if window.last is not None}
    sizes = {
        sum(members(attack, s.partition.clients) for attack in s.attacks if turn in attack.rounds) for turn in turns
    }
    return sorted(sizes - {0})


def attacks_act(s: Scenario) -> Iterator[Problem]:
    """Every attack acts in some round, and pollution is something that can lie in a data set."""
    for i, attack in enumerate(s.attacks):
        if attack.rounds.first > s.rounds:
            expected = f"must be <= rounds ({s.rounds}), or the attack never acts"
            yield Problem(path=f"attacks[{i}].rounds.first", expected=expected, got=str(attack.rounds.first))
        if attack.role == "polluted" and getattr(attack.method.impl, "per", "dataset") != "dataset":
            yield Problem(
                path=f"attacks[{i}].per",
                expected="must be dataset for a polluted client: it trains by itself, only its data is poisoned",
                got=repr(attack.method.impl.per),
            )


def targets_fit(s: Scenario) -> Iterator[Problem]:
    """An attack can have its target, and its trigger what the attack asks of it."""
    for i, attack in enumerate(s.attacks):
        impl, path = attack.method.impl, f"attacks[{i}]"
        found = [
            target_problem(attack.target, attack.method.name, impl, f"{path}.target"),
            cover_problem(impl, attack.trigger, f"{path}.cover"),
        ]
        yield from (problem for problem in found if problem is not None)


def pollution_lasts(s: Scenario) -> Iterator[Problem]:
    """A local defense remembers samples by their places: what lies there must not change between participations."""
    for i, attack in enumerate(s.attacks):
        whole = attack.rounds.first == 1 and (attack.rounds.last is None or attack.rounds.last >= s.rounds)
        if attack.role == "polluted" and s.local_defense is not None and not whole:
            yield Problem(
                path=f"attacks[{i}].rounds",
                expected="must cover the whole run where polluted clients have a local defense: it remembers samples",
                got=f"{attack.rounds.first} to {attack.rounds.last or s.rounds}",
                remedy="leave rounds out",
            )


def labels_differ(s: Scenario) -> Iterator[Problem]:
    """Names in the records are unique."""
    for kind, plans in (("attacks", s.attacks), ("cleanup", s.cleanup), ("detection", s.detection)):
        for key, times in Counter(plan.key for plan in plans).items():
            if times > 1:
                got, remedy = f"'{key}' {times} times", "give each its own label"
                yield Problem(path=kind, expected="must have different labels", got=got, remedy=remedy)


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


def repairs_act(s: Scenario) -> Iterator[Problem]:
    """Fields of a cleanup that would do nothing are refused."""
    for i, plan in enumerate(s.cleanup):
        path = f"cleanup[{i}]"
        if plan.mode == "if_stopped_now":
            for field, default in (("mask", "release"), ("server_optimizer_state", "keep")):
                if getattr(plan, field) != default:
                    expected = f"must be {default} unless mode is in_loop: the federation goes on without the copy"
                    yield Problem(path=f"{path}.{field}", expected=expected, got=repr(getattr(plan, field)))
        elif plan.server_optimizer_state == "reset" and s.strategy.name in ("fedavg", "fedprox"):
            expected = f"must be keep with {s.strategy.name}, which keeps neither momentum nor moments"
            yield Problem(path=f"{path}.server_optimizer_state", expected=expected, got="'reset'")
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


def detectors_act(s: Scenario) -> Iterator[Problem]:
    """Detectors over training data find polluted clients, and need nothing that a client does not have."""
    for i, plan in enumerate(s.detection):
        path = f"detection[{i}]"
        if plan.where == "incoming":
            if plan.honest:
                expected = "must be false unless where is training: incoming inputs are no client's"
                yield Problem(path=f"{path}.honest", expected=expected, got="true")
            if plan.adversarial and not s.attacks:
                expected = "must be left out where there is no attack: inputs of all kinds are told apart together"
                yield Problem(path=f"{path}.adversarial", expected=expected)
            continue
        if not any(attack.role == "polluted" for attack in s.attacks):
            yield Problem(
                path=f"{path}.where",
                expected="must be incoming where no client is polluted: an attacker does not look for its own poison",
                got="'training'",
                remedy="give an attack role: polluted",
            )
        if needs_trusted(plan.method.impl):
            expected = f"must be incoming: '{plan.method.name}' needs trusted data, and clients hold none"
            yield Problem(path=f"{path}.where", expected=expected, got="'training'")
        if plan.adversarial:
            expected = "must be left out with where: training: nobody attacks inputs there"
            yield Problem(path=f"{path}.adversarial", expected=expected)


def evasions_differ(s: Scenario) -> Iterator[Problem]:
    """The records name an evasion by its method."""
    for i, plan in enumerate(s.detection):
        for name, times in Counter(evasion.method.name for evasion in plan.adversarial).items():
            if times > 1:
                path, got = f"detection[{i}].adversarial", f"'{name}' {times} times"
                remedy = "give the detector a second entry with its own label"
                yield Problem(path=path, expected="must name each evasion once", got=got, remedy=remedy)


def local_defense_somewhere(s: Scenario) -> Iterator[Problem]:
    """Who runs the local defense is a choice among the clients, and there is one to run."""
    chosen, clients = s.local_defense_clients, s.partition.clients
    if chosen is None:
        return
    if s.local_defense is None:
        yield Problem(path="local_defense_clients", expected="must be null without a local_defense")
    if selected(chosen, clients) > clients or any(client >= clients for client in chosen.ids or ()):
        expected = f"must be a choice among partition.clients ({clients})"
        yield Problem(path="local_defense_clients", expected=expected)


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


def figures_are_measured(s: Scenario) -> Iterator[Problem]:
    """Some of the rounds that a run's figures are means of are measured."""
    window = planned_window(s)
    if window is None:
        return  # the last round always is
    first, last = max(window[0], window[1] - LAST_ROUNDS + 1), window[1]
    if not any(s.measured(round_) for round_ in range(first, last + 1)):
        yield Problem(
            path="evaluation.every",
            expected=f"leaves the last attacked rounds ({first} to {last}) without a measurement, and so the run",
            got=str(s.evaluation.every),
            remedy=f"take a number that divides {last}",
        )


def kept_models_exist(s: Scenario) -> Iterator[Problem]:
    """Models are kept of rounds of the run."""
    late = [round_ for round_ in s.evaluation.keep_models or () if round_ > s.rounds]
    if late:
        expected = f"must be rounds of the run (1 to {s.rounds})"
        yield Problem(path="evaluation.keep_models", expected=expected, got=", ".join(map(str, late)))


def batch_norm_fits(s: Scenario) -> Iterator[Problem]:
    """What becomes of BatchNorm leaves the methods what they need."""
    if s.batch_norm == "frozen" and s.start is None:
        yield Problem(
            path="batch_norm",
            expected="must not be frozen without a start: a fresh model's statistics (0 and 1) are those of no data",
            remedy="add start: {checkpoint: FILE} or start: {warm_up: N}",
        )
    for i, plan in enumerate(s.cleanup):
        if s.batch_norm == "group_norm" and getattr(plan.method.impl, "reads_batch_norm", False):
            expected = f"'{plan.method.name}' judges channels by BatchNorm, and batch_norm: group_norm leaves none"
            remedy = "set batch_norm to average, or take finetune, nad, fine_pruning or linf_pruning"
            yield Problem(path=f"cleanup[{i}]", expected=expected, remedy=remedy)
    if s.batch_norm == "local":
        yield from _local_batch_norm(s)


def _local_batch_norm(s: Scenario) -> Iterator[Problem]:
    """Each client has BatchNorm of its own: nothing that the server does to its own reaches them."""
    if s.trusted is None:
        expected = "needs trusted data with local: the model that is evaluated has its running statistics from them"
        yield Problem(path="batch_norm", expected=expected, remedy="add trusted: {size: 500}")
    for i, plan in enumerate(s.cleanup):
        name = plan.method.name
        if getattr(plan.method.impl, "prunes", False):
            expected = f"'{name}' prunes by BatchNorm scales, and with batch_norm: local every client has its own"
            remedy = "set batch_norm to average, or take finetune, nad or flain"
            yield Problem(path=f"cleanup[{i}]", expected=expected, remedy=remedy)
        elif plan.mode == "in_loop":
            expected = "must be if_stopped_now with batch_norm: local: clients would get half of the repaired model"
            yield Problem(path=f"cleanup[{i}].mode", expected=expected, got="'in_loop'")
    if s.evaluation.relearn is not None:
        expected = "must be null with batch_norm: local: clients' BatchNorm belongs to the run, not to a repaired model"
        yield Problem(path="evaluation.relearn", expected=expected)
    if getattr(s.aggregation.impl, "builds_models", False):
        expected = f"'{s.aggregation.name}' makes models of updates, and with batch_norm: local these lack BatchNorm"
        yield Problem(path="aggregation", expected=expected, remedy="set batch_norm to average, or take another rule")


def buckets_fit(s: Scenario) -> Iterator[Problem]:
    """Buckets are no larger than the cohort."""
    if s.bucket_size is not None and s.bucket_size > s.cohort_size:
        expected = f"must be <= the cohort ({s.cohort_size}) or null for one sum"
        yield Problem(path="bucket_size", expected=expected, got=str(s.bucket_size))


def rule_can_act(s: Scenario) -> Iterator[Problem]:
    """The aggregation rule sees what it needs, in enough rows, and has its trusted data."""
    rule, name = s.aggregation.impl, s.aggregation.name
    rows = max(rule.minimum_rows, 2 if Need.INDIVIDUAL in s.needs and s.bucket_size is None else 1)
    enough = f"set bucket_size to {s.cohort_size // rows} or less"
    if s.cohort_size < rows:
        enough = f"set cohort.size to at least {rows}"
    if Need.INDIVIDUAL in s.needs and s.bucket_size is None:
        yield Problem(
            path="aggregation",
            expected=f"'{name}' compares updates, but bucket_size: null shows it one sum over the cohort",
            remedy=f"{enough}, or take a rule that acts on a sum (mean, norm_clip with where: client) and repair the "
            "model afterwards (cleanup: [rnp])",
        )
    elif s.buckets < rule.minimum_rows:
        rows_are = "updates" if s.bucket_size == 1 else f"buckets of {s.bucket_size}"
        expected = f"'{name}' needs at least {rule.minimum_rows} updates or buckets"
        yield Problem(path="aggregation", expected=expected, got=f"{s.buckets} {rows_are}", remedy=enough)
    if Need.IDS in s.needs and s.bucket_size != 1:
        expected = f"'{name}' follows clients over rounds and needs bucket_size: 1"
        yield Problem(path="aggregation", expected=expected, got=f"bucket_size: {shown(s.bucket_size)}")
    if Need.TRUSTED in s.needs and s.trusted is None:
        yield Problem(path="aggregation", expected=f"'{name}' needs trusted data", remedy="add trusted: {size: 500}")


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


def groups_there(s: Scenario) -> Iterator[Problem]:
    """What goes by the data's own ids needs data that have some."""
    if getattr(s.data.method.impl, "has_groups", None) is not False:
        return  # or a third party's source, which does not say
    name = s.data.method.name
    expected = f"must be groups of the data, and '{name}' has none"
    remedy = "take data that have some (gtsrb; npz or image_parquet with groups: COLUMN)"
    if hasattr(s.data.method.impl, "groups"):
        expected, remedy = "must be groups of the data, and data.groups is null", "name the column in data.groups"
    if getattr(s.partition.method.impl, "keeps_groups", False):
        yield Problem(path="partition", expected=expected, got=repr(s.partition.method.name), remedy=remedy)
    if s.trusted is not None and s.trusted.groups == "whole":
        yield Problem(path="trusted.groups", expected=expected, got="'whole'", remedy=remedy)


def sum_is_exact(s: Scenario) -> Iterator[Problem]:
    """The encryption's noise stays below half a grid step for the clients of one sum."""
    if s.secure_sum is None:
        return
    per_sum = s.cohort_size if s.bucket_size is None else min(s.cohort_size, 2 * s.bucket_size - 1)
    for name, sentence in s.secure_sum.impl.problems(per_sum):
        yield Problem(path=f"secure_sum.{name}" if name else "secure_sum", expected=sentence)


def two_decrypt(s: Scenario) -> Iterator[Problem]:
    """Two clients decrypt and are compared."""
    if s.secure_sum is not None and s.cohort_size < 2:
        yield Problem(
            path="cohort.size", expected="must be >= 2 under encryption: two clients decrypt and are compared", got="1"
        )


def strategy_known(s: Scenario) -> Iterator[Problem]:
    """The Flower strategy has a name we know, or is a path."""
    try:
        location("strategy", s.strategy.name, "strategy.name")
    except ScenarioError as error:
        yield from error.problems


def proximal_term_acts(s: Scenario) -> Iterator[Problem]:
    """FedProx's term has a weight, and a client that trains with it."""
    mu = s.strategy.arguments.get("proximal_mu")
    named = s.strategy.name.rpartition(":")[2].lower() == "fedprox"
    path = "strategy.arguments.proximal_mu"
    if not named and mu is None:
        return
    if isinstance(mu, bool) or not isinstance(mu, int | float) or not 0 < mu < float("inf"):
        expected, remedy = "must be a number > 0: it is the weight of the proximal term", "take fedavg for none"
        yield Problem(path=path, expected=expected, got=shown(mu), remedy=remedy)
    clients, chosen = s.partition.clients, s.local_defense_clients
    listed = sum(members(attack, clients) for attack in s.attacks)
    if listed > clients or (chosen is not None and selected(chosen, clients) > clients):
        return  # refused for that
    always = {
        client
        for client, attack in assignment(s).items()
        if all(role_of(attack, round_) is Role.ATTACKER for round_ in range(1, s.rounds + 1))
    }
    if len(always | locally_defended(s)) >= clients:
        yield Problem(
            path=path,
            expected="has no client that trains with it: attackers ignore it, a local defense has its own objective",
            remedy="give local_defense_clients fewer than all clients, leave local_defense out, or take fedavg",
        )


def engine_fits(s: Scenario) -> Iterator[Problem]:
    """Engine fields that would be ignored are refused."""
    if s.engine.client_gpus and s.engine.name != "ray":
        expected = "must be 0 unless engine.name is ray"
        yield Problem(path="engine.client_gpus", expected=expected, got=f"{s.engine.client_gpus:g}")
    if s.engine.executor == "serial" and (s.engine.workers or 1) > 1:
        expected = "must be 1 or null with executor: serial"
        yield Problem(path="engine.workers", expected=expected, got=str(s.engine.workers))
    if s.engine.executor == "serial" and s.engine.name != "local":
        yield Problem(path="engine.executor", expected="must be process unless engine.name is local", got="'serial'")


def gpus_used(s: Scenario) -> Iterator[Problem]:
    """GPUs are named where fedbd hands them out itself."""
    if s.engine.cuda_devices is None:
        return
    for wrong, expected, got in (
        (s.engine.device != "cuda", "must be null unless engine.device is cuda", s.engine.device),
        (s.engine.name != "local", "must be null unless engine.name is local: ray has client_gpus", s.engine.name),
        (s.engine.executor == "serial", "must be null with executor: serial, which computes in one process", "serial"),
    ):
        if wrong:
            yield Problem(path="engine.cuda_devices", expected=expected, got=got)


def cluster_reached(s: Scenario) -> Iterator[Problem]:
    """A Ray cluster has an address, and nothing is asked of its machines that only this one has."""
    address, path = s.engine.ray_address, "engine.ray_address"
    if address is None:
        return
    if s.engine.name != "ray":
        yield Problem(path=path, expected="must be null unless engine.name is ray", got=repr(address))
    if not re.fullmatch(r"(\[[0-9a-fA-F:.]+\]|[^\s:/\[\]]+):\d{1,5}", address):
        yield Problem(path=path, expected="must be HOST:PORT, as `ray start --head` prints it", got=repr(address))
    if s.secure_sum is not None:
        expected = "must be null under encryption: the key agent serves the clients of one machine"
        yield Problem(path=path, expected=expected, remedy="set secure_sum: null, or leave ray_address out")
    if any(plan.where == "training" for plan in s.detection):
        expected = "must be null with a detector where: training: what clients noted stays on the cluster's machines"
        yield Problem(path=path, expected=expected)


def checkpoint_can_hold(s: Scenario) -> Iterator[Problem]:
    """A checkpoint holds all of a run."""
    if s.checkpoint is not None and not memory_in_reach(s):
        what = "a local defense" if s.local_defense is not None else "batch_norm: local"
        yield Problem(
            path="checkpoint",
            expected=f"must be null with {what} on engine {s.engine.name}: what clients remember lies in "
            "Flower's runtime, out of a checkpoint's reach",
            remedy="leave it out, or set engine: local",
        )


CHECKS: tuple[Check, ...] = (
    name_is_a_folder,
    cohort_fits,
    clients_listed,
    attackers_fit,
    attacks_act,
    targets_fit,
    pollution_lasts,
    labels_differ,
    guards_run,
    repairs_act,
    clues_come_first,
    detectors_act,
    evasions_differ,
    local_defense_somewhere,
    relearning_can_run,
    figures_are_measured,
    kept_models_exist,
    batch_norm_fits,
    buckets_fit,
    rule_can_act,
    trusted_there,
    groups_there,
    sum_is_exact,
    two_decrypt,
    strategy_known,
    proximal_term_acts,
    engine_fits,
    gpus_used,
    cluster_reached,
    checkpoint_can_hold,
    *fault_rules.CHECKS,
)
