"""Features of augmented images: a frozen encoder on the random crops of an epoch, step by step."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from msn_eval.data.augmentation import RandomCrops
from msn_eval.data.hashing import make_unreadable_error
from msn_eval.data.images import ImageSet
from msn_eval.data.loader import PixelBatch, PixelList, automatic_workers, load_pixels
from msn_eval.distributed.group import Group, split_across_ranks
from msn_eval.features.batch_size import AdaptiveBatchSize, run_with_oom_backoff
from msn_eval.features.encoder import Encoder, encode
from msn_eval.features.extraction import Loading, check_finite, choose_batch_size

# Features (b, d) float32 and their labels (b,), both on the encoder's device; and a function that raises NumericalError if the
# features are not finite, for which the host waits.
Chunk = tuple[Tensor, Tensor, Callable[[], None]]


@dataclass(frozen=True, kw_only=True)
class AugmentedImages:
    """Labelled images, and the frozen encoder that sees other crops of them in every epoch.

    Attributes:
        labels: (n,) int64 in [0, n_classes), in the order of `images`.
        hashes: SHA-256 of each image's bytes. An image whose bytes have changed is refused.
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
        return self.encoder.dim_of(self.tap)


def iterate_augmented_features(
    images: AugmentedImages,
    labels: Tensor,
    batches: Sequence[Tensor],
    *,
    seed: int,
    epoch: int,
    share: float,
    group: Group,
) -> Iterator[Iterator[Chunk]]:
    """Yield the features of this rank's part of each batch, in parts that fit the device.

    The parts of a step do not depend on the step at which an epoch is entered. Consume each step before the next.

    Args:
        images: Images and encoder.
        labels: (n,) int64, indexed like `images`.
        batches: Indices of the images of each step.
        seed: Seed of the crops.
        epoch: Epoch of the crops.
        share: Smallest share of an image's area that a crop keeps.
        group: Ranks that share each batch.

    Yields:
        For each batch an iterator of its chunks.

    Raises:
        DataError: Images cannot be used; the error names them.
        ResourceError: One image does not fit into memory.
    """
    ranges = [split_across_ranks(len(batch), group, block=1) for batch in batches]
    own = [batch[rows.start : rows.stop] for batch, rows in zip(batches, ranges, strict=True)]
    indices = torch.cat(own).tolist() if own else []
    size = images.loading.batch_size or choose_batch_size(images.encoder)
    pixel_list = PixelList(
        source=images.images.source,
        image_ids=[images.images.ids[index] for index in indices],
        transform=images.encoder.transform,
        hashes=images.hashes,
        crops=RandomCrops(seed=seed, epoch=epoch, share=share),
    )
    cuda = images.encoder.device.type == "cuda"
    workers = images.loading.workers
    if workers is None:
        workers = automatic_workers(pixel_list, batch_size=size, cuda=cuda)
    sizes = (len(part) for batch in own for part in torch.split(batch, size))
    loaded = load_pixels(pixel_list, batch_size=size, workers=workers, pinned=cuda)
    pixels = _rebatch(loaded, images, sizes)
    adaptive = AdaptiveBatchSize(images=size)
    for batch in own:
        yield _encode_step(images, labels, torch.split(batch, size), pixels, adaptive)


def _encode_step(
    images: AugmentedImages,
    labels: Tensor,
    parts: Sequence[Tensor],
    pixels: Iterator[Tensor],
    size: AdaptiveBatchSize,
) -> Iterator[Chunk]:
    """Encode the parts of one step. On out-of-memory only the forward passes shrink; the parts stay the same."""

    def run(part: Tensor, rows: slice) -> Tensor:
        return encode(images.encoder, part[rows], [images.tap])[images.tap]

    for indices in parts:
        passes = run_with_oom_backoff(images.encoder, len(indices), size, partial(run, next(pixels)))
        features = torch.cat(passes)  # outside of inference mode, so that gradients can use it
        image_ids = [images.images.ids[index] for index in indices.tolist()]
        check = partial(check_finite, {images.tap: features}, image_ids, images.encoder)
        yield features, labels[indices].to(images.encoder.device, non_blocking=True), check


def _rebatch(batches: Iterator[PixelBatch], images: AugmentedImages, sizes: Iterator[int]) -> Iterator[Tensor]:
    """Yield the loader's pixels in batches of the given sizes, (count, S, S, 3) uint8. Raises DataError for bad images."""
    buffered: list[Tensor] = []
    for count in sizes:
        while sum(map(len, buffered)) < count:
            batch = next(batches)
            assert isinstance(batch.pixels, Tensor)
            if batch.failures:
                place = images.images.source.place
                raise make_unreadable_error([f"{place(image_id)}: {reason}" for image_id, reason in batch.failures])
            buffered.append(batch.pixels)
        joined = torch.cat(buffered)
        buffered = [joined[count:]]
        yield joined[:count]
