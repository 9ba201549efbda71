"""End: the last words of a rank, and what follows from them for the others."""

from dataclasses import dataclass
from functools import cached_property

from msn_eval.errors import DistributedError, MsnEvalError, printable

_PREEMPTED, _INTERRUPTED = 75, 130
KEPT = "Finished features and results are kept; the same command goes on from them."


@dataclass(frozen=True, kw_only=True)
class End:
    """The last words of a rank.

    code:  it exits with; 0: it is done
    order: 1 for the first rank that failed, 2 for the next; 0: it is done, or was told to stop
    text:  of its error
    """

    code: int
    order: int = 0
    text: str = ""

    @property
    def first_line(self) -> str:
        return printable(self.text.partition("\n")[0])


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """Why this rank cannot go on.

    end: of the other rank, where it left last words
    """

    what: str
    code: int
    end: End | None = None

    @cached_property
    def error(self) -> DistributedError:
        # One line, where the other rank says the rest.
        return ending(self.what, self.code, remedy="" if self.end else KEPT)


def ending(what: str, code: int, *, remedy: str = "") -> DistributedError:
    """Give an error that this rank leaves with, by another's exit code."""
    error = DistributedError(what, remedy=remedy)
    error.exit_code = code
    return error


def text_of(error: BaseException) -> str:
    """Give an error as a command tells it."""
    return f"{type(error).__name__}: {error}"


def exit_code_of(error: BaseException) -> int:
    """Give what a command exits with."""
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    if isinstance(error, KeyboardInterrupt):  # by another name it is what the command line makes of SIGTERM
        return _INTERRUPTED if type(error) is KeyboardInterrupt else _PREEMPTED
    return error.exit_code if isinstance(error, MsnEvalError) else MsnEvalError.exit_code
