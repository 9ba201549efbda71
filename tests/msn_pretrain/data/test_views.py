import colorsys
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.ndimage import correlate1d
from scipy.stats import ks_2samp
from torch import Tensor
from torchvision.transforms import functional as pillow_transforms
from torchvision.transforms.v2 import ColorJitter, RandomResizedCrop
from torchvision.transforms.v2 import functional as transforms

from msn_pretrain.data import views as view_module
from msn_pretrain.data.views import (
    ADJUSTMENTS,
    Amount,
    ViewKind,
    ViewParameters,
    adjust_hue,
    blur,
    draw_for_batch,
    draw_views,
    make_views,
    turn_grey,
)

_FOCAL = ViewKind(pixels=96, count=10, scale=(0.05, 0.3))
_PLAIN = ViewKind(pixels=32, count=2, scale=(0.3, 1.0), flip=0.0, jitter=0.0, grey=0.0, blur=0.0)


def _drawn(kind: ViewKind, count: int, *, height: int, width: int) -> ViewParameters:
    images = np.arange(count)
    zeros = np.zeros(count, dtype=np.int64)
    sizes = np.tile(np.array([[height, width]]), (count, 1))
    return draw_views(kind, seed=0, epochs=zeros, images=images, views=zeros, sizes=sizes)


@pytest.mark.parametrize(("height", "width"), [(375, 500), (500, 333), (40, 300)])
def test_crops_are_distributed_as_those_of_torchvision(height: int, width: int) -> None:
    torch.manual_seed(0)
    crop = RandomResizedCrop(96, scale=_FOCAL.scale, ratio=_FOCAL.ratio)
    theirs = np.array([list(crop.make_params([torch.empty(3, height, width)]).values())[:4] for _ in range(3000)])

    ours = _drawn(_FOCAL, 3000, height=height, width=width).boxes

    for own, expected in zip(ours.T, theirs.T, strict=True):
        assert ks_2samp(own, expected).pvalue > 1e-3
    assert ks_2samp(ours[:, 2] * ours[:, 3], theirs[:, 2] * theirs[:, 3]).pvalue > 1e-3


def test_colours_are_changed_as_often_and_as_much_as_simclr_does() -> None:
    ours = _drawn(_FOCAL, 4000, height=64, width=64)
    jitter = ColorJitter(0.4, 0.4, 0.4, 0.1)
    torch.manual_seed(0)
    theirs = [jitter.make_params([]) for _ in range(1500)]

    names = ("brightness_factor", "contrast_factor", "saturation_factor", "hue_factor")
    for which, name in enumerate(names):
        expected = [parameters[name] for parameters in theirs]
        assert ks_2samp(ours.factors[ours.jittered, which], expected).pvalue > 1e-3
    assert np.allclose(
        [ours.jittered.mean(), ours.flipped.mean(), ours.greyed.mean(), (ours.sigmas > 0).mean()],
        [0.8, 0.5, 0.2, 0.5],
        atol=0.03,
    )
    assert ours.sigmas[ours.sigmas > 0].min() >= 0.1
    assert ours.sigmas.max() <= 2.0
    first_changes = np.bincount(ours.order[:, 0], minlength=4) / len(ours)
    assert np.allclose(first_changes, 0.25, atol=0.03)


def test_parameters_of_a_view_are_stable() -> None:
    kind = ViewKind(pixels=224, count=1, scale=(0.3, 1.0))

    keys = {name: np.array([number]) for name, number in (("epochs", 2), ("images", 123), ("views", 1))}
    drawn = draw_views(kind, seed=11, sizes=np.array([[375, 500]]), **keys)

    assert drawn.boxes.tolist() == [[0, 106, 333, 370]]
    assert drawn.order.tolist() == [[1, 3, 0, 2]]
    assert np.round(drawn.factors, 6).tolist() == [[1.158103, 1.099733, 1.384104, -0.023021]]
    assert (bool(drawn.flipped[0]), bool(drawn.greyed[0]), round(float(drawn.sigmas[0]), 6)) == (False, False, 0.0)


def _sizes(images: list[Tensor]) -> np.ndarray:
    return np.array([image.shape[:2] for image in images])


