"""Plan: which images, subsets and probes a request comes to, read and hashed, before any network runs."""

import hashlib
import logging
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import cast, get_args

import torch

from msn_eval.checkpoints.checkpoint import check_checkpoint_names
from msn_eval.config.recipes import Params
from msn_eval.config.request import DECODERS, EvaluationConfig
from msn_eval.data import list_datasets, read_dataset
from msn_eval.data.dataset import DataSet, class_map_sha256
from msn_eval.data.decoders import check_decoder
from msn_eval.data.hashing import content_sha256, hash_images
from msn_eval.data.imagenet_subsets import read_publication
from msn_eval.data.images import ImageSet, eval_transform
from msn_eval.data.loader import PixelList, load_pixels
from msn_eval.data.subsets import Subset, check_subset_names, make_subsets, readable_subsets, union_of
from msn_eval.errors import DataError, NumericalError, UsageError
from msn_eval.features.encoder import Precision, choose_device, default_precision, precision_class
from msn_eval.files.atomic import prepare_folder
from msn_eval.probes import Finetune, Probe, named_taps, probe_configs
from msn_eval.probes.knn import DEFAULT_KS, DEFAULT_TEMPERATURE, NearestNeighbours
from msn_eval.probes.linear import Linear
from msn_eval.probes.linear_augmented import LinearAugmented
from msn_eval.probes.logistic import Logistic, LogisticAutoLambda, Solver, default_lambda
from msn_eval.probes.ncm import NearestClassMean
from msn_eval.probes.ridge import Ridge
from msn_eval.results.record import PROTOCOL_VERSION, protocol_id

_log = logging.getLogger(__name__)
DATA_VARIABLE = "MSN_EVAL_DATA"
_SHOWN = 10
_SMALL_PIXELS, _CHECKED_AT_ONCE = 8, 64
_TRANSFORM_RULE = "resize-256/224-bilinear-centre-crop"


