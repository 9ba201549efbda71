"""Place: where a launcher put this rank, by the variables of its environment."""

import socket
from collections.abc import Mapping
from dataclasses import dataclass

from msn_eval.errors import DistributedError


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
        remedy="Start the ranks by torchrun or --slurm; for one process alone, unset RANK and WORLD_SIZE.",
    )
