"""What a broken scenario is told, word for word: where, what was expected, what came, what to do."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from fedbd.config.scenario import load_scenario
from fedbd.errors import UserError
from fedbd.prepared import prepare
from fedbd.running.runs import strategy_problems

GOOD = """\
name: t
rounds: 3
data: {name: digits}
model: {name: mlp}
"""
ATTACK = """\
attacks:
  - {name: badnets, clients: {count: 2}, target: 0, trigger: {name: grid}}
"""
TWO = """\
attacks:
  - {name: badnets, label: a, clients: {ids: [1, 2]}, target: 0, trigger: grid}
  - {name: badnets, label: b, clients: {ids: [2, 30]}, target: 0, trigger: grid}
"""
TRUSTED = "trusted: {size: 50}\n"
TOP = (
    "name, rounds, data, model, seed, start, batch_norm, partition, trusted, training, cohort, attacks, local_defense, "
    "local_defense_clients, strategy, server_rate, secure_sum, bucket_size, aggregation, cleanup, detection, "
    "evaluation, faults, engine, on_client_failure, checkpoint"
)
NOBODY = (
    "has no client that trains with it: attackers ignore it, a local defense has its own objective; give "
    "local_defense_clients fewer than all clients, leave local_defense out, or take fedavg"
)
SINGLE = ATTACK.replace("target: 0", "target: 0, rounds: {first: 2, last: 2}")
TRIGGERS = "grid, square, four_corners, single_pixel, trojan_patch, blend, sig, low_frequency, wanet, object_overlay"
SETTING = "must be PATH=VALUE, as in training.lr=0.05 or attacks[0].enabled=false"

LOAD = "FILE is not a scenario that can run:"
DATA = "scenario 't' does not fit its data:"


class Broken(NamedTuple):
    """A broken scenario and the whole of its message; ``FILE`` stands for the file's path."""

    title: str
    text: str
    message: str
    sets: tuple[str, ...] = ()


def load(title: str, text: str, *lines: str, sets: tuple[str, ...] = ()) -> Broken:
    """Refused in its fields or their combination: a heading, and a line for each problem."""
    return Broken(title, text, "\n".join([LOAD, *(f"  {line}" for line in lines)]), sets)


def bare(title: str, text: str, *lines: str, sets: tuple[str, ...] = ()) -> Broken:
    """Refused before there are fields (no YAML, a bad --set): only the lines."""
    return Broken(title, text, "\n".join(lines), sets)


FIELDS = [
    load("misspelt at the top", GOOD + "agregation: mean\n", "agregation: is not a field; did you mean 'aggregation'?"),
    load("unknown at the top", GOOD + "zzz: 1\n", f"zzz: is not a field; known here: {TOP}"),
    load(
        "misspelt in a nested field",
        GOOD + "training: {momentm: 0.5}\n",
        "training.momentm: is not a field; did you mean 'momentum'?",
    ),
    load(
        "another suite's word",
        GOOD + "training: {learning_rate: 0.5}\n",
        "training.learning_rate: is not a field; known here: epochs, batch_size, lr, momentum, nesterov, weight_decay, "
        "lr_step, lr_gamma, lr_decay, augment",
    ),
    load(
        "misspelt in a method",
        GOOD + "aggregation: {name: norm_clip, bond: 3}\n",
        "aggregation.bond: is not a field; did you mean 'bound'?",
    ),
    load(
        "misspelt where plan and method stand side by side",
        GOOD + "partition: {name: dirichlet, alfa: 1, client: 3}\n",
        "partition.alfa: is not a field; did you mean 'alpha'?",
        "partition.client: is not a field; did you mean 'clients'?",
    ),
    load(
        "unknown where plan and method stand side by side",
        GOOD + "partition: {name: dirichlet, zzz: 1}\n",
        "partition.zzz: is not a field; known here: alpha, minimum, clients",
    ),
    load(
        "misspelt method",
        GOOD + "aggregation: meen\n",
        "aggregation.name: must be mean, norm_clip, median, masa or package.module:Class, got 'meen'; "
        "did you mean 'mean'?",
    ),
    load(
        "misspelt method of a kind that is closed to third parties",
        GOOD + "secure_sum: {name: my.crypto:Ckks}\n",
        "secure_sum.name: must be ckks, got 'my.crypto:Ckks'",
    ),
    load(
        "missing module",
        GOOD + "aggregation: {name: no_such_package.rules:Trim}\n",
        "aggregation.name: must be importable (No module named 'no_such_package'), got 'no_such_package.rules:Trim'; "
        "check the spelling, and that PYTHONPATH leads there",
    ),
    load(
        "misspelt class",
        GOOD + "aggregation: {name: fedbd.defenses.aggregation.mean:Maen}\n",
        "aggregation.name: must name a class in fedbd.defenses.aggregation.mean, got "
        "'fedbd.defenses.aggregation.mean:Maen'; did you mean 'Mean'?",
    ),
    load(
        "a function",
        GOOD + "aggregation: {name: fedbd.sums:to_row}\n",
        "aggregation.name: must name a frozen dataclass, got 'fedbd.sums:to_row'; write @dataclass(frozen=True, "
        "kw_only=True) above the class",
    ),
    load(
        "a class of another kind",
        GOOD + "aggregation: {name: fedbd.models.mlp:Mlp}\n",
        "aggregation.name: must name a method of kind aggregation (fedbd.types.Aggregator), got "
        "'fedbd.models.mlp:Mlp'; it lacks needs, minimum_rows, aggregate",
    ),
    load(
        "name that is no text",
        GOOD + "local_defense: {name: 5}\n",
        "local_defense.name: must be abl or package.module:Class, got 5",
    ),
    load("text for a number", GOOD + "training: {lr: fast}\n", "training.lr: must be a number, got 'fast'"),
    load("number in quotes", GOOD + "seed: '1'\n", "seed: must be an integer, got '1'"),
    load("octal", GOOD + "seed: 010\n", "seed: must be an integer, got '010'"),
    load("number for text", GOOD, "name: must be text, got 2024; put it in quotes", sets=("name=2024",)),
    load("number for a bool", GOOD + "evaluation: {twin: 1}\n", "evaluation.twin: must be true or false, got 1"),
    load("off for a bool", GOOD + "evaluation: {twin: off}\n", "evaluation.twin: must be true or false, got 'off'"),
    load("bool for an integer", GOOD + "seed: true\n", "seed: must be an integer, got true"),
    load("float for an integer", GOOD + "seed: 2.0\n", "seed: must be an integer, got 2.0"),
    load("list for a mapping", GOOD + "training: [1, 2]\n", "training: must be a mapping, got a list"),
    load(
        "mapping for a list",
        GOOD + "attacks: {name: badnets}\n",
        "attacks: must be a list of mappings, got a mapping; begin each entry with a dash",
    ),
    load("number for a method", GOOD + "aggregation: 5\n", "aggregation: must be a name or a mapping with one, got 5"),
    load(
        "list for a method",
        GOOD + "local_defense: [abl]\n",
        "local_defense: must be a name or a mapping with one, got a list",
    ),
    load(
        "number in a list of methods",
        GOOD + "cleanup: [3]\n",
        "cleanup[0]: must be a name or a mapping with one, got 3",
    ),
    load(
        "wrong entries of a list of numbers",
        GOOD.replace("mlp", "mlp, hidden: [200, x, -1, 2.5]"),
        "model.hidden[1]: must be an integer, got 'x'",
        "model.hidden[2]: must be >= 1, got -1",
        "model.hidden[3]: must be an integer, got 2.5",
    ),
    load(
        "list where one of several types may stand",
        GOOD + "strategy: {name: fedadam, arguments: {eta: [1]}}\n",
        "strategy.arguments.eta: must be a number, text, true or false, got a list",
    ),
    load(
        "null where none may stand",
        GOOD + "seed:\n",
        "seed: must be an integer, got null; leave the field out for its default",
    ),
    load(
        "nothing below a key",
        GOOD + "training:\n  # lr: 0.1\n",
        "training: must be a mapping, got null; leave the field out for its default",
    ),
    load(
        "nothing behind a dash", GOOD + "attacks:\n  -\n", "attacks[0]: must be a name or a mapping with one, got null"
    ),
    load("not a number", GOOD + "training: {lr: .nan}\n", "training.lr: must be a finite number, got nan"),
    load("infinity", GOOD + "server_rate: 1e999\n", "server_rate: must be a finite number, got inf"),
    load(
        "out of bounds",
        GOOD + "training: {batch_size: 0, lr: 0, momentum: 1, weight_decay: -1e-4, lr_step: 0, lr_gamma: 1.5}\n",
        "training.batch_size: must be >= 1, got 0",
        "training.lr: must be > 0, got 0",
        "training.momentum: must be < 1, got 1",
        "training.weight_decay: must be >= 0, got -0.0001",
        "training.lr_step: must be >= 1 or null, got 0",
        "training.lr_gamma: must be <= 1, got 1.5",
    ),
    load(
        "none of the choices",
        GOOD + "local_defense: {name: abl, control: lgaa, confidence: maybe}\nengine: {name: rai}\n",
        "local_defense.control: must be lga or flooding, got 'lgaa'; did you mean 'lga'?",
        "local_defense.confidence: must be mixture or null, got 'maybe'",
        "engine.name: must be local, ray or deployment, got 'rai'; did you mean 'ray'?",
    ),
    load(
        "nothing that is required",
        "seed: 3\n",
        "name: is required",
        "rounds: is required",
        "data: is required; name digits, npz, image_parquet, image_folder, cifar10, cifar100, mnist, "
        "fashion_mnist, emnist, gtsrb, generated or package.module:Class",
        "model: is required; name cnn, mlp, mnistnet, wrn16-1, resnet18, preact_resnet18, vit, "
        "torchvision or package.module:Class",
    ),
    load(
        "methods without names",
        "name: t\nrounds: 3\ndata: {root: x}\nmodel: {width: 3}\n",
        "data.name: is required; name digits, npz, image_parquet, image_folder, cifar10, cifar100, mnist, "
        "fashion_mnist, emnist, gtsrb, generated or package.module:Class",
        "model.name: is required; name cnn, mlp, mnistnet, wrn16-1, resnet18, preact_resnet18, vit, "
        "torchvision or package.module:Class",
    ),
    load("a method's required field", GOOD.replace("digits", "npz"), "data.file: is required"),
    load(
        "an attack's required fields",
        GOOD + "attacks: [badnets]\n",
        "attacks[0].clients: is required",
        "attacks[0].target: is required",
        f"attacks[0].trigger: is required; name {TRIGGERS} or package.module:Class",
    ),
    load("empty text", GOOD.replace("name: t", "name: ''"), "name: must not be empty"),
    load(
        "a name that leads elsewhere",
        GOOD,
        "name: must be fit for a folder: no / or \\, no dot or ~ in front, no space around it, and not twins or "
        "warm-ups, got '../etc'",
        sets=("name=../etc",),
    ),
    load(
        "a name that is taken",
        GOOD,
        "name: must be fit for a folder: no / or \\, no dot or ~ in front, no space around it, and not twins or "
        "warm-ups, got 'warm-ups'",
        sets=("name=warm-ups",),
    ),
    load(
        "two things to start from",
        GOOD + "start: {warm_up: 2, checkpoint: a.pt}\n",
        "start: must hold exactly one of checkpoint and warm_up, got checkpoint and warm_up",
    ),
    load(
        "nothing to start from",
        GOOD + "start: {}\n",
        "start: must hold exactly one of checkpoint and warm_up, got none",
    ),
    load("no rounds to start from", GOOD + "start: {warm_up: 0}\n", "start.warm_up: must be >= 1 or null, got 0"),
    load(
        "a name too long for a folder",
        GOOD,
        f"name: must be fit for a folder: at most 200 bytes, got '{'ä' * 57}...'",
        sets=("name=" + 101 * "ä",),
    ),
    load(
        "several mistakes at once",
        GOOD
        + "seed: x\ntrusted: {size: 1}\ncohort: {size: 0}\nattacks: [{name: badnets, clients: {count: 2, share: 0.5}, "
        "target: -1, trigger: grd}]\nengine: {name: locl}\n",
        "seed: must be an integer, got 'x'",
        "trusted.size: must be >= 2, got 1",
        "cohort.size: must be >= 1 or null, got 0",
        "attacks[0].clients: must hold exactly one of share, count and ids, got share and count",
        "attacks[0].target: must be >= 0 or all_to_all, got -1",
        f"attacks[0].trigger.name: must be {TRIGGERS} or package.module:Class, got 'grd'; did you mean 'grid'?",
        "engine.name: must be local, ray or deployment, got 'locl'; did you mean 'local'?",
    ),
    load(
        "Nesterov without momentum",
        GOOD + "training: {nesterov: true, momentum: 0}\n",
        "training.nesterov: needs a momentum above 0",
    ),
    load(
        "a trusted set without a part",
        GOOD + "trusted: {size: 5, validate_share: 0.01}\n",
        "trusted.validate_share: leaves no sample to validate on: 0.01 of 5",
    ),
]

