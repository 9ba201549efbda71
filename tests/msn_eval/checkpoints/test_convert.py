"""Conversions, compared with the libraries that read their files."""

import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
import torchvision
import transformers
from PIL import Image
from torch import Tensor, nn

import msn_eval
from msn_eval.checkpoints.checkpoint import locate_weights, read_checkpoint
from msn_eval.checkpoints.convert import Target, convert_checkpoint
from msn_eval.data.images import IMAGENET_MEAN, IMAGENET_STD, make_eval_transform, resize_and_crop
from msn_eval.errors import CheckpointError, MsnEvalError, StoreError
from msn_eval.features.encoder import encode, load_encoder

Weights = dict[str, Tensor]
WeightMaker = Callable[..., Weights]
MSNWriter = Callable[..., Path]
Triple = tuple[float, float, float]
TINY = "vit_tiny_patch16_224?img_size=32&patch_size=8&depth=2"
TARGETS: tuple[Target, ...] = ("safetensors", "timm", "hf")


def saved(folder: Path, content: object, *, name: str = "vit.pth") -> Path:
    path = folder / name
    torch.save(content, path)
    return path


def dinov2(weights: Weights, *, registers: int = 0, gated: int = 0) -> Weights:
    """Return weights as DINOv2 publishes them: registers behind the class token, a mask token, gated MLPs `gated` wide."""
    generator = torch.Generator().manual_seed(9)
    width = weights["cls_token"].shape[2]

    def noise(*shape: int, scale: float = 0.1) -> Tensor:
        return scale * torch.randn(shape, generator=generator)

    changed = weights | {"mask_token": noise(1, width)}
    if registers:
        changed["register_tokens"] = noise(1, registers, width)
    for name in [name for name in weights if gated and ".mlp." in name and name.endswith("weight")]:
        block = name.partition(".mlp.")[0]
        for kind in ("fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias"):
            changed.pop(f"{block}.mlp.{kind}", None)
        changed[f"{block}.mlp.w12.weight"] = noise(2 * gated, width)
        changed[f"{block}.mlp.w12.bias"] = noise(2 * gated)
        changed[f"{block}.mlp.w3.weight"] = noise(width, gated)
        changed[f"{block}.mlp.w3.bias"] = noise(width)
    return changed


def in_moco_v3s_layout(weights: Weights) -> dict[str, Weights]:
    return {"state_dict": {f"module.base_encoder.{name}": tensor for name, tensor in weights.items()}}


# What transformers calls the network of a file, and the file.
KINDS: dict[str, tuple[str, Callable[[WeightMaker], object]]] = {
    "msn": ("ViTMSNModel", lambda draw: {"target_encoder": draw() | {"fc.fc1.weight": torch.ones(8, 192)}}),
    "wider": ("ViTMSNModel", lambda draw: draw(width=384, depth=1)),
    "no bias in qkv": (
        "ViTMSNModel",
        lambda draw: {name: tensor for name, tensor in draw().items() if not name.endswith("qkv.bias")},
    ),
    "mocov3": ("ViTMSNModel", lambda draw: in_moco_v3s_layout(draw(width=384, depth=1))),
    "ijepa": ("IJepaModel", lambda draw: {"target_encoder": draw(class_token=False)}),
    "dinov2": ("Dinov2Model", lambda draw: dinov2(draw(layer_scale=True))),
    "dinov2 gated": ("Dinov2Model", lambda draw: dinov2(draw(layer_scale=True), gated=512)),
    "dinov2 gated otherwise": ("Dinov2Model", lambda draw: dinov2(draw(layer_scale=True), gated=256)),
    "registers": ("Dinov2WithRegistersModel", lambda draw: dinov2(draw(layer_scale=True), registers=3)),
    "registers gated": (
        "Dinov2WithRegistersModel",
        lambda draw: dinov2(draw(layer_scale=True), registers=4, gated=512),
    ),
}
of_every_kind = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture
def file_of(tmp_path: Path, vit_weights: WeightMaker) -> Callable[[str], Path]:
    """A function that writes the file of one of KINDS."""
    return lambda kind: saved(tmp_path, KINDS[kind][1](vit_weights))


