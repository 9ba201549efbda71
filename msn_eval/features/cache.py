"""Feature cache: folders addressed by everything that shaped the features, filled in shards by any number of processes.

A feature folder belongs to one encoder, tap and way of decoding. A row in it is addressed by the bytes of its image, so subsets,
splits and data sets share rows. A shard is a safetensors file named by the SHA-256 of its bytes. It counts only together with its
manifest, which is written after it. Nothing depends on locks or clocks: processes that write the same rows write the same files.
"""

import contextlib
import hashlib
import json
import logging
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from msn_eval.errors import StoreError, UsageError
from msn_eval.files.atomic import describe_free_space, prepare_folder, write_atomically
from msn_eval.files.json_records import canonical_json, pack_sealed, read_fields, unpack_sealed
from msn_eval.process import available_bytes

_log = logging.getLogger(__name__)
_SCHEMA = 1  # of key and manifests; part of the address, so that versions never read each other's files
_DIGITS = 32
_NAME = re.compile(f"[0-9a-f]{{{_DIGITS}}}")  # of feature folders and shards; other names are ignored
_HASHES = re.compile("(?:[0-9a-f]{64})*")
_FEATURES = "features"
_KEY_FILE = "key.json"
_NOTE = ".note.json"
_SEAL = b',"seal":"'
_PRUNES = 9  # of a folder while something is written to it
_MEMORY_SHARE = 0.5  # of the available memory, for rows that may be mapped from a file instead


class _DamageError(Exception):
    """Why a shard or its manifest cannot be trusted."""


