"""Features: the same for every batch size and number of workers, and refused where images or numbers are bad."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from msn_eval import extract, load_encoder
from msn_eval.checkpoints.checkpoint import read_checkpoint
from msn_eval.checkpoints.normalisation import Normalisation
from msn_eval.data import read_split
from msn_eval.data.hashing import hash_images
from msn_eval.data.images import ImageSet
from msn_eval.errors import CheckpointError, DataError, NumericalError, UsageError
from msn_eval.features.encoder import Encoder, Precision, build_encoder
from msn_eval.features.extraction import Features, Loading, choose_batch_size, extract_features

WeightMaker = Callable[..., dict[str, Tensor]]
MSNWriter = Callable[..., Path]
CPU = torch.device("cpu")
TINY = "random:vit_tiny_patch16_224?img_size=32&patch_size=8&depth=1"


class NotANumberForBright(nn.Module):
    """Returns NaN for bright images."""

    def forward(self, images: Tensor) -> Tensor:
        means = images.mean((2, 3))
        return torch.where(means.mean(1, keepdim=True) > 1, math.nan, means)


def own(network: nn.Module) -> Encoder:
    pixels = read_checkpoint("pixels")
    own = replace(pixels, name="own", path="py:own:factory", format="py", arch="own", network=network.eval())
    own = replace(own, normalisation=Normalisation(mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25), source="test"))
    return build_encoder(own, device=CPU, precision="fp32")


@dataclass(frozen=True)
class GreySource:
    """Images in memory: the image called `CLASS/n.png` is grey of brightness n."""

    root = None

    def read(self, image_id: str) -> bytes:
        return image_id.encode()

    def decode(self, content: bytes) -> Image.Image:
        return Image.new("RGB", (40, 40), (int(content.decode().partition("/")[2].removesuffix(".png")),) * 3)

    def place(self, image_id: str) -> str:
        return image_id

    def stamp(self, image_id: str) -> tuple[int, ...]:
        return (0,)


def greys(*brightness: int) -> ImageSet:
    return ImageSet(
        ids=tuple(f"0/{value}.png" for value in brightness),
        labels=(0,) * len(brightness),
        classes=("0",),
        source=GreySource(),
    )


@pytest.fixture
def encoder(msn_file: MSNWriter, vit_weights: WeightMaker) -> Encoder:
    return load_encoder(str(msn_file(vit_weights(depth=1))), device="cpu")


@pytest.fixture
def damaged_folder(tmp_path: Path) -> Path:
    """Return a folder of four images in `val`, two of them damaged."""
    folder = tmp_path / "val" / "ant"
    folder.mkdir(parents=True)
    for number in range(4):
        Image.new("RGB", (40, 40), (number, 0, 0)).save(folder / f"{number}.png")
    (folder / "1.png").write_bytes(b"")
    (folder / "3.png").write_bytes((folder / "3.png").read_bytes()[:60])
    return tmp_path


@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_features_do_not_depend_on_the_batch_size(encoder: Encoder, picture_folder: Path, batch_size: int) -> None:
    together = extract(encoder, str(picture_folder), tap="cls", batch_size=15).values
    apart = extract(encoder, str(picture_folder), tap="cls", batch_size=batch_size).values
    torch.testing.assert_close(apart, together, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("workers", [1, 2])
def test_features_do_not_depend_on_the_number_of_workers(encoder: Encoder, picture_folder: Path, workers: int) -> None:
    alone = extract(encoder, str(picture_folder), tap="cls", batch_size=4, workers=0).values
    shared = extract(encoder, str(picture_folder), tap="cls", batch_size=4, workers=workers).values
    torch.testing.assert_close(shared, alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("workers", [0, 2])
def test_every_row_is_that_of_its_own_image(workers: int) -> None:
    brightness = (3, 200, 77, 250, 0, 128, 9)
    features = extract_features(
        own(nn.Flatten()), greys(*brightness), taps=["out"], loading=Loading(batch_size=2, workers=workers)
    )
    expected = (torch.tensor(brightness)[:, None] / 255 - 0.5) / 0.25
    torch.testing.assert_close(features.features["out"].values, expected.expand(7, 3072))


def test_features_are_float32_with_int64_labels_and_text_ids() -> None:
    features = extract(load_encoder(TINY, device="cpu"), "digits")
    assert (features.values.shape, features.values.dtype) == ((797, 192), torch.float32)
    assert (features.labels.dtype, features.n_classes, features.tap) == (torch.int64, 10, "cls")
    assert {type(image_id) for image_id in features.image_ids} == {str}


def test_missing_split_is_refused_by_its_folder(encoder: Encoder, picture_folder: Path) -> None:
    with pytest.raises(DataError, match="has no train images"):
        extract(encoder, str(picture_folder), split="train")


def test_missing_tap_is_refused(encoder: Encoder, picture_folder: Path) -> None:
    with pytest.raises(UsageError, match="tap pool"):
        extract(encoder, str(picture_folder), tap="pool")


def test_progress_counts_every_image_once(encoder: Encoder, picture_folder: Path) -> None:
    counts: list[tuple[int, int]] = []
    images = read_split(str(picture_folder), "val")
    extract_features(
        encoder, images, taps=["cls"], loading=Loading(batch_size=4), on_progress=lambda *count: counts.append(count)
    )
    assert counts == [(4, 15), (8, 15), (12, 15), (15, 15)]


def test_rows_are_picked_by_name_in_the_order_named() -> None:
    features = Features(
        values=torch.arange(6.0).reshape(3, 2),
        labels=torch.tensor([0, 1, 2]),
        image_ids=("a", "b", "c"),
        n_classes=3,
        tap="cls",
    )
    picked = features.only(["c", "a"])
    assert (picked.values.tolist(), picked.labels.tolist(), picked.image_ids) == ([[4, 5], [0, 1]], [2, 0], ("c", "a"))


# Bad images.


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_all_damaged_images_are_listed_at_once(
    encoder: Encoder, damaged_folder: Path, batch_size: int, workers: int
) -> None:
    with pytest.raises(DataError, match=r"2 images cannot be used:\n.*1\.png: the file is empty") as refusal:
        extract(encoder, str(damaged_folder), batch_size=batch_size, workers=workers)
    named = [
        number for number in range(4) if str(damaged_folder / "val" / "ant" / f"{number}.png") in str(refusal.value)
    ]
    assert (refusal.value.exit_code, named) == (21, [1, 3])


def test_image_that_vanishes_is_listed(encoder: Encoder, damaged_folder: Path) -> None:
    images = read_split(str(damaged_folder), "val").only(["ant/0.png", "ant/2.png"])
    (damaged_folder / "val" / "ant" / "2.png").unlink()
    with pytest.raises(DataError, match=r"1 image cannot be used:\n  .*2\.png"):
        extract_features(encoder, images, taps=["cls"])


def test_image_that_changed_since_it_was_hashed_is_refused(encoder: Encoder, damaged_folder: Path) -> None:
    images = read_split(str(damaged_folder), "val").only(["ant/0.png", "ant/2.png"])
    hashes = hash_images(images, cache_dir=None)
    Image.new("RGB", (40, 40), (0, 99, 0)).save(damaged_folder / "val" / "ant" / "2.png")
    with pytest.raises(DataError, match=r"1 image cannot be used:\n  .*2\.png: it changed since it was hashed"):
        extract_features(encoder, images, taps=["cls"], hashes=hashes)


# Bad numbers.


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_nan_features_are_refused_and_the_first_image_is_named(batch_size: int) -> None:
    with pytest.raises(NumericalError, match=r"tap out are not finite for .* first 0/250\.png") as refusal:
        extract_features(
            own(NotANumberForBright()),
            greys(10, 20, 30, 250, 40, 240),
            taps=["out"],
            loading=Loading(batch_size=batch_size),
        )
    assert refusal.value.exit_code == 23


@pytest.mark.parametrize(
    "answer",
    [
        lambda images: images,
        lambda images: images.mean((1, 2, 3)),
        lambda images: images.mean((0, 2, 3))[None],
        lambda images: images.mean((2, 3)).repeat(2, 1),
        lambda images: (images.mean((2, 3)), images),
    ],
    ids=["a map", "a number per image", "one row per batch", "two rows per image", "a pair"],
)
def test_own_module_that_does_not_return_a_row_per_image_is_refused(answer: Callable[[Tensor], object]) -> None:
    class Answering(nn.Module):
        def forward(self, images: Tensor) -> object:
            return answer(images)

    with pytest.raises(CheckpointError, match="own"):
        extract_features(own(Answering()), greys(10, 20, 30, 40), taps=["out"], loading=Loading(batch_size=2))


# Resources.


def test_error_of_the_users_network_is_not_reported_as_one_of_the_workers() -> None:
    class Broken(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(CheckpointError, match="mat1 and mat2"):
        extract_features(own(Broken()), greys(1, 2), taps=["out"], loading=Loading(workers=1))


def test_smaller_images_get_larger_batches() -> None:
    found = [
        choose_batch_size(build_encoder(own(nn.Flatten()).checkpoint, device=CPU, precision="fp32", image_pixels=side))
        for side in (448, 224, 112, 8)
    ]
    assert found == [16, 16, 64, 256]


def test_extraction_from_a_network_that_changes_is_refused(picture_folder: Path) -> None:
    class Drifting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.seen = nn.Parameter(torch.zeros(1))

        def forward(self, images: Tensor) -> Tensor:
            self.seen.data += len(images)
            return images.mean((2, 3))

    with pytest.raises(CheckpointError, match="its weights changed"):
        extract(own(Drifting()), str(picture_folder))


def test_extraction_with_a_cache_encodes_once(
    encoder: Encoder, picture_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = extract(encoder, str(picture_folder), cache=tmp_path / "cache").values
    monkeypatch.setattr("msn_eval.features.extraction.encode", lambda *given: pytest.fail("encoded again"))
    assert torch.equal(extract(encoder, str(picture_folder), cache=tmp_path / "cache").values, first)


def test_taps_that_are_cached_for_different_images_are_completed(
    encoder: Encoder, picture_folder: Path, tmp_path: Path
) -> None:
    images = read_split(str(picture_folder), "val")
    hashes = hash_images(images, cache_dir=None)
    for tap, ids in (("cls", images.ids[:7]), ("mean", images.ids[4:12])):
        extract_features(encoder, images.only(ids), taps=[tap], hashes=hashes, cache=tmp_path)
    both = extract_features(encoder, images, taps=["cls", "mean"], hashes=hashes, cache=tmp_path)
    assert (both.read, both.reused) == (12, 3)
    fresh = extract_features(encoder, images, taps=["cls", "mean"]).features
    for tap in ("cls", "mean"):
        torch.testing.assert_close(both.features[tap].values, fresh[tap].values, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("precision", "advice"), [("fp32", "overflow in fp32"), ("bf16", "--precision fp32")])
def test_hint_for_overflow_depends_on_the_precision(precision: Precision, advice: str) -> None:
    encoder = build_encoder(own(NotANumberForBright()).checkpoint, device=CPU, precision=precision)
    with pytest.raises(NumericalError) as refusal:
        extract_features(encoder, greys(250), taps=["out"])
    assert advice in refusal.value.hint


def test_file_that_the_device_decoder_refuses_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "val" / "ant"
    folder.mkdir(parents=True)
    for number in range(4):
        Image.new("RGB", (40, 40), (60 * number, 0, 0)).save(folder / f"{number}.jpg")
    torn = (folder / "3.jpg").read_bytes()

    def decode(part: list[bytes], *given: object) -> tuple[Tensor, dict[int, str]]:
        pixels = torch.zeros(len(part), 32, 32, 3, dtype=torch.uint8)
        return pixels, {row: "torn" for row, content in enumerate(part) if content == torn}

    class Hungry(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            if len(images) > 1:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return images.mean((2, 3))

    monkeypatch.setattr("msn_eval.features.extraction.decode_on_device", decode)
    loading = Loading(batch_size=2, decoder="nvjpeg")
    with pytest.raises(DataError, match=r"1 image cannot be used:\n  .*3\.jpg: torn"):
        extract_features(own(Hungry()), read_split(str(tmp_path), "val"), taps=["out"], loading=loading)
