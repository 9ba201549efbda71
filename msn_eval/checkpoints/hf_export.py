"""Export as a folder in Hugging Face layout, by the names that every version of transformers reads."""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from msn_eval.checkpoints.formats.safetensors import save_tensors
from msn_eval.errors import CheckpointError, UsageError
from msn_eval.files.atomic import written_atomically
from msn_eval.models.vit import native_pixels, stored_pixels

RESULT = "msn_eval_result"  # in config.json: the id of the record that describes the network
_EXPORTED = re.compile(
    r"cls_token|reg_token|pos_embed|(patch_embed\.proj|norm)\.(weight|bias)"
    r"|blocks\.\d+\.((norm[12]|attn\.qkv|attn\.proj|mlp\.fc[12])\.(weight|bias)|ls[12]\.gamma)"
)
# Layers by timm's names and by those of transformers.
_MSN_NAMES = {
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
    "attn.proj": "attention.output.dense",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}
_DINOV2_NAMES = {"attn.proj": "attention.output.dense", "ls1": "layer_scale1", "ls2": "layer_scale2"}
_GATED_NAMES = {"mlp.fc1": "mlp.weights_in", "mlp.fc2": "mlp.weights_out"}
_OUTER_NAMES = {
    "patch_embed.proj.weight": "embeddings.patch_embeddings.projection.weight",
    "patch_embed.proj.bias": "embeddings.patch_embeddings.projection.bias",
    "pos_embed": "embeddings.position_embeddings",
    "norm.weight": "layernorm.weight",
    "norm.bias": "layernorm.bias",
    "cls_token": "embeddings.cls_token",
    "reg_token": "embeddings.register_tokens",
}
# The prefix of transformers' class names, by model type.
_MODELS = {"vit_msn": "ViTMSN", "ijepa": "IJepa", "dinov2": "Dinov2", "dinov2_with_registers": "Dinov2WithRegisters"}


@dataclass(frozen=True, kw_only=True)
class Head:
    """A linear layer on the tap `cls-norm` or `mean`: weight (n_classes, d), bias (n_classes,), and the classes' names."""

    weight: Tensor
    bias: Tensor
    tap: str
    classes: Sequence[str]


@dataclass(frozen=True, kw_only=True)
class FolderContent:
    """The content of a folder in Hugging Face layout."""

    config: dict[str, object]  # config.json
    processor: dict[str, object]  # preprocessor_config.json
    tensors: dict[str, Tensor]
    metadata: Mapping[str, str] = field(default_factory=dict)  # what the weight file states about its tensors


def write_folder(out: Path, content: FolderContent, check: Callable[[Path], object] = lambda folder: None) -> None:
    """Write a folder, complete or not at all. `check` gets it before it has its name, and may raise; so may the disk."""
    size = sum(tensor.nbytes for tensor in content.tensors.values())
    with written_atomically(out, f"{size:,} bytes") as temporary:
        temporary.mkdir()
        save_tensors(temporary / "model.safetensors", content.tensors, content.metadata)
        (temporary / "config.json").write_text(json.dumps(content.config, indent=2) + "\n")
        (temporary / "preprocessor_config.json").write_text(json.dumps(content.processor, indent=2) + "\n")
        check(temporary)