NO_FIELDS = [
    bare("empty file", "", "FILE: must hold a scenario, got an empty file"),
    bare("only comments", "# nothing yet\n", "FILE: must hold a scenario, got nothing but comments"),
    bare(
        "no YAML",
        "name: t\nrounds: [3\ndata: x\n",
        "FILE:3:5: must be YAML: expected ',' or ']', but got ':', while parsing a flow sequence that starts at line "
        "2, column 9",
    ),
    bare(
        "tab",
        "name: t\n\trounds: 3\n",
        "FILE:2:1: must be YAML: found character '\\t' that cannot start any token; indent with spaces, not with tabs",
    ),
    bare(
        "colon in a text",
        "name: a: b\n",
        "FILE:1:8: must be YAML: mapping values are not allowed here; put a text that holds ': ' in quotes",
    ),
    bare(
        "two scenarios in one file",
        GOOD + "---\n" + GOOD,
        "FILE:5:1: must be YAML: expected a single document in the stream, but found another document; keep one "
        "scenario to a file, without a second ---",
    ),
    bare(
        "object",
        "name: !!python/object/apply:os.system [ls]\n",
        "FILE:1:7: must be YAML: could not determine a constructor for the tag '!!python/object/apply:os.system'; "
        "leave the tag out: a scenario holds plain values",
    ),
    bare(
        "control character",
        "name: t\nrounds: \x07\n",
        "FILE:2:9: must be YAML: the character '\\x07' cannot stand in it",
    ),
    bare(
        "duplicate key",
        "name: t\nrounds: 3\nname: u\n",
        "FILE:3:1: must give each key once, and 'name' stands already at line 1, column 1; remove one of them",
    ),
    bare(
        "duplicate key in a nested mapping",
        GOOD + "training: {lr: 1, lr: 2}\n",
        "FILE:5:19: must give each key once, and 'lr' stands already at line 5, column 12; remove one of them",
    ),
    load(
        "list at the top", "- a\n- b\n", "the scenario: must be a mapping with name, rounds, data and model, got a list"
    ),
    load(
        "text at the top", "hello\n", "the scenario: must be a mapping with name, rounds, data and model, got 'hello'"
    ),
    bare("--set without =", GOOD, f"--set rounds: {SETTING}", sets=("rounds",)),
    bare("--set without a path", GOOD, f"--set =3: {SETTING}", sets=("=3",)),
    bare("--set with an odd path", GOOD, f"--set attacks[x].target=3: {SETTING}", sets=("attacks[x].target=3",)),
    bare(
        "--set through a scalar",
        GOOD,
        "--set rounds.x=3: rounds must be a mapping to have a field 'x', got 3",
        sets=("rounds.x=3",),
    ),
    bare(
        "--set past the end",
        GOOD + ATTACK,
        "--set attacks[1].target=3: attacks has 1 entry, counted from [0]; there is no [1]",
        sets=("attacks[1].target=3",),
    ),
    bare(
        "--set into a list without saying where",
        GOOD + ATTACK,
        "--set attacks.target=3: attacks must be a mapping to have a field 'target', got a list; name one of its "
        "entries, as in attacks[0].target",
        sets=("attacks.target=3",),
    ),
    bare(
        "--set an entry of what is no list",
        GOOD,
        "--set data.name[0]=3: data.name must be a list to have an entry [0], got 'digits'",
        sets=("data.name[0]=3",),
    ),
    bare(
        "--set to what is no YAML",
        GOOD,
        "--set training={lr: 1: the value must be YAML: expected ',' or '}', but got '<stream end>', while parsing a "
        "flow mapping that starts at line 1, column 1",
        sets=("training={lr: 1",),
    ),
    bare(
        "several --set",
        GOOD,
        f"--set rounds: {SETTING}",
        "--set seed.x.y=1: seed must be a mapping to have a field 'x', got 5",
        sets=("rounds", "seed=5", "seed.x.y=1"),
    ),
    load(
        "--set of an unknown field",
        GOOD,
        "traning: is not a field; did you mean 'training'?",
        sets=("traning.lr=1",),
    ),
]

