"""ImageInfo: what is known of an image once it was read and decoded, here or in worker processes. Needs no torch."""

import contextlib
import hashlib
import io
import multiprocessing
import signal
import warnings
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, TimeoutError
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from itertools import islice

from PIL import Image

from msn_eval.data.images import FORMATS, BadImageError, ImageSet, ImageSource, read_image
from msn_eval.errors import ResourceError
from msn_eval.process import usable_cores

Progress = Callable[[str, int, int], None]  # the split, images done, images in all

_FEW_IMAGES = 512  # below, starting workers costs more than they save
_MOST_WORKERS = 16
_IMAGES_PER_TASK = 64
_TASK_SECONDS = 600.0
_SHOWN = 5
_ORIENTATION = 0x0112  # EXIF's tag


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageInfo:
    """What is known of one image.

    Attributes:
        digest: SHA-256 of its bytes, None where they could not be read.
        kind: Format and mode, such as `JPEG RGB`; empty where unknown.
        size: Width and height in pixels, None where unknown.
        orientation: EXIF's, 1 where there is none.
        damaged_exif: Whether its EXIF block cannot be read in full.
        problem: Why it cannot be used; empty where it can.
    """

    digest: bytes | None = None
    kind: str = ""
    size: tuple[int, int] | None = None
    orientation: int = 1
    damaged_exif: bool = False
    problem: str = ""


def inspect_image(source: ImageSource, image_id: str) -> ImageInfo:
    """Read and decode one image."""
    try:
        content = read_image(source, image_id)
    except OSError as error:
        return ImageInfo(problem=f"cannot be read: {error.strerror or error}")
    info = _inspect_header(content)
    try:
        decoded = source.decode(content)
    except BadImageError as error:
        return replace(info, problem=str(error))
    # Embedded images are pixels without a file format.
    return info if info.kind else replace(info, kind=f"raw {decoded.mode}", size=decoded.size)


def _inspect_header(content: bytes) -> ImageInfo:
    """Return what can be known without decoding the pixels."""
    info = ImageInfo(digest=hashlib.sha256(content).digest())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            image = Image.open(io.BytesIO(content), formats=FORMATS)
        except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError):
            return info
        orientation, damaged = 1, False
        try:
            orientation = image.getexif().get(_ORIENTATION, 1)
        except Exception:  # the parser raises errors without a common base on damaged blocks
            damaged = True
    return replace(
        info,
        kind=f"{image.format} {image.mode}",
        size=image.size,
        orientation=orientation if isinstance(orientation, int) else 1,
        damaged_exif=damaged or any("exif" in str(warning.message).lower() for warning in caught),
    )


def inspect_images(
    split: str, images: ImageSet, *, workers: int | None = None, on_progress: Progress | None = None
) -> Iterator[ImageInfo]:
    """Yield the info of each image, in the order of the set.

    Args:
        split: Name of the split, for progress and errors.
        images: The images.
        workers: Processes; 0 decodes in this one, None means 0 for few images, else one per core.
        on_progress: Called with the split, the images done and the images in all.

    Raises:
        ResourceError: A process died or hangs. The text names the images that it may have been reading.
    """
    if workers is None:
        workers = 0 if len(images) < _FEW_IMAGES else min(_MOST_WORKERS, usable_cores())
    if workers:
        infos = _inspect_in_processes(split, images, workers)
    else:
        infos = (inspect_image(images.source, image_id) for image_id in images.ids)
    with contextlib.closing(infos):
        for done, info in enumerate(infos):
            if on_progress and (not workers or done % _IMAGES_PER_TASK == 0):
                on_progress(split, done, len(images))
            yield info
    if on_progress:
        on_progress(split, len(images), len(images))


def _inspect_in_processes(split: str, images: ImageSet, workers: int) -> Generator[ImageInfo, None, None]:
    # Spawned, not forked: a progress bar and Arrow have threads of their own, whose locks a fork would inherit.
    spawn = multiprocessing.get_context("spawn")
    before = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(workers, spawn, initializer=_start_worker, initargs=(images.source,))
    tasks = [images.ids[first : first + _IMAGES_PER_TASK] for first in range(0, len(images), _IMAGES_PER_TASK)]
    pending = deque((task, pool.submit(_inspect_task, task)) for task in tasks)
    try:
        while pending:
            infos = pending[0][1].result(timeout=_TASK_SECONDS)
            pending.popleft()
            yield from infos
    except (BrokenProcessPool, TimeoutError) as error:
        unfinished = (task for task, future in pending if not future.done() or future.cancelled() or future.exception())
        places = [images.source.place(image_id) for task in islice(unfinished, workers) for image_id in task]
        more = f"\n  and {len(places) - _SHOWN} more" if len(places) > _SHOWN else ""
        shown = "\n".join(f"  {place}" for place in places[:_SHOWN])
        what = f"hung for {_TASK_SECONDS:.0f} s" if isinstance(error, TimeoutError) else "died"
        raise ResourceError(
            f"a process that decodes images of {split} {what}, at one of these or near them:\n{shown}{more}",
            hint="Host memory may be short, or the disk may have failed: try fewer --workers, "
            "or 0 to see which image it is.",
        ) from error
    finally:
        if pending:  # one of them may hang, and their results are not needed
            for child in set(multiprocessing.active_children()) - before:
                child.kill()
        pool.shutdown(wait=True, cancel_futures=True)


_source: ImageSource | None = None  # of a worker process


def _start_worker(source: ImageSource) -> None:
    """Receive the images' source once, and leave Ctrl-C to the parent."""
    global _source
    _source = source
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _inspect_task(image_ids: Sequence[str]) -> list[ImageInfo]:
    assert _source is not None
    return [inspect_image(_source, image_id) for image_id in image_ids]
