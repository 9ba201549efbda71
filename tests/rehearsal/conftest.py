from collections.abc import Callable
from typing import Any

import pytest
from simulated_cuda import simulate


@pytest.fixture
def simulate_cuda() -> Callable[..., Any]:
    """Return a context manager that simulates a CUDA device; it yields the device, whose counts are still there after it."""
    return simulate
