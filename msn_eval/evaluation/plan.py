"""Plan: the images, subsets and probes of an evaluation, read and hashed before any network runs."""

import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import product
from pathlib import Path
from typing import cast

import platformdirs
import torch

from msn_eval.checkpoints.checkpoint import check_checkpoint_names
from msn_eval.config.recipes import Params
from msn_eval.config.request import DECODERS, REAL_PREFIX, EvaluationConfig
from msn_eval.data import find_data_name, read_dataset
from msn_eval.data.dataset import DataSet
from msn_eval.data.decoders import check_decoder
from msn_eval.data.hashing import content_sha256, hash_images
from msn_eval.data.imagenet_subsets import read_publication
from msn_eval.data.images import BadImagesError, ImageSet, make_eval_transform
from msn_eval.data.loader import PixelList, load_pixels
from msn_eval.data.subsets import Subset, check_subset_names, make_readable_subsets, make_subsets, merge_subsets
from msn_eval.errors import DataError, NumericalError, StoreError, UsageError, format_count
from msn_eval.evaluation.eval_set import EvalSet, check_different, hash_lines, make_real_set, read_test_sets
from msn_eval.features.encoder import Precision, choose_device, default_precision, precision_class
from msn_eval.files.atomic import check_folder_name, prepare_folder
from msn_eval.probes import find_probe
from msn_eval.probes.base import Configure, Probe
from msn_eval.results.record import PROTOCOL_VERSION, RESIZED_PROTOCOL_VERSION, protocol_id

_log = logging.getLogger(__name__)
_SHOWN = 10
_CHECKED_PIXELS = 8  # size that images are decoded to, to find unreadable ones
_CHECKED_IMAGES = 64  # per batch
_TRANSFORM_RULE = "resize-256/224-bilinear-centre-crop"


@dataclass(frozen=True, kw_only=True)
class Task:
    """One measurement to make with any checkpoint: a draw, a probe, one configuration of it.

    Attributes:
        subset: The draw.
        split_sha256: SHA-256 of the draw's images by content.
        overlap: Number of images to score that are also among them, byte for byte.
        probe: The probe, with all of its configurations.
        params: Hyper-parameters of this configuration.
        scored: The images to score.
        protocol: The protocol, as in the record.
    """

    subset: Subset
    split_sha256: str
    overlap: int
    probe: Probe
    params: Params
    scored: EvalSet
    protocol: dict[str, object]

    @cached_property
    def protocol_id(self) -> str:
        return protocol_id(self.protocol)

    @property
    def skipped(self) -> tuple[str, ...]:
        """The unreadable images that this measurement does without."""
        return list_skipped(self.scored, self.subset)


def list_skipped(scored: EvalSet, subset: Subset) -> tuple[str, ...]:
    """Return the unreadable images of both splits that results on this subset do without."""
    return (
        *(f"val/{image_id}" for image_id in scored.skipped),
        *(f"train/{image_id}" for image_id in subset.skipped),
    )


@dataclass(frozen=True, kw_only=True)
class Plan:
    """All measurements of an evaluation, and what they are made on.

    Attributes:
        config: The options.
        data_name: Name of the data set.
        data_distribution: Name and version of the plug-in that reads the data set, None for a built-in reader.
        val: The images to score, after --limit and without the skipped ones.
        train: The training images that `subsets` are drawn from.
        subsets: The draws.
        val_hashes: SHA-256 of the bytes of each image of `val`, by id.
        train_hashes: The same of each labelled image.
        skipped_val: Unreadable validation images that are not scored.
        tests: The test sets, scored by the same fits.
        device: Where to compute.
        precision: Precision of the encoder.
        tasks: The measurements to make with each checkpoint.
    """

    config: EvaluationConfig
    data_name: str
    data_distribution: str | None = None
    val: ImageSet
    train: ImageSet
    subsets: tuple[Subset, ...]
    val_hashes: dict[str, str]
    train_hashes: dict[str, str]
    skipped_val: tuple[str, ...]
    tests: tuple[EvalSet, ...] = ()
    device: torch.device
    precision: Precision
    tasks: tuple[Task, ...]

    @cached_property
    def validation(self) -> EvalSet:
        """The validation images as a set to score."""
        return EvalSet(
            name=self.data_name,
            images=self.val,
            extracted=self.val,
            hashes=self.val_hashes,
            skipped=self.skipped_val,
            distribution=self.data_distribution,
        )

    @property
    def val_sha256(self) -> str:
        return self.validation.sha256

    @property
    def classes_sha256(self) -> str:
        return self.validation.classes_sha256

    @property
    def decoder(self) -> str:
        """The decoder in use: embedded images are not files, and Pillow resizes them."""
        return "pillow" if self.val.source.root is None else self.config.decoder


