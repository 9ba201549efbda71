"""Ranks: the processes that train together, how they meet, and how one command starts those of this machine."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from types import FrameType
from typing import TypeVar, cast

import torch
from torch import Tensor, distributed, nn

from msn_eval.errors import DistributedError, MsnEvalError, UsageError
from msn_eval.features.encoder import choose_device
from msn_eval.process import usable_cores

_T = TypeVar("_T")
_COLLECTIVE_TIMEOUT = timedelta(hours=1)  # a rank that evaluates or saves keeps the others waiting
_LONGEST_PARTING_SECONDS = 20.0
_POLL_SECONDS = 0.05
_PREEMPTED = 75


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """The ranks of a run as one of them sees it."""

    rank: int
    world: int
    device: torch.device

    @property
    def first(self) -> bool:
        return self.rank == 0


@contextmanager
def join_ranks(device: str, *, environment: Mapping[str, str] | None = None) -> Iterator[Ranks]:
    """Give the ranks that the launcher's environment names (torchrun, submitit, or `run_local_ranks`), else one.

    device: auto, cpu, cuda or cuda:N; of several, as `run_local_ranks` starts them, the one of this rank
    Raises DistributedError where the ranks do not meet.
    """
    variables = os.environ if environment is None else environment
    world = int(variables.get("WORLD_SIZE", "1"))
    if world == 1:
        chosen = choose_device(device.split(",")[0])
        _use(chosen)
        yield Ranks(rank=0, world=1, device=chosen)
        return
    rank, local_rank = int(variables["RANK"]), int(variables.get("LOCAL_RANK", variables["RANK"]))
    names = device.split(",")
    chosen = choose_device(names[local_rank % len(names)], local_rank=local_rank if len(names) == 1 else None)
    _use(chosen)
    try:
        distributed.init_process_group(
            "nccl" if chosen.type == "cuda" else "gloo",
            timeout=_COLLECTIVE_TIMEOUT,
            device_id=chosen if chosen.type == "cuda" else None,
        )
    except (RuntimeError, ValueError) as error:
        raise DistributedError(
            f"rank {rank} of {world} does not meet the others: {str(error).partition(chr(10))[0]}",
            hint="Check MASTER_ADDR and MASTER_PORT, and that all ranks were started.",
        ) from error
    try:
        yield Ranks(rank=rank, world=world, device=chosen)
    finally:
        distributed.destroy_process_group()


def _use(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.set_device(device)


def is_rank(environment: Mapping[str, str] | None = None) -> bool:
    """Tell whether a launcher started this process as one of several ranks."""
    return int((os.environ if environment is None else environment).get("WORLD_SIZE", "1")) > 1


def first_decides(ranks: Ranks, make: Callable[[], _T]) -> _T:
    """Run `make` on the first rank and give its answer on all; an error of ours there is raised on all."""
    if ranks.world == 1:
        return make()
    told: list[object] = [None]
    failure: Exception | None = None
    if ranks.first:
        try:
            told = [("answer", make())]
        except MsnEvalError as error:
            told, failure = [("error", str(error), error.exit_code)], error
        except Exception as error:
            told, failure = [("error", f"{type(error).__name__}: {error}", 1)], error
    distributed.broadcast_object_list(told, src=0)
    match told[0]:
        case ("answer", answer):
            return cast(_T, answer)
        case ("error", str(text), int(code)):
            if failure is not None:
                raise failure
            other = DistributedError(f"the first rank ended: {text.partition(chr(10))[0]}")
            other.exit_code = code
            raise other
    raise DistributedError("the first rank told nothing")


def agree(ranks: Ranks, facts: Mapping[str, str]) -> None:
    """Go on only if every rank states the same facts. Raises DistributedError naming those that differ, and where."""
    if ranks.world == 1:
        return
    told: list[tuple[str, Mapping[str, str]] | None] = [None] * ranks.world
    distributed.all_gather_object(told, (socket.gethostname(), dict(facts)))
    known = [one for one in told if one is not None]
    differing = [name for name in facts if len({one.get(name) for _, one in known}) > 1]
    if differing:
        lines = [
            f"  rank {rank} on {host}: {name} {one.get(name)}"
            for name in differing
            for rank, (host, one) in enumerate(known)
        ]
        raise DistributedError(
            f"the ranks differ in {', '.join(differing)}:\n" + "\n".join(lines),
            hint="Give all of them the same data, recipe and versions.",
        )


def gather(ranks: Ranks, value: _T) -> list[_T]:
    """Give the values of all ranks on every rank, by rank."""
    if ranks.world == 1:
        return [value]
    told: list[_T | None] = [None] * ranks.world
    distributed.all_gather_object(told, value)
    return [cast(_T, one) for one in told]


def any_of(ranks: Ranks, *flags: bool) -> tuple[bool, ...]:
    """Give, for each flag, whether some rank raised it."""
    if ranks.world == 1:
        return flags
    raised = torch.tensor([float(flag) for flag in flags], device=ranks.device)
    distributed.all_reduce(raised, distributed.ReduceOp.MAX)
    return tuple(bool(one) for one in raised.tolist())


def average_gradients(ranks: Ranks, parameters: Sequence[nn.Parameter]) -> None:
    """Put the mean over ranks in every gradient, by one sum over all of them in the order of the parameters.

    Unlike the buckets of DistributedDataParallel, which are laid out anew after the first step, this adds the same numbers in
    the same order at every step, so that a resumed run adds as the one that it continues.
    """
    if ranks.world == 1:
        return
    by_type: dict[torch.dtype, list[Tensor]] = {}
    for parameter in parameters:
        if parameter.requires_grad:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            by_type.setdefault(parameter.grad.dtype, []).append(parameter.grad)
    for gradients in by_type.values():
        flat = torch.cat([one.reshape(-1) for one in gradients])
        distributed.all_reduce(flat)
        flat /= ranks.world
        for one, part in zip(gradients, torch.split(flat, [one.numel() for one in gradients]), strict=True):
            one.copy_(part.view_as(one))


# Local ranks: the same command once for each of several devices, without a launcher.


def run_local_ranks(words: Sequence[str], devices: Sequence[str]) -> int:
    """Run `python -m msn_pretrain words…` once for each device, and give the exit code of the first that failed, else 0.

    SIGTERM is handed on to all; where one fails, the others are ended. Raises UsageError for devices that are no devices.
    """
    for name in devices:
        if name == "auto":
            raise UsageError("run.device: auto among several", hint="Name each: run.device=cuda:0,cuda:1.")
        choose_device(name)
    environment = os.environ | {
        "WORLD_SIZE": str(len(devices)),
        "LOCAL_WORLD_SIZE": str(len(devices)),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_free_port()),
    }
    environment.setdefault("OMP_NUM_THREADS", str(max(1, usable_cores() // len(devices))))
    crew = [
        subprocess.Popen(
            (sys.executable, "-m", "msn_pretrain", *words),
            env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(len(devices))
    ]

    told: list[int] = []

    def hand_on(number: int, frame: FrameType | None) -> None:
        told.append(number)
        for child in crew:
            child.send_signal(number)

    # A terminal sends Ctrl-C to the children itself.
    before = {signal.SIGTERM: signal.signal(signal.SIGTERM, hand_on)}
    before[signal.SIGINT] = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        code = _wait_for(crew)
        # Ranks that were still starting up have no ear for it yet, and nothing to save.
        return _PREEMPTED if told and code == DistributedError.exit_code else code
    finally:
        for stop, handler in before.items():
            signal.signal(stop, handler)
        for child in crew:
            if child.poll() is None:
                child.kill()
            child.wait()


def _wait_for(crew: "Sequence[subprocess.Popen[bytes]]") -> int:
    """Wait until all have ended; where one fails, the others get some time to say why themselves, then are ended."""
    code, deadline = 0, float("inf")
    while any(child.poll() is None for child in crew):
        failed = [child.returncode for child in crew if child.returncode not in (None, 0)]
        if failed and deadline == float("inf"):
            code, deadline = failed[0], time.monotonic() + _LONGEST_PARTING_SECONDS
        if time.monotonic() > deadline:
            for child in crew:
                child.kill()
        time.sleep(_POLL_SECONDS)
    codes = [child.returncode for child in crew if child.returncode]
    own = code or (codes[0] if codes else 0)
    return own if own >= 0 else DistributedError.exit_code


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


_SHOWN = 3


def check_replicas(ranks: Ranks, tensors: Mapping[str, Tensor], *, step: int) -> None:
    """Go on only if every rank holds the same tensors; all ranks must ask.

    step: that is finished, for the error
    Raises DistributedError naming the ranks that differ from most of them, their hosts, and the first tensors.
    """
    if ranks.world == 1:
        return
    told = gather(ranks, (socket.gethostname(), tuple(checksums(tensors).tolist())))
    usual, count = Counter(sums for _, sums in told).most_common(1)[0]
    if count == len(told):
        return
    other = [rank for rank, (_, sums) in enumerate(told) if sums != usual]
    differing = [
        name
        for place, name in enumerate(sorted(tensors))
        if any(told[rank][1][place] != usual[place] for rank in other)
    ]
    clear = 2 * count > len(told)
    named = other if clear else range(len(told))
    shown = ", ".join(f"rank {rank} on {told[rank][0]}" for rank in named)
    raise DistributedError(
        f"after step {step} {shown} {'holds' if clear and len(other) == 1 else 'hold'} other weights than "
        f"{'the rest' if clear else 'each other'}: {len(differing)} tensors, {', '.join(differing[:_SHOWN])}",
        hint="Hardware that changes numbers on its own does this: leave that machine or GPU out, and start the same command.",
        kept="The last snapshot is kept; it was written after such a comparison.",
    )


@torch.no_grad()
def checksums(tensors: Mapping[str, Tensor]) -> Tensor:
    """Give one int64 a tensor, by their names' order: the sum of its bits as 32-bit integers, or as bytes where they are none.

    Integers are added, so the order of adding, and the device, changes nothing, and a bit that flips does.
    """
    return torch.stack([_checksum(tensors[name]) for name in sorted(tensors)]).cpu()


def _checksum(tensor: Tensor) -> Tensor:
    flat = tensor.detach().contiguous().reshape(-1)
    return flat.view(torch.int32 if flat.element_size() % 4 == 0 else torch.uint8).sum(dtype=torch.int64)
