"""What a file or folder holds, and whether the network chosen from it fits its architecture."""

import hashlib
import json
import logging
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch
import torchvision
from timm.models.beit import Beit
from torch import Tensor, nn
from transformers import BeitConfig, BeitModel

from msn_eval.checkpoints.convert import convert_checkpoint
from msn_eval.checkpoints.hf_config import HubConfig
from msn_eval.checkpoints.sanity_checks import describe_values
from msn_eval.checkpoints.stored import (
    StoredCheckpoint,
    check_stored,
    choose_stored,
    fit_weights,
    list_alarms,
    load_weights,
    read_contents,
)
from msn_eval.errors import CheckpointError

Weights = dict[str, Tensor]
WeightMaker = Callable[..., Weights]
HEADS = {"model_type": "vit_msn", "num_attention_heads": 6, "layer_norm_eps": 1e-5}


def saved(folder: Path, content: object, name: str = "vit.pth") -> Path:
    path = folder / name
    torch.save(content, path)
    return path


def described(folder: Path, weights: Weights, config: dict[str, object], name: str = "model.safetensors") -> Path:
    safetensors.torch.save_file(weights, folder / name)
    (folder / "config.json").write_text(json.dumps(config))
    return folder / name


def stored(path: Path, **options: str | None) -> StoredCheckpoint:
    return choose_stored(read_contents(path), **options)


# Contents.


def test_contents_of_a_file_are_its_networks_hash_and_size(tmp_path: Path, vit_weights: WeightMaker) -> None:
    path = saved(tmp_path, {"target_encoder": vit_weights(depth=1), "prototypes": torch.ones(2), "epoch": 7})
    contents = read_contents(path)
    assert [network.key for network in contents.networks] == ["target_encoder"]
    assert (contents.where, contents.container, contents.epoch, contents.config) == (str(path), "zip", 7, HubConfig())
    assert (contents.sha256, contents.file_bytes) == (
        hashlib.sha256(path.read_bytes()).hexdigest(),
        path.stat().st_size,
    )


@pytest.mark.parametrize(("name", "has_config"), [("model.safetensors", True), ("other.safetensors", False)])
def test_config_belongs_to_the_file_that_has_a_hubs_name(
    tmp_path: Path, vit_weights: WeightMaker, name: str, has_config: bool
) -> None:
    contents = read_contents(described(tmp_path, vit_weights(depth=1), HEADS, name))
    assert (contents.config != HubConfig()) == has_config


def sharded(folder: Path, *shards: Weights) -> list[Path]:
    paths = [folder / f"model-{number}.safetensors" for number in range(len(shards))]
    for path, weights in zip(paths, shards, strict=True):
        safetensors.torch.save_file(weights, path)
    named = {name: path.name for path, weights in zip(paths, shards, strict=True) for name in weights}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": named}))
    (folder / "config.json").write_text(json.dumps(HEADS))
    return paths


def test_shards_are_one_network_with_one_hash(tmp_path: Path, vit_weights: WeightMaker) -> None:
    weights = vit_weights(depth=1)
    head = {name: weights.pop(name) for name in ("cls_token", "norm.weight")}
    paths = sharded(tmp_path, weights, head)
    contents = read_contents(tmp_path)
    lines = "".join(f"{path.name}\t{hashlib.sha256(path.read_bytes()).hexdigest()}\n" for path in paths)
    assert contents.sha256 == hashlib.sha256(lines.encode()).hexdigest()
    assert contents.file_bytes == sum(path.stat().st_size for path in paths)
    assert contents.networks[0].tensors.keys() == (weights | head).keys()


def test_weight_in_two_shards_is_refused(tmp_path: Path) -> None:
    paths = sharded(tmp_path, {"a.b": torch.ones(2)}, {"c.d": torch.ones(2)})
    safetensors.torch.save_file({"a.b": torch.zeros(2), "c.d": torch.ones(2)}, paths[1])
    with pytest.raises(CheckpointError, match=r"holds a\.b, which another file of the folder holds too") as refusal:
        read_contents(tmp_path)
    assert refusal.value.where == str(paths[1])


