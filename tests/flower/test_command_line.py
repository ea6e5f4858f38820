from __future__ import annotations

import math
import os
import socket
import sys
import tomllib
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedbd.flower.command_line import (
    base_environment,
    free_ports,
    inline_config,
    last_error,
    last_words,
    listens,
    toml_config,
)

UNICODE = st.text(st.characters(exclude_categories=["Cs"]))
NASTY = '{"a": "it\'s \\"quoted\\"\\n", "k=v": [1, 2]}\r\n\t\x00\x7f \u00fc\u20ac\U0001f600 \\U0001F600 #" \'\'\' """'


@given(
    st.dictionaries(UNICODE, UNICODE | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False))
)
def test_toml_gives_back_what_was_put_in(config: dict) -> None:
    read = tomllib.loads(toml_config(config))
    assert read == config
    assert [type(value) for value in read.values()] == [type(value) for value in config.values()]


def test_toml_keeps_nan_and_a_nasty_string() -> None:
    read = tomllib.loads(toml_config({"nan": math.nan, "scenario-json": NASTY, "a.b": 1}))
    assert math.isnan(read["nan"])
    assert read["scenario-json"] == NASTY
    assert read["a.b"] == 1


@pytest.mark.parametrize("value", [[1], {"a": 1}, None, 2**63, b"x", "\ud800"])
def test_toml_refuses_what_flower_cannot_hold(value: object) -> None:
    with pytest.raises(ValueError):
        toml_config({"key": value})  # type: ignore[dict-item]


@settings(deadline=None)  # the import of flwr
@given(st.dictionaries(st.from_regex(r"[A-Za-z0-9_-]+", fullmatch=True), UNICODE | st.integers(-(2**63), 2**63 - 1)))
def test_flower_reads_an_inline_config_as_it_was_meant(config: dict) -> None:
    from flwr.common.config import parse_config_args

    assert parse_config_args([inline_config(config)]) == config


@pytest.mark.parametrize("config", [{"a b": 1}, {"": 1}, {"a.b": 1}, {"a": 1.5}, {"a": True}])
def test_inline_config_refuses_what_flower_would_misread(config: dict) -> None:
    with pytest.raises(ValueError, match="node config"):
        inline_config(config)


def test_environment_is_the_callers_without_what_changes_a_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("RAY_ADDRESS", "FLWR_HOME", "FLWR_LOCAL_SUPERLINK_HTTP_API_PORT", "FORCE_COLOR"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("FLWR_LOG_LEVEL", "DEBUG")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    monkeypatch.setenv("NO_PROXY", "example.org")
    monkeypatch.setenv("PYTHONPATH", f"relative{os.pathsep}{os.pathsep}/absolute")
    monkeypatch.chdir(tmp_path)
    env = base_environment()
    assert not {"RAY_ADDRESS", "FLWR_HOME", "FLWR_LOCAL_SUPERLINK_HTTP_API_PORT", "FORCE_COLOR"} & set(env)
    assert (env["FLWR_LOG_LEVEL"], env["CUDA_VISIBLE_DEVICES"]) == ("DEBUG", "3")
    assert env["NO_PROXY"] == "example.org,127.0.0.1,localhost"
    assert env["PYTHONPATH"].split(os.pathsep)[:2] == [str(tmp_path / "relative"), "/absolute"]
    assert env["PATH"].split(os.pathsep)[0] == str(Path(sys.executable).parent)
    assert env["FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION"] == "1"
    hidden = base_environment(hidden={"CUDA_VISIBLE_DEVICES", "PATH"})
    assert "CUDA_VISIBLE_DEVICES" not in hidden
    assert hidden["PATH"].split(os.pathsep) == [str(Path(sys.executable).parent), *os.defpath.split(os.pathsep)]


def test_free_ports_can_be_bound_all_at_once() -> None:
    ports = free_ports(50)
    assert len(set(ports)) == 50
    bound = [socket.create_server(("127.0.0.1", port)) for port in ports]
    for one in bound:
        one.close()


def test_listens_knows_whose_port_it_is() -> None:
    [port] = free_ports(1)
    assert not listens(os.getpid(), port)
    with socket.create_server(("127.0.0.1", port)):
        assert listens(os.getpid(), port)
        assert not listens(os.getppid(), port)
        assert not listens(2**30, port)


PLAIN = """\x1b[92mINFO \x1b[0m:      started
Traceback (most recent call last):
  File "/app/server/app.py", line 3, in main
    f()
    ^^^
  File "/app/server/step.py", line 30, in f
    raise ScenarioError(problems)
fedbd.errors.ScenarioError: cannot load
  attacks[0].target: expected a label, got 12
\x1b[91mERROR \x1b[0m:     Exit Code: 201

An unhandled exception occurred in the ServerApp.
"""

WRAPPED = """Traceback (most recent call last):
  File "/app/server/app.py", line 3, in main
    f()
KeyError: 'a'

During handling of the above exception, another exception occurred:

Traceback (most recent call last):
  File "/app/server/app.py", line 5, in main
    raise RunFailed("no such entry")
fedbd.errors.RunFailed: no such entry

The above exception was the direct cause of the following exception:

Traceback (most recent call last):
  File "/venv/lib/python3.11/site-packages/flwr/simulation/run_simulation.py", line 369, in _main_loop
    raise RuntimeError("An error was encountered. Ending simulation.") from ex
RuntimeError: An error was encountered. Ending simulation.
"""

QUOTED = """Traceback (most recent call last):
  File "/app/server/app.py", line 21, in ask
    raise RuntimeError(f"a client failed: {reply.error.reason}")
RuntimeError: a client failed: ray::ClientAppActor.run()
                  ^^^^^^^^^^^^^^^^
  File "/venv/flwr/client_app.py", line 161, in __call__
    return self._registered_funcs[full_name](message, context)
ValueError: client 1 fails

The above exception was the direct cause of the following exception:
"""


@pytest.mark.parametrize(
    ("log", "error"),
    [
        (
            PLAIN,
            "fedbd.errors.ScenarioError: cannot load\n  attacks[0].target: expected a label, got 12"
            " (/app/server/step.py:30)",
        ),
        (WRAPPED, "fedbd.errors.RunFailed: no such entry (/app/server/app.py:5)"),
        (QUOTED, "RuntimeError: a client failed: ray::ClientAppActor.run()\n"
         "ValueError: client 1 fails (/app/server/app.py:21)"),
        (WRAPPED + "INFO :  once more\n" + PLAIN, "fedbd.errors.ScenarioError: cannot load\n"
         "  attacks[0].target: expected a label, got 12 (/app/server/step.py:30)"),
        ("INFO :  all is well\n", ""),
        ("Traceback (most recent call last):\n", ""),
    ],
)  # fmt: skip
def test_last_error_is_what_the_app_raised(log: str, error: str) -> None:
    assert last_error(log) == error


def test_last_words_are_free_of_colors_and_frames() -> None:
    assert last_words("one\n\ntwo\n\x1b[31mthree\x1b[0m\nfour\n\n") == "two\nthree\nfour"
    box = (
        "one\n╭─ Error ─────────╮\n│ \x1b[31mno such file: it  │\n│ is gone\x1b[0m          │\n╰─────────────────╯\n\n"
    )
    assert last_words(box) == "no such file: it is gone"
    assert last_words("") == ""
