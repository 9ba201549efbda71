"""Reference evaluation: the linear-evaluation YAML of the MSN authors' repository, key by key into ours.

Source: github.com/facebookresearch/msn, configs/eval/lineval_msn_vits16.yaml, and linear_eval.py, which reads it.
"""

import posixpath
from collections.abc import Mapping
from typing import Any

from msn_eval.config.reference_networks import network_of
from msn_eval.config.reference_yaml import read_keys
from msn_eval.errors import UsageError

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


def converted(content: Mapping[str, Any], *, where: str) -> dict[str, object]:
    """Give the fields of a request for an authors' file.

    Raises UsageError for keys that their code does not read, lacks, or that mean something that is not done here.
    """
    given = read_keys(content, known=MAPPED, defaults={}, reader="linear evaluation", where=where)
    for key, (only, why) in _ONLY.items():
        if type(given[key]) is not type(only) or given[key] != only:
            raise UsageError(
                f"{key}: {given[key]} cannot be mapped: {why}", where=where, remedy=f"Set it to {str(only).lower()}."
            )
    network = network_of(str(given["meta.model_name"]), where=where)
    folder = str(given["logging.folder"])
    return {
        "checkpoint": [posixpath.join(folder, str(given["logging.pretrain_path"]))],
        "arch": network,
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
