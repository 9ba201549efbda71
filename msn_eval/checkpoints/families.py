"""Families: how published files name the weights of a network, and the same weights by timm's names.

The table of the families is `networks.FAMILIES`.
"""

import math
import pkgutil
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor

from msn_eval.checkpoints.networks import FAMILIES, StoredNetwork

_Names = Mapping[str, Tensor]
_PLAIN_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_HEADS = re.compile(r"(head|head_dist|heads|fc|classifier)\.")
_Rules = tuple[tuple[re.Pattern[str], str], ...]


@dataclass(frozen=True, kw_only=True)
class Backbone:
    """The evaluated weights by timm's names, without heads.

    Attributes:
        format: The family: msn, dino, ibot, dinov2, mae, mocov3, ijepa, beit, moco, simsiam, swav, solo-learn, lightly,
            huggingface, timm, torchvision, or other.
        weights: By name.
        dropped: The file's names of what is in the network and not evaluated: heads, decoders, mask tokens.
        heads: Attention heads, where the family differs from what the width implies.
        norm_eps: Epsilon of the layer norms, where the family differs from 1e-6.
        positions: Whose interpolation of position embeddings applies: `msn`, `dino`, `ibot`, `dinov2`; None for timm's; `open`
            where the weights may be those of either.
    """

    format: str
    weights: Mapping[str, Tensor]
    dropped: tuple[str, ...]
    heads: int | None = None
    norm_eps: float | None = None
    positions: str | None = None


def rename_weights(network: StoredNetwork) -> Backbone:
    """Return the backbone of a stored network by timm's names. Names that no family knows stay as they are."""
    for anchor, target in FAMILIES.items():
        if anchor in network.tensors:
            return cast(Backbone, pkgutil.resolve_name(target)(network))
    return _drop("other", network.tensors)


def classifier_classes(network: StoredNetwork) -> int | None:
    """Return the number of classes of a supervised classifier on top of a network, None without one.

    A single matrix by one of a classifier's names counts; the projection heads of pre-training have several layers. Only
    Hugging Face keeps it beside a network: what others keep there are probes of the training.
    """
    on_top = dict(network.tensors)
    if "embeddings.patch_embeddings.projection.weight" in network.tensors:
        on_top |= network.beside
    for name in ("head", "heads.head", "heads", "fc", "classifier"):
        matrix = on_top.get(f"{name}.weight")
        if matrix is not None and matrix.dim() == 2:
            return matrix.shape[0]
    return None


def _drop(family: str, tensors: _Names, pattern: re.Pattern[str] = _HEADS) -> Backbone:
    dropped = tuple(name for name in tensors if pattern.match(name))
    kept = {name: tensor for name, tensor in tensors.items() if not pattern.match(name)}
    return Backbone(format=family, weights=kept, dropped=dropped)


_VIT_DROPPED = re.compile(
    r"(head|head_dist|fc|lm_head|cls_pt_layers|projection_head|prototypes|predictor|projector)\b"
    r"|mask_token$|masked_embed$|decoder_|queue"
)
_VIT_NAMES: _Rules = (
    # DINOv2 trains its blocks in chunks; the second number is the block.
    (re.compile(r"^blocks\.\d+\.(\d+)\."), r"blocks.\1."),
    (re.compile(r"\.mlp\.w12\."), ".mlp.fc1."),
    (re.compile(r"\.mlp\.w3\."), ".mlp.fc2."),
)
_IJEPA_HEADS = {768: 12}  # others of this width without class token have 16
# The families whose authors interpolate position embeddings in another way than timm.
_OWN_POSITIONS = ("msn", "dino", "ibot", "dinov2")
_MOCOV3_HEADS = 12  # of its small network as of its base, and of solo-learn's tiny one
_MOCOV3_MAX_WIDTH, _MOCOV3_MAX_PATCHES = 768, 1 << 14


def read_vit(network: StoredNetwork) -> Backbone:
    """Read a Vision Transformer by timm's names: timm itself, and the many that copied them."""
    family = _find_vit_family(network)
    # MoCo v3's networks come in other families' files too, where only their positions identify them.
    is_mocov3 = family == "mocov3" or (family in ("timm", "solo-learn") and _has_fixed_positions(network.tensors))
    # solo-learn's MAE has as many heads, and MAE's positions; its other networks learn theirs.
    is_solo_mae = family == "solo-learn" and _has_fixed_positions(network.tensors, column_first=True)
    width = (*network.tensors["patch_embed.proj.weight"].shape, 0)[0]
    narrow = width <= _MOCOV3_MAX_WIDTH
    kept = _drop(family, network.tensors, _VIT_DROPPED)
    # Tables of indices are computed, not learned.
    learned = {name: tensor for name, tensor in kept.weights.items() if not name.endswith("relative_position_index")}
    return replace(
        kept,
        format="mocov3" if is_mocov3 and family == "timm" else family,
        positions=_choose_positions("mocov3" if is_mocov3 else family, network.tensors),
        weights=_move_class_position(_rename(learned, _VIT_NAMES)),
        heads=_MOCOV3_HEADS
        if (is_mocov3 or is_solo_mae) and narrow
        else _IJEPA_HEADS.get(width)
        if family == "ijepa"
        else None,
    )


