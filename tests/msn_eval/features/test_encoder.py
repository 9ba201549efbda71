"""Encoders: the vectors that are tapped, held against the formulas and against other libraries."""

import math
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torchvision
import transformers
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torchvision.models.vision_transformer import VisionTransformer as TorchvisionViT

from msn_eval.checkpoints.checkpoint import Checkpoint, read_checkpoint, weights_sha256
from msn_eval.checkpoints.normalisation import Normalisation
from msn_eval.data.images import IMAGENET_MEAN, IMAGENET_STD
from msn_eval.errors import CheckpointError, UsageError
from msn_eval.features.encoder import (
    Encoder,
    build_encoder,
    check_frozen,
    choose_device,
    default_precision,
    encode,
    exact_float32,
    load_encoder,
    precision_class,
    resolve_tap,
)

Weights = dict[str, Tensor]
WeightMaker = Callable[..., Weights]
MSNWriter = Callable[..., Path]
CPU = torch.device("cpu")
TINY = "random:vit_tiny_patch16_224?img_size=32&patch_size=8&depth=1"
MAP_POOLED = f"{TINY}&global_pool=map&class_token=False"
NO_CLASS_TOKEN = f"{TINY}&class_token=False&global_pool=avg"
BEIT = "random:beit_base_patch16_224?img_size=32&patch_size=8&depth=2&embed_dim=192&num_heads=3"
DINOV2 = "random:vit_tiny_patch16_224?img_size=518&patch_size=14&init_values=1.0&depth=1"


def load(checkpoint: str | Path, **options: object) -> Encoder:
    return load_encoder(str(checkpoint), device="cpu", **options)


def saved(folder: Path, content: object) -> Path:
    path = folder / "network.pth"
    torch.save(content, path)
    return path


def own(network: nn.Module) -> Checkpoint:
    pixels = read_checkpoint("pixels")
    own = replace(pixels, name="own", path="py:own:factory", format="py", arch="own", network=network.eval())
    return replace(own, normalisation=Normalisation(mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25), source="test"))


def normalised(
    pixels: Tensor, mean: tuple[float, ...] = IMAGENET_MEAN, std: tuple[float, ...] = IMAGENET_STD
) -> Tensor:
    """Return the images (b, 3, S, S) that a network is fed with."""
    return ((pixels.float() / 255 - torch.tensor(mean)) / torch.tensor(std)).movedim(3, 1)


# A Vision Transformer by its formulas (Dosovitskiy et al. 2021, arXiv:2010.11929), with a name for every step.


def layer_norm(tokens: Tensor, weights: Weights, name: str) -> Tensor:
    centred = tokens - tokens.mean(-1, keepdim=True)
    variance = centred.square().mean(-1, keepdim=True)
    return centred / (variance + 1e-6).sqrt() * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def affine(tokens: Tensor, weights: Weights, name: str) -> Tensor:
    return tokens @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]


def attention(tokens: Tensor, weights: Weights, here: str, heads: int) -> Tensor:
    outputs = []
    for queries, keys, values in zip(
        *(packed.chunk(heads, dim=-1) for packed in affine(tokens, weights, f"{here}.attn.qkv").chunk(3, dim=-1)),
        strict=True,
    ):
        if f"{here}.attn.q_norm.weight" in weights:
            queries = layer_norm(queries, weights, f"{here}.attn.q_norm")
            keys = layer_norm(keys, weights, f"{here}.attn.k_norm")
        similarity = queries @ keys.mT / math.sqrt(queries.shape[-1])
        shares = similarity.exp() / similarity.exp().sum(-1, keepdim=True)
        outputs.append(shares @ values)
    return affine(torch.cat(outputs, dim=-1), weights, f"{here}.attn.proj")


def gelu(values: Tensor) -> Tensor:
    return values * (1 + torch.erf(values / math.sqrt(2))) / 2


