"""Feature extraction: decode, encode in batches, and cache."""

import hashlib
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor

from msn_eval.data.decoders import Pixels, decode_on_device, decoder_version
from msn_eval.data.hashing import hash_images, make_unreadable_error
from msn_eval.data.images import ImageSet
from msn_eval.data.loader import PixelList, automatic_workers, load_pixels
from msn_eval.distributed.group import ALONE, Group, all_gather_object, broadcast_from_rank0, split_across_ranks
from msn_eval.errors import NumericalError, ResourceError, StoreError, format_count, named_as_arguments
from msn_eval.features.batch_size import AdaptiveBatchSize, run_with_oom_backoff
from msn_eval.features.cache import (
    FeatureFolder,
    FeatureKey,
    find_feature_folder,
    find_listed,
    open_feature_folder,
    read_note,
    read_rows,
    write_note,
    write_shard,
)
from msn_eval.features.collapse import SPECTRUM_VERSION, Spectrum, measure_spectrum
from msn_eval.features.encoder import Encoder, check_frozen, encode, resolve_tap
from msn_eval.features.patch_drop import (
    PatchDrop,
    check_patch_drop,
    draw_kept_patches,
    encode_kept_patches,
    patch_count,
)
from msn_eval.features.transfer import await_upload, start_download
from msn_eval.files.json_records import canonical_json, read_fields
from msn_eval.process import available_bytes

_log = logging.getLogger(__name__)
EXTRACTOR = 1  # raised whenever the same weights and images would give different features
_CPU_BATCH = 16  # at 224 pixels; larger batches measured slower on CPUs
_CUDA_BATCH = 256
_CPU_SHARD_ROWS, _CUDA_SHARD_ROWS = 256, 2048  # a kill loses at most one shard: about a minute, or a second
_SHOWN = 5
_NOTE_DIGITS = 32
Progress = Callable[[int, int], None]  # images done, all images


@dataclass(frozen=True, kw_only=True)
class Features:
    """Features of a list of images.

    Attributes:
        values: (n, d) float32, as returned by the encoder. Probes normalise for themselves.
        labels: (n,) int64 in [0, n_classes).
        image_ids: n unique names, in row order.
        n_classes: Number of classes.
        tap: Name of the tap.
    """

    values: Tensor
    labels: Tensor
    image_ids: tuple[str, ...]
    n_classes: int
    tap: str

    def __repr__(self) -> str:
        shape = tuple(self.values.shape)
        return f"Features(shape={shape}, tap={self.tap!r}, images={len(self.image_ids)}, classes={self.n_classes})"

    @cached_property
    def _rows(self) -> Mapping[str, int]:
        return {image_id: row for row, image_id in enumerate(self.image_ids)}

    def only(self, image_ids: Sequence[str]) -> "Features":
        """Return the rows of the named images, in the given order; `self` if these are all rows in their own order."""
        if len(image_ids) == len(self.image_ids) and tuple(image_ids) == self.image_ids:
            return self
        rows = torch.tensor([self._rows[image_id] for image_id in image_ids])
        return replace(self, values=self.values[rows], labels=self.labels[rows], image_ids=tuple(image_ids))


@dataclass(frozen=True, kw_only=True)
class Loading:
    """How images are decoded and batched.

    Attributes:
        decoder: Name of the decoder. It changes numbers; the other fields change only speed.
        batch_size: Images per batch; None chooses by device and image size.
        workers: Decoding processes; None chooses.
        beyond_memory: Map cached rows that do not fit into memory from a file, for probes that read them in chunks.
    """

    decoder: str = "pillow"
    batch_size: int | None = None
    workers: int | None = None
    beyond_memory: bool = False


@dataclass(frozen=True, kw_only=True)
class Extraction:
    """Features by tap, and their cost.

    Attributes:
        features: By tap; empty on all ranks but rank 0.
        read: Images that were encoded now, by all ranks together.
        reused: Images whose features came from the cache.
        seconds: Wall time.
        decode_seconds: Time in which the encoder waited for pixels, mean over the ranks that encoded images.
        encode_seconds: Time in the encoder, mean over the same ranks.
        batch_size: The last one used; out-of-memory reduces it.
    """

    features: Mapping[str, Features]
    read: int
    reused: int
    seconds: float
    decode_seconds: float
    encode_seconds: float
    batch_size: int


