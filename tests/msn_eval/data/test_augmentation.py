"""Crops and flips: pure functions of seed, epoch and image, drawn as torchvision draws them."""

import numpy as np
import pytest
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as change

from msn_eval.data.augmentation import RandomCrops, draw_random_box


@pytest.fixture(scope="module")
def picture() -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 255, (48, 64, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def test_a_crop_depends_on_seed_epoch_and_image_and_on_nothing_else(picture: Image.Image) -> None:
    def crop(seed: int, epoch: int, image_id: str) -> bytes:
        return RandomCrops(seed=seed, epoch=epoch, share=0.08).crop(picture, image_id, 16).tobytes()

    first = crop(1, 2, "a/1.png")

    assert first == crop(1, 2, "a/1.png")
    assert len({first, crop(2, 2, "a/1.png"), crop(1, 3, "a/1.png"), crop(1, 2, "a/2.png")}) == 4


def test_pixels_are_torchvisions_of_the_same_box(picture: Image.Image) -> None:
    crops = RandomCrops(seed=0, epoch=0, share=0.08)
    flipped = 0
    for number in range(20):
        drawn = crops._draw(f"a/{number}.png")
        left, top, right, bottom = draw_random_box(64, 48, drawn, share=0.08)
        expected = change.resized_crop(
            picture, top, left, bottom - top, right - left, [16, 16], InterpolationMode.BILINEAR
        )
        if drawn[-1] < 0.5:
            expected = change.horizontal_flip(expected)
            flipped += 1

        assert (crops.crop(picture, f"a/{number}.png", 16) == np.asarray(expected)).all()
    assert 0 < flipped < 20


@pytest.mark.parametrize("share", [0.08, 0.9, 1.0])
def test_boxes_lie_within_the_image_and_keep_to_area_and_ratio(share: float) -> None:
    generator = np.random.default_rng(0)
    shares = []
    for _ in range(300):
        left, top, right, bottom = draw_random_box(200, 160, generator.random(23), share=share)
        width, height = right - left, bottom - top

        assert 0 <= left < right <= 200
        assert 0 <= top < bottom <= 160
        assert 0.73 < width / height < 1.37
        shares.append(width * height / (200 * 160))

    assert min(shares) > share * 0.95 - 0.02
    assert share == 1.0 or max(shares) - min(shares) > 0.4 * (1 - share)


@pytest.mark.parametrize(("size", "box"), [((1000, 30), (480, 0, 520, 30)), ((30, 1000), (0, 480, 30, 520))])
def test_an_image_too_long_for_any_box_gives_its_middle(size: tuple[int, int], box: tuple[int, ...]) -> None:
    assert draw_random_box(*size, np.full(23, 0.99), share=0.9) == box