def vit_by_formula(weights: Weights, images: Tensor, heads: int) -> list[Tensor]:
    """Return the tokens (b, prefix + patches, d) after every block, before the final norm."""
    kernel = weights["patch_embed.proj.weight"]
    side = kernel.shape[-1]
    patches = images.unfold(2, side, side).unfold(3, side, side)  # (b, 3, rows, columns, side, side)
    tokens = torch.einsum("bcrsij,dcij->brsd", patches, kernel).flatten(1, 2) + weights["patch_embed.proj.bias"]
    prefix = [weights[name].expand(len(images), -1, -1) for name in ("cls_token", "reg_token") if name in weights]
    positions = weights["pos_embed"]
    if positions.shape[1] == tokens.shape[1]:
        tokens = torch.cat([*prefix, tokens + positions], dim=1)
    else:
        tokens = torch.cat([*prefix, tokens], dim=1) + positions
    outputs = []
    for block in range(sum(name.endswith(".mlp.fc1.bias") for name in weights)):
        here = f"blocks.{block}"
        one = torch.ones(())
        mixed = attention(layer_norm(tokens, weights, f"{here}.norm1"), weights, here, heads)
        tokens = tokens + weights.get(f"{here}.ls1.gamma", one) * mixed
        hidden = gelu(affine(layer_norm(tokens, weights, f"{here}.norm2"), weights, f"{here}.mlp.fc1"))
        tokens = tokens + weights.get(f"{here}.ls2.gamma", one) * affine(hidden, weights, f"{here}.mlp.fc2")
        outputs.append(tokens)
    return outputs


VARIANTS: list[dict[str, object]] = [
    {},
    {"patch": 4},
    {"width": 384, "depth": 1},
    {"registers": 4},
    {"registers": 4, "class_position": False},
    {"class_position": False},
    {"layer_scale": True},
    {"qk_norm": True},
    {"fc_norm": True},
]


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_cls_is_the_class_token_after_the_last_block_before_the_final_norm(
    msn_file: MSNWriter, vit_weights: WeightMaker, random_pixels: Tensor, variant: dict[str, object]
) -> None:
    weights = vit_weights(**variant)
    found = encode(load(msn_file(weights)), random_pixels, ["cls"])["cls"]
    heads = weights["cls_token"].shape[-1] // 64
    expected = vit_by_formula(weights, normalised(random_pixels), heads)[-1][:, 0]
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("final_norm", ["norm", "fc_norm"])
def test_cls_norm_is_the_class_token_behind_the_final_norm(
    msn_file: MSNWriter, vit_weights: WeightMaker, random_pixels: Tensor, final_norm: str
) -> None:
    weights = vit_weights(fc_norm=final_norm == "fc_norm")
    found = encode(load(msn_file(weights)), random_pixels, ["cls-norm"])["cls-norm"]
    tokens = vit_by_formula(weights, normalised(random_pixels), heads=3)[-1]
    torch.testing.assert_close(found, layer_norm(tokens[:, 0], weights, final_norm), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("variant", [{}, {"registers": 4}, {"class_token": False}], ids=str)
def test_mean_is_that_of_the_normed_patch_tokens(
    tmp_path: Path, vit_weights: WeightMaker, random_pixels: Tensor, variant: dict[str, object]
) -> None:
    weights = vit_weights(**variant)
    found = encode(load(saved(tmp_path, weights)), random_pixels, ["mean"])["mean"]
    patches = vit_by_formula(weights, normalised(random_pixels), heads=3)[-1][:, -16:]
    torch.testing.assert_close(found, layer_norm(patches, weights, "norm").mean(1), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("class_token", [True, False])
def test_mean_is_normed_after_averaging_with_fc_norm(
    tmp_path: Path, vit_weights: WeightMaker, random_pixels: Tensor, class_token: bool
) -> None:
    weights = vit_weights(fc_norm=True, class_token=class_token)
    found = encode(load(saved(tmp_path, weights)), random_pixels, ["mean"])["mean"]
    patches = vit_by_formula(weights, normalised(random_pixels), heads=3)[-1][:, -16:]
    torch.testing.assert_close(found, layer_norm(patches.mean(1), weights, "fc_norm"), atol=1e-4, rtol=1e-4)


def test_cls4_joins_the_normed_class_tokens_of_the_last_four_blocks(
    msn_file: MSNWriter, vit_weights: WeightMaker, random_pixels: Tensor
) -> None:
    weights = vit_weights(depth=5)
    found = encode(load(msn_file(weights)), random_pixels, ["cls4"])["cls4"]
    blocks = vit_by_formula(weights, normalised(random_pixels), heads=3)
    expected = torch.cat([layer_norm(tokens[:, 0], weights, "norm") for tokens in blocks[1:]], dim=1)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def torchvision_transformer() -> TorchvisionViT:
    network = TorchvisionViT(image_size=32, patch_size=8, num_layers=2, num_heads=3, hidden_dim=192, mlp_dim=768).eval()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return network


@pytest.mark.parametrize("tap", ["cls", "cls-norm"])
def test_transformer_of_torchvision_gives_torchvisions_features(
    tmp_path: Path, random_pixels: Tensor, tap: str
) -> None:
    theirs = torchvision_transformer()
    found = encode(load(saved(tmp_path, theirs.state_dict())), random_pixels, [tap])[tap]
    with torch.inference_mode():
        patches = theirs._process_input(normalised(random_pixels))
        tokens = torch.cat([theirs.class_token.expand(len(patches), -1, -1), patches], dim=1)
        raw = theirs.encoder.layers(tokens + theirs.encoder.pos_embedding)
        expected = raw if tap == "cls" else theirs.encoder(tokens)
    torch.testing.assert_close(found, expected[:, 0], atol=1e-4, rtol=1e-4)


def test_pool_is_the_mean_over_the_positions_of_the_last_map(tmp_path: Path, random_pixels: Tensor) -> None:
    theirs = torchvision.models.resnet18().eval()
    found = encode(load(saved(tmp_path, theirs.state_dict()), image_pixels=32), random_pixels, ["pool"])["pool"]
    with torch.inference_mode():
        maps = nn.Sequential(*list(theirs.children())[:-2])(normalised(random_pixels))
    torch.testing.assert_close(found, maps.mean((2, 3)), atol=1e-4, rtol=1e-4)


def test_out_of_a_map_pooled_transformer_is_what_it_returns(random_pixels: Tensor) -> None:
    encoder = load(MAP_POOLED)
    found = encode(encoder, random_pixels, ["out"])["out"]
    with torch.inference_mode():
        images = normalised(random_pixels, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))  # as timm states for this architecture
        expected = read_checkpoint(MAP_POOLED).network(images)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_out_of_an_own_module_is_what_it_returns_for_its_own_normalisation(random_pixels: Tensor) -> None:
    encoder = build_encoder(own(nn.Flatten()), device=CPU, precision="fp32")
    expected = normalised(random_pixels, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)).flatten(1)
    torch.testing.assert_close(encode(encoder, random_pixels, ["out"])["out"], expected)


