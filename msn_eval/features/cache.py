"""Features on disk: banks addressed by everything that shaped them, filled a shard at a time by any number of processes.

A bank is a folder for one encoder, tap and way of making pixels; a row in it is addressed by its image's bytes, so that
subsets, splits and data sets share what they have in common. A shard is a safetensors file called by the SHA-256 of its
bytes, and is there only once its manifest is, which is written after it. Nothing depends on a lock or a clock: two
processes that write the same rows write the same files.
"""

import contextlib
import hashlib
import json
import logging
import os
import re
import secrets
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from msn_eval.errors import StoreError, UsageError
from msn_eval.files.atomic import free_bytes, prepare_folder, write_atomically
from msn_eval.files.json_records import canonical_json
from msn_eval.process import available_bytes

_log = logging.getLogger(__name__)
_SCHEMA = 1  # of key and manifests; part of the address, so that no version reads or judges the files of another
_DIGITS = 32
_NAME = re.compile(f"[0-9a-f]{{{_DIGITS}}}")  # of banks and shards; whatever is called otherwise is not ours
_HASHES = re.compile("(?:[0-9a-f]{64})*")
_QUARANTINE = "quarantine"
_PRUNED = ".pruned."
_KEY_FILE = "key.json"
_SEAL = b',"seal":"'
_MEMORY_SHARE = 0.5  # of what is available, that rows may take which need not be in memory
_ATTEMPTS = 5  # at a folder that somebody prunes again and again


class _DamageError(Exception):
    """Why a shard or its manifest cannot be trusted."""


@dataclass(frozen=True, kw_only=True)
class FeatureKey:
    """Everything that shapes a feature besides the image's own bytes.

    weights:   SHA-256 over the network's tensors
    network:   which of several networks of the file, None where it holds one
    code:      SHA-256 over the source of a network that is the user's own module, None for all others
    transform: sizes, interpolation, mean and std
    decoder:   with its version, and those of what it leans on
    device:    cpu or cuda
    extractor: raised whenever the same inputs would give other features
    patches:   share of an image's patches that was dropped, and the seed; None where it was seen whole
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
        """Give the key as its file holds it."""
        # What is new and not there leaves the addresses of features alone that were kept before.
        return {name: value for name, value in asdict(self).items() if name != "patches" or value is not None}


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What vouches for one shard.

    bank:     digest of the key that the shard belongs to
    shard:    file name, the first digits of its hash
    sha256:   of the shard's bytes
    contents: SHA-256 of each row's image, in hex
    images:   an id of each row's image, for people
    """

    bank: str
    shard: str
    bytes: int
    sha256: str
    contents: tuple[str, ...]
    images: tuple[str, ...]

    def __post_init__(self) -> None:
        if _HASHES.fullmatch(self.sha256) is None or self.shard != f"{self.sha256[:_DIGITS]}.safetensors":
            raise ValueError("its shard is not called by its hash")
        if {len(one) for one in self.contents} - {64} or _HASHES.fullmatch("".join(self.contents)) is None:
            raise ValueError("its contents are no hashes")
        if len(self.images) != len(self.contents):
            raise ValueError(f"{len(self.contents)} contents but {len(self.images)} images")


@dataclass(frozen=True, kw_only=True)
class Bank:
    """The folder of one key."""

    folder: Path
    digest: str


def features_folder(cache: Path) -> Path:
    """Give the folder of all banks below the cache's own."""
    return cache / "features"


def find_bank(cache: Path, key: FeatureKey) -> Bank:
    """Give the place of a key's bank, whether it is there or not."""
    return Bank(folder=features_folder(cache) / key.digest, digest=key.digest)


def open_bank(cache: Path, key: FeatureKey, *, checkpoint: str) -> Bank:
    """Give the bank of a key, made where it is new.

    checkpoint: what the encoder is called, for `cache list`
    Raises StoreError where the folder cannot be written.
    """
    bank = find_bank(cache, key)
    described = json.dumps({"schema": _SCHEMA, "checkpoint": checkpoint, "key": key.as_json()}, indent=1) + "\n"

    def prepare() -> None:
        try:
            prepare_folder(bank.folder, option="--cache")
        except UsageError as error:  # the cache itself could be written when the run began
            raise StoreError(
                error.what, where=error.where, hint=f"{error.hint} {free_bytes(cache)}."
            ) from error.__cause__
        with contextlib.suppress(OSError):  # another user's file cannot be touched, but it can be replaced
            if describe_bank(bank.folder)[1]:
                os.utime(bank.folder / _KEY_FILE)  # so that `cache prune` knows what is in use
                return
        write_atomically(bank.folder / _KEY_FILE, described.encode())

    _despite_pruning(prepare)
    return bank


