from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

import fedbd
from fedbd.central import runs as central_runs
from fedbd.central.holdings import holdings
from fedbd.central.plan import assemble_central, load_central
from fedbd.central.subject import Asked, source_of
from fedbd.central.twins import twin_problems
from fedbd.cli import main as cli
from fedbd.config.scenario import load_scenario
from fedbd.data.digits import Digits
from fedbd.models.checkpoint import save_safetensors
from fedbd.models.cnn import Cnn
from fedbd.scores import roc_auc

ROOT = Path(fedbd.__file__).resolve().parent.parent
TEXT = """\
name: tiny
seed: 1
data: digits
model: {name: cnn, width: 8}
training: {epochs: 5, batch_size: 64, lr: 0.05, lr_step: 4}
held_out: 300
poison: {name: badnets, per: dataset, share: 0.1, target: 0, trigger: grid}
"""
RUN = """\
name: small
seed: 4
rounds: 1
data: digits
partition: {name: iid, clients: 3}
trusted: {size: 60, validate_share: 0.4}
model: {name: cnn, width: 8}
attacks:
  - {name: badnets, clients: {count: 1}, target: 3, trigger: grid}
"""


class Said(NamedTuple):
    """What a command left behind."""

    status: int
    out: str
    err: str

    @property
    def text(self) -> str:
        return self.out + self.err


Call = Callable[..., Said]


