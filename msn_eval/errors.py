"""Errors that users can meet, and the exit code of each.

    MsnEvalError              1   a bug of ours, if it reaches the user as itself
    ├── UsageError            2   option, config key, subset or probe name
    ├── CheckpointError      20   weights missing or refused
    ├── DataError            21   data folder, class, image or list
    ├── StoreError           22   results, cache, disk
    │   └── DamagedRecordError  22  a record or its predictions are not as they were written
    ├── NumericalError       23   NaN features, k above n, a single class
    ├── ResourceError        30   memory, workers
    ├── DistributedError     31   ranks that died, hang, or do not agree
    └── ComparisonError      12   no baseline, or results that must not be compared

In addition `check` ends with 10 for a regression and with 11 where the evidence is insufficient, and any command with 75
when it was asked to stop (SIGTERM) and with 130 when it was interrupted.
"""

import contextlib
import difflib
import heapq
import os
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

PREEMPTED, INTERRUPTED = 75, 130  # exit codes after SIGTERM, where the same command continues, and after Ctrl-C

_LEAST_SIMILAR = 0.6  # of a suggestion, from 0 to 1
_MOST_SUGGESTED = 3
_MOST_COMPARED = 500  # names, in full; of more, those that share the longest start and end with the mistake
_LONGEST_LINE = 2000  # characters of an error, whose text may come from a file
# C0 and C1 controls (including ANSI escapes), direction marks, line breaks and characters without a width.
_UNPRINTABLE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u00ad\u061c\u180e\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\U000e0000-\U000e007f]"
)


def printable(text: str) -> str:
    """Return `text` with control characters, direction marks and undecodable bytes as escape sequences."""
    shown = _UNPRINTABLE.sub(lambda match: f"\\x{ord(match.group()):02x}", text)
    return shown.encode("utf-8", "backslashreplace").decode("utf-8")


def one_line(text: str) -> str:
    """Return `printable` text with each run of white space as one space, for one line or table cell."""
    return printable(" ".join(text.split()))


def list_first(texts: Sequence[str], most: int, separator: str = ", ") -> str:
    """Return the first `most` texts, and the number of those that are left out, such as `a, b and 2 more`."""
    more = f"{separator.replace(',', '')}and {len(texts) - most:,} more" if len(texts) > most else ""
    return separator.join(texts[:most]) + more


def format_count(number: int, noun: str, plural: str = "") -> str:
    """Return a number and what it counts, such as `1 image` or `2,000 images`."""
    return f"{number:,} {noun if number == 1 else plural or f'{noun}s'}"