COMBINATIONS = [
    load(
        "BatchNorm frozen in a fresh model",
        GOOD + "batch_norm: frozen\n",
        "batch_norm: must not be frozen without a start: a fresh model's statistics (0 and 1) are those of no data; "
        "add start: {checkpoint: FILE} or start: {warm_up: N}",
        sets=("model=cnn",),
    ),
    load(
        "masks on BatchNorm where GroupNorm stands",
        GOOD + TRUSTED + "batch_norm: group_norm\ncleanup: [rnp, clp, finetune]\n",
        *(
            f"cleanup[{i}]: '{name}' judges channels by BatchNorm, and batch_norm: group_norm leaves none; set "
            "batch_norm to average, or take finetune, nad, fine_pruning or linf_pruning"
            for i, name in enumerate(("rnp", "clp"))
        ),
        sets=("model=cnn",),
    ),
    load(
        "BatchNorm of each client's own, and what would need the server's",
        GOOD + ATTACK + "batch_norm: local\ntrusted: {size: 50}\naggregation: masa\nevaluation: {relearn: [1]}\n"
        "cleanup: [rnp, {name: fine_pruning, label: fp}, {name: finetune, mode: in_loop}, nad]\n",
        *(
            f"cleanup[{i}]: '{name}' prunes by BatchNorm scales, and with batch_norm: local every client has its own; "
            "set batch_norm to average, or take finetune, nad or flain"
            for i, name in enumerate(("rnp", "fine_pruning"))
        ),
        "cleanup[2].mode: must be if_stopped_now with batch_norm: local: clients would get half of the repaired model, "
        "got 'in_loop'",
        "evaluation.relearn: must be null with batch_norm: local: clients' BatchNorm belongs to the run, not to a "
        "repaired model",
        "aggregation: 'masa' makes models of updates, and with batch_norm: local these lack BatchNorm; set batch_norm "
        "to average, or take another rule",
        sets=("model=cnn",),
    ),
    load(
        "BatchNorm of each client's own, and nothing to evaluate with",
        GOOD + "batch_norm: local\n",
        "batch_norm: needs trusted data with local: the model that is evaluated has its running statistics from them; "
        "add trusted: {size: 500}",
        sets=("model=cnn",),
    ),
    load(
        "cohort larger than the population",
        GOOD + "cohort: {size: 11}\n",
        "cohort.size: must be <= partition.clients (10), got 11",
    ),
    load(
        "more attackers per round than attackers",
        GOOD + ATTACK + "cohort: {size: 5, attackers_per_round: 3}\n",
        "cohort.attackers_per_round: must be <= 2: the attacks have 2 clients and the cohort is of 5, got 3",
    ),
    load(
        "more attackers per round than places",
        GOOD + ATTACK + "cohort: {size: 1, attackers_per_round: 2}\n",
        "cohort.attackers_per_round: must be <= 1: the attacks have 2 clients and the cohort is of 1, got 2",
    ),
    load(
        "fewer attackers per round than the cohort needs",
        GOOD + ATTACK + "cohort: {attackers_per_round: 0}\n",
        "cohort.attackers_per_round: must be >= 2: a cohort of 10 finds only 8 clients that do not attack, got 0; or "
        "set cohort.size to 8",
    ),
    load(
        "checkpoints of what Flower's runtime keeps to itself",
        GOOD + "local_defense: {name: abl, isolate_after: 2}\nengine: ray\ncheckpoint: {every: 2}\n",
        "checkpoint: must be null with a local defense on engine ray: what clients remember lies in Flower's runtime, "
        "out of a checkpoint's reach; leave it out, or set engine: local",
    ),
    load(
        "checkpoints after no round",
        GOOD + "checkpoint: {every: 0}\n",
        "checkpoint.every: must be >= 1, got 0",
    ),
    load("checkpoints by a number", GOOD + "checkpoint: 5\n", "checkpoint: must be a mapping, got 5"),
    load(
        "attackers per round without attacks",
        GOOD + "cohort: {attackers_per_round: 1}\n",
        "cohort.attackers_per_round: must be null where there are no attacks, got 1",
    ),
    load(
        "attackers per round that only one of two windows has",
        GOOD
        + "cohort: {size: 4, attackers_per_round: 2}\nattacks:\n"
        + "  - {name: badnets, label: a, clients: {count: 3}, target: 0, trigger: grid, rounds: {last: 1}}\n"
        + "  - {name: badnets, label: b, clients: {count: 1}, target: 0, trigger: grid, rounds: {first: 2}}\n",
        "cohort.attackers_per_round: must be <= 1: the attacks have 1 clients and the cohort is of 4, got 2",
    ),
    load(
        "more attackers than clients",
        GOOD + ATTACK.replace("count: 2", "count: 12"),
        "attacks: must take at most partition.clients (10) clients together, got 12",
    ),
    load(
        "a client listed in two attacks, and one that is none",
        GOOD + TWO,
        "attacks[1].clients.ids: must list clients that no attack has yet, got 2 as in attacks[0]",
        "attacks[1].clients.ids: must be clients from 0 to 9 (partition.clients is 10), got 30",
    ),
    load(
        "a client listed twice",
        GOOD + ATTACK.replace("count: 2", "ids: [4, 4]"),
        "attacks[0].clients.ids: must list clients that no attack has yet, got 4 twice",
    ),
    load("nobody listed", GOOD + ATTACK.replace("count: 2", "ids: []"), "attacks[0].clients.ids: must not be empty"),
    load(
        "nobody selected",
        GOOD + ATTACK.replace("{count: 2}", "{}"),
        "attacks[0].clients: must hold exactly one of share, count and ids, got none",
    ),
    load(
        "an attack after the end",
        GOOD + ATTACK.replace("target: 0", "target: 0, rounds: {first: 4}"),
        "attacks[0].rounds.first: must be <= rounds (3), or the attack never acts, got 4",
    ),
    load(
        "a window that ends before it begins",
        GOOD + ATTACK.replace("target: 0", "target: 0, rounds: {first: 3, last: 2}"),
        "attacks[0].rounds.last: must be >= first (3), got 2",
    ),
    load(
        "pollution anew in every batch",
        GOOD + ATTACK.replace("target: 0", "target: 0, role: polluted"),
        "attacks[0].per: must be dataset for a polluted client: it trains by itself, only its data is poisoned, got "
        "'batch'",
    ),
    load(
        "a misspelt target",
        GOOD + ATTACK.replace("target: 0", "target: all_to_al"),
        "attacks[0].target: must be an integer or all_to_all, got 'all_to_al'; did you mean 'all_to_all'?",
    ),
    load(
        "clean labels of all classes",
        GOOD + ATTACK.replace("target: 0", "target: all_to_all, labels: clean"),
        "attacks[0].target: must be a label: with labels: clean an attack stamps the images of one class, got "
        "'all_to_all'; set labels: dirty, or name a class",
    ),
    load(
        "labels that are neither dirty nor clean",
        GOOD + ATTACK.replace("target: 0", "target: 0, labels: cleen"),
        "attacks[0].labels: must be dirty or clean, got 'cleen'; did you mean 'clean'?",
    ),
    load(
        "a cover of disturbed triggers where there are none",
        GOOD + ATTACK.replace("target: 0", "target: 0, share: 0.1, cover: 2"),
        "attacks[0].cover: must be 0: the trigger 'grid' has no disturbed copies, got 2; take wanet",
    ),
    load(
        "a cover larger than the batch",
        GOOD + ATTACK.replace("target: 0", "target: 0, share: 0.5, cover: 2").replace("grid", "wanet"),
        "attacks[0].cover: must leave share * (1 + cover) at most 1, got 1.5",
    ),
    load(
        "a cover of clean labels",
        GOOD + ATTACK.replace("target: 0", "target: 0, labels: clean, cover: 1").replace("grid", "wanet"),
        "attacks[0].cover: must be 0 with labels: clean, got 1",
    ),
    load(
        "attacks of one name",
        GOOD + TWO.replace("label: a, ", "").replace("label: b, ", "").replace("[2, 30]", "[3]"),
        "attacks: must have different labels, got 'badnets' 2 times; give each its own label",
    ),
    load(
        "a bucket larger than the cohort",
        GOOD + "bucket_size: 11\n",
        "bucket_size: must be <= the cohort (10) or null for one sum, got 11",
    ),
    load(
        "median under a full sum",
        GOOD + "aggregation: median\nsecure_sum: {name: ckks}\n",
        "aggregation: 'median' compares updates, but bucket_size: null shows it one sum over the cohort; set "
        "bucket_size to 3 or less, or take a rule that acts on a sum (mean, norm_clip with where: client) and repair "
        "the model afterwards (cleanup: [rnp])",
    ),
    load(
        "median over too few buckets",
        GOOD + "aggregation: median\nbucket_size: 5\n",
        "aggregation: 'median' needs at least 3 updates or buckets, got 2 buckets of 5; set bucket_size to 3 or less",
    ),
    load(
        "median over too few updates",
        GOOD + "aggregation: median\ncohort: {size: 2}\n",
        "aggregation: 'median' needs at least 3 updates or buckets, got 2 updates; set cohort.size to at least 3",
    ),
    load(
        "cleanup and detection without trusted data",
        GOOD + "cleanup: [rnp]\ndetection: [rnp_unlearned]\n",
        "cleanup[0]: 'rnp' needs trusted data, and trusted is null; add trusted: {size: 500}, or take a method that "
        "needs no data",
        "detection[0]: 'rnp_unlearned' needs trusted data, and trusted is null; add trusted: {size: 500}, or take a "
        "method that needs no data",
    ),
    load(
        "incoming inputs of honest clients",
        GOOD + ATTACK + "detection: [{name: abl_isolation, honest: true}]\n",
        "detection[0].honest: must be false unless where is training: incoming inputs are no client's, got true",
    ),
    load(
        "fewer trusted data to fit on than a detector takes",
        GOOD + "trusted: {size: 10}\ndetection: [lid, frequency, {name: label_switching, neighbors: 5}, strip]\n",
        "detection[0]: 'lid' needs 20 trusted samples to fit on, got 5; raise trusted.size or lower "
        "trusted.validate_share",
        "detection[1]: 'frequency' needs 20 trusted samples to fit on, got 5; raise trusted.size or lower "
        "trusted.validate_share",
    ),
    load(
        "cleanup and detection that never run",
        GOOD
        + "trusted: {size: 50}\ncleanup: [{name: rnp, every: 5}]\ndetection: [{name: rnp_unlearned, rounds: [3, 9]}]\n",
        "cleanup[0].every: must be <= rounds (3), or 'rnp' never runs, got 5",
        "detection[0].rounds: must be rounds of the run (1 to 3), got 9",
    ),
    load(
        "two timetables at once",
        GOOD + "trusted: {size: 50}\ncleanup: [{name: rnp, every: 2, rounds: [1]}]\n"
        "detection: [{name: strip, every: 3, rounds: [2]}]\n",
        "cleanup[0].every: must be left out where rounds names the rounds: these alone count, got 2",
        "detection[0].every: must be left out where rounds names the rounds: these alone count, got 3",
    ),
    load(
        "a copy to roll back",
        GOOD + "trusted: {size: 50}\ncleanup: [{name: rnp, rollback: 0.02}]\n",
        "cleanup[0].rollback: must be 0.1 unless mode is in_loop: the federation goes on without the copy, got 0.02",
    ),
    load(
        "an isolation after the last round",
        GOOD + "local_defense: abl\n",
        "local_defense.isolate_after: must be <= rounds (3), or no client ever isolates, got 5",
    ),
    load(
        "a grid too fine for the encryption",
        GOOD + "secure_sum: {name: ckks, grid_bits: 32}\n",
        "secure_sum.grid_bits: half a grid step (1.16e-10) must exceed the noise of 10 clients (2.63e-09); use at most "
        "27 or, with parameters: n8192, at most 31",
    ),
    load(
        "encryption for one",
        GOOD + "secure_sum: {name: ckks}\ncohort: {size: 1}\n",
        "cohort.size: must be >= 2 under encryption: two clients decrypt and are compared, got 1",
    ),
    load(
        "unknown strategy",
        GOOD + "strategy: fedagv\n",
        "strategy.name: must be fedavg, fedavgm, fedadagrad, fedadam, fedyogi, fedprox or package.module:Class, got "
        "'fedagv'; did you mean 'fedavg'?",
    ),
    load(
        "FedProx without its weight",
        GOOD + "strategy: fedprox\n",
        "strategy.arguments.proximal_mu: must be a number > 0: it is the weight of the proximal term, got null; take "
        "fedavg for none",
    ),
    load(
        "FedProx with a weight that does nothing",
        GOOD + "strategy: {name: 'flwr.serverapp.strategy:FedProx', arguments: {proximal_mu: 0}}\n",
        "strategy.arguments.proximal_mu: must be a number > 0: it is the weight of the proximal term, got 0; take "
        "fedavg for none",
    ),
    load(
        "FedProx where every client has its own objective",
        GOOD + "strategy: {name: fedprox, arguments: {proximal_mu: 0.1}}\n"
        "local_defense: {name: abl, isolate_after: 2}\n",
        f"strategy.arguments.proximal_mu: {NOBODY}",
    ),
    load(
        "FedProx where everybody attacks or defends",
        GOOD
        + "strategy: {name: fedprox, arguments: {proximal_mu: 0.1}}\npartition: {name: iid, clients: 3}\n"
        + ATTACK.replace("count: 2", "ids: [0, 1]")
        + "local_defense: {name: abl, isolate_after: 2}\nlocal_defense_clients: {ids: [2]}\n",
        f"strategy.arguments.proximal_mu: {NOBODY}",
    ),
    load(
        "FedProx's optimizer state",
        GOOD + "strategy: {name: fedprox, arguments: {proximal_mu: 0.1}}\n"
        "cleanup: [{name: clp, mode: in_loop, server_optimizer_state: reset, rollback: null}]\n",
        "cleanup[0].server_optimizer_state: must be keep with fedprox, which keeps neither momentum nor moments, got "
        "'reset'",
    ),
    load(
        "a roll-back without trusted data",
        GOOD + "cleanup: [{name: clp, mode: in_loop}]\n",
        "cleanup[0].rollback: must be null without trusted data: a repair is rolled back by their accuracy, got 0.1; "
        "add trusted: {size: 500}, or set rollback: null and keep every repair",
    ),
    load(
        "fields of another engine",
        GOOD + "engine: {client_gpus: 0.5, executor: serial, workers: 2}\n",
        "engine.client_gpus: must be 0 unless engine.name is ray, got 0.5",
        "engine.workers: must be 1 or null with executor: serial, got 2",
    ),
    load(
        "no measurement where the attack is",
        GOOD + SINGLE + "evaluation: {every: 3}\n",
        "evaluation.every: leaves the last attacked rounds (2 to 2) without a measurement, and so the run, got 3; take "
        "a number that divides 2",
    ),
    load(
        "measurements that are none",
        GOOD + "evaluation: {every: 0, samples: 0}\n",
        "evaluation.every: must be >= 1, got 0",
        "evaluation.samples: must be >= 1 or null, got 0",
    ),
    load(
        "GPUs where nothing computes on them",
        GOOD + "engine: {name: ray, cuda_devices: [0]}\n",
        "engine.cuda_devices: must be null unless engine.device is cuda, got cpu",
        "engine.cuda_devices: must be null unless engine.name is local: ray has client_gpus, got ray",
    ),
    load(
        "GPUs for one process, and none at all",
        GOOD + "engine: {device: cuda, executor: serial, cuda_devices: [0, 1]}\n",
        "engine.cuda_devices: must be null with executor: serial, which computes in one process, got serial",
    ),
    load(
        "an empty list of GPUs",
        GOOD + "engine: {device: cuda, cuda_devices: []}\n",
        "engine.cuda_devices: must not be empty",
    ),
    load(
        "a cluster for another engine, under encryption, nowhere",
        GOOD + "engine: {ray_address: head}\nsecure_sum: {name: ckks}\n",
        "engine.ray_address: must be null unless engine.name is ray, got 'head'",
        "engine.ray_address: must be HOST:PORT, as `ray start --head` prints it, got 'head'",
        "engine.ray_address: must be null under encryption: the key agent serves the clients of one machine; set "
        "secure_sum: null, or leave ray_address out",
    ),
    load(
        "an executor that ray does not have",
        GOOD + "engine: {name: ray, executor: serial}\n",
        "engine.executor: must be process unless engine.name is local, got 'serial'",
    ),
    load(
        "fields of a repair in the loop for a copy",
        GOOD + TRUSTED + "cleanup: [{name: rnp, mask: persist, server_optimizer_state: reset}]\n",
        "cleanup[0].mask: must be release unless mode is in_loop: the federation goes on without the copy, got "
        "'persist'",
        "cleanup[0].server_optimizer_state: must be keep unless mode is in_loop: the federation goes on without the "
        "copy, got 'reset'",
    ),
    load(
        "a mask of what prunes nothing, and a reset of what there is not",
        GOOD + TRUSTED + "cleanup: [{name: finetune, mode: in_loop, mask: persist, server_optimizer_state: reset}]\n",
        "cleanup[0].server_optimizer_state: must be keep with fedavg, which keeps neither momentum nor moments, got "
        "'reset'",
        "cleanup[0].mask: must be release: 'finetune' prunes nothing, got 'persist'",
    ),
    load(
        "in the loop what repairs nothing",
        GOOD + TRUSTED + "cleanup: [{name: rnp_label, mode: in_loop}]\n",
        "cleanup[0].mode: must be if_stopped_now: 'rnp_label' repairs nothing, it only finds clues, got 'in_loop'",
    ),
    load(
        "an oracle with nothing to know",
        GOOD + TRUSTED + "cleanup: [{name: linf_pruning, knowledge: real, oracle: true}]\n",
        "cleanup[0].oracle: must be false where there is no attack to know of, got true",
    ),
    load(
        "the label of the attack, told to a method that is no oracle",
        GOOD + TRUSTED + ATTACK + "cleanup: [{name: trigger_recovery, target: 0}]\n",
        "cleanup[0].target: must not be the label that an attack aims at, which no defender knows, got 0; leave it out "
        "and put rnp_label before it, or set labels: all",
    ),
    load(
        "a clue that nobody finds",
        GOOD + TRUSTED + "cleanup: [{name: finetune, start: unlearned}]\n",
        "cleanup[0]: 'finetune' uses the unlearned that a cleanup before it finds, and none does in round 1; put rnp "
        "or rnp_label before it, in the same rounds",
    ),
    load(
        "a clue that is found afterwards, or not in all rounds",
        GOOD
        + TRUSTED
        + "cleanup: [{name: nad, start: recovered}, {name: rnp, rounds: [1, 3]}, {name: finetune, start: unlearned}]\n",
        "cleanup[0]: 'nad' uses the recovered that a cleanup before it finds, and none does in round 1; put rnp before "
        "it, in the same rounds",
        "cleanup[2]: 'finetune' uses the unlearned that a cleanup before it finds, and none does in round 2; put rnp "
        "or rnp_label before it, in the same rounds",
    ),
    load(
        "a search in training data that nobody polluted, with what clients do not have",
        GOOD + TRUSTED + ATTACK + "detection: [{name: strip, where: training, samples: 10, adversarial: [fgsm]}]\n",
        "detection[0].where: must be incoming where no client is polluted: an attacker does not look for its own "
        "poison, got 'training'; give an attack role: polluted",
        "detection[0].samples: must be 1000 with where: training: clients score all they hold, got 10",
        "detection[0].where: must be incoming: 'strip' needs trusted data, and clients hold none, got 'training'",
        "detection[0].adversarial: must be left out with where: training: nobody attacks inputs there",
    ),
    load(
        "adversarial inputs without triggered ones",
        GOOD + TRUSTED + "detection: [{name: strip, adversarial: [fgsm]}]\n",
        "detection[0].adversarial: must be left out where there is no attack: inputs of all kinds are told apart "
        "together",
    ),
    load(
        "one evasion twice",
        GOOD + TRUSTED + ATTACK + "detection: [{name: strip, adversarial: [fgsm, {name: fgsm, eps: 0.1}, pgd]}]\n",
        "detection[0].adversarial: must name each evasion once, got 'fgsm' 2 times; give the detector a second entry "
        "with its own label",
    ),
    load(
        "defended clients without a defense, and more than there are",
        GOOD + "local_defense_clients: {count: 11}\n",
        "local_defense_clients: must be null without a local_defense",
        "local_defense_clients: must be a choice among partition.clients (10)",
    ),
    load(
        "defended clients that do not exist",
        GOOD + "local_defense: {name: abl, isolate_after: 2}\nlocal_defense_clients: {ids: [1, 10]}\n",
        "local_defense_clients: must be a choice among partition.clients (10)",
    ),
    load(
        "defended clients, chosen twice",
        GOOD + "local_defense: {name: abl, isolate_after: 2}\nlocal_defense_clients: {ids: [1], count: 1}\n",
        "local_defense_clients: must hold exactly one of share, count and ids, got count and ids",
    ),
    load(
        "re-learning nothing from nobody",
        GOOD + "local_defense: {name: abl, isolate_after: 2}\nevaluation: {relearn: [1]}\n",
        "evaluation.relearn: must be null where there are no attacks to re-learn from",
        "evaluation.relearn: must be null with a local defense: its clients' memory belongs to the run, not to a "
        "repaired model",
        "evaluation.relearn: must be null where no cleanup repairs a model to go on from; add one (cleanup: "
        "[finetune])",
    ),
    load(
        "re-learning from what only finds clues",
        GOOD + TRUSTED + ATTACK + "cleanup: [rnp_label]\nevaluation: {relearn: [1]}\n",
        "evaluation.relearn: must be null where no cleanup repairs a model to go on from; add one (cleanup: "
        "[finetune])",
    ),
    load(
        "a cleanup that has the name of a control",
        GOOD + ATTACK + "cleanup: [{name: clp, label: twin}]\nevaluation: {relearn: [1]}\n",
        "cleanup[0].label: must be another name: the re-learning test has a control of that name, got 'twin'",
    ),
    load(
        "attacks that follow each other, and no room for both in the re-learning test",
        GOOD
        + "cohort: {size: 6, attackers_per_round: 2}\ncleanup: [clp]\nevaluation: {relearn: [1]}\nattacks:\n"
        + "  - {name: badnets, label: a, clients: {count: 4}, target: 0, trigger: grid, rounds: {last: 1}}\n"
        + "  - {name: badnets, label: b, clients: {count: 4}, target: 0, trigger: grid, rounds: {first: 2}}\n",
        "cohort.attackers_per_round: must be >= 4: a cohort of 6 finds only 2 clients that do not attack (all attacks "
        "go on in evaluation.relearn), got 2; or set cohort.size to 4",
    ),
    load(
        "a skew that is none",
        GOOD + "trusted: {size: 50, alpha: 0.1}\n",
        "trusted.alpha: must be left out unless balance is skewed, got 0.1",
    ),
]