# The choice of a network and its architecture.


def test_architecture_named_by_the_user_goes_before_all(tmp_path: Path, vit_weights: WeightMaker) -> None:
    path = described(tmp_path, vit_weights(), HEADS)
    assert stored(path, arch="resnet18").architecture.name == "resnet18"


def test_architecture_that_stays_open_is_refused_with_the_file(tmp_path: Path, vit_weights: WeightMaker) -> None:
    path = saved(tmp_path, vit_weights(width=96))
    with pytest.raises(CheckpointError, match="width 96") as refusal:
        stored(path)
    assert (refusal.value.where, "--arch" in refusal.value.hint) == (str(path), True)


def test_head_that_the_architecture_has_itself_is_given_back(tmp_path: Path) -> None:
    import timm

    weights = timm.create_model("convnext_atto", num_classes=3).state_dict()
    checkpoint = stored(saved(tmp_path, weights), arch="convnext_atto")
    assert checkpoint.backbone.dropped == ("head.fc.weight", "head.fc.bias")
    check_stored(checkpoint)


# Whether the weights fit.


def misfit(checkpoint: StoredCheckpoint) -> CheckpointError:
    with pytest.raises(CheckpointError) as caught:
        check_stored(checkpoint)
    return caught.value


def test_misfit_names_weight_network_and_file(tmp_path: Path, vit_weights: WeightMaker) -> None:
    weights = vit_weights() | {"norm.bias": torch.ones(3)}
    path = saved(tmp_path, {"teacher": weights, "epoch": 1})
    error = misfit(stored(path))
    assert (error.where, error.what) == (
        str(path),
        "1 of 30 weights does not fit vit_width192_depth2_patch8_32 (network 'teacher' of the file)\n"
        "  norm.bias: file (3,), model (192,)",
    )


def test_misfit_says_what_the_weights_look_like(tmp_path: Path) -> None:
    path = saved(tmp_path, torchvision.models.resnet18().state_dict())
    assert misfit(stored(path, arch="resnet34")).hint.startswith("The weights look like resnet18. ")


@pytest.mark.parametrize("arch", [None, "vit_tiny_patch16_224"])
def test_misfit_says_nothing_where_they_look_like_nothing_else(
    tmp_path: Path, vit_weights: WeightMaker, arch: str | None
) -> None:
    weights = vit_weights(width=96) if arch else vit_weights() | {"neck": torch.ones(1)}
    assert "look like" not in misfit(stored(saved(tmp_path, weights), arch=arch)).hint


def test_weights_that_may_be_absent_are_reported(
    tmp_path: Path, vit_weights: WeightMaker, caplog: pytest.LogCaptureFixture
) -> None:
    weights = vit_weights()
    del weights["norm.bias"]
    path = saved(tmp_path, weights)
    with caplog.at_level(logging.WARNING):
        check_stored(stored(path), allow_missing=("norm.*",))
    assert caplog.messages == [f"{path}: absent, so left untrained: norm.bias"]


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("patch_embed.proj.weight", torch.ones(192, 3, 0, 0)),
        ("patch_embed.proj.weight", torch.tensor(1.0)),
        ("pos_embed", torch.ones(1, 17, 0)),
        ("register_tokens", torch.ones(1, 4, 192, dtype=torch.complex64)),
        ("blocks.0.mlp.fc1.weight", torch.ones(0, 192)),
    ],
)
def test_weights_of_odd_shapes_are_refused_by_an_error_of_ours(
    tmp_path: Path, vit_weights: WeightMaker, name: str, tensor: Tensor
) -> None:
    contents = read_contents(saved(tmp_path, vit_weights() | {name: tensor}))
    with pytest.raises(CheckpointError) as refusal:
        check_stored(choose_stored(contents))
    assert refusal.value.hint


def unilm_beit() -> Weights:
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 192, "depth": 1, "num_heads": 3, "num_classes": 0}
    return dict(Beit(**sizes, init_values=0.1, use_abs_pos_emb=False, use_rel_pos_bias=True).state_dict())


