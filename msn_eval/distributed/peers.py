"""Others: what one rank has heard of the others. The clerk writes it; the watch and the main thread read."""

import os
import signal
import socket
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property

from msn_eval.errors import DistributedError, MsnEvalError, printable

_PREEMPTED, _INTERRUPTED = 75, 130
KEPT = "Finished features and results are kept; the same command goes on from them."


@dataclass(frozen=True, kw_only=True)
class End:
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
class Verdict:
    """Why this rank cannot go on.

    end: of the other rank, where it left last words
    """

    what: str
    code: int
    end: End | None = None

    @cached_property
    def error(self) -> DistributedError:
        # One line, where the other rank says the rest.
        return ending(self.what, self.code, hint="" if self.end else KEPT)


def ending(what: str, code: int, *, hint: str = "") -> DistributedError:
    """Give an error that this rank leaves with, by another's exit code."""
    error = DistributedError(what, hint=hint)
    error.exit_code = code
    return error


def text_of(error: BaseException) -> str:
    """Give an error as a command tells it."""
    return f"{type(error).__name__}: {error}"


def exit_code_of(error: BaseException) -> int:
    """Give what a command exits with."""
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    if isinstance(error, KeyboardInterrupt):  # by another name it is what the command line makes of SIGTERM
        return _INTERRUPTED if type(error) is KeyboardInterrupt else _PREEMPTED
    return error.exit_code if isinstance(error, MsnEvalError) else MsnEvalError.exit_code


@dataclass(frozen=True, kw_only=True)
class Place:
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


def read_place(environment: Mapping[str, str]) -> Place | None:
    """Give the place that the launcher's variables name; None where this process is alone.

    Raises DistributedError naming the variable that is missing or no number.
    """
    if not environment.get("WORLD_SIZE") and not environment.get("RANK"):
        return None
    world = _whole(environment, "WORLD_SIZE", 1, 1 << 20)
    if world == 1:
        return None
    address = environment.get("MASTER_ADDR", "")
    if not address:
        raise _bad_variable("MASTER_ADDR", "is not set")
    return Place(
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
        hint="Start the ranks by torchrun or --slurm; for one process alone, unset RANK and WORLD_SIZE.",
    )


SHOWN = 6  # facts or ranks in one message


@dataclass(kw_only=True)
class Others:
    """The other ranks of a job, by their numbers.

    hosts, processes: of all ranks, this one too
    ends:             last words, of those that have left
    silence:          seconds without a sign of life
    turns:            of the clerk: while they do not grow, the store gives no answer
    cut:              the store is gone
    """

    place: Place
    hosts: dict[int, str] = field(default_factory=dict)
    processes: dict[int, int] = field(default_factory=dict)
    ends: dict[int, End] = field(default_factory=dict)
    silence: dict[int, float] = field(default_factory=dict)
    turns: int = 0
    cut: bool = False

    @property
    def ranks(self) -> list[int]:
        return [rank for rank in range(self.place.world) if rank != self.place.rank]

    def names(self, ranks: list[int]) -> str:
        """Give ranks and their hosts, for people."""
        hosts = list(dict.fromkeys(self.hosts[rank] for rank in ranks))
        return f"rank{'s' if len(ranks) > 1 else ''} {listed(ranks)} ({', '.join(hosts[:SHOWN])})"

    def all_ended(self) -> bool:
        return len(self.ends) == len(self.ranks)

    def wake(self, rank: int) -> None:
        """Let a rank of this host that was stopped go on, so that it sees that the others have left and holds up no launcher."""
        if self.hosts[rank] == self.place.host:
            with suppress(OSError):
                os.kill(self.processes[rank], signal.SIGCONT)

    def news(self, *, failed_only: bool = False) -> Verdict | None:
        """Give what follows from the last words that came in."""
        ends = dict(self.ends)
        failed = sorted((end.order, rank) for rank, end in ends.items() if end.order)
        if failed:
            first = failed[0][1]
            what = f"rank {first} on {self.hosts[first]}: {ends[first].first_line}"
            return Verdict(what=what, code=ends[first].code, end=ends[first])
        stopped = [rank for rank, end in ends.items() if end.code]
        if stopped and not failed_only:
            what = f"rank {stopped[0]} on {self.hosts[stopped[0]]} was told to stop. {KEPT}"
            return Verdict(what=what, code=ends[stopped[0]].code, end=ends[stopped[0]])
        return None

    def holder(self) -> str:
        if self.place.launcher_holds_store:
            return f"the launcher's store at {self.place.meeting_point}"
        return f"rank 0 ({self.hosts[0]}), which holds the store at {self.place.meeting_point},"


def listed(ranks: list[int]) -> str:
    """Give ranks, for people."""
    return ", ".join(map(str, ranks[:SHOWN])) + (f" and {len(ranks) - SHOWN} more" if len(ranks) > SHOWN else "")


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