def folder_from(source: Path, **options: str) -> Path:
    """Convert a file for transformers, beside it."""
    out = source.with_name("converted")
    convert_checkpoint(source, out, to="hf", **options)
    return out


def refusal(source: Path, *, to: str = "hf", out: Path | None = None, **options: str) -> MsnEvalError:
    with pytest.raises(MsnEvalError) as caught:
        convert_checkpoint(source, out or source.with_name("converted"), to=to, **options)
    return caught.value


def features(path: Path, pixels: Tensor, tap: str, *, arch: str | None = None) -> Tensor:
    return encode(load_encoder(str(path), device="cpu", arch=arch), pixels, [tap])[tap]


def default_tap(kind: str) -> str:
    return "mean" if KINDS[kind][0] == "IJepaModel" else "cls"


def normalised(pixels: Tensor, mean: Triple = IMAGENET_MEAN, std: Triple = IMAGENET_STD) -> Tensor:
    return ((pixels / 255 - torch.tensor(mean)) / torch.tensor(std)).permute(0, 3, 1, 2)


def opened(folder: Path, model: str) -> tuple[nn.Module, dict[str, object]]:
    """Load a folder by the class of transformers called `model`; and what did not fit."""
    network, info = getattr(transformers, model).from_pretrained(
        folder, output_loading_info=True, local_files_only=True
    )
    return network.eval(), info


def states(folder: Path, pixels: Tensor, model: str) -> tuple[Tensor, Tensor]:
    """Return transformers' tokens before and after the last norm."""
    network, _ = opened(folder, model)
    with torch.inference_mode():
        output = network(normalised(pixels), output_hidden_states=True)
    return output.hidden_states[-1], output.last_hidden_state


def stated(folder: Path, name: str = "config.json") -> dict[str, object]:
    return dict(json.loads((folder / name).read_text()))


def assert_close(found: Tensor, expected: Tensor) -> None:
    """Within 1e-5 of the largest value: the sums behind a small one are as large as those behind a large one."""
    torch.testing.assert_close(found, expected, atol=1e-5 * max(1.0, float(expected.abs().max())), rtol=0)


# A folder that transformers loads.


@of_every_kind
def test_transformers_gives_the_features_before_and_after_the_last_norm(
    file_of: Callable[[str], Path], random_pixels: Tensor, kind: str
) -> None:
    source, is_ijepa = file_of(kind), KINDS[kind][0] == "IJepaModel"
    before, after = states(folder_from(source), random_pixels, KINDS[kind][0])
    expected = after.mean(dim=1) if is_ijepa else after[:, 0]
    assert_close(features(source, random_pixels, "mean" if is_ijepa else "cls-norm"), expected)
    if not is_ijepa:
        assert_close(features(source, random_pixels, "cls"), before[:, 0])


@of_every_kind
def test_transformers_finds_every_weight_and_no_other(file_of: Callable[[str], Path], kind: str) -> None:
    folder = folder_from(file_of(kind))
    _, info = opened(folder, KINDS[kind][0])
    wrong = ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")
    # The pooler of IJepaModel alone is in no file.
    assert {key for name in wrong for key in info[name] if not str(key).startswith("pooler.")} == set()
    assert stated(folder)["architectures"] == [KINDS[kind][0]]


@of_every_kind
def test_folder_is_read_here_with_the_same_weights_and_features(
    file_of: Callable[[str], Path], random_pixels: Tensor, kind: str
) -> None:
    source, tap = file_of(kind), default_tap(kind)
    folder = folder_from(source)
    before, after = read_checkpoint(str(source)), read_checkpoint(str(folder))
    assert (after.weights_sha256, after.arch) == (before.weights_sha256, before.arch)
    assert torch.equal(features(folder, random_pixels, tap), features(source, random_pixels, tap))


