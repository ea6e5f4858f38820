"""The command line: the commands of ``COMMANDS``, each in a module of its group; exit statuses.

Exit status: 0 done, 1 a run failed, 2 the user's mistake; interrupted: 128 and the signal's number (Ctrl-C: 130). A
mistake prints what is wrong and where, never a traceback. torch is imported by the commands that need it, not by
``--help``.
"""

from __future__ import annotations

import contextlib
import inspect
import os
import signal
import sys
from collections.abc import Callable
from types import FrameType
from typing import Annotated, Any, get_type_hints

import typer
from typer.core import TyperGroup
from typer.models import ArgumentInfo

from fedbd import __version__
from fedbd.cli import detect, export, models, resume, run, show
from fedbd.cli import inspect as inspect_
from fedbd.cli.arguments import say
from fedbd.errors import FedBDError, Interrupted, UserError


class _Interrupted(BaseException):
    """Carries KeyboardInterrupt past typer, which would end the process without a word."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.signal = number


class _Commands(TyperGroup):
    def invoke(self, ctx: Any) -> Any:
        """Run a command."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as error:
            raise _Interrupted(getattr(error, "signal", signal.SIGINT)) from error

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """Return a command whose arguments have their help: click 8.5 forgets what typer 0.20 gave them."""
        command = super().get_command(ctx, cmd_name)
        hints = get_type_hints(COMMANDS[cmd_name], include_extras=True) if command is not None else {}
        for parameter in () if command is None else command.params:
            for extra in getattr(hints.get(str(parameter.name)), "__metadata__", ()):
                if isinstance(extra, ArgumentInfo):
                    parameter.help = extra.help
        return command


app = typer.Typer(
    name="fedbd",
    cls=_Commands,
    help="Simulate federated learning under attack: poisoned clients, encrypted sums, defenses, measured every round.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    suggest_commands=False,  # click does, and typer would say it once more
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"fedbd {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    """Options of fedbd itself."""


COMMANDS: dict[str, Callable[..., None]] = {
    "run": run.run,
    "resume": resume.resume,
    "validate": show.validate,
    "list": show.list_,
    "show": show.show,
    "schema": export.schema,
    "export": export.export,
    "cite": export.cite,
    "doctor": show.doctor,
    "train": models.train,
    "clean": models.clean,
    "detect": detect.detect,
    "inspect": inspect_.inspect,
}
"""Name -> command, in the order of ``fedbd --help``."""


def _reflowed(command: Callable[..., None]) -> str:
    """Return a command's documentation, each paragraph in one line: rich breaks lines where the terminal ends."""
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in (inspect.getdoc(command) or "").split("\n\n"))


for _name, _command in COMMANDS.items():
    app.command(name=_name, help=_reflowed(_command))(_command)


def main() -> None:
    """Run the command line and turn errors into exit statuses."""
    _open_streams()
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is signal.SIG_DFL:  # nohup has the second one ignored
            signal.signal(number, _stop)
    try:
        app(prog_name="fedbd", **({"color": False} if os.environ.get("NO_COLOR") else {}))
    except UserError as error:
        say(str(error), fg="red")
        sys.exit(2)
    except FedBDError as error:
        say(str(error), fg="red")
        sys.exit(1)
    except (KeyboardInterrupt, _Interrupted) as error:
        with contextlib.suppress(OSError):  # the terminal may be gone
            say("interrupted")
        sys.exit(128 + getattr(error, "signal", signal.SIGINT))


def _open_streams() -> None:
    """Open what the caller closed (``>&-``): else the next file that is opened would be standard output."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # the processes of the runs have them, too
    sys.stdout = sys.stdout or os.fdopen(1, "w")
    sys.stderr = sys.stderr or os.fdopen(2, "w")


def _stop(number: int, frame: FrameType | None) -> None:
    """End in order, so that the processes that were begun end, too."""
    raise Interrupted(number)


if __name__ == "__main__":
    main()
