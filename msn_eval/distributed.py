"""Group: the processes of one job, the share of each, and that none waits for one that is gone.

No tensor travels between ranks: each writes the features of its share to the cache that all of them read. So they only
have to agree, to wait for each other and to notice each other's end. The key-value store by which launchers let ranks
meet is enough for that, beside any backend, and no call here can hang in a collective.

Every rank has three threads. The main thread computes. The clerk alone talks to the store, whose clients are not for
several threads: it gives a sign of life, reads those of the others, and does what the main thread asks. The watch judges
by what the clerk heard, on the clock of its own host, and calls the main thread back when another rank is lost.
"""

import json
import os
import queue
import signal
import socket
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from functools import cached_property
from itertools import count
from types import FrameType
from typing import TYPE_CHECKING, TypeVar, cast
from uuid import uuid4

from msn_eval.errors import DistributedError, MsnEvalError, printable

if TYPE_CHECKING:
    from torch.distributed import Store  # type: ignore[attr-defined]

_T = TypeVar("_T")
_PREEMPTED, _INTERRUPTED = 75, 130
_CODE = DistributedError.exit_code
_KEPT = "Finished features and results are kept; the same command goes on from them."
_SHOWN = 6  # facts or ranks in one message
_BIND_SECONDS = 5.0  # in which an earlier group of this process may still hold the port
# A signal that neither torch, NCCL, submitit nor Slurm uses; other systems than Linux leave no such choice.
_SUMMONS = signal.SIGRTMIN + 5 if sys.platform == "linux" else signal.SIGUSR1
_groups_joined = (
    count()
)  # every rank joins the same groups in the same order; keys of an earlier one must not be met again


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


@dataclass(frozen=True, kw_only=True)
class Group:
    """The ranks of one job as one of them sees it.

    rank:       0 to world - 1; rank 0 alone prints and writes records
    local_rank: among the ranks of this host: the number of its GPU
    line:       to the other ranks; None where there are none
    """

    rank: int
    world: int
    local_rank: int
    host: str
    line: "_Line | None" = field(default=None, repr=False)


ALONE = Group(rank=0, world=1, local_rank=0, host="localhost")


