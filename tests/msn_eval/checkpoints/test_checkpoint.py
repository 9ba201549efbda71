"""Checkpoints: from a file or a scheme to a network with every weight in its place."""

import hashlib
import importlib
import json
import logging
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
import torchvision
from torch import Tensor

from msn_eval.checkpoints.checkpoint import check_checkpoint_names, own_code_sha256, read_checkpoint, weights_sha256
from msn_eval.data.images import IMAGENET_MEAN, IMAGENET_STD
from msn_eval.errors import CheckpointError

Weights = dict[str, Tensor]
WeightMaker = Callable[..., Weights]
MSNWriter = Callable[..., Path]
FactoryWriter = Callable[..., str]
TINY = "vit_tiny_patch16_224?img_size=32&patch_size=8&depth=1"
MODULE = """
from functools import partial
import torch
from torch import nn

class Mean(nn.Module):
    def __init__(self, d: int = 3) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(d))
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.scale * images.mean((2, 3))

"""


def refusal(name: str | Path, **options: object) -> CheckpointError:
    with pytest.raises(CheckpointError) as caught:
        read_checkpoint(str(name), **options)
    return caught.value


def saved(folder: Path, content: object, *, name: str = "vit.pth") -> Path:
    path = folder / name
    torch.save(content, path)
    return path


