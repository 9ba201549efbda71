"""Networks that transformers runs: what is refused, and why. tests/test_layouts.py compares what is read."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch
import transformers
from torch import Tensor

from msn_eval import load_encoder
from msn_eval.checkpoints.inspection import inspect_checkpoint
from msn_eval.config.recipes import FinetuneRecipe
from msn_eval.errors import CheckpointError, UsageError
from msn_eval.probes.finetune.model import build_finetune_model

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64, "image_size": 32}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a folder with the image tower of CLIP."""
    transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**SIZES, patch_size=8)).save_pretrained(tmp_path)
    return tmp_path


def refusal(folder: Path) -> CheckpointError:
    with pytest.raises(CheckpointError) as caught:
        load_encoder(str(folder), device="cpu")
    return caught.value


def change_weights(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    weights = safetensors.torch.load_file(folder / "model.safetensors")
    change(weights)
    safetensors.torch.save_file(weights, folder / "model.safetensors")


NORM = "post_layernorm.bias"


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (
            lambda weights: weights.pop(next(name for name in weights if name.endswith(NORM))),
            f"{NORM}: missing in the file",
        ),
        (lambda weights: weights.update({"adapter.weight": torch.ones(3)}), "adapter.weight: no place in the model"),
        (
            lambda weights: weights.update({name: torch.ones(7) for name in weights if name.endswith(NORM)}),
            "transformers cannot build the network",
        ),
    ],
    ids=["missing", "extra", "reshaped"],
)
def test_weights_that_do_not_fit_in_full_are_refused(
    folder: Path, change: Callable[[dict[str, Tensor]], object], text: str
) -> None:
    change_weights(folder, change)

    assert text in refusal(folder).what


@pytest.mark.parametrize(
    ("stated", "text"),
    [
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, "quantization_config in its config.json"),
        ({"architectures": ["ViTModel"]}, "ViTModel is not a model of the type clip_vision_model"),
        ({"architectures": ["OwnModel"]}, "has no model 'OwnModel'"),
        ({"num_channels": 1}, "takes images of 1 channels"),
        ({"hidden_size": 64}, "transformers cannot build the network"),
        ({"model_type": "no-such-type"}, "'no-such-type'"),
    ],
)
def test_config_that_describes_another_network_is_refused(folder: Path, stated: dict[str, object], text: str) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | stated))

    assert text in refusal(folder).what


def test_tokens_behind_the_patches_are_refused(tmp_path: Path) -> None:
    config = transformers.YolosConfig(**SIZES | {"image_size": [32, 32]}, patch_size=8, num_detection_tokens=3)
    transformers.YolosModel(config).save_pretrained(tmp_path)

    assert "tokens behind those of the patches" in refusal(tmp_path).what


def test_features_that_differ_between_two_passes_are_refused(tmp_path: Path) -> None:
    torch.manual_seed(0)  # of the masks
    sizes = {"embed_dim": 16, "image_size": [128, 128], "depths": [1] * 4, "num_heads": [1] * 4, "num_layers": 4}
    decoder = {"decoder_hidden_size": 16, "decoder_depth": 1, "decoder_num_heads": 1}
    config = transformers.HieraConfig(**sizes, **decoder)
    transformers.HieraForPreTraining(config).save_pretrained(tmp_path)

    assert "two passes over the same images give different features" in refusal(tmp_path).what


def write_processor(folder: Path, **stated: object) -> None:
    own = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    (folder / "preprocessor_config.json").write_text(json.dumps(own | stated))


@pytest.mark.parametrize(
    ("stated", "pixels"),
    [
        ({"size": {"shortest_edge": 64}}, 64),
        ({"size": 96}, 96),
        ({"size": {"height": 64, "width": 96}}, 32),
        ({"size": 96, "do_center_crop": True, "crop_size": {"height": 64, "width": 64}}, 64),
        ({}, 32),
    ],
)
def test_native_size_of_a_network_without_positions_is_that_of_its_processor(
    tmp_path: Path, stated: dict[str, object], pixels: int
) -> None:
    sizes = {"hidden_sizes": [8, 8, 8, 8], "depths": [1, 1, 1, 1], "image_size": 32}
    transformers.ConvNextModel(transformers.ConvNextConfig(**sizes)).save_pretrained(tmp_path)
    write_processor(tmp_path, **stated)

    assert load_encoder(str(tmp_path), device="cpu").transform.crop == pixels


def test_native_size_of_a_network_with_positions_is_that_of_its_positions(folder: Path) -> None:
    write_processor(folder, size=64, do_center_crop=False)

    assert load_encoder(str(folder), device="cpu").transform.crop == 32


def test_size_that_patches_do_not_fill_is_refused(tmp_path: Path) -> None:
    config = transformers.DINOv3ViTConfig(**SIZES, patch_size=8)  # which takes any size
    transformers.DINOv3ViTModel(config).save_pretrained(tmp_path)

    with pytest.raises(UsageError, match="not a multiple of the patch size 8"):
        load_encoder(str(tmp_path), device="cpu", image_pixels=36)


def test_finetuning_is_refused(folder: Path) -> None:
    encoder = load_encoder(str(folder), device="cpu")

    with pytest.raises(UsageError, match="transformers runs"):
        build_finetune_model(encoder, FinetuneRecipe(), tap="cls-norm", n_classes=2)


def test_size_that_its_positions_are_not_for_is_refused(folder: Path) -> None:
    with pytest.raises(UsageError, match="takes no such images"):
        load_encoder(str(folder), device="cpu", image_pixels=64)


def test_network_that_transformers_runs_is_marked_as_used(folder: Path) -> None:
    assert [network.used for network in inspect_checkpoint(folder).networks] == [True]
