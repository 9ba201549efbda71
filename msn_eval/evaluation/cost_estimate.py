"""Cost estimate: what a plan will cost, checkpoint by checkpoint: images to read, features to reuse, bytes, time."""

import logging
import math
import time
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from msn_eval.data.images import ImageSet
from msn_eval.data.loader import PixelList, automatic_workers, load_pixels
from msn_eval.errors import CheckpointError
from msn_eval.evaluation.eval_set import EvalSet
from msn_eval.evaluation.evaluate import Preparation, group_by_fit, make_patch_drop, pending_images, prepare
from msn_eval.evaluation.plan import Plan, cache_folder
from msn_eval.features.encoder import encode
from msn_eval.features.extraction import choose_batch_size, list_missing_images
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
    """What one checkpoint will cost."""

    name: str
    read: int = 0  # images to read and encode
    reused: int = 0  # images whose features are in the cache
    bytes: int = 0  # size of the image files to read
    augmented: int = 0  # further images to read and encode, once for every epoch of a training on augmented images
    seconds: float | None = None  # estimated for all images, None if they were not timed
    finished: int = 0  # results that exist already
    tuned: int = 0  # images that fine-tuning trains on, each counted in every epoch; not among `read`
    problem: str | None = None  # why the checkpoint would be refused


def estimate_cost(plan: Plan, *, run_own_code: bool) -> tuple[tuple[CostEstimate, ...], dict[str, Preparation]]:
    """Estimate the cost of every checkpoint of a plan. If many images are to be read, a few are timed.

    Networks of the user's own code are only timed with `run_own_code`. Also return, by name, the checkpoints that were read,
    as far as they fit into the memory set aside for them. The estimate of a refused checkpoint has its problem.
    """
    estimates: list[CostEstimate] = []
    prepared: dict[str, Preparation] = {}
    kept_bytes = 0
    for name in plan.config.checkpoint:
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
    passes: list[tuple[ImageSet, EvalSet | None]] = [(scored.extracted, scored) for scored in ready.scored.values()]
    passes = [(pending_images(plan, ready), None), *passes] if ready.frozen else []
    wanted, missing = [images for images, _ in passes], [_find_missing(plan, ready, *split) for split in passes]
    augmented = 0
    for task, *_ in group_by_fit(ready.pending_on("augmented features")):
        assert isinstance(task.probe, LinearAugmented)
        augmented += task.probe.epochs * math.prod(task.probe.divide_epoch(len(task.subset)))
    tuned = []
    for task in ready.pending_on("images"):
        from msn_eval.probes.finetune.data import make_order  # loads timm's training code

        assert isinstance(task.probe, Finetune)
        order = make_order(task.probe.recipe, len(task.subset), seed=task.probe.seed)
        tuned.append(order.steps * order.batch)
    read = sum(map(len, missing))
    encodings = read + augmented + _PASSES_PER_STEP * sum(tuned) + len(tuned) * len(plan.val)
    is_timed = encodings >= _FEW_IMAGES and (run_own_code or not ready.encoder.checkpoint.runs_own_code)
    seconds = _time_image(plan, ready, max([*missing, plan.val], key=len)) if is_timed else None
    return CostEstimate(
        name=ready.name,
        read=read,
        reused=sum(map(len, wanted)) - read,
        bytes=sum(images.source.stamp(image_id)[0] for images in missing for image_id in images.ids),
        augmented=augmented,
        seconds=None if seconds is None else encodings * seconds,
        finished=len(ready.known),
        tuned=sum(tuned),
    )


def _find_missing(plan: Plan, ready: Preparation, images: ImageSet, scored: EvalSet | None) -> ImageSet:
    """Return the images whose features are not in the cache: of a set to score, or labelled ones."""
    config = plan.config
    if config.no_cache:
        return images
    missing = list_missing_images(
        ready.encoder,
        images,
        taps=ready.taps_of(ready.frozen if scored else ready.pending_on("features")),
        hashes=scored.hashes if scored else plan.train_hashes,
        decoder=config.decoder,
        drop=None if scored else make_patch_drop(config),
        cache=cache_folder(config),
    )
    return images.only(missing)


def _time_image(plan: Plan, ready: Preparation, images: ImageSet) -> float | None:
    """Time some of the images through the decoder and the encoder, and return seconds per image; None if that fails.

    Patches that are dropped from labelled images are encoded here, which overestimates their time.
    """
    encoder, config = ready.encoder, plan.config
    ids, decoder = images.ids, "pillow" if config.decoder == "pillow" else "torchvision"
    every = PixelList(source=images.source, image_ids=ids, transform=encoder.transform, hashes=None, decoder=decoder)
    sample = replace(every, image_ids=ids[:: max(1, len(ids) // _SAMPLE)][:_SAMPLE])
    cuda, batch_size = encoder.device.type == "cuda", config.batch_images or choose_batch_size(encoder)
    workers = config.worker_count
    if workers is None:
        workers = automatic_workers(every, batch_size=batch_size, cuda=cuda)
    overlap = cuda and workers > 0  # else decoder and encoder wait for each other, or share the cores
    started = time.perf_counter()
    # One by one as a worker does, else with all cores, as the pass will.
    batches = [batch.pixels for batch in load_pixels(sample, batch_size=1 if overlap else _SAMPLE, workers=0)]
    decoding = (time.perf_counter() - started) / len(sample)
    pixels = torch.cat([batch for batch in batches if isinstance(batch, Tensor)])
    taps = ready.taps_of(ready.frozen or ready.pending)

    def time_encoder(count: int) -> float:
        batch = pixels.repeat(-(-count // len(pixels)), 1, 1, 1)[:count]
        started = time.perf_counter()
        for values in encode(encoder, batch, taps).values():
            values.sum().item()  # waits for the device
        return (time.perf_counter() - started) / count

    try:
        time_encoder(2)  # the first call compiles and allocates
        encoding = time_encoder(max(2, min(batch_size, int(_TIMED_SECONDS / time_encoder(2)))))
    except (RuntimeError, MemoryError) as error:
        # Too large a batch, no compiler: the evaluation itself backs off, or reports what is wrong.
        _log.debug("%s could not be timed: %s", encoder.checkpoint.name, error)
        return None
    return max(decoding / workers, encoding) if overlap else decoding + encoding
