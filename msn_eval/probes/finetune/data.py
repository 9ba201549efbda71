"""Training images of a step: which ones, and how they are cropped and changed. A pure function of seed, epoch and image."""

import contextlib
import hashlib
import random
import signal
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from timm.data.auto_augment import rand_augment_transform
from timm.data.mixup import Mixup, mixup_target
from timm.data.random_erasing import RandomErasing
from timm.data.transforms import RandomResizedCropAndInterpolation
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from msn_eval.config.recipes import FinetuneRecipe
from msn_eval.data.hashing import make_unreadable_error
from msn_eval.data.images import BadImageError, EvalTransform, ImageSet, read_image, resize_and_crop
from msn_eval.errors import ResourceError

_ORDER, _IMAGE, _STEP, _PATHS = range(4)  # what a seed is used for
_SHIFT = 0.45  # share of the image's side, the farthest that RandAugment moves it
_WORKER_TIMEOUT_SECONDS = 300.0
Item = tuple[int, int]  # epoch and number of an image
_Change = Callable[[Image.Image], Image.Image]


def derive_seed(*key: int, seed: int) -> int:
    """Return a seed in [0, 2^32), a pure function of `key` and `seed`."""
    return int(np.random.SeedSequence((seed, *key)).generate_state(1)[0])


