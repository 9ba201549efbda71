"""Portion: how many images go through an encoder at once; it changes seconds, and numbers by rounding at most."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch

from msn_eval.errors import ResourceError
from msn_eval.features.encoder import Encoder

_log = logging.getLogger(__name__)
_T = TypeVar("_T")


@dataclass(kw_only=True)
class AdaptiveBatchSize:
    """images: at least 1; halved where memory gives out, and what follows begins with what was left."""

    images: int


def run_with_oom_backoff(
    encoder: Encoder, images: int, portion: AdaptiveBatchSize, do: Callable[[slice], _T], *, kept: str = ""
) -> list[_T]:
    """Do something to runs of a batch's images that together are all of them, in halves and their halves where memory runs out.

    do:   from the rows of a run, of which the last may reach beyond the batch; all are done anew after a shortage
    kept: what is told of work that was finished
    Raises ResourceError where one image is too much, and where the encoder cannot be compiled.
    """
    while True:
        try:
            return [do(slice(first, first + portion.images)) for first in range(0, images, portion.images)]
        except OUT_OF_MEMORY_ERRORS as error:
            if encoder.compiled and type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
                raise ResourceError(
                    f"torch.compile failed: {str(error).strip().partition(chr(10))[0]}",
                    hint="It needs a C++ compiler, or Triton on a GPU; or leave out --compile.",
                ) from error
            if not is_out_of_memory(error):
                raise
            shortage = str(error).partition("\n")[0]
        # Outside of the except block: there the failed attempt's frames, and their tensors with them, would live on.
        if portion.images == 1:
            raise ResourceError(
                f"{encoder.checkpoint.name}: memory of {encoder.device} is too small for one image: {shortage}",
                hint="Use another --device, or --precision bf16.",
                kept=kept,
            )
        portion.images = max(1, min(portion.images, images) // 2)
        _log.warning(
            "%s: out of memory on %s; going on with %d images a batch",
            encoder.checkpoint.name, encoder.device, portion.images,
        )  # fmt: skip
        if encoder.device.type == "cuda":
            torch.cuda.empty_cache()


OUT_OF_MEMORY_ERRORS = (
    torch.OutOfMemoryError,
    MemoryError,
    RuntimeError,
)  # what to catch; `is_shortage` tells which of them are


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether an error is that of memory that gave out; torch has no class of its own for that of the host."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)
