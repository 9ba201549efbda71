"""A folder in Hugging Face layout, by the names that transformers writes and that every version of it reads."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from msn_eval.checkpoints.formats.safetensors import save_tensors
from msn_eval.errors import CheckpointError, UsageError
from msn_eval.files.atomic import written_atomically
from msn_eval.models.vit import native_pixels, stored_pixels

_SHORTER_SIDE = 256 / 224  # of the image, to the side of the crop


@dataclass(frozen=True)
class _Layout:
    """How transformers calls an architecture, and what its blocks are named."""

    model_type: str
    model: str
    norms: tuple[str, str]
    mlp: tuple[str, str]


_MSN_NAMES = (("layernorm_before", "layernorm_after"), ("intermediate.dense", "output.dense"))
_DINOV2_NAMES = (("norm1", "norm2"), ("mlp.fc1", "mlp.fc2"))
_WRITTEN = re.compile(
    r"cls_token|reg_token|pos_embed|(patch_embed\.proj|norm)\.(weight|bias)"
    r"|blocks\.\d+\.((norm[12]|attn\.qkv|attn\.proj|mlp\.fc[12])\.(weight|bias)|ls[12]\.gamma)"
)
_GATED_NAMES = ("mlp.weights_in", "mlp.weights_out")


@dataclass(frozen=True, kw_only=True)
class PlainNetwork:
    """A Vision Transformer's trunk as it is to stand in a folder.

    outline:   the network, with or without values: its blocks, heads and sizes
    weights:   by timm's names
    gated:     whether its MLPs are
    mean, std: that its images are normalised with
    name:      of the architecture, for errors; where: of the checkpoint, likewise
    """

    outline: nn.Module
    weights: Mapping[str, Tensor]
    gated: bool
    mean: object
    std: object
    name: str
    where: str


@dataclass(frozen=True, kw_only=True)
class FolderContent:
    """What a folder in Hugging Face layout holds: config.json, preprocessor_config.json and the tensors by their names."""

    config: dict[str, object]
    processor: dict[str, object]
    tensors: dict[str, Tensor]


def write_folder(out: Path, content: FolderContent) -> None:
    """Write a folder in Hugging Face layout, whole or not at all. Raises StoreError when the disk refuses."""
    size = sum(one.nbytes for one in content.tensors.values())
    with written_atomically(out, f"{size:,} bytes") as temporary:
        temporary.mkdir()
        save_tensors(temporary / "model.safetensors", content.tensors)
        (temporary / "config.json").write_text(json.dumps(content.config, indent=2) + "\n")
        (temporary / "preprocessor_config.json").write_text(json.dumps(content.processor, indent=2) + "\n")


def folder_content(network: PlainNetwork) -> FolderContent:
    """Give what transformers reads as the same network without a classifier. Raises CheckpointError where it has none like it."""
    outline, weights = network.outline, network.weights
    layout = _layout_of(network)
    heads, norm_eps = heads_and_epsilon(outline)
    width = weights["patch_embed.proj.weight"].shape[0]
    hidden = weights["blocks.0.mlp.fc2.weight"].shape[1]
    side = native_pixels(outline)
    config: dict[str, object] = {
        "architectures": [layout.model],
        "model_type": layout.model_type,
        "hidden_size": width,
        "num_hidden_layers": len(cast(nn.Sequential, outline.blocks)),
        "num_attention_heads": heads,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "layer_norm_eps": norm_eps,
        "image_size": stored_pixels(outline),
        "patch_size": weights["patch_embed.proj.weight"].shape[-1],
        "num_channels": 3,
        "qkv_bias": "blocks.0.attn.qkv.bias" in weights,
        "dtype": str(weights["patch_embed.proj.weight"].dtype).removeprefix("torch."),
    }
    if layout.model_type.startswith("dinov2"):
        config |= _dinov2_config(network, layout, width, hidden)
    else:
        config["intermediate_size"] = hidden
    processor = {
        "image_processor_type": "BitImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": round(side * _SHORTER_SIDE)},
        "resample": 2,  # bilinear
        "do_center_crop": True,
        "crop_size": {"height": side, "width": side},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(cast(tuple[float, ...], network.mean)),
        "image_std": list(cast(tuple[float, ...], network.std)),
        "do_convert_rgb": True,
    }
    return FolderContent(config=config, processor=processor, tensors=_huggingface_names(weights, layout))


def heads_and_epsilon(network: nn.Module) -> tuple[int, float]:
    """Give what no weight's shape shows: the heads and the epsilon."""
    block = cast(nn.Sequential, network.blocks)[0]
    return cast(int, block.attn.num_heads), cast(float, block.norm1.eps)  # type: ignore[union-attr]


