"""Deterministic kernels on a GPU, so that a resumed training repeats an uninterrupted one bit for bit."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def deterministic_kernels(device: torch.device) -> Iterator[None]:
    """Let torch use only deterministic kernels inside the block; the settings are restored after it. A CPU needs none.

    Attention then accumulates its gradients in a fixed order and never uses cuDNN's, convolutions use cuDNN's deterministic
    algorithms, and an operation that has no deterministic kernel raises RuntimeError. `warn_only` would leave attention as it is.
    """
    if device.type != "cuda":
        yield
        return
    # cuBLAS reads it at its first use. torch refuses products without it; the user's own setting wins.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    enabled = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    memory: Any = torch.utils.deterministic
    benchmark, fill = torch.backends.cudnn.benchmark, memory.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False  # else each process chooses its algorithms by what it times
    memory.fill_uninitialized_memory = False  # slow, and nothing reads it
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)
        torch.backends.cudnn.benchmark = benchmark
        memory.fill_uninitialized_memory = fill
