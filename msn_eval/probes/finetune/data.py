"""Training images: which of them a step sees, cropped and changed how; a pure function of seed, epoch and image."""

import contextlib
import hashlib
import random
import signal
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
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
from msn_eval.data.hashing import unreadable
from msn_eval.data.images import BadImageError, EvalTransform, ImageSet, read_image, resize_and_crop
from msn_eval.errors import ResourceError

_ORDER, _IMAGE, _STEP, _PATHS = range(4)  # what a seed is for
_SHIFT = 0.45  # of the image's side, the farthest that RandAugment moves it
_WORKER_TIMEOUT_SECONDS = 300.0
Item = tuple[int, int]  # epoch and number of an image
_Change = Callable[[Image.Image], Image.Image]


def seed_at(*places: int, seed: int) -> int:
    """Give a seed in [0, 2^32) for one place, a pure function of both."""
    return int(np.random.SeedSequence((seed, *places)).generate_state(1)[0])


@dataclass(frozen=True, kw_only=True)
class Order:
    """How labelled images follow each other: permutations, one an epoch, end to end, and cut into batches of one size.

    So every batch is full, the last one too, whose end may reach into one more epoch.
    images: n, at least 1
    batch:  images a step, at most n; even where images are mixed in pairs
    """

    images: int
    batch: int
    epochs: int
    seed: int

    @property
    def steps(self) -> int:
        return max(1, -(-self.epochs * self.images // self.batch))

    def items(self, step: int, rows: range) -> list[Item]:
        """Give the images at some rows of one step's batch."""
        places = (divmod(step * self.batch + row, self.images) for row in rows)
        return [(epoch, int(self._permutation(epoch)[place])) for epoch, place in places]

    def _permutation(self, epoch: int) -> NDArray[np.int64]:
        kept = self._kept
        if epoch not in kept:
            for old in [one for one in kept if one < epoch - 1]:
                del kept[old]
            kept[epoch] = np.random.Generator(np.random.PCG64([self.seed, _ORDER, epoch])).permutation(self.images)
        return kept[epoch]

    @cached_property
    def _kept(self) -> dict[int, NDArray[np.int64]]:
        return {}


def epoch_order(recipe: FinetuneRecipe, images: int, *, seed: int) -> Order:
    """Give the order of a recipe: its batch where there are as many images, else all of them; even where they are mixed."""
    batch = min(recipe.batch, images)
    return Order(
        images=images, batch=max(2, batch - batch % 2) if recipe.mixes else batch, epochs=recipe.epochs, seed=seed
    )


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Have the global generators, which timm draws from, at a seed inside, and put them back."""
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
    """What is done to one labelled image: timm's crop, flip, RandAugment, the checkpoint's mean and std, and erasing.

    `crop_share` 1 takes the evaluation's own resize and centre crop instead of a random one.
    """

    recipe: FinetuneRecipe
    transform: EvalTransform
    seed: int

    def __call__(self, image: Image.Image, item: Item) -> Tensor:
        """Give (3, S, S) float32, normalised; the same for the same image and epoch."""
        with seeded(seed_at(_IMAGE, *item, seed=self.seed)):
            pixels = np.asarray(self._changed(image))
            mean, std = (np.array(three, dtype=np.float32) for three in (self.transform.mean, self.transform.std))
            normalised = torch.from_numpy((pixels.astype(np.float32) / 255 - mean) / std).permute(2, 0, 1).contiguous()
            return self._erasing(normalised) if self._erasing is not None else normalised

    def _changed(self, image: Image.Image) -> Image.Image:
        recipe = self.recipe
        whole = recipe.crop_share == 1
        cropped = Image.fromarray(resize_and_crop(image, self.transform)) if whole else self._crop(image)
        if random.random() < recipe.flip:
            cropped = cropped.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return self._policy(cropped) if self._policy is not None else cropped

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
        text = f"rand-m{recipe.randaugment_magnitude}-n{recipe.randaugment_layers}-mstd{recipe.randaugment_std:f}-inc1"
        fill = tuple(round(255 * one) for one in self.transform.mean)
        policy = rand_augment_transform(text, {"translate_const": int(self.transform.crop * _SHIFT), "img_mean": fill})
        return cast(_Change, policy)

    @cached_property
    def _erasing(self) -> Callable[[Tensor], Tensor] | None:
        if self.recipe.erase == 0:
            return None
        return cast(Callable[[Tensor], Tensor], RandomErasing(self.recipe.erase, mode="pixel", device="cpu"))


@dataclass(frozen=True, kw_only=True)
class _Items(Dataset[tuple[Tensor, str | None]]):
    """Augmented images by epoch and number: pixels, or zeros and the reason why there are none."""

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
    """Give the pixels of each batch, (b, 3, S, S) float32, normalised.

    workers: processes that decode; 0 decodes here, while the caller waits
    Raises DataError naming images that cannot be used or changed since they were hashed, ResourceError where a worker dies.
    """
    loader = DataLoader(
        _Items(images=images, hashes=hashes, augment=augment),
        batch_sampler=cast("Sequence[list[int]]", batches),
        num_workers=workers,
        collate_fn=_collate,
        pin_memory=pinned,
        worker_init_fn=_become_worker,
        generator=torch.Generator(),  # the global one is not ours to draw from
        timeout=_WORKER_TIMEOUT_SECONDS if workers else 0,
    )
    found = cast("Iterator[tuple[Tensor, list[str]]]", iter(loader))
    while True:
        try:
            batch = next(found, None)
        except RuntimeError as error:
            if "worker" not in str(error).lower():
                raise
            raise ResourceError(
                f"a process that decodes died or hung: {str(error).partition(chr(10))[0]}",
                hint="Host memory or /dev/shm may be short: try --workers 0.",
            ) from error
        if batch is None:
            return
        pixels, reasons = batch
        if reasons:
            raise unreadable(reasons)
        yield pixels


def _collate(rows: Sequence[tuple[Tensor, str | None]]) -> tuple[Tensor, list[str]]:
    return torch.stack([pixels for pixels, _ in rows]), [reason for _, reason in rows if reason is not None]


def _become_worker(number: int) -> None:
    """Leave it to the parent to act upon signals that a launcher sends to every process of a job."""
    torch.set_num_threads(1)
    for name in ("SIGTERM", "SIGINT"):
        signal.signal(getattr(signal, name), signal.SIG_IGN)


@dataclass(frozen=True, kw_only=True)
class Mixing:
    """How a step's images and labels become what the network is trained on.

    Neighbours of a batch are mixed with each other, the first with the second, the third with the fourth; all pairs of a step
    share one draw of timm's Mixup. So it does not matter how a batch is cut, as long as pairs stay together.
    """

    recipe: FinetuneRecipe
    n_classes: int
    seed: int

    def __call__(self, pixels: Tensor, labels: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """Give pixels and soft labels (b, n_classes) of a run of whole pairs.

        pixels: (b, 3, S, S), changed in place; labels: (b,) int64
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
        there = torch.cat([rows[::2], rows[1::2].flip(0)])  # timm mixes the first with the last
        with seeded(seed_at(_STEP, step, seed=self.seed)):
            mixed, targets = mixup(pixels[there], labels[there])
        back = there.argsort()
        return mixed[back], targets[back]


def path_draws(step: int, *, batch: int, paths: int, seed: int) -> Tensor:
    """Give what decides, for each image of a step's batch, which residual branches are left out: (batch, paths) in [0, 1)."""
    generator = torch.Generator().manual_seed(seed_at(_PATHS, step, seed=seed))
    return torch.rand(batch, paths, generator=generator)
