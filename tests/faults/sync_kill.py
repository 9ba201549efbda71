"""Forked runs that record their syncs and may send themselves a signal in one, so that even a fast write path is hit."""

import os
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class SyncKill:
    """A signal in the `count`-th fsync of a file whose name contains `name`: written, but not yet renamed."""

    name: str
    count: int
    number: signal.Signals = signal.SIGKILL

    def __str__(self) -> str:
        return f"{self.number.name} in sync {self.count} of a {self.name}"


def fork_run(here: Path, run: Callable[[], int], kill: SyncKill | None) -> int:
    """Run in a forked process, which sends itself the signal of `kill`, and return its process id.

    Output and syncs are appended to files in `here`.
    """
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        output = os.open(here / "stderr", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        _record_syncs(here / "syncs")
        if kill is not None:
            _signal_in_sync(kill)
        code = run()
    finally:
        os._exit(code)


def _signal_in_sync(kill: SyncKill) -> None:
    sync, seen = os.fsync, 0

    def signal_in_fsync(number: int) -> None:
        nonlocal seen
        matches = kill.name in _name(number)
        seen += matches
        if matches and seen == kill.count:
            os.kill(os.getpid(), kill.number)
        sync(number)

    os.fsync = signal_in_fsync


def _record_syncs(file: Path) -> None:
    """Append the name of every file that this process syncs to `file`."""
    sync = os.fsync

    def record(number: int) -> None:
        with file.open("a") as notes:
            notes.write(f"{_name(number)}\n")
        sync(number)

    os.fsync = record


def read_counts(file: Path, names: Sequence[str]) -> dict[str, int]:
    """Return, for each of `names`, how many recorded syncs are of a file whose name contains it."""
    lines = file.read_text().splitlines()
    return {name: sum(name in line for line in lines) for name in names}


def _name(number: int) -> str:
    return Path(f"/proc/self/fd/{number}").readlink().name
