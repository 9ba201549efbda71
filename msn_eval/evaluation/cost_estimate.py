"""Forecast: what a plan will cost, checkpoint by checkpoint: images to read, features to reuse, bytes, time."""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from msn_eval.config.recipes import Finetune
from msn_eval.data.images import ImageSet
from msn_eval.data.loader import PixelList, automatic_workers, load_pixels
from msn_eval.errors import CheckpointError
from msn_eval.evaluation.evaluate import Preparation, drop_of, loading_of, pending_pool, prepare
from msn_eval.evaluation.plan import Plan, Task, cache_folder
from msn_eval.features.encoder import encode
from msn_eval.features.extraction import automatic_batch_size, missing_images
from msn_eval.features.patch_drop import PatchDrop, encode_kept, kept_patches, patch_count
from msn_eval.probes.linear_augmented import LinearAugmented

_log = logging.getLogger(__name__)
_FEW_IMAGES = 64  # the measurement would cost about as much as they do
_SAMPLE = 16
_PATIENCE_SECONDS = 1.5
_PASSES_A_STEP = 3  # forward, and about twice that backward
_Pass = Callable[[Tensor], dict[str, Tensor]]
_KEPT_BYTES = 2 << 30  # of weights, of checkpoints that were looked at and wait for their turn


@dataclass(frozen=True, kw_only=True)
class CostEstimate:
    """What one checkpoint will cost.

    read, reused: images to be read and encoded, and images whose features are in the cache
    bytes:        of the image files to be read
    augmented:    images to be read and encoded besides, once for every epoch of a training on augmented images
    tuned:        images that fine-tuning will see, each as often as it does; they are not among those read
    seconds:      for all of these, None where they were not timed
    finished:     results that are there already
    problem:      why it would be refused
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


def estimate_cost(plan: Plan, *, run_own_code: bool) -> tuple[tuple[CostEstimate, ...], dict[str, Preparation]]:
    """Look at every checkpoint of a plan, and time a few images where many are to be read.

    run_own_code: time networks of the user's own too; where results follow they are run for these alone
    returns: the forecasts, and the checkpoints that were read, as far as memory is to be spent on them, by name
    A checkpoint that is refused has a forecast that says so.
    """
    found: list[CostEstimate] = []
    kept: dict[str, Preparation] = {}
    kept_bytes = 0
    for name in plan.request.checkpoint:
        try:
            ready = prepare(plan, name)
            found.append(_forecast_one(plan, ready, run_own_code))
        except CheckpointError as error:
            found.append(CostEstimate(name=name, problem=str(error).partition("\n")[0]))
            continue
        kept_bytes += 4 * ready.encoder.checkpoint.params
        if kept_bytes <= _KEPT_BYTES:
            kept[name] = ready
    return tuple(found), kept


def _forecast_one(plan: Plan, ready: Preparation, run_own_code: bool) -> CostEstimate:
    encoder = ready.encoder
    name = encoder.checkpoint.name
    if not ready.pending:
        return CostEstimate(name=name, finished=len(ready.known))
    wanted = (pending_pool(plan, ready), plan.val) if ready.frozen else ()
    missing = _missing(plan, ready, wanted)
    read = sum(map(len, missing))
    trainings = _trainings(plan, ready)
    augmented = sum(epochs * len(images) for epochs, images in trainings)
    sizes = (images.source.stamp(image_id)[0] for images in missing for image_id in images.ids)
    tuned = [_images_tuned(task, plan) for task in ready.tuned]
    encodings = read + augmented + _PASSES_A_STEP * sum(tuned) + len(tuned) * len(plan.val)
    measurable = encodings >= _FEW_IMAGES and (run_own_code or not encoder.checkpoint.runs_own_code)
    drop = drop_of(plan.request)
    partly = missing[:1] if drop is not None else ()
    whole = (*missing[len(partly) :], *(images for _, images in trainings), *([plan.val] if tuned else []))
    in_part = sum(map(len, partly))
    shares = [_Share(images=encodings - in_part, among=whole), _Share(images=in_part, among=partly, drop=drop)]
    return CostEstimate(
        name=name,
        read=read,
        reused=sum(map(len, wanted)) - read,
        bytes=sum(sizes),
        augmented=augmented,
        seconds=_seconds(plan, ready, shares) if measurable else None,
        finished=len(ready.known),
        tuned=sum(tuned),
    )


def _images_tuned(task: Task, plan: Plan) -> int:
    """Give the images of all steps of a fine-tuning."""
    from msn_eval.probes.finetune.data import epoch_order

    assert isinstance(task.probe, Finetune)
    order = epoch_order(task.probe.recipe, len(task.subset), seed=task.probe.seed)
    return order.steps * order.batch


def _trainings(plan: Plan, ready: Preparation) -> list[tuple[int, ImageSet]]:
    """Give the epochs and images of every training on augmented images that is pending; its learning rates share them."""
    found = {(id(task.subset), str(task.probe)): task for task in ready.pending}
    return [
        (task.probe.epochs, plan.train.only(task.subset.image_ids))
        for task in found.values()
        if isinstance(task.probe, LinearAugmented)
    ]


def _missing(plan: Plan, ready: Preparation, wanted: tuple[ImageSet, ...]) -> tuple[ImageSet, ...]:
    if plan.request.no_cache:
        return wanted
    return tuple(
        images.only(
            missing_images(
                ready.encoder,
                images,
                taps=ready.pending_taps,
                hashes=hashes,
                decoder=plan.request.decoder,
                drop=drop,
                cache=cache_folder(plan.request),
            )
        )
        for images, hashes, drop in zip(
            wanted, (plan.train_hashes, plan.val_hashes), (drop_of(plan.request), None), strict=False
        )
    )


@dataclass(frozen=True, kw_only=True)
class _Share:
    """Images that are encoded alike, and the sets that some are taken from to be timed. drop: the patches they do without."""

    images: int
    among: tuple[ImageSet, ...]
    drop: PatchDrop | None = None


def _seconds(plan: Plan, ready: Preparation, shares: list[_Share]) -> float | None:
    """Give the time for all; None where some could not be timed."""
    total = 0.0
    for share in shares:
        if share.images:
            each = _seconds_an_image(plan, ready, share)
            if each is None:
                return None
            total += share.images * each
    return total


def _seconds_an_image(plan: Plan, ready: Preparation, share: _Share) -> float | None:
    """Time some images, spread over those to be read, through the decoder and the encoder; None where that failed."""
    encoder = ready.encoder
    images = max(share.among, key=len)
    step = max(1, len(images) // _SAMPLE)
    sample = PixelList(
        source=images.source,
        image_ids=images.ids[::step][:_SAMPLE],
        transform=encoder.transform,
        hashes=None,
        decoder="pillow" if plan.request.decoder == "pillow" else "torchvision",
    )
    loading = loading_of(plan.request)
    cuda = encoder.device.type == "cuda"
    batch_size = loading.batch_size or automatic_batch_size(encoder)
    workers = loading.workers
    if workers is None:
        workers = automatic_workers(replace(sample, image_ids=images.ids), batch_size=batch_size, cuda=cuda)
    beside = cuda and workers > 0  # the encoder; else one waits for the other, or they share the cores
    started = time.perf_counter()
    # One by one where each worker will do so, else all cores at once, as the pass will.
    batches = [batch.pixels for batch in load_pixels(sample, batch_size=1 if beside else _SAMPLE, workers=0)]
    decoding = (time.perf_counter() - started) / len(sample)
    pixels = torch.cat([batch for batch in batches if isinstance(batch, Tensor)])
    try:
        encoding = _encoding_seconds(_pass_of(ready, share.drop), pixels, batch_size)
    except (RuntimeError, MemoryError) as error:
        # Too large a batch, no compiler: the pass itself finds its way, or says what is wrong.
        _log.debug("%s could not be timed: %s", encoder.checkpoint.name, error)
        return None
    return max(decoding / workers, encoding) if beside else decoding + encoding


def _pass_of(ready: Preparation, drop: PatchDrop | None) -> _Pass:
    """Give the pass that images will go through, from pixels to features."""
    encoder, taps = ready.encoder, ready.pending_taps or (ready.taps[Finetune.tap],)
    if drop is None:
        return lambda pixels: encode(encoder, pixels, taps)

    def in_part(pixels: Tensor) -> dict[str, Tensor]:
        kept = kept_patches(drop, [str(row) for row in range(len(pixels))], patches=patch_count(encoder))
        return encode_kept(encoder, pixels, taps, kept)

    return in_part


def _encoding_seconds(one_pass: _Pass, pixels: Tensor, batch_size: int) -> float:
    """Time the encoder on a batch, or on as much of one as takes about a second; seconds an image."""
    one_pass(pixels[:2])  # the first call builds what later ones find
    pair = _timed(one_pass, pixels[:2])
    affordable = int(_PATIENCE_SECONDS / (pair / 2))
    count = min(batch_size, affordable)
    if count <= 2:
        return pair / 2
    batch = pixels.repeat(-(-count // len(pixels)), 1, 1, 1)[:count]
    return _timed(one_pass, batch) / count


def _timed(one_pass: _Pass, pixels: Tensor) -> float:
    started = time.perf_counter()
    for features in one_pass(pixels).values():
        features.sum().item()  # waits for the device
    return time.perf_counter() - started
