"""Batches of pixels: images read, proved to be those that were hashed, and decoded in worker processes."""

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
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from multiprocessing.pool import ThreadPool
from multiprocessing.process import BaseProcess
from types import FrameType
from typing import cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from msn_eval.data.augmentation import RandomCrops
from msn_eval.data.decoders import Pixels, decode_pixels, undecoded
from msn_eval.data.images import BadImageError, EvalTransform, ImageSource, read_image, resize_and_crop
from msn_eval.errors import ResourceError
from msn_eval.process import usable_cores

_log = logging.getLogger(__name__)
_MOST_WORKERS = 16
_FEW_IMAGES = 512  # below, starting workers costs more than they save
_WORKER_TIMEOUT_SECONDS = 300.0
_BATCHES_A_WORKER = 2  # kept ready, in shared memory
_SHARED_MEMORY = "/dev/shm"
_Loaded = tuple[bytes | Pixels, tuple[str, str] | None]
_Collated = tuple[Tensor | Sequence[bytes | Pixels], list[tuple[str, str]]]


@dataclass(frozen=True, kw_only=True)
class PixelList:
    """Images to be turned into pixels.

    hashes: SHA-256 of each image's bytes by id; an image that no longer has its hash is refused
    crops:  random ones instead of the transform's, by Pillow
    """

    source: ImageSource
    image_ids: Sequence[str]
    transform: EvalTransform
    hashes: Mapping[str, str] | None
    decoder: str = "pillow"
    crops: RandomCrops | None = None

    def __len__(self) -> int:
        return len(self.image_ids)


@dataclass(frozen=True, kw_only=True)
class PixelBatch:
    """A run of images, in the order of the list.

    pixels:   (b, S, S, 3) uint8, zeros for images that cannot be used; or, for a decoder that works on the device, what
              decode_on_device takes
    failures: ids of those, with the reasons
    """

    pixels: Tensor | Sequence[bytes | Pixels]
    failures: Sequence[tuple[str, str]]


def automatic_workers(images: PixelList, *, batch_size: int, cuda: bool) -> int:
    """Give the number of decoding processes: one a core beside a GPU, as far as shared memory has room for them; none for
    few or embedded images, nor on a CPU, where they would take turns with the encoder's threads."""
    if not cuda or len(images) < _FEW_IMAGES or images.source.root is None:
        return 0
    wanted = min(_MOST_WORKERS, usable_cores())
    room = _affordable_workers(batch_size * 3 * images.transform.crop**2)
    if room < wanted:
        _log.warning("%s has room for %d decoding processes instead of %d", _SHARED_MEMORY, room, wanted)
    return min(wanted, room)


def _affordable_workers(batch_bytes: int) -> int:
    try:
        status = os.statvfs(_SHARED_MEMORY)
    except OSError:  # a system without it shares memory in another way
        return _MOST_WORKERS
    return status.f_bavail * status.f_frsize // ((_BATCHES_A_WORKER + 1) * batch_bytes)


def load_pixels(images: PixelList, *, batch_size: int, workers: int, pinned: bool = False) -> Iterator[PixelBatch]:
    """Give all images in order, `batch_size` at a time.

    workers: decoding processes; 0 decodes here, all cores taking part, while the caller waits
    pinned:  in memory that a GPU can copy from while it computes
    Workers that die or hang are replaced once at the same place. Raises ResourceError naming the images that they were
    at where that does not help.
    """
    if workers == 0:
        yield from _decoded_here(images, batch_size)
        return
    done, stumbled_at = 0, -1
    with _deaths_told_when_asked() as asking:
        while done < len(images):
            rest = replace(images, image_ids=images.image_ids[done:])
            started = set(multiprocessing.active_children())
            at_hand = torch.full((workers,), -1).share_memory_()  # type: ignore[no-untyped-call]
            with _stops_deferred():
                batches = iter(_loader(_Pixels(rest, at_hand), batch_size=batch_size, workers=workers, pinned=pinned))
            crew = [child for child in multiprocessing.active_children() if child not in started]
            try:
                while True:
                    with asking():
                        found = next(batches, None)
                    if found is None:
                        return
                    done += len(found[0])
                    yield PixelBatch(pixels=found[0], failures=found[1])
            except (RuntimeError, ConnectionError, EOFError) as error:
                reason = str(error).partition("\n")[0] or type(error).__name__
            _dismiss(crew)
            del batches  # and with it torch's memory of the dead
            places = [images.source.place(rest.image_ids[row]) for row in at_hand.tolist() if row >= 0]
            if done == stumbled_at:
                raise _worker_error(reason, places)
            _log.warning(
                "a decoding process died or hung (%s) at one of: %s; starting others", reason, ", ".join(places)
            )
            stumbled_at = done


