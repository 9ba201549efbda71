import resource
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from msn_eval.data import read_dataset, read_split
from msn_eval.data.images import IMAGENET_MEAN, IMAGENET_STD, ImageSet
from msn_eval.errors import DataError, ResourceError
from msn_pretrain.data import view_loader
from msn_pretrain.data.batched_views import make_batched_views
from msn_pretrain.data.sampler import Order
from msn_pretrain.data.view_loader import ViewBatch, ViewList, load_views, normalise
from msn_pretrain.data.views import ViewKind

_KINDS = (ViewKind(pixels=16, count=2, scale=(0.3, 1.0)), ViewKind(pixels=8, count=1, scale=(0.1, 0.4)))


def _loaded(images: ImageSet, *, workers: int = 0, first: int = 0, batched: bool = False) -> list[ViewBatch]:
    wanted = ViewList(images=images, kinds=_KINDS, seed=2, batched=batched, device=torch.device("cpu"))
    order = Order(n_images=len(images), batch_size=6, seed=2)
    return list(load_views(wanted, order, first_step=first, steps=5, workers=workers))


@pytest.fixture(scope="module")
def digits() -> ImageSet:
    return read_dataset("digits").train.first_of_each_class(2)


@pytest.mark.parametrize(("workers", "first"), [(2, 0), (1, 3)])
def test_workers_and_a_later_start_change_nothing(digits: ImageSet, workers: int, first: int) -> None:
    expected = _loaded(digits)[first:]

    for batch, own in zip(_loaded(digits, workers=workers, first=first), expected, strict=True):
        assert batch.batch.images.tolist() == own.batch.images.tolist()
        torch.testing.assert_close(batch.views, own.views, rtol=0, atol=0)


def test_loading_draws_no_number_from_the_global_generator(digits: ImageSet) -> None:
    before = torch.get_rng_state()

    _loaded(digits, workers=1)

    assert torch.equal(torch.get_rng_state(), before)


def test_views_made_on_a_cpu_as_device_are_those_of_the_loader(digits: ImageSet) -> None:
    for expected, batch in zip(_loaded(digits), _loaded(digits, batched=True), strict=True):
        torch.testing.assert_close(batch.views, expected.views, rtol=0, atol=0)


def test_views_made_in_batches_are_nearly_those_of_the_loader(
    digits: ImageSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = _loaded(digits)
    monkeypatch.setattr(view_loader, "make_views_on", make_batched_views)

    for own, batch in zip(expected, _loaded(digits, batched=True), strict=True):
        for views, batched in zip(own.views, batch.views, strict=True):
            assert (views.int() - batched.int()).abs().float().mean() < 0.5


def test_a_batch_that_a_worker_lost_is_an_error(digits: ImageSet, monkeypatch: pytest.MonkeyPatch) -> None:
    batches = Order.batches
    monkeypatch.setattr(
        Order, "batches", lambda *arguments: (batch for batch in batches(*arguments) if batch.step != 3)
    )

    with pytest.raises(ResourceError, match="lost the batch of step 3"):
        _loaded(digits)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_cannot_be_read_is_named(tmp_path: Path, workers: int) -> None:
    for label in ("a", "b"):
        (tmp_path / "train" / label).mkdir(parents=True)
        for number in range(3):
            Image.new("RGB", (9, 9)).save(tmp_path / "train" / label / f"{number}.png")
    bad = tmp_path / "train" / "b" / "1.png"
    bad.write_bytes(bad.read_bytes()[:40])

    with pytest.raises(DataError, match=r"b/1\.png"):
        _loaded(read_split(str(tmp_path), "train"), workers=workers)


def test_normalised_views_have_the_statistics_that_they_are_to_have() -> None:
    grey = torch.tensor([round(255 * mean) for mean in IMAGENET_MEAN], dtype=torch.uint8)
    views: Tensor = grey.view(1, 3, 1, 1).expand(2, 3, 4, 4)

    values = normalise(views, IMAGENET_MEAN, IMAGENET_STD)

    assert values.dtype == torch.float32
    assert values.abs().max() < 0.01


@pytest.mark.timeout(100)  # workers that cannot send an image may hang
def test_images_of_a_large_batch_take_few_file_descriptors(digits: ImageSet) -> None:
    wanted = ViewList(images=digits, kinds=_KINDS, seed=2, batched=True, device=torch.device("cpu"))
    order = Order(n_images=len(digits), batch_size=len(digits), seed=2)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    open_now = len(list(Path("/proc/self/fd").iterdir()))
    resource.setrlimit(resource.RLIMIT_NOFILE, (open_now + 40, limits[1]))
    try:
        batches = list(load_views(wanted, order, first_step=0, steps=4, workers=2))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)

    assert len(batches) == 4
