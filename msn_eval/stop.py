"""Stop: SIGTERM and Ctrl-C, heard at once and heeded between two steps."""

import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType


@dataclass(kw_only=True)
class Stop:
    """The signal by which this process was asked to stop, None until then."""

    number: int | None = None


@contextmanager
def stop_heard() -> Iterator[Stop]:
    """Give what SIGTERM and Ctrl-C set inside; a second one acts at once. Outside of the main thread nothing is heard.

    The body that heeds a stop ends, and the signal is then raised again for whoever listened before.
    """
    stop = Stop()
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