def share(items: int, group: Group, *, block: int) -> range:
    """Give the rows that one rank does: contiguous, nothing twice, in whole blocks of which only the last may be short.

    Over all ranks they are range(items), and no rank has over one block more than another.
    """
    blocks = -(-items // block)
    first, last = (blocks * edge // group.world for edge in (group.rank, group.rank + 1))
    return range(first * block, min(last * block, items))


@contextmanager
def join_group(*, environment: Mapping[str, str] | None = None, limits: Limits | None = None) -> Iterator[Group]:
    """Give the group that the launcher's environment names; a group of one where it names none.

    Inside, the death or silence of another rank ends the body with DistributedError, whose exit code is the one that the
    other rank posted, if it posted one. An exception that leaves the body is told to the others; of several ranks with the
    same fault, the lowest keeps its error and the rest leave with a line. An orderly end is told too, and a rank that
    holds the store waits for the others.
    Raises DistributedError where the environment is incomplete or the ranks do not meet.
    """
    place = _read_place(os.environ if environment is None else environment)
    if place is None:
        yield ALONE
        return
    line = _Line(place, limits or Limits())
    with line.open():
        yield Group(rank=place.rank, world=place.world, local_rank=place.local_rank, host=place.host, line=line)


def agree(group: Group, what: str, facts: Mapping[str, str]) -> None:
    """Go on only if every rank states the same facts.

    what: whose facts they are, for people
    Raises DistributedError on every rank, naming the facts that differ, the ranks and what each says.
    """
    if group.line is None:
        return
    told = [json.loads(facts_of) for facts_of in group.line.exchange("agreement", what, json.dumps(dict(facts)))]
    names = list(dict.fromkeys(name for one in told for name in one))
    differing = [name for name in names if any(one.get(name) != told[0].get(name) for one in told)]
    if not differing:
        return
    lines = []
    for name in differing[:_SHOWN]:
        sayings: dict[str | None, list[int]] = defaultdict(list)
        for rank, one in enumerate(told):
            sayings[one.get(name)].append(rank)
        said = (
            f"{'nothing' if value is None else value} on {group.line.names(ranks)}" for value, ranks in sayings.items()
        )
        lines.append(f"  {name}: {'; '.join(said)}")
    if len(differing) > _SHOWN:
        lines.append(f"  and {len(differing) - _SHOWN} more")
    raise DistributedError(
        "\n".join([f"the ranks do not agree on {what}:", *lines]),
        remedy="Give every host the same files, options and versions.",
    )


def barrier(group: Group, name: str) -> None:
    """Wait until every rank is here. Raises DistributedError where one of them will not come."""
    if group.line is not None:
        group.line.exchange("barrier", name, "")


def gathered(group: Group, name: str, value: str) -> list[str]:
    """Give what every rank says, in the order of the ranks. Raises DistributedError where one of them is lost."""
    return [value] if group.line is None else group.line.exchange("gathering", name, value)


def decided(group: Group, name: str, make: Callable[[], str]) -> str:
    """Give what rank 0 makes; the others wait for it. Raises DistributedError where rank 0 is lost."""
    if group.line is None:
        return make()
    return group.line.follow(name, make)


@dataclass(frozen=True, kw_only=True)
class _Place:
    """Where the launcher put this rank."""

    rank: int
    world: int
    local_rank: int
    host: str
    address: str
    port: int
    job: str
    launcher_holds_store: bool

    @property
    def holds_store(self) -> bool:
        return self.rank == 0 and not self.launcher_holds_store

    @property
    def meeting_point(self) -> str:
        return f"{self.address}:{self.port}"


def _read_place(environment: Mapping[str, str]) -> _Place | None:
    if not environment.get("WORLD_SIZE") and not environment.get("RANK"):
        return None
    world = _whole(environment, "WORLD_SIZE", 1, 1 << 20)
    if world == 1:
        return None
    address = environment.get("MASTER_ADDR", "")
    if not address:
        raise _bad_variable("MASTER_ADDR", "is not set")
    return _Place(
        rank=_whole(environment, "RANK", 0, world - 1),
        world=world,
        local_rank=_whole(environment, "LOCAL_RANK", 0, world - 1),
        host=socket.gethostname(),
        address=address,
        port=_whole(environment, "MASTER_PORT", 1, (1 << 16) - 1),
        # A launcher that starts the ranks again may keep its store, and with it the keys of the attempt before.
        job=f"{environment.get('TORCHELASTIC_RUN_ID', '')}/{environment.get('TORCHELASTIC_RESTART_COUNT', '')}",
        launcher_holds_store=environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
    )


def _whole(environment: Mapping[str, str], name: str, least: int, most: int) -> int:
    text = environment.get(name, "")
    if not text:
        raise _bad_variable(name, "is not set")
    if not (text.isascii() and text.isdigit() and least <= int(text) <= most):
        raise _bad_variable(name, f"is {text!r}, not a whole number from {least} to {most}")
    return int(text)


def _bad_variable(name: str, what: str) -> DistributedError:
    return DistributedError(
        f"the environment names a job of several processes, but {name} {what}",
        remedy="Start the ranks by torchrun or --slurm; for one process alone, unset RANK and WORLD_SIZE.",
    )


class _Summoned(KeyboardInterrupt):
    """The watch called the main thread back."""


class _LineCutError(Exception):
    """The store is gone."""

    def __init__(self) -> None:
        super().__init__("the connection was closed")


@dataclass(frozen=True, kw_only=True)
class _End:
    """The last words of a rank.

    code:  it exits with; 0: it is done
    order: 1 for the first rank that failed, 2 for the next; 0: it is done, or was told to stop
    text:  of its error
    """

    code: int
    order: int = 0
    text: str = ""

    @property
    def first_line(self) -> str:
        return printable(self.text.partition("\n")[0])


@dataclass(frozen=True, kw_only=True)
class _Verdict:
    """Why this rank cannot go on.

    end: of the other rank, where it left last words
    """

    what: str
    code: int
    end: _End | None = None

    @cached_property
    def error(self) -> DistributedError:
        # One line, where the other rank says the rest.
        return _ending(self.what, self.code, remedy="" if self.end else _KEPT)


def _ending(what: str, code: int, *, remedy: str = "") -> DistributedError:
    error = DistributedError(what, remedy=remedy)
    error.exit_code = code
    return error


class _Line:
    """What one rank knows of the others, shared by its three threads."""

    def __init__(self, place: _Place, limits: Limits) -> None:
        self.place, self.limits = place, limits
        self._others = [rank for rank in range(place.world) if rank != place.rank]
        self._hosts: dict[int, str] = {}
        self._processes: dict[int, int] = {}
        self._signs: dict[int, bytes] = {}
        self._ends: dict[int, _End] = {}
        self._silence = dict.fromkeys(self._others, 0.0)
        self._heard_at = 0.0
        self._own_end: _End | None = None
        self._beats = 0
        self._turns = 0  # of the clerk: while they do not grow, the store gives no answer
        self._cut = False
        self._bad_news_at: float | None = None
        self._verdict: _Verdict | None = None
        self._steps = count()
        self._requests: queue.SimpleQueue[tuple[Callable[[Store], object], Future[object]] | None] = queue.SimpleQueue()
        self._joined: Future[None] = Future()
        self._closed = threading.Event()
        self._leaving = False
        self._summoning = threading.Lock()
        self._process = os.getpid()
        self._main = threading.main_thread().ident if threading.current_thread() is threading.main_thread() else None
        self._prefix = f"msn_eval/{place.job}/{next(_groups_joined)}"
        self._me = json.dumps({"host": place.host, "process": self._process, "token": uuid4().hex})

    # The main thread.

    @contextmanager
    def open(self) -> Iterator[None]:
        """Join, and tell the others how the body ended."""
        clerk = threading.Thread(target=self._serve, name="msn_eval clerk", daemon=True)
        watch = threading.Thread(target=self._watch, name="msn_eval watch", daemon=True)
        before = signal.signal(_SUMMONS, self._come) if self._main is not None else None
        try:
            clerk.start()
            self._wait(self._joined)
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
                with self._summoning:
                    self._leaving = True
                self._closed.set()
                self._requests.put(None)
                clerk.join(self.limits.beat_seconds)
                if self._main is not None:
                    signal.signal(_SUMMONS, before)

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

    def names(self, ranks: list[int]) -> str:
        """Give ranks and their hosts, for people."""
        hosts = list(dict.fromkeys(self._hosts[rank] for rank in ranks))
        more = f" and {len(ranks) - _SHOWN} more" if len(ranks) > _SHOWN else ""
        listed = ", ".join(map(str, ranks[:_SHOWN]))
        return f"rank{'s' if len(ranks) > 1 else ''} {listed}{more} ({', '.join(hosts[:_SHOWN])})"

    def _next_step(self) -> str:
        return f"step/{next(self._steps)}"

    def _tell(self, step: str, kind: str, name: str, value: str) -> None:
        told = json.dumps({"kind": kind, "name": name, "value": value})
        self._ask(lambda store: store.set(f"{step}/{self.place.rank}", told))

    def _collect(self, step: str, kind: str, name: str, ranks: range | list[int]) -> list[str]:
        keys = {rank: f"{step}/{rank}" for rank in ranks}
        pause = 0.005
        while True:
            left = [rank for rank in keys if rank in self._ends and self._ends[rank].code == 0]
            if self._ask(lambda store: store.check(list(keys.values()))):
                break
            for rank in left:
                if not self._ask(lambda store, key=keys[rank]: store.check([key])):  # type: ignore[misc]
                    raise DistributedError(
                        f"{self.names([rank])} has left, while rank {self.place.rank} waits for it at the {kind} {name!r}",
                        remedy="Start every rank with the same arguments.",
                    )
            pause = min(pause * 1.5, self.limits.beat_seconds / 2)
            time.sleep(pause)
        found = [json.loads(one) for one in self._ask(lambda store: store.multi_get(list(keys.values())))]
        for rank, one in zip(keys, found, strict=True):
            if (one["kind"], one["name"]) != (kind, name):
                raise DistributedError(
                    f"{self.names([rank])} is at the {one['kind']} {one['name']!r}, "
                    f"rank {self.place.rank} at the {kind} {name!r}",
                    remedy="Start every rank with the same arguments.",
                )
        return [one["value"] for one in found]

    def _ask(self, do: "Callable[[Store], _T]", *, within: float | None = None) -> _T:
        """Let the clerk do something at the store, and give its answer.

        within: seconds, for a rank that leaves; others wait until there is an answer or a verdict
        Raises _LineCutError after that time, DistributedError on a verdict.
        """
        if self._cut and within is not None:
            raise _LineCutError
        answer: Future[object] = Future()
        self._requests.put((do, answer))
        if within is None:
            self._wait(answer)
        try:
            return cast("_T", answer.result(timeout=within))
        except TimeoutError:
            raise _LineCutError from None

    def _wait(self, answer: "Future[_T]") -> None:
        while not answer.done():
            with suppress(TimeoutError):
                answer.exception(timeout=self.limits.beat_seconds / 4)
            if self._verdict is not None:
                raise self._verdict.error
        answer.result()

    def _come(self, number: int, frame: FrameType | None) -> None:
        if not self._leaving and os.getpid() == self._process:
            raise _Summoned

    def _say_goodbye(self) -> None:
        with self._summoning:
            self._leaving = True  # from here on the verdict is asked for
        self._sign_off(_End(code=0), within=None)
        while self.place.holds_store and not self._all_ended():
            self._ask(self._listen)
            time.sleep(self.limits.beat_seconds / 10)

    def _all_ended(self) -> bool:
        return len(self._ends) == len(self._others)

    def _sign_off(self, end: _End, *, within: float | None) -> None:
        self._own_end = end
        self._ask(self._give_sign, within=within)

    def _last_words(self, error: BaseException) -> BaseException:
        """Tell the others of an error, and give the one to leave with: this one, or a line where another rank says more."""
        with self._summoning:
            self._leaving = True
        if not self._joined.done() or self._joined.exception() is not None:
            return error
        verdict = self._verdict
        if isinstance(error, _Summoned) and verdict is not None:
            error = verdict.error
        patience = 2 * self.limits.beat_seconds
        try:
            if isinstance(error, SystemExit) and _exit_code(error) == 0:
                self._say_goodbye()
                return error
            if isinstance(error, KeyboardInterrupt):
                self._ask(self._listen, within=patience)
                verdict = self._news(failed_only=True)  # a launcher stops the ranks that are left
                if verdict is not None:
                    error = verdict.error
            told = verdict.end if verdict is not None and error is verdict.error else None
            if isinstance(error, KeyboardInterrupt) or (told is not None and not told.order):
                self._sign_off(_End(code=_exit_code(error)), within=patience)
                self._linger()
            elif told is not None:
                self._sign_off(_End(code=_exit_code(error), order=self._fall(), text=_text(error)), within=patience)
                self._linger()
            else:
                error = self._speak_or_not(error, patience)
        except (_LineCutError, DistributedError, KeyboardInterrupt):
            return error  # nobody is left to tell, or no time
        return error

    def _fall(self) -> int:
        return self._ask(lambda store: store.add("fallen", 1), within=2 * self.limits.beat_seconds)

    def _speak_or_not(self, error: BaseException, patience: float) -> BaseException:
        """Tell the others of an error of this rank's own, and give it, or a line if another is the one to tell people."""
        own = _End(code=_exit_code(error), order=self._fall(), text=_text(error))
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
        first = self._ends.get(speaker)
        if first is None or first.text == own.text:
            what = f"rank {self.place.rank} on {self.place.host} failed as rank {speaker} did"
        else:
            what = f"rank {self.place.rank} on {self.place.host} failed after rank {speaker} had: {own.first_line}"
        return _ending(what, own.code)

    def _choose_speaker(self, own: _End) -> int:
        time.sleep(self.limits.settle_seconds)
        self._ask(self._listen, within=2 * self.limits.beat_seconds)
        speaker = self._lowest_alike(own)
        self._ask(lambda store: store.set("speaker", str(speaker)), within=2 * self.limits.beat_seconds)
        return speaker

    def _chosen_speaker(self, own: _End) -> int:
        until = time.monotonic() + self.limits.news_seconds
        while time.monotonic() < until:
            if self._ask(lambda store: store.check(["speaker"]), within=2 * self.limits.beat_seconds):
                self._ask(self._listen, within=2 * self.limits.beat_seconds)
                return int(self._ask(lambda store: store.get("speaker"), within=2 * self.limits.beat_seconds))
            time.sleep(self.limits.beat_seconds / 10)
        return self._lowest_alike(own)  # the first to fail did not live to choose

    def _lowest_alike(self, own: _End) -> int:
        ends = dict(self._ends)  # the clerk may add to it
        return min([rank for rank, end in ends.items() if end.text == own.text and end.order] + [self.place.rank])

    def _linger(self, *, least_seconds: float = 0.0) -> None:
        """Keep the store, if it is this rank's, until the others have read its last words."""
        started = time.monotonic()
        while self.place.holds_store:
            waited = time.monotonic() - started
            if waited > self.limits.linger_seconds or (self._all_ended() and waited >= least_seconds):
                return
            self._ask(self._listen, within=self.limits.beat_seconds)
            time.sleep(self.limits.beat_seconds / 10)

    # The clerk.

    def _serve(self) -> None:
        """Enter the group; then give and read signs of life, and do what the main thread asks."""
        from torch.distributed import DistError

        try:
            entered = self._enter()
        except BaseException as error:
            self._joined.set_exception(error)
            return
        if entered is None:
            return
        store, canary = entered
        self._joined.set_result(None)
        due = time.monotonic()
        try:
            while not self._closed.is_set():
                try:
                    request = self._requests.get(timeout=max(0.0, due - time.monotonic()))
                except queue.Empty:
                    pass
                else:
                    if request is None:
                        return
                    self._check(canary)
                    _do(store, *request)
                if time.monotonic() >= due:
                    self._check(canary)
                    self._give_sign(store)
                    self._listen(store)
                    due = time.monotonic() + self.limits.beat_seconds
                self._turns += 1
        except (DistError, OSError, _LineCutError):
            self._cut = True
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
                taken = store.compare_set("here/" + str(self.place.rank), "", self._me).decode()
                if taken != self._me:
                    raise self._rank_taken(json.loads(taken))
                self._give_sign(store)
                signs = [f"sign/{rank}" for rank in range(self.place.world)]
                while not store.check(signs):
                    if self._closed.is_set():
                        return None
                    self._check(canary)
                    if time.monotonic() > deadline:
                        missing = [rank for rank, sign in enumerate(signs) if not store.check([sign])]
                        raise self._not_met(f"without rank{'s' if len(missing) > 1 else ''} {_listed(missing)}")
                    time.sleep(min(0.05, self.limits.beat_seconds))
                for rank, one in enumerate(store.multi_get([f"here/{rank}" for rank in range(self.place.world)])):
                    there = json.loads(one)
                    self._processes[rank], self._hosts[rank] = int(there["process"]), str(there["host"])
                self._heard_at = time.monotonic()
                return store, canary
            except (DistError, OSError, _LineCutError) as error:
                # A store that was just closing, or one that is not open yet.
                if canary is not None:
                    canary.close()
                reason = printable(str(error).partition("\n")[0])
                if self.place.holds_store and time.monotonic() - started > min(_BIND_SECONDS, self.limits.join_seconds):
                    raise DistributedError(
                        f"the store of the job could not be opened at {self.place.meeting_point}: {reason}",
                        remedy="Another job may use this port: choose another MASTER_PORT, or torchrun --standalone.",
                    ) from error
                if time.monotonic() > deadline:
                    raise self._not_met(f"was not reached: {reason}") from error
                if self._closed.wait(0.1):
                    return None

    def _reach(self, deadline: float) -> socket.socket | None:
        """Give a connection to the store that nothing is ever sent on: it tells at once that the store is gone.

        The store's own client tells, too, but with a stack of frames on stderr.
        """
        if self.place.holds_store:
            return None
        return socket.create_connection(
            (self.place.address, self.place.port), timeout=max(0.1, min(5.0, deadline - time.monotonic()))
        )

    def _open_store(self, seconds: float) -> "Store":
        from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

        store = TCPStore(
            self.place.address,
            self.place.port,
            is_master=self.place.holds_store,
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
                raise _LineCutError

    def _give_sign(self, store: "Store") -> None:
        self._beats += 1
        end = asdict(self._own_end) if self._own_end else None
        store.set(f"sign/{self.place.rank}", json.dumps({"beat": self._beats, "end": end}))

    def _listen(self, store: "Store") -> None:
        signs = store.multi_get([f"sign/{rank}" for rank in self._others])
        now = time.monotonic()
        # A rank that itself stood still, in a long native call or stopped with all others, has missed nothing meanwhile.
        elapsed = min(now - self._heard_at, 2 * self.limits.beat_seconds)
        self._heard_at = now
        for rank, sign in zip(self._others, signs, strict=True):
            if sign == self._signs.get(rank):
                self._silence[rank] += elapsed
                continue
            self._signs[rank], self._silence[rank] = sign, 0.0
            end = json.loads(sign)["end"]
            if end is not None:
                self._ends[rank] = _End(**end)

    # The watch.

    def _watch(self) -> None:
        """Look for a reason to give up, and call the main thread back when there is one."""
        tick = self.limits.beat_seconds / 2
        before, turns, unanswered = time.monotonic(), -1, 0.0
        while self._verdict is None:
            if self._closed.wait(tick):
                return
            now = time.monotonic()
            unanswered = 0.0 if self._turns != turns else unanswered + min(now - before, 2 * tick)
            before, turns = now, self._turns
            self._verdict = self._judge(now, unanswered)
        with self._summoning:
            if self._leaving:
                return
            if self._main is not None:
                signal.pthread_kill(self._main, _SUMMONS)
        until = time.monotonic() + self.limits.unwind_seconds
        while time.monotonic() < until:
            if self._closed.wait(tick) or self._leaving:
                return
        os.write(2, f"DistributedError: {self._verdict.what}\n".encode())
        os._exit(self._verdict.code)

    def _judge(self, now: float, unanswered: float) -> _Verdict | None:
        news = self._news()
        if news is not None or self._cut:
            self._bad_news_at = now if self._bad_news_at is None else self._bad_news_at
            if now - self._bad_news_at < self.limits.news_seconds:
                return None
            return news or _Verdict(what=f"{self._holder()} is gone", code=_CODE)
        if unanswered >= self.limits.silent_seconds:
            if not self.place.launcher_holds_store:
                self._wake(0)
            return _Verdict(what=f"{self._holder()} gave no sign for {self.limits.silent_seconds:g} s", code=_CODE)
        silent = [
            rank
            for rank in self._others
            if self._silence[rank] >= self.limits.silent_seconds and rank not in self._ends
        ]
        if not silent:
            return None
        for rank in silent:
            self._wake(rank)
        return _Verdict(what=f"{self.names(silent)} gave no sign for {self.limits.silent_seconds:g} s", code=_CODE)

    def _wake(self, rank: int) -> None:
        """Let a rank of this host that was stopped go on, so that it sees that the others have left and holds up no launcher."""
        if self._hosts[rank] == self.place.host:
            with suppress(OSError):
                os.kill(self._processes[rank], signal.SIGCONT)

    def _news(self, *, failed_only: bool = False) -> _Verdict | None:
        """Give what follows from the last words that came in."""
        ends = dict(self._ends)
        failed = sorted((end.order, rank) for rank, end in ends.items() if end.order)
        if failed:
            first = failed[0][1]
            what = f"rank {first} on {self._hosts[first]}: {ends[first].first_line}"
            return _Verdict(what=what, code=ends[first].code, end=ends[first])
        stopped = [rank for rank, end in ends.items() if end.code]
        if stopped and not failed_only:
            what = f"rank {stopped[0]} on {self._hosts[stopped[0]]} was told to stop. {_KEPT}"
            return _Verdict(what=what, code=ends[stopped[0]].code, end=ends[stopped[0]])
        return None

    def _holder(self) -> str:
        if self.place.launcher_holds_store:
            return f"the launcher's store at {self.place.meeting_point}"
        return f"rank 0 ({self._hosts[0]}), which holds the store at {self.place.meeting_point},"

    def _not_met(self, how: str) -> DistributedError:
        seconds = f"{self.limits.join_seconds:g} s"
        what = f"rank {self.place.rank} of {self.place.world} waited {seconds} at {self.place.meeting_point}"
        return DistributedError(
            f"{what}, which {how}" if how.startswith("was") else f"{what} {how}",
            remedy="Look for the first error of the ranks that are missing, and check MASTER_ADDR, MASTER_PORT and firewalls.",
        )

    def _rank_taken(self, there: Mapping[str, object]) -> DistributedError:
        return DistributedError(
            f"rank {self.place.rank} at {self.place.meeting_point} is taken by process {there['process']} on {there['host']}",
            remedy="Two jobs use one address and port: choose another MASTER_PORT, or torchrun --standalone.",
        )


def _do(store: "Store", do: "Callable[[Store], object]", answer: "Future[object]") -> None:
    from torch.distributed import DistError

    try:
        answer.set_result(do(store))
    except (DistError, OSError):
        raise  # the line is cut; the main thread hears it from the watch
    except Exception as error:
        answer.set_exception(error)


def _listed(ranks: list[int]) -> str:
    return ", ".join(map(str, ranks[:_SHOWN])) + (f" and {len(ranks) - _SHOWN} more" if len(ranks) > _SHOWN else "")


def _text(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"


def _exit_code(error: BaseException) -> int:
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    if isinstance(error, KeyboardInterrupt):  # by another name it is what the command line makes of SIGTERM
        return _INTERRUPTED if type(error) is KeyboardInterrupt else _PREEMPTED
    return error.exit_code if isinstance(error, MsnEvalError) else MsnEvalError.exit_code
