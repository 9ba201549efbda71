"""Host: the memory and the cores that this process may use, by the machine's count and by its container's."""

import os
from pathlib import Path

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