@named_as_arguments(("data", "tap", "batch_size", "workers", "cache"))
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

    Args:
        encoder: As returned by `load_encoder`.
        data: A data set such as `digits` or the path of an image folder. Only the given split must exist.
        split: `train` or `val`.
        tap: Name of a tap; None means the encoder's first.
        batch_size: Images per batch; None chooses by device and image size.
        workers: Decoding processes; None chooses.
        cache: Folder of cached features; None caches nothing.

    Raises:
        DataError: The data set is missing, or images cannot be used; the error lists them.
        UsageError: The encoder does not have this tap.
    """
    from msn_eval.data import read_split

    chosen = resolve_tap(encoder, tap or encoder.taps[0], by_hand=True)
    cache_dir = Path(cache) if cache is not None else None
    images = read_split(data, split, cache_dir=cache_dir)
    loading = Loading(batch_size=batch_size, workers=workers)
    hashes = hash_images(images, cache_dir=cache_dir) if cache_dir is not None else None
    with check_frozen(encoder):
        result = extract_features(encoder, images, taps=[chosen], hashes=hashes, loading=loading, cache=cache_dir)
    return result.features[chosen]


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
    """Extract features at several taps: one forward pass per image, none for images in the cache.

    Args:
        encoder: The encoder.
        images: Images to encode.
        taps: Names of taps that the encoder has.
        hashes: SHA-256 of each image's bytes, required with a cache. An image whose bytes have changed is refused.
        loading: Decoding and batching.
        drop: Patches of each image to drop; None for complete images.
        cache: Folder of cached features, visible to all ranks of the group.
        group: Ranks that share the job.
        on_progress: Called with the number of images done, and of all images.

    Raises:
        DataError: Images cannot be used; the error lists all of them.
        NumericalError: Features are not finite.
        ResourceError: Out of memory, or a decoding process failed.
        StoreError: The cache cannot be written.
        UsageError: Patches cannot be dropped from this network.
    """
    started = time.perf_counter()
    if drop is not None:
        check_patch_drop(encoder, drop)
    job = _Job(encoder=encoder, images=images, taps=tuple(taps), hashes=hashes, loading=loading, drop=drop)
    if cache is None:
        values = _extract_to_memory(job, on_progress)
        read = len(images)
    else:
        values, read = _extract_through_cache(job, cache, group, on_progress)
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
        decode_seconds=job.timing.waiting,
        encode_seconds=job.timing.encoding,
        batch_size=job.timing.images,
    )


def choose_batch_size(encoder: Encoder) -> int:
    """Return a batch size that keeps the device busy: larger for smaller images."""
    base = _CUDA_BATCH if encoder.device.type == "cuda" else _CPU_BATCH
    return int(min(16 * base, max(base, base * (224 / encoder.transform.crop) ** 2)))


def feature_key(
    encoder: Encoder, tap: str, *, decoder: str, embedded: bool, drop: PatchDrop | None = None
) -> FeatureKey:
    """Return the cache key of an encoder's features at one tap.

    Args:
        encoder: The encoder.
        tap: Name of the tap.
        decoder: Name of the decoder.
        embedded: The images are arrays instead of files; they are only resized.
        drop: Patches to drop.
    """
    checkpoint = encoder.checkpoint
    # Pillow decodes what the others do not support.
    decoders = ["embedded" if embedded else decoder_version(decoder), decoder_version("pillow")]
    return FeatureKey(
        weights=checkpoint.weights_sha256,
        arch=encoder.arch,
        network=checkpoint.key,
        code=checkpoint.code_sha256,
        tap=tap,
        transform={name: value for name, value in vars(encoder.transform).items() if value is not None},
        decoder=", ".join(dict.fromkeys(decoders)),
        precision=encoder.precision,
        device=encoder.device.type,
        compiled=encoder.compiled,
        torch=torch.__version__,
        timm=version("timm"),
        extractor=EXTRACTOR,
        patches=None if drop is None else vars(drop),
    )


def _row_key(image_id: str, sha256: str, drop: PatchDrop | None) -> str:
    """Return the key of an image's row: the hash of its bytes and, if patches are drawn by its id, of the id too."""
    if drop is None:
        return sha256
    return hashlib.sha256(f"{sha256} ".encode() + os.fsencode(image_id)).hexdigest()


