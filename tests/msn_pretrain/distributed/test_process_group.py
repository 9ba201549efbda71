import os
import socket
import subprocess
import sys

import pytest
import torch

from msn_eval.errors import DistributedError, NumericalError, UsageError
from msn_pretrain.distributed.process_group import (
    Ranks,
    agree,
    any_of,
    average_gradients,
    first_decides,
    gather,
    join_ranks,
)

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
