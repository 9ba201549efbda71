"""Memory that gave out is told from every other fault."""

import pytest
import torch

from msn_eval.features.shortage import SHORTAGES, is_shortage


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError()])
def test_errors_of_memory_are_shortages(error: BaseException) -> None:
    assert is_shortage(error)


def test_what_torch_says_of_the_hosts_memory_is_a_shortage() -> None:
    with pytest.raises(SHORTAGES) as told:
        torch.empty(1 << 60, dtype=torch.uint8)

    assert is_shortage(told.value)


def test_another_fault_of_torch_is_none() -> None:
    with pytest.raises(SHORTAGES) as told:
        torch.ones(2) @ torch.ones(3)

    assert not is_shortage(told.value)
