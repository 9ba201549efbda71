"""Failure detector: one rank's heartbeat, and how it notices that another rank failed, stopped or hangs.

A collective of torch waits for its timeout, even if another rank raised an error or was stopped. The ranks therefore write
heartbeats and errors into the TCPStore where they met. Keys, under a prefix of the job: `rank/N` (host and process),
`beat/N` (a counter, or LEFT), `failure` (the first error of any rank) and `stop` (the first rank that was told to stop).
"""

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

from msn_eval.distributed.rank_info import RankInfo, Timeouts
from msn_eval.errors import DistributedError, exit_code_of, printable

if TYPE_CHECKING:
    from torch.distributed import Store  # type: ignore[attr-defined]

KEPT = "Finished work is kept; run the same command again to continue."
LEFT = b"left"
_SHOWN_RANKS = 6
_TRANSPORT_ERRORS = ("gloo", "nccl", "connection closed by peer", "connection reset by peer", "timed out waiting")
# Neither torch, NCCL, submitit nor Slurm uses this signal. Systems other than Linux have no such choice.
_ABORT_SIGNAL = (signal.SIGRTMIN + 5) if sys.platform == "linux" else getattr(signal, "SIGUSR1", None)


class AbortRequested(KeyboardInterrupt):
    """Raised in the main thread when another rank failed."""


def failure_of_peer(message: str, exit_code: int, *, hint: str = "") -> DistributedError:
    """Return the error of a rank that ends because of another one, with the exit code of that rank."""
    error = DistributedError(message, hint=hint)
    error.exit_code, error.from_peer = exit_code, True
    return error


def name_ranks(ranks: Sequence[int]) -> str:
    """Return `rank 1` or `ranks 1, 2 and 7 more`."""
    shown = ", ".join(map(str, ranks[:_SHOWN_RANKS]))
    more = f" and {len(ranks) - _SHOWN_RANKS} more" if len(ranks) > _SHOWN_RANKS else ""
    return f"rank{'s' if len(ranks) > 1 else ''} {shown}{more}"


def is_transport_error(error: BaseException) -> bool:
    """Whether torch reports that the connection to another rank is lost."""
    return isinstance(error, RuntimeError | ValueError) and any(
        text in str(error).lower() for text in _TRANSPORT_ERRORS
    )


