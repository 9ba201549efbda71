"""Encoding and extraction on the simulated device: the features of a CPU, without waiting for each batch."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from simulated_cuda import compute_as_simulated

from msn_eval.data import read_split
from msn_eval.data.hashing import hash_images
from msn_eval.features.encoder import Encoder, Precision, encode, load_encoder
from msn_eval.features.extraction import Loading, extract_features

Simulate = Callable[[], Any]
TRANSFORMER = "random:vit_tiny_patch16_224?img_size=32&patch_size=8&embed_dim=48&num_heads=3&depth=4"
SMALL = TRANSFORMER.replace("depth=4", "depth=1")
CONVOLUTIONS = "random:resnet10t"
# Waits of the host per batch. Numbers may only go down.
BUDGETS = {"encode": 0, "extraction": 0, "extraction through the cache": 0}


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
