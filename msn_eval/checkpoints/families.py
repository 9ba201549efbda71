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
    named = (on_top.get(f"{name}.weight") for name in ("head", "heads.head", "heads", "fc", "classifier"))
    return next((len(matrix) for matrix in named if matrix is not None and matrix.dim() == 2), None)


def _drop(family: str, tensors: _Names, pattern: re.Pattern[str] = _HEADS) -> Backbone:
    dropped = tuple(name for name in tensors if pattern.match(name))
    kept = {name: tensor for name, tensor in tensors.items() if not pattern.match(name)}
    return Backbone(format=family, weights=kept, dropped=dropped)


_VIT_DROPPED = re.compile(
    r"(head|head_dist|fc|lm_head|cls_pt_layers|projection_head|prototypes|predictor|projector)\b"
    r"|mask_token$|masked_embed$|decoder_|queue|.*relative_position_index$"
)
# DINOv2 trains its blocks in chunks; the second number is the block.
_VIT_NAMES = {r"^blocks\.\d+\.(\d+)\.": r"blocks.\1.", r"\.mlp\.w12\.": ".mlp.fc1.", r"\.mlp\.w3\.": ".mlp.fc2."}
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
    kept = _drop(family, network.tensors, _VIT_DROPPED)
    heads = _IJEPA_HEADS.get(width) if family == "ijepa" else None
    if (is_mocov3 or is_solo_mae) and width <= _MOCOV3_MAX_WIDTH:
        heads = _MOCOV3_HEADS
    if is_mocov3 and family == "timm":
        family = "mocov3"
    positions = family if family in _OWN_POSITIONS else None
    # A file of DINO's or MSN's backbone alone looks like one of timm's.
    if family == "timm" and "cls_token" in network.tensors and not any(map(_HEADS.match, network.tensors)):
        positions = "open"
    weights = _move_class_position(_rename(kept.weights, _VIT_NAMES))
    return replace(kept, format=family, positions=positions, weights=weights, heads=heads)


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
    is_square = copies == 1 and 4 <= grid * grid == tokens - 1 <= _MOCOV3_MAX_PATCHES
    if not is_square or width % 4 or not 0 < width <= _MOCOV3_MAX_WIDTH:
        return False
    from timm.layers import build_sincos2d_pos_embed

    fixed = build_sincos2d_pos_embed([grid, grid], width, interleave_sin_cos=True)
    if column_first:
        fixed = fixed.roll(width // 2, dims=1)
    stored = positions[0].double()
    return not stored[0].any() and bool((stored[1:] - fixed).abs().max() < 1e-2)  # bfloat16 keeps two digits


def _find_vit_family(network: StoredNetwork) -> str:
    names, words, beside = network.tensors, set(network.words), network.beside
    is_scaled = any(name.endswith(".ls1.gamma") for name in names)
    signs = {
        "beit": names.keys() & {"blocks.0.gamma_1", "blocks.0.attn.relative_position_bias_table"},
        "dinov2": "register_tokens" in names or ("mask_token" in names and is_scaled),
        "mae": any(name.startswith("decoder_") for name in names),
        "mocov3": words & {"base_encoder", "momentum_encoder"},
        "ijepa": "cls_token" not in names and words & {"target_encoder", "encoder"},
        "msn": "target_encoder" in words or any(name.startswith("fc.") for name in names),
        "ibot": "masked_embed" in names or _has(beside, "last_layer2", "mlp2"),
        "dino": words & {"teacher", "student"},
    }
    return next((family for family, sign in signs.items() if sign), None) or _find_library(network, "timm")


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


def _rename(tensors: _Names, rules: Mapping[str, str]) -> dict[str, Tensor]:
    """Rename tensors. A second one of the same name gets a name that fits no network, so that none is lost."""
    renamed: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        new_name = name
        for pattern, replacement in rules.items():
            new_name = re.sub(pattern, replacement, new_name)
        renamed[f"{name} (a second {new_name})" if new_name in renamed else new_name] = tensor
    return renamed


def _move_class_position(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Add the class token's position to it. DINOv2's registers come after the class token and have no position; in timm
    no prefix token of such a network has one."""
    names = ("register_tokens", "cls_token", "pos_embed")
    if not weights.keys() >= {*names}:
        return weights
    registers, token, positions = (weights[name] for name in names)
    if positions.dim() != 3 or token.shape != positions[:, :1].shape:
        return weights  # which then fit no network
    if not (token.is_floating_point() and positions.is_floating_point()):
        return weights
    # torch has no sums of float8.
    token, positions = (part.float() if part.dtype.itemsize == 1 else part for part in (token, positions))
    others = {name: tensor for name, tensor in weights.items() if name != "register_tokens"}
    return others | {"cls_token": token + positions[:, :1], "pos_embed": positions[:, 1:], "reg_token": registers}


_RESNET_DROPPED = re.compile(r"(fc|head|classifier|projection_head|prototypes|projector|predictor|queue|queue_ptr)\b")


def read_resnet(network: StoredNetwork) -> Backbone:
    """Read a residual network by torchvision's names."""
    return _drop(_find_resnet_family(network), network.tensors, _RESNET_DROPPED)


def _find_resnet_family(network: StoredNetwork) -> str:
    words, names = set(network.words), network.tensors
    signs = {
        "moco": words & {"encoder_q", "encoder_k"},
        "mocov3": words & {"base_encoder", "momentum_encoder"},
        "swav": _has(names, "prototypes", "projection_head"),
        "simsiam": "encoder" in words and _has(network.beside, "predictor"),
        "dino": words & {"teacher", "student"},
    }
    return next((family for family, sign in signs.items() if sign), None) or _find_library(network, "torchvision")


_SEQUENTIAL_NAMES = {r"^0\.": "conv1.", r"^1\.": "bn1."}
_SEQUENTIAL_NAMES |= {rf"^{stage + 3}\.": f"layer{stage}." for stage in range(1, 5)}


def read_sequential_resnet(network: StoredNetwork) -> Backbone:
    """Read a residual network that lost its names as nn.Sequential(*list(resnet.children())[:-1])."""
    return _drop("lightly", _rename(network.tensors, _SEQUENTIAL_NAMES))


# torchvision's names, and those of Hugging Face: of transformers before its version 5, which its files still carry, and since.
_OTHER_NAMES = {
    r"^(?:class_token|embeddings\.cls_token)$": "cls_token",
    r"^embeddings\.register_tokens$": "register_tokens",
    r"^(?:encoder\.pos_embedding|embeddings\.position_embeddings)$": "pos_embed",
    r"^(?:conv_proj|embeddings\.patch_embeddings\.projection)\.": "patch_embed.proj.",
    r"^(?:encoder\.ln|layernorm)\.": "norm.",
    r"^pooler\.layernorm\.": "fc_norm.",
    r"^(?:encoder\.layers\.encoder_layer_|encoder\.layer\.|layers\.)(\d+)\.": r"blocks.\1.",
    r"^(blocks\.\d+)\.(?:ln_1|layernorm_before)\.": r"\1.norm1.",
    r"^(blocks\.\d+)\.(?:ln_2|layernorm_after)\.": r"\1.norm2.",
    r"^(blocks\.\d+)\.self_attention\.in_proj_": r"\1.attn.qkv.",
    r"^(blocks\.\d+)\.attention\.(?:attention\.query|q_proj)\.": r"\1.attn.q.",
    r"^(blocks\.\d+)\.attention\.(?:attention\.key|k_proj)\.": r"\1.attn.k.",
    r"^(blocks\.\d+)\.attention\.(?:attention\.value|v_proj)\.": r"\1.attn.v.",
    r"^(blocks\.\d+)\.(?:self_attention\.out_proj|attention\.(?:output\.dense|o_proj))\.": r"\1.attn.proj.",
    r"^(blocks\.\d+)\.(?:mlp\.(?:0|linear_1|weights_in)|intermediate\.dense)\.": r"\1.mlp.fc1.",
    r"^(blocks\.\d+)\.(?:mlp\.(?:3|linear_2|weights_out|down_proj)|output\.dense)\.": r"\1.mlp.fc2.",
    r"^(blocks\.\d+)\.layer_scale(\d)\.lambda1$": r"\1.ls\2.gamma",
    r"^(blocks\.\d+)\.lambda_(\d)$": r"\1.gamma_\2",
    r"^(blocks\.\d+)\..*relative_position_bias_table$": r"\1.attn.relative_position_bias_table",
    r"^(?!blocks).*relative_position_bias_table$": "rel_pos_bias.relative_position_bias_table",
}


def read_torchvision_vit(network: StoredNetwork) -> Backbone:
    """Read torchvision's Vision Transformer, which lightly wraps too."""
    backbone = _drop(_find_library(network, "torchvision"), network.tensors)
    return replace(backbone, weights=_rename(backbone.weights, _OTHER_NAMES))


_HUGGINGFACE_DROPPED = re.compile(
    r"(classifier|decoder|lm_head|pooler\.dense)\b|embeddings\.mask_token$|.*relative_position_index$"
)
_HUGGINGFACE_EPS = 1e-12  # of ViT, ViTMAE, I-JEPA and BEiT; ViTMSN and DINOv2 have 1e-6


def read_huggingface(network: StoredNetwork) -> Backbone:
    """Read a Vision Transformer of transformers, with the names before and since its version 5."""
    backbone = _drop("huggingface", network.tensors, _HUGGINGFACE_DROPPED)
    named = _rename(backbone.weights, _OTHER_NAMES)
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
    packed = {re.sub(r"\.attn\.([qv])\.bias$", r".attn.\1_bias", name) if beit else name: named[name] for name in named}
    for name in tuple(packed):
        if match := re.fullmatch(r"(.*\.attn)\.q\.(weight|bias)", name):
            _join(packed, [f"{match[1]}.{part}.{match[2]}" for part in "qkv"], f"{match[1]}.qkv.{match[2]}")
        elif match := re.fullmatch(r"(.*\.mlp)\.gate_proj\.(.*)", name):
            _join(packed, [name, f"{match[1]}.up_proj.{match[2]}"], f"{match[1]}.fc1.{match[2]}")
    return packed


def _join(weights: dict[str, Tensor], parts: list[str], whole: str) -> None:
    """Replace parts by their concatenation; if they do not match, by the first of them alone, which then fits no network."""
    tensors = [weights.pop(part) for part in parts if part in weights]
    dtypes, shapes = {tensor.dtype for tensor in tensors}, {tensor.shape[1:] for tensor in tensors if tensor.dim()}
    can_join = len(dtypes) == 1 or dtypes <= set(_PLAIN_DTYPES)  # torch promotes no float8
    can_join = can_join and len(tensors) == len(parts) and len(shapes) == 1 and all(tensor.dim() for tensor in tensors)
    weights[parts[0] if whole in weights else whole] = torch.cat(tensors) if can_join else tensors[0]
