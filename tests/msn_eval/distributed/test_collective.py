"""Collectives in training: what ranks average, compare, and raise together."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, distributed

from msn_eval.distributed.collective import GradientAverager, any_over_ranks, check_replicas, checksums
from msn_eval.distributed.group import ALONE, Group, all_gather_object, broadcast_from_rank0, check_equal_across_ranks
from msn_eval.errors import DistributedError, NumericalError

OnRanks = Callable[..., list[Any]]


def this_rank() -> Group:
    return Group(rank=distributed.get_rank(), world=distributed.get_world_size())


def _averaged_gradients(start: bool, bucket_bytes: int) -> list[list[float]]:
    """Return the mean gradients of three parameters, of which rank 0 uses two, in two steps."""
    rank = distributed.get_rank()
    parameters = [torch.nn.Parameter(torch.zeros(size)) for size in (2, 3, 1)]
    averager = GradientAverager(parameters, bucket_bytes=bucket_bytes)
    for _ in range(2):
        for parameter in parameters:
            parameter.grad = None
        if start:
            averager.start()
        loss = rank * parameters[0].sum() + 2 * parameters[2].sum()
        if rank == 1:
            loss = loss + parameters[1].sum()
        loss.backward()  # type: ignore[no-untyped-call]
        averager.finish()
    return [[] if parameter.grad is None else parameter.grad.tolist() for parameter in parameters]


@pytest.mark.parametrize("start", [True, False])
@pytest.mark.parametrize("bucket_bytes", [1, 12, 10**6])
def test_gradients_are_averaged_and_missing_ones_count_as_zero(
    on_ranks: OnRanks, start: bool, bucket_bytes: int
) -> None:
    assert on_ranks(_averaged_gradients, start, bucket_bytes) == [[[0.5, 0.5], [0.5, 0.5, 0.5], [2.0]]] * 2


def _buckets_sent_in_backward() -> list[int]:
    layers = torch.nn.Sequential(*(torch.nn.Linear(4, 4, bias=False) for _ in range(3)))
    averager, sent = GradientAverager(list(layers.parameters()), bucket_bytes=64), []
    layers[0].weight.register_post_accumulate_grad_hook(lambda parameter: sent.append(len(averager._sent)))
    averager.start()
    layers(torch.ones(1, 4)).sum().backward()
    return [*sent, len(averager._sent)]


def test_buckets_are_sent_while_backward_computes_the_rest(on_ranks: OnRanks) -> None:
    assert on_ranks(_buckets_sent_in_backward) == [[3, 3]] * 2


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

    GradientAverager([parameter]).finish()
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
        f"31 after step 7 the weights of rank 1 on {host} differ from the rest: 1 tensor, norm"
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
