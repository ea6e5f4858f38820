from __future__ import annotations

import ast
import importlib
import os
import pkgutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import fedbd

ROOT = Path(fedbd.__file__).resolve().parent.parent
MODULES = sorted(
    module.name for module in pkgutil.walk_packages(fedbd.__path__, "fedbd.") if "flower-app" not in module.name
)


def python(code: str, *arguments: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("name", [name for name in MODULES if not name.endswith("__main__")])
def test_every_module_imports(name: str) -> None:
    assert importlib.import_module(name).__doc__, f"{name} does not say what it is"


def test_every_part_of_the_core_is_under_its_contract() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    contracts = settings["tool"]["importlinter"]["contracts"]
    core = {name.split(".")[1] for name in contracts[0]["source_modules"]}
    parts = {name.split(".")[1] for name in MODULES}
    assert core == parts - {"__main__", "cli", "flower", "running"}


def test_the_public_names() -> None:
    assert set(fedbd.__all__) == {"RunResult", "Scenario", "__version__", "load_scenario", "run"}
    for name in fedbd.__all__:
        assert getattr(fedbd, name) is not None
    with pytest.raises(AttributeError, match="module 'fedbd' has no attribute 'nothing'"):
        _ = fedbd.nothing


def test_import_directions() -> None:
    pytest.importorskip("importlinter")
    command = [str(Path(sys.executable).parent / "lint-imports"), "--no-cache"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    assert "0 broken" in done.stdout


HEAVY = ("torch", "flwr", "ray", "sklearn", "tenseal", "matplotlib", "pyarrow", "pandas", "scipy", "numpy")


@pytest.mark.parametrize(
    ("modules", "absent"),
    [
        ("fedbd", HEAVY),
        ("fedbd.cli.main", (*HEAVY, "pydantic")),
        ("fedbd.__main__", (*HEAVY, "pydantic")),
        (
            "fedbd.errors fedbd.registry fedbd.config.scenario_file fedbd.records.record fedbd.summary "
            "fedbd.report.run_view",
            HEAVY,
        ),
        (
            "fedbd.config.scenario fedbd.compatibility fedbd.prepared fedbd.config.run_text",
            ("flwr", "ray", "matplotlib"),
        ),
        ("fedbd.cli.catalog fedbd.registry fedbd.errors", ("torch", "flwr", "ray")),
    ],
)
def test_slow_libraries_are_imported_late(modules: str, absent: tuple[str, ...]) -> None:
    code = (
        "import importlib, sys\n"
        f"for name in {modules!r}.split(): importlib.import_module(name)\n"
        f"print(*[name for name in {absent!r} if name in sys.modules])"
    )
    assert python(code) == ""


def test_a_scenario_loads_without_flower(tmp_path: Path) -> None:
    path = tmp_path / "s.yaml"
    path.write_text(
        "name: t\nrounds: 1\ndata: digits\nmodel: cnn\nsecure_sum: ckks\ntrusted: {size: 50}\ncleanup: [rnp]\n"
    )
    code = (
        "import sys\nfrom fedbd import load_scenario\n"
        "print(load_scenario(sys.argv[1]).cleanup[0].key, *[name for name in ('flwr', 'ray') if name in sys.modules])"
    )
    assert python(code, str(path)) == "rnp"


def imports_of(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.add(node.module or "")
    return found


SOURCES = [path for folder in ("fedbd", "clients", "server") for path in (ROOT / folder).rglob("*.py")]


def test_tenseal_is_imported_in_one_file() -> None:
    users = [
        path.relative_to(ROOT).as_posix()
        for path in SOURCES
        if any(name.split(".")[0] == "tenseal" for name in imports_of(path))
    ]
    assert users == ["fedbd/crypto/ckks.py"]


def test_only_three_parts_of_flower_are_imported_outside_of_compat() -> None:
    allowed = ("flwr.app", "flwr.clientapp", "flwr.serverapp")
    for path in SOURCES:
        if path.name == "compat.py":
            continue
        odd = {name for name in imports_of(path) if name.split(".")[0] == "flwr" and not name.startswith(allowed)}
        assert odd == set(), path


def test_within_clients_and_server_imports_are_relative() -> None:
    for folder in ("clients", "server"):
        for path in (ROOT / folder).glob("*.py"):
            assert {name for name in imports_of(path) if name.split(".")[0] in ("clients", "server")} == set(), path


def test_the_public_names_are_what_they_say() -> None:
    import fedbd
    import fedbd.config.scenario
    import fedbd.running.runs

    assert fedbd.run is fedbd.running.runs.run
    assert fedbd.load_scenario is fedbd.config.scenario.load_scenario
