"""Limits: how long ranks wait for each other."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Limits:
    """How long ranks wait for each other.

    join:   until all of them are there
    beat:   from one sign of life to the next
    silent: without a sign, after which a rank counts as dead; above the longest native call that keeps Python still
    settle: that ranks which meet the same fault may be apart
    linger: that a rank which takes the store with it leaves the others to read its last words
    unwind: that the main thread is given to come out of what it does, before its process is ended
    """

    join_seconds: float = 300.0
    beat_seconds: float = 1.0
    silent_seconds: float = 40.0
    settle_seconds: float = 1.0
    linger_seconds: float = 2.0
    unwind_seconds: float = 5.0

    @property
    def news_seconds(self) -> float:
        """Give the time from bad news to acting on it: the rank that failed speaks first, and SIGTERM reaches all."""
        return self.settle_seconds + self.linger_seconds + self.beat_seconds
