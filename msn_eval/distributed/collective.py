"""Collectives on tensors in training: sums and their gradients, averaged gradients, and the comparison of replicas.

Every rank holds its share of one global batch and computes one loss, that of the complete batch. The gradients here are
those of the sum of all ranks' losses, as in torch.distributed.nn. Averaged over ranks, as DistributedDataParallel does,
they are the gradients of that one loss. Without a process group a job is one rank, and nothing is sent.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, distributed, nn

from msn_eval.distributed.group import Group, all_gather_object
from msn_eval.errors import DistributedError, format_count

_SHOWN_TENSORS = 3


def world_size() -> int:
    """Return the number of ranks, 1 without a process group."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


def is_sharded(value: object) -> bool:
    """Whether a value is a tensor of which each rank holds a part."""
    return hasattr(value, "full_tensor")  # a DTensor; importing its class takes long


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


def normalise_over_ranks(values: Tensor, *, eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Normalise (n, channels, …) per channel with the statistics of all ranks' rows; gradients are exact.

    Returns:
        The normalised values; and without gradient mean, biased variance, and number of values, each per channel of all ranks.
    """
    return cast("tuple[Tensor, Tensor, Tensor, Tensor]", _Normalise.apply(values, eps))


class _Normalise(torch.autograd.Function):
    """One collective forward and one backward, as in torch's SyncBatchNorm, whose kernels need CUDA."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        reduced, channels = [0, *range(2, values.dim())], (1, -1, *[1] * (values.dim() - 2))
        variance, mean = torch.var_mean(values, dim=reduced, correction=0)
        own_count = mean.new_full((1,), values.numel() / values.shape[1])
        gathered = all_gather_rows(torch.cat([mean, variance, own_count]).unsqueeze(0))
        means, variances, counts = torch.split(gathered, [len(mean), len(mean), 1], dim=1)
        count = counts.sum()
        mean = (means * counts).sum(dim=0) / count
        # Chan et al. 1979: the variance within ranks, plus that of the ranks' means.
        variance = ((variances + (means - mean).square()) * counts).sum(dim=0) / count
        scale = (variance + eps).rsqrt().view(channels)
        normal = (values - mean.view(channels)) * scale
        ctx.save_for_backward(normal, scale, count)
        ctx.mark_non_differentiable(mean, variance, count)
        return normal, mean, variance, count

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        normal, scale, count = ctx.saved_tensors
        gradient, reduced = gradients[0], [0, *range(2, normal.dim())]
        sums = torch.stack([gradient.sum(dim=reduced), (gradient * normal).sum(dim=reduced)])
        first, second = (_all_reduce(sums) / count).view(2, *scale.shape).unbind()
        return scale * (gradient - first - normal * second), None


def any_over_ranks(group: Group, *flags: bool) -> tuple[bool, ...]:
    """Return, for each flag, whether it is set on any rank. The hosts exchange them, so that none waits for its GPU."""
    if group.world == 1:
        return flags
    raised = all_reduce_max(torch.tensor(flags, dtype=torch.uint8))
    return tuple(map(bool, raised.tolist()))


class GradientAverager:
    """Replaces every gradient by its mean over ranks, in buckets; a missing one counts as zero.

    Between `start` and `finish`, a bucket is sent as soon as backward has completed its gradients, and all earlier buckets were
    sent. Buckets and their order depend on the parameters alone. DistributedDataParallel rearranges its buckets after the first
    step; here the order of addition is the same at every step, so that a resumed run adds as the run that it continues.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], *, bucket_bytes: int = 2**25) -> None:
        """Create the averager.

        Args:
            parameters: All of one dtype and device, in the order of their use; backward completes the last ones first.
            bucket_bytes: A bucket ends with the parameter that reaches this size.
        """
        self._buckets: list[list[nn.Parameter]] = [[]]
        filled = 0
        for parameter in reversed(parameters):
            if filled >= bucket_bytes:
                self._buckets.append([])
                filled = 0
            self._buckets[-1].append(parameter)
            filled += parameter.numel() * parameter.element_size()
        self._missing: list[int] = []  # gradients that each bucket waits for; empty between steps
        self._sent: list[tuple[Tensor, Any]] = []
        for number, bucket in enumerate(self._buckets if world_size() > 1 else []):
            for parameter in bucket:
                parameter.register_post_accumulate_grad_hook(  # type: ignore[no-untyped-call]
                    partial(self._note, number)
                )

    def start(self) -> None:
        """Send buckets during the next backward pass, which must be the only one before `finish`."""
        self._missing = [len(bucket) for bucket in self._buckets]

    def finish(self) -> None:
        """Send what was not sent, wait, and replace the gradients."""
        if world_size() == 1:
            return
        while len(self._sent) < len(self._buckets):
            self._send()
        for bucket, (flat, work) in zip(self._buckets, self._sent, strict=True):
            work.wait()
            flat.div_(world_size())
            for parameter, mean in zip(
                bucket, torch.split(flat, [parameter.numel() for parameter in bucket]), strict=True
            ):
                parameter.grad = mean.view_as(parameter)
        self._missing, self._sent = [], []

    def _note(self, number: int, parameter: Tensor) -> None:
        if not self._missing:
            return
        self._missing[number] -= 1
        while len(self._sent) < len(self._buckets) and not self._missing[len(self._sent)]:
            self._send()

    def _send(self) -> None:
        gradients = [
            (torch.zeros_like(parameter) if parameter.grad is None else parameter.grad).reshape(-1)
            for parameter in self._buckets[len(self._sent)]
        ]
        flat = torch.cat(gradients) if gradients else torch.zeros(0)
        self._sent.append((flat, distributed.all_reduce(flat, async_op=True)))


def check_replicas(group: Group, tensors: Mapping[str, Tensor], *, step: int) -> None:
    """Check that every rank holds the same tensors after `step` steps; all ranks must call this.

    Raises:
        DistributedError: Names the ranks that differ from the majority, their hosts, and the first tensors.
    """
    if group.world == 1:
        return
    tensors = {name: tensor for name, tensor in tensors.items() if not is_sharded(tensor)}
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
        f"{format_count(len(names), 'tensor')}, {', '.join(names[:_SHOWN_TENSORS])}",
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
