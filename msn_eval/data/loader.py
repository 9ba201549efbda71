"""Batches of pixels: images read, compared with their hashes, and decoded in worker processes."""

import contextlib
import faulthandler
import gc
import hashlib
import logging
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from multiprocessing.pool import ThreadPool
from multiprocessing.process import BaseProcess
from types import FrameType
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from msn_eval.data.augmentation import RandomCrops
from msn_eval.data.decoders import Pixels, decode_pixels, prepare_for_device
from msn_eval.data.images import (
    BadImageError,
    EvalTransform,
    ImageSource,
    make_resource_error,
    read_image,
    resize_and_crop,
)
from msn_eval.errors import ResourceError
from msn_eval.process import affordable_workers, cores_per_rank

_log = logging.getLogger(__name__)
_MOST_WORKERS = 16
_FEW_IMAGES = 512  # below, starting workers costs more than they save
_WORKER_TIMEOUT_SECONDS = 300.0
_BATCHES_PER_WORKER = 2  # kept ready
_Loaded = tuple[bytes | Pixels, tuple[str, str] | None] | ResourceError


@dataclass(frozen=True, kw_only=True)
class PixelList:
    """Images to be turned into pixels.

    Attributes:
        source: Reads and decodes the images.
        image_ids: The images, in order.
        transform: Resize and crop.
        hashes: SHA-256 of each image's bytes by id, or None. An image with a different hash is refused.
        decoder: Name of the decoder.
        crops: Random crops, by Pillow, instead of the transform's.
    """

    source: ImageSource
    image_ids: Sequence[str]
    transform: EvalTransform
    hashes: Mapping[str, str] | None
    decoder: str = "pillow"
    crops: RandomCrops | None = None

    def __len__(self) -> int:
        return len(self.image_ids)


class PixelBatch(NamedTuple):
    """Consecutive images of a list.

    Attributes:
        pixels: (b, S, S, 3) uint8, zeros for images that cannot be used. For a decoder that works on the device, the input
            of `decode_on_device`.
        failures: Ids of these images, with the reasons.
    """

    pixels: Tensor | Sequence[bytes | Pixels]
    failures: Sequence[tuple[str, str]]


def automatic_workers(images: PixelList, *, batch_size: int, cuda: bool) -> int:
    """Return the number of decoding processes.

    It is one per core of this rank beside a GPU; none for few or embedded images, nor on a CPU, where they would compete with
    the encoder's threads.
    """
    if not cuda or len(images) < _FEW_IMAGES or images.source.root is None:
        return 0
    return affordable_workers(min(_MOST_WORKERS, cores_per_rank()), batch_bytes=_batch_bytes(images, batch_size))


def _batch_bytes(images: PixelList, batch_size: int) -> int:
    return min(batch_size, len(images)) * 3 * images.transform.crop**2


