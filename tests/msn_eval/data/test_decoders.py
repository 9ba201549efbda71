import io
import random
import re
import struct
import subprocess
import sys
import tarfile
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from msn_eval.data import decoders
from msn_eval.data.decoders import (
    check_decoder,
    decode_on_device,
    decode_pixels,
    decode_tensor,
    decoder_version,
    prepare_for_device,
)
from msn_eval.data.images import BadImageError, EvalTransform, decode_image, make_eval_transform
from msn_eval.errors import UsageError

CPU = torch.device("cpu")
SMALL = make_eval_transform(32)
# Grey, smallest, largest, turned, longest; the rest are ordinary.
ODD_SAMPLES = {
    "n01728572_thunder_snake.JPEG",
    "n01871265_tusker.JPEG",
    "n02091032_Italian_greyhound.JPEG",
    "n02096051_Airedale.JPEG",
    "n02692877_airship.JPEG",
    "n02817516_bearskin.JPEG",
    "n02951585_can_opener.JPEG",
    "n03337140_file.JPEG",
    "n03617480_kimono.JPEG",
    "n03866082_overskirt.JPEG",
    "n03992509_potter's_wheel.JPEG",
    "n04254680_soccer_ball.JPEG",
}


def picture(width: int, height: int, mode: str = "RGB") -> Image.Image:
    """Return waves and a little noise, as in photographs."""
    y, x = np.mgrid[:height, :width]
    waves = np.stack([np.sin(x / 9 + y / 17), np.cos(x / 5), np.sin(y / 7 - x / 23)], axis=2)
    noise = np.random.default_rng(width * 10_007 + height).normal(0, 6, (height, width, 3))
    return Image.fromarray(np.clip(128 + 90 * waves + noise, 0, 255).astype(np.uint8)).convert(mode)


