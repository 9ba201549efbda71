import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed

from msn_eval.checkpoints.run_folder import newest_snapshot
from msn_eval.errors import DistributedError, NumericalError, UsageError
from msn_pretrain.config.recipe import MSNRecipe
from msn_pretrain.distributed.process_group import (
    Ranks,
    agree,
    any_of,
    average_gradients,
    check_replicas,
    checksums,
    first_decides,
    gather,
    join_ranks,
)
from msn_pretrain.training import train as training
from msn_pretrain.training.train import train

_ALONE = Ranks(rank=0, world=1, device=torch.device("cpu"))
_PROGRAM = """
import sys, torch
from msn_eval.errors import DistributedError, NumericalError
from msn_pretrain.distributed.process_group import agree, any_of, average_gradients, first_decides, gather, join_ranks

with join_ranks("cpu") as ranks:
    one, other = torch.nn.Parameter(torch.zeros(2)), torch.nn.Parameter(torch.zeros(3, 1))
    one.grad = torch.full((2,), float(ranks.rank))
    if ranks.rank == 1:
        other.grad = torch.ones(3, 1)
    average_gradients(ranks, [one, other])
    assert one.grad.tolist() == [0.5, 0.5] and other.grad.tolist() == [[0.5], [0.5], [0.5]]
    assert any_of(ranks, ranks.rank == 1, False) == (True, False)
    assert gather(ranks, ranks.rank) == [0, 1]
    assert first_decides(ranks, lambda: ranks.rank) == 0
    try:
        agree(ranks, {"recipe": f"r{ranks.rank}", "torch": "same"})
        raise SystemExit("ranks that differ were let through")
    except DistributedError as error:
        assert "differ in recipe" in str(error) and "torch" not in str(error)
    def fail():
        raise NumericalError("no good")
    try:
        first_decides(ranks, fail)
    except (NumericalError, DistributedError) as error:
        assert error.exit_code == 23 and "no good" in str(error)
        raise SystemExit(5)
"""


def test_two_ranks_average_agree_and_fail_together() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = os.environ | {
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
    }
    crew = [
        subprocess.Popen(
            [sys.executable, "-c", _PROGRAM],
            env=common | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]

    told = [child.communicate(timeout=200)[1] for child in crew]

    assert [child.returncode for child in crew] == [5, 5], told


def test_a_single_rank_needs_nobody() -> None:
    parameter = torch.nn.Parameter(torch.zeros(1))
    parameter.grad = torch.ones(1)

    average_gradients(_ALONE, [parameter])
    agree(_ALONE, {"recipe": "r"})

    assert parameter.grad.tolist() == [1.0]
    assert any_of(_ALONE, True, False) == (True, False)
    assert gather(_ALONE, 3) == [3]
    with pytest.raises(NumericalError):
        first_decides(_ALONE, _fail)


def _fail() -> None:
    raise NumericalError("no good")


def test_ranks_that_do_not_meet_are_told_so() -> None:
    environment = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}

    with pytest.raises(DistributedError, match="does not meet"), join_ranks("cpu", environment=environment):
        pass


def test_a_device_that_is_not_there_is_refused() -> None:
    with pytest.raises(UsageError, match="cuda:99"), join_ranks("cuda:99", environment={}):
        pass


_CPU = torch.device("cpu")


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


def _told(*wrong: int) -> str:
    """Compare on this rank, after a bit of `norm` flipped on the ranks that are `wrong`; give the error."""
    ranks = Ranks(rank=distributed.get_rank(), world=distributed.get_world_size(), device=_CPU)
    weights = _weights()
    if ranks.rank in wrong:
        weights["norm"] = _with_flipped_bit(weights["norm"], 40 + ranks.rank)
    try:
        check_replicas(ranks, weights, step=7)
    except DistributedError as error:
        return f"{error.exit_code} {error}"
    return ""


def test_equal_weights_are_let_through(on_ranks: Callable[..., list[Any]]) -> None:
    assert on_ranks(_told) == ["", ""]


def test_a_rank_that_differs_from_the_others_is_named_on_all(on_ranks: Callable[..., list[Any]]) -> None:
    told = on_ranks(_told, 1, world=3)

    for one in told:
        assert one.startswith("31 after step 7 rank 1 on ")
        assert "holds other weights than the rest: 1 tensors, norm" in one
        assert "rank 0" not in one


def test_of_two_ranks_that_differ_none_is_called_the_wrong_one(on_ranks: Callable[..., list[Any]]) -> None:
    for one in on_ranks(_told, 1):
        assert "rank 0 on " in one
        assert "rank 1 on " in one
        assert "than each other" in one


def test_every_bit_that_flips_changes_its_tensors_checksum_alone() -> None:
    weights = _weights()
    before = checksums(weights)
    for place, name in enumerate(sorted(weights)):
        for bit in range(8 * weights[name].nbytes):
            changed = checksums(weights | {name: _with_flipped_bit(weights[name], bit)}) != before
            assert changed.nonzero().flatten().tolist() == [place], (name, bit)


def _train_beside_a_bad_rank(recipe: MSNRecipe) -> str:
    """Train on this rank, after whose step 3 a bit of a weight flips if it is the second."""
    ranks = Ranks(rank=distributed.get_rank(), world=2, device=_CPU)
    compute = training.compute

    def flipping(session: Any, batch: Any, settings: Any) -> Any:
        if batch.batch.step == 3 and ranks.rank == 1:
            with torch.no_grad():
                weight = next(session.learner.model.parameters())
                weight.copy_(_with_flipped_bit(weight.detach(), 3))
        return compute(session, batch, settings)

    training.compute = flipping  # this process is a fork and ends with this function
    try:
        return str(train(recipe, ranks, quiet=True))
    except DistributedError as error:
        return f"{error.exit_code} {error}"


@pytest.mark.parametrize(
    "settings",
    [("run.compare_every=2", "run.snapshot_minutes=10"), ("run.compare_every=0", "run.snapshot_minutes=0.00001")],
    ids=["compared", "saved"],
)
def test_a_run_whose_ranks_come_apart_ends_before_it_saves_that(
    on_ranks: Callable[..., list[Any]],
    tiny: Callable[..., MSNRecipe],
    tmp_path: Path,
    settings: tuple[str, str],
) -> None:
    import sklearn.datasets  # noqa: F401

    told = on_ranks(_train_beside_a_bad_rank, tiny(*settings, "optimization.epochs=1"))

    assert [one.partition(" rank")[0] for one in told] == ["31 after step 4"] * 2
    found, _ = newest_snapshot(tmp_path / "run")
    assert (found.step if found else None) == (3 if "=0" in settings[0] else None)
