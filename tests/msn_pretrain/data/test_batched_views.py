from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from msn_eval.errors import ResourceError
from msn_pretrain.data import batched_views
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


def _largest_tensor(do: Callable[[], object]) -> int:
    """Return the bytes of the largest tensor that a function makes."""
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            made = function(*args, **(kwargs or {}))
            if isinstance(made, Tensor):
                largest = max(largest, made.untyped_storage().nbytes())
            return made

    with Watch():
        do()
    return largest


def test_one_large_image_does_not_enlarge_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    images = [torch.zeros(3, 20, 24, dtype=torch.uint8) for _ in range(30)] + [
        torch.zeros(3, 200, 300, dtype=torch.uint8)
    ]
    kind = ViewKind(pixels=8, count=2, scale=(0.3, 1.0))
    drawn = draw_for_batch(images, kind, first_view=0, seed=5, epoch=0, numbers=np.arange(31))
    monkeypatch.setattr(batched_views, "_MOST_BYTES", 100_000)

    largest = _largest_tensor(lambda: make_batched_views(images, drawn, kind))

    assert largest == 3 * 200 * 300 * 4


def test_views_made_in_groups_are_those_of_a_whole_batch(
    photographs: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    kind = ViewKind(pixels=24, count=3, scale=(0.3, 1.0))
    images = [photographs[number % 2][:, number:, : 96 - number].contiguous() for number in range(10)]
    _, expected = _both(images, kind)
    monkeypatch.setattr(batched_views, "_MOST_BYTES", 12 * 100 * 100 * 3)

    _, found = _both(images, kind)

    assert _difference(found, expected).max() <= 1
    assert _difference(found, expected).float().mean() < 1e-3


def test_out_of_memory_halves_the_images_at_once(photographs: list[Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    kind = ViewKind(pixels=24, count=2, scale=(0.3, 1.0))
    images = [photographs[0][:, number : number + 90, :90].contiguous() for number in range(7)]
    _, expected = _both(images, kind)
    pad, tried = batched_views._pad_to_largest, []

    def fail_above_two(some: list[Tensor]) -> Tensor:
        tried.append(len(some))
        if len(some) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return pad(some)

    monkeypatch.setattr(batched_views, "_pad_to_largest", fail_above_two)

    assert _difference(_both(images, kind)[1], expected).max() <= 1
    assert tried == [7, 3, 1, 2, 4, 2, 2]


def test_image_whose_views_do_not_fit_is_a_resource_error(
    photographs: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(some: list[Tensor]) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(batched_views, "_pad_to_largest", fail)

    with pytest.raises(ResourceError, match=r"do not fit into memory: CUDA out of memory[\s\S]*views.made=loader"):
        _both(photographs, ViewKind(pixels=24, count=1, scale=(0.3, 1.0)))