def test_heads_named_with_the_architecture_are_written_and_read_back(
    msn_file: MSNWriter, random_pixels: Tensor
) -> None:
    source, arch = msn_file(), f"{TINY}&num_heads=6"
    folder = folder_from(source, arch=arch)
    expected = features(source, random_pixels, "cls", arch=arch)
    assert_close(expected, states(folder, random_pixels, "ViTMSNModel")[0][:, 0])
    assert torch.equal(features(folder, random_pixels, "cls"), expected)


@pytest.mark.parametrize(("model", "kind"), [("ViTMSN", "msn"), ("IJepa", "ijepa"), ("Dinov2", "dinov2")])
def test_epsilon_of_a_folder_goes_along(
    file_of: Callable[[str], Path], random_pixels: Tensor, model: str, kind: str
) -> None:
    """Large enough to be seen: no weight holds it, and each model of transformers assumes another."""
    first = folder_from(file_of(kind))
    (first / "config.json").write_text(json.dumps(stated(first) | {"layer_norm_eps": 0.05}))
    second = first.with_name("second")
    convert_checkpoint(first, second, to="hf")
    expected, found = (states(folder, random_pixels, f"{model}Model")[1] for folder in (first, second))
    assert torch.equal(found, expected)


def test_half_precision_is_kept(tmp_path: Path, vit_weights: WeightMaker) -> None:
    source = saved(tmp_path, {name: tensor.half() for name, tensor in vit_weights().items()})
    network, _ = opened(folder_from(source), "ViTMSNModel")
    assert {tensor.dtype for tensor in network.state_dict().values()} == {torch.float16}


def test_one_of_several_networks_is_converted_by_its_key(tmp_path: Path, vit_weights: WeightMaker) -> None:
    source = saved(tmp_path, {"student": vit_weights(), "teacher": vit_weights(depth=1)})
    assert stated(folder_from(source, key="student"))["num_hidden_layers"] == 2


