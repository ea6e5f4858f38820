"""The documents say what the code does: generated tables, names of records, dependencies, links, examples."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from fedbd.config.scenario import from_dict, load_scenario
from fedbd.errors import ScenarioError
from fedbd.records.record import read_rounds, read_summary
from fedbd.running.runs import run

ROOT = Path(__file__).parents[1]
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [*DOCS, ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]


def text(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text(page), re.DOTALL | re.MULTILINE)


def module(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = loaded
    spec.loader.exec_module(loaded)
    return loaded


def project() -> dict[str, Any]:
    return tomllib.loads(text(ROOT / "pyproject.toml"))


def constraints() -> dict[str, str]:
    rows = [line for line in text(ROOT / "constraints.txt").splitlines() if line and not line.startswith("#")]
    return {canonicalize_name(name): version for name, version in (row.split("==") for row in rows)}


def test_the_tables_of_the_scenario_page_are_those_of_the_code() -> None:
    page = ROOT / "docs" / "scenario.md"
    fields = module(ROOT / "docs" / "figures" / "fields.py")
    assert fields.render(text(page)) == text(page), "run `make docs`"


def test_the_schemas_beside_the_scenarios_are_those_of_the_code() -> None:
    fields = module(ROOT / "docs" / "figures" / "fields.py")
    assert [path for path, schema in fields.schemas().items() if text(path) != schema] == [], "run `make docs`"


def test_the_picture_of_a_round_draws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawing = module(ROOT / "docs" / "figures" / "architecture.py")
    monkeypatch.setattr(drawing, "OUT", tmp_path / "picture.svg")
    drawing.main()
    assert "<svg" in text(tmp_path / "picture.svg")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page: Path) -> None:
    links = re.findall(r"\]\(([^)#\s]+)[^)]*\)", text(page))
    missing = [link for link in links if "://" not in link and not (page.parent / link).exists()]
    assert missing == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_named_files_and_targets_exist(page: Path) -> None:
    named = re.findall(
        r"(?<![\w/.-])((?:fedbd|clients|server|tests|docs|benchmarks|scenarios)/[\w./-]+\.\w+)", text(page)
    )
    made = {"fedbd/attacks/replacement.py", "tests/attacks/test_replacement.py"}  # the example's
    assert [name for name in named if name not in made and not (ROOT / name).exists()] == []
    targets = re.findall(r"^([a-z-]+):.*##", text(ROOT / "Makefile"), re.MULTILINE)
    asked = re.findall(r"(?:`|^    )make ([a-z-]+)", text(page), re.MULTILINE)
    assert [name for name in asked if name not in targets] == []


def scenarios() -> Iterator[Any]:
    for page in PAGES:
        for number, block in enumerate(blocks(page, "yaml")):
            if "rounds:" in block and block.startswith("name:"):
                yield pytest.param(page, block, id=f"{page.name}-{number}")


@pytest.mark.parametrize(("page", "block"), scenarios())
def test_scenarios_in_pages_load(page: Path, block: str) -> None:
    raw = yaml.safe_load(block)
    for attack in raw.get("attacks", []):  # the worked example's attack is not in the registry
        attack["name"] = {"replacement": "badnets"}.get(attack["name"], attack["name"])
    assert from_dict(raw).name == raw["name"]


def test_the_refusal_in_the_readme_is_the_one_that_comes(tmp_path: Path) -> None:
    page = ROOT / "README.md"
    file = tmp_path / "scenario.yaml"
    file.write_text(blocks(page, "yaml")[0], encoding="utf-8")
    with pytest.raises(ScenarioError) as refused:
        load_scenario(file, ["bucket_size=null"])
    said = " ".join(str(refused.value).replace(str(file), "scenario.yaml").split())
    assert said in " ".join(text(page).split())


def test_every_quickstart_scenario_is_in_the_demo_and_on_the_page() -> None:
    files = {f"scenarios/{path.name}" for path in (ROOT / "scenarios").glob("quickstart*.yaml")}
    assert set(re.findall(r"scenarios/quickstart[\w-]*\.yaml", text(ROOT / "Makefile"))) == files
    assert {name for name in files if f"`{Path(name).name}`" not in text(ROOT / "docs" / "scenario.md")} == {
        "scenarios/quickstart.yaml"
    }


def test_every_dependency_is_explained_and_constrained() -> None:
    names = project()["project"]
    page = text(ROOT / "docs" / "dependencies.md")
    pins = constraints()
    for line in [*names["dependencies"], *names["optional-dependencies"]["dev"]]:
        wanted = Requirement(line)
        assert wanted.specifier.contains(pins[canonicalize_name(wanted.name)]), line
        assert wanted.name.lower() in page.lower(), line
    rows = re.findall(r"^\| ([\w-]+)[^|]*\| [^|]+\. \|$", page, re.MULTILINE)
    assert {canonicalize_name(row) for row in rows} == {
        canonicalize_name(Requirement(line).name) for line in names["dependencies"]
    }


def test_constraints_are_names_and_exact_public_versions() -> None:
    rows = [line for line in text(ROOT / "constraints.txt").splitlines() if not line.startswith("#")]
    assert [row for row in rows if not re.fullmatch(r"[A-Za-z0-9._-]+==[\w.]+", row)] == []


@pytest.fixture(scope="module")
def everything(tmp_path_factory: pytest.TempPathFactory) -> Path:
    raw = {
        "name": "everything",
        "rounds": 2,
        "data": {"name": "digits"},
        "partition": {"name": "iid", "clients": 4},
        "trusted": {"size": 100},
        "model": {"name": "cnn", "width": 4},
        "training": {"epochs": 1, "lr": 0.05},
        "attacks": [
            {"name": "badnets", "clients": {"ids": [0]}, "target": 0, "trigger": {"name": "grid"}},
            {
                "name": "badnets",
                "label": "pollution",
                "role": "polluted",
                "per": "dataset",
                "clients": {"ids": [1]},
                "target": 1,
                "trigger": {"name": "grid"},
            },
        ],
        "local_defense": {"name": "abl", "isolate_after": 1, "confidence": None},
        "secure_sum": {"name": "ckks"},
        "bucket_size": 2,
        "aggregation": {"name": "norm_clip"},
        "cleanup": [{"name": "rnp"}, {"name": "rnp", "label": "loop", "mode": "in_loop"}],
        "detection": [{"name": "rnp_unlearned"}],
        "engine": {"executor": "serial"},
    }
    return run(from_dict(raw), tmp_path_factory.mktemp("runs")).path


def names_of(value: Any, *, labels: tuple[str, ...] = ()) -> set[str]:
    """Return the names in nested mappings; those under ``labels`` are the user's own and are passed over."""
    found: set[str] = set()
    for name, entry in value.items() if isinstance(value, dict) else []:
        found.add(name)
        inner = entry.values() if name in labels and isinstance(entry, dict) else [entry]
        for part in inner:
            found |= names_of(part, labels=labels)
    return found