@dataclass(frozen=True, kw_only=True)
class Task:
    """One measurement to make, the checkpoint apart: a draw, a probe, one setting of it.

    split_sha256: of the draw's images by content
    overlap:      validation images that are also among them, byte for byte
    """

    subset: Subset
    split_sha256: str
    overlap: int
    probe: Probe
    params: Params
    protocol: dict[str, object]

    @property
    def taps(self) -> tuple[str, ...]:
        """Give the taps that the probe names: one by its rule, or those among which it is to choose."""
        return named_taps(self.probe)

    @cached_property
    def protocol_id(self) -> str:
        return protocol_id(self.protocol)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Everything that a request comes to.

    val:   the images that are scored, after --limit and without the skipped ones
    train:   the training images that `subsets` are drawn from
    val_hashes, train_hashes: SHA-256 of the bytes of every image that is read
    skipped_val: unreadable validation images that are not scored
    """

    request: EvaluationConfig
    data_name: str
    val: ImageSet
    train: ImageSet
    subsets: tuple[Subset, ...]
    val_hashes: dict[str, str]
    train_hashes: dict[str, str]
    skipped_val: tuple[str, ...]
    device: torch.device
    precision: Precision
    tasks: tuple[Task, ...]

    @cached_property
    def val_sha256(self) -> str:
        return content_sha256(self.val.ids, self.val_hashes)

    @cached_property
    def classes_sha256(self) -> str:
        return class_map_sha256(self.val.classes)

    @property
    def decoder(self) -> str:
        """Give the decoder that is used: embedded images are no files, and only resized."""
        return "pillow" if self.val.source.root is None else self.request.decoder

    def skipped(self, subset: Subset) -> tuple[str, ...]:
        """Give the unreadable images of either split that results on this subset do without."""
        return (*(f"val/{image_id}" for image_id in self.skipped_val), *(f"train/{one}" for one in subset.skipped))


def make_plan(request: EvaluationConfig, *, local_rank: int | None = None) -> Plan:
    """Read the data set, draw the subsets, hash the images, and list the measurements.

    local_rank: number of this rank among those of its machine, None where it is alone
    Raises UsageError, CheckpointError, DataError or NumericalError for whatever can be known before a network runs.
    """
    if not request.checkpoint:
        raise UsageError("no checkpoint given", hint="Name one or several: --checkpoint FILE; or try msn-eval demo.")
    check_checkpoint_names(tuple(request.checkpoint))
    check_subset_names(request.subset)
    device = choose_device(request.device, local_rank=local_rank)
    check_decoder(request.decoder, device)
    precision = (
        cast(Precision, request.precision) if request.precision in get_args(Precision) else default_precision(device)
    )
    cache_dir = None if request.no_cache else cache_folder(request)
    if cache_dir is not None:
        prepare_folder(cache_dir, option="--cache")
    data = _read_data(request, cache_dir)
    val = data.val.first_of_each_class(request.limit) if request.limit else data.val
    skipped_val: tuple[str, ...] = ()
    if request.on_bad_image == "skip":
        undecodable = partial(_undecodable, workers=request.worker_count)
        skipped_val = tuple(undecodable(val))
        val = val.only([image_id for image_id in val.ids if image_id not in set(skipped_val)])
        subsets = readable_subsets(request.subset, data.train, undecodable)
    else:
        subsets = make_subsets(request.subset, data.train)
    if not len(val):
        raise DataError("no validation image can be read", hint="Check the files, or give another --data.")
    pool = union_of(subsets, data.train)
    plan = Plan(
        request=request,
        data_name=data.name,
        val=val,
        train=data.train,
        subsets=subsets,
        val_hashes=hash_images(val, cache_dir=cache_dir),
        train_hashes=hash_images(pool, cache_dir=cache_dir),
        skipped_val=skipped_val,
        device=device,
        precision=precision,
        tasks=(),
    )
    _warn_of_data(plan)
    for name, skipped in {subset.name: plan.skipped(subset) for subset in subsets}.items():
        if skipped:
            _log.warning("%s: %d unreadable images are skipped: %s", name, len(skipped), ", ".join(skipped[:_SHOWN]))
    tasks = tuple(_tasks(plan))
    if not tasks:
        raise NumericalError(
            f"every k is above the {max(map(len, subsets))} labelled images: nothing to measure",
            hint="Ask for a smaller one: --k 1,5.",
        )
    return replace(plan, tasks=tasks)


def _read_data(request: EvaluationConfig, cache_dir: Path | None) -> DataSet:
    data = read_dataset(_data_name(request), allow_class_mismatch=request.allow_class_mismatch, cache_dir=cache_dir)
    for split, images in (("train", data.train), ("val", data.val)):
        if images.passed_over:
            _log.info("%s: %d files passed over that are no images by their names", split, images.passed_over)
    if request.classes not in (None, len(data.classes)):
        raise DataError(
            f"{data.name} has {len(data.classes)} classes, {request.classes} are asked for",
            hint="Give the --data that was meant, or correct `classes` (num_classes in a file of the MSN repository).",
        )
    if len(data.classes) < 2:
        raise NumericalError(
            f"{data.name} has the single class {data.classes[0]!r}: every answer would be right",
            hint="Give --data a folder with a folder for each of several classes.",
        )
    return data


def _data_name(request: EvaluationConfig) -> str:
    name = request.data or os.environ.get(DATA_VARIABLE)
    if not name:
        choices = "; ".join(f"{name}: {what}" for name, what in list_datasets().items())
        raise UsageError("no data set given", hint=f"Pass --data or set ${DATA_VARIABLE}. Choices: {choices}.")
    return name


def cache_folder(request: EvaluationConfig) -> Path:
    """Give the folder for what can be computed again: --cache, or the user's cache folder."""
    import platformdirs

    return Path(request.cache) if request.cache else platformdirs.user_cache_path("msn-eval")


def probes_for(request: EvaluationConfig, subset: Subset) -> Iterator[Probe]:
    """Give the probes asked for, with the hyper-parameters that hold for this subset."""
    for name in dict.fromkeys(request.probe):
        match name:
            case "logistic":
                solver = cast(Solver, request.solver)
                if request.strengths or not request.chooses_strength:
                    yield Logistic(lambdas=request.strengths or (default_lambda(subset.name),), solver=solver)
                if request.chooses_strength:
                    yield LogisticAutoLambda(solver=solver)
            case "knn":
                yield NearestNeighbours(
                    ks=tuple(dict.fromkeys(request.k)) or DEFAULT_KS,
                    temperatures=tuple(dict.fromkeys(request.temperature)) or (DEFAULT_TEMPERATURE,),
                    asked=bool(request.k),
                )
            case "ridge":
                yield Ridge()
            case "linear":
                yield Linear(**vars(request.linear))
            case "linear-augmented":
                yield LinearAugmented(**vars(request.linear_augmented))
            case "finetune":
                yield Finetune(recipe=request.finetune, seed=request.seed)
            case _:
                yield NearestClassMean()


