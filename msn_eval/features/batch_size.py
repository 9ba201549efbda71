"""Batch size of an encoder, reduced when memory runs out. It changes speed, and numbers by rounding at most."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch

from msn_eval.errors import ResourceError, format_count
from msn_eval.features.encoder import Encoder
from msn_eval.process import describe_exhausted_resource

_log = logging.getLogger(__name__)
_T = TypeVar("_T")
OUT_OF_MEMORY_ERRORS = (torch.OutOfMemoryError, MemoryError, RuntimeError)  # what to catch; then ask `is_out_of_memory`


@dataclass(kw_only=True)
class AdaptiveBatchSize:
    """Number of images per forward pass.

    Attributes:
        images: At least 1. Halved on out-of-memory and never raised again.
    """

    images: int


def run_with_oom_backoff(
    encoder: Encoder, images: int, size: AdaptiveBatchSize, run: Callable[[slice], _T], *, kept: str = ""
) -> list[_T]:
    """Run a function on consecutive slices of a batch. Halve the slices and start again on out-of-memory.

    Args:
        encoder: Encoder that `run` uses.
        images: Number of images in the batch.
        size: Slice size, updated in place.
        run: Called with slices of rows; the last slice may end after the batch.
        kept: Sentence about finished work, for the error.

    Returns:
        The results of all slices, in order.

    Raises:
        ResourceError: One image does not fit into memory, or the encoder cannot be compiled.
    """
    while True:
        try:
            return [run(slice(start, start + size.images)) for start in range(0, images, size.images)]
        except OUT_OF_MEMORY_ERRORS as error:
            if encoder.compiled and type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
                raise ResourceError(
                    f"torch.compile failed: {str(error).strip().partition(chr(10))[0]}",
                    hint="It needs a C++ compiler, or Triton on a GPU. Or leave out --compile.",
                ) from error
            if not is_out_of_memory(error):
                raise
            reason = str(error).partition("\n")[0]
        # Outside of the except block, which would keep the failed attempt's frames and their tensors alive.
        if size.images == 1:
            raise ResourceError(
                f"{encoder.checkpoint.name}: one image does not fit into the memory of {encoder.device}: {reason}",
                hint="Use another --device, or --precision bf16.",
                kept=kept,
            )
        size.images = max(1, min(size.images, images) // 2)
        _log.warning(
            "%s: out of memory on %s; continuing with batches of %s",
            encoder.checkpoint.name, encoder.device, format_count(size.images, "image"),
        )  # fmt: skip
        if encoder.device.type == "cuda":
            torch.cuda.empty_cache()


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means out-of-memory, of the host or of any part of a GPU's software."""
    exhausted = describe_exhausted_resource(error)
    return exhausted is not None and exhausted[0] == "memory"
