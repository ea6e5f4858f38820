"""Who holds what, as it is counted, printed and drawn."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console
from typer.testing import CliRunner

from fedbd.cli.main import app
from fedbd.config.scenario import from_dict
from fedbd.errors import UserError
from fedbd.prepared import federate
from fedbd.report.partition_picture import MARKS, draw_partition
from fedbd.report.partition_view import PartitionView, partition_view, render_partition
from fedbd.roles import assignment

ATTACKS = [
    {"name": "badnets", "clients": {"count": 2}, "target": 0, "trigger": "grid"},
    {"name": "badnets", "label": "bad data", "role": "polluted", "per": "dataset", "clients": {"ids": [4]}}
    | {"target": 1, "trigger": "grid"},
]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FEDBD_CACHE", str(tmp_path / "cache"))


def scenario(**changes):
    data = {"name": "generated", "samples": 600, "classes": 5, "groups": 30, "shape": [1, 4, 4]}
    return from_dict({"name": "who", "rounds": 3, "data": data, "model": "mlp", **changes})


def view_of(made) -> PartitionView:
    return partition_view(made, federate(made))


def printed(view: PartitionView) -> str:
    console = Console(file=io.StringIO(), width=200)
    render_partition(console, view)
    return console.file.getvalue()


def pixels(path: Path) -> set[tuple[int, ...]]:
    with Image.open(path) as image:
        return {color for _, color in image.convert("RGB").getcolors(1 << 24)}


def rgb(text: str) -> tuple[int, ...]:
    return tuple(bytes.fromhex(text[1:]))


def test_it_counts_what_the_federation_holds():
    made = scenario(partition={"name": "dirichlet", "clients": 7}, trusted={"size": 40}, attacks=ATTACKS)
    federation = federate(made)
    view = partition_view(made, federation)
    for client in range(7):
        held = federation.client(client).labels.tolist()
        assert view.counts[client].tolist() == [held.count(label) for label in range(5)]
        assert view.sizes[client] == len(held)
        assert view.groups[client] == len(set(federation.dataset.groups[federation.partitions[client]].tolist()))
    assert view.trusted.sum() == 40
    assert view.nobody == 0
    assert view.roles == {client: attack.role for client, attack in assignment(made).items()}
    assert view.attacks[4] == "bad data"
    assert view.title == "who: dirichlet alpha=0.5 minimum=1, 7 clients, seed 0"


def test_the_distance_is_total_variation():
    view = PartitionView(
        title="", counts=np.array([[3, 1], [1, 3], [2, 2]]), trusted=None, nobody=0, groups=None, roles={}, attacks={}
    )
    assert view.distances.tolist() == [0.25, 0.25, 0.0]


def test_what_is_printed():
    made = scenario(partition={"name": "natural", "clients": 6}, trusted={"size": 30}, attacks=ATTACKS)
    view = view_of(made)
    lines = printed(view).splitlines()
    assert lines[0] == "who: natural deal=random, 6 clients, seed 0"
    assert view.nobody == 10  # writers of 20 samples each: 15 of one to fit, 15 of another to validate on
    assert lines[1:3] == [
        "6 clients hold 560 samples of 5 classes, and 30 trusted samples at the server",
        "10 samples are nobody's: of groups that the trusted set took and did not need whole",
    ]
    table = {line.split("  ")[0]: line.split()[-3:] for line in lines[3:9]}
    assert table["samples"] == ["80", "100", "100"]  # 28 writers for six clients: five each, or four
    assert table["groups"] == ["4", "5", "5"]
    assert table["classes"] == ["5", "5", "5"]
    assert any(line.startswith("bad data (polluted): 1 clients with ") and line.endswith(": 4") for line in lines)
    rows = [line.split() for line in lines if line.strip()[:1].isdigit()][-6:]
    assert [row[0] for row in rows] == ["0", "1", "2", "3", "4", "5"]
    assert [row[1] for row in rows] == [str(size) for size in view.sizes]
    assert rows[4][-1] == "polluted"
    assert sum(row[-1] == "attacker" for row in rows) == 2


def test_many_clients_are_not_printed_one_by_one():
    made = scenario(partition={"name": "iid", "clients": 300}, attacks=[{**ATTACKS[0], "clients": {"share": 0.1}}])
    said = printed(view_of(made))
    assert len(said.splitlines()) < 12
    assert "30 clients with 10.0 % of the samples" in said
    assert said.rstrip().endswith("and 10 more")


@pytest.mark.parametrize(("clients", "classes"), [(1, 2), (10, 5), (50, 43), (61, 5), (300, 12), (300, 43)])
def test_pictures_of_all_sizes(clients, classes, tmp_path):
    data = {"name": "generated", "samples": 700, "classes": classes, "shape": [1, 4, 4]}
    attacked = (
        scenario(data=data, partition={"clients": clients, "name": "iid"}, trusted={"size": 50}, attacks=ATTACKS[:1])
        if clients > 1
        else scenario(data=data, partition={"clients": 1, "name": "iid"})
    )
    view = view_of(attacked)
    draw_partition(tmp_path / "a.png", view)
    draw_partition(tmp_path / "b.png", view)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    found = pixels(tmp_path / "a.png")
    assert (rgb(MARKS["attacker"]) in found) is (clients > 1)
    assert rgb(MARKS["polluted"]) not in found
    with Image.open(tmp_path / "a.png") as image:
        assert image.width <= 1950
        assert image.height <= 1950


def invoke(*words: str):
    return CliRunner().invoke(app, ["show", *words])


SCENARIO = """\
name: t
rounds: 2
data: {name: generated, samples: 100, shape: [1, 4, 4]}
model: mlp
partition: {name: iid, clients: 4}
"""


def test_the_command_draws_beside_the_scenario_or_where_it_is_told(tmp_path):
    file = tmp_path / "s.yaml"
    file.write_text(SCENARIO)
    done = invoke("--partition", str(file))
    assert done.exit_code == 0, done.output
    assert f"Picture: {tmp_path / 's.partition.png'}" in done.output.replace("\n", "")
    assert (tmp_path / "s.partition.png").exists()
    done = invoke("--partition", str(file), "-o", str(tmp_path / "x.svg"), "-s", "partition.clients=5")
    assert "t: iid, 5 clients, seed 0" in done.output
    assert "<svg" in (tmp_path / "x.svg").read_text()


def test_the_command_speaks_to_scripts(tmp_path):
    file = tmp_path / "s.yaml"
    file.write_text(SCENARIO)
    found = json.loads(invoke("--partition", str(file), "--json").output)
    assert np.array(found["counts"]).sum() == 100
    assert np.array(found["counts"]).shape == (4, 10)
    assert (found["trusted"], found["groups"], found["roles"]) == (None, None, {})
    assert Path(found["picture"]).exists()
    assert invoke("--partition", str(file), "--quiet").output == ""


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--partition", "rnp"], "--partition: is for a scenario file or a run's folder, got 'rnp'"),
        (["--partition", "s.yaml", "-o", "a.txt"], "--out: must end in .png, .svg or .pdf, got 'a.txt'"),
        (
            ["--partition", "s.yaml", "-o", "no/a.png"],
            "--out: must be a file in a folder that exists, got no/a.png; make the folder first: mkdir -p no",
        ),
        (["s.yaml", "-o", "a.png"], "--out: is for the picture of --partition, got 'a.png'"),
        (["rnp", "-s", "seed=1"], "--set: is for a scenario file, got 'rnp'"),
        (
            ["--partition", "s.yaml", "-s", "partition={name: natural}"],
            "partition: must be groups of the data, and data.groups is null, got 'natural'; name the column in "
            "data.groups",
        ),
        (
            ["--partition", "s.yaml", "-s", "partition.clients=101"],
            "partition.clients: must be at most the number of training samples, 100, got 101",
        ),
    ],
)
def test_what_cannot_be_shown(words, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("s.yaml").write_text(SCENARIO)
    done = invoke(*words)
    assert isinstance(done.exception, UserError)
    assert [str(problem) for problem in done.exception.problems] == [message]
    assert not list(tmp_path.glob("*.png"))