def test_registers_at_another_size_than_that_of_their_positions_give_transformers_features(
    tmp_path: Path, vit_weights: WeightMaker
) -> None:
    source = saved(tmp_path, dinov2(vit_weights(depth=1, patch=14, image=518, layer_scale=True), registers=4))
    pixels = torch.randint(0, 256, (1, 224, 224, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(5))
    before, _ = states(folder_from(source), pixels, "Dinov2WithRegistersModel")
    assert_close(features(source, pixels, "cls"), before[:, 0])


# The image processor of that folder.


def picture() -> Image.Image:
    pixels = np.random.default_rng(3).integers(0, 256, (12, 16, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((400, 300), Image.Resampling.BICUBIC)


def processed(folder: Path) -> Tensor:
    """Return the pixels of a picture by transformers' own processor of a folder."""
    processor = transformers.AutoImageProcessor.from_pretrained(folder, local_files_only=True)
    pixels: Tensor = processor(picture(), return_tensors="pt")["pixel_values"]
    return pixels


@pytest.mark.parametrize(
    ("image", "patch", "kind"), [(224, 56, "msn"), (518, 14, "dinov2")], ids=["224", "518 evaluated at 224"]
)
def test_image_processor_crops_224_pixels_from_a_shorter_side_of_256(
    tmp_path: Path, vit_weights: WeightMaker, image: int, patch: int, kind: str
) -> None:
    weights = vit_weights(depth=1, image=image, patch=patch, layer_scale=kind == "dinov2")
    folder = folder_from(saved(tmp_path, dinov2(weights) if kind == "dinov2" else weights))
    processor = transformers.AutoImageProcessor.from_pretrained(folder, local_files_only=True)
    assert (dict(processor.size), dict(processor.crop_size)) == ({"shortest_edge": 256}, {"height": 224, "width": 224})


def test_image_processor_gives_the_protocols_pixels(tmp_path: Path, vit_weights: WeightMaker) -> None:
    """Up to rounding: torchvision and Pillow round to whole levels after other sums."""
    folder = folder_from(saved(tmp_path, vit_weights(depth=1, image=224, patch=56)))
    ours = torch.from_numpy(resize_and_crop(picture(), make_eval_transform(224)).copy())[None]
    torch.testing.assert_close(processed(folder), normalised(ours), atol=1.1 / 255 / min(IMAGENET_STD), rtol=0)


def test_image_statistics_of_a_folder_are_written(file_of: Callable[[str], Path]) -> None:
    first = folder_from(file_of("msn"))
    other = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.1, 0.2, 0.3]}
    (first / "preprocessor_config.json").write_text(json.dumps(other))
    second = first.with_name("second")
    convert_checkpoint(first, second, to="hf")
    checkpoint = read_checkpoint(str(second))
    assert (checkpoint.mean, checkpoint.std) == ((0.5, 0.4, 0.3), (0.1, 0.2, 0.3))


def test_image_statistics_of_one_of_timms_tags_are_written(msn_file: MSNWriter) -> None:
    source, arch = msn_file(), TINY.replace("224?", "224.augreg_in21k?")
    checkpoint = read_checkpoint(str(folder_from(source, arch=arch)))
    assert checkpoint.mean == read_checkpoint(str(source), arch=arch).mean == (0.5, 0.5, 0.5)


@pytest.mark.parametrize("to", TARGETS)
def test_output_states_mean_and_std_of_its_source(tmp_path: Path, msn_file: MSNWriter, to: Target) -> None:
    first, second = tmp_path / "first", tmp_path / "second.safetensors"
    convert_checkpoint(msn_file(), first, to="hf", mean=(0.5, 0.4, 0.3), std=(0.1, 0.2, 0.3))
    convert_checkpoint(first, second, to=to)
    checkpoint = read_checkpoint(str(second))
    assert (checkpoint.mean, checkpoint.std) == ((0.5, 0.4, 0.3), (0.1, 0.2, 0.3))


def test_guessed_mean_and_std_are_not_stated_by_the_output(tmp_path: Path, vit_weights: WeightMaker) -> None:
    out = tmp_path / "out.safetensors"
    convert_checkpoint(saved(tmp_path, vit_weights(depth=1)), out, to="timm")
    assert read_checkpoint(str(out)).normalisation.is_assumed


def test_equal_weights_give_equal_files(tmp_path: Path, msn_file: MSNWriter) -> None:
    outs = [tmp_path / f"{number}.safetensors" for number in range(8)]
    for out in outs:
        convert_checkpoint(msn_file(), out, to="timm")
    assert len({out.read_bytes() for out in outs}) == 1


# What transformers could not compute.


def timm_weights(name: str, **keywords: object) -> Weights:
    network = timm.create_model(name, num_classes=0, img_size=32, patch_size=8, depth=2, **keywords)
    return dict(network.state_dict())


def beit() -> Weights:
    return timm_weights("beit_base_patch16_224", embed_dim=192, num_heads=3)


OBSTACLES: dict[str, tuple[Callable[[WeightMaker], Weights], str | None, str]] = {
    "residual network": (lambda draw: torchvision.models.resnet18().state_dict(), None, "it is a ResNet"),
    "BEiT": (lambda draw: beit(), None, "it is a Beit"),
    "norms of queries and keys": (lambda draw: draw(qk_norm=True), None, "q_norm"),
    "norm after the mean": (lambda draw: draw(fc_norm=True), None, "norm"),
    "norm before the blocks": (
        lambda draw: timm_weights("vit_tiny_patch16_224", pre_norm=True),
        f"{TINY}&pre_norm=True",
        "norm_pre",
    ),
    "another activation": (lambda draw: draw(), f"{TINY}&act_layer=relu", "its activation is ReLU"),
    "gated MLPs without scaled residuals": (
        lambda draw: {
            name: tensor for name, tensor in dinov2(draw(), gated=512).items() if name != "mask_token"
        },
        None,
        "gated",
    ),
    "gated MLPs of an odd width": (lambda draw: dinov2(draw(layer_scale=True), gated=260), None, "260 wide"),
    "registers without scaled residuals": (lambda draw: dinov2(draw(), registers=4), None, "registers"),
    "attention over the patches": (
        lambda draw: timm_weights("vit_tiny_patch16_224", global_pool="map"),
        f"{TINY}&global_pool=map",
        "attn_pool",
    ),
    "blocks side by side": (
        lambda draw: timm_weights("vit_small_patch16_18x2_224", embed_dim=192, num_heads=3),
        "vit_small_patch16_18x2_224?embed_dim=192&num_heads=3&img_size=32&patch_size=8&depth=2",
        "ParallelThingsBlock",
    ),
    "class token without a position": (lambda draw: draw(class_position=False), None, "position"),
    "registers with positions": (lambda draw: draw(registers=4, layer_scale=True), None, "position"),
    "scaled residuals without a class token": (
        lambda draw: draw(class_token=False, layer_scale=True), None, "class token"
    ),
    "registers without a class token": (
        lambda draw: draw(class_token=False, class_position=False, layer_scale=True, registers=4), None, "class token"
    ),
}  # fmt: skip


@pytest.mark.parametrize("obstacle", OBSTACLES)
def test_network_that_transformers_cannot_compute_is_refused(
    tmp_path: Path, vit_weights: WeightMaker, obstacle: str
) -> None:
    content, arch, what = OBSTACLES[obstacle]
    source = saved(tmp_path, content(vit_weights))
    error = refusal(source, **({"arch": arch} if arch else {}))
    assert what in error.what
    assert (error.exit_code, error.where, "--to timm" in error.hint) == (20, str(source), True)
    assert list(tmp_path.iterdir()) == [source]


@pytest.mark.parametrize("to", ["hf", "timm"])
def test_weights_that_do_not_fit_are_refused(tmp_path: Path, vit_weights: WeightMaker, to: str) -> None:
    source = saved(tmp_path, vit_weights() | {"norm.bias": torch.ones(3)})
    assert "norm.bias: file (3,), model (192,)" in str(refusal(source, to=to))


# One file in timm's names.


def test_timms_network_takes_every_weight_and_gives_the_features(
    msn_file: MSNWriter, vit_weights: WeightMaker, random_pixels: Tensor
) -> None:
    source = msn_file()
    out = source.with_name("vit.safetensors")
    convert_checkpoint(source, out, to="timm")
    written = safetensors.torch.load_file(out)
    network = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=2, num_classes=0).eval()
    assert network.load_state_dict(written, strict=True) == ([], [])
    assert written.keys() == vit_weights().keys()  # neither heads nor prototypes
    with torch.inference_mode():
        assert_close(features(source, random_pixels, "cls-norm"), network(normalised(random_pixels)))


