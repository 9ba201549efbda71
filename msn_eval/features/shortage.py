"""Shortage: memory that gave out, by whatever name the libraries tell of it."""

import torch

SHORTAGES = (torch.OutOfMemoryError, MemoryError, RuntimeError)  # what to catch; `is_shortage` tells which of them are


def is_shortage(error: BaseException) -> bool:
    """Tell whether an error is that of memory that gave out; torch has no class of its own for that of the host."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)