def write_shard(bank: Bank, contents: Sequence[str], images: Sequence[str], values: Tensor) -> None:
    """Keep the features of some images: the shard first, the manifest that vouches for it last.

    contents: SHA-256 of each image's bytes, in hex
    values:   (n, d) float32
    Raises StoreError when the disk refuses; the rows then are not there.
    """
    from safetensors.torch import save

    assert (values.dtype, values.dim(), len(values)) == (torch.float32, 2, len(contents))
    if not contents:
        return
    addresses = torch.frombuffer(bytearray.fromhex("".join(contents)), dtype=torch.uint8).view(len(contents), -1)
    packed = save({"contents": addresses, "values": values.contiguous()})
    sha256 = hashlib.sha256(packed).hexdigest()
    manifest = Manifest(
        bank=bank.digest,
        shard=f"{sha256[:_DIGITS]}.safetensors",
        bytes=len(packed),
        sha256=sha256,
        contents=tuple(contents),
        images=tuple(images),
    )

    def write() -> None:
        try:
            bank.folder.mkdir(parents=True, exist_ok=True)  # somebody may have pruned it meanwhile
            write_atomically(bank.folder / manifest.shard, packed)
            write_atomically(_manifest_file(bank, manifest), _sealed(manifest))
            (bank.folder / manifest.shard).lstat()  # not so where the folder was pruned and made anew between the two
        except OSError as error:
            raise StoreError(
                f"could not keep {len(packed):,} bytes of features: {error.strerror or error}",
                where=str(bank.folder),
                hint=f"Choose another --cache folder; {free_bytes(bank.folder.parent)}.",
            ) from error

    _despite_pruning(write)


def read_manifests(bank: Bank) -> Iterator[Manifest]:
    """Give the manifest of every shard of a bank, in the order of their names; damaged ones are set aside."""
    for path in _manifest_files(bank):
        try:
            manifest = _read_manifest(path, bank)
        except FileNotFoundError:  # pruned a moment ago
            continue
        except _DamageError as damage:
            _set_aside(bank, path.stem, damage)
            continue
        yield manifest


def listed_contents(bank: Bank, wanted: set[str]) -> set[str]:
    """Give those of the wanted contents that the bank's manifests list, without reading a shard."""
    return {content for manifest in read_manifests(bank) for content in manifest.contents if content in wanted}


def read_rows(bank: Bank, wanted: Sequence[str], *, beyond_memory: bool = False) -> tuple[Tensor | None, list[bool]]:
    """Read the features of images by their contents, every shard checked against its manifest.

    beyond_memory: rows that would take more than half of the memory there is are put into a file of their own, mapped
    returns: (n, d) float32 with rows of zeros where the bank has none, None where it has none at all; and which rows it has
    A damaged shard is set aside with a warning, and its rows count as missing. Raises StoreError where the disk refuses.
    """
    places: dict[str, list[int]] = {}
    for row, content in enumerate(wanted):
        places.setdefault(content, []).append(row)
    values: Tensor | None = None
    found = [False] * len(wanted)
    for manifest in read_manifests(bank):
        if places.keys().isdisjoint(manifest.contents):
            continue
        try:
            shard = _read_values(bank, manifest)
            if values is None:
                values = _room_for(len(wanted), shard.shape[1], bank, beyond_memory=beyond_memory)
            if shard.shape[1] != values.shape[1]:
                raise _DamageError(f"rows of {shard.shape[1]} values among rows of {values.shape[1]}")
        except FileNotFoundError:  # pruned a moment ago
            continue
        except _DamageError as damage:
            _set_aside(bank, _stem(manifest), damage)
            continue
        # A content that stands in two shards is read from the first by name alone, whichever was written first.
        targets = [(place, row) for row, content in enumerate(manifest.contents) for place in places.pop(content, ())]
        rows, sources = (torch.tensor(column, dtype=torch.int64) for column in zip(*targets, strict=True))
        values[rows] = shard[sources]
        for place, _ in targets:
            found[place] = True
    return values, found


