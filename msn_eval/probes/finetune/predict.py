"""Predictions of a fine-tuning model for images under the evaluation transform: logits, or the input of its head."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from msn_eval.data.decoders import decode_on_device
from msn_eval.data.hashing import make_unreadable_error
from msn_eval.data.images import ImageSet
from msn_eval.data.loader import PixelList, load_pixels
from msn_eval.distributed.group import ALONE, Group, all_gather_object, split_across_ranks
from msn_eval.errors import NumericalError
from msn_eval.features.encoder import Precision, exact_float32, normalise_pixels
from msn_eval.probes.finetune.model import FinetuneModel
from msn_eval.probes.logistic_solvers.newton import minimise_path
from msn_eval.probes.logistic_solvers.objective import CrossEntropyProblem

_TARGET_GAP = 1e-6  # of the regression that a head starts from


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """Options of a fine-tuning that change no number.

    Attributes:
        micro_batch: Images at once on a rank, even. Gradients are accumulated over the batch; halved on out-of-memory.
        workers: Processes that decode.
        save_seconds: Shortest time between two states at the ends of epochs.
        epoch_seconds: The same within an epoch.
    """

    micro_batch: int
    workers: int
    save_seconds: float = 60.0
    epoch_seconds: float = 600.0


@dataclass(frozen=True, kw_only=True)
class LabelledImages:
    """The labelled images of a draw.

    Attributes:
        images: n images.
        labels: (n,) int64, those to learn.
        hashes: SHA-256 of each image's bytes, by id.
    """

    images: ImageSet
    labels: Tensor
    hashes: Mapping[str, str]


def compute_logits(model: FinetuneModel, images: Tensor, precision: Precision) -> Tensor:
    """Return (b, n_classes) logits of normalised images, in the dtype of the weights. Reduced precision is bf16 autocast."""
    with torch.autocast(images.device.type, dtype=torch.bfloat16, enabled=precision != "fp32"):
        logits: Tensor = model.network(images)
    return logits.to(model.head.weight.dtype)


def score_images(
    model: FinetuneModel,
    images: ImageSet,
    hashes: Mapping[str, str],
    *,
    decoder: str,
    precision: Precision,
    options: RunOptions,
    group: Group = ALONE,
) -> Tensor:
    """Return the logits of images under the evaluation transform, (m, n_classes) float64 on the CPU, in their order.

    Raises:
        DataError: Images cannot be used; it lists all of them.
    """

    def score(pixels: Tensor) -> Tensor:
        return compute_logits(model, pixels, precision)

    return _apply(score, model, images, hashes, decoder=decoder, options=options, group=group).double()


def init_head(
    model: FinetuneModel,
    labelled: LabelledImages,
    *,
    l2: float,
    precision: Precision,
    options: RunOptions,
    group: Group = ALONE,
) -> None:
    """Set the head to logistic regression on its inputs for the labelled images, before anything is trained.

    Classes without labelled images keep a row of zeros.

    Args:
        model: The model; its head is changed in place.
        labelled: The labelled images.
        l2: lambda of mean cross-entropy + (lambda / n) / 2 ||W||^2, on rows minus their mean and divided by their mean
            length.
        precision: Precision of the network.
        options: Options that change no number.
        group: Ranks that share the images.

    Raises:
        NumericalError: An input of the head is not finite.

    Source: linear probing before fine-tuning, arXiv:2202.10054.
    """
    inputs: list[Tensor] = []

    def read_input(pixels: Tensor) -> Tensor:
        compute_logits(model, pixels, precision)
        return inputs.pop().float()

    handle = model.head.register_forward_pre_hook(lambda module, arguments: inputs.append(arguments[0]))
    with handle:
        rows = _apply(
            read_input, model, labelled.images, labelled.hashes, decoder="pillow", options=options, group=group
        ).double()
    if not bool(rows.isfinite().all()):
        raise NumericalError(
            f"the inputs of the head at tap {model.tap} are not finite for the labelled images",
            hint="Retry with --precision fp32.",
        )
    mean = rows.mean(dim=0)
    centred = rows - mean
    unit = centred.norm(dim=1).mean().clamp_min(torch.finfo(torch.float64).tiny)
    present, labels = torch.unique(labelled.labels, return_inverse=True)
    mu = l2 / len(rows)
    problem = CrossEntropyProblem(rows=centred / unit, labels=labels, n_classes=len(present), mu=mu)
    ((solution, _),) = minimise_path(problem, [mu], target=_TARGET_GAP)
    # The head takes its inputs as they are: fold the scale and the mean into weight and bias.
    weight = solution.weights.double() / unit
    with torch.no_grad():
        model.head.weight[present] = weight.to(model.head.weight)
        model.head.bias[present] = -(weight @ mean).to(model.head.bias)


def _apply(
    function: Callable[[Tensor], Tensor],
    model: FinetuneModel,
    images: ImageSet,
    hashes: Mapping[str, str],
    *,
    decoder: str,
    options: RunOptions,
    group: Group,
) -> Tensor:
    """Return what a function of normalised images returns for all images, on the CPU; ranks share the images."""
    rows = split_across_ranks(len(images), group, block=options.micro_batch)
    encoder = model.encoder
    pixel_list = PixelList(
        source=images.source,
        image_ids=images.ids[rows.start : rows.stop],
        transform=encoder.transform,
        hashes=hashes,
        decoder=decoder,
    )
    outputs: list[Tensor] = []
    failures: list[str] = []
    done = 0
    with torch.inference_mode(), exact_float32():
        for batch in load_pixels(pixel_list, batch_size=options.micro_batch, workers=options.workers):
            pixels, refused = batch.pixels, list(batch.failures)
            if not isinstance(pixels, Tensor):
                pixels, reasons = decode_on_device(pixels, encoder.transform, encoder.device)
                refused += [(pixel_list.image_ids[done + row], reason) for row, reason in reasons.items()]
            failures += [f"{images.source.place(image_id)}: {reason}" for image_id, reason in refused]
            done += len(pixels)
            if not failures:
                outputs.append(function(normalise_pixels(pixels.to(encoder.device), encoder)).cpu())
    if failures:
        raise make_unreadable_error(failures)
    gathered = all_gather_object(group, "rows", torch.cat(outputs) if outputs else None)
    return torch.cat([rows for rows in gathered if rows is not None])
