"""Portions of a batch: halves where memory runs out, and words where there is nothing to halve."""

from dataclasses import replace

import pytest
import torch

from msn_eval import load_encoder
from msn_eval.errors import ResourceError
from msn_eval.features.batch_size import OUT_OF_MEMORY_ERRORS, AdaptiveBatchSize, is_out_of_memory, run_with_oom_backoff
from msn_eval.features.encoder import Encoder


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return load_encoder("pixels", device="cpu")


def _rows(rows: slice) -> list[int]:
    return list(range(10))[rows]


def _with_room_for(room: int, rows: slice) -> list[int]:
    if len(_rows(rows)) > room:
        raise MemoryError
    return _rows(rows)


def test_slices_cover_every_image_once_in_order(encoder: Encoder) -> None:
    assert run_with_oom_backoff(encoder, 10, AdaptiveBatchSize(images=4), _rows) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]


def test_batch_that_does_not_fit_is_halved_and_stays_halved(encoder: Encoder) -> None:
    portion = AdaptiveBatchSize(images=64)

    found = run_with_oom_backoff(encoder, 10, portion, lambda rows: _with_room_for(3, rows))

    assert found == [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9]]
    assert portion.images == 2


def test_image_that_does_not_fit_is_an_error_that_says_what_was_kept(encoder: Encoder) -> None:
    with pytest.raises(ResourceError) as told:
        run_with_oom_backoff(
            encoder, 10, AdaptiveBatchSize(images=4), lambda rows: _with_room_for(0, rows), kept="All is kept."
        )

    assert "pixels: one image does not fit into the memory of cpu" in str(told.value)
    assert str(told.value).endswith("All is kept.")


def test_other_errors_are_not_out_of_memory(encoder: Encoder) -> None:
    with pytest.raises(RuntimeError, match="size"):
        run_with_oom_backoff(encoder, 10, AdaptiveBatchSize(images=4), lambda rows: torch.ones(2) @ torch.ones(3))


def test_network_that_cannot_be_compiled_is_a_resource_error(encoder: Encoder) -> None:
    class BackendError(RuntimeError):
        __module__ = "torch._inductor.exc"

    def fail(rows: slice) -> None:
        raise BackendError("no compiler here")

    with pytest.raises(ResourceError, match=r"torch\.compile failed: no compiler here"):
        run_with_oom_backoff(replace(encoder, compiled=True), 10, AdaptiveBatchSize(images=4), fail)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError()])
def test_memory_errors_are_out_of_memory(error: BaseException) -> None:
    assert is_out_of_memory(error)


def test_torchs_error_for_host_memory_is_out_of_memory() -> None:
    with pytest.raises(OUT_OF_MEMORY_ERRORS) as told:
        torch.empty(1 << 60, dtype=torch.uint8)

    assert is_out_of_memory(told.value)


def test_other_runtime_errors_of_torch_are_not_out_of_memory() -> None:
    with pytest.raises(OUT_OF_MEMORY_ERRORS) as told:
        torch.ones(2) @ torch.ones(3)

    assert not is_out_of_memory(told.value)
