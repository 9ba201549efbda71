"""Everything that can go wrong by somebody else's hand, and the exit code that it ends the command with.

    MsnEvalError              1   a bug of ours, if it reaches the user as itself
    ├── UsageError            2   option, config key, subset or probe name
    ├── CheckpointError      20   weights missing or refused
    ├── DataError            21   data folder, class, image or list
    ├── StoreError           22   results, cache, disk
    ├── NumericalError       23   NaN features, k above n, a single class
    ├── ResourceError        30   memory, workers
    ├── DistributedError     31   ranks that died, hang, or do not agree
    └── ComparisonError      12   no baseline, or results that must not be compared

Besides these `check` ends with 10 for a regression and with 11 where it cannot tell, and any command with 75 when it was
told to stop (SIGTERM) and 130 when it was interrupted.
"""

import difflib
import re
from collections.abc import Iterable

PREEMPTED, INTERRUPTED = 75, 130  # exit codes after SIGTERM, where the same command continues, and after Ctrl-C

# C0 and C1 controls (so also ANSI escapes), the marks that turn the direction of text, and what breaks lines or has no width.
_LONGEST_PLACE = 1000  # of an error, in characters
_LONGEST_LINE = 2000  # of an error, in characters: much of it may be a stranger's text
_UNPRINTABLE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u00ad\u061c\u180e\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\U000e0000-\U000e007f]"
)


def printable(text: str) -> str:
    """Give `text` with controls, direction marks and undecodable bytes spelled out instead of acted upon."""
    shown = _UNPRINTABLE.sub(lambda found: f"\\x{ord(found.group()):02x}", text)
    return shown.encode("utf-8", "backslashreplace").decode("utf-8")


def one_line(text: str) -> str:
    """Give `printable` text with every run of white space as one space: a name stays in its line and its cell."""
    return printable(" ".join(text.split()))


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Give ` Did you mean X?` for the known name closest to `name`, or an empty string."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f" Did you mean {close[0]}?" if close else ""


class MsnEvalError(Exception):
    """One fault, told in one block: what was wrong, where, what to do, what was kept."""

    exit_code = 1

    def __init__(self, what: str, *, where: str = "", hint: str = "", kept: str = "") -> None:
        super().__init__(what)
        self.what, self.where, self.hint, self.kept = what, where, hint, kept

    def __str__(self) -> str:
        where = self.where if len(self.where) <= _LONGEST_PLACE else f"{self.where[:_LONGEST_PLACE]}…"
        head = f"{where}: {self.what}" if where else self.what
        lines = "\n".join(part for part in (head, self.hint, self.kept) if part).split("\n")
        return printable("\n".join(f"{line[:_LONGEST_LINE]}…" if len(line) > _LONGEST_LINE else line for line in lines))


class UsageError(MsnEvalError):
    """An option, a config key or a name of ours that does not exist or is out of range."""

    exit_code = 2


class ComparisonError(MsnEvalError):
    """A baseline that is missing or unreadable, or results that must not be put beside others."""

    exit_code = 12


class CheckpointError(MsnEvalError):
    """Weights that are missing, unreadable, or do not fit the network in full."""

    exit_code = 20


class DataError(MsnEvalError):
    """A data folder, class, image or list that is missing or unusable."""

    exit_code = 21


class StoreError(MsnEvalError):
    """Results or cached files that cannot be read or written."""

    exit_code = 22


class NumericalError(MsnEvalError):
    """Numbers that must not be turned into an accuracy."""

    exit_code = 23


class ResourceError(MsnEvalError):
    """Memory, worker processes or devices that gave out."""

    exit_code = 30


class DistributedError(MsnEvalError):
    """Ranks of one job that died, hang, or do not agree on what they compute.

    Attributes:
        from_peer: Whether another rank reports this failure with its own error.
    """

    exit_code = 31
    from_peer = False


def exit_code_of(error: BaseException) -> int:
    """Return the code that a command exits with after `error`."""
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    if isinstance(error, KeyboardInterrupt):  # its subclasses are SIGTERM
        return INTERRUPTED if type(error) is KeyboardInterrupt else PREEMPTED
    return error.exit_code if isinstance(error, MsnEvalError) else MsnEvalError.exit_code
