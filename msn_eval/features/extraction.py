"""Features: what an encoder says about a list of images, and how it is asked."""

import base64
import hashlib
import json
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from msn_eval.data.decoders import Pixels, decode_on_device, decoder_version
from msn_eval.data.hashing import hash_images, unreadable
from msn_eval.data.images import ImageSet
from msn_eval.data.loader import PixelList, automatic_workers, load_pixels
from msn_eval.distributed.group import ALONE, Group, all_gather_object, broadcast_from_rank0, share
from msn_eval.errors import NumericalError, ResourceError, StoreError
from msn_eval.features.batch_size import AdaptiveBatchSize, run_with_oom_backoff
from msn_eval.features.cache import Bank, FeatureKey, find_bank, listed_contents, open_bank, read_rows, write_shard
from msn_eval.features.encoder import Encoder, encode, resolve_tap, unchanged
from msn_eval.features.patch_drop import PatchDrop, check_drop, encode_kept, kept_patches, patch_count
from msn_eval.process import available_bytes

_log = logging.getLogger(__name__)
EXTRACTOR = 1  # raised whenever the same weights and images would give other features
_CPU_BATCH = 16  # larger batches measured slower on CPUs at 224 pixels
_CUDA_BATCH = 256
_CPU_SHARD_ROWS, _CUDA_SHARD_ROWS = 256, 2048  # what a kill can cost: about a minute, and about a second
_SHOWN = 5
Progress = Callable[[int, int], None]  # images done, images in all


@dataclass(frozen=True, kw_only=True)
class Features:
    """What an encoder says about a list of images.

    values:    (n, d) float32, as the encoder gave them; protocols normalise for themselves
    labels:    (n,) int64 in [0, n_classes)
    image_ids: n names, unique, in the order of the rows
    tap:       where in the encoder they were taken
    """

    values: Tensor
    labels: Tensor
    image_ids: tuple[str, ...]
    n_classes: int
    tap: str

    @cached_property
    def _rows(self) -> Mapping[str, int]:
        return {image_id: row for row, image_id in enumerate(self.image_ids)}

    def only(self, image_ids: Sequence[str]) -> "Features":
        """Give the rows of the named images, in the order named; all in their own order are not copied."""
        if len(image_ids) == len(self.image_ids) and tuple(image_ids) == self.image_ids:
            return self
        rows = torch.tensor([self._rows[image_id] for image_id in image_ids])
        return replace(self, values=self.values[rows], labels=self.labels[rows], image_ids=tuple(image_ids))


@dataclass(frozen=True, kw_only=True)
class Loading:
    """How images come to the encoder. None chooses for the device and the image size.

    decoder: changes numbers; the others speed alone
    beyond_memory: rows of a cache that memory has no room for are mapped from a file, for probes that take some at a time
    """

    decoder: str = "pillow"
    batch_size: int | None = None
    workers: int | None = None
    beyond_memory: bool = False


@dataclass(frozen=True, kw_only=True)
class Extraction:
    """Features by tap, and what they cost.

    features:       of this rank; empty on all ranks but the first
    read, reused:   images that were encoded now, by all ranks together, and images whose features were there
    seconds:        from the first look into the cache to the last row
    decode_seconds: in which the encoder waited for pixels, the mean over ranks that had images to encode
    encode_seconds: in the encoder, likewise
    batch_size:     the last one used; memory may have asked for a smaller one
    """

    features: Mapping[str, Features]
    read: int
    reused: int
    seconds: float
    decode_seconds: float
    encode_seconds: float
    batch_size: int


def extract(
    encoder: Encoder,
    data: str,
    *,
    split: str = "val",
    tap: str | None = None,
    batch_size: int | None = None,
    workers: int | None = None,
    cache: str | Path | None = None,
) -> Features:
    """Extract the features of one split of a data set.

    data:  `digits`, the path of an image folder, or any other data set; only this split need be there
    tap:   the encoder's first where None
    cache: a folder that features are kept in and taken from
    Raises DataError listing every image that cannot be used, UsageError for a tap that the encoder has not.
    """
    from msn_eval.data import read_split

    chosen = resolve_tap(encoder, tap or encoder.taps[0], by_hand=True)
    cache_dir = Path(cache) if cache is not None else None
    images = read_split(data, split, cache_dir=cache_dir)
    loading = Loading(batch_size=batch_size, workers=workers)
    hashes = hash_images(images, cache_dir=cache_dir) if cache_dir is not None else None
    with unchanged(encoder):
        found = extract_features(encoder, images, taps=[chosen], hashes=hashes, loading=loading, cache=cache_dir)
    return found.features[chosen]


