"""What a config.json says about the weights beside it."""

import json
from pathlib import Path

import pytest

from msn_eval.checkpoints import hf_config
from msn_eval.checkpoints.hf_config import HubConfig, read_config_beside
from msn_eval.errors import CheckpointError

MSN = {"model_type": "vit_msn"}
TIMM = {"architecture": "vit_tiny_patch16_224"}


def write_and_read(folder: Path, config: object, processor: object = None) -> HubConfig:
    (folder / "config.json").write_text(json.dumps(config))
    if processor is not None:
        (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return read_config_beside(folder)


def refusal(folder: Path, config: object) -> CheckpointError:
    with pytest.raises(CheckpointError) as caught:
        write_and_read(folder, config)
    assert caught.value.where == str(folder / "config.json")
    assert caught.value.hint
    return caught.value


# transformers.


@pytest.mark.parametrize("model_type", hf_config._NORM_EPS)
def test_epsilon_that_is_not_stated_is_transformers_default(tmp_path: Path, model_type: str) -> None:
    transformers = pytest.importorskip("transformers")
    default = transformers.CONFIG_MAPPING[model_type]().layer_norm_eps
    assert write_and_read(tmp_path, {"model_type": model_type}).norm_eps == default


def test_stated_heads_and_epsilon_are_read(tmp_path: Path) -> None:
    config = write_and_read(tmp_path, MSN | {"num_attention_heads": 12, "layer_norm_eps": 1e-5})
    assert config == HubConfig(heads=12, norm_eps=1e-5, model_type="vit_msn")


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("num_attention_heads", [0, -3, 1 << 16, 3.0, True, "3", [3]]),
        ("layer_norm_eps", [0, 1, -1e-6, float("nan"), float("inf"), "1e-6", [1e-6]]),
    ],
)
def test_impossible_heads_or_epsilon_are_refused(tmp_path: Path, name: str, values: list[object]) -> None:
    for value in values:
        assert refusal(tmp_path, MSN | {name: value}).what == f"{name} is {value!r}"


@pytest.mark.parametrize("model_type", [None, 3, ["vit"]])
def test_model_type_that_is_no_name_is_refused(tmp_path: Path, model_type: object) -> None:
    error = refusal(tmp_path, {"model_type": model_type})

    assert error.what == f"model_type is {model_type!r}, not the name of a network of transformers"


@pytest.mark.parametrize(
    ("name", "value", "what"),
    [
        ("hidden_act", "relu", "hidden_act is 'relu'; only 'gelu' is supported"),
        ("hidden_act", None, "hidden_act is None; only 'gelu' is supported"),
        ("num_channels", 1, "The network takes images of 1 channels; images here have 3"),
    ],
)
def test_unsupported_property_is_refused(tmp_path: Path, name: str, value: object, what: str) -> None:
    error = refusal(tmp_path, MSN | {name: value})
    assert (error.what, "py:" in error.hint) == (what, True)


# timm.


def test_timms_config_names_the_architecture(tmp_path: Path) -> None:
    config = write_and_read(tmp_path, TIMM | {"model_args": {"img_size": 32, "num_classes": 5, "global_pool": "avg"}})
    assert config.architecture is not None
    assert config.architecture.timm_name == "vit_tiny_patch16_224"
    assert config.architecture.keywords == {"img_size": 32, "global_pool": "avg"}


@pytest.mark.parametrize("is_older", [False, True], ids=["timm", "timm before 0.9"])
@pytest.mark.parametrize("is_stated", [False, True])
def test_timms_statistics_are_read(tmp_path: Path, is_older: bool, is_stated: bool) -> None:
    stated = {"mean": [0.5, 0.4, 0.3], "std": [1, 2, 3]} if is_stated else {}
    config = write_and_read(tmp_path, TIMM | (stated if is_older else {"pretrained_cfg": stated}))
    own = config.normalisation
    assert (own and (own.mean, own.std, own.source)) == (
        ((0.5, 0.4, 0.3), (1.0, 2.0, 3.0), "config.json") if is_stated else None
    )
    assert (config.heads, config.norm_eps) == (None, None)


@pytest.mark.parametrize(
    ("stated", "what"),
    [
        ({"mean": [0.5, 0.5, 0.5]}, "std is not three finite numbers: None"),
        ({"std": [0.5, 0.5, 0.5]}, "mean is not three finite numbers: None"),
        ({"mean": 0.5, "std": [1, 1, 1]}, "mean is not three finite numbers: 0.5"),
        ({"mean": [0.5, 0.5, 0.5], "std": [1, 0, 1]}, "is not positive"),
    ],
)
def test_invalid_timm_statistics_are_refused(tmp_path: Path, stated: object, what: str) -> None:
    assert what in refusal(tmp_path, TIMM | {"pretrained_cfg": stated}).what


@pytest.mark.parametrize(
    "keywords",
    [
        {"checkpoint_path": "/somewhere/else.pth"},
        {"pretrained": True},
        {"pretrained_cfg": {"file": "/somewhere/else.pth"}},
        {"pretrained_cfg_overlay": {"file": "/somewhere/else.pth"}},
        {"cache_dir": "/somewhere"},
        {"scriptable": True},
        {"embed_layer": {"name": "hybrid"}},
        {"depth": 1_000_000},
        {"depths": [2, 1_000_000]},
        {"img_size": [32, 1_000_000]},
    ],
    ids=lambda keywords: next(iter(keywords)),
)
def test_keyword_that_would_open_other_files_or_cost_hours_is_refused(
    tmp_path: Path, keywords: dict[str, object]
) -> None:
    assert next(iter(keywords)) in refusal(tmp_path, TIMM | {"model_args": keywords}).what


@pytest.mark.parametrize(
    "name", ["vit_tiny_patch16_224?checkpoint_path=other.pth", ["vit_tiny_patch16_224"], 3, None, ""]
)
def test_architecture_that_is_not_a_plain_name_is_refused(tmp_path: Path, name: object) -> None:
    assert "architecture" in refusal(tmp_path, {"architecture": name}).what


# Folders.


def test_folder_with_its_own_code_is_refused(tmp_path: Path) -> None:
    assert "auto_map" in refusal(tmp_path, MSN | {"auto_map": {"AutoModel": "own.Model"}}).what


def test_folder_with_an_adapter_is_refused_with_how_to_merge_it(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    error = refusal(tmp_path, TIMM)
    assert ("adapter_config.json" in error.what, "merge" in error.hint.lower()) == (True, True)


@pytest.mark.parametrize("name", ["image_size", "patch_size"])
def test_images_and_patches_that_are_not_square_are_refused(tmp_path: Path, name: str) -> None:
    assert "square" in refusal(tmp_path, {"model_type": "vit_msn", name: [224, 112]}).what


@pytest.mark.parametrize(
    ("size", "text"),
    [
        ([3, 32, 64], "input_size is [32, 64]: only square images and patches are supported"),
        ([1, 32, 32], "The network takes images of 1 channels; images here have 3"),
    ],
)
def test_images_of_timm_that_are_no_squares_or_not_rgb_are_refused(tmp_path: Path, size: list[int], text: str) -> None:
    error = refusal(tmp_path, TIMM | {"pretrained_cfg": {"input_size": size}})
    assert (error.what, "py:package.module:factory" in error.hint) == (text, True)