def build_folder_content(
    outline: nn.Module, weights: Mapping[str, Tensor], *, name: str, mean: Sequence[float], std: Sequence[float]
) -> FolderContent:
    """Return what transformers reads as the backbone of a Vision Transformer, without a classifier.

    Args:
        outline: The network, with or without values: its blocks, heads and sizes.
        weights: By timm's names.
        name: Of the architecture, for errors.
        mean: A value per channel of its images, on the [0, 1] scale.
        std: The same.

    Raises:
        CheckpointError: transformers has no such network.
    """
    if obstacle := _find_obstacle(outline, weights):
        raise _not_exportable(name, obstacle, "Use --to timm or --to safetensors.")
    model_type = "dinov2" if "blocks.0.ls1.gamma" in weights else "vit_msn"
    model_type = "dinov2_with_registers" if "reg_token" in weights else model_type
    model_type = model_type if "cls_token" in weights else "ijepa"
    (heads, norm_eps), side = cast(tuple[int, float], read_heads_and_epsilon(outline)), native_pixels(outline)
    patches, is_gated = weights["patch_embed.proj.weight"], _is_gated(outline)
    config: dict[str, object] = {
        "architectures": [f"{_MODELS[model_type]}Model"],
        "model_type": model_type,
        "hidden_size": patches.shape[0],
        "num_hidden_layers": len(cast(nn.Sequential, outline.blocks)),
        "num_attention_heads": heads,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "layer_norm_eps": norm_eps,
        "image_size": stored_pixels(outline),
        "patch_size": patches.shape[-1],
        "num_channels": 3,
        "qkv_bias": "blocks.0.attn.qkv.bias" in weights,
        "dtype": str(patches.dtype).removeprefix("torch."),
    }
    if model_type.startswith("dinov2"):
        config |= {"use_swiglu_ffn": is_gated, "layerscale_value": 1.0, "drop_path_rate": 0.0}
        config["mlp_ratio"] = _find_mlp_ratio(weights, is_gated)
    else:
        config["intermediate_size"] = weights["blocks.0.mlp.fc2.weight"].shape[1]
    if "reg_token" in weights:
        config["num_register_tokens"] = weights["reg_token"].shape[1]
    processor = {
        "image_processor_type": "BitImageProcessor",
        **dict.fromkeys(("do_resize", "do_center_crop", "do_rescale", "do_normalize", "do_convert_rgb"), True),
        "size": {"shortest_edge": round(side * 256 / 224)},
        "resample": 2,  # bilinear
        "crop_size": {"height": side, "width": side},
        "rescale_factor": 1 / 255,
        "image_mean": list(mean),
        "image_std": list(std),
    }
    return FolderContent(config=config, processor=processor, tensors=_rename_tensors(weights, model_type, is_gated))


def read_heads_and_epsilon(network: nn.Module) -> tuple[int, float] | None:
    """Return what no weight's shape shows of a Transformer, None for others: the number of heads, and the norms' epsilon."""
    from timm.models.beit import Beit
    from timm.models.vision_transformer import VisionTransformer

    if not isinstance(network, VisionTransformer | Beit):
        return None
    block = cast(nn.Sequential, network.blocks)[0]
    return cast(int, block.attn.num_heads), cast(float, block.norm1.eps)  # type: ignore[union-attr]


def _not_exportable(name: str, obstacle: str, hint: str) -> CheckpointError:
    return CheckpointError(f"{name} cannot be written for transformers: {obstacle}", hint=hint)


def _is_gated(outline: nn.Module) -> bool:
    from timm.layers import GluMlp

    return any(isinstance(module, GluMlp) for module in outline.modules())


def _find_obstacle(outline: nn.Module, weights: Mapping[str, Tensor]) -> str | None:
    """Return what transformers' Vision Transformers cannot compute of a network, None where they can."""
    from timm.models.vision_transformer import Block, VisionTransformer

    if type(outline) is not VisionTransformer:
        return f"it is a {type(outline).__name__}, not a plain Vision Transformer"
    block = cast(nn.Sequential, outline.blocks)[0]
    if type(block) is not Block:
        return f"its blocks are {type(block).__name__}s"
    special = ("reg_token", "blocks.0.ls1.gamma", "cls_token")
    has_registers, is_scaled, has_class_token = (name in weights for name in special)
    mlp, is_gated = cast(nn.Module, block.mlp), _is_gated(outline)
    missing = [name for name in ("norm.weight", "pos_embed") if name not in weights]
    unknown = [name for name in weights if not _EXPORTED.fullmatch(name)]
    narrow = [tensor.dtype for tensor in weights.values() if tensor.is_floating_point() and tensor.dtype.itemsize == 1]
    for applies, obstacle in (
        (type(mlp.act) is not (nn.SiLU if is_gated else nn.GELU), f"its activation is {type(mlp.act).__name__}"),
        (is_gated and not is_scaled, "its MLPs are gated"),
        (narrow, f"a weight is {str(*narrow[:1]).removeprefix('torch.')}, with which transformers does not compute"),
        (missing, f"it has no {', '.join(missing)}"),
        (unknown, f"it has {', '.join(unknown[:3])}"),
        (has_registers and not is_scaled, "it has registers and no scaled residuals"),
        (is_scaled and not has_class_token, "it has scaled residuals and no class token"),
    ):
        if applies:
            return obstacle
    stored = weights["pos_embed"].shape[1]
    positions = cast(int, cast(nn.Module, outline.patch_embed).num_patches) + int(has_class_token and not has_registers)
    if stored != positions:
        return f"it has {stored} positions; the patches and a class token have {positions}"
    if not _find_mlp_ratio(weights, is_gated):
        hidden = weights["blocks.0.mlp.fc2.weight"].shape[1]
        return f"its gated MLPs are {hidden} wide, which transformers' DINOv2 cannot be"
    return None


