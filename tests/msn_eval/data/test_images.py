import gzip
import io
import pickle
import struct
import tarfile
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, PngImagePlugin
from torchvision.transforms import CenterCrop, InterpolationMode, Resize

from msn_eval.data import read_split
from msn_eval.data.folder import FolderSource
from msn_eval.data.images import (
    BadImageError,
    ImageSet,
    decode_image,
    is_image_name,
    make_eval_transform,
    resize_and_crop,
)


def noise(width: int, height: int, *, channels: int = 3) -> Image.Image:
    """Return an image in which every pixel matters."""
    values = np.random.default_rng(width * 10_007 + height).integers(0, 256, (height, width, channels), dtype=np.uint8)
    return Image.fromarray(values.squeeze())


def encoded(image: Image.Image, file_format: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, file_format, **options)
    return file.getvalue()


def pixels_of(content: bytes) -> NDArray[np.uint8]:
    return np.asarray(decode_image(content))


def by_torchvision(image: Image.Image, image_pixels: int) -> NDArray[np.uint8]:
    """Return the pixels of the reference: torchvision's transforms on a PIL image."""
    resize = Resize(round(image_pixels * 256 / 224), interpolation=InterpolationMode.BILINEAR)
    return np.asarray(CenterCrop(image_pixels)(resize(image)))