def read_spectrum(
    encoder: Encoder,
    images: ImageSet,
    features: Features,
    hashes: Mapping[str, str],
    *,
    cache: Path | None,
    decoder: str,
) -> Spectrum:
    """Return the spectrum of complete images' features: measured now, or as a run before has kept it in their cache.

    Args:
        encoder: The encoder.
        images: The images.
        features: Their features at one tap.
        hashes: SHA-256 of each image's bytes by id.
        cache: The cache folder, or None.
        decoder: Name of the decoder.
    """
    if cache is None:
        return measure_spectrum(features.values)
    key = feature_key(encoder, features.tap, decoder=decoder, embedded=images.source.root is None)
    folder = find_feature_folder(cache, key)
    addressed = canonical_json([SPECTRUM_VERSION, [hashes[image_id] for image_id in features.image_ids]])
    name = f"spectrum-{hashlib.sha256(addressed.encode()).hexdigest()[:_NOTE_DIGITS]}"
    if (known := read_note(folder, name)) is not None:
        return read_fields(Spectrum, known)
    spectrum = measure_spectrum(features.values)
    write_note(folder, name, asdict(spectrum))
    return spectrum


def list_missing_images(
    encoder: Encoder,
    images: ImageSet,
    *,
    taps: Sequence[str],
    hashes: Mapping[str, str],
    decoder: str,
    drop: PatchDrop | None,
    cache: Path,
) -> list[str]:
    """Return the images whose features are not in the cache. Reads manifests only."""
    contents = {image_id: _row_key(image_id, hashes[image_id], drop) for image_id in images.ids}
    known = set(contents.values())
    for tap in taps:
        key = feature_key(encoder, tap, decoder=decoder, embedded=images.source.root is None, drop=drop)
        known &= find_listed(find_feature_folder(cache, key), known)
    return [image_id for image_id, content in contents.items() if content not in known]


@dataclass(kw_only=True)
class _Timing(AdaptiveBatchSize):
    """Seconds of waiting for pixels and of encoding, and the current batch size."""

    waiting: float = 0.0
    encoding: float = 0.0