def test_a_view_depends_neither_on_its_batch_nor_on_the_other_views(photographs: list[Tensor]) -> None:
    images, numbers = [*photographs, photographs[0]], np.array([4, 9, 2])
    draw = partial(draw_for_batch, kind=_FOCAL, first_view=2, seed=1, epoch=3)
    together = make_views(images, draw(_sizes(images), numbers=numbers), _FOCAL)

    alone = make_views(images[1:2], draw(_sizes(images[1:2]), numbers=numbers[1:2]), _FOCAL)

    assert torch.equal(together[1::3], alone)


def test_an_image_too_long_for_any_crop_gives_its_middle() -> None:
    kind = ViewKind(pixels=8, count=1, scale=(1.0, 1.0))

    drawn = _drawn(kind, 3, height=10, width=100)

    assert drawn.boxes.tolist() == [[0, 43, 10, 13]] * 3


def test_a_view_that_nothing_changes_is_the_resized_image(photographs: list[Tensor]) -> None:
    kind = ViewKind(pixels=128, count=1, scale=(1.0, 1.0), ratio=(0.75, 0.75), flip=0, jitter=0, grey=0, blur=0)
    image = photographs[1]
    drawn = draw_for_batch(_sizes([image]), kind, first_view=0, seed=0, epoch=0, numbers=np.array([0]))

    view = make_views([image], drawn, kind)[0]

    assert drawn.boxes.tolist() == [[0, 0, 128, 96]]
    assert torch.equal(view[:, :, 0], image[:, 0].T)


# At most one level of difference, in at most this share of values: rounding of float32 next to a whole level, or half of one.
_SHARE = 5e-4


def _assert_same_levels(found: Tensor, expected: Tensor, *, share: float = _SHARE) -> None:
    difference = (found - expected).abs()
    assert difference.max() <= 1
    assert (difference > 0).float().mean() <= share


def _levels(pixels: int) -> Tensor:
    """Return a view of which every second row is grey: its channels are equal."""
    views = torch.randint(0, 256, (1, 3, pixels, pixels), generator=torch.Generator().manual_seed(pixels)).float()
    views[:, 1:, ::2] = views[:, :1, ::2]
    return views


def _apply(change: Callable[[Tensor, Amount], None], views: Tensor, amount: Amount) -> Tensor:
    changed = views.clone()
    change(changed, amount)
    return changed


@pytest.mark.parametrize("which", range(4))
@pytest.mark.parametrize("share", [0.0137, 0.1519, 0.5, 0.8213, 0.9971])
def test_colours_have_the_levels_of_torchvision(which: int, share: float) -> None:
    name = ("brightness", "contrast", "saturation", "hue")[which]
    amount = (0.6 + 0.8 * share) if which < 3 else share - 0.5
    views = _levels(96)

    found = _apply(ADJUSTMENTS[which], views, amount)

    expected = getattr(transforms, f"adjust_{name}")(views.byte(), amount).float()
    coloured = slice(1, None, 2) if name == "saturation" else slice(None)
    _assert_same_levels(found[:, :, coloured], expected[:, :, coloured])


@pytest.mark.parametrize("factor", [0.6, 0.7, 1.1, 1.4])
def test_saturation_leaves_grey_pixels_within_one_level(factor: float) -> None:
    """Their exact value is a whole level, which rounding of float32 misses by one in a share of cases, as in torchvision."""
    views = _levels(96)[:, :, ::2]

    found = _apply(ADJUSTMENTS[2], views, factor)

    grey = transforms.rgb_to_grayscale(views.byte()).float()
    assert (found - (views * factor + grey * (1 - factor))).abs().max() <= 1.001


@pytest.mark.parametrize("shift", [-0.5, -0.1, -0.013, 0.0, 0.07, 0.31, 0.5])
def test_hue_is_the_exact_shift_in_hsv(shift: float) -> None:
    views = _levels(24)
    shifted = []
    for pixel in views.flatten(2)[0].T.tolist():
        hue, saturation, value = colorsys.rgb_to_hsv(*(level / 255 for level in pixel))
        shifted.append(colorsys.hsv_to_rgb((hue + shift) % 1, saturation, value))
    exact = (torch.tensor(shifted, dtype=torch.float64).T * (256 - 1e-3)).floor().float()

    found = _apply(adjust_hue, views, shift)

    _assert_same_levels(found, exact.view_as(found), share=2e-3)


