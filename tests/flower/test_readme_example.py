"""The example in the README runs as it stands there."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from flwr.app import ArrayRecord, Context, Message, RecordDict

from fedbd.flower.compat import acting_as
from fedbd.flower.local_defense import COUNT

README = Path(__file__).parents[2] / "README.md"
MARK = "<!-- example: tests/flower/test_readme_example.py runs this -->"
LOCAL_DEFENSE = MARK.replace("example:", "local defense:")


def example(mark: str) -> str:
    found = re.search(r"```python\n(.*?)```", README.read_text(encoding="utf-8").partition(mark)[2], re.DOTALL)
    assert found is not None
    return found.group(1)


def test_the_readme_example_runs_and_learns_from_encrypted_sums(tmp_path: Path) -> None:
    (tmp_path / "my_app.py").write_text(example(MARK), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "my_app.py"], cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    opened = re.findall(r"round (\d): the server opened sums over (.*)", done.stdout)
    assert [round_ for round_, _ in opened] == ["1", "2", "3"]
    for _, sums in opened:
        pairs = re.findall(r"\((\d), (\d)\)", sums)
        assert len(pairs) == 3
        assert sorted(client for pair in pairs for client in pair) == list("012345")
    accuracy = re.search(r"accuracy (\d\.\d+)", done.stdout)
    assert accuracy is not None
    assert float(accuracy.group(1)) > 0.8


def test_the_local_defense_of_the_readme_trains_a_client_and_remembers_it() -> None:
    names: dict[str, Any] = {}
    exec(compile(example(LOCAL_DEFENSE), "README.md", "exec"), names)
    config: dict[str, Any] = {"partition-id": 2, "num-partitions": 6}
    context = Context(run_id=1, node_id=77, node_config=config, state=RecordDict(), run_config={})
    start = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10)).state_dict()
    with acting_as(1, 77):
        sent = Message(RecordDict({"arrays": ArrayRecord(start)}), dst_node_id=77, message_type="train")
        reply = names["app"](sent, context)
    assert not reply.has_error()
    assert reply.content["metrics"]["num-examples"] == len(range(2, 1797, 6))
    trained = reply.content["arrays"].to_torch_state_dict()
    assert not torch.equal(trained["1.weight"], start["1.weight"])
    count = dict(context.state[COUNT])
    assert re.fullmatch(r"[0-9a-f]{64}", str(count.pop("data")))
    assert count == {"participations": 1}
