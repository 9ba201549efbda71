"""JPEGs decoded by a GPU: the pixels of the CPU's decoders, and their word on files that cannot be used."""

import io
import random

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from msn_eval.data.decoders import check_decoder, decode_on_device, decode_pixels, prepare_for_device
from msn_eval.data.images import BadImageError, make_eval_transform

pytestmark = pytest.mark.gpu
DEVICE = torch.device("cuda")
TRANSFORM = make_eval_transform(224)


def jpeg(width: int, height: int, **options: object) -> bytes:
    """Return a picture of waves, which no decoder's smoothing changes much."""
    y, x = np.mgrid[:height, :width]
    waves = np.stack([np.sin(x / 29 + y / 47), np.cos(x / 35), np.sin(y / 27 - x / 53)], axis=2)
    file = io.BytesIO()
    Image.fromarray((128 + 90 * waves).astype(np.uint8)).save(file, "JPEG", **options)
    return file.getvalue()


def differences(ours: torch.Tensor, theirs: NDArray[np.uint8]) -> NDArray[np.int64]:
    return np.abs(ours.cpu().numpy().astype(np.int64) - theirs)


@pytest.mark.real_gpu("nvJPEG")
def test_this_device_decodes_jpegs() -> None:
    check_decoder("nvjpeg", DEVICE)


@pytest.mark.real_gpu("nvJPEG")
@pytest.mark.parametrize("options", [{}, {"subsampling": 0}, {"subsampling": 1}, {"restart_marker_blocks": 5}], ids=str)
@pytest.mark.parametrize("size", [(500, 375), (375, 500), (640, 427), (64, 64)], ids=str)
def test_pixels_of_the_gpu_are_nearly_pillows(size: tuple[int, int], options: dict[str, object]) -> None:
    content = jpeg(*size, **options)
    assert prepare_for_device(content, TRANSFORM) == content
    pixels, failures = decode_on_device([content], TRANSFORM, DEVICE)
    gaps = differences(pixels[0], decode_pixels(content, TRANSFORM, "pillow"))
    assert (pixels.device.type, failures) == ("cuda", {})
    assert gaps.mean() <= 1
    assert gaps.max() <= 8


@pytest.mark.real_gpu("nvJPEG")
def test_large_batch_keeps_its_order() -> None:
    files = [jpeg(300 + row, 260, quality=50 + row // 2) for row in range(90)]
    batch = [
        prepare_for_device(file, TRANSFORM) if row % 3 else decode_pixels(file, TRANSFORM, "pillow")
        for row, file in enumerate(files)
    ]
    pixels, failures = decode_on_device(batch, TRANSFORM, DEVICE)
    theirs = np.stack([decode_pixels(file, TRANSFORM, "pillow") for file in files])
    assert failures == {}
    assert differences(pixels, theirs).mean(axis=(1, 2, 3)).max() <= 1


@pytest.mark.real_gpu("nvJPEG")
def test_file_that_nobody_can_decode_is_named_and_affects_no_other() -> None:
    good = jpeg(500, 375)
    bad = good.replace(b"\xff\xdb", b"\xff\xfe")
    pixels, failures = decode_on_device([good, bad, good], TRANSFORM, DEVICE)
    assert list(failures) == [1]
    assert not pixels[1].any()
    assert torch.equal(pixels[0], pixels[2])
    assert pixels[0].any()


def test_file_cut_anywhere_gives_no_pixels() -> None:
    content = jpeg(500, 375)
    for cut in random.Random(3).sample(range(len(content)), 50):
        with pytest.raises(BadImageError):
            prepare_for_device(content[:cut], TRANSFORM)