@dataclass(frozen=True, kw_only=True)
class FeatureKey:
    """Everything that shapes a feature, except for the image's own bytes.

    Attributes:
        weights: SHA-256 of the network's tensors.
        arch: Architecture.
        network: Which of several networks of the file; None if it holds one.
        code: SHA-256 of the source of a user's own module; None for all others.
        tap: Name of the tap.
        transform: Sizes, interpolation, mean and std.
        decoder: Decoder and Pillow, with their versions.
        precision: fp32, bf16 or fp16.
        device: cpu or cuda.
        compiled: Whether torch.compile was used.
        torch: Version.
        timm: Version.
        extractor: Raised whenever the same inputs would give different features.
        patches: Share of patches that was dropped, and the seed; None for complete images.
    """

    weights: str
    arch: str
    network: str | None
    code: str | None
    tap: str
    transform: Mapping[str, object]
    decoder: str
    precision: str
    device: str
    compiled: bool
    torch: str
    timm: str
    extractor: int
    patches: Mapping[str, object] | None = None

    @cached_property
    def digest(self) -> str:
        described = canonical_json({"schema": _SCHEMA, "key": self.as_json()})
        return hashlib.sha256(described.encode()).hexdigest()[:_DIGITS]

    def as_json(self) -> dict[str, object]:
        """Return the key as stored in its file."""
        # Without `patches` and `positions` the address is the one from before these fields existed.
        key = {name: value for name, value in asdict(self).items() if name != "patches" or value is not None}
        return key | {"transform": {name: value for name, value in self.transform.items() if value is not None}}


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Contents and hash of one shard.

    Attributes:
        bank: Digest of the key that the shard belongs to.
        shard: File name, the first digits of its hash.
        bytes: Size of the shard.
        sha256: Of the shard's bytes.
        contents: SHA-256 of each row's image, in hex.
        images: An id of each row's image, for people.
    """

    bank: str
    shard: str
    bytes: int
    sha256: str
    contents: tuple[str, ...]
    images: tuple[str, ...]

    def __post_init__(self) -> None:
        if _HASHES.fullmatch(self.sha256) is None or self.shard != f"{self.sha256[:_DIGITS]}.safetensors":
            raise ValueError("its shard is not named by its hash")
        if {len(content) for content in self.contents} - {64} or _HASHES.fullmatch("".join(self.contents)) is None:
            raise ValueError("its contents are not hashes")
        if len(self.images) != len(self.contents):
            raise ValueError(f"{len(self.contents)} contents but {len(self.images)} images")


@dataclass(frozen=True, kw_only=True)
class FeatureFolder:
    """The folder of one key."""

    path: Path

    @property
    def digest(self) -> str:
        """The digest of the key."""
        return self.path.name


def find_feature_folder(cache: Path, key: FeatureKey) -> FeatureFolder:
    """Return the feature folder of a key, which may not exist yet."""
    return FeatureFolder(path=cache / _FEATURES / key.digest)


def open_feature_folder(cache: Path, key: FeatureKey, *, checkpoint: str) -> FeatureFolder:
    """Return the feature folder of a key; create it if it is new, else mark it as used.

    Args:
        cache: The cache folder.
        key: What shapes the features.
        checkpoint: Name of the checkpoint, for `cache list`.

    Raises:
        StoreError: The folder cannot be written.
    """
    folder = find_feature_folder(cache, key)
    described = json.dumps({"schema": _SCHEMA, "checkpoint": checkpoint, "key": key.as_json()}, indent=1) + "\n"

    def prepare() -> None:
        try:
            prepare_folder(folder.path, option="--cache")
        except UsageError as error:  # the cache itself was writable when the run began
            hint = f"{error.hint} {describe_free_space(cache)}."
            raise StoreError(error.what, where=error.where, hint=hint) from error.__cause__
        key_file = folder.path / _KEY_FILE
        with contextlib.suppress(OSError):  # another user's file cannot be touched, but it can be replaced
            if describe_feature_folder(folder.path)[1]:
                os.utime(key_file)  # the time of the last use, for `cache prune`
                return
        write_atomically(key_file, described.encode())

    _repeat_if_pruned(prepare)
    return folder


def write_shard(folder: FeatureFolder, contents: Sequence[str], images: Sequence[str], values: Tensor) -> None:
    """Write the features of some images: first the shard, then its manifest.

    Args:
        folder: Where to write.
        contents: SHA-256 of each image's bytes, in hex.
        images: An id of each image.
        values: (n, d) float32, n at least 1.

    Raises:
        StoreError: The disk refuses. No row is stored then.
    """
    from safetensors.torch import save

    addresses = torch.frombuffer(bytearray.fromhex("".join(contents)), dtype=torch.uint8).view(len(contents), -1)
    packed = save({"contents": addresses, "values": values})
    sha256 = hashlib.sha256(packed).hexdigest()
    manifest = Manifest(
        bank=folder.digest,
        shard=f"{sha256[:_DIGITS]}.safetensors",
        bytes=len(packed),
        sha256=sha256,
        contents=tuple(contents),
        images=tuple(images),
    )
    shard = folder.path / manifest.shard
    content = canonical_json({"manifest": asdict(manifest), "schema": _SCHEMA}).removesuffix("}")

    def write() -> None:
        with contextlib.suppress(OSError):  # then writing the shard fails with a better error
            folder.path.mkdir(parents=True, exist_ok=True)  # in case it was pruned
        write_atomically(shard, packed)
        write_atomically(shard.with_suffix(".json"), _add_seal(content.encode()))

    _repeat_if_pruned(write)


def _repeat_if_pruned(write: Callable[[], None]) -> None:
    """Write, and again where another process removed the folder meanwhile."""
    for attempt in range(_PRUNES + 1):
        try:
            write()
        except StoreError as error:
            if attempt == _PRUNES or not isinstance(error.__cause__, FileNotFoundError):
                raise
        else:
            return


def read_manifests(folder: FeatureFolder) -> Iterator[Manifest]:
    """Yield the manifest of every shard, in the order of their names. Damaged ones are quarantined."""
    for path in _manifest_paths(folder):
        with _quarantine_damage(path):
            yield _read_manifest(path)


def find_listed(folder: FeatureFolder, wanted: set[str]) -> set[str]:
    """Return those of the wanted contents that the manifests list. Reads no shard."""
    return {content for manifest in read_manifests(folder) for content in manifest.contents if content in wanted}


def read_rows(
    folder: FeatureFolder, wanted: Sequence[str], *, beyond_memory: bool = False
) -> tuple[Tensor | None, list[bool]]:
    """Read the features of images by their contents. Every shard is checked against its manifest.

    A damaged shard is quarantined with a warning, and its rows count as missing.

    Args:
        folder: Where to read.
        wanted: SHA-256 of each image's bytes, in hex.
        beyond_memory: Map rows from a temporary file if they would take more than half of the available memory.

    Returns:
        (n, d) float32 with zeros for missing rows, None if no row is stored; and which rows are stored.

    Raises:
        StoreError: The disk refuses.
    """
    targets: dict[str, list[int]] = {}
    for row, content in enumerate(wanted):
        targets.setdefault(content, []).append(row)
    values: Tensor | None = None
    present = [False] * len(wanted)
    for manifest in read_manifests(folder):
        if targets.keys().isdisjoint(manifest.contents):
            continue
        path = folder.path / manifest.shard
        with _quarantine_damage(path):
            shard = _read_values(path, manifest)
            if values is None:
                values = _allocate(len(wanted), shard.shape[1], folder, beyond_memory=beyond_memory)
            if shard.shape[1] != values.shape[1]:
                raise _DamageError(f"rows of {shard.shape[1]} values among rows of {values.shape[1]}")
            # A content in two shards is read from the first by name, whichever was written first.
            pairs = [(target, row) for row, name in enumerate(manifest.contents) for target in targets.pop(name, ())]
            rows, sources = (torch.tensor(column) for column in zip(*pairs, strict=True))
            values[rows] = shard[sources]
            for target, _ in pairs:
                present[target] = True
    return values, present


def _allocate(n: int, d: int, folder: FeatureFolder, *, beyond_memory: bool) -> Tensor:
    """Return (n, d) zeros in memory or, if allowed and too large, mapped from an unnamed file that ends with the process."""
    available = available_bytes()
    if not beyond_memory or available is None or 4 * n * d <= _MEMORY_SHARE * available:
        return torch.zeros(n, d)
    try:
        with tempfile.TemporaryFile(dir=folder.path.parent) as file:  # the folder itself may be pruned meanwhile
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, 4 * n * d)  # a disk that fills up later would kill the process
            mapped = np.memmap(file, dtype=np.float32, mode="r+", shape=(n, d))
    except OSError as error:
        raise StoreError(
            f"{4 * n * d:,} bytes of features fit neither into memory nor on this disk: {error.strerror or error}",
            where=str(folder.path),
            hint=f"Choose another --cache folder, or a smaller --subset; {describe_free_space(folder.path)}.",
        ) from error
    _log.info("%d rows of %d features do not fit into memory; they are mapped from the disk", n, d)
    return torch.from_numpy(mapped)


def read_note(folder: FeatureFolder, name: str) -> dict[str, Any] | None:
    """Return what `write_note` has written under a name. None if there is nothing, or it is damaged."""
    try:
        return unpack_sealed((folder.path / f"{name}{_NOTE}").read_bytes())
    except (OSError, ValueError):
        return None


def write_note(folder: FeatureFolder, name: str, content: Mapping[str, object]) -> None:
    """Write some numbers about features into their folder, if it exists and can be written."""
    if folder.path.is_dir():
        with contextlib.suppress(StoreError):
            write_atomically(folder.path / f"{name}{_NOTE}", pack_sealed(content))


def verify_feature_folder(folder: FeatureFolder) -> tuple[int, int]:
    """Read every byte, quarantine damaged shards, and return the numbers of valid and of damaged ones."""
    valid = 0
    damages: list[_DamageError] = []
    for path in _manifest_paths(folder):
        with _quarantine_damage(path, damages):
            _read_values(path.with_suffix(".safetensors"), _read_manifest(path))
            valid += 1
    return valid, len(damages)


def list_feature_folders(cache: Path) -> list[FeatureFolder]:
    """Return every feature folder of a cache, in the order of their names."""
    paths = [cache / _FEATURES / name for name in _list_names(cache / _FEATURES) if _NAME.fullmatch(name)]
    return [FeatureFolder(path=path) for path in paths if path.is_dir()]


def describe_feature_folder(path: Path) -> tuple[str, dict[str, object]]:
    """Return the checkpoint's name and the key that a feature folder states; `unknown` and an empty key if unreadable."""
    try:
        content = json.loads(_read_file(path / _KEY_FILE))
        return str(content["checkpoint"]), dict(content["key"])
    except (OSError, StoreError, _DamageError, ValueError, TypeError, KeyError, RecursionError):
        return "unknown", {}


