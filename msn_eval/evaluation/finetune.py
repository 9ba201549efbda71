"""Finetuning: one task of a plan from labelled images to the predictions of the network that was trained on them."""

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from msn_eval.checkpoints.hf_export import Head, PlainNetwork, check_saved_place, classifier_content, write_classifier
from msn_eval.config.recipes import Finetune, FinetuneRecipe
from msn_eval.data.hashing import unreadable
from msn_eval.data.images import ImageSet, eval_transform
from msn_eval.data.loader import PixelList, automatic_workers, load_pixels
from msn_eval.distributed.group import ALONE, Group, all_gather_object, joined, share
from msn_eval.errors import NumericalError
from msn_eval.evaluation.canary import draw_labels
from msn_eval.evaluation.plan import Plan, Task
from msn_eval.features.encoder import Encoder, resolve_tap
from msn_eval.features.extraction import automatic_batch_size
from msn_eval.probes.base import ProbeConfig, rank_labels
from msn_eval.probes.finetune.model import FinetuneModel, build_finetune_model
from msn_eval.probes.finetune.predict import Labelled, Pace, score_images
from msn_eval.probes.finetune.train import FinetuneResult, Progress, finetune
from msn_eval.probes.training_state import StateFiles
from msn_eval.results.record import Predictions

_SMALL_PIXELS, _CHECKED_AT_ONCE = 8, 64
_SLUG = "abcdefghijklmnopqrstuvwxyz0123456789-_."


@dataclass(frozen=True, kw_only=True)
class Finetuned:
    """What a task came to. dim: of what the head is given; part: images at once on a rank at the end."""

    setting: ProbeConfig
    predictions: Predictions
    dim: int
    part: int


def finetune_task(
    plan: Plan,
    encoder: Encoder,
    task: Task,
    *,
    result_id: str,
    group: Group = ALONE,
    on_progress: Progress | None = None,
) -> Finetuned:
    """Train a network as a task says, score the validation images by it, and write it where --save says.

    Raises NumericalError for a single class, labels that are no classes, and a loss that is not finite; DataError listing
    the images of both splits that cannot be used, before anything is trained.
    """
    probe, request = task.probe, plan.request
    assert isinstance(probe, Finetune)
    tap = resolve_tap(encoder, request.tap or probe.tap, by_hand=request.tap is not None)
    images = plan.train.only(task.subset.image_ids)
    trained_labels, labels = _labels(plan, images)
    if len(torch.unique(trained_labels)) < 2:
        raise NumericalError(
            f"the {len(images)} labelled images are of a single class", hint="Label images of at least two classes."
        )
    if request.save is not None and group.rank == 0:
        _check_savable(plan, encoder, task, tap, result_id)
    _refuse_unreadable(plan, images, group)
    pace = pace_of(plan, encoder, images)
    trainee = build_finetune_model(encoder, probe.recipe, tap=tap, n_classes=len(plan.val.classes))
    states = None if request.canary else states_of(plan, encoder, task, result_id)
    with joined(group, plan.device):
        tuned = finetune(
            probe,
            trainee,
            Labelled(images=images, labels=trained_labels, hashes=plan.train_hashes),
            precision=plan.precision,
            pace=pace,
            states=states,
            group=group,
            on_progress=on_progress,
        )
        scores = score_images(
            trainee,
            plan.val,
            plan.val_hashes,
            decoder=plan.decoder,
            precision=plan.precision,
            pace=pace,
            group=group,
        )
    if request.save is not None and group.rank == 0:
        content = classifier_content(_plain(encoder, trainee), _head(plan, trainee), result_id=result_id)
        write_classifier(saved_folder(plan, encoder, task), content)
    return Finetuned(
        setting=_setting(probe, tuned),
        predictions=_predictions(plan.val, scores, trained_labels, labels),
        dim=trainee.dim,
        part=tuned.part,
    )


def states_of(plan: Plan, encoder: Encoder, task: Task, result_id: str) -> StateFiles:
    """Give where the states of a task stand: by all that decides how its training goes on."""
    facts = {
        "result": result_id,
        "labelled images": task.split_sha256,
        "architecture": encoder.arch,
        "transform": str(encoder.transform),
        "precision": plan.precision,
    }
    return StateFiles(out=Path(plan.request.out), facts=facts)