def load_pixels(images: PixelList, *, batch_size: int, workers: int, pinned: bool = False) -> Iterator[PixelBatch]:
    """Yield all images in order, `batch_size` at a time.

    Workers that die or hang are replaced once at the same image.

    Args:
        images: The images.
        batch_size: Images per batch.
        workers: Decoding processes, fewer if shared memory is short; 0 decodes in threads of this process while the caller waits.
        pinned: Whether to use memory that a GPU can copy from while it computes.

    Raises:
        ResourceError: Workers died or hung twice. The text names the images that they were reading.
    """
    workers = affordable_workers(workers, batch_bytes=_batch_bytes(images, batch_size)) if workers else 0
    if workers == 0:
        yield from _load_in_threads(images, batch_size)
        return
    done, failed_at = 0, -1
    with _sigchld.load_pass():
        while done < len(images):
            rest = replace(images, image_ids=images.image_ids[done:])
            before = set(multiprocessing.active_children())
            current_rows = torch.full((workers,), -1).share_memory_()  # type: ignore[no-untyped-call]
            try:
                with _defer_stop_signals():
                    batches = iter(
                        DataLoader(
                            _PixelDataset(rest, current_rows),
                            batch_size=batch_size,
                            num_workers=workers,
                            collate_fn=_collate,
                            pin_memory=pinned,
                            prefetch_factor=_BATCHES_PER_WORKER,
                            worker_init_fn=_start_worker,
                            timeout=_WORKER_TIMEOUT_SECONDS,
                        )
                    )
            except (OSError, RuntimeError) as error:
                _end_workers([child for child in multiprocessing.active_children() if child not in before])
                raise make_resource_error(error, "decoding processes cannot be started") or error from error
            children = [child for child in multiprocessing.active_children() if child not in before]
            try:
                while True:
                    # Torch does not notice a dead process that `active_children` of another pass has waited for.
                    if dead := [child for child in children if child.exitcode]:
                        raise RuntimeError(f"process {dead[0].pid} ended with exit code {dead[0].exitcode}")
                    with _sigchld.await_batch():
                        batch = next(batches, None)
                    if batch is None:
                        return
                    if isinstance(batch, ResourceError):
                        _end_workers(children)  # the error's frames keep their loader alive
                        raise batch
                    done += len(batch.pixels)
                    yield batch
            except (RuntimeError, ConnectionError, EOFError) as error:
                reason = str(error).partition("\n")[0] or type(error).__name__
            _kill_workers(children)
            del batches  # torch forgets the dead workers with it
            places = [images.source.place(rest.image_ids[row]) for row in current_rows.tolist() if row >= 0]
            if done == failed_at:
                listed = "\n".join(f"  {place}" for place in places)
                raise ResourceError(
                    f"a loader worker died or hung twice at the same place: {reason}\n"
                    f"They were reading these images:\n{listed}",
                    hint="Memory, /dev/shm or open files may be short: try --workers 0, or a smaller --batch-size.",
                    kept="Finished features are kept; the same command continues from there.",
                )
            _log.warning(
                "a decoding process died or hung (%s) at one of: %s; starting new ones", reason, ", ".join(places)
            )
            failed_at = done


@contextlib.contextmanager
def _defer_stop_signals() -> Iterator[None]:
    """Defer Ctrl-C and SIGTERM until processes are forked: Python drops what a handler raises during a fork."""
    received: list[int] = []
    handlers = {}
    if _in_main_thread():
        for stop in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(stop) is not None:
                handlers[stop] = signal.signal(stop, lambda number, frame: received.append(number))
    try:
        yield
    finally:
        for stop, handler in handlers.items():
            signal.signal(stop, handler)
    if received:
        signal.raise_signal(received[0])


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


def _load_in_threads(images: PixelList, batch_size: int) -> Iterator[PixelBatch]:
    dataset = _PixelDataset(images, torch.empty(0))
    # Pillow releases the interpreter lock; torch's operations have threads of their own.
    threads = cores_per_rank() if images.decoder == "pillow" else 1
    with _start_threads(threads) as pool:
        for first in range(0, len(images), batch_size):
            rows = range(first, min(first + batch_size, len(images)))
            try:
                loaded = pool.map_async(dataset.__getitem__, rows, chunksize=1).get(_WORKER_TIMEOUT_SECONDS)
            except multiprocessing.TimeoutError as error:
                faulthandler.dump_traceback()
                edges = [images.source.place(images.image_ids[row]) for row in (rows[0], rows[-1])]
                raise ResourceError(
                    f"no image arrived for {_WORKER_TIMEOUT_SECONDS:g} s, between {edges[0]} and {edges[1]}",
                    hint="The disk or the network behind it may hang; the same command continues once it answers.",
                ) from error
            batch = _collate(loaded)
            if isinstance(batch, ResourceError):
                raise batch
            yield batch


def _start_threads(count: int) -> ThreadPool:
    try:
        return ThreadPool(count)
    except OSError as error:
        what = f"threads have no shared memory for their locks: {error.strerror}"
        hint = "It must be writable and have free space: docker run --shm-size 1g, for example."
        raise ResourceError(what, where="/dev/shm", hint=hint) from error