@pytest.fixture
def factory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FactoryWriter:
    """Give a function that writes a module with `factory` in the working folder, and names it as a checkpoint."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)

    def write(body: str = "factory = Mean", *, module: str = "own_encoder") -> str:
        sys.modules.pop(module, None)
        (tmp_path / f"{module}.py").write_text(MODULE + body)
        return f"py:{module}:factory"

    return write


# The MSN release.


def test_msn_release_is_told_by_its_target_encoder(msn_file: MSNWriter) -> None:
    checkpoint = read_checkpoint(str(msn_file()))
    assert (checkpoint.format, checkpoint.key, checkpoint.epoch) == ("msn", "target_encoder", 600)


def test_msn_release_fills_the_whole_network(msn_file: MSNWriter) -> None:
    assert read_checkpoint(str(msn_file())).matched == 1.0


def test_network_holds_the_files_weights(msn_file: MSNWriter, vit_weights: WeightMaker) -> None:
    state, weights = read_checkpoint(str(msn_file())).network.state_dict(), vit_weights()
    assert all(torch.equal(state[name], weights[name]) for name in weights)


def test_params_count_the_trunk_without_its_head(msn_file: MSNWriter, vit_weights: WeightMaker) -> None:
    assert read_checkpoint(str(msn_file())).params == sum(tensor.numel() for tensor in vit_weights().values())


def test_network_is_in_eval_mode(msn_file: MSNWriter) -> None:
    assert not any(module.training for module in read_checkpoint(str(msn_file())).network.modules())


def test_name_is_the_files_without_its_endings_and_path_is_as_written(msn_file: MSNWriter) -> None:
    path = msn_file(name="vitb16_600ep.pth.tar")
    checkpoint = read_checkpoint(str(path))
    assert (checkpoint.name, checkpoint.path) == ("vitb16_600ep", str(path))


def test_sha256_is_that_of_the_file(msn_file: MSNWriter) -> None:
    path = msn_file()
    assert read_checkpoint(str(path)).sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_native_size_is_that_of_the_positions(msn_file: MSNWriter, vit_weights: WeightMaker) -> None:
    checkpoint = read_checkpoint(str(msn_file(vit_weights(image=56, patch=14))))
    assert (checkpoint.image_pixels, checkpoint.arch) == (56, "vit_width192_depth2_patch14_56")


def test_either_network_of_an_msn_snapshot_can_be_chosen(msn_file: MSNWriter, vit_weights: WeightMaker) -> None:
    online = vit_weights() | {"norm.bias": torch.full((192,), 5.0), "fc.fc1.weight": torch.ones(8, 192)}
    path = msn_file(encoder={f"module.{name}": tensor for name, tensor in online.items()})
    checkpoint = read_checkpoint(str(path), key="encoder")
    assert (checkpoint.key, checkpoint.network.norm.bias.mean().item()) == ("encoder", 5.0)


def test_weights_hash_is_the_same_in_another_container_and_naming(
    tmp_path: Path, msn_file: MSNWriter, vit_weights: WeightMaker
) -> None:
    path = tmp_path / "vit.safetensors"
    safetensors.torch.save_file(vit_weights(), path)
    assert read_checkpoint(str(path)).weights_sha256 == read_checkpoint(str(msn_file())).weights_sha256


def test_sha256_differs_in_another_container(tmp_path: Path, msn_file: MSNWriter, vit_weights: WeightMaker) -> None:
    path = tmp_path / "vit.safetensors"
    safetensors.torch.save_file(vit_weights(), path)
    assert read_checkpoint(str(path)).sha256 != read_checkpoint(str(msn_file())).sha256


# The hash over weights.


def test_weights_hash_does_not_depend_on_order_or_layout() -> None:
    square = torch.arange(6.0).reshape(2, 3)
    assert weights_sha256({"a": square, "b": torch.ones(1)}) == weights_sha256(
        {"b": torch.ones(1), "a": square.T.contiguous().T}
    )


@pytest.mark.parametrize(
    "other",
    [
        {"b": torch.arange(6.0).reshape(2, 3)},
        {"a": torch.arange(6.0).reshape(3, 2)},
        {"a": torch.arange(6).reshape(2, 3)},
        {"a": torch.tensor([[0.0, 1, 2], [3, 4, 5.000001]])},
        {"a": torch.tensor([[-0.0, 1, 2], [3, 4, 5]])},
        {},
    ],
    ids=["name", "shape", "dtype", "one value", "sign of a zero", "absence"],
)
def test_weights_hash_depends_on(other: Weights) -> None:
    assert weights_sha256(other) != weights_sha256({"a": torch.arange(6.0).reshape(2, 3)})


# Other families.


def test_torchvision_residual_network_is_read(tmp_path: Path) -> None:
    theirs = torchvision.models.resnet18()
    checkpoint = read_checkpoint(str(saved(tmp_path, theirs.state_dict())))
    assert (checkpoint.arch, checkpoint.format, checkpoint.matched) == ("resnet18", "torchvision", 1.0)


@pytest.mark.parametrize(
    ("prefix", "stem"), [("", "cifar"), ("backbone.", "cifar_padded")], ids=["plain", "solo-learn"]
)
def test_residual_network_for_small_images_is_read(tmp_path: Path, prefix: str, stem: str) -> None:
    theirs = torchvision.models.resnet18().state_dict() | {"conv1.weight": torch.zeros(64, 3, 3, 3)}
    content = {prefix + name: tensor for name, tensor in theirs.items() if not name.startswith("fc.")}
    beside = {"classifier.weight": torch.zeros(10, 512), "classifier.bias": torch.zeros(10)} if prefix else {}

    checkpoint = read_checkpoint(str(saved(tmp_path, {"state_dict": content | beside})))

    assert (checkpoint.arch, checkpoint.matched, checkpoint.image_pixels) == (f"resnet18?stem={stem}", 1.0, 32)


def test_file_of_old_pytorch_without_batch_counts_is_read(tmp_path: Path) -> None:
    state = torchvision.models.resnet18().state_dict()
    older = {name: tensor for name, tensor in state.items() if not name.endswith("num_batches_tracked")}
    assert read_checkpoint(str(saved(tmp_path, older))).matched == 1.0


@pytest.mark.parametrize(
    ("arch", "mean"),
    [(TINY, IMAGENET_MEAN), (TINY.replace("224?", "224.augreg_in21k?"), (0.5, 0.5, 0.5))],
    ids=["bare", "tagged"],
)
def test_normalisation_is_imagenets_unless_one_of_timms_tags_states_another(
    tmp_path: Path, vit_weights: WeightMaker, arch: str, mean: tuple[float, ...]
) -> None:
    assert read_checkpoint(str(saved(tmp_path, vit_weights(depth=1))), arch=arch).mean == mean


def test_width_that_no_published_network_has_is_read_by_its_arch(tmp_path: Path, vit_weights: WeightMaker) -> None:
    path = saved(tmp_path, vit_weights(width=96))
    arch = "vit_tiny_patch16_224?embed_dim=96&depth=2&patch_size=8&num_heads=4&img_size=32"
    checkpoint = read_checkpoint(str(path), arch=arch)
    assert (checkpoint.arch, checkpoint.network.blocks[0].attn.num_heads) == (arch, 4)


def test_half_precision_weights_are_widened(tmp_path: Path, vit_weights: WeightMaker) -> None:
    path = saved(tmp_path, {name: tensor.half() for name, tensor in vit_weights().items()})
    assert {tensor.dtype for tensor in read_checkpoint(str(path)).network.state_dict().values()} == {torch.float32}


# Weights that do not fit.


def without(*names: str) -> Callable[[Weights], Weights]:
    return lambda weights: {name: tensor for name, tensor in weights.items() if name not in names}


def poisoned(name: str, value: float) -> Callable[[Weights], Weights]:
    def poison(weights: Weights) -> Weights:
        tensor = weights[name].clone()
        tensor.view(-1)[3] = value
        return weights | {name: tensor}

    return poison


MISFITS: dict[str, tuple[Callable[[Weights], Weights], str]] = {
    "missing": (without("blocks.1.mlp.fc2.bias"), "blocks.1.mlp.fc2.bias: missing in the file"),
    "left over": (lambda weights: weights | {"neck.bias": torch.ones(2)}, "neck.bias: no place in the model"),
    "reshaped": (
        lambda weights: weights | {"blocks.1.norm1.bias": torch.ones(191)},
        "blocks.1.norm1.bias: file (191,), model (192,)",
    ),
    "no block that counts": (without(*(f"blocks.0.norm1.{one}" for one in ("weight", "bias"))), "2 of 30 weights"),
    "NaN": (
        poisoned("blocks.1.mlp.fc1.weight", math.nan),
        "NaN or infinite values (blocks.1.mlp.fc1.weight: 1 of 147,456)",
    ),
    "infinite": (poisoned("norm.weight", math.inf), "NaN or infinite values (norm.weight: 1 of 192)"),
    "a relative of the family": (lambda weights: {f"{name}.lora": weights[name] for name in weights}, "--arch"),
    "unknown width": (lambda weights: weights | {"patch_embed.proj.weight": torch.ones(200, 3, 8, 8)}, "--arch"),
}


@pytest.mark.parametrize("kind", MISFITS)
def test_weights_that_do_not_fit_are_refused_by_what_is_wrong(
    tmp_path: Path, vit_weights: WeightMaker, kind: str
) -> None:
    change, text = MISFITS[kind]
    assert text in str(refusal(saved(tmp_path, change(vit_weights()))))


@pytest.mark.parametrize("kind", MISFITS)
def test_misfit_names_the_file_and_a_hint(tmp_path: Path, vit_weights: WeightMaker, kind: str) -> None:
    error = refusal(saved(tmp_path, MISFITS[kind][0](vit_weights())))
    assert (error.exit_code, error.where, len(error.hint) > 10) == (20, str(tmp_path / "vit.pth"), True)


@pytest.mark.parametrize(
    "change",
    [lambda tensor: tensor * torch.tensor(1 + 1j), lambda tensor: (20 * tensor).to(torch.int8)],
    ids=["complex", "integers"],
)
def test_tensor_that_is_not_real_is_refused_by_name(
    tmp_path: Path, vit_weights: WeightMaker, change: Callable[[Tensor], Tensor]
) -> None:
    weights = vit_weights()
    changed = {"blocks.0.mlp.fc1.weight": change(weights["blocks.0.mlp.fc1.weight"])}
    assert "blocks.0.mlp.fc1.weight" in refusal(saved(tmp_path, weights | changed)).what


@pytest.mark.parametrize(
    ("change", "kind"),
    [(lambda tensor: tensor.to("meta"), "meta"), (lambda tensor: tensor.to_sparse(), "sparse")],
    ids=["without values", "sparse"],
)
def test_tensor_that_is_not_dense_is_refused_by_kind(
    tmp_path: Path, vit_weights: WeightMaker, change: Callable[[Tensor], Tensor], kind: str
) -> None:
    weights = vit_weights()
    changed = {"blocks.0.mlp.fc1.weight": change(weights["blocks.0.mlp.fc1.weight"])}
    assert kind in refusal(saved(tmp_path, weights | changed)).what


def test_long_list_of_misfits_is_cut_and_counted(tmp_path: Path, vit_weights: WeightMaker) -> None:
    error = refusal(saved(tmp_path, vit_weights()), arch=TINY.replace("depth=1", "depth=4"))
    assert str(error).count("missing in the file") == 5
    assert "and 19 more" in str(error)


@pytest.mark.parametrize("arch", ["vit_tiny_patch16_224", "resnet18"])
def test_wrong_architecture_is_refused_and_named(tmp_path: Path, vit_weights: WeightMaker, arch: str) -> None:
    assert f"weights do not fit {arch}" in refusal(saved(tmp_path, vit_weights()), arch=arch).what


def test_position_embeddings_of_another_size_are_refused_and_not_interpolated(
    tmp_path: Path, vit_weights: WeightMaker
) -> None:
    error = refusal(saved(tmp_path, vit_weights(image=64)), arch=TINY.replace("depth=1", "depth=2"))
    assert "pos_embed: file (1, 65, 192), model (1, 17, 192)" in str(error)


def test_wrong_key_is_refused_with_the_file_and_its_networks(msn_file: MSNWriter) -> None:
    error = refusal(msn_file(), key="teacher")
    assert "vit.pth.tar: has no network 'teacher'" in str(error)
    assert "target_encoder: 32 tensors" in str(error)


def test_weights_that_may_be_missing_stay_as_drawn_and_are_counted(tmp_path: Path, vit_weights: WeightMaker) -> None:
    weights = vit_weights()
    path = saved(tmp_path, without("blocks.1.mlp.fc2.weight", "blocks.1.mlp.fc2.bias")(weights))
    checkpoint = read_checkpoint(str(path), allow_missing=("blocks.1.mlp.fc2.*",))
    whole = sum(tensor.numel() for tensor in weights.values())
    assert checkpoint.matched == pytest.approx(1 - (768 * 192 + 192) / whole, abs=1e-12)


def test_pattern_allows_no_other_weight_to_be_missing(tmp_path: Path, vit_weights: WeightMaker) -> None:
    path = saved(tmp_path, without("blocks.1.mlp.fc2.bias", "blocks.1.norm1.bias")(vit_weights()))
    error = refusal(path, allow_missing=("blocks.1.mlp.*",))
    assert (error.what.startswith("1 of"), "blocks.1.norm1.bias" in error.what) == (True, True)


def test_pattern_does_not_excuse_a_wrong_shape(tmp_path: Path, vit_weights: WeightMaker) -> None:
    path = saved(tmp_path, vit_weights() | {"norm.bias": torch.ones(3)})
    assert "norm.bias: file (3,), model (192,)" in str(refusal(path, allow_missing=("*",)))


def test_pattern_for_a_weight_that_is_there_leaves_the_match_whole(tmp_path: Path, vit_weights: WeightMaker) -> None:
    assert read_checkpoint(str(saved(tmp_path, vit_weights())), allow_missing=("norm.*",)).matched == 1.0


# msn: and hf:, folders, and hashes beside files.


@pytest.fixture
def released(msn_file: MSNWriter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Give a small file that stands where the released ViT-S/16 is kept, with the network forbidden."""
    monkeypatch.setenv("MSN_EVAL_WEIGHTS", str(tmp_path))
    monkeypatch.setenv("MSN_EVAL_OFFLINE", "1")
    return msn_file(name="vits16_800ep.pth.tar")


