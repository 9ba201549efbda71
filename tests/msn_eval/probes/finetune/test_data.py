"""The images of a step are a pure function of seed, epoch and image, however many workers load them."""

import random
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from msn_eval.config.recipes import FinetuneRecipe
from msn_eval.data import read_dataset
from msn_eval.data.hashing import hash_images
from msn_eval.data.images import ImageSet, make_eval_transform
from msn_eval.errors import DataError
from msn_eval.probes.finetune.data import Augmentation, Mixing, Order, draw_paths, load_training_images, make_order

_STRONG = FinetuneRecipe(erase=0.5, mixup=0.8, cutmix=1.0, crop_share=0.3)


@pytest.fixture(scope="module")
def images() -> ImageSet:
    return read_dataset("digits").train.first_of_each_class(1)


def _augmentation(**changes: object) -> Augmentation:
    return replace(Augmentation(recipe=_STRONG, transform=make_eval_transform(16), seed=3), **changes)  # type: ignore[arg-type]


def _loaded(images: ImageSet, augment: Augmentation, workers: int) -> Tensor:
    order = Order(images=len(images), batch=4, epochs=2, seed=0)
    batches = [order.items(step, range(4)) for step in range(order.steps)]
    hashes = hash_images(images, cache_dir=None)
    return torch.cat(list(load_training_images(images, hashes, augment, batches, workers=workers)))


def test_every_epoch_has_every_image_once() -> None:
    order = Order(images=7, batch=3, epochs=3, seed=0)

    seen = [item for step in range(order.steps) for item in order.items(step, range(3))]

    assert Counter(seen[:21]) == Counter((epoch, image) for epoch in range(3) for image in range(7))


def test_every_epoch_has_a_different_order() -> None:
    order = Order(images=50, batch=50, epochs=2, seed=0)

    assert [one for _, one in order.items(0, range(50))] != [one for _, one in order.items(1, range(50))]


def test_batch_is_at_most_all_images_and_even_if_they_are_mixed() -> None:
    sizes = [make_order(FinetuneRecipe(batch=64, mixup=mixup), 9, seed=0).batch for mixup in (0.0, 0.8)]

    assert sizes == [9, 8]


def test_augmentation_depends_on_seed_image_and_epoch_only(images: ImageSet) -> None:
    augment, image = _augmentation(), images.source.decode(images.source.read(images.ids[0]))

    first, again, later, other_seed = (
        augment(image, (0, 0)),
        augment(image, (0, 0)),
        augment(image, (1, 0)),
        _augmentation(seed=4)(image, (0, 0)),
    )

    assert torch.equal(first, again)
    assert not torch.equal(first, later)
    assert not torch.equal(first, other_seed)


def test_augmentation_leaves_the_global_generators_unchanged(images: ImageSet) -> None:
    image = images.source.decode(images.source.read(images.ids[0]))
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()  # type: ignore[index, union-attr]

    _augmentation()(image, (0, 0))

    after = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()  # type: ignore[index, union-attr]
    assert before[:2] == after[:2]
    assert torch.equal(before[2], after[2])


def test_without_augmentation_an_image_is_as_in_evaluation(images: ImageSet) -> None:
    from msn_eval.data.images import resize_and_crop

    plain = FinetuneRecipe(crop_share=1.0, flip=0.0, randaugment_magnitude=0)
    image = images.source.decode(images.source.read(images.ids[3]))
    transform = make_eval_transform(16, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))

    result = Augmentation(recipe=plain, transform=transform, seed=0)(image, (0, 3))

    assert torch.equal(
        result * 255, torch.from_numpy(resize_and_crop(image, transform).copy()).permute(2, 0, 1).float()
    )


@pytest.mark.parametrize("workers", [1, 2])
def test_number_of_workers_changes_no_pixel(images: ImageSet, workers: int) -> None:
    assert torch.equal(_loaded(images, _augmentation(), workers), _loaded(images, _augmentation(), 0))


def test_image_that_changed_since_it_was_hashed_is_named(images: ImageSet) -> None:
    hashes = hash_images(images, cache_dir=None) | {images.ids[2]: "0" * 64}

    with pytest.raises(DataError, match=rf"{images.ids[2]}: it changed since it was hashed"):
        list(load_training_images(images, hashes, _augmentation(), [[(0, 1), (0, 2)]], workers=0))


@pytest.mark.parametrize("step", range(4))
@pytest.mark.parametrize("part", [2, 4, 6])
def test_mixing_does_not_depend_on_how_a_batch_is_cut(step: int, part: int) -> None:
    generator = torch.Generator().manual_seed(0)
    pixels, labels = torch.randn(10, 3, 8, 8, generator=generator), torch.arange(10)
    mix = Mixing(recipe=_STRONG, n_classes=10, seed=1)

    complete = mix(pixels.clone(), labels, step)
    cut = [mix(pixels[at : at + part].clone(), labels[at : at + part], step) for at in range(0, 10, part)]

    assert all(torch.equal(torch.cat(parts), one) for parts, one in zip(zip(*cut, strict=True), complete, strict=True))


def test_neighbours_are_mixed_with_each_other() -> None:
    labels = torch.arange(6)

    _, targets = Mixing(recipe=replace(_STRONG, label_smoothing=0.0), n_classes=6, seed=1)(
        torch.zeros(6, 3, 8, 8), labels, 2
    )

    partners = [set(row.nonzero().flatten().tolist()) for row in targets]
    assert partners == [{0, 1}, {0, 1}, {2, 3}, {2, 3}, {4, 5}, {4, 5}]


def test_draw_paths_are_those_of_the_step() -> None:
    one, same, other = (draw_paths(step, batch=8, paths=3, seed=0) for step in (5, 5, 6))

    assert torch.equal(one, same)
    assert not torch.equal(one, other)
