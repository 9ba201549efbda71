from functools import partial

import numpy as np
import pytest
import torch
from scipy.stats import ks_2samp
from torch import Tensor
from torchvision.transforms.v2 import ColorJitter, RandomResizedCrop

from msn_pretrain.data.views import ViewKind, ViewParameters, draw_for_batch, draw_views, make_view, make_views

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


def test_a_view_depends_neither_on_its_batch_nor_on_the_other_views(photographs: list[Tensor]) -> None:
    images, numbers = [*photographs, photographs[0]], np.array([4, 9, 2])
    draw = partial(draw_for_batch, kind=_FOCAL, first_view=2, seed=1, epoch=3)
    together = make_views(images, draw(images, numbers=numbers), _FOCAL)

    alone = make_views(images[1:2], draw(images[1:2], numbers=numbers[1:2]), _FOCAL)

    assert torch.equal(together[1::3], alone)


def test_an_image_too_long_for_any_crop_gives_its_middle() -> None:
    kind = ViewKind(pixels=8, count=1, scale=(1.0, 1.0))

    drawn = _drawn(kind, 3, height=10, width=100)

    assert drawn.boxes.tolist() == [[0, 43, 10, 13]] * 3


def test_a_view_that_nothing_changes_is_the_resized_image(photographs: list[Tensor]) -> None:
    kind = ViewKind(pixels=128, count=1, scale=(1.0, 1.0), ratio=(0.75, 0.75), flip=0, jitter=0, grey=0, blur=0)
    drawn = draw_for_batch(photographs[1:], kind, first_view=0, seed=0, epoch=0, numbers=np.array([0]))

    view = make_view(photographs[1], drawn, 0, kind)

    assert drawn.boxes.tolist() == [[0, 0, 128, 96]]
    assert torch.equal(view[:, :, 0], photographs[1][:, :, 0])