def hub_folder(folder: Path, weights: Weights, *, pickled: bool = False, **config: object) -> Path:
    """Write a folder as transformers does: ViTMSN's names, its config.json, its preprocessor_config.json."""
    folder.mkdir()
    names = {
        "embeddings.cls_token": weights["cls_token"],
        "embeddings.position_embeddings": weights["pos_embed"],
        "embeddings.patch_embeddings.projection.weight": weights["patch_embed.proj.weight"],
        "embeddings.patch_embeddings.projection.bias": weights["patch_embed.proj.bias"],
        "layernorm.weight": weights["norm.weight"],
        "layernorm.bias": weights["norm.bias"],
    }
    for block in range(2):
        theirs = f"encoder.layer.{block}"
        for kind in ("weight", "bias"):
            packed = weights[f"blocks.{block}.attn.qkv.{kind}"].chunk(3)
            for name, tensor in zip(("query", "key", "value"), packed, strict=True):
                names[f"{theirs}.attention.attention.{name}.{kind}"] = tensor.clone()
            for their_name, our_name in (
                ("attention.output.dense", "attn.proj"),
                ("layernorm_before", "norm1"),
                ("layernorm_after", "norm2"),
                ("intermediate.dense", "mlp.fc1"),
                ("output.dense", "mlp.fc2"),
            ):
                names[f"{theirs}.{their_name}.{kind}"] = weights[f"blocks.{block}.{our_name}.{kind}"]
    if pickled:
        torch.save(names, folder / "pytorch_model.bin")
    else:
        safetensors.torch.save_file(names, folder / "model.safetensors")
    stated = {"model_type": "vit_msn", "num_attention_heads": 6, "layer_norm_eps": 1e-6} | config
    (folder / "config.json").write_text(json.dumps(stated))
    (folder / "preprocessor_config.json").write_text('{"image_mean": [0.5, 0.4, 0.3], "image_std": [0.1, 0.2, 0.3]}')
    return folder


