"""Mean and std: what states them, in which order, and transformers' processors as the reference."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from msn_eval.checkpoints.normalisation import (
    Normalisation,
    choose_normalisation,
    read_processor_normalisation,
    set_by_hand,
)
from msn_eval.data.images import IMAGENET_MEAN
from msn_eval.errors import CheckpointError
from msn_eval.models.architectures import name_architecture

HALF = (0.5, 0.5, 0.5)
OWN = Normalisation(mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6), source="the file")
PROCESSOR = {"image_processor_type": "ViTImageProcessor", "image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.1]}


def read(processor: dict[str, object], *, model_type: str = "vit") -> Normalisation | None:
    return read_processor_normalisation(Path("preprocessor_config.json"), processor, model_type=model_type)


# The order.


@pytest.mark.parametrize(
    ("arch", "family", "mean", "source"),
    [
        ("vit_base_patch16_224.augreg_in21k?depth=2", "timm", HALF, "timm's vit_base_patch16_224.augreg_in21k"),
        ("vit_base_patch16_224.mae", "timm", IMAGENET_MEAN, "timm's vit_base_patch16_224.mae"),
        (
            "vit_base_patch16_siglip_gap_224?depth=2",
            "timm",
            HALF,
            "timm's vit_base_patch16_siglip_gap_224, the same for all of its tags",
        ),
        (
            "vit_base_patch16_224",
            "timm",
            IMAGENET_MEAN,
            "ImageNet's, assumed: timm's tags of vit_base_patch16_224 disagree",
        ),
        ("vit_tiny_patch16_224", None, HALF, "timm's vit_tiny_patch16_224, the same for all of its tags"),
        ("vit_tiny_patch16_224", "msn", IMAGENET_MEAN, "ImageNet's, as published for msn"),
        ("vit_tiny_patch16_224.augreg_in21k", "msn", HALF, "timm's vit_tiny_patch16_224.augreg_in21k"),
        ("vit_tiny_patch16_224", "solo-learn", IMAGENET_MEAN, "ImageNet's, assumed"),
    ],
)
def test_unstated_mean_comes_from(arch: str, family: str | None, mean: object, source: str) -> None:
    chosen = choose_normalisation(name_architecture(arch), family=family)
    assert (chosen.mean, chosen.source, chosen.is_assumed) == (mean, source, "assumed" in source)


def test_stated_mean_outranks_timms() -> None:
    arch = name_architecture("vit_base_patch16_224.augreg_in21k")
    assert choose_normalisation(arch, stated=OWN, family="msn") is OWN


def test_only_what_is_given_by_hand_is_replaced() -> None:
    chosen = set_by_hand(OWN, HALF, None)
    assert (chosen.mean, chosen.std, chosen.source) == (HALF, OWN.std, "--mean; the other is the file")


# Image processors of transformers.


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True},
        {"do_rescale": None, "rescale_factor": None, "do_normalize": None},
        {"rescale_factor": 1 / 127.5, "image_mean": [1.0] * 3, "image_std": [1.0] * 3},
        {"do_rescale": False, "image_mean": [123.675, 116.28, 103.53], "image_std": [58.395, 57.12, 57.375]},
        {"do_normalize": False, "image_mean": [9, 9, 9]},
        {"do_normalize": False, "rescale_factor": 1 / 127.5},
        {"do_normalize": False, "do_rescale": False},
        {"image_mean": None, "image_std": None},
        {"image_std": None},
        {"image_processor_type": "BitImageProcessor", "image_mean": None, "image_std": None},
        {"image_processor_type": None, "image_mean": None, "image_std": None},
        {"image_processor_type": None, "feature_extractor_type": "ViTFeatureExtractor"},
    ],
    ids=str,
)
def test_pixels_are_those_of_transformers_processor(tmp_path: Path, change: dict[str, object]) -> None:
    transformers = pytest.importorskip("transformers")
    processor = {name: value for name, value in (PROCESSOR | change).items() if value is not None}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(processor | {"do_resize": False}))
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    pixels = np.random.default_rng(1).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    reference = transformers.AutoImageProcessor.from_pretrained(tmp_path, do_center_crop=False)
    expected = reference(Image.fromarray(pixels), return_tensors="np")["pixel_values"][0].transpose(1, 2, 0)

    own = read(PROCESSOR | change)

    assert own is not None
    computed = (pixels / 255 - np.array(own.mean)) / np.array(own.std)
    np.testing.assert_allclose(computed, expected, rtol=1e-5, atol=1e-4)


def test_usual_rescaling_changes_no_bit_of_mean_and_std() -> None:
    chosen = read(PROCESSOR | {"do_rescale": True, "rescale_factor": 0.00392156862745098})
    assert chosen == Normalisation(mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.1), source="preprocessor_config.json")


def test_folder_without_a_processor_states_nothing() -> None:
    assert read({}) is None


def test_resize_and_crop_are_the_protocols() -> None:
    geometry = {"do_resize": True, "size": {"height": 999}, "resample": 0, "do_center_crop": False, "crop_size": 7}
    assert read(PROCESSOR | geometry) == read(PROCESSOR)


@pytest.mark.parametrize(
    "name", ["do_flip_channel_order", "do_color_quantize", "do_grayscale", "rescale_offset", "offset", "include_top"]
)
def test_step_that_no_mean_and_std_can_express_is_refused(name: str) -> None:
    with pytest.raises(CheckpointError, match=f"{name} is True, which is not supported"):
        read(PROCESSOR | {name: True})


@pytest.mark.parametrize(
    ("change", "what"),
    [
        *(({"rescale_factor": factor}, "rescale_factor is .*, not a positive number") for factor in (
            0, -1, float("nan"), float("inf"), "1/255", True, [1]
        )),
        ({"do_rescale": "false"}, "do_rescale is 'false', not true or false"),
        ({"do_normalize": 1}, "do_normalize is 1, not true or false"),
        *(({"image_mean": mean}, "image_mean is not three finite numbers") for mean in (
            [1, 2], [1, 2, 3, 4], [1, 2, float("nan")], [1, 2, "3"], [1, 2, True], 0.5, [1, 1, 10**400]
        )),
        ({"image_std": [1, 0, 1]}, "image_std .* is not positive"),
        ({"image_std": [1, 1, -1]}, "image_std .* is not positive"),
        ({"image_processor_type": "OwnProcessor", "image_mean": None}, "states no image_mean, and transformers has no"),
        ({"image_processor_type": "os", "image_std": None}, "states no image_std, and transformers has no"),
    ],
    ids=lambda value: str(value)[:40],
)  # fmt: skip
def test_key_that_cannot_be_honoured_is_refused_by_name(change: dict[str, object], what: str) -> None:
    with pytest.raises(CheckpointError, match=rf"preprocessor_config\.json: {what}"):
        read(PROCESSOR | change)
