"""Augmented features: the frozen encoder's features of an epoch's crops, step by step, never all at once."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from msn_eval.data.augmentation import RandomCrops
from msn_eval.data.hashing import unreadable
from msn_eval.data.images import ImageSet
from msn_eval.data.loader import PixelBatch, PixelList, automatic_workers, load_pixels
from msn_eval.distributed import group as distributed
from msn_eval.distributed.group import Group
from msn_eval.errors import NumericalError
from msn_eval.features.batch_size import AdaptiveBatchSize, run_with_oom_backoff
from msn_eval.features.encoder import Encoder, encode
from msn_eval.features.extraction import Loading, automatic_batch_size

_SHOWN = 5


@dataclass(frozen=True, kw_only=True)
class AugmentedImages:
    """Labelled images and the encoder that sees them, anew in every epoch.

    labels: (n,) int64 in [0, n_classes), of `images` in their order
    hashes: SHA-256 of each image's bytes; an image that no longer has its hash is refused
    """

    images: ImageSet
    labels: Tensor
    hashes: Mapping[str, str] | None
    encoder: Encoder
    tap: str
    loading: Loading

    @property
    def n_classes(self) -> int:
        return len(self.images.classes)

    @property
    def dim(self) -> int:
        side = self.encoder.transform.crop
        blank = torch.zeros(1, side, side, 3, dtype=torch.uint8)
        return _features_of(self, blank, AdaptiveBatchSize(images=1)).shape[1]


def features_from(
    images: AugmentedImages,
    labels: Tensor,
    batches: Sequence[Tensor],
    *,
    seed: int,
    epoch: int,
    share: float,
    group: Group,
) -> Iterator[Iterator[tuple[Tensor, Tensor]]]:
    """Give, for each batch, this rank's part of it in parts that fit the device: features (b, d) float32 and their labels.

    labels:  (n,) int64 by place
    batches: places of each step's images
    share:   smallest share of an image's area that a crop keeps
    A step's parts do not depend on where an epoch is entered. Each is to be taken up before the next step.
    Raises DataError naming images that cannot be used, NumericalError for features that are not finite, ResourceError
    where memory is too small for one image.
    """
    mine = [batch[_part_of(len(batch), group)] for batch in batches]
    places = torch.cat(mine).tolist() if mine else []
    size = images.loading.batch_size or automatic_batch_size(images.encoder)
    pixels_of = PixelList(
        source=images.images.source,
        image_ids=[images.images.ids[place] for place in places],
        transform=images.encoder.transform,
        hashes=images.hashes,
        crops=RandomCrops(seed=seed, epoch=epoch, share=share),
    )
    cuda = images.encoder.device.type == "cuda"
    workers = images.loading.workers
    if workers is None:
        workers = automatic_workers(pixels_of, batch_size=size, cuda=cuda)
    sizes = (len(part) for batch in mine for part in torch.split(batch, size))
    pixels = _cut(load_pixels(pixels_of, batch_size=size, workers=workers, pinned=cuda), images, sizes)
    portion = AdaptiveBatchSize(images=size)
    for batch in mine:
        yield _encoded(images, labels, torch.split(batch, size), pixels, portion)


def _part_of(count: int, group: Group) -> slice:
    rows = distributed.share(count, group, block=1)
    return slice(rows.start, rows.stop)


def _encoded(
    images: AugmentedImages,
    labels: Tensor,
    parts: Sequence[Tensor],
    pixels: Iterator[Tensor],
    portion: AdaptiveBatchSize,
) -> Iterator[tuple[Tensor, Tensor]]:
    device = images.encoder.device
    for places in parts:
        features = _features_of(images, next(pixels), portion)
        bad = (~features.isfinite().all(dim=1)).nonzero().flatten().tolist()
        if bad:
            names = ", ".join(images.images.ids[int(places[row])] for row in bad[:_SHOWN])
            raise NumericalError(
                f"features at tap {images.tap} are not finite for {len(bad)} augmented images, first {names}",
                hint="Retry with --precision fp32.",
            )
        yield features, labels[places].to(device)


def _features_of(images: AugmentedImages, pixels: Tensor, portion: AdaptiveBatchSize) -> Tensor:
    """Encode a part of a step. Where memory is short the encoder alone goes in smaller ones: the step is cut as before."""

    def encoded(rows: slice) -> Tensor:
        return encode(images.encoder, pixels[rows], [images.tap])[images.tap]

    # Put together outside of inference mode, whose tensors gradients cannot pass.
    return torch.cat(run_with_oom_backoff(images.encoder, len(pixels), portion, encoded))


def _cut(batches: Iterator[PixelBatch], images: AugmentedImages, sizes: Iterator[int]) -> Iterator[Tensor]:
    """Cut a loader's batches anew: (count, S, S, 3) uint8 for each of the sizes. Raises DataError for images that cannot be
    used."""
    left: list[Tensor] = []
    for count in sizes:
        while sum(map(len, left)) < count:
            batch = next(batches)
            assert isinstance(batch.pixels, Tensor)
            if batch.failures:
                place = images.images.source.place
                raise unreadable([f"{place(image_id)}: {reason}" for image_id, reason in batch.failures])
            left.append(batch.pixels)
        whole = torch.cat(left)
        left = [whole[count:]]
        yield whole[:count]
