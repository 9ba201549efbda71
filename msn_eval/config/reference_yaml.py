"""Reference file: a YAML file of the MSN authors' repository, mapped to fields of this package.

Source: github.com/facebookresearch/msn.
"""

import posixpath
from collections.abc import Collection, Mapping
from typing import Any

from msn_eval.errors import UsageError, did_you_mean


def is_reference(content: Mapping[str, object]) -> bool:
    """Whether a YAML file is from the MSN repository: only those have a section `meta`."""
    return "meta" in content


def read_keys(
    content: Mapping[str, Any], *, known: Collection[str], defaults: Mapping[str, object], reader: str, where: str
) -> dict[str, Any]:
    """Return the value of each `section.key`.

    Args:
        content: The file's content.
        known: All keys that the authors' code reads, as `section.key`.
        defaults: The values that their code uses where the file has none.
        reader: The name of that code, for errors.
        where: The file, for errors.

    Raises:
        UsageError: A section or key is unknown, or keys are missing.
    """
    sections = sorted({key.partition(".")[0] for key in known})
    given: dict[str, Any] = {}
    for section, values in content.items():
        if section not in sections or not isinstance(values, Mapping):
            what = f"{section!r} is not a section of the MSN repository's files.{did_you_mean(section, sections)}"
            hint = f"Known: {', '.join(sections)}. Files of msn-eval have no section `meta`."
            raise UsageError(what, where=where, hint=hint)
        given |= {f"{section}.{key}": value for key, value in values.items()}
    unknown = next((key for key in given if key not in known), None)
    if unknown is not None:
        hint = f"The {reader} of the MSN repository does not read it either: remove it."
        raise UsageError(f"unknown key {unknown!r}.{did_you_mean(unknown, known)}", where=where, hint=hint)
    given = {**defaults, **given}
    missing = [key for key in known if key not in given]
    if missing:
        hint = "The code of the MSN repository needs them too."
        raise UsageError(f"lacks {', '.join(missing)}", where=where, hint=hint)
    return given


KNOWN = (
    *("data.root_path", "data.image_folder", "data.num_classes"),
    *("logging.folder", "logging.pretrain_path", "logging.write_tag"),
    *("meta.copy_data", "meta.device", "meta.load_checkpoint", "meta.master_port", "meta.model_name", "meta.training"),
    *("optimization.epochs", "optimization.lr", "optimization.normalize", "optimization.num_blocks"),
    "optimization.weight_decay",
)
_ONLY: dict[str, tuple[object, str]] = {
    "meta.copy_data": (False, "msn-eval copies nothing to a node's disk; copy beforehand and set data.root_path"),
    "meta.training": (True, "msn-eval cannot score a classifier that their code trained"),
    "optimization.normalize": (True, "linear-augmented L2-normalises the features"),
    "optimization.num_blocks": (1, "msn-eval has no tap for unnormalised class tokens of several blocks"),
}
# The file has no batch size: 256 per rank in their code, and 64 ranks in the published runs.
_BATCH_SIZE = 16384


def map_reference_config(content: Mapping[str, Any], *, where: str) -> dict[str, object]:
    """Return the fields of an EvaluationConfig for a linear-evaluation file of the authors.

    Raises:
        UsageError: The file has a key that their code does not read, lacks one, or asks for something that is not supported.
    """
    given = read_keys(content, known=KNOWN, defaults={}, reader="linear evaluation", where=where)
    for key, (only, why) in _ONLY.items():
        if type(given[key]) is not type(only) or given[key] != only:
            hint = f"Set it to {str(only).lower()}."
            raise UsageError(f"{key}: {given[key]} cannot be mapped: {why}", where=where, hint=hint)
    folder = str(given["logging.folder"])
    return {
        "checkpoint": [posixpath.join(folder, str(given["logging.pretrain_path"]))],
        "arch": map_architecture(str(given["meta.model_name"]), where=where),
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


# The authors' name -> timm's, with the keywords that make it the same network.
NETWORKS = {
    "deit_tiny": "vit_tiny_patch16_224",
    "deit_small": "vit_small_patch16_224",
    "deit_small_p8": "vit_small_patch8_224",
    "deit_small_p7": "vit_small_patch16_224?patch_size=7",
    "deit_base": "vit_base_patch16_224",
    "deit_base_p8": "vit_base_patch8_224",
    "deit_base_p7": "vit_base_patch16_224?patch_size=7",
    "deit_base_p4": "vit_base_patch16_224?patch_size=4",
    "deit_large": "vit_large_patch16_224",
    "deit_large_p8": "vit_large_patch16_224?patch_size=8",
    "deit_large_p7": "vit_large_patch16_224?patch_size=7",
    "deit_huge": "vit_huge_patch14_224?patch_size=16",
    "deit_huge_p10": "vit_huge_patch14_224?patch_size=10",
    "deit_huge_p8": "vit_huge_patch14_224?patch_size=8",
    "deit_huge_p7": "vit_huge_patch14_224?patch_size=7",
}


def map_architecture(name: str, *, where: str) -> str:
    """Return the timm architecture for a name of the authors. Raises UsageError naming the file `where`."""
    if name not in NETWORKS:
        what = f"meta.model_name: {name!r} cannot be mapped.{did_you_mean(name, NETWORKS)}"
        raise UsageError(what, where=where, hint=f"Known: {', '.join(NETWORKS)}.")
    return NETWORKS[name]