def test_pixels_are_normalised_and_flattened_channel_by_channel(random_pixels: Tensor) -> None:
    found = encode(load("pixels"), random_pixels, ["pixels"])["pixels"]
    expected = torch.stack(
        [
            (random_pixels[..., channel].float() / 255 - IMAGENET_MEAN[channel]) / IMAGENET_STD[channel]
            for channel in range(3)
        ],
        dim=1,
    ).reshape(4, 3072)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_two_taps_in_one_pass_equal_one_at_a_time(random_pixels: Tensor) -> None:
    encoder = load(TINY.replace("depth=1", "depth=4"))
    together = encode(encoder, random_pixels, encoder.taps)
    assert all(torch.equal(together[tap], encode(encoder, random_pixels, [tap])[tap]) for tap in encoder.taps)


@pytest.mark.parametrize("tap", ["cls", "cls-norm", "mean"])
def test_features_in_bf16_point_the_same_way(msn_file: MSNWriter, random_pixels: Tensor, tap: str) -> None:
    exact, reduced = (
        encode(load(msn_file(), precision=precision), random_pixels, [tap])[tap] for precision in ("fp32", "bf16")
    )
    assert F.cosine_similarity(exact, reduced).min() >= 0.999


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_features_are_float32_in_every_precision(random_pixels: Tensor, precision: str) -> None:
    assert encode(load(TINY, precision=precision), random_pixels, ["cls"])["cls"].dtype == torch.float32


@pytest.mark.parametrize("pooled", [True, False], ids=["pooled, then normed", "normed"])
def test_taps_of_a_beit_are_its_own_tokens(random_pixels: Tensor, pooled: bool) -> None:
    encoder = load(f"{BEIT}&global_pool={'avg' if pooled else 'token'}")
    network = encoder.network
    with torch.no_grad():
        images = normalised(random_pixels, encoder.transform.mean, encoder.transform.std)
        tokens = torch.cat([network.cls_token.expand(4, -1, -1), network.patch_embed(images)], dim=1)
        for block in network.blocks:
            tokens = block(tokens)
        norm = network.fc_norm if pooled else network.norm
        mean = norm(tokens[:, 1:].mean(1)) if pooled else norm(tokens)[:, 1:].mean(1)
    found = encode(encoder, random_pixels, encoder.taps)
    expected = {"cls": tokens[:, 0], "cls-norm": norm(tokens[:, 0]), "mean": mean}
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


# Available taps.


