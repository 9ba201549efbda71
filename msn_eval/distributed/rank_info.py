"""Which rank of a job this process is, by the environment variables that the launcher sets."""

import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass

from msn_eval.errors import DistributedError


@dataclass(frozen=True, kw_only=True)
class RankInfo:
    """One rank of a job and the address of the store where the ranks meet.

    Attributes:
        rank: 0 to world - 1.
        world: Number of ranks.
        local_rank: Number of this rank among those of its host, and of its GPU.
        host: Name of this host.
        address: Host of the store.
        port: Port of the store.
        attempt: Identifies this start of the job. A launcher that restarts the ranks may keep its store and the old keys.
        launcher_holds_store: Whether the launcher holds the store, as torchrun does; otherwise rank 0 holds it.
    """

    rank: int
    world: int
    local_rank: int
    host: str
    address: str
    port: int
    attempt: str
    launcher_holds_store: bool

    @property
    def holds_store(self) -> bool:
        return self.rank == 0 and not self.launcher_holds_store

    @property
    def endpoint(self) -> str:
        return f"{self.address}:{self.port}"


@dataclass(frozen=True, kw_only=True)
class Timeouts:
    """How long ranks wait for each other, in seconds.

    Attributes:
        join_seconds: Until all ranks have started.
        beat_seconds: Between two heartbeats.
        silent_seconds: Without a heartbeat, after which a rank counts as dead. Above the longest native call that holds the GIL.
        linger_seconds: How long a failed rank keeps the store open, so that the others can read its error.
        unwind_seconds: How long the main thread may take to stop before its process is ended.
        collective_seconds: Of torch's collectives. Ranks may wait long for rank 0; the failure detector finds dead ranks.
    """

    join_seconds: float = 300.0
    beat_seconds: float = 1.0
    silent_seconds: float = 40.0
    linger_seconds: float = 2.0
    unwind_seconds: float = 5.0
    collective_seconds: float = 24 * 3600.0

    @property
    def reaction_seconds(self) -> float:
        """Time from the failure of another rank to acting on it: the failed rank prints its error first, and SIGTERM of a
        launcher reaches every rank."""
        return self.linger_seconds + 2 * self.beat_seconds


def read_rank_info(environment: Mapping[str, str] | None = None) -> RankInfo | None:
    """Return the rank that the launcher's variables name, or None if this process is the only one.

    Raises:
        DistributedError: A variable is missing or not a number.
    """
    variables = os.environ if environment is None else environment
    if not variables.get("WORLD_SIZE") and not variables.get("RANK"):
        return None
    world = _read_integer(variables, "WORLD_SIZE", 1, 1 << 20)
    if world == 1:
        return None
    if not variables.get("MASTER_ADDR"):
        raise _bad_variable("MASTER_ADDR", "is not set")
    return RankInfo(
        rank=_read_integer(variables, "RANK", 0, world - 1),
        world=world,
        local_rank=_read_integer(variables, "LOCAL_RANK", 0, world - 1),
        host=socket.gethostname(),
        address=variables["MASTER_ADDR"],
        port=_read_integer(variables, "MASTER_PORT", 1, (1 << 16) - 1),
        attempt=f"{variables.get('TORCHELASTIC_RUN_ID', '')}/{variables.get('TORCHELASTIC_RESTART_COUNT', '')}",
        launcher_holds_store=variables.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
    )


def _read_integer(variables: Mapping[str, str], name: str, least: int, most: int) -> int:
    text = variables.get(name, "")
    if not text:
        raise _bad_variable(name, "is not set")
    if not (text.isascii() and text.isdigit() and least <= int(text) <= most):
        raise _bad_variable(name, f"is {text!r}, not an integer from {least} to {most}")
    return int(text)


def _bad_variable(name: str, problem: str) -> DistributedError:
    return DistributedError(
        f"the environment describes a job of several processes, but {name} {problem}",
        hint="Start the ranks with torchrun or --slurm; for a single process, unset RANK and WORLD_SIZE.",
    )