def extract_features(
    encoder: Encoder,
    images: ImageSet,
    *,
    taps: Sequence[str],
    hashes: Mapping[str, str] | None = None,
    loading: Loading = Loading(),
    drop: PatchDrop | None = None,
    cache: Path | None = None,
    group: Group = ALONE,
    on_progress: Progress | None = None,
) -> Extraction:
    """Extract the features of `images` at every tap, each image in one pass, those in the cache in none.

    hashes: SHA-256 of each image's bytes; an image that no longer has its hash is refused. A cache needs them
    drop:   patches of each image to leave out; None for whole images
    cache:  a folder that rows are kept in as they are made, shared by all ranks of the group
    Raises DataError listing every unusable image, NumericalError for features that are not finite, ResourceError
    where memory or a loader worker gives out, StoreError where the cache cannot be written, UsageError for patches to
    be dropped from what has none.
    """
    started = time.perf_counter()
    if drop is not None:
        check_drop(encoder, drop)
    work = _Work(encoder=encoder, images=images, taps=tuple(taps), hashes=hashes, loading=loading, drop=drop)
    if cache is None:
        values = _in_memory(work, on_progress)
        read = len(images)
    else:
        values, read = _through_cache(work, cache, group, on_progress)
    labels = torch.tensor(images.labels, dtype=torch.int64)
    features = {
        tap: Features(values=rows, labels=labels, image_ids=images.ids, n_classes=len(images.classes), tap=tap)
        for tap, rows in values.items()
    }
    return Extraction(
        features=features,
        read=read,
        reused=len(images) - read,
        seconds=time.perf_counter() - started,
        decode_seconds=work.clock.waiting,
        encode_seconds=work.clock.encoding,
        batch_size=work.clock.images,
    )


def automatic_batch_size(encoder: Encoder) -> int:
    """Give a batch that keeps the device busy: more of smaller images."""
    base = _CUDA_BATCH if encoder.device.type == "cuda" else _CPU_BATCH
    return int(min(16 * base, max(base, base * (224 / encoder.transform.crop) ** 2)))


def feature_key(
    encoder: Encoder, tap: str, *, decoder: str, embedded: bool, drop: PatchDrop | None = None
) -> FeatureKey:
    """Give the address of an encoder's features at one tap.

    embedded: the images are no files, and only resized
    """
    checkpoint = encoder.checkpoint
    of_files = "embedded" if embedded else decoder_version(decoder)
    return FeatureKey(
        weights=checkpoint.weights_sha256,
        arch=encoder.arch,
        network=checkpoint.key,
        code=checkpoint.code_sha256,
        tap=tap,
        transform=vars(encoder.transform),
        decoder=", ".join(dict.fromkeys([of_files, decoder_version("pillow")])),  # which does what others leave to it
        precision=encoder.precision,
        device=encoder.device.type,
        compiled=encoder.compiled,
        torch=torch.__version__,
        timm=version("timm"),
        extractor=EXTRACTOR,
        patches=None if drop is None else vars(drop),
    )


def _address(image_id: str, sha256: str, drop: PatchDrop | None) -> str:
    """Give what an image's row is found by: its bytes and, where its patches are drawn by its id, that too."""
    if drop is None:
        return sha256
    return hashlib.sha256(f"{sha256} ".encode() + os.fsencode(image_id)).hexdigest()


