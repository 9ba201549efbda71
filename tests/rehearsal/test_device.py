"""The simulated device refuses what CUDA refuses, and counts what makes the host wait."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

Simulate = Callable[[], Any]
WAITS = {
    "item": lambda rows: rows.sum().item(),
    "bool": lambda rows: bool((rows > 0).all()),
    "tolist": lambda rows: rows.tolist(),
    "cpu": lambda rows: rows.cpu(),
    "nonzero": lambda rows: rows.nonzero(),
    "unique": lambda rows: torch.unique(rows),
    "mask": lambda rows: rows[rows > 0],
    "host index": lambda rows: rows[torch.tensor([0, 1])],
    "numbers": lambda rows: torch.tensor([1.0, 2.0], device="cuda"),
    "blocking copy": lambda rows: torch.ones(3).cuda(),
    "synchronize": lambda rows: torch.cuda.synchronize(),
}
FREE = {
    "product": lambda rows: rows @ rows.T,
    "in place": lambda rows: rows.mul_(2).add_(1),
    "device index": lambda rows: rows[torch.arange(2, device="cuda")],
    "where": lambda rows: torch.where(rows > 0, rows, 0.0),
    "copy to the device": lambda rows: torch.ones(3).to("cuda", non_blocking=True),
    "copy to the host": lambda rows: rows.to("cpu", non_blocking=True),
    "factory": lambda rows: torch.zeros(3, device="cuda") + 1,
}


@pytest.mark.parametrize("name", WAITS)
def test_operations_whose_result_the_host_needs_make_it_wait_once(simulate_cuda: Simulate, name: str) -> None:
    with simulate_cuda() as device:
        rows = torch.ones(4, 3).to("cuda", non_blocking=True)
        assert device.measure_waits(lambda: WAITS[name](rows)) == 1


@pytest.mark.parametrize("name", FREE)
def test_other_operations_do_not_make_the_host_wait(simulate_cuda: Simulate, name: str) -> None:
    with simulate_cuda() as device:
        rows = torch.ones(4, 3).to("cuda", non_blocking=True)
        assert device.measure_waits(lambda: FREE[name](rows)) == 0


@pytest.mark.parametrize(
    "mix",
    [
        lambda ours, theirs: ours + theirs,
        lambda ours, theirs: theirs @ ours.T,
        lambda ours, theirs: torch.cat([ours, theirs]),
        lambda ours, theirs: ours.add_(theirs),
        lambda ours, theirs: theirs[ours.argmax(dim=0)],
    ],
    ids=["add", "product", "concatenate", "in place", "index"],
)
def test_mixed_devices_are_refused(simulate_cuda: Simulate, mix: Callable[..., object]) -> None:
    with simulate_cuda(), pytest.raises(RuntimeError, match="mixes cuda:0 and cpu"):
        mix(torch.ones(3, 3).cuda(), torch.ones(3, 3))


def test_asynchronous_copy_has_no_values_until_the_host_waits_for_its_event(simulate_cuda: Simulate) -> None:
    with simulate_cuda():
        target = torch.zeros(2, pin_memory=True)
        target.copy_(torch.ones(2).cuda(), non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        before = target.clone()
        event.synchronize()
    assert bool(before.isnan().all())
    assert target.tolist() == [1.0, 1.0]


def test_gradients_are_on_the_device(simulate_cuda: Simulate) -> None:
    with simulate_cuda():
        weights = torch.ones(3, 3).cuda().requires_grad_()
        (weights @ weights).sum().backward()
        assert weights.grad is not None
        assert weights.grad.device == torch.device("cuda", 0)
        assert weights.grad.cpu().tolist() == [[6.0] * 3] * 3
