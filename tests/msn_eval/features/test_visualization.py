import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA
from torch import Tensor

from msn_eval.data import read_dataset
from msn_eval.data.images import ImageSet
from msn_eval.errors import DataError
from msn_eval.features.encoder import Encoder, load_encoder
from msn_eval.features.extraction import Features, extract_features
from msn_eval.features.visualization import (
    find_neighbours,
    hide_patches,
    project,
    read_pixels,
)


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return load_encoder("random:vit_tiny_patch16_224?img_size=32&patch_size=8&depth=2", device="cpu")


@pytest.fixture(scope="module")
def images() -> ImageSet:
    return read_dataset("digits").train.first_of_each_class(3)


@pytest.fixture(scope="module")
def train(encoder: Encoder, images: ImageSet) -> Features:
    return extract_features(encoder, images, taps=["cls-norm"]).features["cls-norm"]


def test_nearest_neighbour_of_a_training_image_is_itself(encoder: Encoder, images: ImageSet, train: Features) -> None:
    pixels = read_pixels(images, images.ids, encoder.transform)

    complete, most = find_neighbours(encoder, pixels, train, masked=[0.0, 0.9], count=4, seed=0)

    assert complete.nearest[:, 0].tolist() == list(range(30))
    assert np.array_equal(complete.shown, pixels.numpy())
    assert most.nearest.shape == (30, 4)
    assert (most.nearest[:, 0] != np.arange(30)).any()


def test_hidden_patches_are_grey(random_pixels: Tensor) -> None:
    shown = hide_patches(random_pixels, torch.tensor([[0, 15]]).expand(4, -1), side=4)

    assert np.array_equal(shown[:, :8, :8], random_pixels[:, :8, :8].numpy())
    assert np.array_equal(shown[:, 24:, 24:], random_pixels[:, 24:, 24:].numpy())
    assert (shown[:, 8:, :24] == 127).all()


def test_projection_gives_the_principal_components(train: Features) -> None:
    rows = torch.nn.functional.normalize(train.values.double(), dim=1).numpy()
    reference = PCA(2).fit(rows)

    places, share = project(train)

    assert np.allclose(np.abs(places), np.abs(reference.transform(rows)), atol=1e-8)
    assert share == pytest.approx(reference.explained_variance_ratio_.sum())


def test_image_that_cannot_be_read_is_named(tmp_path_factory: pytest.TempPathFactory, encoder: Encoder) -> None:
    from msn_eval.data import read_split

    folder = tmp_path_factory.mktemp("broken")
    (folder / "val" / "ant").mkdir(parents=True)
    (folder / "val" / "ant" / "0.png").write_bytes(b"no image")

    with pytest.raises(DataError, match=r"0\.png"):
        read_pixels(read_split(str(folder), "val"), ["ant/0.png"], encoder.transform)


def test_larger_share_hides_all_patches_of_a_smaller_one(encoder: Encoder, images: ImageSet, train: Features) -> None:
    pixels = read_pixels(images, images.ids[:6], encoder.transform)

    half, most = find_neighbours(encoder, pixels, train, masked=[0.5, 0.9], count=1, seed=0)

    hidden = (half.shown == 127).all(axis=-1)
    assert hidden.any()
    assert (most.shown == 127).all(axis=-1)[hidden].all()


def test_another_seed_hides_different_patches(encoder: Encoder, images: ImageSet, train: Features) -> None:
    pixels = read_pixels(images, images.ids[:1], encoder.transform)

    (one,), (other,) = (find_neighbours(encoder, pixels, train, masked=[0.5], count=1, seed=seed) for seed in (0, 1))

    assert not np.array_equal(one.shown, other.shown)