@dataclass(frozen=True, kw_only=True)
class _Job:
    """Arguments of one call of `extract_features`, and its timing."""

    encoder: Encoder
    images: ImageSet
    taps: tuple[str, ...]
    hashes: Mapping[str, str] | None
    loading: Loading
    drop: PatchDrop | None = None

    @cached_property
    def timing(self) -> _Timing:
        return _Timing(images=self.batch_size)

    @cached_property
    def uploads(self) -> torch.cuda.Stream | None:
        """The stream that copies or decodes pixels beside the encoder's kernels, None on a CPU."""
        device = self.encoder.device
        return torch.cuda.Stream(device, priority=-1) if device.type == "cuda" else None  # type: ignore[no-untyped-call]

    @property
    def batch_size(self) -> int:
        return self.loading.batch_size or choose_batch_size(self.encoder)

    @property
    def shard_rows(self) -> int:
        """Rows per shard: a multiple of the batch size, so that a resumed run has the same batches as a complete one."""
        rows = _CUDA_SHARD_ROWS if self.encoder.device.type == "cuda" else _CPU_SHARD_ROWS
        return -(-rows // self.batch_size) * self.batch_size

    def contents(self, rows: Sequence[int]) -> list[str]:
        assert self.hashes is not None
        ids = [self.images.ids[row] for row in rows]
        return [_row_key(image_id, self.hashes[image_id], self.drop) for image_id in ids]

    def kept(self, image_ids: Sequence[str]) -> Tensor | None:
        """Return the kept patches of images, (b, k) int64, or None for complete images."""
        if self.drop is None:
            return None
        return draw_kept_patches(self.drop, image_ids, patches=patch_count(self.encoder))


def _extract_to_memory(job: _Job, on_progress: Progress | None) -> dict[str, Tensor]:
    values: dict[str, Tensor] = {}
    failures: list[str] = []
    done = 0
    for batch in _encode_images(job, range(len(job.images)), failures, on_progress):
        for tap, rows in batch.items():
            if tap not in values:
                values[tap] = torch.empty(len(job.images), rows.shape[1])
            values[tap][done : done + len(rows)] = rows
        done += len(next(iter(batch.values())))
    if failures:
        raise make_unreadable_error(failures)
    assert done == len(job.images)
    return values


def _extract_through_cache(
    job: _Job, cache: Path, group: Group, on_progress: Progress | None
) -> tuple[dict[str, Tensor], int]:
    """Encode what the cache lacks, each rank its share, and read all rows on rank 0.

    Returns:
        Values by tap, empty on the other ranks; and the number of images that all ranks encoded.
    """
    embedded = job.images.source.root is None
    folders, unwritten = {}, _Unwritten(allowed=group.world == 1)
    for tap in job.taps:
        key = feature_key(job.encoder, tap, decoder=job.loading.decoder, embedded=embedded, drop=job.drop)
        folders[tap] = find_feature_folder(cache, key)
        try:
            open_feature_folder(cache, key, checkpoint=job.encoder.checkpoint.name)
        except StoreError as error:
            unwritten.error = error  # which matters only if there is something to write
    contents = job.contents(range(len(job.images)))
    stored: dict[str, tuple[Tensor | None, list[bool]]] = {}

    def find_missing() -> list[bool]:
        for tap, folder in folders.items():
            stored[tap] = read_rows(folder, contents, beyond_memory=job.loading.beyond_memory)
        return [not all(row) for row in zip(*(present for _, present in stored.values()), strict=True)]

    # Rank 0 decides what is missing: shards that other ranks write meanwhile would shift the shares.
    step = f"{job.encoder.checkpoint.name} {' '.join(folders)}"
    missing = broadcast_from_rank0(group, f"missing {step}", find_missing)
    first_row = {content: row for row, content in reversed(list(enumerate(contents))) if missing[row]}
    todo = sorted(first_row.values())  # each content once
    failures: list[str] = []
    not_finite = None
    own = [todo[index] for index in split_across_ranks(len(todo), group, block=job.batch_size)]
    try:
        _fill_cache(job, folders, stored, own, failures, on_progress, unwritten)
    except NumericalError as error:
        not_finite = (error.what, error.hint)
    # All ranks raise the same error, with the failures of all of them.
    report = (failures, not_finite, (job.timing.waiting, job.timing.encoding) if own else None)
    reports = all_gather_object(group, f"filled {step}", report)
    if all_failures := [reason for reasons, _, _ in reports for reason in reasons]:
        raise make_unreadable_error(all_failures)
    for _, fault, _ in reports:
        if fault is not None:
            raise NumericalError(fault[0], hint=fault[1])
    if times := [seconds for _, _, seconds in reports if seconds is not None]:
        job.timing.waiting, job.timing.encoding = (sum(column) / len(times) for column in zip(*times, strict=True))
    if group.rank != 0:
        return {}, len(todo)
    beyond_memory = job.loading.beyond_memory
    values = {
        tap: _read_missing(folder, contents, stored[tap], beyond_memory, unwritten.rows.get(tap, ()))
        for tap, folder in folders.items()
    }
    return values, len(todo)


@dataclass(kw_only=True)
class _Unwritten:
    """Rows that are kept in memory because the cache cannot be written.

    Attributes:
        allowed: Whether rows may be kept. Several ranks exchange them through the cache.
        error: Why nothing more is written, None while it is.
        rows: By tap, contents and (n, d) float32 values.
    """

    allowed: bool
    error: StoreError | None = None
    rows: dict[str, list[tuple[list[str], Tensor]]] = field(default_factory=dict)

    def keep(self, tap: str, contents: list[str], values: Tensor, error: StoreError) -> None:
        """Keep rows; the first ones with a warning. Raises the error where none may be kept."""
        if not self.allowed:
            raise error
        if not self.rows:
            _log.warning("%s: %s; this run continues without caching new features", error.where, error.what)
        self.error = error
        self.rows.setdefault(tap, []).append((contents, values))


def _fill_cache(
    job: _Job,
    folders: Mapping[str, FeatureFolder],
    stored: Mapping[str, tuple[Tensor | None, list[bool]]],
    todo: Sequence[int],
    failures: list[str],
    on_progress: Progress | None,
    unwritten: _Unwritten,
) -> None:
    """Encode the images of some rows and write their features, one shard at a time. Where the disk refuses, keep them."""
    written = 0
    pending: list[dict[str, Tensor]] = []

    def write_pending() -> None:
        nonlocal written
        rows = todo[written : written + sum(len(batch[job.taps[0]]) for batch in pending)]
        for tap, folder in folders.items():
            # An image may be encoded again because of another tap only.
            new = [index for index, row in enumerate(rows) if tap not in stored or not stored[tap][1][row]]
            if new:
                values = torch.cat([batch[tap] for batch in pending])[new]
                new_rows = [rows[index] for index in new]
                new_contents = job.contents(new_rows)
                try:
                    if unwritten.error is not None:
                        raise unwritten.error
                    write_shard(folder, new_contents, [job.images.ids[row] for row in new_rows], values)
                except StoreError as error:
                    unwritten.keep(tap, new_contents, values, error)
        written += len(rows)
        pending.clear()

    for batch in _encode_images(job, todo, failures, on_progress):
        pending.append(batch)
        if sum(len(batch[job.taps[0]]) for batch in pending) >= job.shard_rows:
            write_pending()
    if pending:
        write_pending()


def _read_missing(
    folder: FeatureFolder,
    contents: Sequence[str],
    stored: tuple[Tensor | None, list[bool]],
    beyond_memory: bool,
    unwritten: Sequence[tuple[list[str], Tensor]],
) -> Tensor:
    """Read the rows that were missing before, or take those that are unwritten. Raises StoreError if a row is missing."""
    values, present = stored
    missing = [row for row, is_present in enumerate(present) if not is_present]
    if missing:
        fresh, now_present = read_rows(folder, [contents[row] for row in missing], beyond_memory=beyond_memory)
        positions: dict[str, list[int]] = {}
        for position, row in enumerate(missing):
            positions.setdefault(contents[row], []).append(position)
        for names, rows in unwritten:
            fresh = fresh if fresh is not None else torch.zeros(len(missing), rows.shape[1])
            for name, values_of_row in zip(names, rows, strict=True):
                fresh[positions[name]] = values_of_row
                for position in positions[name]:
                    now_present[position] = True
        if fresh is None or not all(now_present):
            raise StoreError(
                f"missing: {now_present.count(False)} of {format_count(len(missing), 'row')} that were just written",
                where=str(folder.path),
                hint="On several hosts all ranks must see the same --cache folder. Do not prune it during a run.",
            )
        if len(missing) == len(contents):
            return fresh
        assert values is not None
        values[torch.tensor(missing)] = fresh
    assert values is not None
    return values


def _encode_images(
    job: _Job, rows: Sequence[int], failures: list[str], on_progress: Progress | None
) -> Iterator[dict[str, Tensor]]:
    """Yield the features of the images at some rows in batches: float32 on the CPU, by tap.

    Args:
        job: The extraction.
        rows: Indices of images.
        failures: Receives the reason for every image that cannot be used. After the first one nothing more is encoded, as there
            will be no result; the remaining images are only checked.
        on_progress: Called after each batch.
    """
    encoder, timing = job.encoder, job.timing
    cuda = encoder.device.type == "cuda"
    pixel_list = PixelList(
        source=job.images.source,
        image_ids=[job.images.ids[row] for row in rows],
        transform=encoder.transform,
        hashes=job.hashes,
        decoder=job.loading.decoder,
    )
    workers = job.loading.workers
    if workers is None:
        workers = automatic_workers(pixel_list, batch_size=job.batch_size, cuda=cuda)
    batches = load_pixels(pixel_list, batch_size=job.batch_size, workers=workers, pinned=cuda)
    place = job.images.source.place
    done = 0
    in_flight: tuple[int, dict[str, Tensor], torch.cuda.Event | None] | None = None  # the batch before, see below
    while True:
        requested = time.perf_counter()
        batch = next(batches, None)
        arrived = time.perf_counter()
        timing.waiting += arrived - requested
        previous, in_flight = in_flight, None
        if batch is not None:
            failures += [f"{place(image_id)}: {reason}" for image_id, reason in batch.failures]
            if not failures:
                kept = job.kept(pixel_list.image_ids[done : done + len(batch.pixels)])
                features, refused = _encode_batch(job, batch.pixels, kept)
                failures += [f"{place(pixel_list.image_ids[done + row])}: {reason}" for row, reason in refused]
                # Rows that the device's decoder refused were encoded as black images and must not be cached.
                in_flight = None if refused else (done, *start_download(features))
            done += len(batch.pixels)
            if on_progress is not None:
                on_progress(done, len(rows))
        if previous is not None:
            first, values, fetched = previous
            if fetched is not None:
                fetched.synchronize()  # waits for the previous batch only: the device already works on this one
            if first == 0:
                _check_memory(job, values)
            check_finite(values, pixel_list.image_ids[first:], encoder)
            timing.encoding += time.perf_counter() - arrived
            yield values
        else:
            timing.encoding += time.perf_counter() - arrived
        if batch is None:
            return


def _encode_batch(
    job: _Job, pixels: Tensor | Sequence[bytes | Pixels], kept: Tensor | None
) -> tuple[dict[str, Tensor], list[tuple[int, str]]]:
    """Encode a batch; halve it on out-of-memory.

    Args:
        job: The extraction.
        pixels: Decoded images, or encoded ones for the device's decoder.
        kept: (b, k) int64, the patches to use; None for all.

    Returns:
        Features by tap, on the device; and the rows that the device's decoder refused, with reasons.
    """
    refused: dict[int, str] = {}

    def run(rows: slice) -> dict[str, Tensor]:
        part = pixels[rows]
        with torch.cuda.stream(job.uploads):  # does nothing on a CPU
            if not isinstance(part, Tensor):
                part, reasons = decode_on_device(part, job.encoder.transform, job.encoder.device)
                refused.update((rows.start + row, reason) for row, reason in reasons.items())
            elif job.uploads is not None:
                part = part.pin_memory().to(job.encoder.device, non_blocking=True)
        if job.uploads is not None:
            await_upload(part, job.uploads)
        if kept is None:
            return encode(job.encoder, part, job.taps)
        return encode_kept_patches(job.encoder, part, job.taps, kept[rows])

    advice = "Finished features are kept; the same command continues from there."
    parts = run_with_oom_backoff(job.encoder, len(pixels), job.timing, run, kept=advice)
    return {tap: torch.cat([part[tap] for part in parts]) for tap in job.taps}, sorted(refused.items())


def _check_memory(job: _Job, batch: Mapping[str, Tensor]) -> None:
    """Raise ResourceError after the first batch if the features of all images cannot fit into memory."""
    needed = sum(4 * rows.shape[1] for rows in batch.values()) * len(job.images)
    available = available_bytes()
    if available is not None and needed > available and not job.loading.beyond_memory:
        raise ResourceError(
            f"the features of {len(job.images):,} images need {needed:,} bytes of memory; {available:,} are available",
            hint="Use fewer probes or a smaller --subset at a time, or a machine with more memory.",
        )


def check_finite(values: Mapping[str, Tensor], image_ids: Sequence[str], encoder: Encoder) -> None:
    """Raise NumericalError for features that are not finite.

    Args:
        values: (n, d) float32 by tap.
        image_ids: Names of the images; those after the first n are ignored.
        encoder: The encoder that computed them.
    """
    for tap, rows in values.items():
        bad = (~rows.isfinite().all(dim=1)).cpu().nonzero().flatten().tolist()
        if bad:
            names, count = ", ".join(image_ids[row] for row in bad[:_SHOWN]), format_count(len(bad), "image")
            raise NumericalError(
                f"{encoder.checkpoint.name}: features at tap {tap} are not finite for {count}, first {names}",
                hint="Retry with --precision fp32." if encoder.precision != "fp32" else "The weights overflow in fp32.",
            )
