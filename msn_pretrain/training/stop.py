"""Stop: SIGTERM and Ctrl-C, heard at once and heeded between two steps."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

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