def _find_mlp_ratio(weights: Mapping[str, Tensor], is_gated: bool) -> float:
    """Return DINOv2's `mlp_ratio`, 0 where none gives gated MLPs of their width."""
    width, hidden = weights["blocks.0.mlp.fc2.weight"].shape
    ratio = hidden / width
    if is_gated:
        # transformers uses two thirds of ratio x width, rounded up to a multiple of 8.
        candidates = (4, hidden * 3 / 2 / width)
        ratio = next((value for value in candidates if (int(int(width * value) * 2 / 3) + 7) // 8 * 8 == hidden), 0)
    return int(ratio) if ratio == int(ratio) else ratio


def _rename_tensors(weights: Mapping[str, Tensor], model_type: str, is_gated: bool) -> dict[str, Tensor]:
    """Return the tensors by transformers' names."""
    is_dinov2 = model_type.startswith("dinov2")
    names = (_DINOV2_NAMES if is_dinov2 else _MSN_NAMES) | (_GATED_NAMES if is_gated else {})
    optional = {"cls_token", "reg_token"} - weights.keys()
    renamed = {theirs: weights[own] for own, theirs in _OUTER_NAMES.items() if own not in optional}
    if is_dinov2:
        renamed["embeddings.mask_token"] = weights["pos_embed"].new_zeros(1, weights["pos_embed"].shape[2])
    if "reg_token" in weights:
        # timm has added its position to the class token; transformers adds it.
        positions = torch.cat([torch.zeros_like(weights["cls_token"]), weights["pos_embed"]], dim=1)
        renamed["embeddings.position_embeddings"] = positions
    for name, tensor in weights.items():
        if match := re.fullmatch(r"blocks\.(\d+)\.(.+)\.(\w+)", name):
            number, layer, kind = match.groups()
            prefix, kind = f"encoder.layer.{number}", "lambda1" if kind == "gamma" else kind
            if layer == "attn.qkv":  # transformers keeps queries, keys and values apart
                for own, third in zip(("query", "key", "value"), tensor.chunk(3), strict=True):
                    renamed[f"{prefix}.attention.attention.{own}.{kind}"] = third
            else:
                renamed[f"{prefix}.{names.get(layer, layer)}.{kind}"] = tensor
    return renamed


def build_classifier_content(backbone: FolderContent, head: Head, *, name: str, result_id: str) -> FolderContent:
    """Return what transformers reads as a network with its head. Raises CheckpointError where its logits would differ."""
    model_type = str(backbone.config["model_type"])
    model = f"{_MODELS[model_type]}ForImageClassification"
    taps = {"vit_msn": ["cls-norm"], "ijepa": ["mean"]}.get(model_type, ["cls-norm", "mean"])
    if head.tap not in taps:
        raise _not_exportable(name, f"{model} puts no head on tap {head.tap}", f"Fine-tune with --tap {taps[0]}.")
    weight = head.weight
    if len(taps) == 2:  # the classifier reads the CLS token and the mean of the patches, concatenated
        zeros = torch.zeros_like(weight)
        weight = torch.cat([weight, zeros] if head.tap == "cls-norm" else [zeros, weight], dim=1)
    config = backbone.config | {
        "architectures": [model],
        "id2label": {str(number): name for number, name in enumerate(head.classes)},
        "label2id": {name: number for number, name in enumerate(head.classes)},
        RESULT: result_id,
    }
    prefix = "vit" if model_type == "vit_msn" else model_type
    tensors = {f"{prefix}.{name}": tensor for name, tensor in backbone.tensors.items()}
    tensors |= {"classifier.weight": weight, "classifier.bias": head.bias}
    return replace(backbone, config=config, tensors=tensors)


def write_classifier(out: Path, content: FolderContent) -> None:
    """Write a folder, unless that of the same result exists. Raises UsageError where something else is there, StoreError."""
    result_id = str(content.config[RESULT])
    check_save_folder(out, result_id)
    if read_saved_result(out) != result_id:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_folder(out, content)


def check_save_folder(out: Path, result_id: str) -> None:
    """Raise UsageError where the folder for a result cannot be written, because something else exists there."""
    is_free = not out.exists() or (out.is_dir() and not any(out.iterdir()))
    if not is_free and read_saved_result(out) != result_id:
        hint = "Choose another folder, or remove it first."
        raise UsageError("--save: something else exists there already", where=str(out), hint=hint)


def read_saved_result(out: Path) -> str | None:
    """Return the id of the result whose network a folder holds, None where it holds none."""
    try:
        content = json.loads((out / "config.json").read_bytes())
        return str(content[RESULT]) if (out / "model.safetensors").is_file() else None
    except (OSError, ValueError, KeyError, TypeError):
        return None
