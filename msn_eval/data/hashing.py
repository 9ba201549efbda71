"""SHA-256 of image files, remembered between runs by path, size, times and inode.

The memory is a shortcut and never the last word: whoever reads an image for its pixels hashes it again and compares.
"""

import hashlib
import json
import logging
import os
import re
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from msn_eval.data.images import ImageSet, Stamp, read_image
from msn_eval.errors import DataError, StoreError
from msn_eval.files.atomic import write_atomically

_log = logging.getLogger(__name__)
_THREADS = 8
_SETTLED_NS = 2_000_000_000  # the coarsest clock among file systems ticks every two seconds
_HASH = re.compile("[0-9a-f]{64}")


def hash_images(images: ImageSet, *, cache_dir: Path | None) -> dict[str, str]:
    """Give the SHA-256 of each image's bytes, by id.

    memory: a folder to remember hashes in, or None to hash everything
    Raises DataError listing every file that cannot be read.
    """
    started = time.time_ns()
    memory_file = _memory_file(images, cache_dir)
    known = _recall(memory_file)
    failures: list[str] = []

    def hash_one(image_id: str) -> tuple[str, Stamp | None]:
        try:
            stamp = images.source.stamp(image_id) if memory_file is not None else None
            remembered = known.get(image_id)
            if stamp is not None and remembered is not None and remembered[0] == stamp:
                return remembered[1], stamp
            return hashlib.sha256(read_image(images.source, image_id)).hexdigest(), stamp
        except OSError as error:
            failures.append(f"{images.source.place(image_id)}: {error.strerror or error}")
            return "", None

    with ThreadPoolExecutor(_THREADS) as pool:
        found = dict(zip(images.ids, pool.map(hash_one, images.ids), strict=True))
    if failures:
        raise unreadable(failures)
    fresh = {
        image_id: (stamp, digest)
        for image_id, (digest, stamp) in found.items()
        if stamp is not None and max(stamp[1:3], default=0) + _SETTLED_NS <= started  # else it could change unseen
    }
    if memory_file is not None and any(known.get(image_id) != entry for image_id, entry in fresh.items()):
        try:
            write_atomically(memory_file, json.dumps(known | fresh).encode())
        except StoreError as error:  # it would only have saved time
            _log.warning("hashes of image files are not remembered: %s", error)
    return {image_id: digest for image_id, (digest, _) in found.items()}


def content_sha256(image_ids: Sequence[str], hashes: dict[str, str]) -> str:
    """Give the SHA-256 of the lines `id TAB sha256(file bytes)`, in the order given."""
    whole = hashlib.sha256()
    for image_id in image_ids:
        whole.update(os.fsencode(image_id) + b"\t" + hashes[image_id].encode() + b"\n")
    return whole.hexdigest()


def unreadable(failures: Sequence[str]) -> DataError:
    """Give the error that lists every image of a pass that could not be used."""
    listed = "\n".join(f"  {failure}" for failure in sorted(failures))
    return DataError(
        f"{len(failures)} image{'s' if len(failures) > 1 else ''} cannot be used:\n{listed}",
        hint="Repair or remove them, or pass --on-bad-image skip to score without them (they are counted).",
    )


def _memory_file(images: ImageSet, cache_dir: Path | None) -> Path | None:
    root = images.source.root
    if cache_dir is None or root is None:
        return None
    folder = cache_dir / "hashes"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        _log.warning("hashes of image files are not remembered: %s", error)
        return None
    return folder / f"{hashlib.sha256(os.fsencode(root.resolve())).hexdigest()[:16]}.json"


def _recall(memory_file: Path | None) -> dict[str, tuple[Stamp, str]]:
    """Read what was remembered; a memory that cannot be read is empty, since everything can be hashed again."""
    if memory_file is None or not memory_file.is_file():
        return {}
    try:
        content = json.loads(memory_file.read_bytes())
        return {
            image_id: (tuple(map(int, stamp)), digest)
            for image_id, (stamp, digest) in content.items()
            if _HASH.fullmatch(digest)
        }
    except (ValueError, TypeError, AttributeError, LookupError, OSError):
        return {}