def png_that_claims(width: int, height: int) -> bytes:
    """Return a PNG of a few bytes whose header promises width x height pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")
    )


def three_images() -> ImageSet:
    return ImageSet(
        ids=("a/0.png", "a/1.png", "b/0.png"), labels=(0, 0, 1), classes=("a", "b"), source=FolderSource(Path())
    )


@pytest.mark.parametrize(
    ("width", "height"),
    [(320, 240), (240, 320), (256, 256), (257, 255), (501, 333), (333, 501), (64, 64), (7, 3), (2, 301), (1, 1)],
    ids=lambda side: str(side),
)
def test_pixels_are_those_of_torchvision_on_a_pil_image(width: int, height: int) -> None:
    image = noise(width, height)
    ours = resize_and_crop(image, make_eval_transform(224))
    np.testing.assert_array_equal(ours, by_torchvision(image, 224))


@pytest.mark.parametrize("image_pixels", [1, 3, 8, 16, 28, 32, 64, 96, 160, 384])
def test_pixels_are_those_of_torchvision_at_other_native_sizes(image_pixels: int) -> None:
    image = noise(123, 77)
    ours = resize_and_crop(image, make_eval_transform(image_pixels))
    np.testing.assert_array_equal(ours, by_torchvision(image, image_pixels))


def test_pixels_of_real_photographs_are_those_of_torchvision(shared_data: Path) -> None:
    different = []
    with tarfile.open(shared_data / "imagenet_samples.tar") as samples:
        members = samples.getmembers()[::6]
        for member in members:
            content = samples.extractfile(member).read()  # type: ignore[union-attr]
            ours = resize_and_crop(decode_image(content), make_eval_transform(224))
            if not np.array_equal(ours, by_torchvision(Image.open(io.BytesIO(content)).convert("RGB"), 224)):
                different.append(member.name)
    assert (len(members), different) == (38, [])


@pytest.mark.parametrize(
    ("image_pixels", "resize"), [(224, 256), (32, 37), (64, 73), (96, 110), (384, 439), (518, 592), (1, 1)]
)
def test_resize_keeps_the_proportion_of_256_to_224(image_pixels: int, resize: int) -> None:
    transform = make_eval_transform(image_pixels)
    assert (transform.resize, transform.crop) == (resize, image_pixels)


def test_shape_too_long_to_be_resized_is_refused_whatever_the_network() -> None:
    with pytest.raises(BadImageError, match="1 x 501 pixels: longer than 500 : 1"):
        decode_image(encoded(Image.new("RGB", (1, 501)), "PNG"))


def test_exif_orientation_turns_nothing() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    assert decode_image(encoded(noise(80, 40), "JPEG", exif=exif)).size == (80, 40)


def test_damaged_exif_block_does_not_touch_the_pixels() -> None:
    intact = encoded(noise(16, 16), "JPEG")
    damaged = encoded(noise(16, 16), "JPEG", exif=b"Exif\x00\x00II*\x00\x08\x00\x00\x00\x09\x00\x1a\x01")
    with pytest.warns(UserWarning, match="Corrupt EXIF"):
        Image.open(io.BytesIO(damaged)).getexif()
    np.testing.assert_array_equal(pixels_of(damaged), pixels_of(intact))


def test_cmyk_jpeg_decodes_to_the_colour_it_prints() -> None:
    cyan = pixels_of(encoded(Image.new("CMYK", (8, 8), (255, 0, 0, 0)), "JPEG", quality=100))
    assert np.abs(cyan.astype(int) - (0, 255, 255)).max() <= 3


def test_animation_gives_its_first_frame() -> None:
    first, second = Image.new("RGB", (4, 4), (255, 0, 0)), Image.new("RGB", (4, 4), (0, 0, 255))
    content = encoded(first, "GIF", save_all=True, append_images=[second])
    np.testing.assert_array_equal(pixels_of(content), np.asarray(first))


@pytest.mark.parametrize(
    ("file_format", "options"),
    [
        ("PNG", {}),
        ("BMP", {}),
        ("WEBP", {"lossless": True}),
        ("PPM", {}),
        ("TIFF", {}),
        ("TIFF", {"compression": "tiff_lzw"}),
    ],
)
def test_lossless_formats_decode_to_the_pixels_that_went_in(file_format: str, options: dict[str, object]) -> None:
    image = noise(9, 6)
    np.testing.assert_array_equal(pixels_of(encoded(image, file_format, **options)), np.asarray(image))


def colour_tiff(*, bits: int) -> bytes:
    """Return an uncompressed colour TIFF of 2 x 1 pixels with this many bits per channel, which Pillow cannot write."""
    size = 6 * bits // 8
    tags = [(256, 3, 1, 2), (257, 3, 1, 1), (258, 3, 3, 8 + size), (259, 3, 1, 1), (262, 3, 1, 2), (273, 4, 1, 8),
            (277, 3, 1, 3), (278, 3, 1, 1), (279, 4, 1, size)]  # fmt: skip
    directory = struct.pack("<H", len(tags)) + b"".join(struct.pack("<HHII", *tag) for tag in tags) + bytes(4)
    return (
        struct.pack("<2sHI", b"II", 42, 8 + size + 6) + bytes(size) + struct.pack("<3H", bits, bits, bits) + directory
    )


def test_colour_tiff_of_8_bits_is_decoded() -> None:
    assert pixels_of(colour_tiff(bits=8)).shape == (1, 2, 3)


def text_bomb() -> bytes:
    info = PngImagePlugin.PngInfo()
    info.add_text("Comment", "a" * 2_000_000, zip=True)
    return encoded(noise(4, 4), "PNG", pnginfo=info)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        pytest.param(encoded(Image.new("I;16", (4, 4), 40_000), "PNG"), "more than 8 bits", id="16-bit PNG"),
        pytest.param(encoded(Image.new("F", (4, 4), 0.5), "TIFF"), "mode F has more than 8 bits", id="float TIFF"),
        pytest.param(
            encoded(Image.new("I;16", (4, 4), 900), "TIFF"), "mode I;16 has more than 8 bits", id="16-bit TIFF"
        ),
        pytest.param(colour_tiff(bits=16), "a TIFF of 16 bits per channel", id="16-bit colour TIFF"),
        pytest.param(
            encoded(noise(4, 4), "TIFF", save_all=True, append_images=[noise(4, 4)]), "a TIFF of 2 pages", id="pages"
        ),
        pytest.param(encoded(noise(4, 4), "TIFF")[:-20], "truncated", id="truncated TIFF"),
        pytest.param(b"P5\n4 4\n65535\n" + bytes(32), "mode I", id="16-bit PGM"),
        pytest.param(encoded(noise(4, 4), "TGA"), "formats JPEG, PNG", id="TGA"),
        pytest.param(encoded(noise(4, 4), "EPS"), "formats JPEG, PNG", id="EPS"),
        pytest.param(encoded(noise(64, 64), "JPEG")[:-200], "truncated", id="truncated JPEG"),
        pytest.param(encoded(noise(64, 64), "PNG")[:-200], "truncated", id="truncated PNG"),
        pytest.param(encoded(noise(64, 64), "JPEG")[:40], "Truncated", id="head of a JPEG"),
        pytest.param(b"", "the file is empty", id="empty"),
        pytest.param(gzip.compress(encoded(noise(4, 4), "JPEG")), "gzip", id="gzip"),
        pytest.param(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull", id="git-lfs"),
        pytest.param(b"<!DOCTYPE html><html>Not found</html>", "formats JPEG, PNG.*3c 21 44 4f", id="HTML"),
        pytest.param(png_that_claims(10_000, 10_000), "100000000 pixels", id="bomb that Pillow warns of"),
        pytest.param(png_that_claims(20_000, 20_000), "400000000 pixels", id="bomb that Pillow refuses"),
        pytest.param(text_bomb(), "too large", id="text bomb"),
    ],
)
def test_file_that_gives_no_valid_pixels_is_a_bad_image(content: bytes, reason: str) -> None:
    with pytest.raises(BadImageError, match=reason):
        decode_image(content)


def test_decoding_leaves_the_warning_filters_alone() -> None:
    before = list(warnings.filters)
    decode_image(encoded(noise(4, 4), "PNG"))
    assert list(warnings.filters) == before


@pytest.mark.parametrize("name", ["a.jpg", "a.JPEG", "a.Png", "a.webp", "a.BMP", "a.gif", "a.b.jpg", "caf\udce9.jpg"])
def test_names_with_an_image_suffix_in_any_case_are_images(name: str) -> None:
    assert is_image_name(name)


@pytest.mark.parametrize("name", [".jpg", "._a.jpg", ".DS_Store", "Thumbs.db", "a.tga", "a.txt", "jpg", "a.jpg.part"])
def test_dotfiles_and_other_suffixes_are_not_images(name: str) -> None:
    assert not is_image_name(name)


def test_selection_keeps_the_order_of_the_set() -> None:
    chosen = three_images().only(["b/0.png", "a/0.png"])
    assert (chosen.ids, chosen.labels, chosen.classes) == (("a/0.png", "b/0.png"), (0, 1), ("a", "b"))


def test_first_of_each_class_takes_the_first_in_order() -> None:
    assert three_images().first_of_each_class(1).ids == ("a/0.png", "b/0.png")


def palette_image() -> Image.Image:
    image = Image.new("P", (1, 1), 1)
    image.putpalette([10, 20, 30, 40, 50, 60])
    return image


@pytest.mark.parametrize(
    ("image", "options", "colour"),
    [
        (Image.new("L", (1, 1), 7), {}, (7, 7, 7)),
        (Image.new("1", (1, 1), 1), {}, (255, 255, 255)),
        (palette_image(), {}, (40, 50, 60)),
        (palette_image(), {"transparency": b"\x00\x80"}, (40, 50, 60)),
        (Image.new("RGBA", (1, 1), (10, 20, 30, 0)), {}, (10, 20, 30)),
    ],
    ids=["grey", "one bit", "palette", "palette with transparency", "alpha"],
)
def test_modes_are_converted_to_rgb(image: Image.Image, options: dict[str, object], colour: tuple[int, ...]) -> None:
    assert tuple(pixels_of(encoded(image, "PNG", **options))[0, 0]) == colour


@pytest.mark.parametrize("ids", [(), ("a/1.png",), ("a/1.png", "a/\udcff\u00e9.png", "b/2 \n.png")])
def test_pickled_set_is_the_same_without_what_it_cached(ids: tuple[str, ...]) -> None:
    source = read_split("digits", "train").source
    images = ImageSet(ids=ids, labels=tuple(range(len(ids))), classes=("a", "b", "c"), source=source, passed_over=2)
    before = len(pickle.dumps(images))
    assert images.position.keys() == set(ids)

    content = pickle.dumps(images)

    assert len(content) == before
    copied = pickle.loads(content)
    assert (copied.ids, copied.labels, copied.classes, copied.passed_over) == (ids, images.labels, images.classes, 2)
    assert all(type(label) is int for label in copied.labels)
