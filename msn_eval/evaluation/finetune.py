"""Fine-tuning of one task of a plan: from labelled images to the predictions of the network that was trained on them."""

import re
import time
from collections.abc import Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path

import torch

from msn_eval.checkpoints.hf_export import (
    FolderContent,
    Head,
    build_classifier_content,
    build_folder_content,
    check_save_folder,
    read_saved_result,
    write_classifier,
)
from msn_eval.config.recipes import FinetuneRecipe
from msn_eval.data.hashing import make_unreadable_error
from msn_eval.data.images import ImageSet
from msn_eval.data.loader import PixelList, automatic_workers
from msn_eval.distributed.group import Group, all_gather_object, split_across_ranks
from msn_eval.errors import UsageError, name_place
from msn_eval.evaluation.canary import choose_labels
from msn_eval.evaluation.measurement import Measurement, find_taps, label_only, make_predictions, make_result_id
from msn_eval.evaluation.plan import Plan, Task, find_unreadable
from msn_eval.features.encoder import Encoder
from msn_eval.features.extraction import choose_batch_size
from msn_eval.probes.base import ProbeConfig, check_labelled
from msn_eval.probes.finetune import Finetune
from msn_eval.probes.finetune.model import FinetuneModel, build_finetune_model, check_trainable
from msn_eval.probes.finetune.predict import LabelledImages, RunOptions, score_images
from msn_eval.probes.finetune.train import Progress, finetune
from msn_eval.probes.training_state import StateFiles
from msn_eval.process import affordable_workers
from msn_eval.results.record import Predictions, Result


def finetune_task(
    measurement: Measurement, *, group: Group, on_progress: Progress | None = None
) -> tuple[Result, Predictions]:
    """Train a network as a task says, score the validation images with it, and write it if --save is given.

    What `check_finetuning` refuses has been refused.

    Raises:
        NumericalError: The labelled images are of a single class, or the loss is not finite.
        DataError: Images of either split cannot be used; it lists all of them, before anything is trained.
    """
    started = time.perf_counter()
    plan, encoder, task = measurement.plan, measurement.encoder, measurement.task
    probe, config, n_classes = task.probe, plan.config, len(plan.val.classes)
    assert isinstance(probe, Finetune)
    (tap,) = find_taps(encoder, task, config).values()
    images = plan.train.only(task.subset.image_ids)
    labelled, test = choose_labels(plan, label_only(images, tap), label_only(plan.val, tap))
    check_labelled(labelled)
    _check_readable(plan, images, group)
    options = _choose_options(plan, encoder, images)
    model = build_finetune_model(encoder, probe.recipe, tap=tap, n_classes=n_classes)
    trained = finetune(
        probe,
        model,
        LabelledImages(images=images, labels=labelled.labels, hashes=plan.train_hashes),
        precision=plan.precision,
        options=options,
        files=None if config.canary else make_state_files(plan, encoder, task),
        group=group,
        on_progress=on_progress,
    )
    scores = score_images(
        model,
        plan.val,
        plan.val_hashes,
        decoder=plan.decoder,
        precision=plan.precision,
        options=options,
        group=group,
    )
    if config.save is not None and group.rank == 0:
        write_classifier(find_saved_folder(plan, encoder, task), _export(plan, encoder, task, model))
    # A class without labelled images can never be predicted, as with every other probe.
    unlabelled = torch.ones(n_classes, dtype=torch.bool)
    unlabelled[labelled.labels] = False
    predictions = make_predictions(probe, test.image_ids, test.labels, scores.masked_fill(unlabelled, -torch.inf))
    measurement = replace(measurement, batch_size=trained.micro_batch)
    fitted = ProbeConfig(params=probe.params, solver="adamw", objective=trained.mean_loss, iterations=trained.step)
    seconds = time.perf_counter() - started
    return measurement.make_result(fitted, predictions, dim=model.dim, seconds=seconds), predictions


def _check_readable(plan: Plan, images: ImageSet, group: Group) -> None:
    """Decode every image once, so that a damaged one is reported now and not after hours. Raises DataError listing all."""
    if plan.config.on_bad_image == "skip":
        return  # the plan has left them out already
    own = []
    for split in (images, plan.val):
        rows = split_across_ranks(len(split), group, block=1)
        failures = find_unreadable(split.only(split.ids[rows.start : rows.stop]), plan.config.worker_count)
        own += [f"{split.source.place(image_id)}: {reason}" for image_id, reason in failures]
    if reasons := list(chain(*all_gather_object(group, "unreadable images", own))):
        raise make_unreadable_error(reasons)


