"""What Flower's commands are given (configuration, environment, ports) and what can be read from what they print."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import socket
import sys
import sysconfig
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import fedbd

Scalar = str | int | float | bool
"""What Flower's run configuration holds."""

_PORTS = range(20000, 32768)
_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")
_COLOR = re.compile(r"\x1b\[[0-9;]*m")
_LOG_LINE = re.compile(r"(DEBUG|INFO|WARNING|ERROR|CRITICAL)\s*:")
_FRAME = re.compile(r'^\s+File "(.+)", line (\d+)')


def toml_config(config: Mapping[str, Scalar]) -> str:
    r"""Return the text of a TOML file for ``flwr run --run-config``; any Unicode string survives.

    Keys are quoted, so a dotted key stays one key.

    Raises:
        ValueError: A value is not a string, an integer of 64 bits, a float or a boolean, or a string is not Unicode.
    """
    return "".join(f"{_basic_string(key)} = {_toml_value(key, value)}\n" for key, value in config.items())


def _toml_value(key: str, value: Scalar) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return _basic_string(value)
    if isinstance(value, float) or (isinstance(value, int) and -(2**63) <= value < 2**63):
        return repr(value)
    raise ValueError(f"{key}: Flower takes strings, 64-bit integers, floats and booleans, got {value!r}")


def _basic_string(text: str) -> str:
    # JSON's escapes are TOML's, but TOML has no surrogate pairs and wants DEL escaped.
    quoted = json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")
    quoted.encode()  # a lone surrogate fails here and not in the middle of a run; UnicodeEncodeError is a ValueError
    return quoted


def inline_config(config: Mapping[str, str | int]) -> str:
    """Return ``key=value`` pairs for ``--node-config``; any Unicode string survives.

    Flower cuts the text at spaces and quotes before it reads the pieces as TOML, so whatever is not a plain printable
    character is written as an escape.

    Raises:
        ValueError: A key is not of letters, digits, ``-`` and ``_``, or a value is neither a string nor an integer.
    """
    pairs = []
    for key, value in config.items():
        if not _BARE_KEY.fullmatch(key):
            raise ValueError(f"node config: keys are letters, digits, - and _, got {key!r}")
        if isinstance(value, bool) or not isinstance(value, str | int):
            raise ValueError(f"node config: {key}: expected a string or an integer, got {value!r}")
        text = "".join(c if " " <= c <= "~" and c not in "\"'\\" else f"\\U{ord(c):08x}" for c in str(value))
        pairs.append(f'{key}="{text}"' if isinstance(value, str) else f"{key}={value}")
    return " ".join(pairs)


def base_environment(hidden: Collection[str] = ()) -> dict[str, str]:
    """Return the caller's environment, without the ``hidden`` names, as Flower's commands need it.

    The scripts beside the running interpreter come first in PATH (Flower starts its parts by name), paths no longer
    depend on the working directory, this ``fedbd`` can be imported, and what would change a run unasked is gone:
    Flower's own variables but the log level, ``RAY_ADDRESS``, proxies for this machine, forced color.

    Raises:
        FileNotFoundError: Flower's commands are not beside the interpreter.
    """
    gone = {"RAY_ADDRESS", "RAY_TMPDIR", "FORCE_COLOR", "CLICOLOR_FORCE", *hidden}
    env = {k: v for k, v in os.environ.items() if k not in gone and (k[:5] != "FLWR_" or k == "FLWR_LOG_LEVEL")}
    paths = [str(Path(entry).absolute()) for entry in env.get("PYTHONPATH", "").split(os.pathsep) if entry]
    root = str(Path(fedbd.__file__).parents[1])
    if root not in (sysconfig.get_path("purelib"), *paths):
        paths.append(root)
    if paths:
        env["PYTHONPATH"] = os.pathsep.join(paths)
    env["PATH"] = f"{_scripts()}{os.pathsep}{env.get('PATH', os.defpath)}"
    for name in ("NO_PROXY", "no_proxy"):
        env[name] = ",".join(filter(None, [env.get(name, ""), "127.0.0.1,localhost"]))
    return env | {
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.25",  # seconds instead of 1: it delays every message
        "RAY_USAGE_STATS_ENABLED": "0",
        "PYTHONUNBUFFERED": "1",
        "NO_COLOR": "1",
    }