def test_timms_network_takes_registers_of_dinov2(file_of: Callable[[str], Path]) -> None:
    source = file_of("registers")
    out = source.with_name("vit.safetensors")
    convert_checkpoint(source, out, to="timm")
    shape = {"img_size": 32, "patch_size": 8, "depth": 2, "reg_tokens": 3}
    network = timm.create_model("vit_tiny_patch16_224", num_classes=0, init_values=1.0, no_embed_class=True, **shape)
    assert network.load_state_dict(safetensors.torch.load_file(out), strict=True) == ([], [])


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "mocov3"])
def test_file_in_timms_names_is_read_here_with_the_same_features(
    file_of: Callable[[str], Path], random_pixels: Tensor, kind: str
) -> None:
    source, tap = file_of(kind), default_tap(kind)
    out = source.with_name("vit.safetensors")
    convert_checkpoint(source, out, to="timm")
    assert torch.equal(features(out, random_pixels, tap), features(source, random_pixels, tap))


@pytest.mark.parametrize("kind", ["mocov3", "msn"])
def test_heads_that_timms_names_would_not_show_are_refused(file_of: Callable[[str], Path], kind: str) -> None:
    """MoCo v3's small network has 12 heads; every other network of its width has 6."""
    error = refusal(file_of(kind), to="timm", **({"arch": f"{TINY}&num_heads=6"} if kind == "msn" else {}))
    assert ("other heads" in error.what, "--to hf" in error.hint, error.exit_code) == (True, True, 20)


def test_epsilon_that_timms_names_would_not_show_is_refused(tmp_path: Path, file_of: Callable[[str], Path]) -> None:
    folder = folder_from(file_of("msn"))
    (folder / "config.json").write_text(json.dumps(stated(folder) | {"layer_norm_eps": 1e-12}))
    assert "another epsilon" in refusal(folder, to="timm", out=tmp_path / "out").what


