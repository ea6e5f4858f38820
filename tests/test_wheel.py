"""The wheel in an empty environment, used from a folder that holds a ``server.py`` and ``clients/`` of its own."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

import fedbd
from fedbd.config.scenario import load_scenario
from fedbd.records.record import read_rounds, same_records
from fedbd.running.runs import run

pytestmark = pytest.mark.slow

ROOT = Path(fedbd.__file__).resolve().parent.parent
DECOY = "raise SystemExit('a module of the same name, but not the app\\'s')\n"
SHORT = ["rounds=3", "attacks[0].rounds.first=2"]
NO_INDEX = ("No matching distribution found", "Could not find a version", "Temporary failure in name resolution")


def done(*command: str | Path, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    variables = {**os.environ, **environment}
    variables.pop("PYTHONPATH", None)
    return subprocess.run(
        list(map(str, command)), cwd=folder, env=variables, capture_output=True, text=True, timeout=1200, check=False
    )


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    built = done(sys.executable, "-m", "pip", "wheel", ROOT, "--no-deps", "-w", folder, folder=folder)
    if built.returncode and any(text in built.stdout + built.stderr for text in NO_INDEX):
        pytest.skip("pip cannot fetch the build system here")
    assert built.returncode == 0, built.stderr[-2000:]
    (found,) = folder.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of an environment that holds the wheel alone; the dependencies are lent to it by a path file.

    An installation of its own would take 6 GB. The path file names the folder only: editable installs in there, such as
    that of this checkout, do not take effect.
    """
    folder = tmp_path_factory.mktemp("environment")
    made = done(sys.executable, "-m", "venv", "--without-pip", folder / "venv", folder=folder)
    assert made.returncode == 0, made.stderr
    own = folder / "venv" / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", own, "install", "--no-deps", "--no-index", wheel]
    installed = done(*pip, folder=folder)
    assert installed.returncode == 0, installed.stderr[-2000:]
    (site,) = (folder / "venv" / "lib").glob("python*/site-packages")
    (site / "lent.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return own


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder of somebody's own project, whose modules break whoever imports them."""
    folder = tmp_path / "project"
    for package in ("clients", "scenarios"):
        (folder / package).mkdir(parents=True)
        (folder / package / "__init__.py").write_text(DECOY)
        (folder / package / "app.py").write_text(DECOY)
    (folder / "server.py").write_text(DECOY)
    return folder


def test_the_wheel_has_one_name_and_the_app_as_data(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names} == {"fedbd", "fedbd-0.1.0.dist-info"}
    assert {f"fedbd/flower-app/{name}" for name in ("clients/app.py", "server/app.py", "pyproject.toml")} <= set(names)
    assert {"fedbd/flower-app/scenarios/quickstart.yaml", "fedbd/flower-app/scenarios/schema.json"} <= set(names)
    assert not [name for name in names if "test" in name.lower() or name.endswith(".pyc")]


def test_the_installed_package_is_the_wheels(python: Path, place: Path) -> None:
    code = "import fedbd; from fedbd.running.engines import flower_app_dir as d; print(fedbd.__file__, d())"
    said = done(python, "-P", "-c", code, folder=place)
    package, app = said.stdout.split()
    assert Path(package).is_relative_to(python.parents[1]), said
    assert Path(app) == Path(package).parent / "flower-app"
    assert ROOT not in Path(package).parents


@pytest.mark.parametrize("command", ["script", "module"])
def test_the_quickstart_runs_from_an_unrelated_folder(command: str, python: Path, place: Path, tmp_path: Path) -> None:
    (scenario,) = python.parents[1].glob("lib/python*/site-packages/fedbd/flower-app/scenarios/quickstart.yaml")
    words = [python.parent / "fedbd"] if command == "script" else [python, "-m", "fedbd"]
    settings = [word for setting in SHORT for word in ("-s", setting)]
    said = done(*words, "run", scenario, *settings, "--no-twin", "--quiet", folder=place)
    assert said.returncode == 0, said.stdout + said.stderr
    folder = place / "runs" / "quickstart" / "seed-5"
    expected = run(load_scenario(scenario, [*SHORT, "evaluation.twin=false"]), tmp_path / "expected")
    assert same_records(folder, expected.path) == []
    assert len(read_rounds(folder)) == 4
