"""Local ranks: one command that trains on several devices of this machine, without a launcher, and the device of each rank."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from types import FrameType

import torch
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from msn_eval.distributed.group import Group
from msn_eval.distributed.rank_info import LAUNCHER_HOLDS_STORE
from msn_eval.errors import PREEMPTED, DistributedError, UsageError
from msn_eval.features.encoder import choose_device
from msn_eval.process import usable_cores

_LOOPBACK = "127.0.0.1"
_SHUTDOWN_SECONDS = 15.0
_POLL_SECONDS = 0.05


def choose_rank_device(group: Group, device: str) -> Group:
    """Return the group with this rank's device, which becomes the current one.

    Args:
        group: The ranks.
        device: auto, cpu, cuda or cuda:N; or one device per local rank, separated by commas.
    """
    names = device.split(",")
    local_rank = group.local_rank if group.world > 1 and len(names) == 1 else None
    chosen = choose_device(names[group.local_rank % len(names)], local_rank=local_rank)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    return replace(group, device=chosen)


def check_devices(names: Sequence[str]) -> None:
    """Raise UsageError if one of these devices does not exist, or is `auto` among several."""
    if len(names) > 1 and "auto" in names:
        raise UsageError("run.device: auto among several", hint="Name each: run.device=cuda:0,cuda:1.")
    for name in names:
        choose_device(name)


def run_local_ranks(arguments: Sequence[str], devices: Sequence[str]) -> int:
    """Run `python -m msn_pretrain ARGUMENTS` once per device; return the exit code of the first that failed, else 0.

    SIGTERM is passed on to all. If one fails, the others are ended.

    Raises:
        UsageError: A device does not exist.
    """
    check_devices(devices)
    listener = socket.create_server((_LOOPBACK, 0))  # TCPStore on its own listens on all interfaces
    port = listener.getsockname()[1]
    store = TCPStore(_LOOPBACK, port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach())
    environment = {"OMP_NUM_THREADS": str(max(1, usable_cores() // len(devices)))} | os.environ
    environment |= {"WORLD_SIZE": str(len(devices)), "LOCAL_WORLD_SIZE": str(len(devices))}
    environment |= {"MASTER_ADDR": _LOOPBACK, "MASTER_PORT": str(store.port), LAUNCHER_HOLDS_STORE: "True"}
    command = (sys.executable, "-m", "msn_pretrain", *arguments)
    ranks = [
        subprocess.Popen(command, env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(len(devices))
    ]
    terminated = False

    def pass_on(number: int, frame: FrameType | None) -> None:
        nonlocal terminated
        terminated = True
        for rank in ranks:
            rank.send_signal(number)

    on_terminate = signal.signal(signal.SIGTERM, pass_on)
    on_interrupt = signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends Ctrl-C to the ranks itself
    try:
        code = _wait_for(ranks)
        # Ranks that were still starting did not handle the signal, and have nothing to save.
        return PREEMPTED if terminated and code == DistributedError.exit_code else code
    finally:
        signal.signal(signal.SIGTERM, on_terminate)
        signal.signal(signal.SIGINT, on_interrupt)
        for rank in ranks:
            rank.kill()
            rank.wait()


def _wait_for(ranks: "Sequence[subprocess.Popen[bytes]]") -> int:
    """Wait until all have ended. If one fails, the others get some time to report it, then they are killed."""
    code, deadline = 0, float("inf")
    while True:
        running = [rank for rank in ranks if rank.poll() is None]
        failed = [rank.returncode for rank in ranks if rank.returncode]
        if failed and not code:
            code, deadline = failed[0], time.monotonic() + _SHUTDOWN_SECONDS
        if not running:
            return code if code >= 0 else DistributedError.exit_code
        if time.monotonic() > deadline:
            for rank in running:
                rank.kill()
        time.sleep(_POLL_SECONDS)