def test_released_network_is_read_from_the_folder_of_weights(released: Path) -> None:
    checkpoint = read_checkpoint("msn:vits16")
    assert checkpoint.weights_sha256 == read_checkpoint(str(released)).weights_sha256


def test_released_network_is_called_by_its_method_and_name(released: Path) -> None:
    checkpoint = read_checkpoint("msn:vits16")
    assert (checkpoint.name, checkpoint.path, checkpoint.format) == ("msn_vits16", "msn:vits16", "msn")


def test_released_network_has_the_hash_of_its_file(released: Path) -> None:
    assert read_checkpoint("msn:vits16").sha256 == hashlib.sha256(released.read_bytes()).hexdigest()


def test_released_network_that_is_not_there_says_where_to_put_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MSN_EVAL_WEIGHTS", str(tmp_path))
    monkeypatch.setenv("MSN_EVAL_OFFLINE", "1")
    assert str(tmp_path / "vits16_800ep.pth.tar") in refusal("msn:vits16").hint


@pytest.mark.parametrize("check", [lambda name: check_checkpoint_names(("pixels", name)), read_checkpoint])
def test_unknown_released_network_is_refused_with_the_nearest(check: Callable[[str], object]) -> None:
    with pytest.raises(CheckpointError, match=r"msn:vits61: .*Did you mean vits16\?"):
        check("msn:vits61")


