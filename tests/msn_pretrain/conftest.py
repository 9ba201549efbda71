import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from msn_pretrain.config.load import read_recipe
from msn_pretrain.config.recipe import MSNRecipe, SimSiamRecipe

_TINY = """
run: {device: cpu, seed: 3, log_every: 1}
data: {root: digits, workers: 0, limit: 4}
views: {image_pixels: 16, focal_pixels: 8, focal_views: 2, focal_crop_scale: [0.2, 0.6]}
encoder:
  name: vit_tiny_patch16_224?img_size=16&patch_size=4&embed_dim=32&depth=2&num_heads=2
  drop_path: 0.2
head: {hidden: 32, output: 16}
masking: {ratio: 0.3, per_image: true}
criterion: {prototypes: 16}
optimization: {epochs: 2, batch_size: 8, warmup: 1}
ema: {start: 0.9}
"""


@dataclass(frozen=True)
class SmallDisk:
    """A file system of its own.

    Attributes:
        folder: Where it is mounted.
    """

    folder: Path

    def resize(self, size: str) -> None:
        subprocess.run(["mount", "-o", f"remount,size={size}", self.folder], check=True)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[SmallDisk]:
    """Mount a disk of 40 kB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=40k", "tmpfs", folder]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a file system needs root")
    yield SmallDisk(folder)
    subprocess.run(["umount", folder], check=True)


@pytest.fixture(scope="session")
def photographs() -> list[Tensor]:
    """Return the two photographs of scikit-learn in different sizes, (height, width, 3) uint8."""
    import sklearn.datasets

    folder = Path(sklearn.datasets.__file__).parent / "images"
    tensors = []
    for name, size in (("china.jpg", (160, 120)), ("flower.jpg", (96, 128))):
        pixels = np.asarray(Image.open(folder / name).convert("RGB").resize(size))
        tensors.append(torch.from_numpy(pixels.copy()))
    return tensors


@pytest.fixture
def tiny(tmp_path: Path) -> Callable[..., MSNRecipe | SimSiamRecipe]:
    """Return a function that reads a recipe of 10 steps on 40 digits, with overrides; its run folder is `run`."""
    (tmp_path / "tiny.yaml").write_text(_TINY)

    def read(*overrides: str) -> MSNRecipe | SimSiamRecipe:
        return read_recipe(tmp_path / "tiny.yaml", overrides=[f"run.dir={tmp_path / 'run'}", *overrides])

    return read
