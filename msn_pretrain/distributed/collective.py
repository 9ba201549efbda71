"""Collective: sums over the ranks of one job, with the gradients that belong to them.

Every rank holds its own share of one global batch and computes one loss, that of the whole batch. The gradients here are
those of the sum of all ranks' losses, as in torch.distributed.nn; averaged over ranks, as DistributedDataParallel does,
they are the gradients of that one loss. Without a process group a job is one rank, and nothing is sent.
"""

from typing import Any, cast

import torch
from torch import Tensor, distributed


def world_size() -> int:
    """Give the number of ranks, 1 without a process group."""
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def rank() -> int:
    """Give this process's place among the ranks, 0 without a process group."""
    return distributed.get_rank() if distributed.is_available() and distributed.is_initialized() else 0


def sum_over_ranks(values: Tensor) -> Tensor:
    """Add `values` of all ranks; each rank's share receives the gradients that all ranks have for the sum."""
    return values if world_size() == 1 else cast(Tensor, _Sum.apply(values))


def with_mean_gradient(values: Tensor) -> Tensor:
    """Give `values`, equal on all ranks, so that their gradient is the mean over ranks on each of them.

    A parameter that no DistributedDataParallel holds is so trained alike everywhere; one that it holds is averaged once
    more, which changes nothing.
    """
    return values if world_size() == 1 else cast(Tensor, _MeanGradient.apply(values))


def max_over_ranks(values: Tensor) -> Tensor:
    """Give the largest of all ranks' values, place by place, without gradient."""
    values = values.detach()
    if world_size() > 1:
        values = values.clone(memory_format=torch.contiguous_format)
        distributed.all_reduce(values, distributed.ReduceOp.MAX)
    return values


def rows_of_all_ranks(rows: Tensor) -> Tensor:
    """Put the rows of all ranks below each other, in the order of ranks, without gradient; each has as many."""
    rows = rows.detach()
    if world_size() == 1:
        return rows
    shares = [torch.empty_like(rows, memory_format=torch.contiguous_format) for _ in range(world_size())]
    distributed.all_gather(shares, rows.contiguous())
    return torch.cat(shares)


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        total = values.clone(memory_format=torch.contiguous_format)
        distributed.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        total = gradients[0].clone(memory_format=torch.contiguous_format)
        distributed.all_reduce(total)
        return total


class _MeanGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        total = gradients[0].clone(memory_format=torch.contiguous_format)
        distributed.all_reduce(total)
        return total / distributed.get_world_size()