@contextlib.contextmanager
def _stops_deferred() -> Iterator[None]:
    """Let Ctrl-C and SIGTERM wait until processes are forked: what a handler raises in the middle of that, Python drops."""
    came: list[int] = []
    before = {}
    if threading.current_thread() is threading.main_thread():
        for stop in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(stop) is not None:
                before[stop] = signal.signal(stop, lambda number, frame: came.append(number))
    try:
        yield
    finally:
        for stop, handler in before.items():
            signal.signal(stop, handler)
    for number in came[:1]:
        signal.raise_signal(number)


def _decoded_here(images: PixelList, batch_size: int) -> Iterator[PixelBatch]:
    """Decode in threads of this process: Pillow lets them run side by side, and none is left beside the encoder."""
    pixels = _Pixels(images, torch.empty(0))
    threads = usable_cores() if images.decoder == "pillow" else 1  # torch's operations have threads of their own
    with ThreadPool(threads) as pool:
        for first in range(0, len(images), batch_size):
            rows = range(first, min(first + batch_size, len(images)))
            try:
                found = _collate(pool.map_async(pixels.__getitem__, rows, chunksize=1).get(_WORKER_TIMEOUT_SECONDS))
            except multiprocessing.TimeoutError as error:
                faulthandler.dump_traceback()
                edges = [images.source.place(images.image_ids[row]) for row in (rows[0], rows[-1])]
                raise ResourceError(
                    f"nothing came for {_WORKER_TIMEOUT_SECONDS:g} s from some image between {edges[0]} and {edges[1]}",
                    hint="The disk or the network behind it may hang; the same command goes on once it answers.",
                ) from error
            yield PixelBatch(pixels=found[0], failures=found[1])


@dataclass
class _Ear:
    """Who hears of a worker's death in this process: torch, but only while it is asked.

    Torch tells by raising from a signal handler, wherever the main thread is just then: in the middle of the encoder's work,
    as a rule.
    """

    passes: int = 0
    asked: bool = False
    torchs_handler: object = None

    def hear(self, number: int, frame: FrameType | None) -> None:
        if self.asked and callable(self.torchs_handler):
            self.torchs_handler(number, frame)


_ear = _Ear()
_hear = _ear.hear  # one object, to be known again


@contextlib.contextmanager
def _deaths_told_when_asked() -> Iterator[Callable[[], contextlib.AbstractContextManager[None]]]:
    """Give a context in which a worker's death raises; outside of it, none does."""

    @contextlib.contextmanager
    def asking() -> Iterator[None]:
        if signal.getsignal(signal.SIGCHLD) is not _hear:  # torch sets its own with its first workers
            _ear.torchs_handler = signal.signal(signal.SIGCHLD, _hear)
        collecting = gc.isenabled()
        gc.disable()  # what the handler raises in the middle of a collection, Python drops
        _ear.asked = True
        try:
            _ear.hear(signal.SIGCHLD, None)  # of those who died meanwhile
            yield
        finally:
            _ear.asked = False
            if collecting:
                gc.enable()

    if not hasattr(signal, "SIGCHLD") or threading.current_thread() is not threading.main_thread():
        yield contextlib.nullcontext
        return
    _ear.passes += 1
    try:
        yield asking
    finally:
        _ear.passes -= 1
        # Passes may end in any order: one that was left unfinished ends whenever it is collected.
        if _ear.passes == 0 and signal.getsignal(signal.SIGCHLD) is _hear:
            signal.signal(signal.SIGCHLD, _ear.torchs_handler)  # type: ignore[arg-type]


