"""Transfers between the host and a GPU that overlap with its computation."""

from collections.abc import Mapping

import torch
from torch import Tensor


def await_upload(pixels: Tensor, uploads: torch.cuda.Stream) -> None:
    """Let kernels that are queued from now on wait for pixels that another stream copies or decodes. The host does not wait.

    Args:
        pixels: Allocated on the other stream.
        uploads: That stream.
    """
    computing = torch.cuda.current_stream(uploads.device)
    computing.wait_stream(uploads)
    pixels.record_stream(computing)  # else the other stream would reuse the memory before the kernels have read it


def start_download(features: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], torch.cuda.Event | None]:
    """Queue copies to page-locked host memory; they are complete once the event is, which is None for tensors of the host."""
    values = {tap: rows.to("cpu", non_blocking=True) for tap, rows in features.items()}
    device = next(iter(features.values())).device
    if device.type != "cuda":
        return values, None
    event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]  # leaves the waiting core to decoders
    event.record(torch.cuda.current_stream(device))  # the default is a stream of the current device, which may differ
    return values, event
