"""Sync kill: a process that kills itself while it has a file synced, so that the write path is hit however fast it is."""

import os
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class SyncKill:
    """Death in the `count`-th sync of a file whose name holds `name`: its content is written, and it is not yet renamed."""

    name: str
    count: int

    def __str__(self) -> str:
        return f"in sync {self.count} of a {self.name}"


def die_in_sync(kill: SyncKill) -> None:
    """Have this process die so."""
    sync, seen = os.fsync, 0

    def deadly(number: int) -> None:
        nonlocal seen
        seen += kill.name in _name(number)
        if seen == kill.count:
            os.kill(os.getpid(), signal.SIGKILL)
        sync(number)

    os.fsync = deadly


def note_syncs(file: Path) -> None:
    """Have the name of every file that this process syncs noted, a line each."""
    sync = os.fsync

    def noted(number: int) -> None:
        with file.open("a") as notes:
            notes.write(f"{_name(number)}\n")
        sync(number)

    os.fsync = noted


def read_counts(file: Path, names: Sequence[str]) -> dict[str, int]:
    """Give, for each of `names`, how many of the syncs that were noted were of a file whose name holds it."""
    lines = file.read_text().splitlines()
    return {name: sum(name in line for line in lines) for name in names}


def _name(number: int) -> str:
    return Path(f"/proc/self/fd/{number}").readlink().name
