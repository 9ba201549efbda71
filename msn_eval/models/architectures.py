"""Architecture: the network that weights belong to, recognised by their shapes or named by the user."""

import ast
import math
import re
import urllib.parse
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor

from msn_eval.errors import CheckpointError

# No weight's shape shows the number of heads; these are the published ones.
_HEADS_BY_WIDTH = {192: 3, 384: 6, 768: 12, 1024: 16, 1280: 16, 1408: 16, 1664: 16}
_GATED_HEADS_BY_WIDTH = {**_HEADS_BY_WIDTH, 1536: 24}  # networks of this width without gates have 16
_OPEN_WIDTH = 768  # published with two numbers of heads where there is no class token
_SIZE_BY_WIDTH_AND_DEPTH = {(192, 12): "tiny", (384, 12): "small", (768, 12): "base", (1024, 24): "large"}
_SIZE_BY_WIDTH_AND_DEPTH |= {(1280, 32): "huge", (1408, 40): "giant", (1536, 40): "giant2", (1664, 48): "gigantic"}
_MAX_DEPTH = 256
IMAGE_CHANNELS = 3
_DIMENSIONS = {"patch_embed.proj.weight": 4, "pos_embed": 3, "reg_token": 3} | dict.fromkeys(
    ("blocks.0.attn.qkv.weight", "blocks.0.mlp.fc1.weight", "blocks.0.mlp.fc2.weight"), 2
)
# Keywords of timm.create_model that would open other files, search for weights, or build for another device.
NOT_KEYWORDS = (
    *("pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "pretrained_strict", "pretrained_filter_fn"),
    *("pretrained_model_args", "checkpoint_path", "cache_dir", "scriptable", "exportable", "no_jit", "device", "dtype"),
)
_MAX_NUMBER = 1 << 14  # of a keyword: sizes and widths
_MAX_IMAGE_PIXELS = 1 << 12  # some networks compute tables as large as the square of this
_COUNTS = re.compile(r"depths?|(n|num)?_?(blocks?|layers?|stages?)")  # keywords that count blocks
NORM_EPS = 1e-6  # of nearly all published Vision Transformers; no weight shows it
_HUB_SIZES = {"hidden_size": "width", "num_hidden_layers": "depth", "patch_size": "patch", "image_size": ""}
# By the blocks per stage: of two convolutions each, and of three.
_RESNETS: dict[tuple[int, ...], str] = {(2, 2, 2, 2): "resnet18", (3, 4, 6, 3): "resnet34"}
_DEEP_RESNETS: dict[tuple[int, ...], str] = {
    (3, 4, 6, 3): "resnet50",
    (3, 4, 23, 3): "resnet101",
    (3, 8, 36, 3): "resnet152",
}


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """A network without its classifier and without weights.

    Attributes:
        name: As records show it, timm's where timm has one.
        timm_name: timm's entry, or None for a Transformer that `kind` and `keywords` describe.
        kind: Which Transformer the keywords describe.
        keywords: Arguments of the constructor.
        norm_eps: Epsilon of the layer norms of a Transformer that keywords describe.
        gated: Whether its MLPs multiply values by a SiLU gate (SwiGLU).
        stem: Of a residual network, `cifar` or `cifar_padded` where it is not timm's.
        hub: The config.json of a network that transformers runs.
    """

    name: str
    timm_name: str | None
    kind: Literal["vit", "beit"] = "vit"
    keywords: Mapping[str, object] = field(default_factory=dict)
    norm_eps: float = NORM_EPS
    gated: bool = False
    stem: str | None = None
    hub: Mapping[str, object] | None = None


def name_architecture(text: str) -> Architecture:
    """Parse `NAME` or `NAME?keyword=value&…`, as `--arch` and `random:` take it. `stem=cifar` is ours, all others timm's.

    Raises:
        CheckpointError: The text cannot be parsed, or has a keyword that is refused.
    """
    name, _, query = text.partition("?")
    if not name:
        raise CheckpointError("The architecture has no name", hint="Write for example vit_tiny_patch16_224.")
    try:
        pairs = urllib.parse.parse_qsl(query, strict_parsing=True) if query else []
    except ValueError as error:
        hint = "Write them as vit_tiny_patch16_224?img_size=32&patch_size=4 (quoted, for the shell)."
        raise CheckpointError(f"The keywords of {text!r} cannot be parsed", hint=hint) from error
    keywords = {key: _literal(value) for key, value in pairs}
    stem = keywords.pop("stem", None)
    for key, value in keywords.items():
        check_keyword(key, value)
    return Architecture(name=text, timm_name=name, keywords=keywords, stem=None if stem is None else str(stem))


def name_hub_architecture(config: Mapping[str, Any]) -> Architecture:
    """Return the architecture that transformers runs by a config.json, named by its type and sizes."""
    name = str(config["model_type"])
    stated = config.get("vision_config")
    sizes = stated if isinstance(stated, Mapping) else config
    for key, word in _HUB_SIZES.items():
        if type(value := sizes.get(key)) is int:
            name += f"_{word}{value}"
    return Architecture(name=name, timm_name=None, hub=config)


def spell_architecture(architecture: Architecture) -> str | None:
    """Return an architecture as `--arch` takes it, None for a Transformer that is not timm's."""
    if architecture.timm_name is None or "?" in architecture.name:
        return None if architecture.timm_name is None else architecture.name
    keywords = {**architecture.keywords} | ({} if architecture.stem is None else {"stem": architecture.stem})
    return architecture.timm_name + (f"?{urllib.parse.urlencode(keywords)}" if keywords else "")


def check_keyword(name: str, value: object) -> None:
    """Check a keyword of one of timm's architectures before the network is built, which could take hours.

    Raises:
        CheckpointError: It would read files or other weights, or is larger than in any network, or the network does not take
            square images of three channels.
    """
    if name in NOT_KEYWORDS or isinstance(value, Mapping):
        what = f"{name}={value!s:.60} is not a keyword of an architecture"
        hint = "Leave it out: weights come only from the file. Or wrap the network: py:package.module:factory."
        raise CheckpointError(what, hint=hint)
    limit = _MAX_IMAGE_PIXELS if name == "img_size" else _MAX_DEPTH if _COUNTS.fullmatch(name) else _MAX_NUMBER
    pending = [value]
    for item in pending:  # no recursion: a file may nest lists deeply
        pending += item if isinstance(item, list | tuple) else []
    if not all(abs(item) <= limit for item in pending if isinstance(item, int | float)):
        hint = "Name an architecture that exists, or wrap the network: py:package.module:factory."
        raise CheckpointError(f"{name}={value!s:.60} is above the largest supported number, {limit:,}", hint=hint)
    if name in ("img_size", "patch_size"):
        check_square(name, value)
    if name == "in_chans":
        check_channels(value)


def check_square(name: str, sides: object, *, where: str = "") -> None:
    """Raise CheckpointError for images or patches whose `sides` are several numbers that differ."""
    if isinstance(sides, list | tuple) and len({*map(str, sides)}) > 1:
        what = f"{name} is {sides!s:.60}: only square images and patches are supported"
        hint = "Wrap the network in a module that takes squares: py:package.module:factory."
        raise CheckpointError(what, where=where, hint=hint)


def check_channels(channels: object, *, where: str = "") -> None:
    """Raise CheckpointError for a network whose images do not have three channels."""
    if channels != IMAGE_CHANNELS:
        what = f"The network takes images of {channels!s:.20} channels; images here have {IMAGE_CHANNELS}"
        hint = "Wrap it in a module that makes its channels from RGB: py:package.module:factory."
        raise CheckpointError(what, where=where, hint=hint)


def _literal(text: str) -> object:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return text


def recognise_architecture(
    weights: Mapping[str, Tensor], *, heads: int | None = None, norm_eps: float | None = None, padded_stem: bool = False
) -> Architecture:
    """Recognise the architecture by the names and shapes of a backbone's weights.

    Args:
        weights: By timm's names.
        heads: Number of attention heads, where something beside the weights states it.
        norm_eps: Epsilon of the layer norms, likewise.
        padded_stem: Whether a 3 x 3 stem is padded by two pixels, which no weight shows either.

    Raises:
        CheckpointError: The weights leave it open.
    """
    if "patch_embed.proj.weight" in weights and "blocks.0.attn.qkv.weight" in weights:
        for name, dimensions in _DIMENSIONS.items():
            if name in weights and (weights[name].dim() != dimensions or not weights[name].numel()):
                shape = tuple(weights[name].shape)
                raise _unknown(f"{name} of shape {shape} does not belong to a known Vision Transformer")
        return _recognise_transformer(weights, heads, norm_eps)
    if "layer1.0.conv1.weight" in weights and "bn1.weight" in weights:
        return _recognise_resnet(weights, "cifar_padded" if padded_stem else "cifar")
    shown = ", ".join(sorted(weights)[:4])
    raise _unknown(f"The names of the weights ({shown}, …) are not those of a known architecture", ", one of timm's")


def _unknown(what: str, example: str = "") -> CheckpointError:
    return CheckpointError(what, hint=f"Name its architecture: --arch NAME{example}.")


def _describe_vit(weights: Mapping[str, Tensor]) -> tuple[int, dict[str, object]]:
    """Return the patches per side of a Vision Transformer, and its own keywords."""
    if "norm_pre.weight" in weights:
        what = (
            "a Vision Transformer with a norm before its blocks, as CLIP's: no weight shows its activation and epsilon"
        )
        raise _unknown(what, ", such as vit_base_patch16_clip_quickgelu_224")
    if not weights.keys() & {"cls_token", "norm.weight", "blocks.0.attn.qkv.bias", "blocks.0.ls1.gamma"}:
        what = "a Vision Transformer without class token, final norm, biases of its queries and scaled residuals: "
        what += "timm's networks with norms behind their layers and those with norms before them have the same weights"
        raise _unknown(what, ", such as vit_base_patch16_rpn_224")
    has_class_token, has_final_norm = "cls_token" in weights, "norm.weight" in weights
    registers = weights["reg_token"].shape[1] if "reg_token" in weights else 0
    grid, class_position = _position_grid(weights, has_class_token=has_class_token, registers=registers)
    return grid, {
        "qkv_bias": "blocks.0.attn.qkv.bias" in weights,
        "qk_norm": "blocks.0.attn.q_norm.weight" in weights,
        "init_values": 1.0 if "blocks.0.ls1.gamma" in weights else None,
        "class_token": has_class_token,
        "no_embed_class": not class_position,
        "reg_tokens": registers,
        "global_pool": "token" if has_class_token and has_final_norm else "avg",
        "fc_norm": not has_final_norm,
    }


def _describe_beit(weights: Mapping[str, Tensor]) -> tuple[int, dict[str, object]]:
    """Return the patches per side and the own keywords of BEiT and its relatives such as data2vec: relative positions per block
    or shared, scaled residuals."""
    if tables := _bias_tables(weights):
        # A table has a row for each offset between two of g x g patches, and three for the class token.
        grid = (math.isqrt(max(0, len(weights[tables[0]]) - 3)) + 1) // 2
    else:
        grid, _ = _position_grid(weights, has_class_token=True, registers=0)
    return grid, {
        "qkv_bias": "blocks.0.attn.q_bias" in weights,
        "init_values": 1.0 if "blocks.0.gamma_1" in weights else None,
        "use_abs_pos_emb": "pos_embed" in weights,
        "use_rel_pos_bias": "blocks.0.attn.relative_position_bias_table" in weights,
        "use_shared_rel_pos_bias": "rel_pos_bias.relative_position_bias_table" in weights,
        "use_fc_norm": "norm.weight" not in weights,
    }


def _recognise_transformer(weights: Mapping[str, Tensor], heads: int | None, norm_eps: float | None) -> Architecture:
    tables = _bias_tables(weights)
    kind: Literal["vit", "beit"] = "beit" if tables or "blocks.0.gamma_1" in weights else "vit"
    grid, own = _describe_beit(weights) if kind == "beit" else _describe_vit(weights)
    if tables:
        heads = heads or weights[tables[0]].shape[1]
    width, channels, patch, patch_width = weights["patch_embed.proj.weight"].shape
    check_channels(channels)
    if patch != patch_width:
        raise _unknown(f"a Vision Transformer with patches of {patch} x {patch_width} pixels")
    depth = 1 + max(int(match[1]) for name in weights if (match := re.match(r"blocks\.(\d{1,4})\.", name)))
    if depth > _MAX_DEPTH:
        raise _unknown(f"a Vision Transformer with a block {depth - 1}")
    first, second = (weights.get(f"blocks.0.mlp.fc{layer}.weight") for layer in (1, 2))
    if first is None or second is None:
        raise _unknown("a Vision Transformer whose blocks have no mlp.fc1 and mlp.fc2")
    hidden = first.shape[0]
    gated = hidden == 2 * second.shape[1]  # one half of the outputs gates the other half
    if heads is None and width == _OPEN_WIDTH and not gated and not weights.keys() & {"cls_token", "reg_token"}:
        what = f"a Vision Transformer of width {width} without class token has 12 or 16 heads, which no weight shows"
        named = f"class_token=False&global_pool=avg&patch_size={patch}&img_size={grid * patch}"
        hint = "Name it: --arch vit_base_patch16_gap_224 (16 heads), "
        hint += f"or --arch 'vit_base_patch16_224?{named}' (12 heads)."
        raise CheckpointError(what, hint=hint)
    heads = heads or (_GATED_HEADS_BY_WIDTH if gated else _HEADS_BY_WIDTH).get(width)
    if heads is None:
        what = f"a Vision Transformer of width {width} and depth {depth}: no weight's shape shows its number of heads, "
        what += f"and no published architecture has this width (known: {', '.join(map(str, _HEADS_BY_WIDTH))})"
        shown = f"embed_dim={width}&depth={depth}&patch_size={patch}"
        hint = f"Name it: --arch 'vit_tiny_patch16_224?{shown}&num_heads=N&img_size=N'."
        raise CheckpointError(what, hint=hint)
    keywords = {
        "img_size": grid * patch,
        "patch_size": patch,
        "embed_dim": width,
        "depth": depth,
        "num_heads": heads,
        # timm rounds the product down, so add half a unit where the ratio is not exact.
        "mlp_ratio": hidden / width if int(hidden / width * width) == hidden else (hidden + 0.5) / width,
        **own,
    }
    norm_eps = norm_eps or NORM_EPS
    size = _SIZE_BY_WIDTH_AND_DEPTH.get((width, depth), f"width{width}_depth{depth}")
    registers = f"_reg{own['reg_tokens']}" if own.get("reg_tokens") else ""
    name = f"{kind}_{size}_patch{patch}{registers}_{grid * patch}"
    # Networks that compute differently have different names.
    name += "" if heads == _GATED_HEADS_BY_WIDTH.get(width) else f"_heads{heads}"
    name += "" if norm_eps == NORM_EPS else f"_eps{norm_eps:g}"
    return Architecture(name=name, timm_name=None, kind=kind, keywords=keywords, norm_eps=norm_eps, gated=gated)


def _bias_tables(weights: Mapping[str, Tensor]) -> list[str]:
    return [name for name in weights if name.endswith("relative_position_bias_table") and weights[name].dim() == 2]


def _position_grid(weights: Mapping[str, Tensor], *, has_class_token: bool, registers: int) -> tuple[int, bool]:
    """Return the patches per side, and whether prefix tokens have positions."""
    if "pos_embed" not in weights:
        raise _unknown("a Vision Transformer without learned positions (pos_embed)")
    positions = weights["pos_embed"].shape[1]
    for prefix in dict.fromkeys((int(has_class_token) + registers, int(has_class_token), 0)):
        grid = math.isqrt(max(0, positions - prefix))
        if grid and grid * grid == positions - prefix:
            return grid, prefix > 0
    raise _unknown(f"{positions} positions (pos_embed) are not a square grid of patches")


def _recognise_resnet(weights: Mapping[str, Tensor], small_stem: str) -> Architecture:
    blocks = {
        (int(match[1]), int(match[2])) for name in weights if (match := re.match(r"layer([1-4])\.(\d{1,4})\.", name))
    }
    depths = tuple(1 + max(block for of, block in blocks if of == stage) for stage in sorted({of for of, _ in blocks}))
    name = (_DEEP_RESNETS if "layer1.0.conv3.weight" in weights else _RESNETS).get(depths)
    if name is None or weights["layer1.0.conv1.weight"].shape[:1] != (64,):
        what = f"a residual network with {depths} blocks per stage, which is not ResNet-18, 34, 50, 101 or 152"
        raise _unknown(what, ", one of timm's")
    stem = weights["conv1.weight"].shape if "conv1.weight" in weights else ()
    if len(stem) == 4:
        check_channels(stem[1])
    if stem[2:] == (3, 3):
        return Architecture(name=f"{name}?stem={small_stem}", timm_name=name, stem=small_stem)
    return Architecture(name=name, timm_name=name)