def prepared(title: str, text: str, *lines: str) -> Broken:
    """Refused when data and model are at hand."""
    return Broken(title, text, "\n".join([DATA, *(f"  {line}" for line in lines)]))


FAULT = "faults:\n  - {kind: KIND, clients: {ids: [1]}}\n"
CERTAIN = "clients, give them a probability below 1, or set on_client_failure: fail"
FAULTS = [
    load(
        "no such kind of fault",
        GOOD + FAULT.replace("KIND", "vanishes"),
        "faults[0].kind: must be vanish, hang, die, raise, nan, wrong_shape, extra_metric, huge_count, renamed or "
        "garbage, got 'vanishes'; did you mean 'vanish'?",
    ),
    load(
        "a fault without its clients and its kind",
        GOOD + "faults: [{stage: train}]\n",
        "faults[0].kind: is required",
        "faults[0].clients: is required",
    ),
    load(
        "faults as a mapping",
        GOOD + "faults: {kind: raise, clients: {ids: [1]}}\n",
        "faults: must be a list of mappings, got a mapping; begin each entry with a dash",
    ),
    load(
        "a fault's clients chosen twice, and none of its rounds",
        GOOD + "faults: [{kind: raise, clients: {ids: [1], share: 0.5}, rounds: {first: 3, last: 2}}]\n",
        "faults[0].clients: must hold exactly one of share, count and ids, got share and ids",
        "faults[0].rounds.last: must be >= first (3), got 2",
    ),
    load(
        "no probability",
        GOOD + "faults: [{kind: raise, clients: {ids: [1]}, probability: 0}]\n",
        "faults[0].probability: must be > 0, got 0",
    ),
    load(
        "more than a probability",
        GOOD + "faults: [{kind: raise, clients: {ids: [1]}, probability: 1.5}]\n",
        "faults[0].probability: must be <= 1, got 1.5",
    ),
    load(
        "NaN in a ciphertext",
        GOOD + "secure_sum: ckks\nfaults: [{kind: nan, clients: {ids: [1]}, stage: encrypt}]\n",
        "faults[0].stage: must be train where kind is nan, got 'encrypt'",
    ),
    load(
        "a claim of examples in a decryption",
        GOOD + "secure_sum: ckks\nfaults: [{kind: huge_count, clients: {ids: [1]}, stage: decrypt}]\n",
        "faults[0].stage: must be train where kind is huge_count, got 'decrypt'",
    ),
    load(
        "a fault of the encryption in the clear",
        GOOD + "faults: [{kind: raise, clients: {ids: [1]}, stage: decrypt}]\n",
        "faults[0].stage: must be train where secure_sum is null: nothing is encrypted or decrypted, got 'decrypt'; "
        "add secure_sum: ckks, or leave stage out",
    ),
    load(
        "faulty clients that are not there",
        GOOD + "faults:\n  - {kind: raise, clients: {ids: [1, 10]}}\n  - {kind: nan, clients: {count: 11}}\n",
        "faults[0].clients.ids: must be clients from 0 to 9 (partition.clients is 10), got 10",
        "faults[1].clients.count: must be <= partition.clients (10), got 11",
    ),
    load(
        "a fault after the run",
        GOOD + "faults: [{kind: raise, clients: {ids: [1]}, rounds: {first: 4}}]\n",
        "faults[0].rounds.first: must be <= rounds (3), or nobody ever fails, got 4",
    ),
    load(
        "a client that hangs, or dies, in the driver's own process",
        GOOD + FAULT.replace("KIND", "hang") + "  - {kind: die, clients: {ids: [2]}}\n"
        "engine: {executor: serial, timeout: 5}\n",
        "faults[0].kind: must not be hang with engine.executor: serial: clients run in the driver's own process; "
        "set engine.executor: process",
        "faults[1].kind: must not be die with engine.executor: serial: clients run in the driver's own process; "
        "set engine.executor: process",
    ),
    load(
        "a client that takes Ray's actor with it",
        GOOD + FAULT.replace("KIND", "die") + "engine: ray\n",
        "faults[0].kind: must not be die on ray: Flower gives a dead actor further clients, and all of them fail; "
        "set engine.name: local, or take kind: hang or vanish",
    ),
    load(
        "an hour's wait for a client that will not answer",
        GOOD + FAULT.replace("KIND", "vanish"),
        "faults[0].kind: vanish is waited for in every round: engine.timeout must be <= 600 seconds, got 3600; "
        "set engine.timeout to what a healthy client needs at most",
    ),
    load(
        "a run to survive in which everybody fails",
        GOOD + "faults:\n  - {kind: raise, clients: {share: 0.5}}\n"
        "  - {kind: nan, clients: {share: 1.0}, rounds: {first: 2}}\n"
        "on_client_failure: skip\n",
        "faults: must leave 1 of 10 clients that can answer, or no round can be carried out, got 0 in round 2; "
        f"take fewer {CERTAIN}",
    ),
    load(
        "an encrypted run to survive in which one client is left",
        GOOD
        + "secure_sum: ckks\nfaults: [{kind: garbage, clients: {count: 9}, stage: decrypt}]\non_client_failure: skip\n",
        "faults: must leave 2 of 10 clients that can answer, or no round can be carried out, got 1 in round 1; "
        f"take fewer {CERTAIN}",
    ),
]

