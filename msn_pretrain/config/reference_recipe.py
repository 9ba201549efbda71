"""Reference recipe: the YAML of the MSN authors' repository, key by key into ours.

Source: github.com/facebookresearch/msn, configs/pretrain/msn_vits16.yaml, and src/msn_train.py, which reads it.
"""

import posixpath
from collections.abc import Callable, Mapping
from typing import Any

from msn_eval.config.reference_networks import network_of
from msn_eval.config.reference_yaml import read_keys
from msn_eval.errors import UsageError

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
            raise UsageError(f"{key}: {given[key]} cannot be mapped: {why}", where=where, remedy=f"Set it to {only}.")
    network = network_of(str(given["meta.model_name"]), where=where)
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
            raise UsageError(f"{key}: {given[key]!r} is no number", where=where, remedy="Correct the value.") from None

    return number
