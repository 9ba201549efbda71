"""Failure detector: one rank's heartbeat, and how it notices that another rank failed, stopped or hangs.

A collective of torch waits for its timeout, even if another rank raised an error or was stopped. The ranks therefore write
heartbeats and the first error into the TCPStore where they met. Keys, under a prefix of the job: `rank/N` (host and process),
`beat/N` (a counter, or LEFT), `error/N`, and `end` (the rank that failed or was stopped first).
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
from typing import Any, NoReturn

from torch.distributed import DistError, Store  # type: ignore[attr-defined]

from msn_eval.distributed.rank_info import RankInfo, Timeouts
from msn_eval.errors import DistributedError, exit_code_of
from msn_eval.process import record_for_torchrun

KEPT = "Finished work is kept; run the same command again to continue."
LEFT = b"left"
_SHOWN_RANKS = 6
# Phrases in the errors of torch after the connection to another rank is lost.
_TRANSPORT_ERRORS = ("gloo", "nccl", "connection closed by peer", "connection reset by peer", "timed out waiting")
# Neither torch, NCCL, submitit nor Slurm uses this signal. Systems other than Linux have no such choice.
_ABORT_SIGNAL = (signal.SIGRTMIN + 5) if sys.platform == "linux" else getattr(signal, "SIGUSR1", None)


class AbortRequested(KeyboardInterrupt):
    """Raised in the main thread when another rank failed."""


def failure_of_peer(message: str, exit_code: int) -> DistributedError:
    """Return the error of a rank that ends because of another, with the exit code of that rank."""
    error = DistributedError(message)
    error.exit_code, error.from_peer = exit_code, True
    return error


def name_ranks(ranks: Sequence[int]) -> str:
    """Return `rank 1` or `ranks 1, 2 and 7 more`."""
    shown = ", ".join(map(str, ranks[:_SHOWN_RANKS]))
    more = f" and {len(ranks) - _SHOWN_RANKS} more" if len(ranks) > _SHOWN_RANKS else ""
    return f"rank{'s' if len(ranks) > 1 else ''} {shown}{more}"


class FailureDetector:
    """Exchanges heartbeats with the other ranks and interrupts the main thread when one of them is lost.

    Two daemon threads run: one talks to the store, one judges. They are separate because a call to a store whose process is
    stopped does not return. A main thread that is blocked in a collective cannot be interrupted; its process is ended.

    Args:
        info: This rank.
        store: The main thread's connection to the store.
        connect: Opens another connection to the store; a connection serves one thread.
        peers: `host` and `holds_store` of every rank, in rank order.
        timeouts: How long to wait.

    Attributes:
        verdict: Why this rank cannot continue; None while it can.
    """

    def __init__(
        self,
        info: RankInfo,
        store: Store,
        connect: Callable[[], Store],
        *,
        peers: Sequence[dict[str, Any]],
        timeouts: Timeouts,
    ) -> None:
        self.verdict: DistributedError | None = None
        self._info, self._store, self._connect, self._peers, self._timeouts = info, store, connect, peers, timeouts
        self._others = [rank for rank in range(info.world) if rank != info.rank]
        self._beats: dict[int, bytes] = {}
        self._silence = dict.fromkeys(self._others, 0.0)
        self._end: dict[str, Any] | None = None  # of the rank that failed or was stopped first
        self._noticed_at: float | None = None  # when `_end` or the loss of the store was noticed
        self._exchanges, self._store_lost, self._leaving, self._left = 0, False, False, False
        self._lock = threading.Lock()  # held while `_leaving` changes or the main thread is interrupted
        self._beat_lock = threading.Lock()  # held while this rank's heartbeat is written, so that none follows LEFT
        self._closed = threading.Event()
        self._signal = _ABORT_SIGNAL if threading.current_thread() is threading.main_thread() else None
        self._previous_handler: Any = None

    def start(self) -> None:
        """Start the threads."""
        if self._signal is not None:
            self._previous_handler = signal.signal(self._signal, _raise_abort)
        for target in (self._exchange_heartbeats, self._watch):
            threading.Thread(target=target, name=f"msn_eval {target.__name__}", daemon=True).start()

    def close(self) -> None:
        """Stop the threads."""
        self._closed.set()
        if self._signal is not None:
            signal.signal(self._signal, self._previous_handler)

    def report_exit(self, error: BaseException | None) -> BaseException | None:
        """Report how this rank ends to the others, and return the error to raise.

        If several ranks fail, one keeps its error and the others get one line. The rank that holds the store waits for
        the others, but not for long after an error.
        """
        with self._lock:
            self._leaving = True
        try:
            deadline = float("inf")
            if error is not None:
                deadline = time.monotonic() + self._timeouts.linger_seconds
                error = self._report_error(error)
            if not self._other_ended():  # else all know that the job ends, and the store may be closed
                with self._beat_lock:
                    self._left = True
                    self._store.set(f"beat/{self._info.rank}", LEFT.decode())
            while self._info.holds_store and not self._all_left() and time.monotonic() < deadline:
                if deadline == float("inf") and self.verdict is not None:
                    return self._report_error(self.verdict)
                time.sleep(self._timeouts.beat_seconds / 10)
        except (DistError, OSError):  # the store is gone
            return self._wait_for_verdict() or error
        except KeyboardInterrupt as interrupt:  # stopped while reporting
            return error or interrupt
        return error

    def _report_error(self, error: BaseException) -> BaseException:
        rank, host = self._info.rank, self._info.host
        is_transport_error = isinstance(error, RuntimeError | ValueError) and any(
            phrase in str(error).lower() for phrase in _TRANSPORT_ERRORS
        )
        if isinstance(error, AbortRequested) or is_transport_error:
            lost = f"rank {rank} lost the connection to another rank: {str(error).partition(chr(10))[0]}"
            error = self._wait_for_verdict() or DistributedError(lost, hint="See the other ranks' errors.")
        if isinstance(error, DistributedError) and error.from_peer:
            return error
        text = f"{type(error).__name__}: {error}".partition("\n")[0]
        stopped = isinstance(error, KeyboardInterrupt)
        if self._end is None:
            end = {"rank": rank, "host": host, "code": exit_code_of(error), "text": text, "stopped": stopped}
            self._end = json.loads(self._store.compare_set("end", "", json.dumps(end)))
        first = self._end
        if stopped:  # or a launcher stops the ranks that are left after a failure
            return error if first["rank"] == rank or first["stopped"] else _describe_end(first)
        same: list[str] = []
        # Of several ranks with the same error, the lowest keeps it: rank 0 records it.
        with suppress(DistError, OSError):
            self._store.set(f"error/{rank}", text)
            time.sleep(2 * self._timeouts.beat_seconds)
            keys = [key for key in (f"error/{lower}" for lower in range(rank)) if self._store.check([key])]
            same = [key for key in keys if self._store.get(key).decode() == text]
        if not same and (first["rank"] == rank or first["text"] == text):
            return error
        how = f"as rank {same[0].partition('/')[2]} did" if same else f"after rank {first['rank']}: {text}"
        return failure_of_peer(f"rank {rank} on {host} failed {how}", exit_code_of(error))

    def _wait_for_verdict(self) -> DistributedError | None:
        started, patience = time.monotonic(), 2 * self._timeouts.reaction_seconds
        while self.verdict is None:
            any_left = LEFT in self._beats.values()
            if time.monotonic() - started > patience + (0 if any_left else self._timeouts.silent_seconds):
                break
            time.sleep(self._timeouts.beat_seconds / 4)
        return self.verdict

    def _all_left(self) -> bool:
        return all(beat == LEFT for beat in self._store.multi_get([f"beat/{rank}" for rank in self._others]))

    def _other_ended(self) -> bool:
        return self._end is not None and self._end["rank"] != self._info.rank

    def _exchange_heartbeats(self) -> None:
        try:
            store = self._connect()
            last = time.monotonic()
            while not self._closed.is_set() and (self._info.holds_store or not self._left):
                with self._beat_lock:
                    if not self._left:
                        store.set(f"beat/{self._info.rank}", str(self._exchanges))
                beats = store.multi_get([f"beat/{rank}" for rank in self._others])
                now = time.monotonic()
                # A rank that was itself stopped has received no heartbeats meanwhile.
                elapsed = min(now - last, 2 * self._timeouts.beat_seconds)
                last = now
                for rank, beat in zip(self._others, beats, strict=True):
                    self._silence[rank] = self._silence[rank] + elapsed if beat == self._beats.get(rank) else 0.0
                    self._beats[rank] = beat
                self._exchanges += 1
                if store.check(["end"]):
                    self._end = json.loads(store.get("end"))
                self._closed.wait(self._timeouts.beat_seconds)
        except (DistError, OSError):
            self._store_lost = True

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
            if not self._leaving and self._signal is not None:
                signal.pthread_kill(threading.main_thread().ident or 0, self._signal)
        self._closed.wait(self._timeouts.unwind_seconds)
        if self._leaving:
            self._closed.wait(self._timeouts.linger_seconds + self._timeouts.unwind_seconds)
        if not self._closed.is_set():
            os.write(2, f"DistributedError: {self.verdict}\n".encode())
            record_for_torchrun(self.verdict)
            os._exit(self.verdict.exit_code)

    def _judge(self, now: float, unanswered: float) -> DistributedError | None:
        store = f"the launcher's store at {self._info.endpoint}"
        if self._peers[0]["holds_store"]:
            store = f"rank 0 ({self._peers[0]['host']}), which holds the store at {self._info.endpoint},"
        if self._other_ended() or self._store_lost:
            self._noticed_at = now if self._noticed_at is None else self._noticed_at
            if now - self._noticed_at < self._timeouts.reaction_seconds:
                return None
            if self._end is not None and self._other_ended():
                return _describe_end(self._end)
            return DistributedError(f"{store} is gone", hint=KEPT)
        limit = self._timeouts.silent_seconds
        silent = [rank for rank in self._others if self._silence[rank] >= limit and self._beats[rank] != LEFT]
        for rank in [0] if unanswered >= limit else silent:
            self._continue(rank)
        if unanswered >= limit:
            name = store
        elif silent:
            hosts = dict.fromkeys(self._peers[rank]["host"] for rank in silent[:_SHOWN_RANKS])
            name = f"{name_ranks(silent)} ({', '.join(hosts)})"
        else:
            return None
        return DistributedError(f"{name} gave no heartbeat for {limit:g} s", hint=KEPT)

    def _continue(self, rank: int) -> None:
        """Send SIGCONT to a rank of this host: if it was stopped, it notices that the job has ended, and ends too."""
        peer = self._peers[rank]
        if rank in self._others and peer["host"] == self._info.host:
            with suppress(OSError):
                os.kill(peer["process"], signal.SIGCONT)


def _describe_end(end: dict[str, Any]) -> DistributedError:
    how = f" was told to stop. {KEPT}" if end["stopped"] else f": {end['text']}"
    return failure_of_peer(f"rank {end['rank']} on {end['host']}{how}", end["code"])


def _raise_abort(number: int, frame: FrameType | None) -> NoReturn:
    raise AbortRequested
