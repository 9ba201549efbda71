"""ImageFacts: what an image turned out to be when it was read and decoded, here or in worker processes. Needs no torch."""

import hashlib
import io
import multiprocessing
import signal
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, TimeoutError
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass

from PIL import Image, UnidentifiedImageError

from msn_eval.data.images import FORMATS, BadImageError, ImageSet, ImageSource, read_image
from msn_eval.errors import ResourceError
from msn_eval.process import usable_cores

Progress = Callable[[str, int, int], None]  # the split, images done, images in all

_FEW_IMAGES = 512  # below, starting workers costs more than they save
_MOST_WORKERS = 16
_IMAGES_A_TASK = 64
_TASKS_A_WORKER = 3  # handed out ahead
_TASK_SECONDS = 600.0
_SHOWN = 5
_ORIENTATION = 0x0112  # EXIF's tag


@dataclass(frozen=True, kw_only=True)
class ImageInfo:
    """What one image turned out to be.

    digest:       SHA-256 of its bytes, None where they could not be read
    kind:         format and mode, such as `JPEG RGB`; empty where there is no telling
    size:         width and height in pixels
    orientation:  EXIF's, 1 where there is none
    damaged_exif: whether its EXIF block cannot be read in full
    problem:      why it cannot be used; empty where it can
    """

    digest: bytes | None = None
    kind: str = ""
    size: tuple[int, int] | None = None
    orientation: int = 1
    damaged_exif: bool = False
    problem: str = ""


def inspect_image(source: ImageSource, image_id: str) -> ImageInfo:
    """Read and decode one image, and say what it is."""
    try:
        content = read_image(source, image_id)
    except OSError as error:
        return ImageInfo(problem=f"cannot be read: {error.strerror or error}")
    digest = hashlib.sha256(content).digest()
    kind, size, orientation, damaged_exif = _read_header(content)
    problem = ""
    try:
        decoded = source.decode(content)
        if not kind:  # pixels without a file around them
            kind, size = f"raw {decoded.mode}", decoded.size
    except BadImageError as error:
        problem = str(error)
    return ImageInfo(
        digest=digest, kind=kind, size=size, orientation=orientation, damaged_exif=damaged_exif, problem=problem
    )


def _read_header(content: bytes) -> tuple[str, tuple[int, int] | None, int, bool]:
    """Give kind, size, EXIF orientation and whether EXIF is damaged, as far as they can be told without the pixels."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            image = Image.open(io.BytesIO(content), formats=FORMATS)
        except (UnidentifiedImageError, OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError):
            return "", None, 1, False
        damaged = False
        orientation: object = 1
        try:
            orientation = image.getexif().get(_ORIENTATION, 1)
        except Exception:  # its parser has no common base for what it raises on damaged blocks
            damaged = True
        damaged = damaged or any("exif" in str(warning.message).lower() for warning in said)
        turned = orientation if isinstance(orientation, int) else 1
        return f"{image.format} {image.mode}", image.size, turned, damaged


def inspect_images(
    split: str, images: ImageSet, *, workers: int | None = None, on_progress: Progress | None = None
) -> Iterator[ImageInfo]:
    """Give what each image is, in the order of the set, from `workers` processes, or this one where that is 0."""
    tell = on_progress or _tell_nobody
    if workers is None:
        workers = automatic_workers(len(images))
    if workers == 0:
        for done, image_id in enumerate(images.ids):
            tell(split, done, len(images))
            yield inspect_image(images.source, image_id)
    else:
        yield from _look_in_processes(split, images, workers, tell)
    tell(split, len(images), len(images))


def automatic_workers(images: int) -> int:
    """Give the number of processes: none for few images, else one a core."""
    if images < _FEW_IMAGES:
        return 0
    return min(_MOST_WORKERS, usable_cores())


def _tell_nobody(split: str, done: int, total: int) -> None:
    """Take the news where nobody wants them."""


def _look_in_processes(split: str, images: ImageSet, workers: int, tell: Progress) -> Iterator[ImageInfo]:
    # Fresh processes, not forks: a progress bar and Arrow have threads of their own, whose locks a fork would inherit.
    fresh = multiprocessing.get_context("spawn")
    before = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(workers, fresh, initializer=_become_worker, initargs=(images.source,))
    tasks = iter([images.ids[first : first + _IMAGES_A_TASK] for first in range(0, len(images), _IMAGES_A_TASK)])
    ahead: deque[tuple[Sequence[str], Future[list[ImageInfo]]]] = deque()
    done, ended = 0, False
    try:
        while True:
            while len(ahead) < workers * _TASKS_A_WORKER and (task := next(tasks, None)) is not None:
                ahead.append((task, pool.submit(_look_at_some, task)))
            if not ahead:
                break
            found = ahead[0][1].result(timeout=_TASK_SECONDS)
            ahead.popleft()
            yield from found
            done += len(found)
            tell(split, done, len(images))
        ended = True
    except (BrokenProcessPool, TimeoutError) as error:
        raise _worker_error(
            split, images, error, [task for task, future in ahead if not _is_finished(future)]
        ) from error
    finally:
        crew = set(multiprocessing.active_children()) - before
        if not ended:  # one of them may hang; what they have found is of no use any more
            for child in crew:
                child.kill()
        pool.shutdown(wait=True, cancel_futures=True)


def _is_finished(future: "Future[list[ImageInfo]]") -> bool:
    return future.done() and not future.cancelled() and future.exception() is None


def _worker_error(split: str, images: ImageSet, error: Exception, unfinished: Sequence[Sequence[str]]) -> ResourceError:
    places = [images.source.place(image_id) for task in unfinished for image_id in task]
    more = f"\n  and {len(places) - _SHOWN} more" if len(places) > _SHOWN else ""
    shown = "\n".join(f"  {place}" for place in places[:_SHOWN])
    what = f"hung for {_TASK_SECONDS:.0f} s" if isinstance(error, TimeoutError) else "died"
    return ResourceError(
        f"a process that decodes images of {split} {what}, at one of these or near them:\n{shown}{more}",
        hint="Host memory may be short, or the disk may have gone: try fewer --workers, or 0 to see which image it is.",
    )


_source: ImageSource | None = None  # of a worker process


def _become_worker(source: ImageSource) -> None:
    """Take the images' source once, and leave it to the parent to act upon Ctrl-C."""
    global _source
    _source = source
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _look_at_some(image_ids: Sequence[str]) -> list[ImageInfo]:
    assert _source is not None
    return [inspect_image(_source, image_id) for image_id in image_ids]
