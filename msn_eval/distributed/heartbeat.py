"""Clerk: the one thread of a rank that talks to the store by which ranks meet; the store's clients are not for several."""

import json
import os
import queue
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import asdict
from datetime import timedelta
from itertools import count
from typing import TYPE_CHECKING
from uuid import uuid4

from msn_eval.distributed.peers import End, Limits, Others, Verdict, listed
from msn_eval.errors import DistributedError, printable

if TYPE_CHECKING:
    from torch.distributed import Store  # type: ignore[attr-defined]

_BIND_SECONDS = 5.0  # in which an earlier group of this process may still hold the port
# Every rank joins the same groups in the same order; keys of an earlier one must not be met again.
_groups_joined = count()


class LineCutError(Exception):
    """The store is gone."""

    def __init__(self) -> None:
        super().__init__("the connection was closed")


class Clerk:
    """Enters the group, gives and reads signs of life, and does what the main thread asks.

    requests: what to do at the store, and where the answer goes; None to stop
    joined:   is done when all ranks are there
    closed:   set when this rank leaves
    end:      its own last words, given with the next sign
    """

    def __init__(self, others: Others, limits: Limits) -> None:
        self.others, self.limits = others, limits
        self.requests: queue.SimpleQueue[tuple[Callable[[Store], object], Future[object]] | None] = queue.SimpleQueue()
        self.joined: Future[None] = Future()
        self.closed = threading.Event()
        self.end: End | None = None
        others.silence = dict.fromkeys(others.ranks, 0.0)
        self._signs: dict[int, bytes] = {}
        self._heard_at = 0.0
        self._beats = 0
        self._prefix = f"msn_eval/{others.place.job}/{next(_groups_joined)}"
        self._me = json.dumps({"host": others.place.host, "process": os.getpid(), "token": uuid4().hex})

    def serve(self) -> None:
        """Enter the group; then give and read signs of life, and do what the main thread asks."""
        from torch.distributed import DistError

        try:
            entered = self._enter()
        except BaseException as error:
            self.joined.set_exception(error)
            return
        if entered is None:
            return
        store, canary = entered
        self.joined.set_result(None)
        due = time.monotonic()
        try:
            while not self.closed.is_set():
                try:
                    request = self.requests.get(timeout=max(0.0, due - time.monotonic()))
                except queue.Empty:
                    pass
                else:
                    if request is None:
                        return
                    self._check(canary)
                    _do(store, *request)
                if time.monotonic() >= due:
                    self._check(canary)
                    self.give_sign(store)
                    self.listen(store)
                    due = time.monotonic() + self.limits.beat_seconds
                self.others.turns += 1
        except (DistError, OSError, LineCutError):
            self.others.cut = True
        finally:
            if canary is not None:
                canary.close()

    def _enter(self) -> "tuple[Store, socket.socket | None] | None":
        """Reach the store and wait until all ranks have; None where the main thread gave up."""
        from torch.distributed import DistError

        started = time.monotonic()
        deadline = started + self.limits.join_seconds
        while True:
            canary = None
            try:
                canary = self._reach(deadline)
                store = self._open_store(max(1.0, deadline - time.monotonic()))
                taken = store.compare_set("here/" + str(self.others.place.rank), "", self._me).decode()
                if taken != self._me:
                    raise self._rank_taken(json.loads(taken))
                self.give_sign(store)
                signs = [f"sign/{rank}" for rank in range(self.others.place.world)]
                while not store.check(signs):
                    if self.closed.is_set():
                        return None
                    self._check(canary)
                    if time.monotonic() > deadline:
                        missing = [rank for rank, sign in enumerate(signs) if not store.check([sign])]
                        raise self._not_met(f"without rank{'s' if len(missing) > 1 else ''} {listed(missing)}")
                    time.sleep(min(0.05, self.limits.beat_seconds))
                for rank, one in enumerate(
                    store.multi_get([f"here/{rank}" for rank in range(self.others.place.world)])
                ):
                    there = json.loads(one)
                    self.others.processes[rank], self.others.hosts[rank] = int(there["process"]), str(there["host"])
                self._heard_at = time.monotonic()
                return store, canary
            except (DistError, OSError, LineCutError) as error:
                # A store that was just closing, or one that is not open yet.
                if canary is not None:
                    canary.close()
                reason = printable(str(error).partition("\n")[0])
                if self.others.place.holds_store and time.monotonic() - started > min(
                    _BIND_SECONDS, self.limits.join_seconds
                ):
                    raise DistributedError(
                        f"the store of the job could not be opened at {self.others.place.meeting_point}: {reason}",
                        hint="Another job may use this port: choose another MASTER_PORT, or torchrun --standalone.",
                    ) from error
                if time.monotonic() > deadline:
                    raise self._not_met(f"was not reached: {reason}") from error
                if self.closed.wait(0.1):
                    return None

    def _reach(self, deadline: float) -> socket.socket | None:
        """Give a connection to the store that nothing is ever sent on: it tells at once that the store is gone.

        The store's own client tells, too, but with a stack of frames on stderr.
        """
        if self.others.place.holds_store:
            return None
        return socket.create_connection(
            (self.others.place.address, self.others.place.port), timeout=max(0.1, min(5.0, deadline - time.monotonic()))
        )

    def _open_store(self, seconds: float) -> "Store":
        from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

        store = TCPStore(
            self.others.place.address,
            self.others.place.port,
            is_master=self.others.place.holds_store,
            wait_for_workers=False,
            multi_tenant=True,
            timeout=timedelta(seconds=seconds),
        )
        return PrefixStore(self._prefix, store)

    def _check(self, canary: socket.socket | None) -> None:
        if canary is None:
            return
        canary.setblocking(False)
        with suppress(BlockingIOError):
            if canary.recv(1) == b"":
                raise LineCutError

    def give_sign(self, store: "Store") -> None:
        self._beats += 1
        end = asdict(self.end) if self.end else None
        store.set(f"sign/{self.others.place.rank}", json.dumps({"beat": self._beats, "end": end}))

    def listen(self, store: "Store") -> None:
        signs = store.multi_get([f"sign/{rank}" for rank in self.others.ranks])
        now = time.monotonic()
        # A rank that itself stood still, in a long native call or stopped with all others, has missed nothing meanwhile.
        elapsed = min(now - self._heard_at, 2 * self.limits.beat_seconds)
        self._heard_at = now
        for rank, sign in zip(self.others.ranks, signs, strict=True):
            if sign == self._signs.get(rank):
                self.others.silence[rank] += elapsed
                continue
            self._signs[rank], self.others.silence[rank] = sign, 0.0
            end = json.loads(sign)["end"]
            if end is not None:
                self.others.ends[rank] = End(**end)

    def _not_met(self, how: str) -> DistributedError:
        seconds = f"{self.limits.join_seconds:g} s"
        what = f"rank {self.others.place.rank} of {self.others.place.world} waited {seconds} at {self.others.place.meeting_point}"
        return DistributedError(
            f"{what}, which {how}" if how.startswith("was") else f"{what} {how}",
            hint="Look for the first error of the ranks that are missing, and check MASTER_ADDR, MASTER_PORT and firewalls.",
        )

    def _rank_taken(self, there: Mapping[str, object]) -> DistributedError:
        place = self.others.place
        return DistributedError(
            f"rank {place.rank} at {place.meeting_point} is taken by process {there['process']} on {there['host']}",
            hint="Two jobs use one address and port: choose another MASTER_PORT, or torchrun --standalone.",
        )


def _do(store: "Store", do: "Callable[[Store], object]", answer: "Future[object]") -> None:
    from torch.distributed import DistError

    try:
        answer.set_result(do(store))
    except (DistError, OSError):
        raise  # the line is cut; the main thread hears it from the watch
    except Exception as error:
        answer.set_exception(error)


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
