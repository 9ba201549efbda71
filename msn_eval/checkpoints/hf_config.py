"""What the config.json beside a folder's weights states that no weight's shape shows."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import cast

from torch import Tensor

from msn_eval.checkpoints.hf_folder import CONFIG, read_hub_config, read_image_processor
from msn_eval.checkpoints.normalisation import (
    Normalisation,
    read_normalisation,
    read_processor_normalisation,
    read_processor_pixels,
)
from msn_eval.errors import CheckpointError, name_place
from msn_eval.models.architectures import (
    IMAGE_CHANNELS,
    Architecture,
    check_channels,
    check_keyword,
    check_square,
    name_architecture,
    name_hub_architecture,
)

# The layer norms' epsilon by transformers' default, for each model type that timm's networks compute here. transformers runs
# all others.
_NORM_EPS = dict.fromkeys(("vit", "vit_mae", "ijepa"), 1e-12)
_NORM_EPS |= dict.fromkeys(("vit_msn", "dinov2", "dinov2_with_registers"), 1e-6)
# Sizes that the weights show, and the keywords of their architecture that hold them.
_SIZES = {
    "hidden_size": "embed_dim",
    "num_hidden_layers": "depth",
    "image_size": "img_size",
    "patch_size": "patch_size",
    "num_register_tokens": "reg_tokens",
    "intermediate_size": "",
}
_ADAPTER = "adapter_config.json"  # of peft; transformers would apply it to what it loads
_WITH_ARCH = "Give its weight file alone with --arch NAME, or wrap the network: py:package.module:factory."


@dataclass(frozen=True, kw_only=True)
class HubConfig:
    """A folder's own description of its network; None for what it does not state."""

    architecture: Architecture | None = None  # timm's, where the folder was written by timm
    hub: Architecture | None = None  # of a network that transformers runs
    heads: int | None = None
    norm_eps: float | None = None  # epsilon of the layer norms
    normalisation: Normalisation | None = None
    sizes: Mapping[str, object] = field(default_factory=dict)  # that the weights show too, by their names in the file
    model_type: str | None = None  # of transformers, None where the folder was written by timm
    pixels: int | None = None  # side of the images that the image processor makes


def read_config_beside(folder: Path) -> HubConfig:
    """Read a folder's config.json, of transformers or of timm. Raises CheckpointError for what is not supported."""
    config, where = read_hub_config(folder), str(folder / CONFIG)
    if os.path.lexists(folder / _ADAPTER):
        what = f"An adapter beside it ({_ADAPTER}) would change the network and is not supported"
        hint = "Merge it (merge_and_unload of peft) and save that, or remove the adapter's files to evaluate the base."
        raise CheckpointError(what, where=where, hint=hint)
    if "architecture" in config:
        return _read_timm_config(config, where)
    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        what = f"model_type is {model_type!r:.60}, not the name of a network of transformers"
        raise CheckpointError(what, where=where, hint=_WITH_ARCH)
    path, processor = read_image_processor(folder)
    if model_type not in _NORM_EPS:
        return HubConfig(
            hub=name_hub_architecture(config),
            normalisation=read_processor_normalisation(path, processor, model_type=model_type, has_defaults=True),
            model_type=model_type,
            pixels=read_processor_pixels(processor, model_type),
        )
    for name in ("image_size", "patch_size"):
        check_square(name, config.get(name), where=where)
    check_channels(config.get("num_channels", IMAGE_CHANNELS), where=where)
    if (activation := config.get("hidden_act", "gelu")) != "gelu":
        what = f"hidden_act is {activation!r}; only 'gelu' is supported"
        raise CheckpointError(what, where=where, hint="Wrap the network: py:package.module:factory.")
    heads, norm_eps = config.get("num_attention_heads"), config.get("layer_norm_eps")
    if not (heads is None or (type(heads) is int and 0 < heads < 1 << 16)):
        raise CheckpointError(f"num_attention_heads is {heads!r}", where=where, hint="It must be a positive integer.")
    if not (norm_eps is None or (isinstance(norm_eps, float | int) and 0 < norm_eps < 1)):
        raise CheckpointError(f"layer_norm_eps is {norm_eps!r}", where=where, hint="It must lie between 0 and 1.")
    # DINOv2's networks have a ratio instead.
    left_out = "intermediate_size" if model_type.startswith("dinov2") else "num_register_tokens"
    return HubConfig(
        heads=heads,
        norm_eps=_NORM_EPS[model_type] if norm_eps is None else float(norm_eps),
        normalisation=read_processor_normalisation(path, processor, model_type=model_type),
        model_type=model_type,
        sizes={name: config[name] for name in _SIZES if name in config and name != left_out},
    )


def check_sizes(config: HubConfig, weights: Mapping[str, Tensor], architecture: Architecture, *, where: str) -> None:
    """Raise CheckpointError where a size that a config.json states is not that of the weights beside it."""
    found = {name: architecture.keywords.get(keyword) for name, keyword in _SIZES.items()}
    found["intermediate_size"] = weights["blocks.0.mlp.fc2.weight"].shape[1]
    patch = cast(int, architecture.keywords["patch_size"])
    for name, sides in config.sizes.items():
        stated = sides[0] if isinstance(sides, list) and sides else sides
        # transformers ignores what is left of an image beside its patches.
        own = stated // patch * patch if name == "image_size" and isinstance(stated, int) else stated
        if found[name] is not None and found[name] != own:
            what = f"{CONFIG} states {name} {stated!s:.60}, the weights beside it have {found[name]}"
            hint = "The folder mixes two checkpoints, or the file was edited; download it again from its publisher."
            raise CheckpointError(what, where=where, hint=hint)


def _read_timm_config(config: Mapping[str, object], where: str) -> HubConfig:
    name, keywords, pretrained = config["architecture"], config.get("model_args"), config.get("pretrained_cfg")
    if not isinstance(name, str) or not re.fullmatch(r"[\w.]+", name):
        raise CheckpointError(f"architecture is {name!r}", where=where, hint="It must be one of timm's names.")
    # timm before 0.9 wrote everything on one level, and still reads it.
    stated: Mapping[str, object] = pretrained if isinstance(pretrained, Mapping) else config
    channels, *sides = size if isinstance(size := stated.get("input_size"), list) and size else [IMAGE_CHANNELS]
    check_channels(channels, where=where)
    check_square("input_size", sides, where=where)
    given = {**keywords} if isinstance(keywords, Mapping) else {}
    given.pop("num_classes", None)  # of the classifier
    with name_place(where):
        for keyword, value in given.items():
            check_keyword(keyword, value)
    is_stated = stated.get("mean") is not None or stated.get("std") is not None
    return HubConfig(
        architecture=replace(name_architecture(name), keywords=given),
        normalisation=read_normalisation(stated, where=where, source=CONFIG) if is_stated else None,
    )