LABELED = ("per_attack", "cleanup", "detection", "clients", "versions")


def test_every_name_in_a_record_is_on_its_page(everything: Path) -> None:
    page = text(ROOT / "docs" / "records.md")
    line, summary = read_rounds(everything)[-1], read_summary(everything)
    own = {name: entry for name, entry in line.items() if name != "notes"}
    for labeled in ("cleanup", "detection"):  # a method's notes are the method's own
        own[labeled] = {label: {**entry, "notes": None} for label, entry in own[labeled].items()}
    names = names_of(own, labels=LABELED) | set(line["notes"]) | names_of(summary, labels=LABELED)
    assert {name for name in names if f"`{name}`" not in page} == set()


def test_every_file_of_a_run_is_on_the_page(everything: Path) -> None:
    page = text(ROOT / "docs" / "records.md")
    assert {path.name for path in everything.iterdir() if f" {path.name} " not in page} == set()


def test_the_worked_example_obeys_and_attacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = ROOT / "CONTRIBUTING.md"
    source, line, row = blocks(page, "python")
    (tmp_path / "replacement.py").write_text(source, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert re.fullmatch(r' {8}"replacement": "fedbd\.attacks\.replacement:Replacement",\n', line)
    conformance = module(ROOT / "tests" / "test_conformance.py")
    mine = eval(row.strip().rstrip(","), {"Row": conformance.Row})
    mine = conformance.Row(mine.kind, "replacement:Replacement", mine.fields)
    conformance.test_is_a_frozen_dataclass_that_obeys_its_protocol_and_names_its_source(mine)
    conformance.test_attack_poisons_for_its_target_and_repeats_itself(mine)
    (scenario,) = blocks(page, "yaml")
    raw = yaml.safe_load(
        scenario.replace("name: replacement\n    clients", "name: replacement:Replacement\n    clients")
    )
    result = run(from_dict({**raw, "evaluation": {"twin": False}, "engine": {"executor": "serial"}}), tmp_path / "runs")
    assert result.summary["attack_success"] > 0.5


def test_the_python_lines_of_the_readme_run(tmp_path: Path) -> None:
    source = blocks(ROOT / "README.md", "python")[0]
    (tmp_path / "mine.py").write_text(source.replace('"scenarios/', f'"{ROOT}/scenarios/'), encoding="utf-8")
    command = [sys.executable, "mine.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    measured = json.loads(done.stdout.splitlines()[-1])
    assert len(measured) == 6