def _scripts() -> Path:
    schemes = [sysconfig.get_path("scripts"), sysconfig.get_path("scripts", sysconfig.get_preferred_scheme("user"))]
    folders = [Path(sys.executable).parent, *map(Path, schemes)]
    for folder in folders:
        if all(shutil.which(name, path=str(folder)) for name in ("flwr", "flower-superlink", "flower-superexec")):
            return folder
    raise FileNotFoundError(f"Flower's commands (flwr, flower-superlink) are in none of {', '.join(map(str, folders))}")


def free_ports(count: int) -> list[int]:
    """Return ``count`` different TCP ports that are free on 127.0.0.1 now.

    They lie above the range that a Ray cluster takes its workers' ports from and below the one that the system takes
    ports for outgoing connections from, so that neither takes one before its owner has started.
    """
    ports: list[int] = []
    for port in random.SystemRandom().sample(_PORTS, len(_PORTS)):
        if len(ports) == count:
            break
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        ports.append(port)
    return ports


def listens(pid: int, port: int) -> bool:
    """Say whether process ``pid`` itself listens on TCP ``port`` of this machine (Linux)."""
    sockets = set()
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        fields = line.split()
        if fields[3] == "0A" and int(fields[1].rpartition(":")[2], 16) == port:
            sockets.add(f"socket:[{fields[9]}]")
    try:
        return any(os.readlink(entry) in sockets for entry in Path(f"/proc/{pid}/fd").iterdir())
    except OSError:  # the process, or one of its files, is gone meanwhile
        return False


def last_error(log: str) -> str:
    """Return what a log says went wrong, in some lines at most; empty where it holds no traceback.

    That is the last exception, with the place that raised it. Of a chain of exceptions it is the last one that was not
    raised by Flower, which wraps an app's errors into ones that say less.
    """
    lines = _COLOR.sub("", log).splitlines()
    chain: list[tuple[str, str]] = []
    chained = False
    for number, line in enumerate(lines):
        chained = chained or line.startswith(("The above exception was", "During handling of the above"))
        if line.startswith("Traceback (most recent call last)"):
            found = _exception(lines[number + 1 :])
            chain = [*(chain if chained else []), found]
            chained = False
    of_flower = f"{os.sep}flwr{os.sep}"
    best = next((item for item in reversed(chain) if of_flower not in item[1]), chain[0] if chain else ("", ""))
    return f"{best[0]} ({best[1]})" if best[1] else best[0]


def last_words(log: str) -> str:
    """Return the last three lines of a log without colors, or all that ``flwr`` drew a box around."""
    lines = _COLOR.sub("", log).rstrip().splitlines()
    top = max((number for number, line in enumerate(lines) if line.startswith("╭─ Error")), default=None)
    if top is not None and lines[-1].startswith("╰"):
        return " ".join(line.strip(" │") for line in lines[top + 1 : -1])
    return "\n".join([line for line in lines if line.strip()][-3:])


def _exception(lines: Sequence[str]) -> tuple[str, str]:
    """Return the message below a traceback's frames, twelve lines at most, and the place of the last frame."""
    place = ""
    rows = iter(lines)
    text: list[str] = []
    for line in rows:
        if frame := _FRAME.match(line):
            # A message may quote the traceback of another process; its frames are left out.
            place = place if text else f"{frame[1]}:{frame[2]}"
            next(rows, None)
        elif text and (not line.strip() or _LOG_LINE.match(line) or len(text) == 12):
            break
        elif (text or not line[:1].isspace()) and line.strip(" ^~"):
            text.append(line.rstrip())
    return "\n".join(text), place
