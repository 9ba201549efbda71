"""Collectives in training: what ranks average, compare, and raise together."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, distributed

from msn_eval.distributed.collective import any_over_ranks, average_gradients, check_replicas, checksums
from msn_eval.distributed.group import ALONE, Group, all_gather_object, broadcast_from_rank0, check_equal_across_ranks
from msn_eval.errors import DistributedError, NumericalError

OnRanks = Callable[..., list[Any]]


def this_rank() -> Group:
    return Group(rank=distributed.get_rank(), world=distributed.get_world_size())


def _averaged_gradients() -> list[list[float]]:
    group = this_rank()
    first, second = torch.nn.Parameter(torch.zeros(2)), torch.nn.Parameter(torch.zeros(3, 1))
    first.grad = torch.full((2,), float(group.rank))
    if group.rank == 1:
        second.grad = torch.ones(3, 1)
    average_gradients(group, [first, second])
    assert second.grad is not None
    return [first.grad.tolist(), second.grad.flatten().tolist()]


def test_gradients_are_averaged_and_missing_ones_count_as_zero(on_ranks: OnRanks) -> None:
    assert on_ranks(_averaged_gradients) == [[[0.5, 0.5], [0.5, 0.5, 0.5]]] * 2


def _flags() -> tuple[bool, ...]:
    group = this_rank()
    return any_over_ranks(group, group.rank == 1, False)


def test_a_flag_of_any_rank_is_set_on_all(on_ranks: OnRanks) -> None:
    assert on_ranks(_flags) == [(True, False)] * 2


def _fail() -> None:
    raise NumericalError("no good")


def _failed_on_rank0() -> str:
    try:
        broadcast_from_rank0(this_rank(), "number", _fail)
    except (NumericalError, DistributedError) as error:
        return f"{error.exit_code} {error}"
    return ""


def test_an_error_of_rank_0_is_raised_on_all_ranks(on_ranks: OnRanks) -> None:
    assert on_ranks(_failed_on_rank0) == ["23 no good", "23 rank 0: NumericalError: no good"]


def test_a_single_rank_needs_no_process_group() -> None:
    parameter = torch.nn.Parameter(torch.zeros(1))
    parameter.grad = torch.ones(1)

    average_gradients(ALONE, [parameter])
    check_equal_across_ranks(ALONE, "the run", {"recipe": "r"})

    assert parameter.grad.tolist() == [1.0]
    assert any_over_ranks(ALONE, True, False) == (True, False)
    assert all_gather_object(ALONE, "number", 3) == [3]
    with pytest.raises(NumericalError):
        broadcast_from_rank0(ALONE, "number", _fail)


def _weights() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "norm": torch.randn(5, generator=generator),
        "count": torch.tensor(3),
        "half": torch.randn(3, 3, generator=generator).bfloat16(),
    }


def _with_flipped_bit(tensor: Tensor, bit: int) -> Tensor:
    content = tensor.clone().reshape(-1).view(torch.uint8)
    content[bit // 8] ^= 1 << bit % 8
    return content.view(tensor.dtype).reshape(tensor.shape)


def _replica_error(*wrong: int) -> str:
    """Flip a bit of `norm` on the ranks in `wrong`, compare, and return the error."""
    group = this_rank()
    weights = _weights()
    if group.rank in wrong:
        weights["norm"] = _with_flipped_bit(weights["norm"], 40 + group.rank)
    try:
        check_replicas(group, weights, step=7)
    except DistributedError as error:
        return f"{error.exit_code} {error}"
    return ""


def test_equal_weights_pass(on_ranks: OnRanks) -> None:
    assert on_ranks(_replica_error) == ["", ""]


def test_a_rank_that_differs_from_the_others_is_named_on_all(on_ranks: OnRanks) -> None:
    errors = on_ranks(_replica_error, 1, world=3)

    host = ALONE.host
    assert [error.splitlines()[0] for error in errors] == [
        f"31 after step 7 the weights of rank 1 on {host} differ from the rest: 1 tensors, norm"
    ] * 3


def test_of_two_ranks_that_differ_neither_is_called_wrong(on_ranks: OnRanks) -> None:
    for error in on_ranks(_replica_error, 1):
        assert all(text in error for text in ("rank 0 on ", "rank 1 on ", "differ from each other"))


def test_every_bit_that_flips_changes_its_tensors_checksum_alone() -> None:
    weights = _weights()
    before = checksums(weights)
    for index, name in enumerate(sorted(weights)):
        for bit in range(8 * weights[name].nbytes):
            changed = checksums(weights | {name: _with_flipped_bit(weights[name], bit)}) != before
            assert changed.nonzero().flatten().tolist() == [index], (name, bit)