def _choose_positions(family: str, tensors: _Names) -> str | None:
    """Return whose interpolation of positions applies. A file of DINO's or MSN's backbone alone looks like one of timm's."""
    if family == "timm":
        return None if any(_HEADS.match(name) for name in tensors) or "cls_token" not in tensors else "open"
    return family if family in _OWN_POSITIONS else None


def _has_fixed_positions(tensors: _Names, *, column_first: bool = False) -> bool:
    """Whether positions are fixed: zeros for the class token; for the patches sines and cosines, of the row first as in
    MoCo v3, or of the column first as in MAE.

    Source: github.com/facebookresearch/moco-v3, vits.py; github.com/facebookresearch/mae, util/pos_embed.py.
    """
    positions = tensors.get("pos_embed")
    if positions is None or positions.dim() != 3 or not positions.is_floating_point() or "cls_token" not in tensors:
        return False
    copies, tokens, width = positions.shape
    grid = math.isqrt(max(0, tokens - 1))
    if copies != 1 or not 4 <= grid * grid == tokens - 1 <= _MOCOV3_MAX_PATCHES:
        return False
    if width % 4 or not 0 < width <= _MOCOV3_MAX_WIDTH:
        return False
    stored = positions[0].double()
    frequencies = 10_000.0 ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    angles = torch.arange(grid, dtype=torch.float64)[:, None] * frequencies
    first, second = angles.repeat_interleave(grid, dim=0), angles.repeat(grid, 1)
    if column_first:
        first, second = second, first
    fixed = torch.cat([first.sin(), first.cos(), second.sin(), second.cos()], dim=1)
    return not stored[0].any() and bool((stored[1:] - fixed).abs().max() < 1e-2)  # bfloat16 keeps two digits


def _find_vit_family(network: StoredNetwork) -> str:
    tensors, words, beside = network.tensors, set(network.words), network.beside
    if "blocks.0.gamma_1" in tensors or "blocks.0.attn.relative_position_bias_table" in tensors:
        return "beit"
    is_scaled = any(name.endswith(".ls1.gamma") for name in tensors)
    if "register_tokens" in tensors or ("mask_token" in tensors and is_scaled):
        return "dinov2"
    if any(name.startswith("decoder_") for name in tensors):
        return "mae"
    if words & {"base_encoder", "momentum_encoder"}:
        return "mocov3"
    if "cls_token" not in tensors and words & {"target_encoder", "encoder"}:
        return "ijepa"
    if words & {"target_encoder"} or any(name.startswith("fc.") for name in tensors):
        return "msn"
    if "masked_embed" in tensors or _has(beside, "last_layer2", "mlp2"):
        return "ibot"
    if words & {"teacher", "student"}:
        return "dino"
    return _find_library(network, "timm")


def _has(names: Iterable[str], *words: str) -> bool:
    return any(word in name.split(".") for name in names for word in words)


def _find_library(network: StoredNetwork, otherwise: str) -> str:
    """Recognise training files of solo-learn and lightly by what they keep beside the backbone."""
    words = set(network.words)
    if "backbone" in words and _has(network.beside, "classifier", "online_classifier") and "state_dict" in words:
        return "solo-learn"
    if "vit" in words and words & {"backbone", "anchor_backbone", "student_backbone", "teacher_backbone"}:
        return "lightly"
    return otherwise


def _rename(tensors: _Names, rules: _Rules) -> dict[str, Tensor]:
    """Rename tensors. A second one of the same name gets a name that fits no network, so that none is lost."""
    renamed: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        new_name = name
        for pattern, replacement in rules:
            new_name = pattern.sub(replacement, new_name)
        renamed[f"{name} (a second {new_name})" if new_name in renamed else new_name] = tensor
    return renamed