def remove_feature_folder(folder: FeatureFolder) -> None:
    """Remove a feature folder that is not a link, manifests first: a reader finds complete shards or none.

    Raises:
        StoreError: It cannot be removed.
    """
    try:
        for path in _manifest_paths(folder):
            path.unlink(missing_ok=True)
        shutil.rmtree(folder.path)
    except FileNotFoundError:  # another process removes it too
        return
    except OSError as error:
        what = f"could not be removed: {error.strerror or error}"
        raise StoreError(what, where=str(folder.path), hint="Try again; it may be in use.") from error


def _read_values(path: Path, manifest: Manifest) -> Tensor:
    """Read a shard and compare it with its manifest. Raises _DamageError, or FileNotFoundError if both were pruned."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        packed = _read_file(path)
    except FileNotFoundError:
        if path.with_suffix(".json").exists():
            raise _DamageError("its shard is missing") from None
        raise
    if len(packed) != manifest.bytes or hashlib.sha256(packed).hexdigest() != manifest.sha256:
        raise _DamageError("its bytes are not those that were written")
    try:
        tensors: dict[str, Tensor] = load(packed)
        addresses, values = tensors["contents"], tensors["values"]
    except (SafetensorError, KeyError, ValueError, TypeError, RuntimeError) as error:
        raise _DamageError(f"it cannot be read ({error})") from error
    if (
        (addresses.dtype, values.dtype, values.dim()) != (torch.uint8, torch.float32, 2)
        or len(values) != len(manifest.contents)
        or addresses.numpy().tobytes().hex() != "".join(manifest.contents)
    ):
        raise _DamageError("its rows are not those of its manifest")
    return values


def _read_manifest(path: Path) -> Manifest:
    """Read a manifest. Raises _DamageError, or FileNotFoundError if it was pruned."""
    packed = _read_file(path)
    if packed != _add_seal(packed.rpartition(_SEAL)[0]):
        raise _DamageError("the seal of its manifest is broken")
    try:
        content = json.loads(packed)
        manifest = read_fields(Manifest, content["manifest"])
        if content["schema"] != _SCHEMA or (manifest.bank, manifest.shard) != (
            path.parent.name,
            f"{path.stem}.safetensors",
        ):
            raise ValueError("it belongs to another feature folder")
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise _DamageError(f"its manifest cannot be used ({error})") from error
    return manifest


def _add_seal(content: bytes) -> bytes:
    """Complete a manifest without its closing brace by the hash of everything before it."""
    return content + _SEAL + hashlib.sha256(content).hexdigest().encode() + b'"}\n'


def _read_file(path: Path) -> bytes:
    """Read a regular file. Raises FileNotFoundError, _DamageError, or StoreError if the disk refuses."""
    try:
        if not stat.S_ISREG(path.lstat().st_mode):  # a link may lead anywhere, and a pipe would never end
            raise _DamageError(f"{path.name} is not a regular file")
        return path.read_bytes()  # never mapped: a file that shrinks under a mapping kills the process
    except FileNotFoundError:
        raise
    except OSError as error:
        what, hint = "cannot be read", "Check the disk and the permissions, or use --no-cache."
        raise StoreError(f"{what}: {error.strerror or error}", where=str(path), hint=hint) from error


def _manifest_paths(folder: FeatureFolder) -> list[Path]:
    paths = [folder.path / name for name in _list_names(folder.path)]
    return [path for path in paths if path.suffix == ".json" and _NAME.fullmatch(path.stem)]


def _list_names(path: Path) -> list[str]:
    try:
        return sorted(entry.name for entry in path.iterdir())
    except FileNotFoundError:
        return []
    except OSError as error:
        what = f"cannot be listed: {error.strerror or error}"
        raise StoreError(what, where=str(path), hint="Check the --cache folder.") from error


@contextlib.contextmanager
def _quarantine_damage(path: Path, damages: list[_DamageError] | None = None) -> Iterator[None]:
    """End the block at a shard that is damaged or was pruned; move a damaged one to `quarantine/` and log a warning.

    Args:
        path: The shard, or its manifest.
        damages: Receives the damage.
    """
    try:
        yield
    except FileNotFoundError:  # pruned meanwhile
        return
    except _DamageError as damage:
        _quarantine(path.with_suffix(".safetensors"), damage)
        if damages is not None:
            damages.append(damage)


def _quarantine(shard: Path, damage: _DamageError) -> None:
    aside = shard.parent / "quarantine"
    moved = 0
    try:
        with contextlib.suppress(FileNotFoundError):  # pruned meanwhile
            aside.mkdir(exist_ok=True)
        for path in (shard.with_suffix(".json"), shard):  # manifest first: a shard without one does not count
            with contextlib.suppress(FileNotFoundError):  # another process moved it
                path.replace(aside / path.name)
                moved += 1
    except OSError as error:
        reason = error.strerror or error
        _log.warning("%s: %s; it could not be moved away (%s), its features are computed again", shard, damage, reason)
    if moved:
        _log.warning("%s: %s; moved to %s, its features are computed again", shard, damage, aside)
