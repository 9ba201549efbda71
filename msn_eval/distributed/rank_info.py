"""Which rank of a job this process is, by the environment variables that the launcher sets."""

import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass

from msn_eval.errors import DistributedError

LAUNCHER_HOLDS_STORE = "TORCHELASTIC_USE_AGENT_STORE"  # set to True by torchrun, and by our launcher of local ranks


@dataclass(frozen=True, kw_only=True)
class RankInfo:
    """One rank of a job and the store where the ranks meet.

    Attributes:
        rank, world, local_rank, host: As in Group.
        address, port: Of the store.
        attempt: Identifies this start of the job. A launcher that restarts the ranks may keep its store and the old keys.
        holds_store: Whether this rank holds the store: rank 0, unless the launcher does, as torchrun.
    """

    rank: int
    world: int
    local_rank: int
    host: str
    address: str
    port: int
    attempt: str
    holds_store: bool

    @property
    def endpoint(self) -> str:
        return f"{self.address}:{self.port}"


@dataclass(frozen=True, kw_only=True)
class Timeouts:
    """How long ranks wait for each other.

    `reaction_seconds` pass between noticing that another rank failed and acting on it: the failed rank prints its error first,
    and the SIGTERM of a launcher reaches every rank.
    """

    join_seconds: float = 300.0  # until all ranks have started
    beat_seconds: float = 1.0  # between two heartbeats
    silent_seconds: float = 20.0  # without a heartbeat; above the longest native call that holds the GIL
    linger_seconds: float = 2.0  # that a failed rank keeps the store open, for the others to read its error
    unwind_seconds: float = 5.0  # for the main thread to stop before its process is ended
    collective_seconds: float = 24 * 3600.0  # of torch's collectives: the others may wait long for rank 0

    @property
    def reaction_seconds(self) -> float:
        return self.linger_seconds + 3 * self.beat_seconds


def read_rank_info(environment: Mapping[str, str] | None = None) -> RankInfo | None:
    """Return the rank that the launcher's variables name, or None if this process is the only one.

    Raises:
        DistributedError: A variable is missing or out of range.
    """
    variables = os.environ if environment is None else environment
    size = variables.get("WORLD_SIZE")
    if size == "1" or not (size or variables.get("RANK")):
        return None
    world = int(_read_variable(variables, "WORLD_SIZE", range(1, 1 << 20)))
    rank = int(_read_variable(variables, "RANK", range(world)))
    return RankInfo(
        rank=rank,
        world=world,
        local_rank=int(_read_variable(variables, "LOCAL_RANK", range(world))),
        host=socket.gethostname(),
        address=_read_variable(variables, "MASTER_ADDR"),
        port=int(_read_variable(variables, "MASTER_PORT", range(1, 1 << 16))),
        attempt=f"{variables.get('TORCHELASTIC_RUN_ID', '')}/{variables.get('TORCHELASTIC_RESTART_COUNT', '')}",
        holds_store=rank == 0 and variables.get(LAUNCHER_HOLDS_STORE) != "True",
    )


def _read_variable(variables: Mapping[str, str], name: str, allowed: range | None = None) -> str:
    text = variables.get(name)
    if not text:
        problem = "is not set"
    elif allowed and not (text.isascii() and text.isdigit() and int(text) in allowed):
        problem = f"is {text!r}, not an integer from {allowed[0]} to {allowed[-1]}"
    else:
        return text
    raise DistributedError(
        f"the environment describes a job of several processes, but {name} {problem}",
        hint="Start the ranks with torchrun or --slurm; for a single process, unset RANK and WORLD_SIZE.",
    )
