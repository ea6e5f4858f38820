from __future__ import annotations

import pytest

from fedbd.central.training import PLAN
from fedbd.config.run_text import scenario_text
from fedbd.config.scenario import from_dict, twin_of
from fedbd.errors import DataError
from fedbd.records.record import RunFolder, round_record
from fedbd.report.run_view import load_run, unfinished_text
from fedbd.roles import attack_window, planned_window
from fedbd.summary import summarize


def attack(label: str, **window: int) -> dict:
    clients, trigger = {"count": 1}, {"name": "grid"}
    return {
        "name": "badnets",
        "label": label,
        "clients": clients,
        "target": 0,
        "trigger": trigger,
        **({"rounds": window} if window else {}),
    }


@pytest.mark.parametrize(
    "attacks",
    [
        [],
        [attack("a")],
        [attack("a", first=3, last=5)],
        [attack("a", first=3, last=5), attack("b", first=2, last=4)],
        [attack("a", first=4, last=99)],
    ],
)
@pytest.mark.parametrize("twin", [False, True])
def test_a_folder_gives_the_measures_that_the_run_gave(attacks, twin, tmp_path):
    plain = {"name": "t", "rounds": 8, "data": {"name": "digits"}, "model": {"name": "mlp"}, "attacks": attacks}
    scenario = twin_of(from_dict(plain)) if twin else from_dict(plain)
    lines = [round_record(round=n, clean_accuracy=n / 10, attack_success=0.6) for n in range(9)]
    written = summarize(lines, attack_window(scenario), 8, planned_window(scenario))
    folder = RunFolder(tmp_path / "run")
    folder.write_scenario(scenario_text(scenario))
    for line in lines:
        folder.append_round(line)
    folder.write_summary(written)
    assert load_run(folder.path).summary == written
    folder.write_summary({"attack_window": written["attack_window"]})  # of an older version
    assert load_run(folder.path).summary == written


@pytest.mark.parametrize(
    ("more", "status", "running", "text"),
    [
        ({}, "failed", False, "r: failed; 1 of 8 rounds are done (CA 40.0, ASR -): why\nGo on with: fedbd resume r"),
        ({}, None, False, "r: was killed; 1 of 8 rounds are done (CA 40.0, ASR -)\nGo on with: fedbd resume r"),
        ({}, None, True, "r: still runs; 1 of 8 rounds are done (CA 40.0, ASR -)"),
        (
            {"checkpoint": "off"},
            "interrupted",
            False,
            "r: interrupted; 1 of 8 rounds are done (CA 40.0, ASR -)\n"
            "It kept no checkpoints; run it anew: fedbd run r/scenario.yaml --overwrite",
        ),
    ],
)
def test_an_unfinished_run_is_told_with_the_way_on(more, status, running, text, tmp_path):
    plain = {"name": "t", "rounds": 8, "data": {"name": "digits"}, "model": {"name": "mlp"}, **more}
    folder = RunFolder(tmp_path / "run")
    folder.write_scenario(scenario_text(from_dict(plain)))
    for number in range(2):
        folder.append_round(round_record(round=number, clean_accuracy=0.4))
    if status is not None:
        folder.write_summary({"status": status, "reason": "why" if status == "failed" else None})
    assert unfinished_text("r", load_run(folder.path), running=running) == text


def test_a_folder_that_is_no_runs_is_told_for_what_it_is(tmp_path):
    (tmp_path / "training").mkdir()
    (tmp_path / "training" / PLAN).write_text("")
    (tmp_path / "runs" / "t" / "seed-1").mkdir(parents=True)
    (tmp_path / "runs" / "t" / "seed-1" / "scenario.yaml").write_text("")
    sentences = {
        "training": "got that of a training; look at its model with `fedbd inspect ",
        "runs": f"got a folder with 1 run below it; name one of them, such as {tmp_path}/runs/t/seed-1",
        "gone": "got no folder; name what `fedbd run` wrote, such as runs/NAME/seed-1",
    }
    for name, sentence in sentences.items():
        with pytest.raises(DataError) as refused:
            load_run(tmp_path / name)
        assert f"{name}: must be a run's folder, {sentence}" in str(refused.value)
