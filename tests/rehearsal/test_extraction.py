"""Encoding and extraction on the simulated device: the features of a CPU, without waiting for each batch."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from simulated_cuda import compute_as_simulated
from torchvision.io import decode_jpeg

from msn_eval.data import read_split
from msn_eval.data.hashing import hash_images
from msn_eval.features.encoder import Encoder, Precision, encode, load_encoder
from msn_eval.features.extraction import Loading, extract_features

Simulate = Callable[[], Any]
TRANSFORMER = "random:vit_tiny_patch16_224?img_size=32&patch_size=8&embed_dim=48&num_heads=3&depth=4"
SMALL = TRANSFORMER.replace("depth=4", "depth=1")
CONVOLUTIONS = "random:resnet10t"
# Waits of the host per batch. Numbers may only go down.
BUDGETS = {"encode": 0, "extraction": 0, "extraction through the cache": 0, "extraction, decoded on the device": 1}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", [TRANSFORMER, CONVOLUTIONS, "pixels"])
def test_features_at_all_taps_are_those_of_a_cpu(simulate_cuda: Simulate, name: str, precision: Precision) -> None:
    pixels = torch.randint(0, 256, (3, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    options = {"precision": precision, "image_pixels": 32}
    if name == "pixels":
        del options["image_pixels"]
        pixels = pixels.new_zeros(3, 8, 8, 3).random_(generator=torch.Generator().manual_seed(0))
    there = load_encoder(name, device="cpu", **options)
    with compute_as_simulated():
        expected = encode(there, pixels, there.taps)

    with simulate_cuda() as device:
        here = load_encoder(name, device="cuda", **options)
        pinned = pixels.pin_memory()
        encode(here, pinned, here.taps)
        spent = device.measure_waits(lambda: encode(here, pinned, here.taps))
        features = {tap: rows.cpu() for tap, rows in encode(here, pinned, here.taps).items()}

    device.check_budget("encode", BUDGETS, spent)
    assert name == "pixels" or (device.products[torch.bfloat16] > 0) == (precision == "bf16")
    assert features.keys() == expected.keys()
    for tap, rows in features.items():
        torch.testing.assert_close(rows, expected[tap], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("cached", [False, True])
def test_extraction_is_that_of_a_cpu(simulate_cuda: Simulate, tmp_path: Path, cached: bool) -> None:
    images = read_split("digits", "val")
    images = images.only(images.ids[:48])
    hashes = hash_images(images, cache_dir=None)

    def run(encoder: Encoder, batch_size: int) -> Any:
        loading = Loading(batch_size=batch_size, workers=0)
        cache = tmp_path / f"{encoder.device.type}{batch_size}" if cached else None
        return extract_features(encoder, images, taps=encoder.taps, hashes=hashes, loading=loading, cache=cache)

    expected = run(load_encoder(SMALL, device="cpu", precision="fp32"), 12).features
    with simulate_cuda() as device:
        encoder = load_encoder(SMALL, device="cuda", precision="fp32")
        few = device.measure_waits(lambda: run(encoder, 24))
        before = device.waits.total()
        features = run(encoder, 4).features
        many = device.waits.total() - before

    device.check_budget("extraction through the cache" if cached else "extraction", BUDGETS, (many - few) / 10)
    for tap, item in features.items():
        torch.testing.assert_close(item.values, expected[tap].values, rtol=1e-5, atol=1e-4)


def _extract_digits(encoder: Encoder) -> None:
    images = read_split("digits", "val")
    images = images.only(images.ids[:48])
    extract_features(encoder, images, taps=["cls"], loading=Loading(batch_size=8, workers=0))


def test_upload_and_kernels_of_a_batch_run_before_the_results_of_the_one_before_are_fetched(
    simulate_cuda: Simulate,
) -> None:
    with simulate_cuda() as device:
        encoder = load_encoder(SMALL, device="cuda", precision="fp32")
        loaded = len(device.log)
        _extract_digits(encoder)

    uploads = device.positions("upload", dtype=torch.uint8)
    downloads = [position for position in device.positions("download") if position > loaded]
    device.check_ahead(uploads, device.positions("fetch"))
    device.check_ahead(downloads, device.positions("fetch"))
    assert all(device.log[copy].pinned for copy in uploads + downloads)
    # Each download follows the last kernels of its batch.
    assert all(device.may_overlap(later, download - 1) for later, download in zip(uploads[1:], downloads, strict=False))


def test_mean_and_std_are_copied_to_the_device_once(simulate_cuda: Simulate) -> None:
    with simulate_cuda() as device:
        encoder = load_encoder(SMALL, device="cuda", precision="fp32")
        loaded = len(device.log)
        _extract_digits(encoder)
        _extract_digits(encoder)

    copied = [device.log[position] for position in device.positions("upload", dtype=torch.float32) if position > loaded]
    assert [entry.shape for entry in copied] == [(2, 3)]


def test_results_are_awaited_on_the_encoders_device_where_another_device_is_current(
    simulate_cuda: Simulate, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An event of another device would be complete before the copy is, and the host would read what was there before."""
    with simulate_cuda():
        record = torch.cuda.Event.record

        def record_there(event: Any, stream: Any = None) -> None:
            assert stream is not None, "recorded on a stream of the current device"
            record(event, stream)

        monkeypatch.setattr(torch.cuda.Event, "record", record_there)
        _extract_digits(load_encoder(SMALL, device="cuda", precision="fp32"))


def test_images_decoded_on_the_device_have_the_features_of_a_cpu_and_one_wait_per_decoded_part(
    simulate_cuda: Simulate, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "val" / "ant").mkdir(parents=True)
    for number in range(24):
        picture = Image.effect_noise((40 + number % 2, 44), 40 + number).convert("RGB")
        picture.save(tmp_path / "val" / "ant" / f"{number:02d}.jpg")
    images = read_split(str(tmp_path), "val")
    there = load_encoder(SMALL, device="cpu", precision="fp32")
    expected = extract_features(there, images, taps=["cls"], loading=Loading(decoder="nvjpeg", workers=0))
    idle: list[tuple[bool, bool]] = []

    def decode(files: list[torch.Tensor], mode: Any, device: torch.device) -> list[torch.Tensor]:
        """Decode as torchvision does: into new memory, without waiting for what this stream has queued."""
        idle.append((torch.cuda.current_stream().query(), torch.cuda.default_stream().query()))
        return [image.to(device, non_blocking=True) for image in decode_jpeg(files, mode=mode)]

    with simulate_cuda() as device:
        here = load_encoder(SMALL, device="cuda", precision="fp32")
        monkeypatch.setattr("torchvision.io.decode_jpeg", decode)
        loading = Loading(decoder="nvjpeg", batch_size=6, workers=0)
        before = device.waits.total()
        found = extract_features(here, images, taps=["cls"], loading=loading)
        spent = device.waits.total() - before

    torch.testing.assert_close(found.features["cls"].values, expected.features["cls"].values, rtol=1e-5, atol=1e-4)
    assert idle == [(True, number == 0) for number in range(4)]  # the encoder still works on the batch before
    device.check_budget("extraction, decoded on the device", BUDGETS, spent / 4)
