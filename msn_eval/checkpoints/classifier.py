"""Classifier: a network with its head as a folder that transformers' `…ForImageClassification` loads with the same logits."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from msn_eval.checkpoints.hf_export import FolderContent, PlainNetwork, folder_content, write_folder
from msn_eval.errors import CheckpointError, UsageError

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
            remedy=f"Fine-tune with --tap {fitting.taps[0]}.",
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
        "--save: something else is there already", where=str(out), remedy="Name another folder, or remove it first."
    )


def saved_result(out: Path) -> str | None:
    """Give the id of the result whose network stands in a folder, None where there is none."""
    try:
        content = json.loads((out / "config.json").read_bytes())
        return str(content[RESULT]) if (out / "model.safetensors").is_file() else None
    except (OSError, ValueError, KeyError, TypeError):
        return None
