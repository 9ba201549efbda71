"""ImageInfo: what is known of an image once it was read and decoded, here or in worker processes. Needs no torch."""

import contextlib
import hashlib
import io
import multiprocessing
import signal
import warnings
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor, TimeoutError
from dataclasses import dataclass, replace

from PIL import ExifTags, Image

from msn_eval.data.images import FORMATS, BadImageError, ImageSet, ImageSource, read_image
from msn_eval.errors import ResourceError
from msn_eval.process import usable_cores

Progress = Callable[[str, int, int], None]  # the split, images done, images in all

_FEW_IMAGES = 512  # below, starting workers costs more than they save
_MOST_WORKERS = 16
_IMAGES_PER_TASK = 64
_TASK_SECONDS = 600.0
_SHOWN = 5


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageInfo:
    """What is known of one image."""

    sha256: str | None = None  # of its bytes, None where they could not be read
    kind: str = ""  # format and mode, such as `JPEG RGB`; empty where unknown
    size: tuple[int, int] | None = None  # width and height in pixels, None where unknown
    orientation: int = 1  # EXIF's
    damaged_exif: bool = False  # whether the EXIF block cannot be read in full
    problem: str = ""  # why it cannot be used; empty where it can


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
    info = ImageInfo(sha256=hashlib.sha256(content).hexdigest())
    orientation: object = None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            image = Image.open(io.BytesIO(content), formats=FORMATS)
        except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError):
            return info
        with contextlib.suppress(Exception):  # the parser raises errors without a common base on damaged blocks
            orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    return replace(
        info,
        kind=f"{image.format} {image.mode}",
        size=image.size,
        orientation=orientation if isinstance(orientation, int) else 1,
        damaged_exif=orientation is None or any("exif" in str(warning.message).lower() for warning in caught),
    )


def inspect_images(
    split: str, images: ImageSet, *, workers: int | None = None, on_progress: Progress | None = None
) -> Iterator[ImageInfo]:
    """Yield the info of each image, in the order of the set.

    Decodes in this process if `workers` is 0 (None: for few images). Raises ResourceError where a process dies or hangs.
    """
    if workers is None:
        workers = 0 if len(images) < _FEW_IMAGES else min(_MOST_WORKERS, usable_cores())
    here = (inspect_image(images.source, image_id) for image_id in images.ids)
    infos = _inspect_in_processes(split, images, workers) if workers else here
    with contextlib.closing(infos):
        for done, info in enumerate(infos, start=1):
            if on_progress and (not workers or done % _IMAGES_PER_TASK == 0 or done == len(images)):
                on_progress(split, done, len(images))
            yield info


def _inspect_in_processes(split: str, images: ImageSet, workers: int) -> Generator[ImageInfo, None, None]:
    tasks = [images.ids[first : first + _IMAGES_PER_TASK] for first in range(0, len(images), _IMAGES_PER_TASK)]
    # Spawned, not forked: a progress bar and Arrow have threads of their own, whose locks a fork would inherit.
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _start_worker, (images.source,)) as pool:
        futures = [pool.submit(_inspect_task, task) for task in tasks]
        try:
            for future in futures:
                yield from future.result(timeout=_TASK_SECONDS)
        except BaseException as error:
            unfinished = [i for i, future in enumerate(futures) if not future.done() or future.exception()][:workers]
            for child in multiprocessing.active_children():  # one of them may hang, and their results are not needed
                child.kill()
            if not isinstance(error, BrokenExecutor | TimeoutError):
                raise
            places = [f"  {images.source.place(image_id)}" for i in unfinished for image_id in tasks[i]]
            places[_SHOWN:] = [f"  and {len(places) - _SHOWN} more"] if len(places) > _SHOWN else []
            what = f"hung for {_TASK_SECONDS:.0f} s" if isinstance(error, TimeoutError) else "died"
            raise ResourceError(
                "\n".join((f"a process that decodes images of {split} {what}, at one of these or near them:", *places)),
                hint="Host memory may be short, or the disk may have failed: try fewer --workers, or 0 to see which image it is.",
            ) from error


_sources: list[ImageSource] = []  # of a worker process: one


def _start_worker(source: ImageSource) -> None:
    """Receive the images' source once, and leave Ctrl-C to the parent."""
    _sources.append(source)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _inspect_task(image_ids: Sequence[str]) -> list[ImageInfo]:
    return [inspect_image(_sources[0], image_id) for image_id in image_ids]
