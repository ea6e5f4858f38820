"""The errors that fedbd raises on purpose; the command line turns each into an exit status and a sentence."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass


class FedBDError(Exception):
    """Base of every error that fedbd raises on purpose."""


class Interrupted(KeyboardInterrupt):
    """A signal asked for the end; what was finished is on disk. ``signal`` is its number."""

    def __init__(self, number: int) -> None:
        """Keep the number."""
        super().__init__()
        self.signal = number


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One thing that is wrong with what the user wrote.

    Attributes:
        path: Where it stands, in the user's own terms (``attacks[0].target``, a file name).
        expected: What should stand there.
        got: What stands there, already rendered; None where nothing does.
        remedy: What to do about it; empty where ``expected`` says it all.
    """

    path: str
    expected: str
    got: str | None = None
    remedy: str = ""

    def __str__(self) -> str:
        """Return ``path: expected, got X; remedy``; without a path where the whole is meant."""
        text = f"{self.path}: {self.expected}" if self.path else self.expected
        if self.got is not None:
            text += f", got {self.got}"
        return f"{text}; {self.remedy}" if self.remedy else text


class UserError(FedBDError):
    """The user's mistake, with every problem found (exit status 2)."""

    def __init__(self, problems: Sequence[Problem], heading: str = "") -> None:
        """Keep the problems; the message is the heading and one line each."""
        self.problems = tuple(problems)
        self.heading = heading
        lines = [str(problem) for problem in self.problems]
        super().__init__("\n".join([heading, *(f"  {line}" for line in lines)] if heading else lines))


class ScenarioError(UserError):
    """A scenario that cannot be loaded."""


class DataError(UserError):
    """A data file that is missing, damaged or of another form."""


class CheckpointError(UserError):
    """A checkpoint that does not fit the model."""


class RunFailed(FedBDError):  # noqa: N818 - the status word of summary.json
    """A run that started and could not finish (exit status 1); finished rounds are on disk."""


class ClientFailed(RunFailed):
    """A client failed in a round and the scenario says that this ends the run."""


class SecureSumFailed(RunFailed):
    """The encrypted sum could not be made or its decryptions disagree."""


class MethodRefused(RunFailed):
    """A method found at run time that it cannot act (never a silent fallback)."""


def refusal(look: Callable[[], object]) -> str | None:
    """Return why looking into a model is refused (``MethodRefused``), None if it is not."""
    try:
        look()
    except MethodRefused as refused:
        return str(refused)
    return None