def _room_for(n: int, d: int, bank: Bank, *, beyond_memory: bool) -> Tensor:
    """Give (n, d) zeros in memory or, where asked and too large for it, in a file without a name: the system reads and drops its
    pages as they are used, nobody can shorten it under the mapping, and it is gone with the process."""
    there = available_bytes()
    if not beyond_memory or there is None or 4 * n * d <= _MEMORY_SHARE * there:
        return torch.zeros(n, d)
    try:
        with tempfile.TemporaryFile(dir=bank.folder) as file:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, 4 * n * d)  # a disk that fills up later would kill the process
            mapped = np.memmap(file, dtype=np.float32, mode="r+", shape=(n, d))
    except OSError as error:
        raise StoreError(
            f"has no room for {4 * n * d:,} bytes of features, which memory has none for either: {error.strerror or error}",
            where=str(bank.folder),
            hint=f"Choose another --cache folder, or a smaller --subset; {free_bytes(bank.folder)}.",
        ) from error
    _log.info("%d rows of %d features are more than memory is to hold, and stay on the disk", n, d)
    return torch.from_numpy(mapped)


def check_bank(bank: Bank) -> tuple[int, int]:
    """Read every byte of a bank, set aside what is damaged, and count the shards that are sound and those that are not."""
    sound = damaged = 0
    for path in _manifest_files(bank):
        try:
            _read_values(bank, _read_manifest(path, bank))
            sound += 1
        except FileNotFoundError:  # pruned a moment ago
            continue
        except _DamageError as damage:
            _set_aside(bank, path.stem, damage)
            damaged += 1
    return sound, damaged


def list_banks(cache: Path) -> list[Bank]:
    """Give every bank of a cache, in the order of their names."""
    root = features_folder(cache)
    names = [name for name in _names_in(root) if _NAME.fullmatch(name) and (root / name).is_dir()]
    return [Bank(folder=root / name, digest=name) for name in names]


def describe_bank(folder: Path) -> tuple[str, dict[str, object]]:
    """Give the checkpoint's name and the key that a bank's folder states; an empty key where it states none."""
    try:
        content = json.loads(_read_file(folder / _KEY_FILE))
        key = content["key"]
        if not isinstance(key, dict):
            raise TypeError("the key is no mapping")
        return str(content["checkpoint"]), key
    except (OSError, StoreError, _DamageError, ValueError, TypeError, KeyError, RecursionError):
        return "unknown", {}


def remove_bank(bank: Bank) -> None:
    """Remove a bank at one stroke: who reads or writes it meanwhile finds no folder, never half of one.

    Raises StoreError where it cannot be removed, or is a link: what it leads to is not the cache's.
    """
    pruned = bank.folder.with_name(f"{_PRUNED}{bank.digest}.{secrets.token_hex(4)}")
    if bank.folder.is_symlink():
        raise StoreError(
            "is a link to elsewhere", where=str(bank.folder), hint="Remove it, and what it leads to, by hand."
        )
    try:
        bank.folder.rename(pruned)
        shutil.rmtree(pruned)
    except FileNotFoundError:  # another process was quicker
        return
    except OSError as error:
        raise StoreError(
            f"could not be removed: {error.strerror or error}",
            where=str(bank.folder),
            hint="Try again; it may be in use.",
        ) from error


def sweep_pruned(cache: Path) -> None:
    """Remove what removals left behind that were killed."""
    root = features_folder(cache)
    for name in _names_in(root):
        if name.startswith(_PRUNED):
            shutil.rmtree(root / name, ignore_errors=True)


