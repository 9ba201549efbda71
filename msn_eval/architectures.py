"""Architecture: which network a set of weights belongs to, read from the weights' shapes or named by the user."""

import ast
import math
import re
import urllib.parse
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from msn_eval.errors import CheckpointError, nearest

# The number of heads is in no weight's shape; these are the published ones.
_HEADS_BY_WIDTH = {192: 3, 384: 6, 768: 12, 1024: 16, 1280: 16}
_SIZE_BY_WIDTH_AND_DEPTH = {
    (192, 12): "tiny",
    (384, 12): "small",
    (768, 12): "base",
    (1024, 24): "large",
    (1280, 32): "huge",
}
_RESNETS: dict[tuple[tuple[int, ...], bool], str] = {
    ((2, 2, 2, 2), False): "resnet18",
    ((3, 4, 6, 3), False): "resnet34",
    ((3, 4, 6, 3), True): "resnet50",
    ((3, 4, 23, 3), True): "resnet101",
    ((3, 8, 36, 3), True): "resnet152",
}
_RESNET_WIDTH = 64


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """A network without its classifier and without weights.

    name:         as records show it, timm's where timm has one
    timm_name:    timm's entry, or None for a Vision Transformer described by `keywords` alone
    keywords:     what the constructor is given besides
    """

    name: str
    timm_name: str | None
    keywords: Mapping[str, object] = field(default_factory=dict)


def build_network(architecture: Architecture, *, seed: int = 0) -> nn.Module:
    """Build the trunk in eval mode on the CPU, its weights drawn from `seed` without touching the global generator.

    Raises CheckpointError for a name that timm does not know or keywords that it does not take.
    """
    import timm
    from timm.models.vision_transformer import VisionTransformer

    check_architecture_name(architecture)
    keywords = dict(architecture.keywords)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            if architecture.timm_name is None:
                network: nn.Module = VisionTransformer(num_classes=0, **keywords)
            else:
                network = timm.create_model(architecture.timm_name, pretrained=False, num_classes=0, **keywords)
        except (TypeError, ValueError, AssertionError, RuntimeError) as error:
            raise _unbuildable(architecture, error) from error
    return network.eval()


def _unbuildable(architecture: Architecture, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"no network can be built from {architecture.name!r}: {error}",
        remedy="`msn-eval ls checkpoints` shows how architectures and their keywords are written.",
    )


def check_architecture_name(architecture: Architecture) -> None:
    """Raise CheckpointError for a name that timm does not know, with the nearest that it does."""
    import timm

    base = (architecture.timm_name or "").partition(".")[0]
    if base and not timm.is_model(base):
        raise CheckpointError(
            f"timm knows no architecture {base!r}.{nearest(base, timm.list_models())}",
            remedy="timm.list_models() lists their names; a file needs its path.",
        )


def name_architecture(text: str) -> Architecture:
    """Read `NAME` or `NAME?keyword=value&…`, as `--arch` and `random:` take it."""
    name, _, query = text.partition("?")
    if not name:
        raise CheckpointError("an architecture has a name", remedy="Write for example vit_tiny_patch16_224.")
    try:
        pairs = urllib.parse.parse_qsl(query, strict_parsing=True) if query else []
    except ValueError as error:
        raise CheckpointError(
            f"the keywords of {text!r} cannot be read",
            remedy="Write them as vit_tiny_patch16_224?img_size=32&patch_size=4 (quoted, for the shell).",
        ) from error
    return Architecture(name=text, timm_name=name, keywords={key: _literal(value) for key, value in pairs})


def _literal(text: str) -> object:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def recognise_architecture(weights: Mapping[str, Tensor]) -> Architecture:
    """Read the architecture from the names and shapes of a trunk's weights, in timm's naming.

    Raises CheckpointError where they leave it open.
    """
    if "patch_embed.proj.weight" in weights and "blocks.0.attn.qkv.weight" in weights:
        return _recognise_vit(weights)
    if "layer1.0.conv1.weight" in weights and "bn1.weight" in weights:
        return _recognise_resnet(weights)
    shown = ", ".join(sorted(weights)[:4])
    raise CheckpointError(
        f"the architecture cannot be told from the weights' names ({shown}, …)",
        remedy="Name it: --arch NAME, one of timm's.",
    )