def _layout_of(network: PlainNetwork) -> _Layout:
    weights = network.weights
    obstacle = _obstacle(network.outline, weights)
    if obstacle:
        raise CheckpointError(
            f"{network.name} cannot be written for transformers: {obstacle}",
            where=network.where,
            hint="Use --to timm or --to safetensors.",
        )
    if "cls_token" not in weights:
        return _Layout("ijepa", "IJepaModel", *_MSN_NAMES)
    if "blocks.0.ls1.gamma" in weights:
        norms, mlp = _DINOV2_NAMES[0], _GATED_NAMES if network.gated else _DINOV2_NAMES[1]
        if "reg_token" in weights:
            return _Layout("dinov2_with_registers", "Dinov2WithRegistersModel", norms, mlp)
        return _Layout("dinov2", "Dinov2Model", norms, mlp)
    return _Layout("vit_msn", "ViTMSNModel", *_MSN_NAMES)


def _obstacle(outline: nn.Module, weights: Mapping[str, Tensor]) -> str | None:
    """Give what of a network transformers' Vision Transformers cannot compute, None where they can."""
    from timm.layers import GluMlp
    from timm.models.vision_transformer import Block, VisionTransformer

    if type(outline) is not VisionTransformer:
        return f"it is a {type(outline).__name__}, not a plain Vision Transformer"
    block = cast(nn.Sequential, outline.blocks)[0]
    if type(block) is not Block:
        return f"its blocks are {type(block).__name__}s"
    mlp = cast(nn.Module, block.mlp)
    if type(mlp.act) is not (nn.SiLU if isinstance(mlp, GluMlp) else nn.GELU):
        return f"its activation is {type(mlp.act).__name__}"
    if isinstance(mlp, GluMlp) and "blocks.0.ls1.gamma" not in weights:
        return "its MLPs are gated"
    for name in ("norm.weight", "pos_embed"):
        if name not in weights:
            return f"it has no {name.partition('.')[0]}"
    homeless = next((name for name in weights if not _WRITTEN.fullmatch(name)), None)
    if homeless is not None:
        return f"it has a {homeless.removesuffix('.weight')}"
    registers, scaled, class_token = (one in weights for one in ("reg_token", "blocks.0.ls1.gamma", "cls_token"))
    if registers and not scaled:
        return "it has registers and no scaled residuals"
    if scaled and not class_token:
        return "it has scaled residuals and no class token"
    positions = cast(int, cast(nn.Module, outline.patch_embed).num_patches) + int(class_token and not registers)
    if weights["pos_embed"].shape[1] != positions:
        return f"it has {weights['pos_embed'].shape[1]} positions; the patches and a class token have {positions}"
    return None


def _dinov2_config(network: PlainNetwork, layout: _Layout, width: int, hidden: int) -> dict[str, object]:
    config: dict[str, object] = {
        "use_swiglu_ffn": network.gated,
        "layerscale_value": 1.0,
        "drop_path_rate": 0.0,
    }
    ratio: float = hidden / width
    if network.gated:
        # transformers takes two thirds of ratio x width, rounded up to a multiple of 8.
        ratio = next((one for one in (4, hidden * 3 / 2 / width) if _gated_width(width, one) == hidden), 0)
        if not ratio:
            raise CheckpointError(
                f"its gated MLPs are {hidden} wide, which transformers' DINOv2 cannot be",
                where=network.where,
                hint="Use --to timm or --to safetensors.",
            )
    config["mlp_ratio"] = int(ratio) if ratio == int(ratio) else ratio
    if layout.model_type == "dinov2_with_registers":
        config["num_register_tokens"] = network.weights["reg_token"].shape[1]
    return config


def _gated_width(width: int, ratio: float) -> int:
    return (int(int(width * ratio) * 2 / 3) + 7) // 8 * 8


def _huggingface_names(weights: Mapping[str, Tensor], layout: _Layout) -> dict[str, Tensor]:
    width = weights["patch_embed.proj.weight"].shape[0]
    names = {
        "embeddings.patch_embeddings.projection.weight": weights["patch_embed.proj.weight"],
        "embeddings.patch_embeddings.projection.bias": weights["patch_embed.proj.bias"],
        "embeddings.position_embeddings": weights["pos_embed"],
        "layernorm.weight": weights["norm.weight"],
        "layernorm.bias": weights["norm.bias"],
    }
    if "cls_token" in weights:
        names["embeddings.cls_token"] = weights["cls_token"]
    if layout.model_type.startswith("dinov2"):
        names["embeddings.mask_token"] = weights["pos_embed"].new_zeros(1, width)
    if "reg_token" in weights:
        # timm's class token took up its position; there it is added to it.
        names["embeddings.register_tokens"] = weights["reg_token"]
        names["embeddings.position_embeddings"] = torch.cat(
            [torch.zeros_like(weights["cls_token"]), weights["pos_embed"]], dim=1
        )
    for name, tensor in weights.items():
        head, _, rest = name.partition(".")
        if head == "blocks":
            number, _, inner = rest.partition(".")
            names |= {f"encoder.layer.{number}.{one}": part for one, part in _block_names(inner, tensor, layout)}
    return names