def pace_of(plan: Plan, encoder: Encoder, images: ImageSet) -> Pace:
    """Give how fast a task runs: --batch-size images at once, --workers that decode."""
    request = plan.request
    part = request.batch_images or max(2, automatic_batch_size(encoder) // (4 if plan.device.type == "cuda" else 1))
    workers = request.worker_count
    if workers is None:
        listed = PixelList(source=images.source, image_ids=images.ids, transform=encoder.transform, hashes=None)
        workers = automatic_workers(listed, batch_size=4 * part, cuda=plan.device.type == "cuda")
    return Pace(part=part + part % 2, workers=workers)


def saved_folder(plan: Plan, encoder: Encoder, task: Task) -> Path:
    """Give the folder that a task's network is saved to: --save itself where there is but one, else one inside of it."""
    assert plan.request.save is not None
    tuned = [one for one in plan.tasks if isinstance(one.probe, Finetune)]
    checkpoints = list(dict.fromkeys(plan.request.checkpoint))
    parts = []
    if len(checkpoints) > 1:
        name = "".join(letter if letter in _SLUG else "-" for letter in encoder.checkpoint.name.lower())[:60]
        parts.append(f"{name}-{encoder.checkpoint.weights_sha256[:8]}")
    if len(tuned) > 1:
        subset = "".join(letter if letter in _SLUG else "-" for letter in task.subset.name.lower())[:60]
        parts.append(
            f"{subset}-{task.subset.draw}-{task.protocol_id[:8]}" if _several(tuned) else f"{subset}-{task.subset.draw}"
        )
    return Path(plan.request.save, *parts)


def _several(tasks: list[Task]) -> bool:
    """Tell whether subset and draw do not tell tasks apart."""
    return len({(one.subset.name, one.subset.draw) for one in tasks}) < len(tasks)


def _labels(plan: Plan, images: ImageSet) -> tuple[Tensor, Tensor]:
    """Give the labels of the labelled and of the validation images; with --canary such as say nothing."""
    trained, asked = (torch.tensor(one.labels, dtype=torch.int64) for one in (images, plan.val))
    if not plan.request.canary:
        return trained, asked
    return draw_labels(
        trained,
        asked,
        n_classes=len(plan.val.classes),
        seed=plan.request.seed,
        train_contents=[plan.train_hashes[image_id] for image_id in images.ids],
        val_contents=[plan.val_hashes[image_id] for image_id in plan.val.ids],
    )


def _refuse_unreadable(plan: Plan, images: ImageSet, group: Group) -> None:
    """Decode every image once, so that a damaged one is told of now and not after hours. Raises DataError listing all."""
    if plan.request.on_bad_image == "skip":
        return  # they are out already
    failures = []
    for split in (images, plan.val):
        rows = share(len(split), group, block=_CHECKED_AT_ONCE)
        pixels = PixelList(
            source=split.source,
            image_ids=split.ids[rows.start : rows.stop],
            transform=eval_transform(_SMALL_PIXELS),
            hashes=None,
        )
        for batch in load_pixels(pixels, batch_size=_CHECKED_AT_ONCE, workers=plan.request.worker_count or 0):
            failures += [f"{split.source.place(image_id)}: {reason}" for image_id, reason in batch.failures]
    told = all_gather_object(group, "unreadable images", "\n".join(failures))
    if any(told):
        raise unreadable([line for text in told for line in text.splitlines()])


def _setting(probe: Finetune, tuned: FinetuneResult) -> ProbeConfig:
    return ProbeConfig(params=probe.params, solver="adamw", objective=tuned.loss, iterations=tuned.steps)


def _predictions(val: ImageSet, scores: Tensor, trained_labels: Tensor, labels: Tensor) -> Predictions:
    """Rank the classes; one without labelled images can never be chosen, as with every other probe."""
    seen = torch.zeros(scores.shape[1], dtype=torch.bool)
    seen[trained_labels] = True
    prediction, rank = rank_labels(scores.masked_fill(~seen, -float("inf")), labels)
    return Predictions(
        image=np.array([os.fsencode(image_id) for image_id in val.ids]),
        label=labels.numpy(),
        prediction=prediction.numpy(),
        rank_of_label=rank.numpy(),
    )


def _check_savable(plan: Plan, encoder: Encoder, task: Task, tap: str, result_id: str) -> None:
    """Find out before training what would keep the network from being saved after it."""
    check_saved_place(saved_folder(plan, encoder, task), result_id)
    blank = build_finetune_model(encoder, FinetuneRecipe(drop_path=0.0), tap=tap, n_classes=len(plan.val.classes))
    classifier_content(_plain(encoder, blank), _head(plan, blank), result_id=result_id)


def _plain(encoder: Encoder, trainee: FinetuneModel) -> PlainNetwork:
    from timm.layers import GluMlp

    head = {f"head.{name}" for name in ("weight", "bias")}
    weights = {name: one.detach().cpu() for name, one in trainee.network.state_dict().items() if name not in head}
    return PlainNetwork(
        outline=trainee.network,
        weights=weights,
        gated=any(isinstance(one, GluMlp) for one in trainee.network.modules()),
        mean=encoder.transform.mean,
        std=encoder.transform.std,
        name=encoder.arch,
        where=encoder.checkpoint.path,
    )


def _head(plan: Plan, trainee: FinetuneModel) -> Head:
    return Head(
        weight=trainee.head.weight.detach().cpu(),
        bias=trainee.head.bias.detach().cpu(),
        tap=trainee.tap,
        classes=plan.val.classes,
    )