def transformers_beit() -> Weights:
    sizes = {"hidden_size": 192, "num_hidden_layers": 1, "num_attention_heads": 3, "intermediate_size": 768}
    config = BeitConfig(**sizes, image_size=32, patch_size=8, use_relative_position_bias=True)
    return dict(BeitModel(config).state_dict())


@pytest.mark.parametrize("value", [0.0, 0.5])
@pytest.mark.parametrize(
    ("write", "values_name", "keys_name", "line"),
    [
        (unilm_beit, "attn.v_bias", "attn.k_bias", "blocks.0.attn.k_bias: no place in the model"),
        (transformers_beit, "v_proj.bias", "k_proj.bias", "blocks.0.attn.k.bias: no place in the model"),
    ],
    ids=["unilm", "transformers"],
)
def test_biases_of_keys_which_no_beit_has_are_refused_and_not_dropped(
    tmp_path: Path, write: Callable[[], Weights], values_name: str, keys_name: str, line: str, value: float
) -> None:
    weights = write()
    (values,) = [name for name in weights if name.endswith(values_name)]
    weights[values.replace(values_name, keys_name)] = torch.full((192,), value)
    assert line in misfit(stored(saved(tmp_path, weights))).what


def test_files_of_beit_without_biases_of_keys_fit(tmp_path: Path) -> None:
    for number, weights in enumerate((unilm_beit(), transformers_beit())):
        assert check_stored(stored(saved(tmp_path, weights, f"{number}.pth"))) == 1.0


# Messages with texts from a file.


def test_network_much_larger_than_its_file_is_refused_with_both_sizes(tmp_path: Path) -> None:
    one = torch.ones(1000, 1000)
    path = saved(tmp_path, {f"{number}.weight": one.reshape(1000, 1000) for number in range(9)})
    size = path.stat().st_size
    with pytest.raises(CheckpointError) as refusal:
        stored(path)
    assert refusal.value.what == f"holds a network of 9 tensors and 36,000,000 bytes in a file of {size:,}"


def test_positions_of_a_rectangle_are_an_alarm_of_whole_sentences(tmp_path: Path, vit_weights: WeightMaker) -> None:
    rows, columns = torch.meshgrid(torch.arange(2.0), torch.arange(8.0), indexing="ij")
    frequencies = 10_000.0 ** -(torch.arange(48) / 48)
    angles = torch.stack([rows.flatten(), columns.flatten()], dim=1)[:, :, None] * frequencies
    patches = torch.cat([angles.sin(), angles.cos()], dim=2).flatten(1)
    positions = torch.cat([torch.zeros(1, 192), patches])[None]
    checkpoint = stored(saved(tmp_path, vit_weights() | {"pos_embed": positions}))
    assert list_alarms(checkpoint, {}) == (
        "the position embeddings look as if learned for 2 x 8 patches; they are read as 4 x 4. "
        "Wrap a network for images that are no squares: py:package.module:factory",
    )


def test_refusal_of_values_that_are_not_finite_is_complete_for_long_names() -> None:
    weights = {f"{number}{'x' * 3000}": torch.tensor([math.nan]) for number in range(7)}
    infos = {name: describe_values(tensor) for name, tensor in weights.items()}
    with pytest.raises(CheckpointError) as refusal:
        load_weights(nn.Linear(3, 2), weights, infos, where="vit.pth")
    message = str(refusal.value).splitlines()[0]
    assert message.startswith("vit.pth: 7 weights hold NaN or infinite values (0x")
    assert message.endswith(": 1 of 1 and 2 more)")


# The comparison with a network, and the loading.

EXPECTED = {"a.weight": torch.zeros(2, 3), "a.bias": torch.zeros(2), "b.weight": torch.zeros(4, 2)}


def without(*names: str) -> Weights:
    return {name: torch.ones_like(tensor) for name, tensor in EXPECTED.items() if name not in names}