AT_THE_DATA = [
    prepared(
        "a policy for BatchNorm where there is none",
        GOOD + TRUSTED + "batch_norm: local\n",
        "batch_norm: must be average: model 'mlp' has no BatchNorm2d, got 'local'",
    ),
    prepared(
        "the same, of a transformer",
        GOOD.replace("{name: mlp}", "{name: vit, patch: 1, width: 8, depth: 1}") + "batch_norm: group_norm\n",
        "batch_norm: must be average: model 'vit' has no BatchNorm2d, got 'group_norm'",
    ),
    prepared(
        "more images to measure on than there are",
        GOOD + "evaluation: {samples: 5000}\n",
        "evaluation.samples: must be between the number of classes (10) and of test images (449), got 5000",
    ),
    prepared(
        "fewer images to measure on than classes",
        GOOD + "evaluation: {samples: 9}\n",
        "evaluation.samples: must be between the number of classes (10) and of test images (449), got 9",
    ),
    prepared(
        "a target that is no class",
        GOOD + ATTACK.replace("target: 0", "target: 10"),
        "attacks[0].target: must be a class of the data, 0 to 9, got 10",
    ),
    prepared(
        "a trigger larger than the images, and a target that is no class",
        GOOD + ATTACK.replace("{name: grid}", "{name: grid, margin: 6}").replace("target: 0", "target: 99"),
        "attacks[0].target: must be a class of the data, 0 to 9, got 99",
        "attacks[0].trigger: needs images of at least 9x9 pixels (3x3 pattern, margin 6), got 8x8; lower the margin or "
        "take larger images",
    ),
    prepared(
        "triggers that images of 8x8 have no room for",
        GOOD
        + "attacks:\n"
        + "".join(
            f"  - {{name: badnets, label: t{i}, clients: {{ids: [{i}]}}, target: 0, trigger: {trigger}}}\n"
            for i, trigger in enumerate(
                [
                    "{name: square, size: 8}",
                    "{name: four_corners, far_margin: 3}",
                    "{name: single_pixel, right: 8}",
                    "{name: trojan_patch, size: 5}",
                    "{name: low_frequency, cutoff: 9}",
                    "{name: object_overlay, width: 0.5}",
                ]
            )
        ),
        "attacks[0].trigger: needs images of at least 9x9 pixels (8x8 square, margin 1), got 8x8; lower the margin or "
        "take larger images",
        "attacks[1].trigger: needs images of at least 9x9 pixels (two 3x3 patterns, margins 0 and 3), got 8x8; lower "
        "the margins or take larger images",
        "attacks[2].trigger: needs images of at least 2x9 pixels (the pixel is 1 from the lower and 8 from the right "
        "edge), got 8x8; lower right and bottom or take larger images",
        "attacks[3].trigger: needs images of at least 9x9 pixels (5x5 patch, margin 4), got 8x8; lower the margin or "
        "take larger images",
        "attacks[4].trigger: needs images of at least 9x9 pixels (cutoff 9), got 8x8; lower the cutoff or take larger "
        "images",
        "attacks[5].trigger: needs images on which the object is at least 4 pixels wide, got 3.4; raise width, lower "
        "zoom or take larger images",
    ),
    prepared(
        "triggers from files that are not there",
        GOOD
        + TWO.replace("[2, 30]", "[3]")
        .replace("grid", "{name: blend, file: gone.png}", 1)
        .replace("grid", "{name: trojan_patch, file: no.npz}"),
        "attacks[0].trigger.file: must be a file, got gone.png",
        "attacks[1].trigger.file: must be a file, got no.npz",
    ),
    prepared(
        "a repair of channels without channels",
        GOOD + "trusted: {size: 50}\ncleanup: [rnp]\n",
        "cleanup[0]: cannot act: rnp masks channels and the model has neither BatchNorm2d nor Conv2d; take a model "
        "with trainable BatchNorm2d scales (cnn, wrn16-1, resnet18), or with convolutions and no normalization",
    ),
    prepared(
        "more trusted data than data",
        GOOD + "trusted: {size: 5000}\n",
        "trusted.size: must leave samples for the clients: less than 1348, got 5000",
    ),
    prepared(
        "trusted data of classes that are none",
        GOOD + "trusted: {size: 50, labels: [3, 10, 12]}\n",
        "trusted.labels: must be classes of the data, got 10",
        "trusted.labels: must be classes of the data, got 12",
    ),
    prepared(
        "repair and detection with trusted data of one class",
        GOOD.replace("mlp", "cnn")
        + "trusted: {size: 40, labels: [3]}\ncleanup: [clp, rnp]\n"
        + "detection: [strip, model_mutation, {name: frequency, network: linear, transform: log}, {name: lid, "
        + "neighbors: 5}, {name: spectral_signatures, center: trusted}, {name: activation_clustering, suspect: "
        + "excess}, kernel_density, label_switching]\n",
        *(
            f"{path} needs trusted data of several classes, and all of it is of one; leave trusted.labels out or name "
            "more classes"
            for path in ("cleanup[1]: 'rnp'", "detection[6]: 'kernel_density'", "detection[7]: 'label_switching'")
        ),
    ),
    prepared(
        "an aggregation rule with trusted data of one class",
        GOOD.replace("mlp", "cnn") + "trusted: {size: 4, alpha: 0.001, balance: skewed}\naggregation: masa\n",
        "aggregation: 'masa' needs trusted data of several classes, and all of it is of one; raise trusted.size or set "
        "trusted.balance to balanced",
    ),
    prepared(
        "adversarial examples of a class that is none",
        GOOD.replace("mlp", "cnn")
        + TRUSTED
        + ATTACK
        + "detection: [{name: strip, adversarial: [fgsm, {name: cw, target: 10}]}]\n",
        "detection[0].adversarial[1].target: must be below the number of classes (10), got 10",
    ),
    prepared(
        "what only the trusted images, their size and classes can tell",
        GOOD.replace("{name: digits}", "{name: generated, shape: [1, 6, 6]}").replace("rounds: 3", "rounds: 1")
        + "trusted: {size: 300, labels: [0, 1, 2, 3, 4, 5, 6, 8, 9]}\n"
        + ATTACK
        + "cleanup: [{name: trigger_recovery, target: 99}]\ndetection: [frequency, kernel_density]\n",
        "cleanup[0]: cannot act: trigger_recovery searches target 99 and the labels are 0 to 9; set one of them",
        "detection[0]: cannot act: frequency: the cnn takes images from 8x8 up, not 6x6; set network: linear and "
        "transform: log",
        "detection[1]: cannot act: kernel_density: no trusted image to fit is of class 7; trust images of every class",
    ),
    prepared(
        "a single trusted image to validate, of which there is no spread",
        GOOD.replace("mlp", "cnn") + "trusted: {size: 40, validate_share: 0.025}\n" + ATTACK + "detection: [lid]\n",
        "detection[0]: cannot act: lid compares with the spread of at least 2 trusted images to validate and got 1; "
        "raise trusted.validate_share or trusted.size",
    ),
    prepared(
        "attention maps that only the images make too small",
        GOOD.replace("{name: digits}", "{name: generated, shape: [3, 32, 32]}").replace(
            "{name: mlp}", "{name: torchvision, architecture: vgg11}"
        )
        + TRUSTED
        + "cleanup: [{name: nad, betas: [500, 500, 500, 500, 500]}]\n",
        "cleanup[0]: cannot act: nad compares maps and that of tap 'net.features.20' has one pixel, which is 1 for "
        "every image once it is normalized; take a model with taps that have maps (cnn, wrn16-1, resnet18), or "
        "set taps on yours to modules before the global pool",
    ),
    prepared(
        "a start that is not there, and a repair that cannot act",
        GOOD + TRUSTED + "start: {checkpoint: /nowhere/model.safetensors}\ncleanup: [rnp]\n",
        "start.checkpoint: /nowhere/model.safetensors: must be a file, got nothing of that name",
        "cleanup[0]: cannot act: rnp masks channels and the model has neither BatchNorm2d nor Conv2d; take a model "
        "with trainable BatchNorm2d scales (cnn, wrn16-1, resnet18), or with convolutions and no normalization",
    ),
    prepared(
        "a start that is a folder",
        GOOD + "start: {checkpoint: /}\n",
        "start.checkpoint: /: must be a file, got a folder; name the file in it",
    ),
    prepared(
        "more clients than samples",
        GOOD + "partition: {name: iid, clients: 5000}\n",
        "partition.clients: must be at most the number of training samples, 1348, got 5000",
    ),
    prepared(
        "a missing data file",
        GOOD.replace("digits", "npz, file: gone.npz, root: /nowhere"),
        "gone.npz: must lie in /nowhere, got no such folder; name the folder of data files in data.root or in the "
        "environment variable FEDBD_DATA",
    ),
]

