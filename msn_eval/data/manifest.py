"""Manifest: the SHA-256 of every image of a data set, a line each as sha256sum writes them, and how a data set differs."""

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from msn_eval.data.split_check import SplitCheck
from msn_eval.errors import DataError

# As sha256sum writes it: a backslash first where the name has some of its own, or line ends, spelled out.
_MANIFEST_LINE = re.compile(rb"(\\?)([0-9a-fA-F]{64}) [ *](.+)", re.DOTALL)
_ESCAPES = {b"\\": b"\\\\", b"\n": b"\\n", b"\r": b"\\r"}


@dataclass(frozen=True, kw_only=True)
class ManifestCheck:
    """How a data set differs from a manifest, by `split/CLASS/FILE`; images that could not be read are told elsewhere."""

    listed: int
    changed: tuple[str, ...]
    missing: tuple[str, ...]
    extra: tuple[str, ...]

    @property
    def agrees(self) -> bool:
        return not (self.changed or self.missing or self.extra)


def write_manifest(splits: Iterable[SplitCheck]) -> bytes:
    """Give the manifest of a data set: a line `HASH  split/CLASS/FILE` an image, as sha256sum writes it."""
    return b"".join(
        _manifest_line(digest.hex(), f"{split.split}/{image_id}")
        for split in splits
        for image_id, digest in split.digests.items()
    )


def _manifest_line(digest: str, name: str) -> bytes:
    plain = os.fsencode(name)
    escaped = re.sub(rb"[\\\n\r]", lambda found: _ESCAPES[found.group()], plain)
    return (b"\\" if escaped != plain else b"") + f"{digest}  ".encode() + escaped + b"\n"


def read_manifest(path: Path) -> dict[str, str]:
    """Read the SHA-256 of each `split/CLASS/FILE` from a file that sha256sum or `write_manifest` wrote.

    Raises DataError naming the first line that is none of it, and a name that stands there twice.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(
            f"cannot be read: {error.strerror or error}",
            where=str(path),
            remedy="Give --manifest a file of SHA-256 lines.",
        ) from error
    found: dict[str, str] = {}
    for number, line in enumerate(content.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        line = line.removesuffix(b"\r")
        if not line:
            continue
        match = _MANIFEST_LINE.fullmatch(line)
        if match is None:
            raise DataError(
                f"line {number} is no SHA-256 with a name: {os.fsdecode(line[:80])}",
                where=str(path),
                remedy="Each line is `HASH  split/CLASS/FILE`, as `sha256sum` in the data folder writes them.",
            )
        escaped, digest, raw = match.groups()
        plain = re.sub(rb"\\([\\nr])", _unescape, raw) if escaped else raw
        name = os.fsdecode(plain).removeprefix("./")
        if name in found:
            raise DataError(f"line {number} names {name} again", where=str(path), remedy="Keep one of the lines.")
        found[name] = digest.decode().lower()
    return found


def _unescape(found: re.Match[bytes]) -> bytes:
    return {b"\\": b"\\", b"n": b"\n", b"r": b"\r"}[found.group(1)]


def compare_manifest(manifest: Mapping[str, str], splits: Iterable[SplitCheck]) -> ManifestCheck:
    """Say which images are not those that a manifest lists."""
    changed: list[str] = []
    extra: list[str] = []
    there: set[str] = set()
    for split in splits:
        there |= {f"{split.split}/{entry.image}" for entry in split.unreadable}
        for image_id, digest in split.digests.items():
            name = f"{split.split}/{image_id}"
            there.add(name)
            if name not in manifest:
                extra.append(name)
            elif manifest[name] != digest.hex():
                changed.append(name)
    missing = sorted(manifest.keys() - there, key=os.fsencode)
    return ManifestCheck(listed=len(manifest), changed=tuple(changed), missing=tuple(missing), extra=tuple(extra))
