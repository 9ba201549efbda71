"""The simulated device refuses what CUDA refuses, and counts what makes the host wait."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import functional

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


def _process_batches(*, overlapped: bool) -> list[float]:
    """Upload six batches through two page-locked buffers on a stream of their own, and return the sums of their squares.

    Overlapped, the next batch is uploaded before the results of the one before it are fetched. Otherwise each is fetched at once.
    """
    copies = torch.cuda.Stream()
    buffers = [torch.empty(4, 3, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
    uploaded: list[Any] = [None, None]
    waiting: list[tuple[torch.Tensor, Any]] = []
    found = []

    def fetch() -> None:
        values, event = waiting.pop(0)
        event.synchronize()
        found.append(float(values))

    for number in range(6):
        side = number % 2
        if uploaded[side] is not None:
            uploaded[side].synchronize()
        buffers[side].fill_(number)
        with torch.cuda.stream(copies):
            pixels = buffers[side].to("cuda", non_blocking=True)
            uploaded[side] = copies.record_event()
        torch.cuda.current_stream().wait_event(uploaded[side])
        pixels.record_stream(torch.cuda.current_stream())
        values = pixels.float().square().sum().to("cpu", non_blocking=True)
        waiting.append((values, torch.cuda.current_stream().record_event()))
        if not overlapped or len(waiting) > 1:
            fetch()
    while waiting:
        fetch()
    return found


def test_log_tells_batches_that_are_ahead_from_batches_one_after_the_other(simulate_cuda: Simulate) -> None:
    with simulate_cuda() as overlapped:
        found = _process_batches(overlapped=True)
    with simulate_cuda() as serial:
        assert _process_batches(overlapped=False) == found

    assert found == [12.0 * number**2 for number in range(6)]
    uploads, fetches = overlapped.positions("upload", dtype=torch.uint8), overlapped.positions("fetch")
    overlapped.check_ahead(uploads, fetches)
    with pytest.raises(AssertionError, match="5 of 5 times entry 1 ahead comes too late"):
        serial.check_ahead(serial.positions("upload", dtype=torch.uint8), serial.positions("fetch"))
    with pytest.raises(AssertionError, match="4 of 4 times entry 2 ahead comes too late"):
        overlapped.check_ahead(uploads, fetches, by=2)


@pytest.mark.parametrize("overlapped", [True, False])
def test_log_tells_uploads_beside_kernels_from_uploads_after_them(simulate_cuda: Simulate, overlapped: bool) -> None:
    with simulate_cuda() as device:
        _process_batches(overlapped=overlapped)

    uploads, kernels = device.positions("upload"), device.positions("kernels", stream=0)
    assert all(device.log[upload].stream == 1 and device.log[upload].pinned for upload in uploads)
    assert not any(device.may_overlap(*pair) for pair in zip(uploads, kernels, strict=True))
    assert [device.may_overlap(*pair) for pair in zip(uploads[1:], kernels, strict=False)] == [overlapped] * 5


def _skip_wait_for_upload() -> None:
    with torch.cuda.stream(torch.cuda.Stream()):
        pixels = torch.ones(3).to("cuda", non_blocking=True)
    pixels.sum()


def _overwrite_what_is_read() -> None:
    copies, pixels = torch.cuda.Stream(), torch.ones(3).cuda()
    copies.wait_stream(torch.cuda.current_stream())
    pixels.sum()
    with torch.cuda.stream(copies):
        pixels.copy_(torch.zeros(3), non_blocking=True)


def _refill_too_early() -> None:
    buffer = torch.zeros(3, pin_memory=True)
    buffer.to("cuda", non_blocking=True)
    buffer.fill_(1)
    torch.cuda.synchronize()


def _free_too_early() -> None:
    copies = torch.cuda.Stream()
    with torch.cuda.stream(copies):
        pixels = torch.ones(3).to("cuda", non_blocking=True)
    torch.cuda.current_stream().wait_stream(copies)
    pixels.sum()
    del pixels
    with torch.cuda.stream(copies):
        torch.zeros(3, device="cuda")


@pytest.mark.parametrize(
    ("race", "message"),
    [
        (_skip_wait_for_upload, r"stream 0 uses \(3,\) that stream 1 may still write"),
        (_overwrite_what_is_read, r"stream 1 overwrites \(3,\) that stream 0 may still read"),
        (_refill_too_early, r"page-locked memory \(3,\) was changed while it was copied"),
        (_free_too_early, "stream 1 allocates memory again that stream 0 may still use"),
    ],
)
def test_races_are_refused(simulate_cuda: Simulate, race: Callable[[], None], message: str) -> None:
    with simulate_cuda(), pytest.raises(RuntimeError, match=message):
        race()


@pytest.mark.parametrize(
    ("compute", "dtype"),
    [
        (lambda rows: rows @ rows, torch.bfloat16),
        (lambda rows: functional.linear(rows, rows), torch.bfloat16),
        (lambda rows: functional.gelu(rows.bfloat16()), torch.bfloat16),
        (lambda rows: rows.bfloat16().softmax(dim=1), torch.float32),
        (lambda rows: rows.bfloat16().sum(), torch.float32),
        (lambda rows: rows.bfloat16().norm(), torch.float32),
        (lambda rows: functional.layer_norm(rows.bfloat16(), (4,)), torch.float32),
        (lambda rows: functional.cross_entropy(rows @ rows, rows.argmax(dim=1)), torch.float32),
        (lambda rows: torch.addcmul(rows, rows.bfloat16(), rows.bfloat16()), torch.float32),
        (lambda rows: rows.double() @ rows.double(), torch.float64),
    ],
    ids=["product", "linear", "gelu", "softmax", "sum", "norm", "layer norm", "cross-entropy", "promote", "double"],
)
def test_autocast_has_the_dtypes_of_cuda(simulate_cuda: Simulate, compute: Callable[..., Any], dtype: Any) -> None:
    with simulate_cuda():
        rows = torch.ones(4, 4).cuda().requires_grad_()
        with torch.autocast("cuda", torch.bfloat16):
            result = compute(rows)
        assert result.dtype == dtype
        result.sum().backward()
        assert rows.grad is not None
        assert rows.grad.dtype == torch.float32
        assert (rows @ rows).dtype == torch.float32
