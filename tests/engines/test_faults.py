"""Every kind of fault, stage and policy: the run goes on without the client, or ends with the reason."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from fedbd.config.plans import FAULT_STAGES
from fedbd.config.scenario import Scenario, from_dict
from fedbd.crypto.agent_client import start_agent
from fedbd.crypto.ckks import Ckks
from fedbd.errors import RunFailed
from fedbd.faults import HARMLESS
from fedbd.flower.app_loader import load_component
from fedbd.flower.executors import Executor, ProcessPoolExecutor, SerialExecutor
from fedbd.flower.local_grid import LocalGrid
from fedbd.records.record import RunFolder, read_rounds, read_summary, same_records
from fedbd.running.engines import flower_app_dir
from fedbd.running.runs import run

serve: Any = load_component(flower_app_dir(), "server", "app", "serve")
CLIENT_APP = (flower_app_dir() / "clients" / "app.py", "app")
TIMEOUT = 3.0
PATIENCE = 0.5
"""Of the server, per turn, for what the executor does not end: replies that vanish."""
FAULTY = 1
NO_REPLY, DIED, RAISED = "no reply in time", "the client's process died", "RuntimeError: a simulated fault"
RAW: dict[str, Any] = {
    "name": "faulty",
    "seed": 4,
    "rounds": 2,
    "data": "digits",
    "partition": {"name": "iid", "clients": 4},
    "model": {"name": "mlp", "hidden": [4]},
    "training": {"epochs": 1},
    "on_client_failure": "skip",
}

REASONS = {
    "train": {
        "vanish": NO_REPLY,
        "hang": NO_REPLY,
        "die": DIED,
        "raise": RAISED,
        "nan": "cannot be summed exactly: expected finite",
        "wrong_shape": r"arrays do not fit the model: '[\w.]+weight' must be \(4, 64\), got \(64,\)",
        "renamed": r"arrays do not fit the model: missing \['[\w.]+weight'\], unknown \['[\w.]+.renamed'\]",
        "garbage": "no npy array",
    },
    "encrypt": {
        "vanish": NO_REPLY,
        "hang": NO_REPLY,
        "die": DIED,
        "raise": RAISED,
        "wrong_shape": r"ciphertext.* \d+ values",
        "renamed": "the reply lacks 'row'",
        "garbage": "ciphertext",
    },
    "decrypt": {
        "vanish": f"asked to decrypt, failed: {NO_REPLY}",
        "hang": f"asked to decrypt, failed: {NO_REPLY}",
        "die": f"asked to decrypt, failed: {DIED}",
        "raise": f"asked to decrypt, failed: {RAISED}",
        "wrong_shape": "asked to decrypt, sent no sums: rows for",
        "renamed": "asked to decrypt, sent no sums: invalid literal for int",
        "garbage": "asked to decrypt, sent no sums: no npy array",
    },
}
"""Stage -> kind -> what the server comes to know, for kinds that cost the client's update or answer."""


class Bench(NamedTuple):
    """What all cells of the matrix share: starting workers and a key agent for each would take minutes."""

    pool: ProcessPoolExecutor
    serial: SerialExecutor
    observed: Path


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    observed = tmp_path_factory.mktemp("observed")
    with pytest.MonkeyPatch.context() as patch, start_agent(Ckks()) as agent:
        patch.setenv("FEDBD_OBSERVER", str(observed))
        patch.setenv("FEDBD_KEY_AGENT", agent.handle)
        with ProcessPoolExecutor(CLIENT_APP, 2, timeout=TIMEOUT) as pool, SerialExecutor(CLIENT_APP) as serial:
            yield Bench(pool, serial, observed)


def scenario(*faults: dict[str, Any], **fields: Any) -> Scenario:
    engine = {"timeout": PATIENCE, "workers": 2, **fields.pop("engine", {})}
    return from_dict({**RAW, "faults": list(faults), "engine": engine, **fields})


def carried_out(bench: Bench, executor: Executor, s: Scenario, folder: Path) -> list[dict[str, Any]]:
    shutil.rmtree(bench.observed)  # a run that failed leaves there what nobody collected
    serve(LocalGrid(executor, s.partition.clients), s, RunFolder(folder), None)
    return read_rounds(folder)


CELLS = [(kind, stage) for kind, stages in FAULT_STAGES.items() for stage in stages]


def executor_for(bench: Bench, kind: str) -> Executor:
    return bench.pool if kind in ("hang", "die") else bench.serial


