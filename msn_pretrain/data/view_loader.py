"""Loading of views: read and decode images and make views, in this process or in workers."""

import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from msn_eval.data.decoders import decode_tensor
from msn_eval.data.images import BadImageError, ImageSet, read_image
from msn_eval.errors import DataError, ResourceError
from msn_eval.features.transfer import await_upload
from msn_eval.process import affordable_workers
from msn_pretrain.data.batched_views import make_batched_views
from msn_pretrain.data.sampler import Batch, Order
from msn_pretrain.data.views import ViewKind, ViewParameters, draw_for_batch, make_views

_WORKER_TIMEOUT_SECONDS = 300.0
_BATCHES_PER_WORKER = 2
_CACHED_BYTES = 1 << 19  # of values that a core normalises at a time
_KEPT = "Snapshots are kept; the same command continues from the last one."


@dataclass(frozen=True, kw_only=True)
class ViewBatch:
    """The views of one rank's images at one step.

    Attributes:
        batch: The images.
        views: For each kind (count * b, 3, pixels, pixels) uint8, view-major.
    """

    batch: Batch
    views: tuple[Tensor, ...]


@dataclass(frozen=True, kw_only=True)
class ViewList:
    """Images, and the views to make of them.

    Attributes:
        images: The training images.
        kinds: Kinds of views.
        seed: Seed of the views.
        batched: Make them on `device`, in batches on a GPU (batched_views.py), instead of where they are decoded.
        device: Where the views are needed.
    """

    images: ImageSet
    kinds: tuple[ViewKind, ...]
    seed: int
    batched: bool
    device: torch.device


def load_views(
    view_list: ViewList, order: Order, *, first_step: int, steps: int, workers: int, pinned: bool = False
) -> Iterator[ViewBatch]:
    """Yield this rank's batches from `first_step` to `steps - 1`, with their views on the device.

    A GPU copies them on a stream of its own, while it computes what was queued before. Uses no global random generator.

    Args:
        view_list: Images and views.
        order: Sampling order.
        first_step: First step.
        steps: Number of steps of the run.
        workers: Processes that read, decode and, unless views are batched, make views; 0 for none, and fewer
            if shared memory is short.
        pinned: Whether batches of the workers go to a GPU through page-locked memory.

    Raises:
        DataError: An image cannot be used.
        ResourceError: A worker died or hangs.
    """
    dataset = _BatchDataset(view_list, order, first_step, steps)
    if workers:
        batch_bytes = order.batch_size // order.world * _item_bytes(view_list)
        workers = affordable_workers(workers, batch_bytes=batch_bytes)
    if workers == 0:
        prepared: Iterator[_Prepared] = iter(dataset)
    else:
        loader = DataLoader(
            dataset,
            batch_size=None,
            num_workers=workers,
            prefetch_factor=_BATCHES_PER_WORKER,
            worker_init_fn=_init_worker,
            timeout=_WORKER_TIMEOUT_SECONDS,
            generator=torch.Generator(),  # otherwise it draws the workers' seed from the global generator
            pin_memory=pinned and view_list.device.type == "cuda",
        )
        prepared = iter(loader)
    cuda = view_list.device.type == "cuda"
    uploads = torch.cuda.Stream(view_list.device) if cuda else None  # type: ignore[no-untyped-call]
    for step in range(first_step, steps):
        try:
            item = next(prepared, None)
        except RuntimeError as error:
            raise ResourceError(
                f"a loader worker died or hung: {str(error).partition(chr(10))[0]}",
                hint="Host memory or /dev/shm may be short: try data.workers=0 or a smaller batch.",
                kept=_KEPT,
            ) from error
        if item is None or item[0].step != step:  # torch goes on without a batch that a worker could not send
            raise ResourceError(
                f"a loader worker lost the batch of step {step}",
                hint="Open files may be short: raise the limit (ulimit -n), or try data.workers=0.",
                kept=_KEPT,
            )
        yield _move_to_device(view_list, item, uploads)


def _item_bytes(view_list: ViewList) -> int:
    """Return the bytes that a worker sends for one image; an estimate by the first image if views are made on the device."""
    if view_list.batched:
        return _decode(view_list.images, 0).nbytes
    return sum(3 * kind.count * kind.pixels**2 for kind in view_list.kinds)


# The views of each kind, and an error. If views are made on the device: all images in one buffer, since each tensor that a
# worker sends takes a file descriptor, and their sizes.
_Prepared = tuple[Batch, list[Tensor], str | None]