def make_plan(config: EvaluationConfig, *, local_rank: int | None = None) -> Plan:
    """Read the data set, draw the subsets, hash the images, and list the measurements.

    Args:
        config: The options.
        local_rank: Number of this rank among those of its machine, None without other ranks.

    Raises:
        UsageError, CheckpointError, DataError, NumericalError: For every fault that shows before a network runs.
    """
    if not config.checkpoint:
        raise UsageError("no checkpoint given", hint="Name one or several: --checkpoint FILE; or try msn-eval demo.")
    check_folder_name(Path(config.out), option="--out")
    check_checkpoint_names(tuple(config.checkpoint))
    check_subset_names(config.subset)
    for name in config.probe:
        find_probe(name)
    device = choose_device(config.device, local_rank=local_rank)
    if device.type == "cuda":
        torch.cuda.set_device(device)  # otherwise pinned memory and NCCL use GPU 0 on every rank
    check_decoder(config.decoder, device)
    cache_dir = None if config.no_cache else cache_folder(config)
    if cache_dir is not None:
        _prepare_cache(cache_dir)
    data = _read_data(config, cache_dir)
    tests = read_test_sets(config, data, cache_dir)
    val = data.val.first_of_each_class(config.limit) if config.limit else data.val
    skipped_val: tuple[str, ...] = ()
    if config.on_bad_image == "skip":
        list_unreadable = partial(_list_unreadable, workers=config.worker_count)
        skipped_val = tuple(list_unreadable(val))
        val = val.only([image_id for image_id in val.ids if image_id not in set(skipped_val)])
        subsets = make_readable_subsets(config.subset, data.train, list_unreadable)
        tests = [test.without(list_unreadable(test.images)) for test in tests]
    else:
        subsets = make_subsets(config.subset, data.train)
    for option, images in (("--data", val), *(("--test", test.images) for test in tests)):
        if not len(images):
            raise DataError("no validation image can be read", hint=f"Check the files, or give another {option}.")
    labelled = merge_subsets(subsets, data.train)
    splits = (val, labelled, *(test.images for test in tests))
    with list_all_bad_images(splits, config.worker_count):
        val_hashes, train_hashes, *test_hashes = (hash_images(images, cache_dir=cache_dir) for images in splits)
    plan = Plan(
        config=config,
        data_name=data.name,
        data_distribution=data.distribution,
        val=val,
        train=data.train,
        subsets=subsets,
        val_hashes=val_hashes,
        train_hashes=train_hashes,
        skipped_val=skipped_val,
        device=device,
        precision=cast(Precision, config.precision) if config.precision else default_precision(device),
        tasks=(),
    )
    tests = [replace(test, hashes=hashes) for test, hashes in zip(tests, test_hashes, strict=True)]
    names = [name.removeprefix(REAL_PREFIX) for name in config.test if name.startswith(REAL_PREFIX)]
    tests += [make_real_set(Path(name), plan.validation) for name in names]
    check_different(tests)
    plan = replace(plan, tests=tuple(tests))
    _warn_of_data(plan)
    tasks = tuple(_list_tasks(plan))
    if not tasks:
        raise NumericalError(
            f"every k is above the {max(map(len, subsets))} labelled images: nothing to measure",
            hint="Ask for a smaller one: --k 1,5.",
        )
    return replace(plan, tasks=tasks)