@pytest.fixture(scope="module")
def unfailing(bench: Bench, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The encrypted run in which nobody fails."""
    return carried_out(bench, bench.serial, scenario(secure_sum="ckks"), tmp_path_factory.mktemp("unfailing"))


@pytest.mark.parametrize(("kind", "stage"), CELLS, ids=lambda value: value)
def test_the_run_survives_and_the_record_says_who_and_why(
    kind: str, stage: str, bench: Bench, unfailing: list[dict[str, Any]], tmp_path: Path
) -> None:
    asked = [entry["client"] for entry in unfailing[1]["clients_saw"]]
    client = asked[0] if stage == "decrypt" else FAULTY
    fault = {"kind": kind, "clients": {"ids": [client]}, "stage": stage, "rounds": {"first": 1, "last": 1}}
    lines = carried_out(bench, executor_for(bench, kind), scenario(fault, secure_sum="ckks"), tmp_path / "run")
    summary = read_summary(tmp_path / "run")
    assert summary is not None
    assert (summary["status"], summary["rounds"]) == ("finished", 2)
    first, second = lines[1:]
    assert first["notes"]["simulated_faults"] == {str(client): {stage: kind}}
    assert "faults" not in second["notes"]
    assert "simulated_faults" not in second["notes"]
    assert second["participants"] == second["accepted"] == [0, 1, 2, 3]
    assert (first["participants"], first["bit_exact"]) == ([0, 1, 2, 3], True)
    if kind in HARMLESS:
        assert "faults" not in first["notes"]
        assert first["accepted"] == [0, 1, 2, 3]
        assert first["weights_sha256"] == unfailing[1]["weights_sha256"]
        return
    assert list(first["notes"]["faults"]) == [str(client)]
    assert re.search(REASONS[stage][kind], first["notes"]["faults"][str(client)]), first["notes"]["faults"]
    kept = stage == "decrypt"  # the update had come: only the answer was lost
    left = [0, 1, 2, 3] if kept else [other for other in range(4) if other != client]
    assert first["accepted"] == left
    assert first["server_saw"]["clients_per_sum"] == [len(left)]
    assert (first["weights_sha256"] == unfailing[1]["weights_sha256"]) is kept
    saw = {entry["client"] for entry in first["clients_saw"]}
    assert len(saw) == (3 if kept else 2)  # whoever was asked got the sums
    assert (client in saw) is kept


@pytest.mark.parametrize(
    ("kind", "stage"), [cell for cell in CELLS if cell[0] not in HARMLESS], ids=lambda value: value
)
def test_the_run_ends_with_the_reason_and_keeps_what_was_finished(
    kind: str, stage: str, bench: Bench, unfailing: list[dict[str, Any]], tmp_path: Path
) -> None:
    asked = [entry["client"] for entry in unfailing[2]["clients_saw"]]
    client = asked[0] if stage == "decrypt" else FAULTY
    fault = {"kind": kind, "clients": {"ids": [client]}, "stage": stage, "rounds": {"first": 2}}
    s = scenario(fault, secure_sum="ckks", on_client_failure="fail")
    with pytest.raises(RunFailed, match=rf"round 2: client {client}[:,] .*({REASONS[stage][kind]})"):
        carried_out(bench, executor_for(bench, kind), s, tmp_path / "run")
    summary = read_summary(tmp_path / "run")
    assert summary is not None
    assert (summary["status"], summary["rounds"]) == ("failed", 1)
    assert summary["reason"].startswith(f"round 2: client {client}")
    assert same_records(read_rounds(tmp_path / "run"), unfailing[:2]) == []


@pytest.fixture(scope="module")
def fine(bench: Bench, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """By weighting the plain round in which nobody fails."""
    return {
        weighting: carried_out(
            bench,
            bench.serial,
            scenario(rounds=1, cohort={"weighting": weighting, "largest_weight": 2.0}),
            tmp_path_factory.mktemp(weighting),
        )[1]
        for weighting in ("equal", "examples")
    }


@pytest.mark.parametrize(
    ("kind", "weighting"),
    [*((kind, "equal") for kind in FAULT_STAGES), *((kind, "examples") for kind in (*HARMLESS, "nan"))],
)
def test_in_the_clear(kind: str, weighting: str, bench: Bench, fine: dict[str, dict[str, Any]], tmp_path: Path) -> None:
    fault = {"kind": kind, "clients": {"ids": [FAULTY]}}
    s = scenario(fault, rounds=1, cohort={"weighting": weighting, "largest_weight": 2.0})
    line, whole = carried_out(bench, executor_for(bench, kind), s, tmp_path / "run")[1], fine[weighting]
    harmless = kind in HARMLESS
    assert line["accepted"] == ([0, 1, 2, 3] if harmless else [0, 2, 3])
    assert line["server_saw"]["clients_per_sum"] == [1] * len(line["accepted"])
    assert list(line["notes"].get("faults", {})) == ([] if harmless else [str(FAULTY)])
    counts = kind == "huge_count" and weighting == "examples"  # it claims 1e9 examples and gets the cap
    assert (line["weights_sha256"] == whole["weights_sha256"]) is (harmless and not counts)
    one = whole["bytes_up"] / 4
    if kind in ("vanish", "hang", "die", "raise"):
        assert line["bytes_up"] == 3 * one  # what did not arrive counts nowhere
    if kind in ("extra_metric", "nan", "huge_count"):
        assert line["bytes_up"] == 4 * one + (8 if kind == "extra_metric" else 0)  # what was refused did arrive


def test_a_bucket_that_drop_outs_leave_with_one_client_stays_closed(bench: Bench, tmp_path: Path) -> None:
    fields = {"secure_sum": "ckks", "bucket_size": 2, "rounds": 1}
    whole = carried_out(bench, bench.serial, scenario(**fields), tmp_path / "whole")[1]
    assert (whole["server_saw"]["kind"], whole["server_saw"]["clients_per_sum"]) == ("bucket_sums", [2, 2])
    gone = {"kind": "raise", "clients": {"ids": [FAULTY]}}
    line = carried_out(bench, bench.serial, scenario(gone, **fields), tmp_path / "run")[1]
    (alone,) = (int(client) for client in line["notes"]["faults"] if client != str(FAULTY))
    assert line["notes"]["faults"][str(alone)].startswith("left alone in its sum, which stays closed")
    assert line["notes"]["simulated_faults"] == {str(FAULTY): {"train": "raise"}}
    assert line["accepted"] == [client for client in range(4) if client not in (FAULTY, alone)]
    # One sum of two is left; it is still that of a bucket, not of the cohort.
    assert (line["server_saw"]["kind"], line["server_saw"]["clients_per_sum"]) == ("bucket_sums", [2])
    assert (line["server_saw"]["honest_per_sum_min"], line["bit_exact"]) == (2, True)
    each = whole["server_saw"]["ciphertext_bytes"] / 4
    assert line["server_saw"]["ciphertext_bytes"] == 3 * each  # the one left alone had sent its ciphertext


ATTACK = {"name": "badnets", "clients": {"ids": [0]}, "target": 0, "trigger": "grid"}


def test_the_twin_has_the_same_drop_outs(tmp_path: Path) -> None:
    often = {"kind": "raise", "clients": {"share": 1.0}, "probability": 0.3}
    late = {"kind": "garbage", "clients": {"share": 1.0}, "probability": 0.2, "stage": "decrypt"}
    fields = {"secure_sum": "ckks", "bucket_size": 3, "rounds": 3, "seed": 6, "attacks": [ATTACK]}
    partition = {"name": "iid", "clients": 7}
    s = scenario(often, late, partition=partition, engine={"executor": "serial", "workers": None}, **fields)
    result = run(s, tmp_path)
    (twin,) = (read_rounds(path) for path in (tmp_path / "twins").iterdir())
    for line, other in zip(result.rounds[1:], twin[1:], strict=True):
        for name in ("participants", "accepted", "clients_saw"):
            assert line[name] == other[name]
        for name in ("faults", "simulated_faults"):
            assert line["notes"].get(name) == other["notes"].get(name)
        assert line["attack_success_floor"] == other["attack_success"]
    assert sum(len(line["notes"].get("simulated_faults", {})) for line in twin[1:]) > 3


EVERYWHERE = (
    {"kind": "raise", "clients": {"ids": [0]}, "rounds": {"last": 1}},
    {"kind": "vanish", "clients": {"ids": [2]}, "stage": "encrypt", "rounds": {"last": 1}},
    {"kind": "garbage", "clients": {"ids": [3]}, "stage": "decrypt"},
    {"kind": "nan", "clients": {"ids": [1]}, "rounds": {"first": 2}},
    {"kind": "hang", "clients": {"ids": [4]}, "rounds": {"first": 2}},
)
"""What every engine survives: in the last round also a client that hangs, which two of them cannot end."""


def everywhere(**engine: Any) -> Scenario:
    partition = {"name": "iid", "clients": 5}
    return scenario(*EVERYWHERE, partition=partition, secure_sum="ckks", engine={"workers": 2, **engine})


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the local engine with two workers records."""
    path = run(everywhere(timeout=5), tmp_path_factory.mktemp("reference")).path
    first, second = read_rounds(path)[1:]
    assert {"0", "2"} <= set(first["notes"]["faults"])
    assert {"1", "4"} <= set(second["notes"]["faults"])
    assert any("3" in line["notes"]["faults"] for line in (first, second)), "nobody asked client 3: take another seed"
    return path


def test_one_worker_records_the_same(reference: Path, tmp_path: Path) -> None:
    assert same_records(reference, run(everywhere(timeout=5, workers=1), tmp_path).path) == []


@pytest.mark.flower
def test_ray_records_the_same_and_ends(reference: Path, tmp_path: Path) -> None:
    result = run(everywhere(name="ray", timeout=30), tmp_path)
    assert same_records(reference, result.path) == []
    assert result.summary["status"] == "finished"


@pytest.mark.flower
@pytest.mark.slow
def test_supernodes_record_the_same(reference: Path, tmp_path: Path) -> None:
    result = run(everywhere(name="deployment", timeout=120, workers=5), tmp_path)
    assert same_records(reference, result.path) == []


@pytest.mark.flower
@pytest.mark.slow
def test_a_supernode_whose_client_died_goes_on(tmp_path: Path) -> None:
    dies = {"kind": "die", "clients": {"ids": [FAULTY]}, "rounds": {"first": 2, "last": 2}}
    result = run(scenario(dies, rounds=3, engine={"name": "deployment", "timeout": 120, "workers": 4}), tmp_path)
    assert [line["accepted"] for line in result.rounds[1:]] == [[0, 1, 2, 3], [0, 2, 3], [0, 1, 2, 3]]
    assert list(result.rounds[2]["notes"]["faults"]) == [str(FAULTY)]
