"""Watch: the thread of a rank that judges by what the clerk heard, on its own host's clock, and calls the main thread back."""

import os
import signal
import sys
import threading
import time

from msn_eval.distributed.end import Verdict
from msn_eval.distributed.limits import Limits
from msn_eval.distributed.peers import Others
from msn_eval.errors import DistributedError

# A signal that neither torch, NCCL, submitit nor Slurm uses; other systems than Linux leave no such choice.
SUMMONS = signal.SIGRTMIN + 5 if sys.platform == "linux" else signal.SIGUSR1


class Watch:
    """Looks for a reason to give up.

    verdict:   the reason, once there is one
    leaving:   this rank does so already, and is not called back; changed with `summoning` held
    """

    def __init__(self, others: Others, limits: Limits, *, closed: threading.Event, main: int | None) -> None:
        self.verdict: Verdict | None = None
        self.leaving = False
        self.summoning = threading.Lock()
        self._others, self._limits, self._closed, self._main = others, limits, closed, main
        self._bad_news_at: float | None = None

    def look(self) -> None:
        """Look for a reason to give up, and call the main thread back when there is one."""
        tick = self._limits.beat_seconds / 2
        before, turns, unanswered = time.monotonic(), -1, 0.0
        while self.verdict is None:
            if self._closed.wait(tick):
                return
            now = time.monotonic()
            unanswered = 0.0 if self._others.turns != turns else unanswered + min(now - before, 2 * tick)
            before, turns = now, self._others.turns
            self.verdict = self._judge(now, unanswered)
        with self.summoning:
            if self.leaving:
                return
            if self._main is not None:
                signal.pthread_kill(self._main, SUMMONS)
        until = time.monotonic() + self._limits.unwind_seconds
        while time.monotonic() < until:
            if self._closed.wait(tick) or self.leaving:
                return
        os.write(2, f"DistributedError: {self.verdict.what}\n".encode())
        os._exit(self.verdict.code)

    def _judge(self, now: float, unanswered: float) -> Verdict | None:
        news = self._others.news()
        if news is not None or self._others.cut:
            self._bad_news_at = now if self._bad_news_at is None else self._bad_news_at
            if now - self._bad_news_at < self._limits.news_seconds:
                return None
            return news or Verdict(what=f"{self._others.holder()} is gone", code=DistributedError.exit_code)
        if unanswered >= self._limits.silent_seconds:
            if not self._others.place.launcher_holds_store:
                self._others.wake(0)
            return Verdict(
                what=f"{self._others.holder()} gave no sign for {self._limits.silent_seconds:g} s",
                code=DistributedError.exit_code,
            )
        silent = [
            rank
            for rank in self._others.ranks
            if self._others.silence[rank] >= self._limits.silent_seconds and rank not in self._others.ends
        ]
        if not silent:
            return None
        for rank in silent:
            self._others.wake(rank)
        return Verdict(
            what=f"{self._others.names(silent)} gave no sign for {self._limits.silent_seconds:g} s",
            code=DistributedError.exit_code,
        )