def missing_images(
    encoder: Encoder,
    images: ImageSet,
    *,
    taps: Sequence[str],
    hashes: Mapping[str, str],
    decoder: str,
    drop: PatchDrop | None,
    cache: Path,
) -> list[str]:
    """Give the images that would have to be encoded, by what the cache's manifests list."""
    contents = {image_id: _address(image_id, hashes[image_id], drop) for image_id in images.ids}
    known = set(contents.values())
    for tap in taps:
        key = feature_key(encoder, tap, decoder=decoder, embedded=images.source.root is None, drop=drop)
        known &= listed_contents(find_bank(cache, key), known)
    return [image_id for image_id, content in contents.items() if content not in known]


@dataclass(kw_only=True)
class _Clock(AdaptiveBatchSize):
    """Where the time of a pass goes, and how many images memory allows at once."""

    waiting: float = 0.0
    encoding: float = 0.0


@dataclass(frozen=True, kw_only=True)
class _Work:
    """One call of extract_features."""

    encoder: Encoder
    images: ImageSet
    taps: tuple[str, ...]
    hashes: Mapping[str, str] | None
    loading: Loading
    drop: PatchDrop | None = None

    @cached_property
    def clock(self) -> _Clock:
        return _Clock(images=self.batch_size)

    @property
    def batch_size(self) -> int:
        return self.loading.batch_size or automatic_batch_size(self.encoder)

    @property
    def shard_rows(self) -> int:
        """Give the rows of a shard: whole batches, so that a resumed pass makes the batches that a whole one makes."""
        rows = _CUDA_SHARD_ROWS if self.encoder.device.type == "cuda" else _CPU_SHARD_ROWS
        return -(-rows // self.batch_size) * self.batch_size

    def contents(self, rows: Sequence[int]) -> list[str]:
        assert self.hashes is not None
        ids = [self.images.ids[row] for row in rows]
        return [_address(image_id, self.hashes[image_id], self.drop) for image_id in ids]

    def kept(self, image_ids: Sequence[str]) -> Tensor | None:
        """Give the patches of images that are kept, (b, k), or None where they are seen whole."""
        if self.drop is None:
            return None
        return kept_patches(self.drop, image_ids, patches=patch_count(self.encoder))


def _in_memory(work: _Work, on_progress: Progress | None) -> dict[str, Tensor]:
    values: dict[str, Tensor] = {}
    failures: list[str] = []
    done = 0
    for batch in _encoded(work, range(len(work.images)), failures, on_progress):
        for tap, rows in batch.items():
            if tap not in values:
                values[tap] = torch.empty(len(work.images), rows.shape[1])
            values[tap][done : done + len(rows)] = rows
        done += len(next(iter(batch.values())))
    if failures:
        raise unreadable(failures)
    assert done == len(work.images)
    return values


def _through_cache(
    work: _Work, cache: Path, group: Group, on_progress: Progress | None
) -> tuple[dict[str, Tensor], int]:
    """Encode what the cache lacks, every rank its share of it, and read everything back on the first rank.

    returns: values by tap, empty on the other ranks; and how many images were encoded by all
    """
    embedded = work.images.source.root is None
    keys = {
        tap: feature_key(work.encoder, tap, decoder=work.loading.decoder, embedded=embedded, drop=work.drop)
        for tap in work.taps
    }
    banks = {tap: open_bank(cache, key, checkpoint=work.encoder.checkpoint.name) for tap, key in keys.items()}
    contents = work.contents(range(len(work.images)))
    stored: dict[str, tuple[Tensor | None, list[bool]]] = {}

    def look() -> str:
        for tap, bank in banks.items():
            stored[tap] = read_rows(bank, contents, beyond_memory=work.loading.beyond_memory)
        return _packed([not found for found in np.all([found for _, found in stored.values()], axis=0)])

    # The first rank's word on what is missing is everyone's: shards that others write meanwhile would shift the shares.
    step = f"{work.encoder.checkpoint.name} {' '.join(banks)}"
    lacking = _unpacked(broadcast_from_rank0(group, f"missing {step}", look), len(contents))
    first_row = {content: row for row, content in reversed(list(enumerate(contents))) if lacking[row]}
    todo = sorted(first_row.values())  # each content once
    failures: list[str] = []
    not_finite = None
    mine = [todo[place] for place in share(len(todo), group, block=work.batch_size)]
    try:
        _fill(work, banks, stored, mine, failures, on_progress)
    except NumericalError as error:
        not_finite = (error.what, error.hint)
    # A fault of some images is everyone's, told once and whole.
    mine_told = json.dumps([failures, not_finite, [work.clock.waiting, work.clock.encoding] if mine else None])
    told = [json.loads(text) for text in all_gather_object(group, f"filled {step}", mine_told)]
    if any(reasons for reasons, _, _ in told):
        raise unreadable([reason for reasons, _, _ in told for reason in reasons])
    for _, fault, _ in told:
        if fault is not None:
            raise NumericalError(fault[0], hint=fault[1])
    if times := [spent for _, _, spent in told if spent is not None]:
        work.clock.waiting, work.clock.encoding = (sum(column) / len(times) for column in zip(*times, strict=True))
    if group.rank != 0:
        return {}, len(todo)
    beyond_memory = work.loading.beyond_memory
    values = {tap: _completed(bank, contents, stored[tap], beyond_memory=beyond_memory) for tap, bank in banks.items()}
    return values, len(todo)


def _fill(
    work: _Work,
    banks: Mapping[str, Bank],
    stored: Mapping[str, tuple[Tensor | None, list[bool]]],
    todo: Sequence[int],
    failures: list[str],
    on_progress: Progress | None,
) -> None:
    """Encode the images at some rows and keep the features, a shard at a time."""
    kept = 0
    waiting: list[dict[str, Tensor]] = []

    def keep() -> None:
        nonlocal kept
        rows = todo[kept : kept + sum(len(batch[work.taps[0]]) for batch in waiting)]
        for tap, bank in banks.items():
            # Another tap may be why an image is encoded again.
            new = [place for place, row in enumerate(rows) if tap not in stored or not stored[tap][1][row]]
            if new:
                values = torch.cat([batch[tap] for batch in waiting])[new]
                fresh = [rows[place] for place in new]
                write_shard(bank, work.contents(fresh), [work.images.ids[row] for row in fresh], values)
        kept += len(rows)
        waiting.clear()

    for batch in _encoded(work, todo, failures, on_progress):
        waiting.append(batch)
        if sum(len(one[work.taps[0]]) for one in waiting) >= work.shard_rows:
            keep()
    if waiting:
        keep()


def _completed(
    bank: Bank, contents: Sequence[str], stored: tuple[Tensor | None, list[bool]], *, beyond_memory: bool
) -> Tensor:
    """Read the rows that were missing before; every row is there now, or it is an error."""
    values, found = stored
    missing = [row for row, there in enumerate(found) if not there]
    if missing:
        fresh, there_now = read_rows(bank, [contents[row] for row in missing], beyond_memory=beyond_memory)
        if fresh is None or not all(there_now):
            raise StoreError(
                f"{there_now.count(False)} of {len(missing)} rows are not there that were written a moment ago",
                where=str(bank.folder),
                hint="Ranks on several hosts need a --cache folder that all of them see; and nobody may prune it now.",
            )
        if len(missing) == len(contents):
            return fresh
        assert values is not None
        values[torch.tensor(missing)] = fresh
    assert values is not None
    return values


def _packed(flags: Sequence[bool]) -> str:
    return base64.b64encode(np.packbits(np.array(flags, dtype=bool)).tobytes()).decode()


def _unpacked(text: str, count: int) -> list[bool]:
    bits = np.unpackbits(np.frombuffer(base64.b64decode(text), dtype=np.uint8), count=count)
    return [bool(bit) for bit in bits]


def _encoded(
    work: _Work, rows: Sequence[int], failures: list[str], on_progress: Progress | None
) -> Iterator[dict[str, Tensor]]:
    """Give the features of the images at some rows, a batch at a time: float32 on the CPU, by tap.

    failures: gets the reason of every image that cannot be used. From the first on nothing more is encoded: there will be no
    result, and the pass only completes the list.
    """
    encoder, clock = work.encoder, work.clock
    cuda = encoder.device.type == "cuda"
    pixels_of = PixelList(
        source=work.images.source,
        image_ids=[work.images.ids[row] for row in rows],
        transform=encoder.transform,
        hashes=work.hashes,
        decoder=work.loading.decoder,
    )
    workers = work.loading.workers
    if workers is None:
        workers = automatic_workers(pixels_of, batch_size=work.batch_size, cuda=cuda)
    batches = load_pixels(pixels_of, batch_size=work.batch_size, workers=workers, pinned=cuda)
    done = 0
    under_way: tuple[int, dict[str, Tensor]] | None = None  # on the device, while the next batch is decoded
    while True:
        asked = time.perf_counter()
        batch = next(batches, None)
        arrived = time.perf_counter()
        clock.waiting += arrived - asked
        ready = under_way
        under_way = None
        if batch is not None:
            place = work.images.source.place
            failures += [f"{place(image_id)}: {reason}" for image_id, reason in batch.failures]
            if not failures:
                seen = work.kept(pixels_of.image_ids[done : done + len(batch.pixels)])
                features, refused = _encode_within_memory(work, batch.pixels, seen)
                failures += [f"{place(pixels_of.image_ids[done + row])}: {reason}" for row, reason in refused]
                # Rows that the device refused were encoded as black images: nobody must keep them.
                under_way = None if refused else (done, features)
            done += len(batch.pixels)
            if on_progress is not None:
                on_progress(done, len(rows))
        if ready is not None:
            first, on_device = ready
            given = {tap: values.cpu() for tap, values in on_device.items()}
            if first == 0:
                _check_memory(work, given)
            _check_finite(given, pixels_of.image_ids[first:], encoder)
            clock.encoding += time.perf_counter() - arrived
            yield given
        else:
            clock.encoding += time.perf_counter() - arrived
        if batch is None:
            return


def _encode_within_memory(
    work: _Work, pixels: Tensor | Sequence[bytes | Pixels], seen: Tensor | None
) -> tuple[dict[str, Tensor], list[tuple[int, str]]]:
    """Encode a batch, in halves and their halves where memory runs out.

    seen:    (b, k), the patches to look at; None for all
    returns: features by tap, on the device; and rows that the device's decoder refused, with the reasons
    """
    refused: dict[int, str] = {}

    def features_of(rows: slice) -> dict[str, Tensor]:
        part = pixels[rows]
        if not isinstance(part, Tensor):
            part, reasons = decode_on_device(part, work.encoder.transform, work.encoder.device)
            refused.update((rows.start + row, reason) for row, reason in reasons.items())
        if seen is None:
            return encode(work.encoder, part, work.taps)
        return encode_kept(work.encoder, part, work.taps, seen[rows])

    kept = "Features that were finished are kept; the same command goes on from there."
    parts = run_with_oom_backoff(work.encoder, len(pixels), work.clock, features_of, kept=kept)
    return {tap: torch.cat([part[tap] for part in parts]) for tap in work.taps}, sorted(refused.items())


def _check_memory(work: _Work, batch: Mapping[str, Tensor]) -> None:
    """Refuse what would end with a process killed by the system, hours later."""
    needed = sum(4 * rows.shape[1] for rows in batch.values()) * len(work.images)
    there = available_bytes()
    if there is not None and needed > there and not work.loading.beyond_memory:
        raise ResourceError(
            f"the features of {len(work.images):,} images need {needed:,} bytes of memory, {there:,} are available",
            hint="Ask for fewer probes or a smaller --subset at a time, or use a machine or a job with more memory.",
        )


def _check_finite(values: Mapping[str, Tensor], image_ids: Sequence[str], encoder: Encoder) -> None:
    for tap, rows in values.items():
        bad = (~rows.isfinite().all(dim=1)).nonzero().flatten().tolist()
        if bad:
            names = ", ".join(image_ids[row] for row in bad[:_SHOWN])
            raise NumericalError(
                f"{encoder.checkpoint.name}: features at tap {tap} are not finite for {len(bad)} images, first {names}",
                hint="Retry with --precision fp32." if encoder.precision != "fp32" else "The weights overflow here.",
            )