@pytest.mark.parametrize("to", ["safetensors", "timm", "hf"])
def test_network_that_transformers_runs_keeps_its_folder(tmp_path: Path, to: str) -> None:
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1, "intermediate_size": 16}
    transformers.BeitModel(transformers.BeitConfig(image_size=32, patch_size=8, **sizes)).save_pretrained(
        tmp_path / "beit"
    )
    assert "transformers alone runs beit_width16" in refusal(tmp_path / "beit", to=to, out=tmp_path / "out").what


# Plain safetensors.


def plain_from(source: Path) -> Path:
    out = source.with_name("plain.safetensors")
    convert_checkpoint(source, out, to="safetensors")
    return out


def test_every_tensor_of_the_file_keeps_its_name_and_values(msn_file: MSNWriter, vit_weights: WeightMaker) -> None:
    written = safetensors.torch.load_file(plain_from(msn_file()))
    heads = {"fc.fc1.weight", "fc.fc1.bias"}
    assert written.keys() == {f"target_encoder.module.{name}" for name in vit_weights().keys() | heads} | {"prototypes"}
    assert all(torch.equal(written[f"target_encoder.module.{name}"], value) for name, value in vit_weights().items())


def test_same_network_of_several_is_chosen(msn_file: MSNWriter, vit_weights: WeightMaker) -> None:
    online = {f"module.{name}": 2 * tensor for name, tensor in vit_weights().items()}
    source = msn_file(encoder=online)
    before, after = read_checkpoint(str(source)), read_checkpoint(str(plain_from(source)))
    assert (after.key, after.weights_sha256) == (before.key, before.weights_sha256)


SHARED = torch.arange(6.0)


@pytest.mark.parametrize(
    "content",
    [
        {"one.weight": SHARED, "two.weight": SHARED, "a.part": SHARED[2:4]},
        {"some.weight": SHARED.reshape(2, 3).T},
        {"bn.num_batches_tracked": torch.tensor(7), "queue.rows": torch.zeros(0, 3)},
        {"some.weight": torch.tensor([float("nan"), -0.0])},
        {str(dtype): torch.ones(2, 3, dtype=dtype) for dtype in (torch.half, torch.bfloat16, torch.int64, torch.bool)},
        {str(dtype): torch.ones(2, 3, dtype=dtype) for dtype in (torch.double, torch.complex64)},
    ],
    ids=["shared", "transposed", "scalar and empty", "not a number", "small dtypes", "large dtypes"],
)
def test_tensors_of_all_kinds_are_written_as_they_are(tmp_path: Path, content: Weights) -> None:
    written = safetensors.torch.load_file(plain_from(saved(tmp_path, {"state": {"model": content}})))
    assert written.keys() == {f"state.model.{name}" for name in content}
    for name, tensor in content.items():
        torch.testing.assert_close(written[f"state.model.{name}"], tensor, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ({"a": {"b.c": torch.ones(2)}, "a.b": {"c": torch.zeros(2)}}, "'a.b.c'"),
        ({"some.weight": torch.ones(2, dtype=torch.complex128)}, "complex128"),
        ({"__metadata__": torch.ones(2), "some.weight": torch.ones(2)}, "'__metadata__'"),
        ({"a\ud800b.weight": torch.ones(2)}, "'a\\ud800b.weight'"),
        ({"epoch": 3}, "no tensors"),
    ],
    ids=["same name twice", "dtype", "reserved name", "invalid text", "no tensors"],
)
def test_what_the_format_cannot_hold_is_refused(tmp_path: Path, content: object, text: str) -> None:
    error = refusal(saved(tmp_path, content), to="safetensors")
    assert (error.exit_code, text in error.what, [path.name for path in tmp_path.iterdir()]) == (20, True, ["vit.pth"])


# OUT.