@dataclass(frozen=True, kw_only=True)
class Order:
    """The order of the labelled images: one permutation per epoch, end to end, cut into batches of one size.

    So every batch is full; the end of the last one may reach into one more epoch.

    Attributes:
        images: Number of images, at least 1.
        batch: Images per step, at most `images`; even if images are mixed in pairs.
        epochs: Passes over the images.
        seed: Of the permutations.
    """

    images: int
    batch: int
    epochs: int
    seed: int

    @property
    def steps(self) -> int:
        return max(1, -(-self.epochs * self.images // self.batch))

    @property
    def steps_per_epoch(self) -> int:
        return -(-self.images // self.batch)

    def items(self, step: int, rows: range) -> list[Item]:
        """Return the images at some rows of the batch of a step."""
        positions = (divmod(step * self.batch + row, self.images) for row in rows)
        return [(epoch, int(_permute(self.images, self.seed, epoch)[index])) for epoch, index in positions]


@lru_cache(maxsize=4)
def _permute(images: int, seed: int, epoch: int) -> NDArray[np.int64]:
    return np.random.Generator(np.random.PCG64([seed, _ORDER, epoch])).permutation(images)


def make_order(recipe: FinetuneRecipe, images: int, *, seed: int) -> Order:
    """Return the order of a recipe. A batch has at most all images, and an even number if they are mixed."""
    batch = min(recipe.batch, images)
    if recipe.mixes:
        batch = max(2, batch - batch % 2)
    return Order(images=images, batch=batch, epochs=recipe.epochs, seed=seed)


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Set the global generators, which timm draws from, to a seed for the block, and restore them."""
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.set_rng_state(before[2])


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """The augmentation of a labelled image: timm's crop, flip, RandAugment, normalisation, and erasing.

    A `crop_share` of 1 takes the evaluation's own resize and centre crop instead of a random crop.
    """

    recipe: FinetuneRecipe
    transform: EvalTransform
    seed: int

    def __call__(self, image: Image.Image, item: Item) -> Tensor:
        """Return (3, S, S) float32, normalised; the same for the same image and epoch."""
        with seeded(derive_seed(_IMAGE, *item, seed=self.seed)):
            pixels = np.asarray(self._change(image)).astype(np.float32) / 255
            mean, std = (np.array(values, dtype=np.float32) for values in (self.transform.mean, self.transform.std))
            normalised = torch.from_numpy((pixels - mean) / std).permute(2, 0, 1).contiguous()
            return normalised if self._erasing is None else self._erasing(normalised)

    def _change(self, image: Image.Image) -> Image.Image:
        is_random = self.recipe.crop_share < 1
        cropped = self._crop(image) if is_random else Image.fromarray(resize_and_crop(image, self.transform))
        if random.random() < self.recipe.flip:
            cropped = cropped.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return cropped if self._policy is None else self._policy(cropped)

    @cached_property
    def _crop(self) -> _Change:
        crop = RandomResizedCropAndInterpolation(
            self.transform.crop, scale=(self.recipe.crop_share, 1.0), interpolation=self.transform.interpolation
        )
        return cast(_Change, crop)

    @cached_property
    def _policy(self) -> _Change | None:
        recipe = self.recipe
        if recipe.randaugment_magnitude == 0:
            return None
        name = f"rand-m{recipe.randaugment_magnitude}-n{recipe.randaugment_layers}-mstd{recipe.randaugment_std:f}-inc1"
        fill = tuple(round(255 * value) for value in self.transform.mean)
        policy = rand_augment_transform(name, {"translate_const": int(self.transform.crop * _SHIFT), "img_mean": fill})
        return cast(_Change, policy)

    @cached_property
    def _erasing(self) -> Callable[[Tensor], Tensor] | None:
        if self.recipe.erase == 0:
            return None
        return cast(Callable[[Tensor], Tensor], RandomErasing(self.recipe.erase, mode="pixel", device="cpu"))


@dataclass(frozen=True, kw_only=True)
class _AugmentedItems(Dataset[tuple[Tensor, str | None]]):
    """Augmented images by epoch and number: pixels, or zeros and the reason why the image cannot be used."""

    images: ImageSet
    hashes: Mapping[str, str]
    augment: Augmentation

    def __getitem__(self, item: Item) -> tuple[Tensor, str | None]:
        source, image_id = self.images.source, self.images.ids[item[1]]
        try:
            content = read_image(source, image_id)
            if hashlib.sha256(content).hexdigest() != self.hashes[image_id]:
                raise BadImageError("it changed since it was hashed; start again when nothing writes to the data set")
            return self.augment(source.decode(content), item), None
        except (BadImageError, OSError) as error:
            side = self.augment.transform.crop
            return torch.zeros(3, side, side), f"{source.place(image_id)}: {error}"


def load_training_images(
    images: ImageSet,
    hashes: Mapping[str, str],
    augment: Augmentation,
    batches: Iterable[Sequence[Item]],
    *,
    workers: int,
    pinned: bool = False,
) -> Iterator[Tensor]:
    """Yield the pixels of each batch, (b, 3, S, S) float32, normalised.

    Args:
        images: The labelled images.
        hashes: SHA-256 of each image's bytes, by id.
        augment: The augmentation.
        batches: Items of each step.
        workers: Processes that decode; 0 decodes in this one, while the caller waits.
        pinned: Whether to use page-locked memory.

    Raises:
        DataError: Images cannot be used, or changed since they were hashed.
        ResourceError: A worker dies or hangs.
    """
    loader = DataLoader(
        _AugmentedItems(images=images, hashes=hashes, augment=augment),
        batch_sampler=cast("Sequence[list[int]]", batches),
        num_workers=workers,
        collate_fn=_collate,
        pin_memory=pinned,
        worker_init_fn=_init_worker,
        generator=torch.Generator(),  # else the loader draws from the global one
        timeout=_WORKER_TIMEOUT_SECONDS if workers else 0,
    )
    try:
        for pixels, reasons in loader:
            if reasons:
                raise make_unreadable_error(reasons)
            yield pixels
    except RuntimeError as error:
        if "worker" not in str(error).lower():
            raise
        raise ResourceError(
            f"a process that decodes died or hung: {str(error).partition(chr(10))[0]}",
            hint="Host memory or /dev/shm may be short: try --workers 0.",
        ) from error


def _collate(rows: Sequence[tuple[Tensor, str | None]]) -> tuple[Tensor, list[str]]:
    return torch.stack([pixels for pixels, _ in rows]), [reason for _, reason in rows if reason is not None]


def _init_worker(number: int) -> None:
    """Ignore the signals that a launcher sends to every process of a job; the parent acts upon them."""
    torch.set_num_threads(1)
    for name in ("SIGTERM", "SIGINT"):
        signal.signal(getattr(signal, name), signal.SIG_IGN)


@dataclass(frozen=True, kw_only=True)
class Mixing:
    """How the images and labels of a step become what the network is trained on.

    Neighbours of a batch are mixed: the first with the second, the third with the fourth. All pairs of a step share one draw
    of timm's Mixup, so it does not matter how a batch is cut, as long as pairs stay together.
    """

    recipe: FinetuneRecipe
    n_classes: int
    seed: int

    def __call__(self, pixels: Tensor, labels: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """Return pixels and soft labels (b, n_classes) of some complete pairs.

        Args:
            pixels: (b, 3, S, S), changed in place.
            labels: (b,) int64.
            step: Number of the step.
        """
        recipe = self.recipe
        if not recipe.mixes:
            return pixels, cast(Tensor, mixup_target(labels, self.n_classes, 1.0, recipe.label_smoothing))
        mixup = Mixup(
            mixup_alpha=recipe.mixup,
            cutmix_alpha=recipe.cutmix,
            label_smoothing=recipe.label_smoothing,
            num_classes=self.n_classes,
        )
        rows = torch.arange(len(labels), device=labels.device)
        permuted = torch.cat([rows[::2], rows[1::2].flip(0)])  # timm mixes the first with the last
        with seeded(derive_seed(_STEP, step, seed=self.seed)):
            mixed, targets = mixup(pixels[permuted], labels[permuted])
        inverse = permuted.argsort()
        return mixed[inverse], targets[inverse]


def draw_paths(step: int, *, batch: int, paths: int, seed: int) -> Tensor:
    """Draw what decides, for each image of a step's batch, which residual branches are dropped: (batch, paths) in [0, 1)."""
    generator = torch.Generator().manual_seed(derive_seed(_PATHS, step, seed=seed))
    return torch.rand(batch, paths, generator=generator)