def _choose_options(plan: Plan, encoder: Encoder, images: ImageSet) -> RunOptions:
    """Return the micro-batch (--batch-size) and the number of workers."""
    config, cuda = plan.config, plan.device.type == "cuda"
    micro_batch = config.batch_images or max(2, choose_batch_size(encoder) // (4 if cuda else 1))
    workers = config.worker_count
    if workers is None:
        pixels = PixelList(source=images.source, image_ids=images.ids, transform=encoder.transform, hashes=None)
        workers = automatic_workers(pixels, batch_size=4 * micro_batch, cuda=cuda)
    elif workers:
        workers = affordable_workers(workers, batch_bytes=4 * micro_batch * 3 * encoder.transform.crop**2)
    return RunOptions(micro_batch=micro_batch + micro_batch % 2, workers=workers)


def make_state_files(plan: Plan, encoder: Encoder, task: Task) -> StateFiles:
    """Return the state files of a task, named by all that decides how its training continues."""
    facts = {
        "result": make_result_id(encoder, task),
        "labelled images": task.split_sha256,
        "architecture": encoder.arch,
        "transform": str(encoder.transform),
        "precision": plan.precision,
    }
    return StateFiles(out=Path(plan.config.out), facts=facts)


def find_saved_folder(plan: Plan, encoder: Encoder, task: Task) -> Path:
    """Return the folder that a task's network is saved to: --save itself, or a folder in it if there are several."""
    assert plan.config.save is not None
    draws = [(other.subset.name, other.subset.draw) for other in plan.tasks if isinstance(other.probe, Finetune)]
    names = []
    if len(set(plan.config.checkpoint)) > 1:
        names.append(f"{_slugify(encoder.checkpoint.name)}-{encoder.checkpoint.weights_sha256[:8]}")
    if len(draws) > 1:
        suffix = f"-{task.protocol_id[:8]}" if len(set(draws)) < len(draws) else ""
        names.append(f"{_slugify(task.subset.name)}-{task.subset.draw}{suffix}")
    return Path(plan.config.save, *names)


def _slugify(name: str) -> str:
    return re.sub(r"[^a-z0-9_.-]", "-", name.lower())[:60]


def check_finetuning(plan: Plan, encoder: Encoder, pending: Sequence[Task]) -> None:
    """Check all tasks of a plan that train the encoder, before anything is computed.

    Raises:
        UsageError: One of `pending`, those that are left, cannot be trained; or with --save, something else exists in its folder,
            or an earlier run has measured the result and not kept the network.
        CheckpointError: With --save, the network could not be written.
    """
    for task in plan.tasks:
        if not isinstance(task.probe, Finetune):
            continue
        (tap,) = find_taps(encoder, task, plan.config).values()
        if task in pending:
            check_trainable(encoder, task.probe.recipe, tap=tap)
        if plan.config.save is None:
            continue
        folder, result_id = find_saved_folder(plan, encoder, task), make_result_id(encoder, task)
        if task in pending:
            check_save_folder(folder, result_id)
            still = FinetuneRecipe(drop_path=0.0)
            blank = build_finetune_model(encoder, still, tap=tap, n_classes=len(plan.val.classes))
            _export(plan, encoder, task, blank)
        elif read_saved_result(folder) != result_id:
            what = f"--save: {result_id} is measured already in {plan.config.out}, and its network was not kept"
            raise UsageError(what, where=str(folder), hint="Train it again with a different --out.")


def _export(plan: Plan, encoder: Encoder, task: Task, model: FinetuneModel) -> FolderContent:
    """Return the content of the folder that transformers loads. Raises CheckpointError if it has no such network."""
    weights = {name: weight.detach().cpu() for name, weight in model.network.state_dict().items()}
    head = Head(
        weight=weights.pop("head.weight", model.head.weight.detach().cpu()),
        bias=weights.pop("head.bias", model.head.bias.detach().cpu()),
        tap=model.tap,
        classes=plan.val.classes,
    )
    with name_place(encoder.checkpoint.path):
        backbone = build_folder_content(
            model.network, weights, name=encoder.arch, mean=encoder.transform.mean, std=encoder.transform.std
        )
        return build_classifier_content(backbone, head, name=encoder.arch, result_id=make_result_id(encoder, task))
