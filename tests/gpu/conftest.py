"""These tests need a CUDA device. With SIMULATE_CUDA=1 they run on a simulated one, except those that are marked `real_gpu`."""

import os
from collections.abc import Iterator

import pytest
import torch
from simulated_cuda import simulate

IS_REAL = torch.cuda.is_available()


@pytest.fixture(scope="module", autouse=True)
def gpu() -> Iterator[None]:
    """Simulate a CUDA device for a module of tests, unless there is one."""
    if IS_REAL:
        yield
        return
    with simulate():
        yield


def pytest_runtest_setup(item: pytest.Item) -> None:
    marker = item.get_closest_marker("real_gpu")
    if marker is not None and not IS_REAL:
        pytest.skip(f"needs a CUDA device: {marker.args[0]}")
    if not IS_REAL and not os.environ.get("SIMULATE_CUDA"):
        pytest.skip("needs a CUDA device, or SIMULATE_CUDA=1")