AT_THE_STRATEGY = [
    (
        "arguments that are none, or not the user's",
        "strategy: {name: fedadam, arguments: {etta: 2, min_train_nodes: 3}}\n",
        [
            "strategy.arguments.etta: is no argument of FedAdam; did you mean 'eta'?",
            "strategy.arguments.min_train_nodes: is not the user's to set; set cohort.size and partition.clients",
        ],
    ),
    (
        "values of a wrong type",
        "strategy: {name: fedadam, arguments: {eta: fast, tau: true, weighted_by_key: 3, "
        "train_metrics_aggr_fn: sum}}\n",
        [
            "strategy.arguments.eta: must be a number, got 'fast'",
            "strategy.arguments.tau: must be a number, got true",
            "strategy.arguments.weighted_by_key: must be text, got 3; put it in quotes",
            "strategy.arguments.train_metrics_aggr_fn: is a function, which YAML cannot give, got 'sum'",
        ],
    ),
    (
        "values out of range",
        "strategy: {name: fedyogi, arguments: {beta_1: 7, beta_2: 1, eta: 0, eta_l: -1}}\n",
        [
            "strategy.arguments.beta_1: must be < 1, got 7",
            "strategy.arguments.beta_2: must be < 1, got 1",
            "strategy.arguments.eta: must be > 0, got 0",
            "strategy.arguments.eta_l: must be > 0, got -1",
        ],
    ),
    (
        "values of a class by its path",
        "strategy: {name: 'flwr.serverapp.strategy:FedAvgM', arguments: {server_momentum: true, "
        "server_learning_rate: -0.5}}\n",
        [
            "strategy.arguments.server_momentum: must be a number, got true",
            "strategy.arguments.server_learning_rate: must be > 0, got -0.5",
        ],
    ),
    (
        "a rule over single updates",
        "strategy: {name: 'flwr.serverapp.strategy:Krum'}\n",
        [
            "strategy: must work on the mean of updates (FedAvg, FedAvgM, FedAdagrad, FedAdam, FedYogi, FedProx, or a "
            "class with mean_only = True), got Krum; a rule over single updates belongs into aggregation"
        ],
    ),
    (
        "a class that is not there",
        "strategy: {name: 'flwr.serverapp.strategy:FedAvgg'}\n",
        [
            "strategy.name: must name a class in flwr.serverapp.strategy, got 'flwr.serverapp.strategy:FedAvgg'; did "
            "you mean 'FedAvg'?"
        ],
    ),
]


