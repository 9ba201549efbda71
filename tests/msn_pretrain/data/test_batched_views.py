from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from msn_eval.errors import ResourceError
from msn_pretrain.data import batched_views
from msn_pretrain.data.batched_views import make_batched_views
from msn_pretrain.data.views import ViewKind, draw_for_batch, make_views


def _both(images: list[Tensor], kind: ViewKind) -> tuple[Tensor, Tensor]:
    sizes = np.array([image.shape[:2] for image in images])
    drawn = draw_for_batch(sizes, kind, first_view=0, seed=5, epoch=0, numbers=np.arange(len(images)))
    pixels = torch.cat([image.reshape(-1, 3) for image in images])
    return make_views(images, drawn, kind), make_batched_views(pixels, sizes, drawn, kind)


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
    image = photographs[0][:40, :40]
    kind = ViewKind(pixels=40, count=1, scale=(1.0, 1.0), ratio=(1.0, 1.0), flip=0, jitter=0, grey=0, blur=0)

    _, batched = _both([image], kind)

    assert torch.equal(batched[0], image.permute(2, 0, 1))


def test_views_made_in_groups_are_those_of_a_whole_batch(
    photographs: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    kind = ViewKind(pixels=24, count=3, scale=(0.3, 1.0))
    images = [photographs[number % 2][number:, : 96 - number] for number in range(10)]
    _, expected = _both(images, kind)
    monkeypatch.setattr(batched_views, "_MOST_BYTES", 12 * 100 * 100 * 3)

    _, found = _both(images, kind)

    assert _difference(found, expected).max() <= 1
    assert _difference(found, expected).float().mean() < 1e-3


def _fail_above(most: int, tried: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    resize = batched_views._resize

    def fail(views: Tensor, pixels: Tensor, crops: Tensor, *arguments: Any) -> None:
        tried.append(len(crops))
        if len(crops) > most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        resize(views, pixels, crops, *arguments)

    monkeypatch.setattr(batched_views, "_resize", fail)


def test_out_of_memory_halves_the_views_at_once(photographs: list[Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    kind = ViewKind(pixels=24, count=1, scale=(0.3, 1.0))
    images = [photographs[0][number : number + 90, :90] for number in range(7)]
    _, expected = _both(images, kind)
    tried: list[int] = []
    _fail_above(2, tried, monkeypatch)

    assert _difference(_both(images, kind)[1], expected).max() <= 1
    assert tried == [7, 3, 1, 2, 4, 2, 2]


def test_image_whose_views_do_not_fit_is_a_resource_error(
    photographs: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    _fail_above(0, [], monkeypatch)

    with pytest.raises(ResourceError, match=r"do not fit into memory: CUDA out of memory[\s\S]*views.made=loader"):
        _both(photographs, ViewKind(pixels=24, count=1, scale=(0.3, 1.0)))