def _block_names(inner: str, tensor: Tensor, layout: _Layout) -> Iterator[tuple[str, Tensor]]:
    """Give transformers' names for one weight of a block; queries, keys and values come apart."""
    stem, _, last = inner.rpartition(".")
    if stem == "attn.qkv":
        yield from zip(
            (f"attention.attention.{one}.{last}" for one in ("query", "key", "value")), tensor.chunk(3), strict=True
        )
        return
    first, second = layout.mlp
    yield (
        {
            "norm1": f"{layout.norms[0]}.{last}",
            "norm2": f"{layout.norms[1]}.{last}",
            "attn.proj": f"attention.output.dense.{last}",
            "mlp.fc1": f"{first}.{last}",
            "mlp.fc2": f"{second}.{last}",
            "ls1": "layer_scale1.lambda1",
            "ls2": "layer_scale2.lambda1",
        }[stem],
        tensor,
    )


RESULT = "msn_eval_result"  # in config.json: the id of the record that tells of the network


@dataclass(frozen=True, kw_only=True)
class Head:
    """A linear layer on a tap.

    weight: (n_classes, d); bias: (n_classes,); tap: cls-norm or mean
    classes: names, in the order of the rows
    """

    weight: Tensor
    bias: Tensor
    tap: str
    classes: Sequence[str]


@dataclass(frozen=True)
class _Fitting:
    """The class of transformers that computes the same logits, and what its trunk is called in it.

    taps: on which its head can be put; both: it is given the CLS token and the mean of the patches end to end
    """

    name: str
    trunk: str
    taps: tuple[str, ...]
    both: bool = False


_FITTING = {
    "vit_msn": _Fitting("ViTMSNForImageClassification", "vit", ("cls-norm",)),
    "ijepa": _Fitting("IJepaForImageClassification", "ijepa", ("mean",)),
    "dinov2": _Fitting("Dinov2ForImageClassification", "dinov2", ("cls-norm", "mean"), both=True),
    "dinov2_with_registers": _Fitting(
        "Dinov2WithRegistersForImageClassification", "dinov2_with_registers", ("cls-norm", "mean"), both=True
    ),
}


def classifier_content(network: PlainNetwork, head: Head, *, result_id: str) -> FolderContent:
    """Give what transformers reads as a network with its head.

    Raises CheckpointError where it has no class that computes the same logits.
    """
    trunk = folder_content(network)
    fitting = _FITTING[str(trunk.config["model_type"])]
    if head.tap not in fitting.taps:
        raise CheckpointError(
            f"{network.name} cannot be written for transformers: {fitting.name} puts no head on tap {head.tap}",
            where=network.where,
            hint=f"Fine-tune with --tap {fitting.taps[0]}.",
        )
    weight = head.weight
    if fitting.both:
        nothing = torch.zeros_like(weight)
        weight = torch.cat([weight, nothing] if head.tap == "cls-norm" else [nothing, weight], dim=1)
    names = {str(number): name for number, name in enumerate(head.classes)}
    config = trunk.config | {
        "architectures": [fitting.name],
        "id2label": names,
        "label2id": {name: int(number) for number, name in names.items()},
        RESULT: result_id,
    }
    tensors = {f"{fitting.trunk}.{name}": one for name, one in trunk.tensors.items()}
    return FolderContent(
        config=config,
        processor=trunk.processor,
        tensors=tensors | {"classifier.weight": weight, "classifier.bias": head.bias},
    )


def write_classifier(out: Path, content: FolderContent) -> None:
    """Write a folder, whole or not at all, in the place of an earlier one of the same result.

    Raises UsageError where something else stands there, StoreError when the disk refuses.
    """
    result_id = str(content.config[RESULT])
    if saved_result(out) == result_id:
        return
    check_saved_place(out, result_id)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_folder(out, content)


def check_saved_place(out: Path, result_id: str) -> None:
    """Raise UsageError where a folder for this result cannot be put: something else is there."""
    if saved_result(out) == result_id or not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    raise UsageError(
        "--save: something else is there already", where=str(out), hint="Name another folder, or remove it first."
    )


def saved_result(out: Path) -> str | None:
    """Give the id of the result whose network stands in a folder, None where there is none."""
    try:
        content = json.loads((out / "config.json").read_bytes())
        return str(content[RESULT]) if (out / "model.safetensors").is_file() else None
    except (OSError, ValueError, KeyError, TypeError):
        return None