@pytest.mark.parametrize("to", TARGETS)
@pytest.mark.parametrize("is_folder", [False, True])
def test_existing_out_is_a_usage_error_and_stays(msn_file: MSNWriter, tmp_path: Path, to: str, is_folder: bool) -> None:
    out = tmp_path / "out"
    out.mkdir() if is_folder else out.write_bytes(b"mine")
    error = refusal(msn_file(), to=to, out=out)
    assert (error.exit_code, error.what, error.where) == (2, "OUT exists already", str(out))
    assert list(out.iterdir()) == [] if is_folder else out.read_bytes() == b"mine"


# Disks that refuse, and what is written wrong.


@contextmanager
def limit_file_size(size: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("to", TARGETS)
def test_full_disk_is_a_store_error_and_leaves_nothing(msn_file: MSNWriter, tmp_path: Path, to: str) -> None:
    source, out = msn_file(), tmp_path / "out"
    with limit_file_size(100_000), pytest.raises(StoreError, match="could not write 3,7") as caught:
        convert_checkpoint(source, out, to=to)
    assert (caught.value.exit_code, caught.value.where, list(tmp_path.iterdir())) == (22, str(out), [source])


def test_kill_while_writing_leaves_nothing_at_out(msn_file: MSNWriter, tmp_path: Path) -> None:
    code = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from msn_eval.checkpoints.convert import convert_checkpoint\n"
        "os.fsync = lambda handle: os.kill(os.getpid(), signal.SIGKILL)\n"
        "convert_checkpoint(Path(sys.argv[1]), Path(sys.argv[2]), to='hf')\n"
    )
    child = subprocess.run(
        [sys.executable, "-c", code, str(msn_file()), str(tmp_path / "out")],
        env=os.environ | {"PYTHONPATH": str(Path(msn_eval.__file__).parents[1])},
        timeout=120,
        check=False,
    )
    assert (child.returncode, (tmp_path / "out").exists()) == (-signal.SIGKILL, False)


def change_value(tensors: Weights) -> Weights:
    name = sorted(name for name in tensors if name.endswith("norm.bias"))[0]
    return tensors | {name: tensors[name].nextafter(torch.tensor(9.0))}


@pytest.mark.parametrize("to", TARGETS)
def test_tensor_that_reads_back_differently_is_an_error_and_the_output_is_removed(
    msn_file: MSNWriter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, to: str
) -> None:
    save, out = safetensors.torch.save_file, tmp_path / "out"
    monkeypatch.setattr(
        safetensors.torch, "save_file", lambda tensors, path, **options: save(change_value(tensors), path, **options)
    )
    with pytest.raises(CheckpointError, match="The tensors read back differently") as caught:
        convert_checkpoint(msn_file(), out, to=to)
    assert (caught.value.where, out.exists()) == (str(out), False)


@pytest.mark.parametrize("to", TARGETS)
def test_output_has_the_permissions_of_the_umask(msn_file: MSNWriter, tmp_path: Path, to: Target) -> None:
    out = tmp_path / "out"
    convert_checkpoint(msn_file(), out, to=to)
    (tmp_path / "plain").write_bytes(b"")
    written = out / "model.safetensors" if to == "hf" else out
    assert written.stat().st_mode == (tmp_path / "plain").stat().st_mode


# What no weight shows.


@pytest.mark.parametrize("to", ["safetensors", "timm"])
def test_architecture_that_the_source_states_goes_along(tmp_path: Path, to: Target, random_pixels: Tensor) -> None:
    demo = locate_weights("demo")[0]
    out = tmp_path / "demo.safetensors"
    convert_checkpoint(demo, out, to=to)
    side = load_encoder(str(out), device="cpu").transform.crop
    pixels = random_pixels[:, :side, :side]
    assert torch.equal(features(out, pixels, "cls"), features(demo, pixels, "cls"))


@pytest.mark.parametrize("to", ["safetensors", "timm"])
def test_architecture_given_by_hand_goes_along(
    tmp_path: Path, vit_weights: WeightMaker, to: Target, random_pixels: Tensor
) -> None:
    arch = f"{TINY}&embed_dim=96&num_heads=2"
    source, out = saved(tmp_path, vit_weights(width=96)), tmp_path / "out"
    convert_checkpoint(source, out, to=to, arch=arch)
    assert torch.equal(features(out, random_pixels, "cls"), features(source, random_pixels, "cls", arch=arch))