def test_released_name_passes_the_check_before_it_is_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MSN_EVAL_WEIGHTS", str(tmp_path))
    monkeypatch.setenv("MSN_EVAL_OFFLINE", "1")
    check_checkpoint_names(("msn:vits16",))


@pytest.mark.parametrize("scheme", ["hf:", ""], ids=["by scheme", "by path"])
@pytest.mark.parametrize("pickled", [False, True], ids=["safetensors", "pickle"])
def test_folder_of_hugging_face_has_the_weights_that_went_into_it(
    tmp_path: Path, vit_weights: WeightMaker, scheme: str, pickled: bool
) -> None:
    folder = hub_folder(tmp_path / "folder", vit_weights(), pickled=pickled)
    reference = read_checkpoint(str(saved(tmp_path, vit_weights()))).weights_sha256
    assert read_checkpoint(f"{scheme}{folder}").weights_sha256 == reference


@pytest.mark.parametrize("scheme", ["hf:", ""], ids=["by scheme", "by path"])
def test_folder_states_mean_and_std(tmp_path: Path, vit_weights: WeightMaker, scheme: str) -> None:
    checkpoint = read_checkpoint(f"{scheme}{hub_folder(tmp_path / 'folder', vit_weights())}")
    assert (checkpoint.mean, checkpoint.std) == ((0.5, 0.4, 0.3), (0.1, 0.2, 0.3))


def test_folder_without_a_processor_is_normalised_as_imagenet(tmp_path: Path, vit_weights: WeightMaker) -> None:
    folder = hub_folder(tmp_path / "folder", vit_weights())
    (folder / "preprocessor_config.json").unlink()
    checkpoint = read_checkpoint(str(folder))
    assert (checkpoint.mean, checkpoint.std) == (IMAGENET_MEAN, IMAGENET_STD)


@pytest.mark.parametrize("file", ["", "model.safetensors"], ids=["the folder", "its file"])
def test_config_beside_the_weights_states_heads_and_epsilon(
    tmp_path: Path, vit_weights: WeightMaker, file: str
) -> None:
    folder = hub_folder(tmp_path / "folder", vit_weights(), num_attention_heads=4, layer_norm_eps=1e-3)
    block = read_checkpoint(str(folder / file)).network.blocks[0]
    assert (block.attn.num_heads, block.norm1.eps) == (4, 1e-3)


@pytest.mark.parametrize("file", ["", "model.safetensors"], ids=["the folder", "its file"])
def test_config_beside_the_weights_may_forbid_them(tmp_path: Path, vit_weights: WeightMaker, file: str) -> None:
    folder = hub_folder(tmp_path / "folder", vit_weights(), hidden_act="relu")
    assert "hidden_act is 'relu'" in refusal(folder / file).what


def test_config_beside_a_file_of_another_name_is_not_its_own(tmp_path: Path, vit_weights: WeightMaker) -> None:
    folder = hub_folder(tmp_path / "folder", vit_weights(), num_attention_heads=4)
    (folder / "model.safetensors").rename(folder / "epoch_3.safetensors")
    assert read_checkpoint(str(folder / "epoch_3.safetensors")).network.blocks[0].attn.num_heads == 3


def test_folder_is_called_by_its_own_name(tmp_path: Path, vit_weights: WeightMaker) -> None:
    folder = hub_folder(tmp_path / "folder", vit_weights())
    assert (read_checkpoint(str(folder)).name, read_checkpoint(f"hf:{folder}").name) == ("folder", "folder")


def test_untrained_network_of_a_folder_is_normalised_as_the_folder_says(
    tmp_path: Path, vit_weights: WeightMaker
) -> None:
    folder = hub_folder(tmp_path / "folder", vit_weights())
    assert read_checkpoint(f"random:{folder}").mean == (0.5, 0.4, 0.3)