def _move_class_position(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Add the class token's position to it. DINOv2's registers come after the class token and have no position; in timm
    no prefix token of such a network has one."""
    if "register_tokens" not in weights or "pos_embed" not in weights:
        return weights
    positions, token = weights["pos_embed"], weights.get("cls_token")
    if token is not None and token.dtype == positions.dtype and token.dtype.itemsize == 1 and token.is_floating_point():
        token, positions = token.float(), positions.float()  # torch adds no float8
    if token is None or positions.dim() != 3 or token.shape != positions[:, :1].shape:
        return weights  # which then fit no network
    if not _are_alike([token, positions]):
        return weights
    others = {name: tensor for name, tensor in weights.items() if name != "register_tokens"}
    moved = {"cls_token": token + positions[:, :1], "pos_embed": positions[:, 1:]}
    return others | moved | {"reg_token": weights["register_tokens"]}


_RESNET_DROPPED = re.compile(r"(fc|head|classifier|projection_head|prototypes|projector|predictor|queue|queue_ptr)\b")


def read_resnet(network: StoredNetwork) -> Backbone:
    """Read a residual network by torchvision's names."""
    return _drop(_find_resnet_family(network), network.tensors, _RESNET_DROPPED)


def _find_resnet_family(network: StoredNetwork) -> str:
    words, beside, names = set(network.words), network.beside, network.tensors
    if words & {"encoder_q", "encoder_k"}:
        return "moco"
    if words & {"base_encoder", "momentum_encoder"}:
        return "mocov3"
    if _has(names, "prototypes", "projection_head"):
        return "swav"
    if "encoder" in words and _has(beside, "predictor"):
        return "simsiam"
    if words & {"teacher", "student"}:
        return "dino"
    return _find_library(network, "torchvision")


_SEQUENTIAL_NAMES: _Rules = (
    (re.compile(r"^0\."), "conv1."),
    (re.compile(r"^1\."), "bn1."),
    *((re.compile(rf"^{stage + 3}\."), f"layer{stage}.") for stage in range(1, 5)),
)


def read_sequential_resnet(network: StoredNetwork) -> Backbone:
    """Read a residual network that lost its names as nn.Sequential(*list(resnet.children())[:-1])."""
    return _drop("lightly", _rename(network.tensors, _SEQUENTIAL_NAMES))


_TORCHVISION_NAMES: _Rules = (
    (re.compile(r"^class_token$"), "cls_token"),
    (re.compile(r"^encoder\.pos_embedding$"), "pos_embed"),
    (re.compile(r"^conv_proj\."), "patch_embed.proj."),
    (re.compile(r"^encoder\.ln\."), "norm."),
    (re.compile(r"^encoder\.layers\.encoder_layer_(\d+)\."), r"blocks.\1."),
    (re.compile(r"^(blocks\.\d+)\.ln_(\d)\."), r"\1.norm\2."),
    (re.compile(r"^(blocks\.\d+)\.self_attention\.in_proj_"), r"\1.attn.qkv."),
    (re.compile(r"^(blocks\.\d+)\.self_attention\.out_proj\."), r"\1.attn.proj."),
    (re.compile(r"^(blocks\.\d+)\.mlp\.(?:0|linear_1)\."), r"\1.mlp.fc1."),
    (re.compile(r"^(blocks\.\d+)\.mlp\.(?:3|linear_2)\."), r"\1.mlp.fc2."),
)


def read_torchvision_vit(network: StoredNetwork) -> Backbone:
    """Read torchvision's Vision Transformer, which lightly wraps too."""
    backbone = _drop(_find_library(network, "torchvision"), network.tensors)
    return replace(backbone, weights=_rename(backbone.weights, _TORCHVISION_NAMES))


# Hugging Face: the names of transformers before its version 5, which its files still carry, and those of version 5.

_HUGGINGFACE_DROPPED = re.compile(
    r"(classifier|decoder|lm_head|pooler\.dense)\b|embeddings\.mask_token$|.*relative_position_index$"
)
_HUGGINGFACE_NAMES: _Rules = (
    (re.compile(r"^embeddings\.cls_token$"), "cls_token"),
    (re.compile(r"^embeddings\.register_tokens$"), "register_tokens"),
    (re.compile(r"^embeddings\.position_embeddings$"), "pos_embed"),
    (re.compile(r"^embeddings\.patch_embeddings\.projection\."), "patch_embed.proj."),
    (re.compile(r"^(?:encoder\.layer|layers)\.(\d+)\."), r"blocks.\1."),
    (re.compile(r"^(blocks\.\d+)\.layernorm_before\."), r"\1.norm1."),
    (re.compile(r"^(blocks\.\d+)\.layernorm_after\."), r"\1.norm2."),
    (re.compile(r"^(blocks\.\d+)\.(?:intermediate\.dense|mlp\.weights_in)\."), r"\1.mlp.fc1."),
    (re.compile(r"^(blocks\.\d+)\.(?:output\.dense|mlp\.weights_out|mlp\.down_proj)\."), r"\1.mlp.fc2."),
    (re.compile(r"^(blocks\.\d+)\.attention\.(?:output\.dense|o_proj)\."), r"\1.attn.proj."),
    (re.compile(r"^(blocks\.\d+)\.attention\.(?:attention\.query|q_proj)\."), r"\1.attn.q."),
    (re.compile(r"^(blocks\.\d+)\.attention\.(?:attention\.key|k_proj)\."), r"\1.attn.k."),
    (re.compile(r"^(blocks\.\d+)\.attention\.(?:attention\.value|v_proj)\."), r"\1.attn.v."),
    (re.compile(r"^(blocks\.\d+)\.layer_scale(\d)\.lambda1$"), r"\1.ls\2.gamma"),
    (re.compile(r"^(blocks\.\d+)\.lambda_(\d)$"), r"\1.gamma_\2"),
    (re.compile(r"^(blocks\.\d+)\..*relative_position_bias_table$"), r"\1.attn.relative_position_bias_table"),
    (re.compile(r"^(?!blocks).*relative_position_bias_table$"), "rel_pos_bias.relative_position_bias_table"),
    (re.compile(r"^layernorm\."), "norm."),
    (re.compile(r"^pooler\.layernorm\."), "fc_norm."),
)
_HUGGINGFACE_EPS = 1e-12  # of ViT, ViTMAE, I-JEPA and BEiT; ViTMSN and DINOv2 have 1e-6


def read_huggingface(network: StoredNetwork) -> Backbone:
    """Read a Vision Transformer of transformers, with the names before and since its version 5."""
    backbone = _drop("huggingface", network.tensors, _HUGGINGFACE_DROPPED)
    named = _rename(backbone.weights, _HUGGINGFACE_NAMES)
    beit = any(name.endswith(".gamma_1") for name in named)
    on_top = (*network.beside, *backbone.dropped)
    is_usual = beit or "cls_token" not in named or _has(on_top, "decoder", "pooler")
    positions = None if is_usual or _has(on_top, "classifier") else "msn"
    if any(name.endswith(".ls1.gamma") for name in named):
        positions = "dinov2"
    weights = _move_class_position(_pack(named, beit=beit))
    return replace(backbone, weights=weights, norm_eps=_HUGGINGFACE_EPS if is_usual else None, positions=positions)


def _pack(named: dict[str, Tensor], *, beit: bool) -> dict[str, Tensor]:
    """Concatenate queries, keys and values, and the gate and values of a gated MLP, as timm does."""
    packed = {}
    for name, tensor in named.items():
        block, _, rest = name.partition(".attn.q.")
        gated, _, gate = name.partition(".mlp.gate_proj.")
        if rest == "weight" or (rest == "bias" and not beit):
            packed[f"{block}.attn.qkv.{rest}"] = _stack(named, [f"{block}.attn.{part}.{rest}" for part in "qkv"], name)
        elif gate:
            packed[f"{gated}.mlp.fc1.{gate}"] = _stack(named, [name, f"{gated}.mlp.up_proj.{gate}"], name)
        elif beit and (match := re.fullmatch(r"(.*\.attn)\.([qv])\.bias", name)):
            packed[f"{match[1]}.{match[2]}_bias"] = tensor
        elif not _is_packed_with_another(name, named):
            packed[name] = tensor
    return packed


def _is_packed_with_another(name: str, named: _Names) -> bool:
    """Whether a weight is concatenated with queries or a gate: keys, values and gated values, but not adapters."""
    match = re.fullmatch(r"(.*)(\.attn\.[kv]|\.mlp\.up_proj)\.(weight|bias)", name)
    if match is None:
        return False
    partner = ".mlp.gate_proj" if match[2] == ".mlp.up_proj" else ".attn.q"
    return f"{match[1]}{partner}.{match[3]}" in named


def _stack(named: _Names, parts: list[str], otherwise: str) -> Tensor:
    """Concatenate the parts; if they do not match, return the first alone, which then fits no network."""
    tensors = [named[part] for part in parts if part in named]
    dtypes, shapes = {tensor.dtype for tensor in tensors}, {tensor.shape[1:] for tensor in tensors if tensor.dim()}
    can_join = len(dtypes) == 1 or dtypes <= set(_PLAIN_DTYPES)  # torch promotes no float8
    if len(tensors) == len(parts) and can_join and len(shapes) == 1 and all(tensor.dim() for tensor in tensors):
        return torch.cat(tensors)
    return named[otherwise]


def _are_alike(tensors: list[Tensor]) -> bool:
    """Whether tensors can be computed with together: of floating-point dtypes, and equally many dimensions."""
    return all(tensor.dtype in _PLAIN_DTYPES and tensor.dim() == tensors[0].dim() > 0 for tensor in tensors)