def format_duration(seconds: float) -> str:
    """Return a duration as `45 s`, `12 min` or `5 h`."""
    minutes, hours = round(seconds / 60), round(seconds / 3600)
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{minutes} min" if minutes < 100 else f"{hours} h"


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return ` Did you mean X?` for the known name that is closest to `name`, or an empty string.

    Names that are equally close are all suggested: ` Did you mean X or Y?`.
    """
    return _join_suggestions(_find_closest(name, known))


def suggest_paths(path: str) -> str:
    """Return ` Did you mean X?` for the closest paths that exist, where `path` does not, or an empty string."""
    return _join_suggestions(list(map(str, _find_closest_paths(Path(path)))))


def _find_closest_paths(path: Path) -> list[Path]:
    if path == path.parent:
        return []
    try:
        if not path.parent.is_dir():  # a mistake before the last name
            corrected = [folder / path.name for folder in _find_closest_paths(path.parent)]
            return [other for other in corrected if other.exists()]
        return [
            path.parent / name
            for name in _find_closest(path.name, sorted(entry.name for entry in path.parent.iterdir()))
        ]
    except (OSError, ValueError):  # not readable, or no name of a file
        return []


def _find_closest(name: str, known: Iterable[str]) -> list[str]:
    matcher = difflib.SequenceMatcher()
    matcher.set_seq2(name.removeprefix("--"))  # which all options share
    scores = {}
    names = list(known)
    if len(names) > _MOST_COMPARED:
        names = heapq.nlargest(_MOST_COMPARED, names, key=lambda other: _count_shared_ends(name, other))
    for other in names:
        matcher.set_seq1(other.removeprefix("--"))
        if matcher.real_quick_ratio() >= _LEAST_SIMILAR:
            scores[other] = matcher.ratio()
    best = max(scores.values(), default=0.0)
    return [other for other, score in scores.items() if score == best >= _LEAST_SIMILAR][:_MOST_SUGGESTED]


def _count_shared_ends(name: str, other: str) -> int:
    """Return how many characters two names share at their starts and at their ends."""
    both_ways = ((name, other), (name[::-1], other[::-1]))
    return sum(len(os.path.commonprefix(pair)) for pair in both_ways)  # noqa: RUF071 - of characters, not of paths


def _join_suggestions(names: list[str]) -> str:
    *others, last = names or [""]
    return f" Did you mean {', '.join(others)}{' or ' if others else ''}{last}?" if last else ""


class MsnEvalError(Exception):
    """Base class of all errors.

    Attributes:
        exit_code: Of the command that ends with the error.
        what: What was wrong.
        where: The file, option or name at fault.
        hint: What to do.
        kept: Which finished work remains.
    """

    exit_code = 1

    def __init__(self, what: str, *, where: str = "", hint: str = "", kept: str = "") -> None:
        super().__init__(what)
        self.what, self.where, self.hint, self.kept = what, where, hint, kept

    def __str__(self) -> str:
        where = "{}: ".format(self.where[: _LONGEST_LINE // 2].replace("\n", "\\n")) if self.where else ""
        lines = "\n".join(text for text in (f"{where}{self.what}", self.hint, self.kept) if text).split("\n")
        return printable(
            "\n".join(line if len(line) <= _LONGEST_LINE else f"{line[:_LONGEST_LINE]}…" for line in lines)
        )


class UsageError(MsnEvalError):
    """An option, a config key or a name that does not exist or is out of range."""

    exit_code = 2


class ComparisonError(MsnEvalError):
    """A baseline that is missing or unreadable, or results that must not be compared."""

    exit_code = 12


class CheckpointError(MsnEvalError):
    """Weights that are missing, unreadable, or do not fit the network completely."""

    exit_code = 20


class DataError(MsnEvalError):
    """A data folder, class, image or list that is missing or unusable."""

    exit_code = 21


class StoreError(MsnEvalError):
    """Results or cached files that cannot be read or written."""

    exit_code = 22


class DamagedRecordError(StoreError):
    """A record whose content, seal or predictions are not as they were written. Its numbers must not be used."""


class NumericalError(MsnEvalError):
    """Numbers from which no accuracy must be computed."""

    exit_code = 23


class ResourceError(MsnEvalError):
    """Memory, worker processes or devices that are exhausted or failed."""

    exit_code = 30


class DistributedError(MsnEvalError):
    """Ranks of one job that died, hang, or do not agree on what they compute.

    Attributes:
        from_peer: Whether another rank reports this failure with its own error.
    """

    exit_code = 31
    from_peer = False


@contextlib.contextmanager
def named_as_arguments(names: Collection[str], renamed: Mapping[str, str] | None = None) -> Iterator[None]:
    """Let errors of the block name the arguments of a Python function where they name command-line options.

    Args:
        names: The arguments; `image_pixels` replaces `--image-pixels`.
        renamed: The arguments with a name of their own, by option: `{"probe": "probes"}`.
    """
    arguments = {name.replace("_", "-"): name for name in names} | dict(renamed or {})

    def translate(text: str) -> str:
        return re.sub(r"(?<![\w/-])--([a-z][a-z-]*)", lambda match: arguments.get(match[1], match[0]), text)

    try:
        yield
    except MsnEvalError as error:
        error.what, error.where, error.hint = map(translate, (error.what, error.where, error.hint))
        raise


@contextlib.contextmanager
def name_place(where: str) -> Iterator[None]:
    """Let errors of the block name `where` as the place at fault."""
    try:
        yield
    except MsnEvalError as error:
        error.where = where
        raise


def exit_code_of(error: BaseException) -> int:
    """Return the code that a command exits with after `error`."""
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    if isinstance(error, KeyboardInterrupt):  # its subclasses are SIGTERM
        return INTERRUPTED if type(error) is KeyboardInterrupt else PREEMPTED
    return error.exit_code if isinstance(error, MsnEvalError) else MsnEvalError.exit_code