def _prepare_cache(folder: Path) -> None:
    """Prepare the cache folder. One that exists but cannot be written is read from, with a warning."""
    try:
        prepare_folder(folder, option="--cache")
    except (UsageError, StoreError) as error:
        if not folder.is_dir():
            raise
        _log.warning("%s: %s; what is cached there is used, and nothing new is kept", folder, error.what)


def _read_data(config: EvaluationConfig, cache_dir: Path | None) -> DataSet:
    name = find_data_name(config.data)
    data = read_dataset(name, allow_class_mismatch=config.allow_class_mismatch, cache_dir=cache_dir)
    for split, images in (("train", data.train), ("val", data.val)):
        if images.passed_over:
            one, several = "file that is not an image by its name", "files that are not images by their names"
            _log.info("%s: ignored %s", split, format_count(images.passed_over, one, several))
    if config.classes not in (None, len(data.classes)):
        raise DataError(
            f"{data.name} has {format_count(len(data.classes), 'class', 'classes')}, {config.classes} are asked for",
            hint="Give the --data that was meant, or correct `classes` (num_classes in a file of the MSN repository).",
        )
    if len(data.classes) < 2:
        raise NumericalError(
            f"{data.name} has the single class {data.classes[0]!r}: every prediction would be right",
            hint="Give --data a folder with a folder for each of several classes.",
        )
    return data


def cache_folder(config: EvaluationConfig) -> Path:
    """Return the folder for what can be computed again: --cache, or the user's cache folder."""
    return Path(config.cache) if config.cache else platformdirs.user_cache_path("msn-eval")


def configure_probes(config: EvaluationConfig, subset: Subset) -> Iterator[tuple[Probe, str | None]]:
    """Yield each probe that the options ask for, with the options' values for this subset, and its distribution.

    The distribution is the name and version of the plug-in that the probe comes from, None for a probe of this package.

    Raises:
        UsageError: There is no such probe, or its plug-in cannot be imported.
    """
    for name in dict.fromkeys(config.probe):
        entry = find_probe(name)
        configure = cast(Configure, entry.load())
        for probe in configure(config, subset):
            yield probe, entry.distribution


def _list_tasks(plan: Plan) -> Iterator[Task]:
    scored_sets = (plan.validation, *plan.tests)
    empty: dict[tuple[str, str], int] = {}
    for subset in plan.subsets:
        split_sha256 = content_sha256(subset.image_ids, plan.train_hashes)
        labelled = {plan.train_hashes[image_id] for image_id in subset.image_ids}
        overlaps = [scored.count_among(labelled) for scored in scored_sets]
        for probe, distribution in configure_probes(plan.config, subset):
            configs = probe.configs(len(subset))
            if not configs:
                empty[probe.name, subset.name] = len(subset)
            for params, (scored, overlap) in product(configs, list(zip(scored_sets, overlaps, strict=True))):
                yield Task(
                    subset=subset,
                    split_sha256=split_sha256,
                    overlap=overlap,
                    probe=probe,
                    params=params,
                    scored=scored,
                    protocol=_make_protocol(plan, subset, probe, params, scored, distribution),
                )
    for (probe_name, subset_name), n_images in empty.items():
        text = "%s measures nothing on %s: every k is above its %d labelled images; give a smaller one, such as --k 1,5"
        _log.warning(text, probe_name, subset_name, n_images)