def _read_values(bank: Bank, manifest: Manifest) -> Tensor:
    """Read a shard that its manifest vouches for. Raises _DamageError, and FileNotFoundError where both are gone."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    packed = _read_shard(bank, manifest)
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


def _read_shard(bank: Bank, manifest: Manifest) -> bytes:
    for _ in range(2):
        try:
            return _read_file(bank.folder / manifest.shard)
        except FileNotFoundError:
            if not _manifest_file(bank, manifest).exists():  # both were pruned a moment ago
                raise
    # A shard is written before its manifest, and the manifest was there before the second look.
    raise _DamageError("its shard is missing")


def _read_manifest(path: Path, bank: Bank) -> Manifest:
    """Read a manifest. Raises _DamageError, and FileNotFoundError where it is gone."""
    packed = _read_file(path)
    sealed, _, seal = packed.rpartition(_SEAL)
    if seal != _seal(sealed):
        raise _DamageError("the seal of its manifest is broken")
    try:
        content = json.loads(packed)
        body = content["manifest"]
        manifest = Manifest(**body | {name: tuple(body[name]) for name in ("contents", "images")})
        if content["schema"] != _SCHEMA or manifest.bank != bank.digest or _stem(manifest) != path.stem:
            raise ValueError("it belongs elsewhere")
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise _DamageError(f"its manifest cannot be used ({error})") from error
    return manifest


def _sealed(manifest: Manifest) -> bytes:
    """Give a manifest as its file holds it: JSON that ends with the hash of all that stands before."""
    content = canonical_json({"manifest": asdict(manifest), "schema": _SCHEMA}).removesuffix("}").encode()
    return content + _SEAL + _seal(content)


def _seal(content: bytes) -> bytes:
    return hashlib.sha256(content).hexdigest().encode() + b'"}\n'


def _read_file(path: Path) -> bytes:
    """Read a plain file. Raises FileNotFoundError where there is none, StoreError where the disk refuses."""
    try:
        if not stat.S_ISREG(path.lstat().st_mode):  # a link may lead anywhere, and a pipe would never end
            raise _DamageError(f"{path.name} is no plain file")
        return path.read_bytes()  # never mapped: a file that shrinks under a mapping kills the process
    except FileNotFoundError:
        raise
    except OSError as error:
        raise StoreError(
            f"cannot be read: {error.strerror or error}",
            where=str(path),
            hint="Check the disk and the permissions, or use --no-cache.",
        ) from error


def _manifest_files(bank: Bank) -> list[Path]:
    names = (name.removesuffix(".json") for name in _names_in(bank.folder) if name.endswith(".json"))
    return [bank.folder / f"{name}.json" for name in names if _NAME.fullmatch(name)]


def _names_in(folder: Path) -> list[str]:
    try:
        return sorted(path.name for path in folder.iterdir())
    except FileNotFoundError:
        return []
    except OSError as error:
        raise StoreError(
            f"cannot be listed: {error.strerror or error}", where=str(folder), hint="Check the --cache folder."
        ) from error


def _manifest_file(bank: Bank, manifest: Manifest) -> Path:
    return bank.folder / f"{_stem(manifest)}.json"


def _stem(manifest: Manifest) -> str:
    return manifest.sha256[:_DIGITS]


def _set_aside(bank: Bank, stem: str, damage: _DamageError) -> None:
    """Move a damaged shard and its manifest out of the way, where they can be looked at, and say so."""
    aside = bank.folder / _QUARANTINE
    moved = 0
    try:
        with contextlib.suppress(FileNotFoundError):  # the bank was pruned a moment ago
            aside.mkdir(exist_ok=True)
        for name in (f"{stem}.json", f"{stem}.safetensors"):  # without its manifest the shard is there for nobody
            with contextlib.suppress(FileNotFoundError):  # another process was quicker
                (bank.folder / name).replace(aside / name)
                moved += 1
    except OSError as error:
        raise StoreError(
            f"is damaged ({damage}) and could not be moved away: {error.strerror or error}",
            where=str(bank.folder / f"{stem}.safetensors"),
            hint="Remove it, or use another --cache.",
        ) from error
    if moved:
        shard = bank.folder / f"{stem}.safetensors"
        _log.warning("%s: %s; moved to %s, its features are computed again", shard, damage, aside)


def _despite_pruning(write: Callable[[], None]) -> None:
    """Write, and write again where the folder was removed meanwhile."""
    for _ in range(_ATTEMPTS - 1):
        try:
            return write()
        except (StoreError, UsageError, OSError) as error:
            if not isinstance(error.__cause__ or error, FileNotFoundError | FileExistsError):
                raise
    return write()
