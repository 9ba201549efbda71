"""Reference evaluation: the linear-evaluation YAML of the MSN authors' repository, key by key into ours.

Source: github.com/facebookresearch/msn, configs/eval/lineval_msn_vits16.yaml, and linear_eval.py, which reads it.
"""

import posixpath
from collections.abc import Mapping
from typing import Any

from msn_eval.errors import UsageError, nearest
from msn_eval.reference_networks import NETWORKS

_SECTIONS = ("data", "logging", "meta", "optimization")
MAPPED = {
    "data.root_path": "data, with image_folder behind it",
    "data.image_folder": "data",
    "data.num_classes": "classes: a data set with another number is refused",
    "logging.folder": "checkpoint and out, with pretrain_path and write_tag behind it",
    "logging.pretrain_path": "checkpoint",
    "logging.write_tag": "out",
    "meta.copy_data": "nothing; only false",
    "meta.device": "device",
    "meta.load_checkpoint": "nothing: a run that is started again on its folder goes on",
    "meta.master_port": "nothing: the launcher's",
    "meta.model_name": "arch",
    "meta.training": "nothing; only true",
    "optimization.epochs": "linear_augmented.epochs",
    "optimization.lr": "linear_augmented.lr",
    "optimization.normalize": "nothing; only true",
    "optimization.num_blocks": "nothing; only 1",
    "optimization.weight_decay": "linear_augmented.weight_decay",
}
_ONLY: dict[str, tuple[object, str]] = {
    "meta.copy_data": (False, "nothing is copied to a node's own disk here; do so beforehand and set data.root_path"),
    "meta.training": (True, "a classifier that their code has trained cannot be scored here"),
    "optimization.normalize": (True, "the layer of linear-augmented stands behind an L2 norm"),
    "optimization.num_blocks": (1, "the class tokens of several blocks, not normed, are no tap here"),
}
# The file has no batch size: 256 a rank in their code, and 64 ranks in the published runs.
_BATCH_SIZE = 16384


def is_reference(content: Mapping[str, object]) -> bool:
    """Tell whether a YAML file is laid out as the authors' are: it has their section `meta`, and ours has none."""
    return "meta" in content


def converted(content: Mapping[str, Any], *, where: str) -> dict[str, object]:
    """Give the fields of a request for an authors' file.

    Raises UsageError for keys that their code does not read, lacks, or that mean something that is not done here.
    """
    given = _read(content, where)
    for key, (only, why) in _ONLY.items():
        if type(given[key]) is not type(only) or given[key] != only:
            raise UsageError(
                f"{key}: {given[key]} cannot be mapped: {why}", where=where, remedy=f"Set it to {str(only).lower()}."
            )
    name = str(given["meta.model_name"])
    if name not in NETWORKS:
        raise UsageError(
            f"meta.model_name: {name!r} cannot be mapped.{nearest(name, NETWORKS)}",
            where=where,
            remedy=f"Known: {', '.join(NETWORKS)}.",
        )
    folder = str(given["logging.folder"])
    return {
        "checkpoint": [posixpath.join(folder, str(given["logging.pretrain_path"]))],
        "arch": NETWORKS[name],
        "data": posixpath.join(str(given["data.root_path"]), str(given["data.image_folder"])).rstrip("/") or "/",
        "classes": given["data.num_classes"],
        "subset": ["full"],
        "probe": ["linear-augmented"],
        "device": given["meta.device"],
        "out": posixpath.join(folder, str(given["logging.write_tag"])),
        "linear_augmented": {
            "lr": [given["optimization.lr"]],
            "weight_decay": given["optimization.weight_decay"],
            "epochs": given["optimization.epochs"],
            "batch_size": _BATCH_SIZE,
        },
    }


def _read(content: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Give `section.key` and value, all that the authors' code reads and no others."""
    given: dict[str, Any] = {}
    for section, values in content.items():
        if section not in _SECTIONS or not isinstance(values, Mapping):
            raise UsageError(
                f"{section!r} is no section of the MSN repository's files.{nearest(section, _SECTIONS)}",
                where=where,
                remedy=f"Known: {', '.join(_SECTIONS)}. A file of ours has no section `meta`.",
            )
        given |= {f"{section}.{key}": value for key, value in values.items()}
    unknown = next((key for key in given if key not in MAPPED), None)
    if unknown is not None:
        raise UsageError(
            f"unknown key {unknown!r}.{nearest(unknown, MAPPED)}",
            where=where,
            remedy="The linear evaluation of the MSN repository does not read it either: take it out.",
        )
    missing = [key for key in MAPPED if key not in given]
    if missing:
        raise UsageError(
            f"lacks {', '.join(missing)}", where=where, remedy="The code of the MSN repository needs them, too."
        )
    return given