def _tasks(plan: Plan) -> Iterator[Task]:
    val_digests = Counter(plan.val_hashes.values())
    for subset in plan.subsets:
        split_sha256 = content_sha256(subset.image_ids, plan.train_hashes)
        overlap = sum(val_digests[digest] for digest in {plan.train_hashes[image_id] for image_id in subset.image_ids})
        for probe in probes_for(plan.request, subset):
            possible = probe_configs(probe, len(subset))
            if not possible:
                _log.warning("%s leaves nothing to measure on the %d images of %s", probe, len(subset), subset.name)
            for params in possible:
                protocol = _protocol(plan, subset, probe, params)
                yield Task(
                    subset=subset,
                    split_sha256=split_sha256,
                    overlap=overlap,
                    probe=probe,
                    params=params,
                    protocol=protocol,
                )


def _protocol(plan: Plan, subset: Subset, probe: Probe, params: Params) -> dict[str, object]:
    """Give all that must be equal for two numbers to be comparable. The draw and the checkpoint's own facts are not
    in it; what the user sets by hand is."""
    request = plan.request
    by_hand = {
        "tap": request.tap,
        "image_pixels": request.image_pixels,
        "patch_drop": request.patch_drop,
        "seed": request.seed if request.patch_drop else None,  # by which the patches are drawn
        "decoder": None if request.decoder == DECODERS[0] else request.decoder,
        "canary": request.seed if request.canary else None,  # never comparable with a measurement
    }
    return {
        "version": PROTOCOL_VERSION,
        "data": {"sha256": plan.val_sha256, "class_map_sha256": plan.classes_sha256},
        "subset": {"name": subset.name, "rule": subset.rule},
        "tap": ",".join(named_taps(probe)),
        "transform": _TRANSFORM_RULE,
        "probe": {"name": probe.name, "version": probe.version, "params": params},
        "precision": precision_class(plan.precision),
        "limit": request.limit,
        "skipped": _ids_sha256(skipped) if (skipped := plan.skipped(subset)) else None,
        # Only what was given, so that an option that is new to this package leaves the ids of old protocols alone.
        "by_hand": {name: value for name, value in by_hand.items() if value is not None},
    }


def _ids_sha256(image_ids: Sequence[str]) -> str:
    return hashlib.sha256(b"".join(os.fsencode(image_id) + b"\n" for image_id in image_ids)).hexdigest()


def _warn_of_data(plan: Plan) -> None:
    """Say what makes an accuracy too high or too low without anything failing."""
    publication = read_publication()
    if plan.classes_sha256 == publication.class_map_sha256 and len(plan.val) != publication.val_images:
        _log.warning("ImageNet has %d validation images, %d are scored here", publication.val_images, len(plan.val))
    labelled = set(plan.train_hashes.values())
    shared = sum(1 for digest in plan.val_hashes.values() if digest in labelled)
    if shared:
        _log.warning("%d validation images are also among the labelled training images, byte for byte", shared)
    unreachable = set(plan.val.labels) - set(plan.train.labels)
    if unreachable:
        lost = sum(1 for label in plan.val.labels if label in unreachable)
        _log.warning("%d validation images belong to classes without training images and can never be right", lost)


def _undecodable(images: ImageSet, workers: int | None) -> list[str]:
    """Decode every image, all decoders refusing the same ones, and give those that cannot be used."""
    pixels = PixelList(source=images.source, image_ids=images.ids, transform=eval_transform(_SMALL_PIXELS), hashes=None)
    bad = []
    for batch in load_pixels(pixels, batch_size=_CHECKED_AT_ONCE, workers=workers or 0):
        for image_id, reason in batch.failures:
            _log.info("%s: %s", images.source.place(image_id), reason)
            bad.append(image_id)
    return bad