def _describe(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"


class FailureDetector:
    """Exchanges heartbeats with the other ranks and interrupts the main thread when one of them is lost.

    Two daemon threads run: one talks to the store, one judges. They are separate because a call to a store whose process is
    stopped does not return. A main thread that is blocked in a collective cannot be interrupted; its process is ended.

    Args:
        info: This rank.
        store: The main thread's connection to the store.
        connect: Opens another connection to the store; a connection serves one thread.
        peers: `host` and `process` of every rank, in rank order.
        timeouts: How long to wait.

    Attributes:
        verdict: Why this rank cannot continue; None while it can.
    """

    def __init__(
        self,
        info: RankInfo,
        store: "Store",
        connect: "Callable[[], Store]",
        *,
        peers: Sequence[dict[str, Any]],
        timeouts: Timeouts,
    ) -> None:
        self.verdict: DistributedError | None = None
        self._info, self._store, self._connect, self._peers, self._timeouts = info, store, connect, peers, timeouts
        self._others = [rank for rank in range(info.world) if rank != info.rank]
        self._beats: dict[int, bytes] = {}
        self._silence = dict.fromkeys(self._others, 0.0)
        self._news: DistributedError | None = None
        self._news_at: float | None = None
        self._first_failure: dict[str, Any] | None = None
        self._exchanges = 0
        self._store_lost = False
        self._leaving = False
        self._left = False
        self._lock = threading.Lock()  # held while `_leaving` changes or the main thread is interrupted
        self._beat_lock = threading.Lock()  # held while this rank's heartbeat is written, so that none follows LEFT
        self._closed = threading.Event()
        in_main_thread = threading.current_thread() is threading.main_thread()
        self._main = threading.main_thread().ident if in_main_thread and _ABORT_SIGNAL is not None else None
        self._previous_handler: Any = None

    def start(self) -> None:
        """Start the threads."""
        if self._main is not None and _ABORT_SIGNAL is not None:
            self._previous_handler = signal.signal(_ABORT_SIGNAL, _raise_abort)
        for target in (self._exchange_heartbeats, self._watch):
            threading.Thread(target=target, name=f"msn_eval {target.__name__}", daemon=True).start()

    def close(self) -> None:
        """Stop the threads."""
        self._closed.set()
        if self._main is not None and _ABORT_SIGNAL is not None:
            signal.signal(_ABORT_SIGNAL, self._previous_handler)

    def report_exit(self, error: BaseException | None) -> BaseException | None:
        """Tell the other ranks how this one ends.

        If several ranks fail, the first keeps its error and the others get one line.

        Args:
            error: What ended the rank; None if it finished.

        Returns:
            The error to raise, or None.
        """
        from torch.distributed import DistError

        with self._lock:
            self._leaving = True
        try:
            if error is None or (isinstance(error, SystemExit) and exit_code_of(error) == 0):
                self._mark_left(self._store)
                while self._info.holds_store and not self._all_left():
                    if self.verdict is not None:
                        return self._report_failure(self.verdict)
                    time.sleep(self._timeouts.beat_seconds / 10)
                return error
            return self._report_failure(self._explain(error))
        except (DistError, OSError):  # the store is gone
            return self.verdict or self._wait_for_verdict() or error
        except KeyboardInterrupt as interrupt:  # told to stop while reporting
            return error or interrupt

    def _explain(self, error: BaseException) -> BaseException:
        """Replace an error that only follows from the failure of another rank by that failure."""
        if isinstance(error, AbortRequested) or is_transport_error(error):
            text = printable(str(error).partition("\n")[0])[:300]
            verdict = self._wait_for_verdict()
            return verdict or DistributedError(
                f"rank {self._info.rank} lost the connection to another rank: {text}",
                hint="See the other ranks' errors.",
            )
        if isinstance(error, KeyboardInterrupt) and self._news is None:
            self._news = self._failure(self._store)  # a launcher stops the ranks that are left
        if (
            isinstance(error, KeyboardInterrupt)
            and self._news is not None
            and self._news.exit_code != exit_code_of(error)
        ):
            return self._news
        return error

    def _report_failure(self, error: BaseException) -> BaseException:
        from_peer = isinstance(error, DistributedError) and error.from_peer
        if self._news is not None:  # the others have read it too, and the store may be closed
            return error if from_peer or isinstance(error, KeyboardInterrupt) else self._shorten(error)
        own = {"rank": self._info.rank, "host": self._info.host}
        report = json.dumps(own | {"code": exit_code_of(error), "text": _describe(error)})
        if isinstance(error, KeyboardInterrupt):
            self._store.compare_set("stop", "", report)
        elif not from_peer:
            self._first_failure = json.loads(self._store.compare_set("failure", "", report))
            error = self._shorten(error)
        self._mark_left(self._store)
        deadline = time.monotonic() + self._timeouts.linger_seconds
        while self._info.holds_store and time.monotonic() < deadline and not self._all_left():
            time.sleep(self._timeouts.beat_seconds / 10)
        return error

    def _shorten(self, error: BaseException) -> BaseException:
        """Return one line for an error that comes after another rank's, which says more."""
        first, text = self._first_failure, _describe(error)
        if first is None or first["rank"] == self._info.rank:
            return error
        how = f"after rank {first['rank']}: {printable(text.partition(chr(10))[0])}"
        if first["text"] == text:
            how = f"as rank {first['rank']} did"
        return failure_of_peer(f"rank {self._info.rank} on {self._info.host} failed {how}", exit_code_of(error))

    def _wait_for_verdict(self) -> DistributedError | None:
        started, patience = time.monotonic(), 2 * self._timeouts.reaction_seconds
        while self.verdict is None:
            someone_left = any(beat == LEFT for beat in self._beats.values())
            if time.monotonic() - started > patience + (0 if someone_left else self._timeouts.silent_seconds):
                break
            time.sleep(self._timeouts.beat_seconds / 4)
        return self.verdict

    def _all_left(self) -> bool:
        return all(self._beats.get(rank) == LEFT for rank in self._others)

    def _mark_left(self, store: "Store") -> None:
        with self._beat_lock:
            if not self._left:
                self._left = True
                store.set(f"beat/{self._info.rank}", LEFT.decode())

    def _exchange_heartbeats(self) -> None:
        from torch.distributed import DistError

        try:
            store = self._connect()
            last = time.monotonic()
            while not self._closed.is_set():
                with self._beat_lock:
                    if not self._left:
                        store.set(f"beat/{self._info.rank}", str(self._exchanges))
                beats = store.multi_get([f"beat/{rank}" for rank in self._others])
                self._news = self._failure(store) or self._stop(store)
                now = time.monotonic()
                # A rank that was itself stopped has received no heartbeats meanwhile.
                elapsed = min(now - last, 2 * self._timeouts.beat_seconds)
                last = now
                for rank, beat in zip(self._others, beats, strict=True):
                    self._silence[rank] = self._silence[rank] + elapsed if beat == self._beats.get(rank) else 0.0
                    self._beats[rank] = beat
                self._exchanges += 1
                if self._news is not None:  # nothing else matters, and the failed rank may close the store
                    self._mark_left(store)
                    return
                self._closed.wait(self._timeouts.beat_seconds)
        except (DistError, OSError):
            self._store_lost = True

    def _failure(self, store: "Store") -> DistributedError | None:
        if not store.check(["failure"]):
            return None
        self._first_failure = failure = json.loads(store.get("failure"))
        if failure["rank"] == self._info.rank:
            return None
        line = printable(failure["text"].partition("\n")[0])
        return failure_of_peer(f"rank {failure['rank']} on {failure['host']}: {line}", failure["code"])

    def _stop(self, store: "Store") -> DistributedError | None:
        if not store.check(["stop"]):
            return None
        stop = json.loads(store.get("stop"))
        if stop["rank"] == self._info.rank:
            return None
        return failure_of_peer(f"rank {stop['rank']} on {stop['host']} was told to stop. {KEPT}", stop["code"])

    def _watch(self) -> None:
        """Wait for a reason to give up, interrupt the main thread, and end the process if that does not help."""
        tick = self._timeouts.beat_seconds / 2
        previous, exchanges, unanswered = time.monotonic(), -1, 0.0
        while self.verdict is None:
            if self._closed.wait(tick):
                return
            now = time.monotonic()
            unanswered = 0.0 if self._exchanges != exchanges else unanswered + min(now - previous, 2 * tick)
            previous, exchanges = now, self._exchanges
            self.verdict = self._judge(now, unanswered)
        with self._lock:
            if not self._leaving and self._main is not None and _ABORT_SIGNAL is not None:
                signal.pthread_kill(self._main, _ABORT_SIGNAL)
        self._closed.wait(self._timeouts.unwind_seconds)
        if self._leaving:
            self._closed.wait(self._timeouts.linger_seconds + self._timeouts.unwind_seconds)
        if not self._closed.is_set():
            os.write(2, f"DistributedError: {self.verdict}\n".encode())
            os._exit(self.verdict.exit_code)

    def _judge(self, now: float, unanswered: float) -> DistributedError | None:
        if self._news is not None or self._store_lost:
            self._news_at = now if self._news_at is None else self._news_at
            if now - self._news_at < self._timeouts.reaction_seconds:
                return None
            return self._news or DistributedError(f"{self._describe_store()} is gone", hint=KEPT)
        limit = self._timeouts.silent_seconds
        if unanswered >= limit:
            if not self._info.launcher_holds_store:
                self._wake(0)
            return DistributedError(f"{self._describe_store()} gave no heartbeat for {limit:g} s", hint=KEPT)
        silent = [rank for rank in self._others if self._silence[rank] >= limit and self._beats[rank] != LEFT]
        if not silent:
            return None
        for rank in silent:
            self._wake(rank)
        hosts = ", ".join(dict.fromkeys(str(self._peers[rank]["host"]) for rank in silent[:_SHOWN_RANKS]))
        return DistributedError(f"{name_ranks(silent)} ({hosts}) gave no heartbeat for {limit:g} s", hint=KEPT)

    def _wake(self, rank: int) -> None:
        """Continue a stopped rank of this host, so that it notices that the job has ended."""
        if self._peers[rank]["host"] == self._info.host and hasattr(signal, "SIGCONT"):
            with suppress(OSError):
                os.kill(self._peers[rank]["process"], signal.SIGCONT)

    def _describe_store(self) -> str:
        if self._info.launcher_holds_store:
            return f"the launcher's store at {self._info.endpoint}"
        return f"rank 0 ({self._peers[0]['host']}), which holds the store at {self._info.endpoint},"


def _raise_abort(number: int, frame: FrameType | None) -> NoReturn:
    raise AbortRequested