def _dismiss(crew: Sequence[BaseProcess]) -> None:
    """End the processes of a loader, with the stack of each that still lives on stderr: one of them may hang."""
    for child in crew:
        if child.is_alive() and child.pid is not None and hasattr(signal, "SIGUSR1"):
            os.kill(child.pid, signal.SIGUSR1)
    time.sleep(0.2)
    for child in crew:
        child.kill()
        child.join()


def _worker_error(reason: str, places: Sequence[str]) -> ResourceError:
    listed = "\n".join(f"  {place}" for place in places)
    return ResourceError(
        f"a loader worker died or hung twice at the same place: {reason}\nThey were at these images:\n{listed}",
        hint=f"Host memory or {_SHARED_MEMORY} may be short: try --workers 0, or a smaller --batch-size.",
        kept="Features that were finished are kept; the same command goes on from there.",
    )


@dataclass(frozen=True)
class _Pixels(Dataset[_Loaded]):
    """The images as a loader wants them: pixels, or zeros and the reason why there are none.

    at_hand: (workers,) int64, shared: the row that each worker is at
    """

    images: PixelList
    at_hand: Tensor

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, row: int) -> _Loaded:
        images = self.images
        worker = get_worker_info()
        if worker is not None:
            self.at_hand[worker.id] = row
        image_id = images.image_ids[row]
        source = images.source
        try:
            content = read_image(source, image_id)
            if images.hashes is not None and hashlib.sha256(content).hexdigest() != images.hashes[image_id]:
                raise BadImageError("it changed since it was hashed; start again when nothing writes to the data set")
            return _decoded(content, images, image_id), None
        except (BadImageError, OSError) as error:
            side = images.transform.crop
            return np.zeros((side, side, 3), dtype=np.uint8), (image_id, str(error))


def _decoded(content: bytes, images: PixelList, image_id: str) -> bytes | Pixels:
    if images.crops is not None:
        return images.crops.crop(images.source.decode(content), image_id, images.transform.crop)
    if images.decoder == "pillow" or images.source.root is None:
        return resize_and_crop(images.source.decode(content), images.transform)
    if images.decoder == "nvjpeg":
        return undecoded(content, images.transform)
    return decode_pixels(content, images.transform, images.decoder)


def _collate(rows: Sequence[_Loaded]) -> _Collated:
    failures = [failure for _, failure in rows if failure is not None]
    decoded = [image for image, _ in rows if not isinstance(image, bytes)]
    if len(decoded) < len(rows):
        return [image for image, _ in rows], failures
    return torch.from_numpy(np.stack(decoded)), failures


def _loader(pixels: _Pixels, *, batch_size: int, workers: int, pinned: bool) -> "DataLoader[_Collated]":
    loader = DataLoader(
        pixels,
        batch_size=batch_size,
        num_workers=workers,
        collate_fn=_collate,
        pin_memory=pinned,
        prefetch_factor=_BATCHES_A_WORKER,
        worker_init_fn=_become_worker,
        timeout=_WORKER_TIMEOUT_SECONDS,
    )
    return cast("DataLoader[_Collated]", loader)


def _become_worker(number: int) -> None:
    """Leave it to the parent to act upon signals that a launcher sends to every process of a job."""
    for name in ("SIGTERM", "SIGINT"):
        signal.signal(getattr(signal, name), signal.SIG_IGN)
    if hasattr(signal, "SIGUSR1"):
        faulthandler.register(signal.SIGUSR1)
