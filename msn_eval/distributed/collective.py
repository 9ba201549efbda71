"""Collectives on tensors in training: sums and their gradients, averaged gradients, and the comparison of replicas.

Every rank holds its share of one global batch and computes one loss, that of the complete batch. The gradients here are
those of the sum of all ranks' losses, as in torch.distributed.nn. Averaged over ranks, as DistributedDataParallel does,
they are the gradients of that one loss. Without a process group a job is one rank, and nothing is sent.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, distributed, nn

from msn_eval.distributed.group import Group, all_gather_object, all_reduce_tensors
from msn_eval.errors import DistributedError

_SHOWN_TENSORS = 3


def world_size() -> int:
    """Return the number of ranks, 1 without a process group."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


def all_reduce_sum(values: Tensor) -> Tensor:
    """Add `values` of all ranks; each rank's share receives the gradients that all ranks have for the sum."""
    return values if world_size() == 1 else cast(Tensor, _Sum.apply(values))


def average_gradient(values: Tensor) -> Tensor:
    """Return `values`, equal on all ranks, whose gradient is the mean over ranks on each of them.

    A parameter outside of DistributedDataParallel is then trained equally on all ranks. For one inside, the gradient is averaged
    once more, which changes nothing.
    """
    if world_size() == 1 or not values.requires_grad:
        return values
    values = values.view_as(values)
    values.register_hook(lambda gradient: _all_reduce(gradient) / world_size())  # type: ignore[no-untyped-call]
    return values


def all_reduce_max(values: Tensor) -> Tensor:
    """Return the elementwise maximum over ranks, without gradient."""
    values = values.detach()
    return values if world_size() == 1 else _all_reduce(values, distributed.ReduceOp.MAX)


def all_gather_rows(rows: Tensor) -> Tensor:
    """Concatenate the rows of all ranks in rank order, without gradient; each rank has the same number."""
    rows = rows.detach()
    if world_size() == 1:
        return rows
    gathered = [torch.empty_like(rows, memory_format=torch.contiguous_format) for _ in range(world_size())]
    distributed.all_gather(gathered, rows.contiguous())
    return torch.cat(gathered)


def _all_reduce(values: Tensor, operation: Any = distributed.ReduceOp.SUM) -> Tensor:
    values = values.clone(memory_format=torch.contiguous_format)
    distributed.all_reduce(values, operation)
    return values


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        return _all_reduce(values)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return _all_reduce(gradients[0])


def any_over_ranks(group: Group, *flags: bool) -> tuple[bool, ...]:
    """Return, for each flag, whether it is set on any rank."""
    if group.world == 1:
        return flags
    raised = all_reduce_max(torch.tensor(flags, dtype=torch.uint8, device=group.device))
    return tuple(map(bool, raised.tolist()))


def average_gradients(group: Group, parameters: Sequence[nn.Parameter]) -> None:
    """Replace every gradient by its mean over ranks; a missing one counts as zero.

    DistributedDataParallel rearranges its buckets after the first step. Here the order of addition is the same at every step,
    so that a resumed run adds as the run that it continues.
    """
    if group.world == 1:
        return
    gradients = []
    for parameter in parameters:
        if parameter.requires_grad:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            gradients.append(parameter.grad)
    all_reduce_tensors(group, gradients)
    torch._foreach_div_(gradients, group.world)


def check_replicas(group: Group, tensors: Mapping[str, Tensor], *, step: int) -> None:
    """Check that every rank holds the same tensors after `step` steps; all ranks must call this.

    Raises:
        DistributedError: Names the ranks that differ from the majority, their hosts, and the first tensors.
    """
    if group.world == 1:
        return
    received = all_gather_object(group, "checksums", (group.host, tuple(checksums(tensors).tolist())))
    usual, frequency = Counter(sums for _, sums in received).most_common(1)[0]
    if frequency == len(received):
        return
    by_tensor = zip(sorted(tensors), *(sums for _, sums in received), strict=True)
    names = [name for name, *sums in by_tensor if len(set(sums)) > 1]
    has_majority = 2 * frequency > len(received)
    differing = [
        f"rank {rank} on {host}" for rank, (host, sums) in enumerate(received) if sums != usual or not has_majority
    ]
    raise DistributedError(
        f"after step {step} the weights of {', '.join(differing)} differ from {'the rest' if has_majority else 'each other'}: "
        f"{len(names)} tensors, {', '.join(names[:_SHOWN_TENSORS])}",
        hint="Faulty hardware can cause this: leave out that machine or GPU, and start the same command.",
        kept="The last snapshot is kept; it was written after such a comparison.",
    )


@torch.no_grad()
def checksums(tensors: Mapping[str, Tensor]) -> Tensor:
    """Return one int64 per tensor, in the order of their names: the sum of its bits as 32-bit integers, otherwise as bytes.

    Integer sums do not depend on the order of addition or on the device, and every flipped bit changes them.
    """
    flat = [tensors[name].contiguous().reshape(-1) for name in sorted(tensors)]
    bits = [values.view(torch.int32 if values.element_size() % 4 == 0 else torch.uint8) for values in flat]
    return torch.stack([values.sum(dtype=torch.int64) for values in bits]).cpu()
