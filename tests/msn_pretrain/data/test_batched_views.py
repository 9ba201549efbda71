import numpy as np
import pytest
import torch
from torch import Tensor

from msn_pretrain.data.batched_views import make_batched_views
from msn_pretrain.data.views import ViewKind, draw_for_batch, make_views


def _both(images: list[Tensor], kind: ViewKind) -> tuple[Tensor, Tensor]:
    drawn = draw_for_batch(images, kind, first_view=0, seed=5, epoch=0, numbers=np.arange(len(images)))
    return make_views(images, drawn, kind), make_batched_views(images, drawn, kind)


def _difference(first: Tensor, second: Tensor) -> Tensor:
    assert first.dtype == second.dtype == torch.uint8
    return (first.int() - second.int()).abs()


@pytest.mark.parametrize(("pixels", "scale"), [(96, (0.3, 1.0)), (40, (0.05, 0.3)), (7, (0.3, 1.0))])
def test_views_agree_with_those_made_one_by_one(
    photographs: list[Tensor], pixels: int, scale: tuple[float, float]
) -> None:
    kind = ViewKind(pixels=pixels, count=12, scale=scale)

    difference = _difference(*_both(photographs, kind)).float()

    # A level more or less after resizing, of which saturation and hue may make a few.
    assert difference.mean() < 0.25
    assert (difference > 4).float().mean() < 1e-3
    assert difference.max() <= 16


@pytest.mark.parametrize("changed", ["flip", "jitter", "grey", "blur"])
def test_every_change_alone_agrees(photographs: list[Tensor], changed: str) -> None:
    nothing = {"flip": 0.0, "jitter": 0.0, "grey": 0.0, "blur": 0.0}
    kind = ViewKind(pixels=32, count=8, scale=(0.3, 1.0), **nothing | {changed: 1.0})

    one_by_one, batched = _both(photographs, kind)

    assert _difference(one_by_one, batched).float().mean() < 0.3
    unchanged = _both(photographs, ViewKind(pixels=32, count=8, scale=(0.3, 1.0), **nothing))[1]
    assert _difference(batched, unchanged).float().mean() > 1


def test_bicubic_crops_agree(photographs: list[Tensor]) -> None:
    kind = ViewKind(pixels=48, count=6, scale=(0.1, 1.0), jitter=0, grey=0, blur=0, interpolation="bicubic")

    difference = _difference(*_both(photographs, kind)).float()

    assert difference.max() <= 2
    assert difference.mean() < 0.1


def test_a_crop_of_the_target_size_is_copied(photographs: list[Tensor]) -> None:
    image = photographs[0][:, :40, :40]
    kind = ViewKind(pixels=40, count=1, scale=(1.0, 1.0), ratio=(1.0, 1.0), flip=0, jitter=0, grey=0, blur=0)

    _, batched = _both([image], kind)

    assert torch.equal(batched[0], image)
