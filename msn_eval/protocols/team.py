"""Team: the ranks that share one fit. The first has the labelled rows, gives each of the others its share, and leads."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor, distributed

from msn_eval.distributed import Group, decided, share
from msn_eval.process_group import joined
from msn_eval.protocols.cross_entropy import Solution
from msn_eval.protocols.full_data import RowShare, minimise_in_chunks

_SENT_ROWS = 1 << 14
_DONE = ""


@dataclass(frozen=True, kw_only=True)
class Team:
    """The ranks of a group, each with a device to compute on."""

    group: Group
    device: torch.device


@dataclass(frozen=True, kw_only=True)
class _Task:
    """One fit, as the first rank tells the others."""

    n: int
    width: int
    n_classes: int
    mus: tuple[float, ...]
    target: float


def minimise_together(
    team: Team, whole: RowShare, mus: Sequence[float], *, target: float
) -> Iterator[tuple[Solution, int]]:
    """Call the others, who are in `assist`, to a fit, send them their rows, and solve with them as `minimise_in_chunks` does.

    whole: all rows, on the first rank
    """
    task = _Task(n=whole.n, width=whole.width, n_classes=whole.n_classes, mus=tuple(mus), target=target)
    decided(team.group, "fit", lambda: json.dumps(asdict(task)))
    with joined(team.group, team.device):
        for rank in range(1, team.group.world):
            for some in _pieces(_rows_of(team, whole.n, rank)):
                distributed.send(whole.values[some].contiguous(), rank)
                distributed.send(whole.labels[some].contiguous(), rank)
        own = len(_rows_of(team, whole.n, 0))
        first = replace(whole, values=whole.values[:own], labels=whole.labels[:own], total=add_up)
        yield from minimise_in_chunks(first, mus, target=target)


def assist(team: Team) -> None:
    """Take part in the fits that the first rank calls to, until it says that there are no more."""
    while told := decided(team.group, "fit", lambda: _DONE):
        task = _Task(**json.loads(told))
        rows = len(_rows_of(team, task.n, team.group.rank))
        values = torch.empty(rows, task.width, device=team.device)
        labels = torch.empty(rows, dtype=torch.int64, device=team.device)
        with joined(team.group, team.device):
            for some in _pieces(range(rows)):
                distributed.recv(values[some], 0)
                distributed.recv(labels[some], 0)
            own = RowShare(values=values, labels=labels, n_classes=task.n_classes, n=task.n, total=add_up)
            for _ in minimise_in_chunks(own, task.mus, target=task.target):
                pass


def dismiss(team: Team) -> None:
    """Tell the others, on the first rank, that there are no more fits."""
    decided(team.group, "fit", lambda: _DONE)


def add_up(sums: Tensor) -> None:
    """Add up over ranks; the first one's bits are everyone's, so that all take the same steps."""
    distributed.all_reduce(sums)
    distributed.broadcast(sums, 0)


def _rows_of(team: Team, n: int, rank: int) -> range:
    return share(n, replace(team.group, rank=rank), block=1)


def _pieces(rows: range) -> Iterator[slice]:
    return (slice(first, min(first + _SENT_ROWS, rows.stop)) for first in range(rows.start, rows.stop, _SENT_ROWS))
