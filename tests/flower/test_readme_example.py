"""The example in the README runs as it stands there."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

README = Path(__file__).parents[2] / "README.md"
MARK = "<!-- example: tests/flower/test_readme_example.py runs this -->"


def test_the_readme_example_runs_and_learns_from_encrypted_sums(tmp_path: Path) -> None:
    found = re.search(r"```python\n(.*?)```", README.read_text(encoding="utf-8").partition(MARK)[2], re.DOTALL)
    assert found is not None
    (tmp_path / "my_app.py").write_text(found.group(1), encoding="utf-8")
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