def encoded(image: Image.Image, file_format: str = "JPEG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, file_format, **options)
    return file.getvalue()


def png_with_16_bits(values: NDArray[np.uint16]) -> bytes:
    height, width, _ = values.shape

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = b"".join(b"\x00" + row.astype(">u2").tobytes() for row in values)
    header = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    parts = (chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def with_adobe_segment(content: bytes, transform: int, *, jfif: bool) -> bytes:
    """Return a JPEG with Adobe's word on its colours, beside that of JFIF or in its place."""
    adobe = b"\xff\xee\x00\x0eAdobe\x00\x64\x00\x00\x00\x00" + bytes([transform])
    return content[:2] + (content[2:20] if jfif else b"") + adobe + content[20:]


def differences(ours: NDArray[np.uint8], theirs: NDArray[np.uint8]) -> NDArray[np.int64]:
    return np.abs(ours.astype(np.int64) - theirs)


def outcome(content: bytes, decoder: str) -> NDArray[np.uint8] | str:
    try:
        return decode_pixels(content, SMALL, decoder)
    except BadImageError as error:
        return str(error)


def same(ours: NDArray[np.uint8] | str, theirs: NDArray[np.uint8] | str) -> bool:
    """Whether two decoders refuse a file with the same reason, or nearly agree on its pixels."""
    if isinstance(ours, str) or isinstance(theirs, str):
        return isinstance(ours, str) and isinstance(theirs, str) and ours == theirs
    return bool(differences(ours, theirs).max() <= 2)


def damaged(content: bytes, rng: random.Random) -> bytes:
    """Return a file with bytes changed, lost, put in, or zeroed to its end."""
    place = rng.randrange(2, len(content))
    return rng.choice(
        [
            content[:place] + rng.randbytes(1) + content[place + 1 :],
            content[:place] + content[place + rng.choice([1, 10, 300]) :],
            content[:place] + rng.randbytes(rng.choice([1, 10, 300])) + content[place:],
            content[:place] + bytes(len(content) - place),
        ]
    )


def with_decoder(
    fake: Callable[[Sequence[bytes], torch.device], list[Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoders, "_decode_jpegs", fake)


def refuses_all(contents: Sequence[bytes], device: torch.device) -> list[Tensor]:
    raise RuntimeError("nothing is good enough")


def must_not_decode(contents: Sequence[bytes], device: torch.device) -> list[Tensor]:
    raise AssertionError("this is no work for torchvision")


JPEG = encoded(picture(70, 50))
OTHER_FILES = {
    "CMYK JPEG": encoded(picture(40, 48, "CMYK")),
    "stereo pair": encoded(picture(40, 48), "MPO", save_all=True, append_images=[picture(40, 48)]),
    "grey PNG": encoded(picture(40, 48, "L"), "PNG"),
    "palette PNG with transparency": encoded(picture(40, 48, "P"), "PNG", transparency=b"\x00\x80"),
    "PNG with hidden colours": encoded(Image.new("RGBA", (40, 48), (10, 20, 30, 0)), "PNG"),
    "grey PNG with alpha": encoded(picture(40, 48, "LA"), "PNG"),
    "16-bit RGB PNG": png_with_16_bits(np.random.default_rng(1).integers(0, 2**16, (48, 40, 3), dtype=np.uint16)),
    "animated GIF": encoded(picture(40, 48), "GIF", save_all=True, append_images=[Image.new("RGB", (40, 48))]),
    "WebP": encoded(picture(40, 48), "WEBP"),
    "BMP": encoded(picture(40, 48), "BMP"),
}
BAD_FILES = {
    "empty": b"",
    "16-bit grey PNG": encoded(Image.new("I;16", (4, 4), 40_000), "PNG"),
    "too long": encoded(Image.new("RGB", (1, 501))),
    "bomb": JPEG.replace(struct.pack(">HH", 50, 70), struct.pack(">HH", 30_000, 30_000)),
    "head": JPEG[:300],
    "truncated": JPEG[:-200],
    "without its end": JPEG[:-2],
    "truncated progressive": encoded(picture(70, 50), progressive=True)[:-200],
    "truncated grey": encoded(picture(70, 50, "L"))[:-200],
    "12 bits": JPEG.replace(b"\xff\xc0\x00\x11\x08", b"\xff\xc0\x00\x11\x0c"),
    "lossless process": JPEG.replace(b"\xff\xc0\x00\x11", b"\xff\xc3\x00\x11"),
    "hierarchical process": JPEG.replace(b"\xff\xc0\x00\x11", b"\xff\xc5\x00\x11"),
    "no quantisation tables": re.sub(rb"\xff\xdb", b"\xff\xfe", JPEG),
}


def test_versions_are_those_of_the_package_that_decodes() -> None:
    torchvision = decoder_version("torchvision")
    assert decoder_version("pillow") == f"pillow {Image.__version__}"
    assert re.fullmatch(r"torchvision \d+\.\d+[\w.]*", torchvision)
    assert decoder_version("nvjpeg") == f"nvjpeg of {torchvision}, CUDA {torch.version.cuda}"


@pytest.mark.parametrize("build", ["", "+cpu", "+cu132"])
def test_versions_do_not_tell_builds_apart(build: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoders, "version", lambda package: f"0.29.2{build}")
    assert decoder_version("torchvision") == "torchvision 0.29.2"


def test_importing_the_decoders_does_not_import_torchvision() -> None:
    script = "import sys, msn_eval.data.decoders; sys.exit('torchvision' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


def test_real_photographs_are_nearly_the_same_by_torchvision(shared_data: Path) -> None:
    transform = make_eval_transform(224)
    far, seen = [], 0
    with tarfile.open(shared_data / "imagenet_samples.tar") as samples:
        for member in samples.getmembers():
            if Path(member.name).name not in ODD_SAMPLES:
                continue
            content = samples.extractfile(member).read()  # type: ignore[union-attr]
            gaps = differences(*(decode_pixels(content, transform, decoder) for decoder in ("pillow", "torchvision")))
            seen += 1
            if gaps.max() > 2 or gaps.mean() > 0.01:
                far.append((member.name, gaps.max(), gaps.mean()))
    assert (seen, far) == (len(ODD_SAMPLES), [])


@pytest.mark.parametrize("name", sorted(ODD_SAMPLES))
def test_decoded_photographs_are_exactly_pillows(shared_data: Path, name: str) -> None:
    with tarfile.open(shared_data / "imagenet_samples.tar") as samples:
        member = next(member for member in samples if Path(member.name).name == name)
        content = samples.extractfile(member).read()  # type: ignore[union-attr]

    np.testing.assert_array_equal(decode_tensor(content), np.asarray(decode_image(content)))


@pytest.mark.parametrize("content", OTHER_FILES.values(), ids=OTHER_FILES)
def test_other_files_are_decoded_to_pillows_pixels(content: bytes) -> None:
    np.testing.assert_array_equal(decode_tensor(content), np.asarray(decode_image(content)))


@pytest.mark.parametrize("content", BAD_FILES.values(), ids=BAD_FILES)
def test_decoding_refuses_bad_files_with_pillows_reason(content: bytes) -> None:
    with pytest.raises(BadImageError) as refused:
        decode_image(content)
    with pytest.raises(BadImageError, match=f"^{re.escape(str(refused.value))}$"):
        decode_tensor(content)


@pytest.mark.parametrize(
    "options", [{}, {"progressive": True}, {"subsampling": 0}, {"restart_marker_blocks": 3}], ids=str
)
def test_torchvision_pixels_are_exactly_pillows_where_nothing_is_resized(options: dict[str, object]) -> None:
    content = encoded(picture(37, 41), **options)
    np.testing.assert_array_equal(decode_pixels(content, SMALL, "torchvision"), decode_pixels(content, SMALL, "pillow"))


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_torchvision_decodes_jpegs_itself(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    black = torch.zeros(3, 50, 70, dtype=torch.uint8)
    with_decoder(lambda contents, device: [black for _ in contents], monkeypatch)
    assert not decode_pixels(encoded(picture(70, 50, mode)), SMALL, "torchvision").any()


@settings(max_examples=60, deadline=None)
@given(width=st.integers(1, 180), height=st.integers(1, 180), image_pixels=st.sampled_from([1, 8, 28, 32, 64]))
def test_shapes_and_nearly_the_pixels_are_those_of_pillow_at_every_size(
    width: int, height: int, image_pixels: int
) -> None:
    content, transform = encoded(picture(width, height)), make_eval_transform(image_pixels)
    pillow, torchvision = (decode_pixels(content, transform, decoder) for decoder in ("pillow", "torchvision"))
    assert torchvision.shape == pillow.shape == (image_pixels, image_pixels, 3)
    assert torchvision.dtype == pillow.dtype == np.uint8
    assert differences(torchvision, pillow).max() <= 2


def test_exif_orientation_turns_nothing_under_torchvision() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = encoded(picture(70, 50), exif=exif)
    np.testing.assert_array_equal(
        decode_pixels(turned, SMALL, "torchvision"), decode_pixels(JPEG, SMALL, "torchvision")
    )


@pytest.mark.parametrize("content", OTHER_FILES.values(), ids=OTHER_FILES)
def test_all_but_plain_jpegs_are_decoded_by_pillow(content: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    with_decoder(must_not_decode, monkeypatch)
    np.testing.assert_array_equal(decode_pixels(content, SMALL, "torchvision"), decode_pixels(content, SMALL, "pillow"))


@pytest.mark.parametrize("content", BAD_FILES.values(), ids=BAD_FILES)
def test_bad_files_are_refused_with_pillows_reason(content: bytes) -> None:
    with pytest.raises(BadImageError) as refused:
        decode_pixels(content, SMALL, "pillow")
    with pytest.raises(BadImageError, match=f"^{re.escape(str(refused.value))}$"):
        decode_pixels(content, SMALL, "torchvision")


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"restart_marker_blocks": 3}], ids=str)
def test_file_cut_anywhere_has_the_same_result_with_both_decoders(options: dict[str, object]) -> None:
    content, rng = encoded(picture(70, 50), **options), random.Random(7)
    cuts = [*(rng.randrange(len(content)) for _ in range(50)), *range(len(content) - 5, len(content))]
    assert [cut for cut in cuts if not same(*(outcome(content[:cut], one) for one in ("torchvision", "pillow")))] == []


def test_file_damaged_anywhere_has_the_same_result_with_both_decoders() -> None:
    rng = random.Random(11)
    files = [damaged(JPEG, rng) for _ in range(300)]
    assert [file for file in files if not same(*(outcome(file, one) for one in ("torchvision", "pillow")))] == []


def test_file_that_torchvision_alone_refuses_is_decoded_by_pillow(monkeypatch: pytest.MonkeyPatch) -> None:
    with_decoder(refuses_all, monkeypatch)
    np.testing.assert_array_equal(decode_pixels(JPEG, SMALL, "torchvision"), decode_pixels(JPEG, SMALL, "pillow"))


@pytest.mark.parametrize("fault", [torch.OutOfMemoryError, torch.AcceleratorError], ids=lambda fault: fault.__name__)
def test_fault_of_the_machine_is_not_blamed_on_the_file(
    fault: type[RuntimeError], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(contents: Sequence[bytes], device: torch.device) -> list[Tensor]:
        raise fault("the device is in no state for this")

    with_decoder(fails, monkeypatch)
    with pytest.raises(fault):
        decode_on_device([JPEG, JPEG], SMALL, CPU)


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(JPEG, id="as Pillow writes it"),
        pytest.param(encoded(picture(70, 50), restart_marker_blocks=3), id="with restarts"),
        pytest.param(encoded(picture(70, 50), subsampling=0), id="without subsampling"),
        pytest.param(with_adobe_segment(JPEG, 1, jfif=False), id="YCbCr by Adobe's word"),
    ],
)
def test_plain_jpegs_are_left_to_the_device(content: bytes) -> None:
    assert prepare_for_device(content, SMALL) == content


@pytest.mark.parametrize(
    "content",
    [
        *(pytest.param(content, id=kind) for kind, content in OTHER_FILES.items()),
        pytest.param(encoded(picture(70, 50, "L")), id="grey JPEG"),
        pytest.param(encoded(picture(70, 50), progressive=True), id="progressive"),
        pytest.param(encoded(picture(70, 50), keep_rgb=True), id="stored RGB"),
        pytest.param(with_adobe_segment(JPEG, 0, jfif=False), id="RGB by Adobe's word"),
        pytest.param(with_adobe_segment(JPEG, 0, jfif=True), id="RGB by Adobe's word and YCbCr by JFIF's"),
        pytest.param(JPEG[:2] + JPEG[20:], id="without a word on its colours"),
        pytest.param(JPEG + b"\x00", id="with a byte after its end"),
        pytest.param(JPEG + JPEG, id="twice the same"),
        pytest.param(JPEG[:-100] + b"\xff\xfe\x00\x02" + JPEG[-100:], id="with a comment in its scan"),
    ],
)
def test_files_that_devices_may_read_otherwise_are_decoded_by_torchvision(content: bytes) -> None:
    pixels = prepare_for_device(content, SMALL)
    assert not isinstance(pixels, bytes)
    np.testing.assert_array_equal(pixels, decode_pixels(content, SMALL, "torchvision"))


@pytest.mark.parametrize("kind", [kind for kind in BAD_FILES if "tables" not in kind and "process" not in kind])
def test_bad_files_are_refused_before_the_device_sees_them(kind: str) -> None:
    with pytest.raises(BadImageError):
        prepare_for_device(BAD_FILES[kind], SMALL)


def test_file_cut_anywhere_never_reaches_the_device() -> None:
    for cut in random.Random(3).sample(range(len(JPEG)), 50):
        with pytest.raises(BadImageError):
            prepare_for_device(JPEG[:cut], SMALL)


def prepared(images: Sequence[tuple[int, int]], transform: EvalTransform) -> list[bytes]:
    files = [encoded(picture(*size)) for size in images]
    assert all(isinstance(prepare_for_device(file, transform), bytes) for file in files)
    return files


@pytest.mark.parametrize("size", [(70, 50), (50, 70), (37, 41), (8, 8), (500, 375), (375, 500)], ids=str)
def test_pixels_of_the_device_are_nearly_pillows(size: tuple[int, int]) -> None:
    (content,) = prepared([size], SMALL)
    pixels, failures = decode_on_device([content], SMALL, CPU)
    gaps = differences(pixels[0].numpy(), decode_pixels(content, SMALL, "pillow"))
    assert (pixels.dtype, pixels.shape, failures) == (torch.uint8, (1, 32, 32, 3), {})
    assert gaps.max() <= 1
    assert gaps.mean() <= 0.01


def test_batch_keeps_its_order_whatever_decoded_an_image(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoders, "_DECODED_AT_ONCE", 2)
    files = [
        encoded(picture(70, 50 + row), "PNG" if row in (0, 3, 4) else "JPEG", **({"quality": 95} if row == 5 else {}))
        for row in range(8)
    ]
    pixels, failures = decode_on_device([prepare_for_device(file, SMALL) for file in files], SMALL, CPU)
    theirs = np.stack([decode_pixels(file, SMALL, "pillow") for file in files])
    assert failures == {}
    assert differences(pixels.numpy(), theirs).max() <= 1


@pytest.mark.parametrize("pixels_at_once", [1, 2 * 70 * 50, 1 << 24])
def test_images_that_are_resized_together_have_the_pixels_of_single_ones(
    pixels_at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = [(70, 50), (50, 70), (70, 50), (37, 41), (70, 50), (50, 70)]
    batch = [encoded(picture(*size), quality=90 - row) for row, size in enumerate(sizes)]
    single = [decode_on_device([content], SMALL, CPU)[0][0] for content in batch]
    monkeypatch.setattr(decoders, "_RESIZED_AT_ONCE", pixels_at_once)
    pixels, _ = decode_on_device(batch, SMALL, CPU)
    assert torch.equal(pixels, torch.stack(single))


def test_images_of_one_size_are_resized_together(monkeypatch: pytest.MonkeyPatch) -> None:
    batch, resized = prepared([(70, 50), (50, 70)] * 4, SMALL), []
    resize = decoders.interpolate

    def note(images: Tensor, *arguments: object, **options: object) -> Tensor:
        resized.append(len(images))
        return resize(images, *arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(decoders, "interpolate", note)
    decode_on_device(batch, SMALL, CPU)
    assert resized == [4] * 4  # two sizes, two directions each


def test_file_that_the_device_refuses_is_decoded_by_pillow_and_the_rest_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    one, refused, other = prepared([(70, 50), (60, 50), (50, 50)], SMALL)

    def some(contents: Sequence[bytes], device: torch.device) -> list[Tensor]:
        if refused in contents:
            raise RuntimeError("not this one")
        return [torch.zeros(3, 40, 40, dtype=torch.uint8) for _ in contents]

    with_decoder(some, monkeypatch)
    pixels, failures = decode_on_device([one, refused, other], SMALL, CPU)
    assert failures == {}
    np.testing.assert_array_equal(pixels[1].numpy(), decode_pixels(refused, SMALL, "pillow"))
    assert not pixels[[0, 2]].any()


def test_files_that_nobody_can_decode_are_named_by_their_rows() -> None:
    bad = BAD_FILES["no quantisation tables"]
    pixels, failures = decode_on_device([JPEG, bad, JPEG, bad], SMALL, CPU)
    assert failures == {
        1: "broken data stream when reading image file",
        3: "broken data stream when reading image file",
    }
    assert [bool(image.any()) for image in pixels] == [True, False, True, False]


def test_nvjpeg_without_a_gpu_is_refused_with_what_to_do() -> None:
    with pytest.raises(UsageError, match=r"--decoder nvjpeg: .*computes on cpu\.\nChoose --decoder torchvision"):
        check_decoder("nvjpeg", CPU)


@pytest.mark.parametrize("decoder", ["pillow", "torchvision"])
def test_decoders_of_the_cpu_need_no_gpu(decoder: str) -> None:
    check_decoder(decoder, CPU)


def test_torchvision_that_is_missing_is_refused_with_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchvision.io", None)
    with pytest.raises(
        UsageError, match=r"(?s)--decoder torchvision: .* cannot decode a JPEG.*Choose --decoder pillow"
    ):
        check_decoder("torchvision", CPU)