@pytest.mark.parametrize(
    ("checkpoint", "taps"),
    [
        (TINY, ("cls", "cls-norm", "mean")),
        (TINY.replace("depth=1", "depth=4"), ("cls", "cls-norm", "mean", "cls4")),
        (NO_CLASS_TOKEN, ("mean",)),
        (f"{NO_CLASS_TOKEN}&reg_tokens=4", ("mean",)),
        (MAP_POOLED, ("out",)),
        (BEIT, ("cls", "cls-norm", "mean")),
        ("random:resnet18", ("pool",)),
        ("pixels", ("pixels",)),
    ],
    ids=["shallow", "deep", "no class token", "registers", "map-pooled", "BEiT", "residual", "pixels"],
)
def test_encoder_offers_the_taps_it_has(checkpoint: str, taps: tuple[str, ...]) -> None:
    assert load(checkpoint).taps == taps


def test_own_module_that_is_a_transformer_of_timm_has_only_its_output(random_pixels: Tensor) -> None:
    network = read_checkpoint(TINY).network
    encoder = build_encoder(own(network), device=CPU, precision="fp32")
    tap = resolve_tap(encoder, "cls", by_hand=False)
    with torch.inference_mode():
        expected = network(normalised(random_pixels, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)))
    torch.testing.assert_close(encode(encoder, random_pixels, [tap])[tap], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("wanted", ["cls", "cls-norm", "cls4"])
@pytest.mark.parametrize(
    ("checkpoint", "instead"),
    [(NO_CLASS_TOKEN, "mean"), ("random:resnet18", "pool"), (MAP_POOLED, "out"), ("pixels", "pixels")],
    ids=["mean", "pool", "out", "pixels"],
)
def test_tap_of_a_protocol_falls_back_to_an_available_one(checkpoint: str, instead: str, wanted: str) -> None:
    assert resolve_tap(load(checkpoint), wanted, by_hand=False) == instead


@pytest.mark.parametrize(("wanted", "tap"), [("cls-norm", "cls-norm"), ("cls4", "mean")])
def test_tap_is_used_if_the_network_has_it(wanted: str, tap: str) -> None:
    assert resolve_tap(load(TINY), wanted, by_hand=False) == tap


def test_missing_tap_named_by_the_user_is_refused_with_the_available_ones() -> None:
    with pytest.raises(UsageError, match=r"--tap cls: random:resnet18 \(resnet18\)") as refusal:
        resolve_tap(load("random:resnet18"), "cls", by_hand=True)
    assert (refusal.value.exit_code, refusal.value.hint) == (2, "It has: pool.")


# Image sizes.


def test_native_size_sets_the_transform(msn_file: MSNWriter, vit_weights: WeightMaker) -> None:
    transform = load(msn_file(vit_weights(patch=14, image=56))).transform
    assert (transform.resize, transform.crop, transform.mean, transform.std) == (64, 56, IMAGENET_MEAN, IMAGENET_STD)


def test_other_image_size_interpolates_the_patches_positions(msn_file: MSNWriter, vit_weights: WeightMaker) -> None:
    weights = vit_weights()
    encoder = load(msn_file(weights), image_pixels=64)
    prefix, grid = weights["pos_embed"][:, :1], weights["pos_embed"][:, 1:].reshape(1, 4, 4, 192).movedim(3, 1)
    wider = F.interpolate(grid, size=(8, 8), mode="bicubic").movedim(1, 3).reshape(1, 64, 192)
    assert encoder.transform.crop == 64
    torch.testing.assert_close(encoder.network.pos_embed.detach(), torch.cat([prefix, wider], dim=1))


def in_dinos_file(weights: Weights) -> dict[str, Weights]:
    return {"teacher": {f"backbone.{name}": tensor for name, tensor in weights.items()}}


@pytest.mark.parametrize(
    ("content", "options", "interpolation", "rule"),
    [
        (lambda draw: {"target_encoder": draw()}, {}, {"size": (3, 3)}, "bicubic, not antialiased"),
        (
            lambda draw: in_dinos_file(draw()),
            {},
            {"scale_factor": (3.1 / 4, 3.1 / 4)},
            "bicubic, not antialiased, offset 0.1",
        ),
        (
            lambda draw: in_dinos_file(draw() | {"masked_embed": torch.zeros(1, 192)}),  # iBOT
            {},
            {"scale_factor": (3.1 / 4, 3.1 / 4)},
            "bicubic, not antialiased, offset 0.1",
        ),
        (
            lambda draw: draw(),
            {"arch": "vit_small_patch16_224.dino?img_size=32&patch_size=8&depth=2&embed_dim=192&num_heads=3"},
            {"scale_factor": (3.1 / 4, 3.1 / 4)},
            "bicubic, not antialiased, offset 0.1",
        ),
        (
            lambda draw: draw() | {"head.weight": torch.zeros(5, 192), "head.bias": torch.zeros(5)},
            {},
            {"size": (3, 3), "antialias": True},
            "as timm",
        ),
    ],
    ids=["MSN", "DINO", "iBOT", "DINO's backbone by its tag", "timm"],
)
def test_smaller_grid_of_positions_follows_the_familys_authors(
    tmp_path: Path,
    vit_weights: WeightMaker,
    content: Callable[[WeightMaker], object],
    options: dict[str, str],
    interpolation: dict[str, object],
    rule: str,
) -> None:
    encoder = load(saved(tmp_path, content(vit_weights)), image_pixels=24, **options)
    positions = vit_weights()["pos_embed"]
    grid = positions[:, 1:].reshape(1, 4, 4, 192).movedim(3, 1)
    smaller = F.interpolate(grid, mode="bicubic", **interpolation).movedim(1, 3).reshape(1, 9, 192)
    found = encoder.network.pos_embed.detach()
    torch.testing.assert_close(found, torch.cat([positions[:, :1], smaller], dim=1), atol=1e-6, rtol=0)
    assert encoder.transform.positions == rule


def test_backbone_alone_warns_that_its_family_decides_on_its_positions(
    tmp_path: Path, vit_weights: WeightMaker, caplog: pytest.LogCaptureFixture
) -> None:
    load(saved(tmp_path, vit_weights()), image_pixels=24)
    assert "DINO's and MSN's authors do not antialias" in caplog.text


@pytest.mark.parametrize(
    ("model", "settings"),
    [
        ("ViTMSN", {}),
        ("Dinov2WithRegisters", {"num_register_tokens": 2}),
    ],
)
def test_folder_of_transformers_follows_the_rule_of_its_model_type(
    tmp_path: Path, model: str, settings: dict[str, object]
) -> None:
    config = getattr(transformers, f"{model}Config")(
        hidden_size=192,
        num_hidden_layers=2,
        num_attention_heads=3,
        intermediate_size=768,
        image_size=32,
        patch_size=8,
        **settings,
    )
    torch.manual_seed(0)
    theirs = getattr(transformers, f"{model}Model")(config).eval()
    with torch.no_grad():
        theirs.embeddings.position_embeddings.normal_()
    theirs.save_pretrained(tmp_path)
    pixels = torch.randint(0, 256, (2, 24, 24, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    found = encode(load(tmp_path, image_pixels=24), pixels, ["cls-norm"])["cls-norm"]
    options = {"interpolate_pos_encoding": True} if model == "ViTMSN" else {}
    with torch.inference_mode():
        expected = theirs(normalised(pixels), **options).last_hidden_state[:, 0]
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_hugging_faces_vit_without_classifier_and_pooler_is_dinos(tmp_path: Path) -> None:
    config = transformers.ViTConfig(
        hidden_size=192, num_hidden_layers=1, num_attention_heads=3, intermediate_size=768, image_size=32, patch_size=8
    )
    transformers.ViTModel(config, add_pooling_layer=False).save_pretrained(tmp_path / "dino")
    transformers.ViTModel(config).save_pretrained(tmp_path / "vit")
    rules = [load(tmp_path / name, image_pixels=24).transform.positions for name in ("dino", "vit")]
    assert rules == ["bicubic, not antialiased, offset 0.1", "as timm"]


@pytest.mark.parametrize(
    ("name", "image_pixels"),
    [
        ("swin_tiny_patch4_window7_224?img_size=64&window_size=4&depths=(1,1)&num_heads=(1,2)&embed_dim=32", 96),
        ("eva02_tiny_patch14_224?img_size=56&depth=1", 84),
        ("convnext_atto", 40),
    ],
)
@pytest.mark.filterwarnings("ignore::UserWarning:timm.layers.interpolate")
def test_network_of_another_kind_gives_timms_features_at_another_size(name: str, image_pixels: int) -> None:
    encoder = load(f"random:{name}", image_pixels=image_pixels)
    pixels = torch.randint(0, 256, (2, image_pixels, image_pixels, 3), dtype=torch.uint8)
    checkpoint = read_checkpoint(f"random:{name}")
    theirs = checkpoint.network
    if hasattr(theirs, "set_input_size"):
        theirs.set_input_size(img_size=(image_pixels, image_pixels))
    with torch.inference_mode():
        expected = theirs.forward_head(theirs.forward_features(normalised(pixels, checkpoint.mean, checkpoint.std)))
    found = encode(encoder, pixels, ["pool"])["pool"]
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("cait_xxs24_224?depth=1", "Input height"),
        ("mixer_s32_224", "Input height"),
    ],
)
def test_size_that_a_network_of_another_kind_does_not_take_is_refused_before_any_image_is_read(
    name: str, reason: str
) -> None:
    with pytest.raises(UsageError, match=f"image_pixels 250: .* takes no such images: .*{reason}") as refusal:
        load(f"random:{name}", image_pixels=250)
    assert (refusal.value.exit_code, "its own size" in refusal.value.hint) == (2, False)
    assert "224" in refusal.value.hint


def test_features_at_another_image_size_are_those_of_the_interpolated_positions(
    msn_file: MSNWriter, vit_weights: WeightMaker
) -> None:
    weights = vit_weights(patch=16, image=32)
    encoder = load(msn_file(weights), image_pixels=64)
    pixels = torch.randint(0, 256, (2, 64, 64, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    resized = weights | {"pos_embed": encoder.network.pos_embed.detach()}
    expected = vit_by_formula(resized, normalised(pixels), heads=3)[-1][:, 0]
    torch.testing.assert_close(encode(encoder, pixels, ["cls"])["cls"], expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("image_pixels", [None, 32])
def test_native_size_leaves_the_positions_as_they_are(
    msn_file: MSNWriter, vit_weights: WeightMaker, image_pixels: int | None
) -> None:
    encoder = load(msn_file(), image_pixels=image_pixels)
    assert torch.equal(encoder.network.pos_embed, vit_weights()["pos_embed"])


def test_resizing_leaves_the_checkpoints_own_network_as_it_was() -> None:
    checkpoint = read_checkpoint(TINY)
    build_encoder(checkpoint, device=CPU, precision="bf16", image_pixels=64)
    assert (checkpoint.network.pos_embed.shape[1], checkpoint.network.pos_embed.dtype) == (17, torch.float32)


@pytest.mark.parametrize(
    ("name", "patch", "size", "hint"),
    [
        (TINY, 8, 36, "Use 32 or 40."),
        (TINY, 8, 5, "Use 8 or 16."),
        ("random:eva02_tiny_patch14_224?depth=1", 14, 250, "Use 238 or 252."),
    ],
)
def test_size_that_is_not_a_multiple_of_the_patch_size_is_refused_with_the_nearest_ones(
    name: str, patch: int, size: int, hint: str
) -> None:
    with pytest.raises(UsageError, match=f"image_pixels {size} is not a multiple of the patch size {patch}") as refusal:
        load(name, image_pixels=size)
    assert (refusal.value.exit_code, refusal.value.hint) == (2, hint)


def test_positions_for_the_published_size_follow_the_authors_rule() -> None:
    learned = read_checkpoint(DINOV2).network.pos_embed.detach()
    square = learned[:, 1:].reshape(1, 37, 37, 192).movedim(3, 1)
    scale = (16 + 0.1) / 37
    smaller = F.interpolate(square, scale_factor=(scale, scale), mode="bicubic").movedim(1, 3).reshape(1, 256, 192)
    encoder = load(DINOV2)
    assert encoder.transform.crop == 224
    torch.testing.assert_close(encoder.network.pos_embed, torch.cat([learned[:, :1], smaller], dim=1))


def test_positions_for_any_other_size_follow_the_authors_rule() -> None:
    name = f"{DINOV2}&reg_tokens=4"
    learned = read_checkpoint(name).network.pos_embed.detach()
    square = learned[:, 5:].reshape(1, 37, 37, 192).movedim(3, 1)
    smaller = F.interpolate(square, size=(7, 7), mode="bicubic", antialias=True).movedim(1, 3).reshape(1, 49, 192)
    found = load(name, image_pixels=98).network.pos_embed
    torch.testing.assert_close(found, torch.cat([learned[:, :5], smaller], dim=1))


def test_stored_size_uses_the_stored_positions() -> None:
    encoder = load(DINOV2, image_pixels=518)
    assert encoder.transform.crop == 518
    assert torch.equal(encoder.network.pos_embed, read_checkpoint(DINOV2).network.pos_embed)


@pytest.mark.parametrize("bias", ["use_rel_pos_bias=True", "use_shared_rel_pos_bias=True&use_rel_pos_bias=False"])
def test_beit_at_another_size_gives_features_of_its_width(bias: str) -> None:
    encoder = load(f"{BEIT}&{bias}", image_pixels=48)
    pixels = torch.zeros(2, 48, 48, 3, dtype=torch.uint8)
    assert encode(encoder, pixels, ["cls"])["cls"].shape == (2, 192)


# Networks that change while they are used.


class Restless(nn.Module):
    """A module whose forward pass also changes it."""

    def __init__(self, disturb: Callable[["Restless"], object]) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(3)
        self.disturb = disturb

    def forward(self, images: Tensor) -> Tensor:
        self.disturb(self)
        return self.norm(images.mean((2, 3)))


def encode_frozen(network: nn.Module, pixels: Tensor) -> Tensor:
    encoder = build_encoder(own(network), device=CPU, precision="fp32")
    with check_frozen(encoder):
        return encode(encoder, pixels, ["out"])["out"]


def update(network: Restless) -> None:
    network.norm.train()
    network.norm(torch.arange(6.0).reshape(2, 3))
    network.norm.eval()


def test_frozen_network_passes(random_pixels: Tensor) -> None:
    assert len(encode_frozen(Restless(lambda network: None), random_pixels)) == len(random_pixels)


@pytest.mark.parametrize(
    ("disturb", "problem"),
    [
        (nn.Module.train, r"2 of its modules are in training mode \(the network itself, norm\)"),
        (update, "its weights changed during feature extraction"),
    ],
    ids=["training mode", "statistics"],
)
def test_network_that_changes_is_refused(
    random_pixels: Tensor, disturb: Callable[[Restless], object], problem: str
) -> None:
    with pytest.raises(CheckpointError, match=problem) as refusal:
        encode_frozen(Restless(disturb), random_pixels)
    assert refusal.value.where == "py:own:factory"


def test_network_in_training_mode_is_refused_before_any_feature(random_pixels: Tensor) -> None:
    encoder = build_encoder(own(nn.Flatten()), device=CPU, precision="fp32")
    encoder.network.train()
    with pytest.raises(CheckpointError, match="training mode"), check_frozen(encoder):
        pytest.fail("features were taken")


# Devices and precisions.


@pytest.mark.parametrize(("device", "precision"), [("cpu", "exact"), ("cuda", "reduced")])
def test_default_precision_depends_on_the_device(device: str, precision: str) -> None:
    assert precision_class(default_precision(torch.device(device))) == precision


@pytest.mark.parametrize("name", ["cuda:99", "gpu", "cuda:x"])
def test_missing_device_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match=f"device {name}") as refusal:
        load_encoder("pixels", device=name)
    assert "cpu" in refusal.value.hint


def test_unknown_precision_is_refused() -> None:
    with pytest.raises(UsageError, match="fp8"):
        load_encoder("pixels", device="cpu", precision="fp8")  # type: ignore[arg-type]


# The public attributes.


@pytest.mark.parametrize(
    ("checkpoint", "dim"), [(TINY, 192), ("pixels", 3072), (MAP_POOLED, 192), (NO_CLASS_TOKEN, 192)]
)
def test_dim_is_the_width_of_the_first_tap(checkpoint: str, dim: int) -> None:
    assert load(checkpoint).dim == dim


def test_loading_passes_the_seed_and_the_key_on(tmp_path: Path, vit_weights: WeightMaker) -> None:
    path = saved(tmp_path, {"student": vit_weights(depth=1), "teacher": vit_weights()})
    assert load(path, checkpoint_key="teacher").checkpoint.key == "teacher"
    assert load(TINY, seed=1).checkpoint.weights_sha256 == read_checkpoint(TINY, seed=1).weights_sha256


# Global settings.


@pytest.fixture
def float32_settings() -> Iterator[tuple[object, object]]:
    """Return torch's settings of float32 products and convolutions on CUDA, put back afterwards."""
    settings = (torch.backends.cuda.matmul, torch.backends.cudnn.conv)
    before = [setting.fp32_precision for setting in settings]
    precision, allowed = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    yield settings
    torch.set_float32_matmul_precision(precision)
    torch.backends.cudnn.allow_tf32 = allowed
    for setting, value in zip(settings, before, strict=True):
        setting.fp32_precision = value


@pytest.mark.parametrize("value", ["tf32", "ieee"])
def test_exact_float32_applies_inside_the_block_and_is_restored(
    float32_settings: tuple[nn.Module, ...], value: str
) -> None:
    for setting in float32_settings:
        setting.fp32_precision = value
    with suppress(KeyError), exact_float32():
        assert [setting.fp32_precision for setting in float32_settings] == ["ieee", "ieee"]
        raise KeyError
    assert [setting.fp32_precision for setting in float32_settings] == [value, value]


@pytest.mark.parametrize("allowed", [False, True])
def test_older_settings_can_be_read_inside_exact_float32_and_are_restored(
    float32_settings: tuple[nn.Module, ...], allowed: bool
) -> None:
    def read_older() -> tuple[object, ...]:
        with torch.backends.cudnn.flags(enabled=True):
            pass
        precision = torch.get_float32_matmul_precision()
        return torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32, precision

    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = allowed
    before = read_older()

    with exact_float32():
        inside = read_older()

    assert inside == (False, False, "highest")
    assert read_older() == before == (allowed, allowed, "high" if allowed else "highest")


def test_encoding_leaves_the_older_settings_readable(
    float32_settings: tuple[nn.Module, ...], random_pixels: Tensor
) -> None:
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    encode(load(TINY), random_pixels, ["cls"])
    assert (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32) == before


def test_encoding_is_exact(float32_settings: tuple[nn.Module, ...]) -> None:
    for setting in float32_settings:
        setting.fp32_precision = "tf32"
    seen = []

    class Witness(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            seen.extend(setting.fp32_precision for setting in float32_settings)
            return images.flatten(1)

    encoder = build_encoder(own(Witness()), device=CPU, precision="fp32")
    encode(encoder, torch.zeros(1, 32, 32, 3, dtype=torch.uint8), ["out"])
    assert seen == ["ieee", "ieee"]


# Compilation.


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224?img_size=32&patch_size=8&depth=2", "resnet18"])
def test_compiled_network_keeps_its_weights_and_features(name: str) -> None:
    checkpoint = read_checkpoint(f"random:{name}")
    plain, compiled = (
        build_encoder(checkpoint, device=CPU, precision="fp32", image_pixels=32, compiled=is_compiled)
        for is_compiled in (False, True)
    )
    pixels = torch.randint(0, 256, (2, 32, 32, 3), dtype=torch.uint8)
    with torch.compiler.set_stance("force_eager"):  # a compiler takes many seconds, and is torch's own concern
        found = encode(compiled, pixels, plain.taps[:1])
    assert torch.equal(found[plain.taps[0]], encode(plain, pixels, plain.taps[:1])[plain.taps[0]])
    assert weights_sha256(compiled.network.state_dict()) == weights_sha256(plain.network.state_dict())


def test_compiled_blocks_are_handed_to_the_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    handed: list[str] = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module: handed.append(type(module).__name__))
    checkpoint = read_checkpoint("random:vit_tiny_patch16_224?img_size=32&patch_size=8&depth=2")
    build_encoder(checkpoint, device=CPU, precision="fp32", compiled=True)
    assert handed == ["Block", "Block"]


def test_convolutions_run_channels_last_except_in_own_modules() -> None:
    encoder = build_encoder(read_checkpoint("random:resnet18"), device=CPU, precision="fp32")
    assert encoder.network.conv1.weight.is_contiguous(memory_format=torch.channels_last)
    own_encoder = build_encoder(own(nn.Conv2d(3, 4, 3)), device=CPU, precision="fp32")
    assert own_encoder.network.weight.is_contiguous()


@pytest.mark.parametrize(
    ("name", "rank", "device"), [("auto", 1, "cuda:1"), ("cuda", 0, "cuda:0"), ("cuda:0", 1, "cuda:0")]
)
def test_rank_gets_the_gpu_of_its_number_by_default(
    monkeypatch: pytest.MonkeyPatch, name: str, rank: int, device: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert str(choose_device(name, local_rank=rank)) == device


@pytest.mark.parametrize("name", ["auto", "cuda"])
def test_rank_that_sees_one_gpu_takes_it(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert str(choose_device(name, local_rank=3)) == "cuda:0"


def test_rank_without_a_gpu_of_its_own_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UsageError, match="PyTorch sees 2 CUDA devices\nUse --device cpu, cuda:0, cuda:1; if a GPU"):
        choose_device("auto", local_rank=2)


def test_network_that_is_not_a_transformer_is_compiled_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    handed: list[object] = []
    monkeypatch.setattr(torch, "compile", lambda function: handed.append(function) or function)
    monkeypatch.setattr(nn.Module, "compile", lambda module: handed.append(module))
    for checkpoint in (read_checkpoint("random:resnet18"), own(nn.Flatten())):
        build_encoder(checkpoint, device=CPU, precision="fp32", compiled=True)
    assert len(handed) == 2


def test_encoder_of_pixels_is_built_without_importing_timm(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name == "timm" or name.startswith("timm.")]:
        monkeypatch.delitem(sys.modules, name)

    build_encoder(read_checkpoint("pixels"), device=CPU, precision="fp32")

    assert "timm" not in sys.modules