@pytest.fixture
def fedbd_(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    """Runs the command line in this process."""
    monkeypatch.setenv("COLUMNS", "200")

    def call(*words: str | Path) -> Said:
        monkeypatch.setattr(sys, "argv", ["fedbd", *map(str, words)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
            sys.exit(0)
        said = capsys.readouterr()
        code = ended.value.code
        return Said(code if isinstance(code, int) else 0 if code is None else 1, said.out, said.err)

    return call


def outside(*words: str | Path, folder: Path) -> subprocess.Popen[str]:
    """Start the command line as a user does, in a folder of its own."""
    variables = {**os.environ, "COLUMNS": "200", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "fedbd", *map(str, words)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, cwd=folder, env=variables, text=True, **pipes)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a trained model and its twin, as ``fedbd train`` leaves them."""
    folder = tmp_path_factory.mktemp("models")
    (folder / "tiny.yaml").write_text(TEXT)
    (folder / "run.yaml").write_text(RUN)
    done = outside("train", "tiny.yaml", folder=folder)
    out, err = done.communicate(timeout=120)
    assert done.returncode == 0, out + err
    (folder / "said.txt").write_text(out)
    model = Cnn(width=8).build((1, 8, 8), 10, torch.Generator().manual_seed(0))
    torch.save({"state_dict": model.state_dict()}, folder / "fresh.pt")
    torch.save(Cnn(width=4).build((1, 8, 8), 10, torch.Generator()).state_dict(), folder / "narrow.pt")
    return folder


@pytest.fixture(autouse=True)
def in_place(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "place" in request.fixturenames:
        monkeypatch.chdir(request.getfixturevalue("place"))


MODEL = "runs/tiny/seed-1/model.safetensors"
FULL = ["--model", "{name: cnn, width: 8}", "--data", "{name: digits}"]
ATTACK = ["--trigger", "grid", "--target", "0"]


# Training.


def test_every_command_has_help(fedbd_: Call) -> None:
    for command in ("train", "clean", "detect", "inspect"):
        said = fedbd_(command, "--help")
        assert said.status == 0
        assert f"Usage: fedbd {command}" in said.out


def test_train_leaves_model_and_twin_and_says_where(place: Path) -> None:
    out = (place / "said.txt").read_text()
    for seed, title in (("seed-1", "tiny seed 1"), ("seed-1-twin", "tiny seed 1 twin")):
        folder = place / "runs" / "tiny" / seed
        left = {"central.yaml", "data.json", "epochs.jsonl", "model.safetensors"}
        assert {path.name for path in folder.iterdir()} == left
        lines = [json.loads(line) for line in (folder / "epochs.jsonl").read_text().splitlines()]
        assert [line["epoch"] for line in lines] == [1, 2, 3, 4, 5]
        assert f"{title}  epoch 5/5  loss" in out
        assert [line for line in out.splitlines() if line.endswith(f"  runs/tiny/{seed}/model.safetensors")]
        assert lines[-1]["clean_accuracy"] > 0.8
        assert (lines[-1]["attack_success"] > 0.9) == (title == "tiny seed 1")


def test_train_again_trains_nothing(place: Path, fedbd_: Call) -> None:
    before = {path: path.stat().st_mtime_ns for path in (place / "runs").rglob("*.*") if path.is_file()}
    said = fedbd_("train", "tiny.yaml")
    assert said.status == 0
    assert "tiny seed 1  is done already" in said.out
    assert "epoch" not in said.out
    assert {path: path.stat().st_mtime_ns for path in (place / "runs").rglob("*.*") if path.is_file()} == before
    assert fedbd_("train", "tiny.yaml", "--quiet") == Said(0, "", "")


def test_train_several_seeds_without_twins(tmp_path: Path, fedbd_: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("t.yaml").write_text(TEXT)
    said = fedbd_("train", "t.yaml", "--seeds", "2", "--no-twin", "-o", "o", "-s", "training.epochs=1", "-s", "seed=7")
    assert said.status == 0, said.text
    assert sorted(path.name for path in Path("o/tiny").iterdir()) == ["seed-7", "seed-8"]
    again = fedbd_("train", "t.yaml", "--no-twin", "-o", "o", "-s", "training.epochs=1", "-s", "seed=7", "--overwrite")
    assert "epoch 1/1" in again.out


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_training_that_is_interrupted_goes_on_to_the_same_bytes(
    number: int, status: int, place: Path, tmp_path: Path, fedbd_: Call
) -> None:
    words = ["train", place / "tiny.yaml", "--no-twin", "-o", tmp_path / "parts"]
    log = tmp_path / "parts" / "tiny" / "seed-1" / "epochs.jsonl"
    first = outside(*words, folder=tmp_path)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not (log.exists() and log.read_text().count("\n") >= 2):
        time.sleep(0.005)
    first.send_signal(number)
    _, err = first.communicate(timeout=60)
    if first.returncode == 0:
        pytest.skip("the training was over before the interrupt came")
    assert first.returncode == status
    assert "finished epochs are kept, and the same command goes on from there" in err
    assert "Traceback" not in err
    second = fedbd_(*words)
    assert second.status == 0, second.text
    assert "tiny seed 1  goes on after epoch" in second.out
    whole, parts = place / "runs" / "tiny" / "seed-1", log.parent
    assert (parts / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    assert log.read_text() == (whole / "epochs.jsonl").read_text()


def test_an_interrupted_overwrite_does_not_advise_to_overwrite_again(
    tmp_path: Path, fedbd_: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.chdir(tmp_path)
    Path("t.yaml").write_text(TEXT)
    monkeypatch.setattr(central_runs, "carry_out", interrupted)
    said = fedbd_("train", "t.yaml", "--no-twin", "-o", "o", "--overwrite")
    kept = "finished epochs are kept, and the same command without --overwrite goes on from there"
    assert (said.status, said.err) == (130, f"interrupted; {kept}\n")


TRAIN_MISTAKES: dict[str, tuple[list[str], str]] = {
    "no file": (["gone.yaml"], "gone.yaml: must be a readable YAML file"),
    "a scenario": (
        ["run.yaml"],
        "run.yaml: must be a central training, got a scenario (rounds of clients); use fedbd run run.yaml",
    ),
    "two fields": (
        ["tiny.yaml", "-s", "training.lr=fast", "-s", "poison.target=x"],
        "  training.lr: must be a number, got 'fast'\n  poison.target: must be an integer or all_to_all, got 'x'",
    ),
    "a target outside of the classes and no training data": (
        ["tiny.yaml", "-s", "poison.target=10", "-s", "held_out=5000", "-o", "elsewhere"],
        "central training 'tiny' does not fit its data:\n  poison.target: must be a class of the data, 0 to 9, got 10\n"
        "  held_out: must leave samples to train on: less than 1348, got 5000",
    ),
    "another training there": (
        ["tiny.yaml", "-s", "training.lr=0.1"],
        "runs/tiny/seed-1: holds another training; pass --overwrite to replace it, or --out with another folder",
    ),
    "somebody's folder": (
        ["tiny.yaml", "-o", "mine"],
        "mine/tiny/seed-1: must be new, empty or a training's folder; pass --out with another folder",
    ),
    "overwrite somebody's folder": (["tiny.yaml", "-o", "mine", "--overwrite"], "must be new, empty or a training's"),
    "a name that leads elsewhere": (["tiny.yaml", "-s", "name=../x"], "name: must be a plain name"),
    "no data": (
        ["tiny.yaml", "-o", "elsewhere", "-s", "data={name: npz, file: a.npz, root: /nowhere}"],
        "a.npz: must lie in /nowhere",
    ),
    "images too small for the model": (
        ["tiny.yaml", "-o", "elsewhere", "-s", "poison.trigger={name: grid, margin: 6}"],
        "poison.trigger: needs images of at least 9x9 pixels",
    ),
}


@pytest.mark.parametrize(("words", "sentence"), TRAIN_MISTAKES.values(), ids=TRAIN_MISTAKES)
def test_a_mistake_about_training(words: list[str], sentence: str, place: Path, fedbd_: Call) -> None:
    (place / "mine" / "tiny" / "seed-1").mkdir(parents=True, exist_ok=True)
    (place / "mine" / "tiny" / "seed-1" / "diary.txt").write_text("dear diary")
    before = sorted(place.rglob("*"))
    said = fedbd_("train", *words)
    assert said.status == 2
    assert sentence in said.err
    assert "Traceback" not in said.text
    assert said.out == ""
    assert sorted(place.rglob("*")) == before


# Cleaning.


def test_clean_a_folder_with_its_twin(place: Path, fedbd_: Call) -> None:
    words = ["--trusted", "200", "--twin", "runs/tiny/seed-1-twin", "--table", "t.csv", "--save", "fixed.safetensors"]
    said = fedbd_(
        "clean", "runs/tiny/seed-1", "--method", "{name: linf_pruning, knowledge: real, oracle: true}", *words
    )
    assert said.status == 0, said.text
    assert "Trusted: 100 samples to fit and 100 to validate on, out of what the training left out." in said.out
    for part in ("linf_pruning", "oracle=true †", "floor %", "RA %", "† uses knowledge that no defender has"):
        assert part in said.out
    with open("t.csv", newline="") as file:
        row = next(csv.DictReader(file))
    assert float(row["attack_success_before"]) > 0.9
    assert float(row["attack_success_after"]) < float(row["attack_success_before"])
    assert float(row["attack_success_floor"]) < 0.2
    shown = f"{100 * float(row['clean_accuracy_before']):.1f} → {100 * float(row['clean_accuracy_after']):.1f}"
    assert shown in said.out
    again = fedbd_("clean", "fixed.safetensors", "-m", "clp", "--data", "tiny.yaml", "--table", "again.json")
    assert again.status == 0
    found = json.loads(Path("again.json").read_text())[0]
    assert found["attack_success_before"] == float(row["attack_success_after"])
    assert found["clean_accuracy_before"] == float(row["clean_accuracy_after"])


def test_the_words_of_the_command_are_those_of_the_folder(place: Path, fedbd_: Call) -> None:
    fedbd_("clean", "runs/tiny/seed-1", "-m", "{name: clp, u: 2}", "--table", "a.json", "--trusted", "0")
    said = fedbd_("clean", MODEL, "-m", "{name: clp, u: 2}", "--table", "b.json", "--trusted", "0", *FULL, *ATTACK)
    assert said.status == 0, said.text
    a, b = (json.loads(Path(name).read_text())[0] for name in ("a.json", "b.json"))
    assert {**a, "seconds": 0} == {**b, "seconds": 0}
    assert "clp u=2" in said.out


def test_a_torch_checkpoint_without_a_trigger(place: Path, fedbd_: Call) -> None:
    said = fedbd_("clean", "fresh.pt", "-m", "clp", *FULL)
    assert said.status == 0, said.text
    assert "ASR %" not in said.out
    assert "(the model may have been trained on them)" in said.out


def test_the_same_command_gives_the_same_and_another_seed_another(place: Path, fedbd_: Call) -> None:
    method = "{name: rnp, unlearn_lr: 0.05, recover_epochs: 2, unlearn_epochs: 2}"
    tables = []
    for name, seed in (("1.json", "0"), ("2.json", "0"), ("3.json", "1")):
        fedbd_("clean", "runs/tiny/seed-1", "-m", method, "--trusted", "200", "--seed", seed, "--table", name)
        tables.append({**json.loads(Path(name).read_text())[0], "seconds": 0})
    assert tables[0] == tables[1]
    assert tables[0] != tables[2]


def test_a_method_that_refuses_at_last_is_status_1_and_the_others_are_shown(place: Path, fedbd_: Call) -> None:
    idle, lost = "{name: rnp, unlearn_epochs: 1, unlearn_lr: 0.000001}", "{name: finetune, start: unlearned}"
    said = fedbd_("clean", "runs/tiny/seed-1", "-m", idle, "-m", lost, "-m", "{name: clp, u: 1}", "--chain")
    assert said.status == 1
    assert "finetune start=unlearned refused: finetune shall start from the unlearned model" in said.out
    assert "clp u=1" in said.out
    assert "Traceback" not in said.text


def test_a_chain_saves_its_last_model(place: Path, fedbd_: Call) -> None:
    words = ["-m", "{name: clp, u: 1}", "-m", "flain", "--chain", "--save", "last.safetensors", "--table", "chain.json"]
    said = fedbd_("clean", "runs/tiny/seed-1", *words)
    assert said.status == 0, said.text
    assert "+ flain" in said.out
    first, second = json.loads(Path("chain.json").read_text())
    assert first["clean_accuracy_before"] != first["clean_accuracy_after"] == second["clean_accuracy_before"]
    fedbd_("clean", "last.safetensors", "--data", "tiny.yaml", "-m", "clp", "--table", "last.json")
    last = json.loads(Path("last.json").read_text())[0]
    assert last["attack_success_before"] == second["attack_success_after"]


def test_a_runs_folder_names_everything(place: Path, fedbd_: Call) -> None:
    from fedbd.central.subject import Asked, load_subject
    from fedbd.prepared import prepare

    folder = place / "a-run"
    folder.mkdir()
    (folder / "scenario.yaml").write_text(RUN)
    (folder / "model.safetensors").write_bytes((place / MODEL).read_bytes())
    subject = load_subject(Asked(checkpoint=folder), [])
    assert subject is not None
    assert (subject.target, subject.source.own) == (3, True)
    start = prepare(load_scenario("run.yaml")).new_model().state_dict()
    assert subject.reference is not None
    assert all(torch.equal(start[name], entry) for name, entry in subject.reference.state_dict().items())
    said = fedbd_("clean", folder, "-m", "flain")
    assert said.status == 0, said.text
    assert "Trusted: 36 samples to fit and 24 to validate on, out of the run's own trusted set." in said.out
    said = fedbd_("inspect", folder)
    assert said.status == 0, said.text
    assert {path.name for path in folder.glob("*.png")} == {"norms.png", "gradcam.png"}


def test_a_run_whose_start_lies_elsewhere_has_no_reference(place: Path, fedbd_: Call) -> None:
    from fedbd.central.subject import Asked, load_subject

    folder = place / "from-elsewhere"
    folder.mkdir()
    (folder / "scenario.yaml").write_text(RUN + "start: {checkpoint: /elsewhere/model.safetensors}\n")
    (folder / "model.safetensors").write_bytes((place / MODEL).read_bytes())
    subject = load_subject(Asked(checkpoint=folder), [])
    assert subject is not None
    assert subject.reference is None
    assert fedbd_("clean", folder, "-m", "clp").status == 0
    said = fedbd_("clean", folder, "-m", "flain")
    assert said.status == 2  # refused where it is needed
    assert "--method flain: compares with the model that the training started from" in said.err


def test_what_changed_nothing_is_not_saved(place: Path, fedbd_: Call) -> None:
    said = fedbd_("clean", "runs/tiny/seed-1", "-m", "{name: clp, u: 100}", "--save", "never.safetensors")
    assert said.status == 0
    assert "clp u=100 did not act" in said.out
    assert "never.safetensors was not written: nothing changed the model." in said.out
    assert not Path("never.safetensors").exists()


RNP = ["--method", "rnp"]
CLEAN_MISTAKES: dict[str, tuple[list[str], str]] = {
    "no method": ([MODEL, *FULL], "--method: is required; name rnp"),
    "unknown method": ([MODEL, *FULL, "-m", "rmp"], "--method.name: must be rnp"),
    "a near miss": ([MODEL, *FULL, "-m", "linf_prunin"], "did you mean 'linf_pruning'?"),
    "wrong fields of two methods": (
        [MODEL, *FULL, "-m", "{name: rnp, batch: 3}", "-m", "{name: rnp, alpha: -1}"],
        "  --method[0].batch: is not a field",
    ),
    "the second of them": (
        [MODEL, *FULL, "-m", "{name: rnp, batch: 3}", "-m", "{name: rnp, alpha: -1}"],
        "  --method[1].alpha: must be",
    ),
    "one method twice": ([MODEL, *FULL, *RNP, *RNP], "--method[1]: must differ from the others, got 'rnp'"),
    "torn YAML": ([MODEL, *FULL, "-m", "{name: rnp"], "must be YAML"),
    "no data": (["fresh.pt", "--model", "cnn", *RNP], "--data: is required for a checkpoint file"),
    "no model": ([MODEL, "--data", "digits", *RNP], "--model: is required: the data name no model"),
    "unknown model": ([MODEL, "--model", "wrm", "--data", "digits", *RNP], "--model.name: must be cnn"),
    "unknown data": ([MODEL, "--model", "cnn", "--data", "digit", *RNP], "did you mean 'digits'?"),
    "a data file that is not there": ([MODEL, "--data", "gone.yaml", *RNP], "gone.yaml: must be a readable YAML file"),
    "a folder without a run": (["mine2", *RNP], "CHECKPOINT: must hold scenario.yaml (a run) or central.yaml"),
    "no checkpoint": (["gone.pt", *FULL, *RNP], "CHECKPOINT gone.pt: must be a file"),
    "a checkpoint of another model": (
        ["narrow.pt", *FULL, *RNP],
        "CHECKPOINT narrow.pt:block1.conv.weight: must have shape (8, 1, 3, 3), got (4, 1, 3, 3)",
    ),
    "no checkpoint at all": (["run.yaml", *FULL, *RNP], "CHECKPOINT run.yaml: must be a safetensors file or"),
    "another twin": ([MODEL, *FULL, *RNP, "--twin", "narrow.pt"], "--twin narrow.pt:block1.conv.weight: must have"),
    "the model as its own twin": (
        ["runs/tiny/seed-1", *RNP, "--twin", MODEL],
        "--twin: must be the attack-free twin of the model, got the model itself; fedbd train leaves the twin in NAME/",
    ),
    "a twin that was attacked": (
        ["runs/tiny/seed-1-twin", *RNP, "--twin", "runs/tiny/seed-1"],
        "--twin: must be the attack-free twin of the model, got runs/tiny/seed-1, which was attacked; fedbd train",
    ),
    "the twin of another seed and model": (
        ["other", *RNP, "--twin", "runs/tiny/seed-1-twin"],
        "--twin: must be the attack-free twin of the model, got runs/tiny/seed-1-twin, with another model and seed",
    ),
    "the twin of another training": (
        ["longer", *RNP, "--twin", "runs/tiny/seed-1-twin"],
        "got runs/tiny/seed-1-twin, with another 'training' and 'held_out'; fedbd train",
    ),
    "a twin that nothing is known of": ([MODEL, *FULL, *RNP, "--twin", "mine2"], "--twin: must hold scenario.yaml (a"),
    "another reference": ([MODEL, *FULL, "-m", "flain", "--reference", "gone"], "--reference gone: must be a file"),
    "a target outside of the classes": (
        [MODEL, *FULL, *RNP, "--trigger", "grid", "--target", "10"],
        "--target: must be a class of the data, 0 to 9, got 10",
    ),
    "a target that is no label": (
        [MODEL, *FULL, *RNP, "--trigger", "grid", "--target", "all-to-all"],
        "--target: must be a label (an integer >= 0) or all_to_all, got 'all-to-all'; did you mean 'all_to_all'?",
    ),
    "a label below 0": ([MODEL, *FULL, *RNP, "--trigger", "grid", "--target=-1"], "--target: must be a label (an"),
    "a trigger without a target": ([MODEL, *FULL, *RNP, "--trigger", "grid"], "--target: is required with --trigger"),
    "a target without a trigger": ([MODEL, *FULL, *RNP, "--target", "1"], "--trigger: is required with --target"),
    "a trigger that does not fit": (
        [MODEL, *FULL, *RNP, "--trigger", "{name: grid, margin: 7}", "--target", "0"],
        "--trigger: needs images of at least 10x10 pixels",
    ),
    "unknown trigger": ([MODEL, *FULL, *RNP, "--trigger", "gird", "--target", "0"], "--trigger.name: must be grid"),
    "no trusted data": ([MODEL, *FULL, *RNP, "--trusted", "0"], "--method rnp: needs trusted data, and there are none"),
    "one trusted sample": ([MODEL, *FULL, *RNP, "--trusted", "1"], "--trusted: must be from 2 to 1348"),
    "more than there are": (
        [MODEL, "--data", "tiny.yaml", *RNP, "--trusted", "301"],
        "--trusted: must be from 2 to 300, the samples of what the training left out, got 301; 0 is for none",
    ),
    "trusted data of one class": (
        ["fresh.pt", "--data", "one.yaml", *RNP],
        "--method rnp: needs trusted data of several classes, and all of it is of one; name data and model by "
        "themselves (--data, --model): the run's trusted.labels is [3]",
    ),
    "a repair with a trigger that nobody recovers": (
        [MODEL, *FULL, "-m", "linf_pruning"],
        "--method linf_pruning: uses the trigger that a method before it finds, and none does; put -m "
        "trigger_recovery before it and add --chain",
    ),
    "a clue in no chain": (
        [MODEL, *FULL, *RNP, "-m", "{name: finetune, start: unlearned}"],
        "--method finetune start=unlearned: uses the unlearned that a method before it finds, and none does; put -m "
        "rnp or rnp_label before it and add --chain",
    ),
    "a clue that comes too late": (
        [MODEL, *FULL, "-m", "{name: finetune, start: recovered}", *RNP, "--chain"],
        "--method finetune start=recovered: uses the recovered that a method before it finds, and none does; put -m "
        "rnp before it and add --chain",
    ),
    "a label that nobody detects": (
        [MODEL, *FULL, "-m", "trigger_recovery"],
        "put -m rnp or rnp_label before it and add --chain, or set its field target",
    ),
    "no model that the training started from": (
        [MODEL, *FULL, "-m", "flain"],
        "--method flain: compares with the model that the training started from, and there is none; name its "
        "checkpoint in --reference",
    ),
    "a share of all": ([MODEL, *FULL, *RNP, "--validate-share", "1"], "--validate-share: must be above 0 and below 1"),
    "no maps": (
        ["mlp.pt", "--model", "{name: mlp, hidden: []}", "--data", "digits", "-m", "linf_pruning"],
        "--method linf_pruning: cannot act: ",
    ),
    "an oracle without a truth": (
        [MODEL, *FULL, "-m", "{name: linf_pruning, knowledge: real, oracle: true}"],
        "is told the real trigger (oracle: true), and there is none; add --trigger and --target",
    ),
    "the label that is measured with": (
        [MODEL, *FULL, "--trigger", "grid", "--target", "0", "-m", "{name: trigger_recovery, target: 0}"],
        "target=0: must not name the target that the measuring knows, which no defender does; leave it out and put",
    ),
    "a label that is none": (
        [MODEL, *FULL, "-m", "{name: trigger_recovery, target: 99}"],
        "target=99: cannot act: trigger_recovery searches target 99 and the labels are 0 to 9; set one of them",
    ),
    "a model to save nowhere": ([MODEL, *FULL, *RNP, "--save", "gone/x.safetensors"], "--save: must be a file in a"),
    "a model of another form": ([MODEL, *FULL, *RNP, "--save", "x.pt"], "--save: must end in .safetensors, got 'x.pt'"),
    "two models to save": (
        [MODEL, *FULL, *RNP, "-m", "clp", "--save", "x.safetensors"],
        "--save: needs a single --method, or --chain",
    ),
    "a table of no kind": ([MODEL, *FULL, *RNP, "--table", "t.txt"], "--table: must end in .csv or .json"),
}


@pytest.mark.parametrize(("words", "sentence"), CLEAN_MISTAKES.values(), ids=CLEAN_MISTAKES)
def test_a_mistake_about_cleaning(words: list[str], sentence: str, place: Path, fedbd_: Call) -> None:
    from fedbd.models.mlp import Mlp

    (place / "mine2").mkdir(exist_ok=True)
    (place / "other").mkdir(exist_ok=True)
    (place / "other" / "central.yaml").write_text(TEXT.replace("seed: 1", "seed: 2").replace("width: 8", "width: 4"))
    (place / "longer").mkdir(exist_ok=True)
    (place / "longer" / "central.yaml").write_text(TEXT.replace("epochs: 5", "epochs: 6").replace("out: 300", "out: 9"))
    (place / "one.yaml").write_text(RUN.replace("size: 60,", "size: 40, labels: [3],"))
    torch.save(Mlp(hidden=()).build((1, 8, 8), 10, torch.Generator()).state_dict(), place / "mlp.pt")
    before = sorted(place.rglob("*"))
    said = fedbd_("clean", *words)
    assert said.status == 2, said.text
    assert sentence in said.err
    assert "Traceback" not in said.text
    assert said.out == ""
    assert sorted(place.rglob("*")) == before


def test_the_models_own_weights_under_another_name_are_no_twin(place: Path, tmp_path: Path, fedbd_: Call) -> None:
    shutil.copy(MODEL, tmp_path / "clean.safetensors")
    said = fedbd_("clean", "runs/tiny/seed-1", "-m", "clp", "--twin", tmp_path / "clean.safetensors")
    assert said.status == 2
    assert "--twin: must be the attack-free twin of the model, got the model's own weights; fedbd train" in said.err
    assert said.out == ""


def test_a_run_of_other_rounds_is_no_twin(tmp_path: Path) -> None:
    for name, text in (("a", RUN), ("b", RUN.replace("rounds: 1", "rounds: 2").split("attacks:")[0])):
        (tmp_path / name).mkdir()
        (tmp_path / name / "scenario.yaml").write_text(text)
    found = twin_problems(Asked(checkpoint=tmp_path / "a", twin=tmp_path / "b"))
    assert [problem.got for problem in found] == [f"{tmp_path / 'b'}, with another 'rounds'"]


def test_the_twin_s_last_model_is_no_floor_of_an_earlier_round(tmp_path: Path) -> None:
    for name, text in (("a", RUN), ("b", RUN.split("attacks:", maxsplit=1)[0])):
        (tmp_path / name / "models").mkdir(parents=True)
        (tmp_path / name / "scenario.yaml").write_text(text.replace("rounds: 1", "rounds: 2"))
        for number in (1, 2):
            (tmp_path / name / "models" / f"round-{number}.safetensors").touch()
    kept, twin = tmp_path / "a" / "models", tmp_path / "b"
    found = twin_problems(Asked(checkpoint=kept / "round-1.safetensors", twin=twin))
    assert [problem.got for problem in found] == [f"{twin}, with another round"]
    assert twin_problems(Asked(checkpoint=kept / "round-2.safetensors", twin=twin)) == []
    assert twin_problems(Asked(checkpoint=kept / "round-1.safetensors", twin=twin / "models/round-1.safetensors")) == []


def test_all_problems_come_at_once(place: Path, fedbd_: Call) -> None:
    words = ["-m", "rmp", "-m", "linf_pruning", "--target", "12", "--trigger", "grid", "--trusted", "5000"]
    said = fedbd_("clean", MODEL, *FULL, *words, "--table", "t.txt", "--twin", "gone.pt")
    assert said.status == 2
    paths = [line.strip().split(":")[0] for line in said.err.splitlines()[1:]]
    assert paths == ["--table", "--method[0].name", "--target", "--twin gone.pt"]


# Trusted data: out of what nobody trained on where that is known, never of the test part.


def source(text: str) -> object:
    problems: list[object] = []
    found = source_of(text, "--data", problems)  # type: ignore[arg-type]
    assert problems == []
    return found


def rows(samples: torch.Tensor) -> set[bytes]:
    return {image.numpy().tobytes() for image in samples}


def test_a_central_trainings_trusted_data_are_its_own_held_out(place: Path) -> None:
    data = assemble_central(load_central("tiny.yaml"))
    held = holdings(source("tiny.yaml"), data.dataset, 100, 0.4, 5)  # type: ignore[arg-type]
    assert held.trusted is not None
    own = data.trusted(100, 0.4, 5)
    assert torch.equal(held.trusted.fit.images, own.fit.images)
    assert torch.equal(held.trusted.validate.images, own.validate.images)
    both = rows(held.trusted.fit.images) | rows(held.trusted.validate.images)
    assert len(held.spare) == 200
    assert rows(held.spare.images).isdisjoint(both)
    assert rows(held.spare.images) <= rows(data.dataset.train.images[data.held_out])


def test_a_runs_trusted_data_are_its_own(place: Path) -> None:
    from fedbd.prepared import prepare

    federation = prepare(load_scenario("run.yaml")).federation
    held = holdings(source("run.yaml"), federation.dataset, None, None, 5)  # type: ignore[arg-type]
    assert held.trusted is not None
    assert federation.trusted is not None
    assert torch.equal(held.trusted.fit.images, federation.trusted.fit.images)
    assert torch.equal(held.trusted.validate.images, federation.trusted.validate.images)
    fewer = holdings(source("run.yaml"), federation.dataset, 20, None, 5)  # type: ignore[arg-type]
    assert fewer.trusted is not None
    assert len(fewer.trusted.fit) + len(fewer.trusted.validate) == 20
    pool = rows(federation.trusted.fit.images) | rows(federation.trusted.validate.images)
    assert rows(fewer.trusted.fit.images) | rows(fewer.trusted.validate.images) <= pool


# Detecting.

STRIP = ["-m", "strip"]


def test_detect_tells_triggered_inputs_and_both_kinds_of_malicious_ones(place: Path, fedbd_: Call) -> None:
    words = [*STRIP, "-m", "{name: spectral_signatures, minimum: 5}", "--adversarial", "fgsm", "--samples", "150"]
    said = fedbd_("detect", "runs/tiny/seed-1", *words, "--table", "d.json", "--scores", "d.csv")
    assert said.status == 0, said.text
    assert "Target label 0; the trigger only measures." in said.out
    assert "strip" in said.out
    assert "Scores: d.csv" in said.out
    strip, spectral = json.loads(Path("d.json").read_text())
    assert spectral["method"] == "spectral_signatures minimum=5"
    scores = list(csv.DictReader(Path("d.csv").read_text().splitlines()))
    assert len(scores) == 300
    positive = [float(row["strip"]) for row in scores if row["triggered"] == "1"]
    negative = [float(row["strip"]) for row in scores if row["triggered"] == "0"]
    assert strip["auc"] == pytest.approx(roc_auc(positive, negative))
    assert strip["tpr_at_fpr_1"] is None  # 150 clean inputs are under 10 / 0.01
    assert strip["fgsm.examples"] > 0
    assert strip["fgsm.clean_backdoor"] is not None
    test = assemble_central(load_central("tiny.yaml")).dataset.test
    assert all(int(test.labels[int(row["test_image"])]) != 0 for row in scores if row["triggered"] == "1")
    again = fedbd_("detect", "runs/tiny/seed-1", *words[:2], "--samples", "150", "--table", "e.json")
    assert again.status == 0
    assert json.loads(Path("e.json").read_text())[0]["auc"] == strip["auc"]  # whatever stands beside it


def test_detect_without_a_trigger_writes_scores_alone(place: Path, fedbd_: Call) -> None:
    said = fedbd_("detect", "fresh.pt", *FULL, *STRIP, "--scores", "alone.csv", "--samples", "40")
    assert said.status == 0, said.text
    assert "AUC" not in said.out
    scores = list(csv.DictReader(Path("alone.csv").read_text().splitlines()))
    assert list(scores[0]) == ["test_image", "triggered", "label", "strip"]
    places = [int(row["test_image"]) for row in scores]
    assert len(places) == 40
    assert places == sorted(set(places))
    assert {row["triggered"] for row in scores} == {"0"}


def test_a_detector_that_refuses_is_status_1_and_the_others_are_shown(place: Path, fedbd_: Call) -> None:
    impossible = "{name: spectral_signatures, minimum: 5000}"
    said = fedbd_("detect", MODEL, *FULL, *ATTACK, *STRIP, "-m", impossible, "--samples", "30")
    assert said.status == 1
    assert "spectral_signatures minimum=5000: spectral_signatures compares samples of one label" in said.out
    assert "Traceback" not in said.text


DETECT_MISTAKES: dict[str, tuple[list[str], str]] = {
    "no detector": ([MODEL, *FULL, *ATTACK], "--method: is required; name rnp_unlearned"),
    "a cleanup": ([MODEL, *FULL, *ATTACK, "-m", "nad"], "--method.name: must be rnp_unlearned"),
    "no trigger and nowhere to write": (
        [MODEL, *FULL, *STRIP],
        "--scores: is required where there is no trigger to measure with; or add --trigger and --target",
    ),
    "a table without a trigger": ([MODEL, *FULL, *STRIP, "--table", "t.csv"], "--table: needs a trigger to measure"),
    "adversarial inputs without a trigger": (
        [MODEL, *FULL, *STRIP, "--adversarial", "fgsm", "--scores", "x.csv"],
        "--adversarial: needs a trigger, too: inputs of all kinds are told apart together",
    ),
    "an unknown evasion": ([MODEL, *FULL, *ATTACK, *STRIP, "--adversarial", "pdg"], "did you mean 'pgd'?"),
    "an evasion toward no class": (
        [MODEL, *FULL, *ATTACK, *STRIP, "--adversarial", "{name: cw, target: 10}"],
        "--adversarial cw target=10: target must be below the number of classes (10), got 10",
    ),
    "no trusted data": ([MODEL, *FULL, *ATTACK, *STRIP, "--trusted", "0"], "--method strip: needs trusted data"),
    "too few trusted data": (
        [MODEL, *FULL, *ATTACK, "-m", "lid", "--trusted", "20"],
        "--method lid: needs 20 trusted samples to fit on, got 10; raise --trusted or lower --validate-share",
    ),
    "scores of no kind": ([MODEL, *FULL, *ATTACK, *STRIP, "--scores", "s.json"], "--scores: must end in .csv"),
}


@pytest.mark.parametrize(("words", "sentence"), DETECT_MISTAKES.values(), ids=DETECT_MISTAKES)
def test_a_mistake_about_detecting(words: list[str], sentence: str, place: Path, fedbd_: Call) -> None:
    before = sorted(place.rglob("*"))
    said = fedbd_("detect", *words)
    assert said.status == 2, said.text
    assert sentence in said.err
    assert "Traceback" not in said.text
    assert said.out == ""
    assert sorted(place.rglob("*")) == before


# Inspecting.


@pytest.mark.parametrize("width", ["80", "120"])
def test_inspect_a_folder(place: Path, fedbd_: Call, monkeypatch: pytest.MonkeyPatch, width: str) -> None:
    monkeypatch.setenv("COLUMNS", width)
    said = fedbd_("inspect", "runs/tiny/seed-1", "--out", "pictures", "--channels", "3")
    assert said.status == 0, said.text
    line = json.loads((place / "runs/tiny/seed-1/epochs.jsonl").read_text().splitlines()[-1])
    success, clean = f"{100 * line['attack_success']:.1f}", f"{100 * line['clean_accuracy']:.1f}"
    assert said.out.splitlines()[0].startswith(f"CA {clean} %   ASR {success} %")
    assert "Claim of arXiv 2002.12162" in said.out
    assert " reproduced" in said.out
    assert max(map(len, said.out.splitlines())) <= int(width)
    for name in ("norms.png", "gradcam.png"):
        assert f"pictures/{name}" in said.out
        assert (place / "pictures" / name).stat().st_size > 5000


@pytest.mark.parametrize("command", [["clean", "-m", "finetune"], ["inspect", "-o", "every"]])
def test_all_to_all_is_measured_over_every_class(command: list[str], place: Path, fedbd_: Call) -> None:
    from fedbd.attacks.square_trigger import SquareTrigger
    from fedbd.metrics import evaluate
    from fedbd.models.checkpoint import load_checkpoint

    said = fedbd_(command[0], MODEL, *command[1:], *FULL, "--trigger", "square", "--target", "all_to_all")
    assert said.status == 0, said.text
    net = Cnn(width=8).build((1, 8, 8), 10, torch.Generator())
    load_checkpoint(net, Path(MODEL))
    found = evaluate(net, Digits().load(None).test, {"t": (SquareTrigger(), "all_to_all")}, 10)
    assert found.attack_success is not None
    assert f"{100 * found.attack_success:.1f}" in said.out
    if command[0] == "clean":
        assert "All-to-all: label + 1; the trigger only measures." in said.out
    else:
        assert "mean over 449 test images; inf where" in " ".join(said.out.split())


def test_inspect_without_a_trigger_compares_nothing(place: Path, fedbd_: Call) -> None:
    said = fedbd_("inspect", "fresh.pt", *FULL, "--out", "plain", "--images", "2")
    assert said.status == 0, said.text
    assert "Claim" not in said.out
    assert sorted(path.name for path in Path("plain").iterdir()) == ["fresh-gradcam.png", "fresh-norms.png"]


@pytest.fixture(scope="module")
def kept(place: Path) -> Path:
    """A run's folder that kept three models, the last two of which are the same."""
    folder = place / "kept-run"
    (folder / "models").mkdir(parents=True)
    (folder / "scenario.yaml").write_text(RUN)
    good = (place / MODEL).read_bytes()
    fresh = Cnn(width=8).build((1, 8, 8), 10, torch.Generator().manual_seed(0))
    save_safetensors(fresh, folder / "models/round-1.safetensors")
    for name in ("model", "models/round-2", "models/round-10"):
        (folder / f"{name}.safetensors").write_bytes(good)
    (folder / "models/notes.txt").write_text("no model")
    return folder


def test_inspect_draws_every_round_that_a_run_kept(place: Path, kept: Path, fedbd_: Call) -> None:
    said = fedbd_("inspect", kept, "--rounds", "--images", "2")
    assert said.status == 0, said.text
    heads = [line for line in said.out.splitlines() if line.startswith("round-")]
    assert heads == ["round-1:", "round-2:", "round-10:"]
    pictures = {path.name: path.read_bytes() for path in (kept / "models").glob("*.png")}
    names = [f"round-{number}-{kind}.png" for number in (1, 2, 10) for kind in ("gradcam", "norms")]
    assert sorted(pictures) == sorted(names)
    assert pictures["round-2-gradcam.png"] == pictures["round-10-gradcam.png"] != pictures["round-1-gradcam.png"]


def test_one_round_after_the_other_keeps_its_pictures_and_is_found_from_its_own_folder(
    place: Path, kept: Path, fedbd_: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(kept / "models")
    for name in ("round-1", "round-2"):
        said = fedbd_("inspect", f"{name}.safetensors", "--out", "one-by-one", "--images", "2")
        assert said.status == 0, said.text
    found = sorted(path.name for path in Path("one-by-one").iterdir())
    assert found == ["round-1-gradcam.png", "round-1-norms.png", "round-2-gradcam.png", "round-2-norms.png"]


INSPECT_MISTAKES: dict[str, tuple[list[str], str]] = {
    "no data": (["fresh.pt", "--model", "cnn"], "--data: is required for a checkpoint file"),
    "another checkpoint": (["narrow.pt", *FULL], "CHECKPOINT narrow.pt:block1.conv.weight: must have shape"),
    "a target outside of the classes": ([MODEL, *FULL, "--trigger", "grid", "--target", "11"], "--target: must be a"),
    "a file for the pictures": ([MODEL, *FULL, "--out", "run.yaml"], "--out: must be a folder, got run.yaml"),
    "rounds of a run that kept none": (
        ["runs/tiny/seed-1", "--rounds"],
        "--rounds: needs a run's folder with models/round-*.safetensors, got runs/tiny/seed-1; run with "
        "evaluation.keep_models: [1, 5, ...]",
    ),
    "no images": ([MODEL, *FULL, "--images", "0"], "'--images': 0 is not in the range"),
}


@pytest.mark.parametrize(("words", "sentence"), INSPECT_MISTAKES.values(), ids=INSPECT_MISTAKES)
def test_a_mistake_about_inspecting(words: list[str], sentence: str, place: Path, fedbd_: Call) -> None:
    said = fedbd_("inspect", *words)
    assert said.status == 2
    assert sentence in said.err
    assert "Traceback" not in said.text
    assert said.out == ""


def test_a_model_without_positions_cannot_be_looked_into(place: Path, fedbd_: Call) -> None:
    from fedbd.models.mlp import Mlp

    torch.save(Mlp(hidden=(8,)).build((1, 8, 8), 10, torch.Generator()).state_dict(), "eight.pt")
    said = fedbd_("inspect", "eight.pt", "--model", "{name: mlp, hidden: [8]}", "--data", "digits", "-o", "gone")
    assert said.status == 2
    assert "CHECKPOINT: cannot be looked into: gradcam needs maps with positions" in said.err