@dataclass(frozen=True)
class _BatchDataset(IterableDataset[_Prepared]):
    """Every n-th batch for each of n workers. DataLoader asks its workers in turn, so batches come in order."""

    view_list: ViewList
    order: Order
    first_step: int
    steps: int

    def __iter__(self) -> Iterator[_Prepared]:
        worker = get_worker_info()
        number, count = (worker.id, worker.num_workers) if worker is not None else (0, 1)
        for batch in self.order.batches(self.first_step, self.steps):
            if (batch.step - self.first_step) % count == number:
                yield _prepare(self.view_list, batch)


def _prepare(view_list: ViewList, batch: Batch) -> _Prepared:
    try:
        images = [_decode(view_list.images, number) for number in batch.images.tolist()]
    except DataError as error:  # our exceptions cannot be pickled out of a worker
        return batch, [], str(error)
    sizes = torch.tensor([image.shape[:2] for image in images])
    if view_list.batched:
        return batch, [torch.cat([image.view(-1, 3) for image in images]), sizes], None
    return batch, [make_views(images, parameters, kind) for kind, parameters in _draw(view_list, sizes, batch)], None


def _decode(images: ImageSet, number: int) -> Tensor:
    """Read one image as (height, width, 3) uint8."""
    image_id, source = images.ids[number], images.source
    try:
        content = read_image(source, image_id)
        return decode_tensor(content) if source.root is not None else torch.from_numpy(np.array(source.decode(content)))
    except (BadImageError, OSError) as error:
        raise DataError(
            f"cannot be read: {error}",
            where=images.source.place(image_id),
            hint="Repair or remove the image; `msn-eval data verify DIR` lists all bad images.",
        ) from error


def _draw(view_list: ViewList, sizes: Tensor, batch: Batch) -> Iterator[tuple[ViewKind, ViewParameters]]:
    """Yield each kind of views with its parameters."""
    draw = partial(draw_for_batch, sizes.numpy(), seed=view_list.seed, epoch=batch.epoch, numbers=batch.images)
    first_view = 0
    for kind in view_list.kinds:
        yield kind, draw(kind, first_view=first_view)
        first_view += kind.count


def _move_to_device(view_list: ViewList, item: _Prepared, uploads: torch.cuda.Stream | None) -> ViewBatch:
    batch, made, problem = item
    if problem is not None:
        raise DataError(problem)
    with torch.cuda.stream(uploads):  # does nothing on a CPU
        tensors = made[:1] if view_list.batched else made
        views = [tensor.to(view_list.device, non_blocking=True) for tensor in tensors]
    if uploads is not None:
        for tensor in views:
            await_upload(tensor, uploads)
    if view_list.batched:
        make = partial(make_views_on, views[0], made[1].numpy())
        views = [make(parameters, kind) for kind, parameters in _draw(view_list, made[1], batch)]
    return ViewBatch(batch=batch, views=tuple(views))


def make_views_on(pixels: Tensor, sizes: NDArray[np.int64], parameters: ViewParameters, kind: ViewKind) -> Tensor:
    """Make all views of one kind on the device of the pixels: one by one on a CPU, else in batches.

    Args:
        pixels: (p, 3) uint8, the pixels of b images, row by row, one image after the other.
        sizes: (b, 2), their heights and widths.
        parameters: Parameters of count * b views, view-major.
        kind: The kind of the views.

    Returns:
        (count * b, 3, pixels, pixels) uint8, view-major.
    """
    if pixels.device.type != "cpu":
        return make_batched_views(pixels, sizes, parameters, kind)
    flat = torch.split(pixels, sizes.prod(axis=1).tolist())
    images = [image.view(*size, 3) for image, size in zip(flat, sizes.tolist(), strict=True)]
    return make_views(images, parameters, kind)


def _init_worker(number: int) -> None:
    """Ignore signals that a launcher sends to every process, as the parent handles them. Use one thread."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)


def normalise(views: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Scale views to [0, 1], subtract `mean` and divide by `std`.

    Args:
        views: (n, 3, pixels, pixels) uint8.
        mean: One value per channel.
        std: One value per channel.

    Returns:
        (n, 3, pixels, pixels) float32.
    """
    shift, scale = (255 * torch.tensor([mean, std])).to(views.device, non_blocking=True).view(2, 1, 3, 1, 1)
    values = torch.empty(views.shape, device=views.device)
    count = max(1, _CACHED_BYTES // values[0].nbytes) if views.device.type == "cpu" else len(views)
    for part, source in zip(torch.split(values, count), torch.split(views, count), strict=True):
        torch.sub(source, shift, out=part).div_(scale)
    return values
