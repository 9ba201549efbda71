"""SHA-256 of image files, cached between runs by path, size, times and inode.

The cache only saves time: reading an image for its pixels hashes it again and compares. Its file is sealed, and made again
where the seal does not match.
"""

import hashlib
import logging
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from msn_eval.data.images import BadImagesError, ImageSet, Stamp, read_image
from msn_eval.errors import DataError, StoreError
from msn_eval.files.atomic import write_atomically
from msn_eval.files.json_records import pack_sealed, unpack_sealed

_log = logging.getLogger(__name__)
_THREADS = 8
_SETTLED_NS = 2_000_000_000  # the coarsest clock among file systems ticks every two seconds


def hash_images(images: ImageSet, *, cache_dir: Path | None) -> dict[str, str]:
    """Compute the SHA-256 of each image's bytes, by id.

    Args:
        images: The images.
        cache_dir: Folder that caches hashes, or None to hash everything.

    Raises:
        DataError: Files cannot be read. The text lists all of them.
    """
    started = time.time_ns()
    root, cache_file, cached = images.source.root, None, {}
    if cache_dir is not None and root is not None:
        root = root.resolve()
        name = hashlib.sha256(os.fsencode(root)).hexdigest()[:16]
        cache_file = cache_dir / "hashes" / f"{name}.json"
        cached = _read_cache(cache_file, root)
    failures: list[str] = []

    def hash_image(image_id: str) -> tuple[str, Stamp | None]:
        try:
            stamp = images.source.stamp(image_id) if cache_file is not None else None
            entry = cached.get(image_id)
            if stamp is not None and entry is not None and entry[0] == stamp:
                return entry[1], stamp
            return hashlib.sha256(read_image(images.source, image_id)).hexdigest(), stamp
        except OSError as error:
            failures.append(f"{images.source.place(image_id)}: {error.strerror or error}")
            return "", None

    with ThreadPoolExecutor(_THREADS) as pool:
        hashes = dict(zip(images.ids, pool.map(hash_image, images.ids), strict=True))
    if failures:
        raise make_unreadable_error(failures)
    fresh = {
        image_id: (stamp, digest)
        for image_id, (digest, stamp) in hashes.items()
        if stamp is not None and max(stamp[1:3], default=0) + _SETTLED_NS <= started  # else it could change unnoticed
    }
    if cache_file is not None and any(cached.get(image_id) != entry for image_id, entry in fresh.items()):
        try:
            cache_file.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(cache_file, pack_sealed({"root": str(root), "hashes": cached | fresh}))
        except (OSError, StoreError) as error:
            _log.warning("hashes of image files are not cached: %s", error)
    return {image_id: digest for image_id, (digest, _) in hashes.items()}


def content_sha256(image_ids: Sequence[str], hashes: dict[str, str]) -> str:
    """Return the SHA-256 of the lines `id TAB sha256(file bytes)`, in the given order."""
    content = hashlib.sha256()
    for image_id in image_ids:
        content.update(os.fsencode(image_id) + b"\t" + hashes[image_id].encode() + b"\n")
    return content.hexdigest()


def make_unreadable_error(failures: Sequence[str]) -> DataError:
    """Return the error that lists every image of a pass that cannot be used."""
    return BadImagesError(failures)


def _read_cache(file: Path, root: Path) -> dict[str, tuple[Stamp, str]]:
    """Return the cached hashes, none where the file is missing, damaged or of another folder."""
    try:
        content = unpack_sealed(file.read_bytes())
        if content["root"] != str(root):
            raise ValueError(f"it belongs to {content['root']}")
        return {image_id: (tuple(stamp), digest) for image_id, (stamp, digest) in content["hashes"].items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError) as error:
        _log.warning("%s: %s; the images are hashed again", file, error)
        return {}