def test_hash_beside_a_file_that_differs_is_refused_with_both(msn_file: MSNWriter) -> None:
    path = msn_file()
    path.with_name(f"{path.name}.sha256").write_text(f"{'0' * 64}  {path.name}\n")
    text = str(refusal(path))
    assert ("0" * 64 in text, hashlib.sha256(path.read_bytes()).hexdigest() in text) == (True, True)


def test_hash_beside_a_file_that_matches_passes(msn_file: MSNWriter) -> None:
    path = msn_file()
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    path.with_name(f"{path.name}.sha256").write_text(f"{digest.upper()}  {path.name}\n")
    assert read_checkpoint(str(path)).sha256 == digest


@pytest.fixture
def warned(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[str]]:
    """Give a function that tells the warnings so far, whoever else has set up logging."""
    monkeypatch.setattr(logging.getLogger("msn_eval"), "propagate", True)
    caplog.set_level(logging.WARNING, logger="msn_eval")
    return lambda: [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]


def test_alarms_are_warnings_that_name_the_file(
    tmp_path: Path, vit_weights: WeightMaker, warned: Callable[[], list[str]]
) -> None:
    weights = vit_weights()
    zero = {"blocks.0.mlp.fc1.weight": torch.zeros_like(weights["blocks.0.mlp.fc1.weight"])}
    path = saved(tmp_path, weights | zero | {"head.weight": torch.ones(10, 192)})
    read_checkpoint(str(path))
    assert warned() == [
        f"{path}: nothing but zeros in blocks.0.mlp.fc1.weight",
        f"{path}: a classifier of 10 classes is on top: the weights were trained or fine-tuned with labels",
    ]


def test_weights_without_a_doubt_raise_no_warning(msn_file: MSNWriter, warned: Callable[[], list[str]]) -> None:
    read_checkpoint(str(msn_file()))
    assert warned() == []


def test_weights_that_stay_untrained_are_warned_of(
    tmp_path: Path, vit_weights: WeightMaker, warned: Callable[[], list[str]]
) -> None:
    path = saved(tmp_path, without("norm.bias")(vit_weights()))
    read_checkpoint(str(path), allow_missing=("norm.*",))
    assert warned() == [f"{path}: absent, so left untrained: norm.bias"]


# random: and pixels


def test_random_architecture_takes_keywords() -> None:
    checkpoint = read_checkpoint(f"random:{TINY}")
    assert (checkpoint.arch, checkpoint.image_pixels, checkpoint.sha256) == (TINY, 32, None)


def test_random_weights_follow_the_seed() -> None:
    first, again, other = (read_checkpoint(f"random:{TINY}", seed=seed).weights_sha256 for seed in (1, 1, 2))
    assert (first == again, first == other) == (True, False)


def test_random_checkpoint_has_the_files_architecture_and_none_of_its_weights(msn_file: MSNWriter) -> None:
    path = str(msn_file())
    trained, untrained = read_checkpoint(path), read_checkpoint(f"random:{path}")
    assert untrained.arch == trained.arch
    assert not torch.equal(untrained.network.cls_token, trained.network.cls_token)


def test_random_checkpoint_of_several_networks_takes_a_key(tmp_path: Path, vit_weights: WeightMaker) -> None:
    path = saved(tmp_path, {"student": vit_weights(), "teacher": vit_weights(depth=1)})
    assert read_checkpoint(f"random:{path}", key="teacher").arch == "vit_width192_depth1_patch8_32"


def test_pixels_are_a_checkpoint_without_weights() -> None:
    checkpoint = read_checkpoint("pixels")
    assert (checkpoint.image_pixels, checkpoint.params, checkpoint.sha256) == (32, 0, None)


# py:


def test_own_module_is_the_factorys(factory: FactoryWriter) -> None:
    checkpoint = read_checkpoint(factory())
    assert (checkpoint.format, checkpoint.name, checkpoint.params) == ("py", "own_encoder:factory", 3)


def test_own_module_without_attributes_gets_imagenets(factory: FactoryWriter) -> None:
    checkpoint = read_checkpoint(factory())
    assert (checkpoint.image_pixels, checkpoint.mean, checkpoint.std) == (224, IMAGENET_MEAN, IMAGENET_STD)