@pytest.mark.parametrize(
    ("weights", "lines"),
    [
        (without(), ()),
        (without("b.weight", "a.bias"), ("a.bias: missing in the file", "b.weight: missing in the file")),
        (
            without() | {"z": torch.ones(1), "c": torch.ones(1)},
            ("c: no place in the model", "z: no place in the model"),
        ),
        (without() | {"a.weight": torch.ones(3, 2)}, ("a.weight: file (3, 2), model (2, 3)",)),
        (without() | {"a.bias": torch.ones(2).long()}, ("a.bias: file torch.int64, model torch.float32",)),
        (without() | {"a.bias": torch.ones(2).cfloat()}, ("a.bias: file torch.complex64, model torch.float32",)),
    ],
    ids=["fits", "missing", "left over", "reshaped", "integers", "complex"],
)
def test_weights_that_do_not_fit_are_listed_in_order(weights: Weights, lines: tuple[str, ...]) -> None:
    assert fit_weights(weights, EXPECTED).lines == lines


@pytest.mark.parametrize(
    ("weights", "lost"),
    [
        (without(), 0),
        (without("a.bias"), 2),
        (without() | {"b.weight": torch.ones(9)}, 8),
        (without("a.weight", "a.bias"), 8),
        ({}, 16),
    ],
    ids=["all there", "missing", "reshaped", "two missing", "all missing"],
)
def test_matched_is_the_share_of_values_that_the_file_holds(weights: Weights, lost: int) -> None:
    assert fit_weights(weights, EXPECTED).matched == pytest.approx(1 - lost / 16, abs=1e-12)


def test_network_without_weights_is_matched_by_nothing() -> None:
    assert fit_weights(without(), {}).matched == 0.0


@pytest.mark.parametrize("counts", [{}, {"bn.num_batches_tracked": torch.tensor(7)}], ids=["absent", "present"])
def test_counts_of_batches_may_be_absent(counts: Weights) -> None:
    expected = EXPECTED | {"bn.num_batches_tracked": torch.tensor(0)}
    assert fit_weights(without() | counts, expected).lines == ()


def test_pattern_waives_the_weights_that_it_matches() -> None:
    fit = fit_weights(without("a.weight", "b.weight"), EXPECTED, ("b.*",))
    assert (fit.waived, fit.missing, fit.matched) == (("b.weight",), ("a.weight",), 2 / 16)


def load(network: nn.Module, weights: Weights) -> None:
    infos = {name: describe_values(tensor) for name, tensor in weights.items()}
    load_weights(network, weights, infos, where="vit.pth")


def test_absent_weights_stay_as_they_are() -> None:
    network = nn.Linear(3, 2)
    before = network.bias.clone()
    load(network, {"weight": torch.full((2, 3), 3.0)})
    assert torch.equal(network.bias, before)
    assert network.weight.eq(3).all()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e200], ids=str)
def test_weight_that_is_not_finite_in_float32_is_refused_and_counted(value: float) -> None:
    network = nn.Linear(3, 2)
    before = network.weight.clone()
    weights = {"weight": torch.ones(2, 3), "bias": torch.tensor([1.0, value], dtype=torch.float64)}
    with pytest.raises(CheckpointError, match=r"1 weight holds NaN or infinite values \(bias: 1 of 2\)"):
        load(network, weights)
    assert torch.equal(network.weight, before)


# A config.json beside the weights.


@pytest.mark.parametrize(
    ("name", "stated", "own"),
    [
        ("hidden_size", 384, 192),
        ("num_hidden_layers", 12, 2),
        ("image_size", 224, 32),
        ("patch_size", [16, 16], 8),
        ("intermediate_size", 3072, 768),
    ],
)
def test_size_that_contradicts_the_weights_is_refused_with_both(
    tmp_path: Path, vit_weights: WeightMaker, name: str, stated: object, own: int
) -> None:
    source, folder = tmp_path / "vit.pth", tmp_path / "hf"
    torch.save(vit_weights(), source)
    convert_checkpoint(source, folder, to="hf")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {name: stated}))
    number = stated[0] if isinstance(stated, list) else stated
    with pytest.raises(CheckpointError, match=f"states {name} {number}, the weights beside it have {own}"):
        choose_stored(read_contents(folder))