@pytest.mark.parametrize("to", TARGETS)
@pytest.mark.parametrize(
    ("content", "rule"),
    [
        (lambda draw: {"target_encoder": draw()}, "bicubic, not antialiased"),
        (
            lambda draw: {"teacher": {f"backbone.{name}": tensor for name, tensor in draw().items()}},
            "bicubic, not antialiased, offset 0.1",
        ),
        (lambda draw: draw() | {"head.weight": torch.ones(5, 192), "head.bias": torch.ones(5)}, "as timm"),
    ],
    ids=["MSN", "DINO", "timm"],
)
def test_rule_of_positions_goes_along(
    tmp_path: Path, vit_weights: WeightMaker, to: Target, content: Callable[[WeightMaker], object], rule: str
) -> None:
    source, out = saved(tmp_path, content(vit_weights)), tmp_path / "out"
    convert_checkpoint(source, out, to=to)
    assert load_encoder(str(out), device="cpu", image_pixels=64).transform.positions == rule


def test_size_of_images_of_a_residual_network_goes_along(tmp_path: Path) -> None:
    weights = timm.create_model("resnet18", num_classes=0).state_dict()
    stated = {"msn_eval.architecture": "resnet18", "msn_eval.image_pixels": "96", "epoch": "7"}
    safetensors.torch.save_file(dict(weights), tmp_path / "source", metadata=stated)
    convert_checkpoint(tmp_path / "source", tmp_path / "out", to="timm")
    checkpoint = read_checkpoint(str(tmp_path / "out"))
    assert (checkpoint.image_pixels, checkpoint.epoch) == (96, 7)


def test_file_that_would_read_back_as_another_network_is_not_written(
    file_of: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = folder_from(file_of("msn"))
    config = stated(folder) | {"layer_norm_eps": 1e-5}
    (folder / "config.json").write_text(json.dumps(config))
    error = refusal(folder, to="safetensors", out=tmp_path / "out.safetensors")
    assert (error.exit_code, error.where) == (20, str(tmp_path / "out.safetensors"))
    assert "It reads back as" in error.what
    assert "--to hf" in error.hint
    assert [path.name for path in tmp_path.iterdir() if "out.safetensors" in path.name] == []


# Weights of eight bits.


def in_float8(weights: Weights, dtype: torch.dtype = torch.float8_e4m3fn) -> Weights:
    return {name: tensor.to(dtype) for name, tensor in weights.items()}


def test_weights_of_eight_bits_are_written_where_they_can_be_computed_with(
    tmp_path: Path, vit_weights: WeightMaker, random_pixels: Tensor
) -> None:
    source = saved(tmp_path, in_float8(vit_weights()))
    convert_checkpoint(source, tmp_path / "out", to="timm")
    assert torch.equal(features(tmp_path / "out", random_pixels, "cls"), features(source, random_pixels, "cls"))


def test_weights_of_eight_bits_are_not_written_for_transformers(tmp_path: Path, vit_weights: WeightMaker) -> None:
    error = refusal(saved(tmp_path, in_float8(vit_weights())))
    assert (error.exit_code, error.hint) == (20, "Use --to timm or --to safetensors.")
    assert "is float8_e4m3fn, with which transformers does not compute" in error.what


@pytest.mark.parametrize("kind", ["msn", "registers gated"])
def test_queries_keys_and_values_of_eight_bits_are_read(
    file_of: Callable[[str], Path], kind: str, random_pixels: Tensor
) -> None:
    folder = folder_from(file_of(kind))
    file = folder / "model.safetensors"
    rounded = in_float8(safetensors.torch.load_file(file))
    safetensors.torch.save_file({name: tensor.float() for name, tensor in rounded.items()}, file)
    expected = features(folder, random_pixels, "cls")
    safetensors.torch.save_file(rounded, file)
    torch.testing.assert_close(features(folder, random_pixels, "cls"), expected, atol=0, rtol=0)