def test_own_modules_attributes_replace_imagenets(factory: FactoryWriter) -> None:
    name = factory(
        "def factory():\n"
        "    network = Mean()\n"
        "    network.image_pixels, network.mean, network.std = 96, (0.5, 0.4, 0.3), [0.1, 0.2, 0.3]\n"
        "    return network\n"
    )
    checkpoint = read_checkpoint(name)
    assert (checkpoint.image_pixels, checkpoint.mean, checkpoint.std) == (96, (0.5, 0.4, 0.3), (0.1, 0.2, 0.3))


def test_own_module_is_put_into_eval_mode_and_float32(factory: FactoryWriter) -> None:
    network = read_checkpoint(factory("def factory(): return Mean().double().train()")).network
    assert (network.training, network.scale.dtype) == (False, torch.float32)


def test_weights_hash_of_an_own_module_follows_the_factorys_source(factory: FactoryWriter) -> None:
    before = read_checkpoint(factory()).weights_sha256
    same = read_checkpoint(factory()).weights_sha256
    after = read_checkpoint(factory("factory = Mean  # another line")).weights_sha256
    assert (before == same, before == after) == (True, False)


def test_weights_hash_of_an_own_module_follows_its_weights(factory: FactoryWriter) -> None:
    name = factory("import os\ndef factory(): return Mean(int(os.environ['OWN_WIDTH']))")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OWN_WIDTH", "1")
        before = read_checkpoint(name).weights_sha256
        patch.setenv("OWN_WIDTH", "3")
        assert read_checkpoint(name).weights_sha256 != before


def test_factory_may_be_any_callable(factory: FactoryWriter) -> None:
    assert read_checkpoint(factory("factory = partial(Mean, 3)")).params == 3


@pytest.mark.parametrize(
    ("body", "text"),
    [
        ("def factory(): raise KeyError('width')", "the factory failed: KeyError: 'width'"),
        ("def factory(): return [1]", "the factory gave a list, not an nn.Module"),
        ("factory = 3", "the factory failed: TypeError"),
        ("", "the factory failed: AttributeError"),
        ("def factory(:", "the factory failed: SyntaxError"),
        ("import no_such_package\nfactory = Mean", "the factory failed: ModuleNotFoundError"),
        ("def factory():\n    network = Mean()\n    network.mean = (0.5, 0.5)\n    return network", "mean"),
        ("def factory():\n    network = Mean()\n    network.std = ('a', 'b', 'c')\n    return network", "std"),
        ("def factory():\n    network = Mean()\n    network.image_pixels = 'big'\n    return network", "image_pixels"),
    ],
    ids=["raises", "no module", "no callable", "absent", "syntax", "import", "mean", "std", "image_pixels"],
)
def test_factory_that_gives_no_encoder_is_refused(factory: FactoryWriter, body: str, text: str) -> None:
    error = refusal(factory(body))
    assert (text in error.what, error.where, bool(error.hint)) == (True, "py:own_encoder:factory", True)


@pytest.mark.parametrize("name", ["py:own_encoder", "py:"])
def test_factory_without_a_function_is_refused(name: str) -> None:
    assert "py:package.module:factory" in refusal(name).what


# timm:


def test_timm_name_that_does_not_exist_is_refused_with_the_nearest() -> None:
    assert "Did you mean vit_tiny_patch16_224?" in str(refusal("timm:vit_tiny_patch16_242"))