def titles(rows: list[Broken]) -> list[str]:
    return [row.title for row in rows]


def message(broken: Broken, folder: Path) -> str:
    file = folder / "broken.yaml"
    file.write_text(broken.text, encoding="utf-8")
    with pytest.raises(UserError) as caught:
        prepare(load_scenario(file, broken.sets))
    return str(caught.value).replace(str(file), "FILE")


def test_the_unbroken_base_loads(tmp_path: Path) -> None:
    file = tmp_path / "good.yaml"
    file.write_text(GOOD + ATTACK, encoding="utf-8")
    assert strategy_problems(load_scenario(file)) == []
    prepare(load_scenario(file))


@pytest.mark.parametrize("broken", FIELDS, ids=titles(FIELDS))
def test_fields(broken: Broken, tmp_path: Path) -> None:
    assert message(broken, tmp_path) == broken.message


@pytest.mark.parametrize("broken", NO_FIELDS, ids=titles(NO_FIELDS))
def test_files_and_settings(broken: Broken, tmp_path: Path) -> None:
    assert message(broken, tmp_path) == broken.message


@pytest.mark.parametrize("broken", [*COMBINATIONS, *FAULTS], ids=titles([*COMBINATIONS, *FAULTS]))
def test_combinations(broken: Broken, tmp_path: Path) -> None:
    assert message(broken, tmp_path) == broken.message