def _recognise_vit(weights: Mapping[str, Tensor]) -> Architecture:
    for name, dimensions in (("patch_embed.proj.weight", 4), ("pos_embed", 3), ("blocks.0.mlp.fc1.weight", 2)):
        if name in weights and weights[name].dim() != dimensions:
            raise CheckpointError(
                f"{name} of shape {tuple(weights[name].shape)} belongs to no Vision Transformer that is known",
                remedy="Name its architecture: --arch NAME.",
            )
    if "norm_pre.weight" in weights:
        raise CheckpointError(
            "a Vision Transformer with a norm before its blocks, as CLIP's: its activation and epsilon are in no weight",
            remedy="Name its architecture: --arch NAME, such as vit_base_patch16_clip_quickgelu_224.",
        )
    width, _, patch, _ = weights["patch_embed.proj.weight"].shape
    depth = 1 + max(int(found.group(1)) for name in weights if (found := re.match(r"blocks\.(\d+)\.", name)))
    heads = _HEADS_BY_WIDTH.get(width)
    if heads is None:
        raise CheckpointError(
            f"a Vision Transformer of width {width} and depth {depth}: its number of heads is in no weight's shape, "
            f"and no published architecture has this width (known: {', '.join(map(str, _HEADS_BY_WIDTH))})",
            remedy=f"Name it: --arch 'vit_tiny_patch16_224?embed_dim={width}&depth={depth}&patch_size={patch}&num_heads=N"
            "&img_size=N'.",
        )
    has_class_token = "cls_token" in weights
    registers = weights["reg_token"].shape[1] if "reg_token" in weights else 0
    grid, class_position = _position_grid(weights, has_class_token=has_class_token, registers=registers)
    has_final_norm = "norm.weight" in weights
    keywords: dict[str, object] = {
        "img_size": grid * patch,
        "patch_size": patch,
        "embed_dim": width,
        "depth": depth,
        "num_heads": heads,
        "mlp_ratio": _hidden_width(weights) / width,
        "qkv_bias": "blocks.0.attn.qkv.bias" in weights,
        "qk_norm": "blocks.0.attn.q_norm.weight" in weights,
        "init_values": 1.0 if "blocks.0.ls1.gamma" in weights else None,
        "class_token": has_class_token,
        "no_embed_class": not class_position,
        "reg_tokens": registers,
        "global_pool": "token" if has_class_token and has_final_norm else "avg",
        "fc_norm": not has_final_norm,
    }
    size = _SIZE_BY_WIDTH_AND_DEPTH.get((width, depth), f"width{width}_depth{depth}")
    tokens = f"_reg{registers}" if registers else ""
    name = f"vit_{size}_patch{patch}{tokens}_{grid * patch}"
    return Architecture(name=name, timm_name=None, keywords=keywords)


def _hidden_width(weights: Mapping[str, Tensor]) -> int:
    if "blocks.0.mlp.fc1.weight" not in weights:
        raise CheckpointError(
            "a Vision Transformer whose blocks have no mlp.fc1", remedy="Name its architecture: --arch NAME."
        )
    return weights["blocks.0.mlp.fc1.weight"].shape[0]


def _position_grid(weights: Mapping[str, Tensor], *, has_class_token: bool, registers: int) -> tuple[int, bool]:
    """Give the patches a side and whether prefix tokens have positions of their own."""
    if "pos_embed" not in weights:
        raise CheckpointError(
            "a Vision Transformer without learned positions (pos_embed)", remedy="Name its architecture: --arch NAME."
        )
    positions = weights["pos_embed"].shape[1]
    for prefix in dict.fromkeys((int(has_class_token) + registers, int(has_class_token), 0)):
        grid = math.isqrt(max(0, positions - prefix))
        if grid and grid * grid == positions - prefix:
            return grid, prefix > 0
    raise CheckpointError(
        f"{positions} positions (pos_embed) are no square grid of patches", remedy="Name the architecture: --arch NAME."
    )


def _recognise_resnet(weights: Mapping[str, Tensor]) -> Architecture:
    depths = tuple(
        1 + max(int(found.group(1)) for name in weights if (found := re.match(rf"layer{stage}\.(\d+)\.", name)))
        for stage in range(1, 5)
        if any(name.startswith(f"layer{stage}.") for name in weights)
    )
    name = _RESNETS.get((depths, "layer1.0.conv3.weight" in weights))
    if name is None or weights["layer1.0.conv1.weight"].shape[0] != _RESNET_WIDTH:
        raise CheckpointError(
            f"a residual network with {depths} blocks a stage that is none of ResNet-18, 34, 50, 101, 152",
            remedy="Name it: --arch NAME, one of timm's.",
        )
    return Architecture(name=name, timm_name=name)