def test_timm_weights_without_cache_and_network_are_refused_at_once(tmp_path: Path) -> None:
    script = (
        "import sys, time\n"
        "import timm\n"
        "from msn_eval.checkpoints.checkpoint import read_checkpoint\n"
        "from msn_eval.errors import CheckpointError\n"
        "started = time.perf_counter()\n"
        "try:\n"
        "    read_checkpoint('timm:vit_tiny_patch16_224')\n"
        "except CheckpointError as error:\n"
        "    print(error)\n"
        "    sys.exit(error.exit_code if time.perf_counter() - started < 10 else 99)\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "TORCH_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (ended.returncode, "HF_HUB_CACHE" in ended.stdout) == (20, True), ended.stdout + ended.stderr


@pytest.fixture
def timm_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Give the snapshot folder of timm's smallest network in a hub cache that is offline, its weights drawn at random."""
    repository = tmp_path / "hub" / "models--timm--test_vit.r160_in1k"
    snapshot = repository / "snapshots" / ("ab" * 20)
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("ab" * 20)
    network = timm.create_model("test_vit.r160_in1k")
    safetensors.torch.save_file(network.state_dict(), snapshot / "model.safetensors")
    config = {"architecture": "test_vit", "pretrained_cfg": {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}}
    (snapshot / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return snapshot


def test_timm_weights_come_from_the_hubs_cache_with_their_hash(timm_cache: Path) -> None:
    checkpoint = read_checkpoint("timm:test_vit.r160_in1k")
    digest = hashlib.sha256((timm_cache / "model.safetensors").read_bytes()).hexdigest()
    assert (checkpoint.sha256, checkpoint.format, checkpoint.name) == (digest, "timm", "test_vit.r160_in1k")
    assert (checkpoint.image_pixels, checkpoint.mean, checkpoint.matched) == (160, (0.1, 0.2, 0.3), 1.0)


def test_timm_weights_are_those_of_the_cache(timm_cache: Path) -> None:
    stored = safetensors.torch.load_file(timm_cache / "model.safetensors")
    state = read_checkpoint("timm:test_vit.r160_in1k").network.state_dict()
    assert all(torch.equal(tensor, stored[name]) for name, tensor in state.items())


def test_timm_weights_at_another_size_than_theirs_are_refused_and_not_interpolated(timm_cache: Path) -> None:
    assert "pos_embed: file" in str(refusal("timm:test_vit.r160_in1k?img_size=96"))


# Names, before any work.


@pytest.mark.parametrize("name", ["pixels", "timm:resnet18", "random:resnet18", "py:own:factory"])
def test_schemes_pass_the_check_of_names(name: str) -> None:
    check_checkpoint_names((name,))


@pytest.mark.parametrize(
    "name", ["nowhere.pth", "tim:resnet18", "random:nowhere.pth", "timm:resnet1", "timm:", "random:"]
)
def test_name_that_leads_nowhere_is_refused_before_any_work(name: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        check_checkpoint_names(("pixels", name))
    assert caught.value.hint


def test_missing_file_is_refused_with_the_schemes() -> None:
    with pytest.raises(CheckpointError, match=r"nowhere\.pth: no such checkpoint file or scheme") as caught:
        check_checkpoint_names(("nowhere.pth",))
    assert all(scheme in caught.value.hint for scheme in ("timm:NAME", "random:ARCH", "py:", "pixels"))


@pytest.mark.parametrize(("name", "text"), [("", "no such checkpoint"), (".", "holds none of model.safetensors")])
def test_empty_folder_or_empty_name_is_refused(
    name: str, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert text in refusal(name).what


def test_checking_names_reads_no_file(msn_file: MSNWriter) -> None:
    path = msn_file()
    path.write_bytes(b"")
    started = time.perf_counter()
    check_checkpoint_names((str(path),))
    assert time.perf_counter() - started < 1


@pytest.fixture
def own_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Give the file of a loaded module of the user's."""
    monkeypatch.syspath_prepend(tmp_path)
    file = tmp_path / "helper_of_mine.py"
    file.write_text("scale = 1\n")
    importlib.import_module("helper_of_mine")
    yield file
    del sys.modules["helper_of_mine"]


def test_same_code_has_the_same_hash(own_module: Path) -> None:
    assert own_code_sha256() == own_code_sha256()


def test_changed_module_changes_the_hash(own_module: Path) -> None:
    before = own_code_sha256()
    own_module.write_text("scale = 2\n")
    assert own_code_sha256() != before


def test_module_that_is_loaded_changes_the_hash(own_module: Path) -> None:
    before = own_code_sha256()
    del sys.modules["helper_of_mine"]
    after = own_code_sha256()
    importlib.import_module("helper_of_mine")
    assert after != before


def test_installed_and_own_packages_do_not_count(own_module: Path) -> None:
    before = own_code_sha256()
    importlib.import_module("wave")
    importlib.import_module("omegaconf.resolvers")
    importlib.import_module("msn_eval.commands.ls")
    assert own_code_sha256() == before


@pytest.fixture
def second_module(own_module: Path) -> Iterator[Path]:
    """Give the file of another loaded module of the user's."""
    file = own_module.with_name("another_of_mine.py")
    file.write_text("scale = 3\n")
    importlib.import_module("another_of_mine")
    yield file
    sys.modules.pop("another_of_mine", None)


def test_sources_that_change_places_change_the_hash(own_module: Path, second_module: Path) -> None:
    before = own_code_sha256()
    first, second = own_module.read_text(), second_module.read_text()
    own_module.write_text(second)
    second_module.write_text(first)
    assert own_code_sha256() != before


def test_order_of_imports_does_not_count(own_module: Path, second_module: Path) -> None:
    before = own_code_sha256()
    sys.modules["helper_of_mine"] = sys.modules.pop("helper_of_mine")
    assert own_code_sha256() == before


def test_module_whose_file_is_gone_does_not_count(own_module: Path, second_module: Path) -> None:
    second_module.unlink()
    without_file = own_code_sha256()
    del sys.modules["another_of_mine"]
    assert own_code_sha256() == without_file
