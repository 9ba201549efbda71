"""Others: what one rank has heard of the others. The clerk writes it; the watch and the main thread read."""

import os
import signal
from contextlib import suppress
from dataclasses import dataclass, field

from msn_eval.distributed.end import KEPT, End, Verdict
from msn_eval.distributed.place import Place

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
