"""Recipe file: a YAML file and `key=value` overrides into a recipe; unknown keys are refused with the nearest known one."""

import posixpath
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar, cast, get_type_hints

from msn_eval.config.reference_yaml import is_reference, map_architecture, read_keys
from msn_eval.errors import UsageError, did_you_mean
from msn_pretrain.config.recipe import MSNRecipe, SimSiamRecipe

_Recipe = TypeVar("_Recipe", MSNRecipe, SimSiamRecipe)


@dataclass(frozen=True, kw_only=True)
class _AsTyped:
    """A number of an override, and the text that stood there."""

    value: float
    text: str


def read_recipe(file: Path, *, overrides: Iterable[str] = (), world_size: int = 1) -> MSNRecipe | SimSiamRecipe:
    """Read a recipe from `file`, then `key=value` overrides; `method: simsiam` makes it SimSiam's.

    The YAML of the MSN reference repository is read as it is: see `reference_recipe`, which needs the number of ranks.
    Raises UsageError naming the file and the key for unknown keys, wrong types and values out of range.
    """
    content = _read_yaml(file)
    if is_reference(content):
        content = converted(content, world_size=world_size, where=str(file))
    layers = [(str(file), content)] + [(f"override {text!r}", _read_override(text)) for text in overrides]
    method = next((layer["method"] for _, layer in reversed(layers) if "method" in layer), "msn")
    if method not in ("msn", "simsiam"):
        raise UsageError(
            f"method {method!r}.{did_you_mean(str(method), ('msn', 'simsiam'))}",
            where=str(file),
            hint="Known: msn, simsiam.",
        )
    return _built(MSNRecipe, layers) if method == "msn" else _built(SimSiamRecipe, layers)


def recipe_as_yaml(recipe: MSNRecipe | SimSiamRecipe) -> str:
    """Give the whole recipe as YAML, which `read_recipe` reads back to an equal one."""
    from omegaconf import OmegaConf

    return str(OmegaConf.to_yaml(OmegaConf.structured(recipe)))


def _built(kind: type[_Recipe], layers: Iterable[tuple[str, Mapping[str, object]]]) -> _Recipe:
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    config: Any = OmegaConf.structured(kind)
    for part in (config, *(section for section in config.values() if OmegaConf.is_config(section))):
        OmegaConf.set_readonly(part, False)  # they inherit that from frozen dataclasses
    for where, layer in layers:
        for key, value in _leaves(kind, layer, where):
            try:
                OmegaConf.update(config, key, value, force_add=False)
            except OmegaConfBaseException as error:
                reason = str(error).partition("\n")[0]
                raise UsageError(f"{key}: {reason}", where=where, hint="Correct the value.") from error
        try:
            recipe = cast(_Recipe, OmegaConf.to_object(config))
        except UsageError as error:
            raise UsageError(error.what, where=where, hint=error.hint) from None
    return recipe


def _leaves(
    kind: type[object], layer: Mapping[str, object], where: str, prefix: str = ""
) -> Iterable[tuple[str, object]]:
    """Give `section.key` and value for each of a layer, refusing what the records do not know."""
    types = get_type_hints(kind)
    names = [one.name for one in fields(cast(Any, kind))]
    for key, value in layer.items():
        if key not in names:
            known = _all_keys(kind, prefix)
            namesakes = [one for one in known if one.endswith(f".{key}")]
            close = did_you_mean(namesakes[0] if namesakes else f"{prefix}{key}", known)
            raise UsageError(
                f"unknown key {prefix + key!r}.{close}", where=where, hint=f"Known here: {', '.join(names)}."
            )
        inner = types[key]
        if is_dataclass(inner):
            if not isinstance(value, Mapping):
                raise UsageError(
                    f"{prefix}{key} is a section, not a value", where=where, hint=f"Write {key}: and keys below."
                )
            yield from _leaves(cast(type[object], inner), value, where, f"{prefix}{key}.")
        elif inner is str and isinstance(value, _AsTyped):
            yield f"{prefix}{key}", value.text  # YAML would make 7 of a folder called 007
        else:
            yield f"{prefix}{key}", value.value if isinstance(value, _AsTyped) else value


