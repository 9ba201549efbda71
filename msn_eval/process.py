"""Process: the memory, cores and loader processes that it may use, and the signals that ask it to stop."""

import ctypes
import errno
import logging
import os
import re
import signal
import sys
import threading
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from msn_eval.errors import INTERRUPTED, PREEMPTED, format_count

_log = logging.getLogger(__name__)
_MACHINE = Path("/proc/meminfo")
_CONTAINER = Path("/sys/fs/cgroup")
_SHARED_MEMORY = "/dev/shm"
_LOCK_BYTES = 2**16  # of one worker's queues: a page per semaphore
# Spinning for milliseconds, OpenMP's threads take the cores from each other and from other processes. This is about 50 us.
_SPINS = "10000"
_SPIN_VARIABLES = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "KMP_BLOCKTIME")
_PR_SET_PDEATHSIG = 1  # of linux/prctl.h
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of malloc.h


def available_bytes(*, machine: Path = _MACHINE, container: Path = _CONTAINER) -> int | None:
    """Return the bytes that can be allocated before the system runs out or ends this process; None if unknown.

    Args:
        machine: The kernel's file of the machine's memory.
        container: The folder of the control group (version 2).
    """
    known = [free for free in (_machine_bytes(machine), _container_bytes(container)) if free is not None]
    return min(known, default=None)


# cuBLAS, cuSOLVER and cuDNN raise a plain RuntimeError; the driver AcceleratorError; NCCL DistBackendError.
_GPU_OUT_OF_MEMORY = re.compile(r"\bout of memory\b|_ALLOC(ATION)?_FAILED\b")


def describe_exhausted_resource(error: BaseException) -> tuple[str, str] | None:
    """Return the resource that ran out, and what helps. None where the error means something else."""
    text = str(error)
    number = error.errno if isinstance(error, OSError) else None
    if (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or number == errno.ENOMEM
        or (isinstance(error, RuntimeError) and _GPU_OUT_OF_MEMORY.search(text))
        or any(part in text for part in ("can't allocate memory", "annot allocate memory", "failed to map segment"))
    ):
        return "memory", "Free memory, raise the limit (ulimit -v), or pass a smaller --batch-size and fewer --workers."
    if number in (errno.EMFILE, errno.ENFILE):
        return "open files", "Raise the limit (ulimit -n), or pass fewer --workers."
    if number == errno.EAGAIN or "can't start new thread" in text:
        return "processes or threads", "Raise the limit (ulimit -u), or pass fewer --workers."
    return None


def usable_cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cores_per_rank() -> int:
    """Return the number of cores for this process, if its machine runs several ranks that may use the same ones."""
    return max(1, usable_cores() // _local_ranks())


def _local_ranks() -> int:
    ranks = os.environ.get("LOCAL_WORLD_SIZE", "")  # set by torchrun and our own launcher
    return max(1, int(ranks)) if ranks.isdecimal() else 1


def affordable_workers(wanted: int, *, batch_bytes: int) -> int:
    """Return how many of `wanted` loader processes fit into shared memory, through which they send their batches.

    A process that finds no room ends without a word, or its batch never arrives. Each keeps two batches ready while it makes
    another. The ranks of this machine share the memory.
    """
    try:
        status = os.statvfs(_SHARED_MEMORY)
    except OSError:  # a system without it shares memory in another way
        return wanted
    free = 0 if status.f_flag & os.ST_RDONLY else status.f_bavail * status.f_frsize
    needed = _local_ranks() * (_LOCK_BYTES + 3 * batch_bytes)
    affordable = min(wanted, free // needed)
    if affordable < wanted:
        text = "%s has room for %s instead of %d: %s of %s bytes are free for each"
        processes = format_count(affordable, "loader process", "loader processes")
        _log.warning(text, _SHARED_MEMORY, processes, wanted, f"{free // wanted:,}", f"{needed:,}")
    return affordable


def limit_spinning(environment: MutableMapping[str, str] = os.environ) -> None:
    """Let idle OpenMP threads sleep early. It must be called before torch is imported; the user's own settings win.

    It changes no number.
    """
    if not any(name in environment for name in _SPIN_VARIABLES):
        environment["GOMP_SPINCOUNT"] = _SPINS


def _machine_bytes(file: Path) -> int | None:
    try:
        line = next(line for line in file.read_text().splitlines() if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):  # not Linux
        return None
    return int(line.split()[1]) * 1024


def _container_bytes(folder: Path) -> int | None:
    try:
        limit = (folder / "memory.max").read_text().strip()
        if limit == "max":
            return None
        used = int((folder / "memory.current").read_text())
        statistics = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except OSError:  # no control group
        return None
    # Cached pages of files count as used; the kernel frees them when memory is allocated.
    return max(0, int(limit) - used + int(statistics["inactive_file"]))


def terminate_with_parent() -> None:
    """Have Linux send this process SIGTERM when its parent ends, also when the parent is killed."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def keep_freed_memory() -> None:
    """Let this process keep the memory that it frees, so that a loop which allocates the same again needs no new pages.

    By default glibc returns large blocks to the system. Every step of a training then waits while the kernel clears their pages.
    """
    set_option = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if set_option is not None:  # else another C library, which has rules of its own
        set_option(_M_MMAP_THRESHOLD, 2**30)
        set_option(_M_TRIM_THRESHOLD, 2**31 - 1)


def record_for_torchrun(error: BaseException) -> None:
    """Write an error to the file that torchrun prints as the root cause, if torchrun started this process."""
    if "TORCHELASTIC_ERROR_FILE" not in os.environ:
        return
    from torch.distributed.elastic.multiprocessing.errors import get_error_handler

    try:
        raise error from None
    except type(error):
        error.__traceback__ = None  # torchrun prints it before the message
        with suppress(OSError):
            get_error_handler().record_exception(error)


class Terminated(KeyboardInterrupt):
    """Raised in the main thread by SIGTERM."""


@dataclass(kw_only=True)
class StopRequest:
    """Whether SIGTERM or Ctrl-C asked this process to stop.

    Attributes:
        number: The signal; None until it arrives.
    """

    number: int | None = None

    @property
    def requested(self) -> bool:
        return self.number is not None

    def accept(self) -> int:
        """Return the exit code, 0 without a request, and do not raise the signal again at the end of the block."""
        number, self.number = self.number, None
        return 0 if number is None else INTERRUPTED if number == signal.SIGINT else PREEMPTED


@contextmanager
def watch_stop_signals() -> Iterator[StopRequest]:
    """Record SIGTERM and Ctrl-C instead of stopping at once, so that the body can save its work first.

    After the body the signal is raised again, unless the body accepted it. A second Ctrl-C interrupts at once. A second SIGTERM
    is ignored, because launchers send it twice. Outside of the main thread no signal is recorded.
    """
    stop = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def record(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and stop.number == signal.SIGINT:
            raise KeyboardInterrupt
        stop.number = number

    handlers = {number: signal.signal(number, record) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    if stop.number is not None:
        signal.raise_signal(stop.number)