class _SigchldMonitor:
    """Lets torch raise a worker's death only while a batch is awaited.

    Torch raises from a signal handler, wherever the main thread is at that moment: usually in the encoder's computation.
    """

    def __init__(self) -> None:
        self.passes = 0
        self.is_waiting = False
        self.torch_handler: object = None

    def handle(self, number: int, frame: FrameType | None) -> None:
        if self.is_waiting and callable(self.torch_handler):
            self.torch_handler(number, frame)

    @contextlib.contextmanager
    def load_pass(self) -> Iterator[None]:
        """Restore torch's handler after the last pass that ends; passes may end in any order."""
        if not _in_main_thread():
            yield
            return
        self.passes += 1
        try:
            yield
        finally:
            self.passes -= 1
            if self.passes == 0 and signal.getsignal(signal.SIGCHLD) == self.handle:
                signal.signal(signal.SIGCHLD, self.torch_handler)  # type: ignore[arg-type]

    @contextlib.contextmanager
    def await_batch(self) -> Iterator[None]:
        """Let a worker's death raise within this context, one that happened before it too."""
        if not _in_main_thread():
            yield
            return
        if signal.getsignal(signal.SIGCHLD) != self.handle:  # torch sets its own with its first workers
            self.torch_handler = signal.signal(signal.SIGCHLD, self.handle)
        was_collecting = gc.isenabled()
        gc.disable()  # Python drops what the handler raises during a collection
        self.is_waiting = True
        try:
            self.handle(signal.SIGCHLD, None)
            yield
        finally:
            self.is_waiting = False
            if was_collecting:
                gc.enable()


_sigchld = _SigchldMonitor()


def _kill_workers(children: Sequence[BaseProcess]) -> None:
    """Kill the processes of a loader; each that is alive first writes its stack to stderr, since it may hang."""
    for child in children:
        if child.is_alive() and child.pid is not None:
            os.kill(child.pid, signal.SIGUSR1)
    time.sleep(0.2)
    _end_workers(children)


def _end_workers(children: Sequence[BaseProcess]) -> None:
    """Kill the processes of a loader. They ignore SIGTERM, so that the program would wait for them at its end."""
    for child in children:
        child.kill()
        child.join()


@dataclass(frozen=True)
class _PixelDataset(Dataset[_Loaded]):
    """Pixels by row, or zeros and the reason why there are none.

    Attributes:
        images: The images.
        current_rows: (workers,) int64, shared: the row that each worker is reading.
    """

    images: PixelList
    current_rows: Tensor

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, row: int) -> _Loaded:
        images = self.images
        worker = get_worker_info()
        if worker is not None:
            self.current_rows[worker.id] = row
        image_id = images.image_ids[row]
        try:
            content = read_image(images.source, image_id)
            if images.hashes is not None and hashlib.sha256(content).hexdigest() != images.hashes[image_id]:
                raise BadImageError("it changed since it was hashed; start again when nothing writes to the data set")
            return _decode(content, images, image_id), None
        except (BadImageError, OSError) as error:
            side = images.transform.crop
            return np.zeros((side, side, 3), dtype=np.uint8), (image_id, getattr(error, "strerror", None) or str(error))
        except ResourceError as error:  # returned, since torch would raise it again with the stack as its text
            return error
        except MemoryError as error:
            return make_resource_error(error, images.source.place(image_id)) or ResourceError("out of memory")


def _decode(content: bytes, images: PixelList, image_id: str) -> bytes | Pixels:
    if images.crops is not None:
        return images.crops.crop(images.source.decode(content), image_id, images.transform.crop)
    if images.decoder == "pillow" or images.source.root is None:
        return resize_and_crop(images.source.decode(content), images.transform)
    if images.decoder == "nvjpeg":
        return prepare_for_device(content, images.transform)
    return decode_pixels(content, images.transform, images.decoder)


def _collate(loaded: Sequence[_Loaded]) -> PixelBatch | ResourceError:
    rows = []
    for row in loaded:
        if isinstance(row, ResourceError):
            return row
        rows.append(row)
    failures = [failure for _, failure in rows if failure is not None]
    decoded = [image for image, _ in rows if not isinstance(image, bytes)]
    if len(decoded) < len(rows):
        return PixelBatch([image for image, _ in rows], failures)
    return PixelBatch(torch.from_numpy(np.stack(decoded)), failures)


def _start_worker(number: int) -> None:
    """Leave signals that a launcher sends to every process of a job to the parent."""
    for stop in (signal.SIGTERM, signal.SIGINT):
        signal.signal(stop, signal.SIG_IGN)
    faulthandler.register(signal.SIGUSR1)
