"""Recipe file: a YAML file and `key=value` overrides become a recipe; unknown keys are refused with the nearest known one."""

import posixpath
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from msn_eval.config.reference_yaml import is_reference, map_architecture, read_keys
from msn_eval.config.yaml_config import build_config, check_choice, parse_override, read_yaml
from msn_eval.errors import UsageError
from msn_pretrain.config.recipe import MSNRecipe, SimSiamRecipe


def read_recipe(file: Path, *, overrides: Iterable[str] = (), world_size: int = 1) -> MSNRecipe | SimSiamRecipe:
    """Read a recipe from a file, then `key=value` overrides; `method: simsiam` makes it SimSiam's.

    Args:
        file: A recipe, or a YAML file of the MSN reference repository.
        overrides: The last one wins.
        world_size: Number of ranks, by which a reference file's batch size is multiplied.

    Raises:
        UsageError: A key is unknown, or a value has a wrong type or is out of range. The text names the file and the key.
    """
    content = read_yaml(file, what="recipe", hint="`msn-eval ls recipes` lists those that ship.")
    if is_reference(content):
        content = map_reference_recipe(content, world_size=world_size, where=str(file))
    layers: list[tuple[str, Mapping[str, Any]]] = [(str(file), content)]
    layers += [(f"override {text!r}", parse_override(text, example="optimization.epochs=10")) for text in overrides]
    method = next((layer["method"] for _, layer in reversed(layers) if "method" in layer), "msn")
    try:
        check_choice("method", str(method), ("msn", "simsiam"))
        return build_config(SimSiamRecipe, layers) if method == "simsiam" else build_config(MSNRecipe, layers)
    except UsageError as error:
        key = error.what.partition(":")[0]
        where = error.where or next((where for where, layer in reversed(layers) if key in layer), str(file))
        raise UsageError(error.what, where=where, hint=error.hint) from None


def recipe_as_yaml(recipe: MSNRecipe | SimSiamRecipe) -> str:
    """Return the complete recipe as YAML, which `read_recipe` reads back to an equal one."""
    from omegaconf import OmegaConf

    return str(OmegaConf.to_yaml(OmegaConf.structured(recipe)))


# The authors' keys whose values stay as they are, and ours.
_RENAMED = {
    "criterion.num_proto": "criterion.prototypes",
    "criterion.temperature": "criterion.temperature",
    "criterion.start_sharpen": "criterion.sharpening",
    "criterion.final_sharpen": "criterion.final_sharpening",
    "data.num_workers": "data.workers",
    "data.pin_mem": "data.pin_memory",
    "data.patch_drop": "masking.ratio",
    "data.rand_size": "views.image_pixels",
    "data.focal_size": "views.focal_pixels",
    "data.rand_views": "views.random_views",
    "data.focal_views": "views.focal_views",
    "meta.drop_path_rate": "encoder.drop_path",
    "meta.hidden_dim": "head.hidden",
    "meta.output_dim": "head.output",
    "meta.use_bn": "head.batch_norm",
    "optimization.epochs": "optimization.epochs",
    "optimization.warmup": "optimization.warmup",
    "optimization.start_lr": "optimization.start_learning_rate",
    "optimization.lr": "optimization.learning_rate",
    "optimization.final_lr": "optimization.final_learning_rate",
    "optimization.weight_decay": "optimization.weight_decay",
    "optimization.final_weight_decay": "optimization.final_weight_decay",
    "optimization.clip_grad": "optimization.clip",
}
# Keys that must have one value, and why.
_ONLY: dict[str, tuple[object, str]] = {
    "criterion.freeze_proto": (False, "the released code fails with frozen prototypes"),
    "data.label_smoothing": (0, "smoothed prototype labels are not supported"),
    "meta.read_checkpoint": (None, "runs continue from the snapshots in their own folder"),
    "meta.copy_data": (False, "nothing is copied to a node's own disk; copy beforehand and set data.root"),
    "meta.use_fp16": (False, "the released code ignores it; for half precision set run.precision=bf16"),
    "meta.use_pred_head": (False, "the released code ignores it: MSN has no prediction head"),
    "meta.bottleneck": (1, "the released code ignores it"),
    "meta.two_layer": (False, "the released code ignores it: the head has three layers"),
}
KNOWN = (
    *_RENAMED,
    *_ONLY,
    *("criterion.batch_size", "criterion.use_sinkhorn", "data.root_path", "data.image_folder"),
    *("criterion.me_max", "criterion.memax_weight", "criterion.use_ent", "criterion.ent_weight"),
    *("data.color_jitter_strength", "logging.folder", "logging.write_tag", "meta.model_name"),
    "meta.load_checkpoint",  # ignored: a run that is restarted on its folder continues
)
# What the authors' code uses where the file has no value. It needs all other keys.
_DEFAULTS: dict[str, object] = {
    "criterion.memax_weight": 1.0,
    "criterion.ent_weight": 1.0,
    "criterion.use_ent": False,
    "criterion.freeze_proto": False,
    "data.pin_mem": False,
    "data.num_workers": 1,
    "data.image_folder": "",
    "meta.bottleneck": 1,
    "meta.two_layer": False,
    "meta.use_fp16": False,
    "meta.read_checkpoint": None,
}


def map_reference_recipe(content: Mapping[str, Any], *, world_size: int, where: str) -> dict[str, Any]:
    """Return our keys and values for a pre-training file of the authors.

    Args:
        content: The file's content.
        world_size: Number of ranks: their batch size is that of one rank (64, on 16 ranks, for the published runs).
        where: The file, for errors.

    Raises:
        UsageError: The file has a key that their code does not read, lacks one, or asks for something that is not supported.
    """
    given = read_keys(content, known=KNOWN, defaults=_DEFAULTS, reader="code", where=where)
    for key, (only, why) in _ONLY.items():
        if given[key] != only:
            raise UsageError(f"{key}: {given[key]} cannot be mapped: {why}", where=where, hint=f"Set it to {only}.")
    jitter = _parse_number(given, "data.color_jitter_strength", where)
    root = posixpath.join(str(given["data.root_path"]), str(given["data.image_folder"]))
    return {ours: given[theirs] for theirs, ours in _RENAMED.items()} | {
        "run.dir": posixpath.join(str(given["logging.folder"]), str(given["logging.write_tag"])),
        "run.precision": "fp32",
        "data.root": root.rstrip("/") or "/",
        "views.brightness": 0.8 * jitter,
        "views.contrast": 0.8 * jitter,
        "views.saturation": 0.8 * jitter,
        "views.hue": 0.2 * jitter,
        "encoder.name": map_architecture(str(given["meta.model_name"]), where=where),
        "criterion.sinkhorn_iterations": 3 if given["criterion.use_sinkhorn"] else 0,
        "criterion.me_max_weight": given["criterion.memax_weight"] if given["criterion.me_max"] else 0.0,
        "criterion.entropy_weight": given["criterion.ent_weight"] if given["criterion.use_ent"] else 0.0,
        "optimization.batch_size": int(_parse_number(given, "criterion.batch_size", where)) * world_size,
    }


def _parse_number(given: Mapping[str, Any], key: str, where: str) -> float:
    try:
        return float(given[key])
    except (TypeError, ValueError):
        raise UsageError(f"{key}: {given[key]!r} is not a number", where=where, hint="Correct the value.") from None
