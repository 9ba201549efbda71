"""Cost estimate: what a plan will cost, checkpoint by checkpoint: images to read, features to reuse, bytes, time."""

import logging
import time
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from msn_eval.data.images import ImageSet
from msn_eval.data.loader import PixelList, automatic_workers, load_pixels
from msn_eval.errors import CheckpointError
from msn_eval.evaluation.evaluate import Preparation, group_by_fit, make_patch_drop, pending_images, prepare
from msn_eval.evaluation.plan import Plan, cache_folder
from msn_eval.features.encoder import Encoder, encode
from msn_eval.features.extraction import automatic_batch_size, missing_images
from msn_eval.features.patch_drop import PatchDrop, encode_kept, kept_patches, patch_count
from msn_eval.probes.finetune import Finetune
from msn_eval.probes.linear_augmented import LinearAugmented

_log = logging.getLogger(__name__)
_FEW_IMAGES = 64  # timing would cost about as much as they do
_SAMPLE = 16
_TIMED_SECONDS = 1.5
_PASSES_PER_STEP = 3  # a backward pass costs about two forward passes
_KEPT_BYTES = 2 << 30  # of weights of checkpoints that wait for their evaluation


@dataclass(frozen=True, kw_only=True)
class CostEstimate:
    """What one checkpoint will cost.

    Attributes:
        name: The checkpoint.
        read: Images to read and encode.
        reused: Images whose features are in the cache.
        bytes: Size of the image files to read.
        augmented: Further images to read and encode, once for every epoch of a training on augmented images.
        tuned: Images that fine-tuning trains on, each counted in every epoch; not among `read`.
        seconds: Estimated time for all of these, None if they were not timed.
        finished: Number of results that exist already.
        problem: Why the checkpoint would be refused.
    """

    name: str
    read: int = 0
    reused: int = 0
    bytes: int = 0
    augmented: int = 0
    seconds: float | None = None
    finished: int = 0
    tuned: int = 0
    problem: str | None = None


@dataclass(frozen=True, kw_only=True)
class _Work:
    """Images to encode `times` times, without the patches of `drop`."""

    images: ImageSet
    times: float = 1
    drop: PatchDrop | None = None

    @property
    def encodings(self) -> float:
        return self.times * len(self.images)


def estimate_cost(plan: Plan, *, run_own_code: bool) -> tuple[tuple[CostEstimate, ...], dict[str, Preparation]]:
    """Estimate the cost of every checkpoint of a plan. If many images are to be read, a few are timed.

    Args:
        plan: The plan.
        run_own_code: Whether to time networks of the user's own code too.

    Returns:
        The estimates, that of a refused checkpoint with its problem; and the checkpoints that were read, by name, as far as
        they fit into the memory set aside for them.
    """
    estimates: list[CostEstimate] = []
    prepared: dict[str, Preparation] = {}
    kept_bytes = 0
    for name in plan.request.checkpoint:
        try:
            ready = prepare(plan, name)
            estimates.append(_estimate_one(plan, ready, run_own_code))
        except CheckpointError as error:
            estimates.append(CostEstimate(name=name, problem=str(error).partition("\n")[0]))
            continue
        kept_bytes += 4 * ready.encoder.checkpoint.params
        if kept_bytes <= _KEPT_BYTES:
            prepared[name] = ready
    return tuple(estimates), prepared


def _estimate_one(plan: Plan, ready: Preparation, run_own_code: bool) -> CostEstimate:
    checkpoint = ready.encoder.checkpoint
    estimate = CostEstimate(name=checkpoint.name, finished=len(ready.known))
    if not ready.pending:
        return estimate
    wanted, missing = _list_extractions(plan, ready) if ready.frozen else (0, [])
    read = sum(len(work.images) for work in missing)
    augmented = _list_augmented(plan, ready)
    tuned = _count_tuned(ready)
    work = [*missing, *augmented]
    if tuned:
        passes = _PASSES_PER_STEP * sum(tuned) / len(plan.val) + len(tuned)
        work.append(_Work(images=plan.val, times=passes))
    is_timed = sum(one.encodings for one in work) >= _FEW_IMAGES and (run_own_code or checkpoint.format != "py")
    return replace(
        estimate,
        read=read,
        reused=wanted - read,
        bytes=sum(one.images.source.stamp(image_id)[0] for one in missing for image_id in one.images.ids),
        augmented=round(sum(one.encodings for one in augmented)),
        seconds=_estimate_seconds(plan, ready, work) if is_timed else None,
        tuned=sum(tuned),
    )


