from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor


@pytest.fixture(scope="session")
def photographs() -> list[Tensor]:
    """Give two photographs of different sizes, (3, height, width) uint8: those that scikit-learn carries."""
    import sklearn.datasets

    folder = Path(sklearn.datasets.__file__).parent / "images"
    found = []
    for name, size in (("china.jpg", (160, 120)), ("flower.jpg", (96, 128))):
        pixels = np.asarray(Image.open(folder / name).convert("RGB").resize(size))
        found.append(torch.from_numpy(pixels.copy()).permute(2, 0, 1).contiguous())
    return found