def test_grey_has_the_levels_of_torchvision() -> None:
    views = _levels(96)

    found = _apply(turn_grey, views, 0.0)

    _assert_same_levels(found, transforms.rgb_to_grayscale(views.byte(), num_output_channels=3).float())


@pytest.mark.parametrize("pixels", [4, 7, 96, 224])
@pytest.mark.parametrize("sigma", [0.1, 0.35, 0.8, 1.0, 1.3, 2.0])
def test_blur_is_the_truncated_gaussian(pixels: int, sigma: float) -> None:
    views, radius = _levels(pixels), min(6, pixels - 1)
    weights = np.exp(-0.5 * (np.arange(-radius, radius + 1) / sigma) ** 2)
    exact = views.double().numpy()
    for axis in (2, 3):
        exact = correlate1d(exact, weights / weights.sum(), axis=axis, mode="mirror")

    found = _apply(blur, views, sigma)

    assert np.abs(found.numpy() - exact).max() <= 0.5 + 1e-3
    _assert_same_levels(found, torch.from_numpy(np.rint(exact)).float())


@pytest.mark.parametrize("change", [*ADJUSTMENTS, turn_grey, blur])
def test_a_change_by_own_amounts_is_that_of_each_view_alone(change: Callable[[Tensor, Amount], None]) -> None:
    views = torch.cat([_levels(32), _levels(32).flip(2), _levels(32).flip(1)])
    amounts = torch.tensor([0.2, 0.45, 1.3]) if change is not adjust_hue else torch.tensor([-0.4, 0.1, 0.5])

    together = _apply(change, views, amounts.view(-1, 1, 1, 1))

    for row, amount in enumerate(amounts.tolist()):
        alone = _apply(change, views[row : row + 1], amount)
        _assert_same_levels(together[row : row + 1], alone, share=0.1 if change is ADJUSTMENTS[2] else _SHARE)


def test_channels_blurred_alone_have_the_same_levels(
    photographs: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    kind = ViewKind(pixels=32, count=6, scale=(0.3, 1.0), blur=1.0)
    drawn = draw_for_batch(_sizes(photographs), kind, first_view=0, seed=0, epoch=0, numbers=np.arange(2))
    expected = make_views(photographs, drawn, kind)
    monkeypatch.setattr(view_module, "_CACHED_PIXELS", 8)

    assert torch.equal(make_views(photographs, drawn, kind), expected)


def test_views_are_nearly_those_of_pillow(photographs: list[Tensor]) -> None:
    """Crop, resize, flip, jitter and grey, on photographs. Pillow's hue and grey have 8 bits, so some values differ by more."""
    kind = ViewKind(pixels=96, count=12, scale=(0.1, 1.0), blur=0.0, amounts=(0.4, 0.4, 0.4, 0.0))
    drawn = draw_for_batch(_sizes(photographs), kind, first_view=0, seed=3, epoch=0, numbers=np.arange(2))
    names = ("brightness", "contrast", "saturation", "hue")
    expected = []
    for row, (top, left, height, width) in enumerate(drawn.boxes.tolist()):
        image = Image.fromarray(photographs[row % 2].numpy())
        view = pillow_transforms.resized_crop(image, top, left, height, width, [96, 96])
        view = pillow_transforms.hflip(view) if drawn.flipped[row] else view
        for which in drawn.order[row].tolist() if drawn.jittered[row] else []:
            if which < 3:
                view = getattr(pillow_transforms, f"adjust_{names[which]}")(view, float(drawn.factors[row, which]))
        view = pillow_transforms.to_grayscale(view, 3) if drawn.greyed[row] else view
        expected.append(torch.from_numpy(np.array(view)).permute(2, 0, 1))

    difference = (make_views(photographs, drawn, kind).float() - torch.stack(expected)).abs()

    assert difference.mean() < 0.5
    assert (difference > 2).float().mean() < 0.01
