"""Watchdog: ends a process that makes no progress, with the stacks of its threads."""

import faulthandler
import os
import signal
import statistics
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType

from msn_eval.errors import DistributedError

_LEAST_SECONDS = 300.0
_FACTOR = 10.0
_REMEMBERED = 64


@dataclass(kw_only=True)
class Watchdog:
    """Knows when the last step was done, and how long steps take.

    least_seconds: without a step, that are always waited
    """

    least_seconds: float = _LEAST_SECONDS
    _last: float = field(default_factory=time.monotonic)
    _steps: "deque[float]" = field(default_factory=lambda: deque(maxlen=_REMEMBERED))
    _paused: bool = False

    def step_done(self) -> None:
        """Note a step."""
        now = time.monotonic()
        self._steps.append(now - self._last)
        self._last = now

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Watch nothing while something is done that is no step: a snapshot, an evaluation."""
        self._paused = True
        try:
            yield
        finally:
            self._last, self._paused = time.monotonic(), False

    def overdue_seconds(self) -> float:
        """Give for how long a step has been overdue; not above 0 where none is."""
        limit = max(self.least_seconds, _FACTOR * statistics.median(self._steps) if self._steps else 0.0)
        return -limit if self._paused else time.monotonic() - self._last - limit


@contextmanager
def watching(*, least_seconds: float = _LEAST_SECONDS, look_seconds: float = 1.0) -> Iterator[Watchdog]:
    """Give a watchdog that ends this process with exit code 31 when no step is done in max(10 medians, 5 minutes)."""
    dog, over = Watchdog(least_seconds=least_seconds), threading.Event()

    def look() -> None:
        while not over.wait(look_seconds):
            if dog.overdue_seconds() > 0:
                print(
                    "DistributedError: no step was finished for too long; the stacks of all threads:", file=sys.stderr
                )
                faulthandler.dump_traceback(sys.stderr)
                print("The last snapshot is kept; the same command goes on from it.", file=sys.stderr, flush=True)
                os._exit(DistributedError.exit_code)

    thread = threading.Thread(target=look, daemon=True, name="watchdog")
    thread.start()
    try:
        yield dog
    finally:
        over.set()
        thread.join()


PREEMPTED, INTERRUPTED = 75, 130


@dataclass(kw_only=True)
class Stop:
    """Whether this process was asked to stop, and what it then ends with."""

    exit_code: int = 0

    @property
    def asked(self) -> bool:
        return self.exit_code != 0


@contextmanager
def stop_heard() -> Iterator[Stop]:
    """Give what SIGTERM and Ctrl-C set; a second Ctrl-C interrupts at once."""
    stop = Stop()

    def hear(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and stop.exit_code == INTERRUPTED:
            raise KeyboardInterrupt
        stop.exit_code = INTERRUPTED if number == signal.SIGINT else PREEMPTED

    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {number: signal.signal(number, hear) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
