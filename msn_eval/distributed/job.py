"""Line: from one rank to the others: what the main thread tells and asks, and how it leaves.

Every rank has three threads. The main thread computes. The clerk alone talks to the store: it gives a sign of life, reads those
of the others, and does what the main thread asks. The watch judges by what the clerk heard, and calls the main thread back when
another rank is lost.
"""

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from itertools import count
from types import FrameType
from typing import TYPE_CHECKING, TypeVar, cast

from msn_eval.distributed.heartbeat import SUMMONS, Clerk, LineCutError, Watch
from msn_eval.distributed.peers import End, Limits, Others, Place, ending, exit_code_of, text_of
from msn_eval.errors import DistributedError

if TYPE_CHECKING:
    from torch.distributed import Store  # type: ignore[attr-defined]

_T = TypeVar("_T")


class Summoned(KeyboardInterrupt):
    """The watch called the main thread back."""


class Line:
    """What one rank has of the others, its three threads together."""

    def __init__(self, place: Place, limits: Limits) -> None:
        self.place, self.limits = place, limits
        self._process = os.getpid()
        self._main = threading.main_thread().ident if threading.current_thread() is threading.main_thread() else None
        self.others = Others(place=place)
        self._clerk = Clerk(self.others, limits)
        self._watch = Watch(self.others, limits, closed=self._clerk.closed, main=self._main)
        self._steps = count()

    @contextmanager
    def open(self) -> Iterator[None]:
        """Join, and tell the others how the body ended."""
        clerk = threading.Thread(target=self._clerk.serve, name="msn_eval clerk", daemon=True)
        watch = threading.Thread(target=self._watch.look, name="msn_eval watch", daemon=True)
        before = signal.signal(SUMMONS, self._come) if self._main is not None else None
        try:
            clerk.start()
            self._wait(self._clerk.joined)
            watch.start()
            yield
            self._say_goodbye()
        except BaseException as error:
            if os.getpid() != self._process:  # a forked child that fell through: the group is its parent's
                raise
            last = self._last_words(error)
            if last is error:
                raise
            raise last from error
        finally:
            if os.getpid() == self._process:
                with self._watch.summoning:
                    self._watch.leaving = True
                self._clerk.closed.set()
                self._clerk.requests.put(None)
                clerk.join(self.limits.beat_seconds)
                if self._main is not None:
                    signal.signal(SUMMONS, before)

    def exchange(self, kind: str, name: str, value: str) -> list[str]:
        """Tell every rank a value and give those of all, in the order of the ranks."""
        step = self._next_step()
        self._tell(step, kind, name, value)
        return self._collect(step, kind, name, range(self.place.world))

    def follow(self, name: str, make: Callable[[], str]) -> str:
        """Give what rank 0 makes."""
        step = self._next_step()
        if self.place.rank == 0:
            value = make()
            self._tell(step, "decision", name, value)
            return value
        return self._collect(step, "decision", name, [0])[0]

    def _next_step(self) -> str:
        return f"step/{next(self._steps)}"

    def _tell(self, step: str, kind: str, name: str, value: str) -> None:
        told = json.dumps({"kind": kind, "name": name, "value": value})
        self._ask(lambda store: store.set(f"{step}/{self.place.rank}", told))

    def _collect(self, step: str, kind: str, name: str, ranks: range | list[int]) -> list[str]:
        keys = {rank: f"{step}/{rank}" for rank in ranks}
        pause = 0.005
        while True:
            left = [rank for rank in keys if rank in self.others.ends and self.others.ends[rank].code == 0]
            if self._ask(lambda store: store.check(list(keys.values()))):
                break
            for rank in left:
                if not self._ask(lambda store, key=keys[rank]: store.check([key])):  # type: ignore[misc]
                    raise DistributedError(
                        f"{self.others.names([rank])} has left, while rank {self.place.rank} waits for it at the {kind} {name!r}",
                        hint="Start every rank with the same arguments.",
                    )
            pause = min(pause * 1.5, self.limits.beat_seconds / 2)
            time.sleep(pause)
        found = [json.loads(one) for one in self._ask(lambda store: store.multi_get(list(keys.values())))]
        for rank, one in zip(keys, found, strict=True):
            if (one["kind"], one["name"]) != (kind, name):
                raise DistributedError(
                    f"{self.others.names([rank])} is at the {one['kind']} {one['name']!r}, "
                    f"rank {self.place.rank} at the {kind} {name!r}",
                    hint="Start every rank with the same arguments.",
                )
        return [one["value"] for one in found]

    def _ask(self, do: "Callable[[Store], _T]", *, within: float | None = None) -> _T:
        """Let the clerk do something at the store, and give its answer.

        within: seconds, for a rank that leaves; others wait until there is an answer or a verdict
        Raises LineCutError after that time, DistributedError on a verdict.
        """
        if self.others.cut and within is not None:
            raise LineCutError
        answer: Future[object] = Future()
        self._clerk.requests.put((do, answer))
        if within is None:
            self._wait(answer)
        try:
            return cast("_T", answer.result(timeout=within))
        except TimeoutError:
            raise LineCutError from None

    def _wait(self, answer: "Future[_T]") -> None:
        while not answer.done():
            with suppress(TimeoutError):
                answer.exception(timeout=self.limits.beat_seconds / 4)
            if self._watch.verdict is not None:
                raise self._watch.verdict.error
        answer.result()

    def _come(self, number: int, frame: FrameType | None) -> None:
        if not self._watch.leaving and os.getpid() == self._process:
            raise Summoned

    def _say_goodbye(self) -> None:
        with self._watch.summoning:
            self._watch.leaving = True  # from here on the verdict is asked for
        self._sign_off(End(code=0), within=None)
        while self.place.holds_store and not self.others.all_ended():
            self._ask(self._clerk.listen)
            time.sleep(self.limits.beat_seconds / 10)

    def _sign_off(self, end: End, *, within: float | None) -> None:
        self._clerk.end = end
        self._ask(self._clerk.give_sign, within=within)

    def _last_words(self, error: BaseException) -> BaseException:
        """Tell the others of an error, and give the one to leave with: this one, or a line where another rank says more."""
        with self._watch.summoning:
            self._watch.leaving = True
        if not self._clerk.joined.done() or self._clerk.joined.exception() is not None:
            return error
        verdict = self._watch.verdict
        if isinstance(error, Summoned) and verdict is not None:
            error = verdict.error
        patience = 2 * self.limits.beat_seconds
        try:
            if isinstance(error, SystemExit) and exit_code_of(error) == 0:
                self._say_goodbye()
                return error
            if isinstance(error, KeyboardInterrupt):
                self._ask(self._clerk.listen, within=patience)
                verdict = self.others.news(failed_only=True)  # a launcher stops the ranks that are left
                if verdict is not None:
                    error = verdict.error
            told = verdict.end if verdict is not None and error is verdict.error else None
            if isinstance(error, KeyboardInterrupt) or (told is not None and not told.order):
                self._sign_off(End(code=exit_code_of(error)), within=patience)
                self._linger()
            elif told is not None:
                self._sign_off(End(code=exit_code_of(error), order=self._fall(), text=text_of(error)), within=patience)
                self._linger()
            else:
                error = self._speak_or_not(error, patience)
        except (LineCutError, DistributedError, KeyboardInterrupt):
            return error  # nobody is left to tell, or no time
        return error

    def _fall(self) -> int:
        return self._ask(lambda store: store.add("fallen", 1), within=2 * self.limits.beat_seconds)

    def _speak_or_not(self, error: BaseException, patience: float) -> BaseException:
        """Tell the others of an error of this rank's own, and give it, or a line if another is the one to tell people."""
        own = End(code=exit_code_of(error), order=self._fall(), text=text_of(error))
        self._sign_off(own, within=patience)
        try:
            speaker = self._choose_speaker(own) if own.order == 1 else self._chosen_speaker(own)
            if speaker == self.place.rank:
                self._linger(least_seconds=self.limits.settle_seconds)  # those that failed, too, look who speaks
            else:
                time.sleep(self.limits.settle_seconds)  # a launcher stops all once the first has left
        except KeyboardInterrupt:  # told to stop, because another rank has left already
            speaker = self._lowest_alike(own)
        if speaker == self.place.rank:
            return error
        first = self.others.ends.get(speaker)
        if first is None or first.text == own.text:
            what = f"rank {self.place.rank} on {self.place.host} failed as rank {speaker} did"
        else:
            what = f"rank {self.place.rank} on {self.place.host} failed after rank {speaker} had: {own.first_line}"
        return ending(what, own.code)

    def _choose_speaker(self, own: End) -> int:
        time.sleep(self.limits.settle_seconds)
        self._ask(self._clerk.listen, within=2 * self.limits.beat_seconds)
        speaker = self._lowest_alike(own)
        self._ask(lambda store: store.set("speaker", str(speaker)), within=2 * self.limits.beat_seconds)
        return speaker

    def _chosen_speaker(self, own: End) -> int:
        until = time.monotonic() + self.limits.news_seconds
        while time.monotonic() < until:
            if self._ask(lambda store: store.check(["speaker"]), within=2 * self.limits.beat_seconds):
                self._ask(self._clerk.listen, within=2 * self.limits.beat_seconds)
                return int(self._ask(lambda store: store.get("speaker"), within=2 * self.limits.beat_seconds))
            time.sleep(self.limits.beat_seconds / 10)
        return self._lowest_alike(own)  # the first to fail did not live to choose

    def _lowest_alike(self, own: End) -> int:
        ends = dict(self.others.ends)  # the clerk may add to it
        return min([rank for rank, end in ends.items() if end.text == own.text and end.order] + [self.place.rank])

    def _linger(self, *, least_seconds: float = 0.0) -> None:
        """Keep the store, if it is this rank's, until the others have read its last words."""
        started = time.monotonic()
        while self.place.holds_store:
            waited = time.monotonic() - started
            if waited > self.limits.linger_seconds or (self.others.all_ended() and waited >= least_seconds):
                return
            self._ask(self._clerk.listen, within=self.limits.beat_seconds)
            time.sleep(self.limits.beat_seconds / 10)
