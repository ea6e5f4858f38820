"""What a scenario's engine section becomes, without starting one."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest

from fedbd.config.scenario import from_dict
from fedbd.errors import RunFailed
from fedbd.flower.runtime import RunOutcome
from fedbd.running import engines
from fedbd.running.engines import gpu_names

ROOT = Path(engines.flower_app_dir())
RAW: dict[str, Any] = {"name": "t", "rounds": 1, "data": {"name": "digits"}, "model": {"name": "mlp"}}


def test_gpus_are_numbered_as_this_process_sees_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert gpu_names(None) is None
    assert gpu_names((0, 1)) == ["0", "1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2, GPU-5f3a")
    assert gpu_names((1, 0, 1)) == ["GPU-5f3a", "2", "GPU-5f3a"]


def test_every_worker_sees_the_gpu_whose_turn_it_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    given: dict[str, Any] = {}

    def pool(factory: object, workers: int, **more: Any) -> None:
        given.update(more, workers=workers)
        raise InterruptedError

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    monkeypatch.setattr(engines, "ProcessPoolExecutor", pool)
    engine = {"device": "cuda", "workers": 4, "cuda_devices": [0, 1]}
    with pytest.raises(InterruptedError):
        engines.execute(from_dict({**RAW, "engine": engine}), tmp_path / "run", None)
    assert (given["workers"], given["cuda_devices"]) == (4, ["4", "7"])


def test_a_ray_clusters_address_and_the_share_of_a_gpu_reach_flowers_runtime(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    given: dict[str, Any] = {}

    def run_app(app: Path, **more: Any) -> RunOutcome:
        given.update(more)
        return RunOutcome("failed", "no Ray cluster answers at head:6379", tmp_path, {})

    monkeypatch.setattr(engines, "run_app", run_app)
    engine = {"name": "ray", "ray_address": "head:6379", "client_gpus": 0.25}
    with pytest.raises(RunFailed, match="no Ray cluster answers"):
        engines.execute(from_dict({**RAW, "engine": engine}), tmp_path / "run", None)
    assert (given["ray_address"], given["client_gpus"], given["mode"]) == ("head:6379", 0.25, "ray")


def test_every_key_of_a_run_is_one_that_flower_lets_in(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Flower refuses a run whose config has a key that the app's pyproject does not name."""
    given: dict[str, str] = {}

    def local(scenario: object, config: dict[str, str], env: object, agent: object) -> None:
        given.update(config)
        raise InterruptedError

    monkeypatch.setattr(engines, "_local", local)
    with pytest.raises(InterruptedError):
        engines.execute(from_dict(RAW), tmp_path / "run", None)
    app = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["flwr"]["app"]
    assert set(given) | {"scenario"} == set(app["config"])
