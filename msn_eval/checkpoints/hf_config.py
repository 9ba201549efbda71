"""What the config.json beside a folder's weights says that no weight's shape can tell."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from msn_eval.checkpoints.hf_folder import CONFIG, Triple, image_statistics, read_hub_config, stated_statistics
from msn_eval.errors import CheckpointError
from msn_eval.models.architectures import NOT_KEYWORDS, Architecture, name_architecture

_MODEL_TYPES = (
    "vit_msn",
    "vit",
    "vit_mae",
    "dinov2",
    "dinov2_with_registers",
    "ijepa",
    "beit",
    "data2vec-vision",
)
_NORM_EPS = {
    "vit_msn": 1e-6,
    "dinov2": 1e-6,
    "dinov2_with_registers": 1e-6,
}  # transformers' defaults; 1e-12 for the others
_ADAPTER = "adapter_config.json"  # of peft, which transformers would put on what it loads
_PLAIN = {"hidden_act": "gelu", "num_channels": 3}
_LARGEST = 1 << 14  # of a keyword's numbers: sizes and widths
_LARGEST_IMAGE = 1 << 12  # some networks compute tables as large as the square of this
_DEEPEST = 256


@dataclass(frozen=True, kw_only=True)
class HubConfig:
    """A folder's own description of its network.

    model_type:   transformers' name of the architecture, or `timm`
    architecture: timm's, where the folder was written by timm
    heads:        attention heads
    norm_eps:     of the layer norms
    statistics:   mean and std a channel, where stated
    """

    model_type: str
    architecture: Architecture | None
    heads: int | None
    norm_eps: float | None
    statistics: tuple[Triple, Triple] | None


def read_config_beside(folder: Path) -> HubConfig:
    """Read a folder's config.json, of transformers or of timm.

    Raises CheckpointError for an architecture that is not evaluated here and for what its weights could not show.
    """
    config, where = read_hub_config(folder), str(folder / CONFIG)
    if os.path.lexists(folder / _ADAPTER):
        raise CheckpointError(
            f"has an adapter beside it ({_ADAPTER}), which would change the network and is not read here",
            where=where,
            hint="Merge it (merge_and_unload of peft) and save that, or take the adapter's files away to evaluate the base.",
        )
    if "architecture" in config:
        return _timm_config(config, where)
    model_type = config.get("model_type")
    if model_type not in _MODEL_TYPES:
        raise CheckpointError(
            f"describes a {model_type!r}, which is not one of {', '.join(_MODEL_TYPES)}",
            where=where,
            hint="Give its weight file alone with --arch NAME, or wrap it: py:package.module:factory.",
        )
    for name in ("image_size", "patch_size"):
        sides = config.get(name)
        if isinstance(sides, list) and len({str(side) for side in sides}) > 1:
            raise CheckpointError(
                f"{name} is {sides}; here images and patches are square",
                where=where,
                hint="Wrap it: py:package.module:factory.",
            )
    for name, value in _PLAIN.items():
        if config.get(name, value) != value:
            raise CheckpointError(
                f"{name} is {config[name]!r}; here it is {value!r}",
                where=where,
                hint="Wrap it: py:package.module:factory.",
            )
    return HubConfig(
        model_type=str(model_type),
        architecture=None,
        heads=_positive_int(config, "num_attention_heads", where),
        norm_eps=_positive(config, "layer_norm_eps", where) or _NORM_EPS.get(str(model_type), 1e-12),
        statistics=image_statistics(folder),
    )


def _timm_config(config: Mapping[str, object], where: str) -> HubConfig:
    name, keywords, pretrained = config["architecture"], config.get("model_args"), config.get("pretrained_cfg")
    if not isinstance(name, str) or not re.fullmatch(r"[\w.]+", name):
        raise CheckpointError(f"architecture is {name!r}", where=where, hint="It is one of timm's names.")
    # timm before 0.9 wrote all of it side by side, and still reads it so.
    stated: Mapping[str, object] = pretrained if isinstance(pretrained, Mapping) else config
    return HubConfig(
        model_type="timm",
        architecture=replace(
            name_architecture(name), keywords=_keywords(keywords, where) if isinstance(keywords, Mapping) else {}
        ),
        heads=None,
        norm_eps=None,
        statistics=stated_statistics(Path(where), stated, "mean", "std"),
    )


def _keywords(stated: Mapping[str, object], where: str) -> dict[str, object]:
    """Give what a network is built with, without the size of its classifier.

    Raises CheckpointError for what would open other files, and for what would take hours to build.
    """
    for name, value in stated.items():
        numbers = [one for one in (value if isinstance(value, list) else [value]) if isinstance(one, int | float)]
        most = _DEEPEST if name.startswith("depth") else _LARGEST_IMAGE if name == "img_size" else _LARGEST
        if name in NOT_KEYWORDS or isinstance(value, Mapping) or any(not abs(one) <= most for one in numbers):
            raise CheckpointError(
                f"model_args holds {name} = {str(value)[:60]!r}, which is none of an architecture's keywords here",
                where=where,
                hint="Give its weight file alone with --arch NAME, or wrap it: py:package.module:factory.",
            )
    return {name: value for name, value in stated.items() if name != "num_classes"}


def _positive_int(config: Mapping[str, object], name: str, where: str) -> int | None:
    value = config.get(name)
    if value is None or (isinstance(value, int) and not isinstance(value, bool) and 0 < value < 1 << 16):
        return value
    raise CheckpointError(f"{name} is {value!r}", where=where, hint="It is a whole number above 0.")


def _positive(config: Mapping[str, object], name: str, where: str) -> float | None:
    value = config.get(name)
    if value is None or (isinstance(value, float | int) and 0 < value < 1):
        return None if value is None else float(value)
    raise CheckpointError(f"{name} is {value!r}", where=where, hint="It is a small number above 0.")
