"""Features: what an encoder says about a list of images, and how it is asked."""

import hashlib
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from msn_eval.encoder import Encoder, encode, resolve_tap, unchanged
from msn_eval.errors import NumericalError, ResourceError
from msn_eval.file_hashes import unreadable
from msn_eval.images import BadImageError, EvalTransform, ImageSet, resize_and_crop

_log = logging.getLogger(__name__)
_CPU_BATCH = 16  # larger batches measured slower on CPUs at 224 pixels
_CUDA_BATCH = 256
_MOST_WORKERS = 16
_FEW_IMAGES = 512  # below, starting workers costs more than they save
_WORKER_TIMEOUT_SECONDS = 300.0
_SHOWN = 5


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
        """Give the rows of the named images, in the order named."""
        rows = torch.tensor([self._rows[image_id] for image_id in image_ids])
        return replace(self, values=self.values[rows], labels=self.labels[rows], image_ids=tuple(image_ids))


def extract(
    encoder: Encoder,
    data: str,
    *,
    split: str = "val",
    tap: str | None = None,
    batch_size: int | None = None,
    workers: int | None = None,
) -> Features:
    """Extract the features of one split of a data set.

    data:  `digits` or the path of an image folder; only this split need be there
    tap:   the encoder's first where None
    Raises DataError listing every image that cannot be used, UsageError for a tap that the encoder has not.
    """
    from msn_eval.datasets import read_split

    chosen = resolve_tap(encoder, tap or encoder.taps[0], by_hand=True)
    images = read_split(data, split)
    with unchanged(encoder):
        return extract_features(encoder, images, taps=[chosen], batch_size=batch_size, workers=workers)[chosen]


def extract_features(
    encoder: Encoder,
    images: ImageSet,
    *,
    taps: Sequence[str],
    hashes: Mapping[str, str] | None = None,
    batch_size: int | None = None,
    workers: int | None = None,
    on_progress: Callable[[int], None] | None = None,
) -> dict[str, Features]:
    """Extract the features of `images` at every tap in one pass.

    hashes: SHA-256 of each image's bytes; an image that no longer has its hash is refused
    batch_size, workers: chosen for the device and the image size where None
    on_progress: told the number of images of every batch done
    Raises DataError listing every unusable image, NumericalError for features that are not finite, ResourceError
    where a loader worker dies.
    """
    batch_size = batch_size or automatic_batch_size(encoder)
    workers = automatic_workers(encoder, images) if workers is None else workers
    loader = _loader(images, encoder, hashes, batch_size=batch_size, workers=workers)
    values: dict[str, Tensor] = {}
    failures: list[str] = []
    row = 0
    for pixels, reasons in _batches(loader):
        failures += reasons
        if not failures:  # once an image is bad there will be no result, and the pass only completes the list
            features = encode(encoder, pixels, taps)
            for tap in taps:
                batch = features[tap].cpu()
                if tap not in values:
                    values[tap] = torch.empty(len(images), batch.shape[1])
                values[tap][row : row + len(batch)] = batch
            _check_finite(values, images.ids, row, row + len(pixels), encoder)
        row += len(pixels)
        if on_progress is not None:
            on_progress(len(pixels))
    if failures:
        raise unreadable(failures)
    labels = torch.tensor(images.labels, dtype=torch.int64)
    return {
        tap: Features(values=values[tap], labels=labels, image_ids=images.ids, n_classes=len(images.classes), tap=tap)
        for tap in taps
    }


def automatic_batch_size(encoder: Encoder) -> int:
    """Give a batch that keeps the device busy: more of smaller images."""
    base = _CUDA_BATCH if encoder.device.type == "cuda" else _CPU_BATCH
    return int(min(16 * base, max(base, base * (224 / encoder.transform.crop) ** 2)))


def automatic_workers(encoder: Encoder, images: ImageSet) -> int:
    """Give the number of decoding processes: none for few or embedded images, one a core beside a GPU."""
    if len(images) < _FEW_IMAGES or images.source.root is None:
        return 0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(_MOST_WORKERS, cores) if encoder.device.type == "cuda" else max(1, cores // 2)


@dataclass(frozen=True)
class _Pixels(Dataset[tuple[NDArray[np.uint8], str]]):
    """The images as a loader wants them: pixels, or zeros and the reason why there are none."""

    images: ImageSet
    transform: EvalTransform
    hashes: Mapping[str, str] | None

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, row: int) -> tuple[NDArray[np.uint8], str]:
        image_id = self.images.ids[row]
        source = self.images.source
        try:
            content = source.read(image_id)
            if self.hashes is not None and hashlib.sha256(content).hexdigest() != self.hashes[image_id]:
                raise BadImageError("it changed since it was hashed; start again when nothing writes to the data set")
            return resize_and_crop(source.decode(content), self.transform), ""
        except (BadImageError, OSError) as error:
            side = self.transform.crop
            return np.zeros((side, side, 3), dtype=np.uint8), f"{source.place(image_id)}: {error}"


def _collate(rows: Sequence[tuple[NDArray[np.uint8], str]]) -> tuple[Tensor, list[str]]:
    pixels = torch.from_numpy(np.stack([pixels for pixels, _ in rows]))
    return pixels, [reason for _, reason in rows if reason]


def _loader(
    images: ImageSet, encoder: Encoder, hashes: Mapping[str, str] | None, *, batch_size: int, workers: int
) -> "DataLoader[tuple[NDArray[np.uint8], str]]":
    return DataLoader(
        _Pixels(images, encoder.transform, hashes),
        batch_size=batch_size,
        num_workers=workers,
        collate_fn=_collate,
        pin_memory=encoder.device.type == "cuda",
        timeout=_WORKER_TIMEOUT_SECONDS if workers else 0,
    )


def _batches(loader: "DataLoader[tuple[NDArray[np.uint8], str]]") -> Iterator[tuple[Tensor, list[str]]]:
    try:
        yield from cast("DataLoader[tuple[Tensor, list[str]]]", loader)
    except (RuntimeError, ConnectionError) as error:
        if loader.num_workers == 0:
            raise
        raise ResourceError(
            f"a loader worker died or hung: {str(error).partition(chr(10))[0]}",
            remedy="Host memory or /dev/shm may be short: try --workers 0, or a smaller --batch-size.",
        ) from error


def _check_finite(
    values: Mapping[str, Tensor], image_ids: Sequence[str], first: int, last: int, encoder: Encoder
) -> None:
    for tap, rows in values.items():
        bad = (~rows[first:last].isfinite().all(dim=1)).nonzero().flatten().tolist()
        if bad:
            names = ", ".join(image_ids[first + row] for row in bad[:_SHOWN])
            raise NumericalError(
                f"{encoder.checkpoint.name}: features at tap {tap} are not finite for {len(bad)} images, first {names}",
                remedy="Retry with --precision fp32." if encoder.precision != "fp32" else "The weights overflow here.",
            )
