"""Batches that are halved on out-of-memory, and the error if one image does not fit."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch.distributed import DistBackendError

from msn_eval import load_encoder
from msn_eval.errors import ResourceError
from msn_eval.features.batch_size import OUT_OF_MEMORY_ERRORS, AdaptiveBatchSize, is_out_of_memory, run_with_oom_backoff
from msn_eval.features.encoder import Encoder


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return load_encoder("pixels", device="cpu")


def _rows(rows: slice) -> list[int]:
    return list(range(10))[rows]


def _fit_at_most(limit: int, rows: slice) -> list[int]:
    if len(_rows(rows)) > limit:
        raise MemoryError
    return _rows(rows)


def test_slices_cover_every_image_once_in_order(encoder: Encoder) -> None:
    assert run_with_oom_backoff(encoder, 10, AdaptiveBatchSize(images=4), _rows) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]


def test_batch_that_does_not_fit_is_halved_and_stays_halved(encoder: Encoder) -> None:
    size = AdaptiveBatchSize(images=64)

    found = run_with_oom_backoff(encoder, 10, size, lambda rows: _fit_at_most(3, rows))

    assert found == [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9]]
    assert size.images == 2


def test_error_for_an_image_that_does_not_fit_states_what_was_kept(encoder: Encoder) -> None:
    with pytest.raises(ResourceError) as caught:
        run_with_oom_backoff(
            encoder, 10, AdaptiveBatchSize(images=4), lambda rows: _fit_at_most(0, rows), kept="All is kept."
        )

    assert "pixels: one image does not fit into the memory of cpu" in str(caught.value)
    assert str(caught.value).endswith("All is kept.")


def test_network_that_cannot_be_compiled_is_a_resource_error(encoder: Encoder) -> None:
    class BackendError(RuntimeError):
        __module__ = "torch._inductor.exc"

    def fail(rows: slice) -> None:
        raise BackendError("no compiler here")

    with pytest.raises(ResourceError, match=r"torch\.compile failed: no compiler here"):
        run_with_oom_backoff(replace(encoder, compiled=True), 10, AdaptiveBatchSize(images=4), fail)


@pytest.mark.parametrize(
    ("fail", "expected"),
    [(lambda: torch.empty(1 << 60, dtype=torch.uint8), True), (lambda: torch.ones(2) @ torch.ones(3), False)],
    ids=["host memory", "wrong shapes"],
)
def test_out_of_memory_is_distinguished_from_other_errors_of_torch(fail: Callable[[], object], expected: bool) -> None:
    with pytest.raises(OUT_OF_MEMORY_ERRORS) as caught:
        fail()

    assert is_out_of_memory(caught.value) == expected


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), True),
        (torch.AcceleratorError("CUDA error: out of memory"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("cusolver error: CUSOLVER_STATUS_ALLOC_FAILED, when calling `cusolverDnCreate(handle)`"), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_HOST_ALLOCATION_FAILED"), True),
        (DistBackendError("NCCL error: unhandled cuda error\nLast error: Cuda failure 2 'out of memory'"), True),
        (torch.AcceleratorError("CUDA error: an illegal memory access was encountered"), False),
        (RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"), False),
        (RuntimeError("DataLoader worker is killed by signal: Bus error. Workers may be out of shared memory"), False),
        (DistBackendError("NCCL error: remote process exited or there was a network error"), False),
    ],
)
def test_every_kind_of_gpu_out_of_memory_is_recognised(error: RuntimeError, expected: bool) -> None:
    assert isinstance(error, OUT_OF_MEMORY_ERRORS)
    assert is_out_of_memory(error) == expected