@pytest.mark.parametrize("broken", AT_THE_DATA, ids=titles(AT_THE_DATA))
def test_what_only_the_data_tell(broken: Broken, tmp_path: Path) -> None:
    assert message(broken, tmp_path) == broken.message


@pytest.mark.parametrize(("title", "text", "lines"), AT_THE_STRATEGY, ids=[row[0] for row in AT_THE_STRATEGY])
def test_what_only_the_strategy_tells(title: str, text: str, lines: list[str], tmp_path: Path) -> None:
    file = tmp_path / "broken.yaml"
    file.write_text(GOOD + text, encoding="utf-8")
    assert [str(problem) for problem in strategy_problems(load_scenario(file))] == lines


THIRD_PARTY = """
from dataclasses import dataclass, field
from flwr.serverapp.strategy import FedAvg
import numpy as np

class Typed(FedAvg):
    mean_only = True
    def __init__(self, steps: int = 3, beta_1: "float | None" = None, loose=None):
        super().__init__()

class Unresolved(FedAvg):
    mean_only = True
    def __init__(self, steps: "Nowhere" = 3):
        super().__init__()

class Picky(FedAvg):
    mean_only = True
    def __init__(self, mu, **kwargs):
        super().__init__(**kwargs)
        if mu < 0:
            raise ArithmeticError("mu is negative")

@dataclass
class Thawed:
    x: int = 1

@dataclass(frozen=True, kw_only=True)
class Odd:
    table: np.ndarray | None = None
    needs = frozenset()
    minimum_rows = 1
    def aggregate(self, cohort, memory, rng): ...

@dataclass(frozen=True, kw_only=True)
class Strict:
    low: int = 0
    high: int = 1
    needs = frozenset()
    minimum_rows = 1
    def __post_init__(self):
        if self.low > self.high:
            raise ValueError("low must not exceed high")
    def aggregate(self, cohort, memory, rng): ...

number = 3
"""


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("strategy: {name: 'fedbd_third:Picky'}\n", "strategy.arguments.mu: is required by Picky"),
        (
            "strategy: {name: 'fedbd_third:Picky', arguments: {mu: -1}}\n",
            "strategy.arguments: are refused by Picky: mu is negative",
        ),
        (
            "strategy: {name: 'fedbd_third:Typed', arguments: {steps: 1.5, beta_1: 7, loose: x}}\n",
            "strategy.arguments.steps: must be an integer, got 1.5",
        ),
        ("strategy: {name: 'fedbd_third:Unresolved', arguments: {steps: x}}\n", None),
        (
            "strategy: {name: 'fedbd_third:number'}\n",
            "strategy.name: must name a subclass of flwr.serverapp.strategy.Strategy, got 'fedbd_third:number'",
        ),
        (
            "aggregation: {name: 'fedbd_third:Thawed'}\n",
            "aggregation.name: must name a frozen dataclass, got 'fedbd_third:Thawed'; write @dataclass(frozen=True, "
            "kw_only=True) above the class",
        ),
        (
            "aggregation: {name: 'fedbd_third:Strict', low: 3}\n",
            "aggregation: is refused by Strict: low must not exceed high",
        ),
        (
            "aggregation: {name: 'fedbd_third_broken:Rule'}\n",
            "aggregation.name: must be importable (NameError: name 'undefined' is not defined), got "
            "'fedbd_third_broken:Rule'",
        ),
    ],
    ids=[
        "argument left out",
        "argument refused",
        "argument of a wrong type",
        "types unknown",
        "no class",
        "not frozen",
        "own check",
        "module that breaks",
    ],
)
def test_third_parties(text: str, line: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "fedbd_third.py").write_text(THIRD_PARTY, encoding="utf-8")
    (tmp_path / "fedbd_third_broken.py").write_text("undefined\n", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "fedbd_third", raising=False)
    file = tmp_path / "broken.yaml"
    file.write_text(GOOD + text, encoding="utf-8")
    try:
        found = [str(problem) for problem in strategy_problems(load_scenario(file))]
    except UserError as error:
        found = [str(problem) for problem in error.problems]
    assert found == ([] if line is None else [line])


def test_a_third_partys_field_that_yaml_cannot_give(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "fedbd_third.py").write_text(THIRD_PARTY, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "fedbd_third", raising=False)
    file = tmp_path / "broken.yaml"
    file.write_text(GOOD + "aggregation: {name: 'fedbd_third:Odd'}\n", encoding="utf-8")
    with pytest.raises(UserError) as caught:
        load_scenario(file)
    (problem,) = caught.value.problems
    assert problem.path == "aggregation.name"
    assert problem.expected.startswith("must have fields of types that YAML can give (PydanticSchemaGenerationError: ")
    assert "numpy.ndarray" in problem.expected


@pytest.mark.parametrize(
    ("place", "reason"),
    [("gone.yaml", "No such file or directory"), (".", "Is a directory")],
    ids=["missing", "folder"],
)
def test_a_file_that_cannot_be_read(place: str, reason: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        load_scenario(tmp_path / place)
    assert str(caught.value) == f"{tmp_path / place}: must be a readable YAML file: {reason}"


def test_a_file_that_is_no_text(tmp_path: Path) -> None:
    file = tmp_path / "binary.yaml"
    file.write_bytes(b"name: \xff\xfe")
    with pytest.raises(UserError) as caught:
        load_scenario(file)
    assert str(caught.value) == f"{file}: must be a readable YAML file: it is not UTF-8 text"


def test_every_row_has_its_own_title_and_there_are_enough_of_them() -> None:
    rows = [*FIELDS, *NO_FIELDS, *COMBINATIONS, *FAULTS, *AT_THE_DATA]
    assert len({row.title for row in rows}) == len(rows) >= 34


def test_a_gpu_that_the_machine_does_not_have(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    file = tmp_path / "broken.yaml"
    file.write_text(GOOD + "engine: {device: cuda, cuda_devices: [1, 2, 3]}\n", encoding="utf-8")
    with pytest.raises(UserError) as caught:
        prepare(load_scenario(file))
    assert str(caught.value) == "engine.cuda_devices: must be GPUs of this machine (0 to 1), got 2, 3"


def test_a_copy_that_is_never_rolled_back_may_say_so(tmp_path: Path) -> None:
    file = tmp_path / "scenario.yaml"
    file.write_text(GOOD + "trusted: {size: 50}\ncleanup: [{name: rnp, rollback: null}]\n", encoding="utf-8")
    assert load_scenario(file).cleanup[0].rollback is None
