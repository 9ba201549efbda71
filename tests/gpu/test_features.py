"""Complete feature extractions on a GPU: caching, resuming, out of memory, and decoding on the GPU."""

import gc
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from msn_eval.data import read_split
from msn_eval.data.hashing import hash_images
from msn_eval.errors import ResourceError
from msn_eval.features.encoder import Encoder, encode, load_encoder
from msn_eval.features.extraction import Extraction, Loading, extract_features

pytestmark = pytest.mark.gpu
SIMULATED = not torch.cuda.is_available()  # as slow as a CPU, so that sizes are smaller
DEEP = "random:vit_small_patch16_224" + ("?img_size=32&depth=2&embed_dim=48&num_heads=3" if SIMULATED else "")
LOADING = Loading(workers=0)


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write 96 smooth JPEGs as the validation split of an image folder and return the folder."""
    folder = tmp_path_factory.mktemp("photographs") / "val" / "waves"
    folder.mkdir(parents=True)
    y, x = np.mgrid[:260, :300]
    for number in range(96):
        waves = np.stack(
            [np.sin(x / (20 + number) + y / 47), np.cos(x / 35 - number), np.sin(y / (27 + number))], axis=2
        )
        Image.fromarray((128 + 90 * waves).astype(np.uint8)).save(folder / f"{number:03d}.jpg", quality=90)
    return folder.parents[1]


@pytest.fixture
def little_memory() -> Iterator[None]:
    """Limit the GPU memory of this process so that a batch of 64 photographs does not fit beside the network."""
    gc.collect()
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((350 << 20) / total)
    yield
    torch.cuda.set_per_process_memory_fraction(1.0)


def run(
    photographs: Path, cache: Path | None, *, encoder: Encoder | None = None, loading: Loading = LOADING
) -> Extraction:
    images = read_split(str(photographs), "val")
    hashes = hash_images(images, cache_dir=None)
    chosen = encoder or load_encoder(DEEP, device="cuda", precision="fp32")
    return extract_features(chosen, images, taps=["cls"], hashes=hashes, loading=loading, cache=cache)


def values(extraction: Extraction) -> torch.Tensor:
    return extraction.features["cls"].values


def test_fp32_features_of_files_agree_with_the_cpu(photographs: Path) -> None:
    theirs = run(photographs, None, encoder=load_encoder(DEEP, device="cpu", precision="fp32"))
    ours = run(photographs, None)
    assert (values(ours) - values(theirs)).norm() / values(theirs).norm() < 5e-5


def test_workers_and_pinned_memory_do_not_change_the_features(photographs: Path) -> None:
    alone, shared = (run(photographs, None, loading=Loading(batch_size=16, workers=count)) for count in (0, 2))
    assert torch.equal(values(alone), values(shared))


def test_cached_features_are_reused_bit_for_bit(photographs: Path, tmp_path: Path) -> None:
    first, second = run(photographs, tmp_path), run(photographs, tmp_path)
    assert (second.read, torch.equal(values(first), values(second))) == (0, True)


def test_resumed_extraction_gives_the_same_features(
    photographs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("msn_eval.features.extraction._CUDA_SHARD_ROWS", 32)
    left = [4]

    def interrupted(encoder: Encoder, pixels: torch.Tensor, taps: list[str]) -> dict[str, torch.Tensor]:
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return encode(encoder, pixels, taps)

    loading = Loading(batch_size=16, workers=0)
    monkeypatch.setattr("msn_eval.features.extraction.encode", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(photographs, tmp_path, loading=loading)
    monkeypatch.setattr("msn_eval.features.extraction.encode", encode)
    resumed = run(photographs, tmp_path, loading=loading)
    assert resumed.reused == 32
    assert torch.equal(values(resumed), values(run(photographs, None, loading=loading)))


@pytest.mark.real_gpu("memory that runs out")
@pytest.mark.usefixtures("little_memory")
def test_batch_size_is_reduced_until_it_fits_the_gpu(photographs: Path) -> None:
    found = run(photographs, None, loading=Loading(batch_size=96, workers=0))
    torch.cuda.set_per_process_memory_fraction(1.0)
    reference = run(photographs, None, loading=Loading(batch_size=96, workers=0))
    assert found.batch_size < 96
    assert (values(found) - values(reference)).norm() / values(reference).norm() < 5e-5


@pytest.mark.real_gpu("memory that runs out")
@pytest.mark.usefixtures("little_memory")
def test_gpu_too_small_for_one_image_is_a_resource_error(photographs: Path) -> None:
    encoder = load_encoder(DEEP, device="cuda", precision="fp32")
    total = torch.cuda.get_device_properties(0).total_memory
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(torch.cuda.memory_reserved() / total)
    with pytest.raises(ResourceError, match="one image does not fit into the memory"):
        run(photographs, None, encoder=encoder)


@pytest.mark.real_gpu("nvJPEG")
def test_features_from_nvjpeg_are_close_to_those_from_pillow(photographs: Path) -> None:
    theirs, ours = (
        run(photographs, None, loading=Loading(decoder=decoder, workers=0)) for decoder in ("pillow", "nvjpeg")
    )
    similarity = torch.nn.functional.cosine_similarity(values(theirs), values(ours))
    assert similarity.min() > 0.99