def _make_protocol(
    plan: Plan, subset: Subset, probe: Probe, params: Params, scored: EvalSet, distribution: str | None
) -> dict[str, object]:
    """Return all that must be equal for two numbers to be comparable.

    The draw and what belongs to the checkpoint are not part of it; what the user sets manually is. Keys that are absent
    unless used were added later: so the ids of earlier protocols stay.
    """
    config = plan.config
    by_hand = {
        "tap": config.tap,
        "image_pixels": config.image_pixels,
        "mean": config.mean or None,
        "std": config.std or None,
        "patch_drop": config.patch_drop,
        "seed": config.seed if config.patch_drop else None,  # decides which patches are dropped
        "decoder": None if config.decoder == DECODERS[0] else config.decoder,
        "canary": config.seed if config.canary else None,  # never comparable with a measurement
    }
    plugins = {"probe": distribution, "data": plan.data_distribution}
    if scored.terms:
        plugins["test"] = scored.distribution
    protocol: dict[str, object] = {
        "version": PROTOCOL_VERSION if config.image_pixels is None else RESIZED_PROTOCOL_VERSION,
        "data": {"sha256": scored.sha256, "class_map_sha256": scored.classes_sha256},
        "subset": {"name": subset.name, "rule": subset.rule},
        "tap": ",".join(probe.taps),
        "transform": _TRANSFORM_RULE,
        "probe": {"name": probe.name, "version": probe.version, "params": params},
        "precision": precision_class(plan.precision),
        "limit": config.limit,
        "skipped": hash_lines(skipped) if (skipped := list_skipped(scored, subset)) else None,
        "by_hand": {name: value for name, value in by_hand.items() if value is not None},
    }
    if any(plugins.values()):
        protocol["plugins"] = {kind: name for kind, name in plugins.items() if name is not None}
    return {**protocol, **scored.terms}


def _warn_of_data(plan: Plan) -> None:
    """Warn of what makes an accuracy too high or too low although nothing fails."""
    for name, skipped in {subset.name: list_skipped(plan.validation, subset) for subset in plan.subsets}.items():
        if skipped:
            _warn_of_skipped(name, skipped)
    publication = read_publication()
    if plan.classes_sha256 == publication.class_map_sha256 and len(plan.val) != publication.val_images:
        _log.warning("ImageNet has %d validation images, %d are scored here", publication.val_images, len(plan.val))
    labelled = set(plan.train_hashes.values())
    for scored in (plan.validation, *plan.tests):
        if shared := scored.count_among(labelled):
            noun, of = ("validation image", "") if scored is plan.validation else ("image", f" of {scored.name}")
            images = format_count(shared, f"{noun}{of} is", f"{noun}s{of} are")
            _log.warning("%s also among the labelled training images, byte for byte", images)
    for test in plan.tests:
        if test.skipped and test.skipped != plan.skipped_val:
            _warn_of_skipped(test.name, test.skipped)
    unreachable = set(plan.val.labels) - set(plan.train.labels)
    if unreachable:
        lost = sum(label in unreachable for label in plan.val.labels)
        images = format_count(lost, "validation image belongs to a class", "validation images belong to classes")
        _log.warning("%s without training images and can never be right", images)


def _warn_of_skipped(name: str, skipped: tuple[str, ...]) -> None:
    images = format_count(len(skipped), "unreadable image")
    _log.warning("%s: %s skipped: %s", name, images, ", ".join(skipped[:_SHOWN]))


def find_unreadable(images: ImageSet, workers: int | None) -> list[tuple[str, str]]:
    """Decode every image, and return the ids of those that cannot be used, with the reasons.

    All decoders refuse the same images.
    """
    transform = make_eval_transform(_CHECKED_PIXELS)
    pixels = PixelList(source=images.source, image_ids=images.ids, transform=transform, hashes=None)
    batches = load_pixels(pixels, batch_size=_CHECKED_IMAGES, workers=workers or 0)
    return [failure for batch in batches for failure in batch.failures]


@contextmanager
def list_all_bad_images(splits: Iterable[ImageSet], workers: int | None) -> Iterator[None]:
    """Where the block raises BadImagesError, raise it with the bad images of all splits, not only of the first pass."""
    try:
        yield
    except BadImagesError as error:
        places: list[str] = []
        reasons: list[str] = []
        for images in splits:
            for image_id, reason in find_unreadable(images, workers):
                places.append(images.source.place(image_id))
                reasons.append(f"{places[-1]}: {reason}")
        found = tuple(f"{place}: " for place in places)
        raise BadImagesError([*reasons, *(text for text in error.failures if not text.startswith(found))]) from error


def _list_unreadable(images: ImageSet, workers: int | None) -> list[str]:
    failures = find_unreadable(images, workers)
    for image_id, reason in failures:
        _log.info("%s: %s", images.source.place(image_id), reason)
    return [image_id for image_id, _ in failures]