def _all_keys(kind: type[object], prefix: str) -> list[str]:
    types = get_type_hints(kind)
    keys = []
    for one in fields(cast(Any, kind)):
        inner = types[one.name]
        keys.append(f"{prefix}{one.name}")
        if is_dataclass(inner):
            keys += _all_keys(cast(type[object], inner), f"{prefix}{one.name}.")
    return keys


def _read_yaml(file: Path) -> dict[str, Any]:
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    try:
        content: Any = OmegaConf.to_container(OmegaConf.load(file), resolve=False)
    except FileNotFoundError:
        raise UsageError("no such recipe", where=str(file), hint="configs/pretrain/ has those that ship.") from None
    except (OSError, YAMLError, OmegaConfBaseException, UnicodeDecodeError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else " ".join(str(error).split())
        raise UsageError(f"cannot be read as YAML: {reason}", where=str(file), hint="Correct the file.") from error
    if not isinstance(content, dict):
        raise UsageError("is no mapping of keys to values", where=str(file), hint="Write `key: value` lines.")
    return {str(key): value for key, value in content.items()}


def _read_override(text: str) -> dict[str, Any]:
    """Read `section.key=value` into nested mappings."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    key, equals, value = text.partition("=")
    if not (key and equals):
        raise UsageError(f"{text!r} is not of the form key=value", hint="Write for example optimization.epochs=10.")
    try:
        read: Any = cast(dict[str, Any], OmegaConf.to_container(OmegaConf.create(f"value: {value}"), resolve=False))[
            "value"
        ]
    except (YAMLError, OmegaConfBaseException, RecursionError) as error:
        raise UsageError(f"{text!r}: the value is no YAML", hint="Quote it for the shell.") from error
    if isinstance(read, int | float) and not isinstance(read, bool):
        read = _AsTyped(value=read, text=value.strip())
    for part in reversed(key.split(".")):
        read = {part: read}
    return cast(dict[str, Any], read)


_MAPPED = {
    "criterion.batch_size": "optimization.batch_size, times the number of ranks",
    "criterion.num_proto": "criterion.prototypes",
    "criterion.temperature": "criterion.temperature",
    "criterion.start_sharpen": "criterion.sharpening",
    "criterion.final_sharpen": "criterion.final_sharpening",
    "criterion.me_max": "criterion.me_max_weight, 0 where false",
    "criterion.memax_weight": "criterion.me_max_weight",
    "criterion.use_ent": "criterion.entropy_weight, 0 where false",
    "criterion.ent_weight": "criterion.entropy_weight",
    "criterion.use_sinkhorn": "criterion.sinkhorn_iterations, 3 or 0",
    "criterion.freeze_proto": "nothing; only false",
    "data.root_path": "data.root, with image_folder behind it",
    "data.image_folder": "data.root",
    "data.num_workers": "data.workers",
    "data.pin_mem": "data.pin_memory",
    "data.color_jitter_strength": "views.brightness, contrast, saturation (0.8 times it), hue (0.2 times it)",
    "data.label_smoothing": "nothing; only 0",
    "data.patch_drop": "masking.ratio",
    "data.rand_size": "views.image_pixels",
    "data.focal_size": "views.focal_pixels",
    "data.rand_views": "views.random_views",
    "data.focal_views": "views.focal_views",
    "logging.folder": "run.dir, with write_tag behind it",
    "logging.write_tag": "run.dir",
    "meta.model_name": "encoder.name",
    "meta.drop_path_rate": "encoder.drop_path",
    "meta.hidden_dim": "head.hidden",
    "meta.output_dim": "head.output",
    "meta.use_bn": "head.batch_norm",
    "meta.load_checkpoint": "nothing: a run that is started again on its folder goes on",
    "meta.read_checkpoint": "nothing; only null",
    "meta.copy_data": "nothing; only false",
    "meta.use_fp16": "run.precision, fp32 for false; true is refused",
    "meta.use_pred_head": "nothing; only false",
    "meta.bottleneck": "nothing; only 1",
    "meta.two_layer": "nothing; only false",
    "optimization.epochs": "optimization.epochs",
    "optimization.warmup": "optimization.warmup",
    "optimization.start_lr": "optimization.start_learning_rate",
    "optimization.lr": "optimization.learning_rate",
    "optimization.final_lr": "optimization.final_learning_rate",
    "optimization.weight_decay": "optimization.weight_decay",
    "optimization.final_weight_decay": "optimization.final_weight_decay",
    "optimization.clip_grad": "optimization.clip",
}
# What the authors' code takes where the file is silent; all other keys must be there, as for their code.
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
_ONLY: dict[str, tuple[object, str]] = {
    "criterion.freeze_proto": (False, "the released code fails with frozen prototypes"),
    "data.label_smoothing": (0, "smoothed prototype labels are not computed here"),
    "meta.read_checkpoint": (None, "runs go on from the snapshots in their own folder"),
    "meta.copy_data": (False, "nothing is copied to a node's own disk here; do so beforehand and set data.root"),
    "meta.use_fp16": (False, "the released code ignores it; for half precision set run.precision=bf16"),
    "meta.use_pred_head": (False, "the released code ignores it: MSN has no prediction head"),
    "meta.bottleneck": (1, "the released code ignores it"),
    "meta.two_layer": (False, "the released code ignores it: the head has three layers"),
}


def converted(content: Mapping[str, Any], *, world_size: int, where: str) -> dict[str, dict[str, object]]:
    """Give our keys and values for an authors' file.

    world_size: ranks of this job: their batch size is that of one rank (64, and 16 ranks, for the published runs)
    Raises UsageError for keys that their code does not read, lacks, or that mean something that is not done here.
    """
    given = read_keys(content, known=_MAPPED, defaults=_DEFAULTS, reader="code", where=where)
    for key, (only, why) in _ONLY.items():
        if given[key] != only:
            raise UsageError(f"{key}: {given[key]} cannot be mapped: {why}", where=where, hint=f"Set it to {only}.")
    network = map_architecture(str(given["meta.model_name"]), where=where)
    number = _numbers(given, where)
    strength = number("data.color_jitter_strength")
    return {
        "run": {
            "dir": posixpath.join(str(given["logging.folder"]), str(given["logging.write_tag"])),
            "precision": "fp32",
        },
        "data": {
            "root": posixpath.join(str(given["data.root_path"]), str(given["data.image_folder"])).rstrip("/") or "/",
            "workers": given["data.num_workers"],
            "pin_memory": given["data.pin_mem"],
        },
        "views": {
            "image_pixels": given["data.rand_size"],
            "focal_pixels": given["data.focal_size"],
            "random_views": given["data.rand_views"],
            "focal_views": given["data.focal_views"],
            "brightness": 0.8 * strength,
            "contrast": 0.8 * strength,
            "saturation": 0.8 * strength,
            "hue": 0.2 * strength,
        },
        "encoder": {"name": network, "drop_path": given["meta.drop_path_rate"]},
        "head": {
            "hidden": given["meta.hidden_dim"],
            "output": given["meta.output_dim"],
            "batch_norm": given["meta.use_bn"],
        },
        "masking": {"ratio": given["data.patch_drop"]},
        "criterion": {
            "prototypes": given["criterion.num_proto"],
            "temperature": given["criterion.temperature"],
            "sharpening": given["criterion.start_sharpen"],
            "final_sharpening": given["criterion.final_sharpen"],
            "sinkhorn_iterations": 3 if given["criterion.use_sinkhorn"] else 0,
            "me_max_weight": given["criterion.memax_weight"] if given["criterion.me_max"] else 0.0,
            "entropy_weight": given["criterion.ent_weight"] if given["criterion.use_ent"] else 0.0,
        },
        "optimization": {
            "epochs": given["optimization.epochs"],
            "batch_size": int(number("criterion.batch_size")) * world_size,
            "start_learning_rate": given["optimization.start_lr"],
            "learning_rate": given["optimization.lr"],
            "final_learning_rate": given["optimization.final_lr"],
            "warmup": given["optimization.warmup"],
            "weight_decay": given["optimization.weight_decay"],
            "final_weight_decay": given["optimization.final_weight_decay"],
            "clip": given["optimization.clip_grad"],
        },
    }


def _numbers(given: Mapping[str, Any], where: str) -> Callable[[str], float]:
    def number(key: str) -> float:
        try:
            return float(given[key])
        except (TypeError, ValueError):
            raise UsageError(f"{key}: {given[key]!r} is no number", where=where, hint="Correct the value.") from None

    return number
