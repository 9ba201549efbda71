"""Host: the memory and the cores that this process may use, by the machine's count and by its container's."""

import os
import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

_MACHINE = Path("/proc/meminfo")
_CONTAINER = Path("/sys/fs/cgroup")


def available_bytes(*, machine: Path = _MACHINE, container: Path = _CONTAINER) -> int | None:
    """Give the bytes that can be taken before the system runs out or ends this process; None where nothing tells.

    machine, container: the kernel's files, that of the machine and the folder of the control group (version 2)
    """
    found = [free for free in (_of_machine(machine), _of_container(container)) if free is not None]
    return min(found, default=None)


def usable_cores() -> int:
    """Give the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _of_machine(file: Path) -> int | None:
    try:
        for line in file.read_text().splitlines():
            name, _, value = line.partition(":")
            if name == "MemAvailable":
                return int(value.split()[0]) * 1024
    except (OSError, ValueError, IndexError):
        return None
    return None


def _of_container(folder: Path) -> int | None:
    try:
        limit = (folder / "memory.max").read_text().strip()
        if limit == "max":
            return None
        used = int((folder / "memory.current").read_text())
        # Pages of files that were read count as used, and are given back where memory is asked for.
        cached = next(
            int(line.split()[1])
            for line in (folder / "memory.stat").read_text().splitlines()
            if line.startswith("inactive_file ")
        )
        return max(0, int(limit) - used + cached)
    except (OSError, ValueError, IndexError, StopIteration):
        return None


@dataclass(kw_only=True)
class StopRequest:
    """The signal by which this process was asked to stop, None until then."""

    number: int | None = None


@contextmanager
def watch_stop_signals() -> Iterator[StopRequest]:
    """Give what SIGTERM and Ctrl-C set inside; a second one acts at once. Outside of the main thread nothing is heard.

    The body that heeds a stop ends, and the signal is then raised again for whoever listened before.
    """
    stop = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def hear(number: int, frame: FrameType | None) -> None:
        if stop.number is not None:
            _restore(before)
            signal.raise_signal(number)
        stop.number = number

    for number, handler in before.items():
        if handler is not None:  # one that was not set from Python could not be put back
            signal.signal(number, hear)
    try:
        yield stop
    finally:
        _restore(before)
    if stop.number is not None:
        signal.raise_signal(stop.number)


def _restore(before: Mapping[signal.Signals, object]) -> None:
    for number, handler in before.items():
        if handler is not None:
            signal.signal(number, handler)  # type: ignore[arg-type]