def _list_extractions(plan: Plan, ready: Preparation) -> tuple[int, list[_Work]]:
    """Return how many images need features, and those whose features are not in the cache."""
    config = plan.request
    train, drop = pending_images(plan, ready), make_patch_drop(config)
    splits = (
        (train, ready.pending_on("features"), plan.train_hashes, drop),
        (plan.val, ready.frozen, plan.val_hashes, None),
    )
    missing = []
    for images, tasks, hashes, split_drop in splits:
        if not config.no_cache:
            images = images.only(
                missing_images(
                    ready.encoder,
                    images,
                    taps=ready.taps_of(tasks),
                    hashes=hashes,
                    decoder=config.decoder,
                    drop=split_drop,
                    cache=cache_folder(config),
                )
            )
        missing.append(_Work(images=images, drop=split_drop))
    return len(train) + len(plan.val), missing


def _list_augmented(plan: Plan, ready: Preparation) -> list[_Work]:
    work = []
    for task, *_ in group_by_fit(ready.pending_on("augmented features")):
        assert isinstance(task.probe, LinearAugmented)
        work.append(_Work(images=plan.train.only(task.subset.image_ids), times=task.probe.epochs))
    return work


def _count_tuned(ready: Preparation) -> list[int]:
    """Return the images of all steps of each fine-tuning."""
    counts = []
    for task in ready.pending_on("images"):
        from msn_eval.probes.finetune.data import make_order  # loads timm's training code

        assert isinstance(task.probe, Finetune)
        order = make_order(task.probe.recipe, len(task.subset), seed=task.probe.seed)
        counts.append(order.steps * order.batch)
    return counts


def _estimate_seconds(plan: Plan, ready: Preparation, work: list[_Work]) -> float | None:
    """Return the time for all, None if a sample cannot be timed."""
    total = 0.0
    for drop in {one.drop for one in work if one.encodings}:
        alike = [one for one in work if one.drop == drop]
        seconds = _time_image(plan, ready, max((one.images for one in alike), key=len), drop)
        if seconds is None:
            return None
        total += seconds * sum(one.encodings for one in alike)
    return total


def _time_image(plan: Plan, ready: Preparation, images: ImageSet, drop: PatchDrop | None) -> float | None:
    """Time some of the images through the decoder and the encoder, and return seconds per image; None if that fails."""
    encoder, config = ready.encoder, plan.request
    sample = PixelList(
        source=images.source,
        image_ids=images.ids[:: max(1, len(images) // _SAMPLE)][:_SAMPLE],
        transform=encoder.transform,
        hashes=None,
        decoder="pillow" if config.decoder == "pillow" else "torchvision",
    )
    cuda = encoder.device.type == "cuda"
    batch_size = config.batch_images or automatic_batch_size(encoder)
    workers = config.worker_count
    if workers is None:
        workers = automatic_workers(replace(sample, image_ids=images.ids), batch_size=batch_size, cuda=cuda)
    overlap = cuda and workers > 0  # else decoder and encoder wait for each other, or share the cores
    started = time.perf_counter()
    # One by one as a worker does, else with all cores, as the pass will.
    batches = [batch.pixels for batch in load_pixels(sample, batch_size=1 if overlap else _SAMPLE, workers=0)]
    decoding = (time.perf_counter() - started) / len(sample)
    pixels = torch.cat([batch for batch in batches if isinstance(batch, Tensor)])
    taps = ready.taps_of(ready.frozen or ready.pending)
    try:
        _time_encoder(encoder, pixels[:2], taps, drop)  # the first call compiles and allocates
        encoding = _time_encoder(encoder, pixels[:2], taps, drop) / 2
        count = min(batch_size, int(_TIMED_SECONDS / encoding))
        if count > 2:
            batch = pixels.repeat(-(-count // len(pixels)), 1, 1, 1)[:count]
            encoding = _time_encoder(encoder, batch, taps, drop) / count
    except (RuntimeError, MemoryError) as error:
        # Too large a batch, no compiler: the evaluation itself backs off, or reports what is wrong.
        _log.debug("%s could not be timed: %s", encoder.checkpoint.name, error)
        return None
    return max(decoding / workers, encoding) if overlap else decoding + encoding


def _time_encoder(encoder: Encoder, pixels: Tensor, taps: tuple[str, ...], drop: PatchDrop | None) -> float:
    started = time.perf_counter()
    if drop is None:
        features = encode(encoder, pixels, taps)
    else:
        kept = kept_patches(drop, [str(row) for row in range(len(pixels))], patches=patch_count(encoder))
        features = encode_kept(encoder, pixels, taps, kept)
    for values in features.values():
        values.sum().item()  # waits for the device
    return time.perf_counter() - started
