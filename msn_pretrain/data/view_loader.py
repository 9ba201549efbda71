"""Batches of views: images of the order read, decoded and turned into views, here or in worker processes."""

import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from msn_eval.data.images import BadImageError, ImageSet, read_image
from msn_eval.errors import DataError, ResourceError
from msn_pretrain.data.batched_views import make_batched_views
from msn_pretrain.data.sampler import Batch, Order
from msn_pretrain.data.views import ViewKind, draw_for_batch, make_views

_WORKER_TIMEOUT_SECONDS = 300.0
_BATCHES_A_WORKER = 2


@dataclass(frozen=True, kw_only=True)
class ViewBatch:
    """The views of one rank's images at one step.

    views: of each kind, (count · b, 3, pixels, pixels) uint8, view-major
    """

    batch: Batch
    views: tuple[Tensor, ...]


@dataclass(frozen=True, kw_only=True)
class ViewList:
    """Images and the views that are wanted of them.

    batched: make them by batched_views.py on `device`, else one by one where they are decoded
    """

    images: ImageSet
    kinds: tuple[ViewKind, ...]
    seed: int
    batched: bool
    device: torch.device


def load_views(wanted: ViewList, order: Order, *, first_step: int, steps: int, workers: int) -> Iterator[ViewBatch]:
    """Give the batches of this rank from `first_step` up to `steps`, their views on the device of `wanted`.

    workers: processes that read, decode and, unless views are batched, make them; 0 does that here
    Raises DataError naming an image that cannot be used, ResourceError where workers die or hang. Draws no number from
    a global generator.
    """
    decoding = _Decoding(wanted, order, first_step, steps)
    if workers == 0:
        prepared: Iterator[_Prepared] = iter(decoding)
    else:
        loader = DataLoader(
            decoding,
            batch_size=None,
            num_workers=workers,
            prefetch_factor=_BATCHES_A_WORKER,
            worker_init_fn=_become_worker,
            timeout=_WORKER_TIMEOUT_SECONDS,
            generator=torch.Generator(),  # else it would draw a seed for its workers from the global one
            pin_memory=wanted.device.type == "cuda",
        )
        prepared = iter(loader)
    while True:
        try:
            found = next(prepared, None)
        except RuntimeError as error:
            raise ResourceError(
                f"a loader worker died or hung: {str(error).partition(chr(10))[0]}",
                hint="Host memory or /dev/shm may be short: try data.workers=0 or a smaller batch.",
                kept="The last snapshot is kept; the same command goes on from it.",
            ) from error
        if found is None:
            return
        yield _on_device(wanted, found)


# A batch's step and epoch, its images' numbers, what was made of them (views of each kind, or the images themselves), and why
# that could not be done.
_Prepared = tuple[int, int, Tensor, list[Tensor], str | None]


@dataclass(frozen=True)
class _Decoding(IterableDataset[_Prepared]):
    """Every n-th batch for each of n workers: a loader asks its workers in turn, so that batches come in order."""

    wanted: ViewList
    order: Order
    first_step: int
    steps: int

    def __iter__(self) -> Iterator[_Prepared]:
        worker = get_worker_info()
        number, count = (worker.id, worker.num_workers) if worker is not None else (0, 1)
        for batch in self.order.batches(self.first_step, self.steps):
            if (batch.step - self.first_step) % count == number:
                yield _prepared(self.wanted, batch)


def _prepared(wanted: ViewList, batch: Batch) -> _Prepared:
    numbers = torch.from_numpy(np.ascontiguousarray(batch.images))
    try:
        images = [_decoded(wanted.images, number) for number in batch.images.tolist()]
    except DataError as error:  # an exception of ours does not survive the way out of a worker
        return batch.step, batch.epoch, numbers, [], str(error)
    made = images if wanted.batched else _views_one_by_one(wanted, images, batch)
    return batch.step, batch.epoch, numbers, made, None


def _decoded(images: ImageSet, number: int) -> Tensor:
    """Give one image as (3, height, width) uint8."""
    image_id = images.ids[number]
    try:
        pixels = np.asarray(images.source.decode(read_image(images.source, image_id)))
    except (BadImageError, OSError) as error:
        raise DataError(
            f"cannot be read: {error}",
            where=images.source.place(image_id),
            hint="Repair or remove the image; `msn-eval data verify DIR` lists all such.",
        ) from error
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1).contiguous()


def _views_one_by_one(wanted: ViewList, images: list[Tensor], batch: Batch) -> list[Tensor]:
    return [
        make_views(images, kind, first_view=first, seed=wanted.seed, epoch=batch.epoch, numbers=batch.images)
        for kind, first in zip(wanted.kinds, _first_views(wanted.kinds), strict=True)
    ]


def _first_views(kinds: Sequence[ViewKind]) -> list[int]:
    """Give the number of each kind's first view among all views of an image."""
    return [sum(kind.count for kind in kinds[:place]) for place in range(len(kinds))]


def _on_device(wanted: ViewList, found: _Prepared) -> ViewBatch:
    step, epoch, numbers, made, problem = found
    if problem is not None:
        raise DataError(problem)
    moved = [one.to(wanted.device, non_blocking=True) for one in made]
    batch = Batch(step=step, epoch=epoch, images=numbers.numpy())
    if not wanted.batched:
        return ViewBatch(batch=batch, views=tuple(moved))
    views = []
    for kind, first in zip(wanted.kinds, _first_views(wanted.kinds), strict=True):
        drawn = draw_for_batch(moved, kind, first_view=first, seed=wanted.seed, epoch=batch.epoch, numbers=batch.images)
        views.append(make_batched_views(moved, drawn, kind))
    return ViewBatch(batch=batch, views=tuple(views))


def _become_worker(number: int) -> None:
    """Leave it to the parent to act upon signals that a launcher sends to every process of a job; one thread each."""
    for name in ("SIGTERM", "SIGINT"):
        signal.signal(getattr(signal, name), signal.SIG_IGN)
    torch.set_num_threads(1)


def normalised(views: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Give views as a network takes them: on the [0, 1] scale, less `mean`, divided by `std`, float32.

    views: (n, 3, pixels, pixels) uint8
    """
    shape: Any = (1, 3, 1, 1)
    shift, scale = (torch.tensor(values, device=views.device).view(shape) for values in (mean, std))
    return (views.float() / 255 - shift) / scale
