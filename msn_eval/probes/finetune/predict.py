"""Trainee outputs: what a network under fine-tuning says of images as they are evaluated: logits, or what its head sees."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from msn_eval.data.decoders import decode_on_device
from msn_eval.data.hashing import unreadable
from msn_eval.data.images import ImageSet
from msn_eval.data.loader import PixelList, load_pixels
from msn_eval.distributed.group import ALONE, Group, rows_of_all_ranks, share
from msn_eval.errors import NumericalError
from msn_eval.features.encoder import Precision, exact_float32, normalised
from msn_eval.probes.finetune.model import FinetuneModel
from msn_eval.probes.logistic_solvers.newton import minimise_path
from msn_eval.probes.logistic_solvers.objective import CrossEntropyProblem

_TARGET_GAP = 1e-6  # of the regression that a head starts from


@dataclass(frozen=True, kw_only=True)
class Pace:
    """How fast and how safely a fine-tuning runs; it changes no number.

    part:         images at once on a rank, even; the batch is accumulated over parts; halved where memory is short
    workers:      processes that decode
    save_seconds: between two states, at the ends of epochs; and within an epoch where that takes `epoch_seconds`
    """

    part: int
    workers: int
    save_seconds: float = 60.0
    epoch_seconds: float = 600.0


@dataclass(frozen=True, kw_only=True)
class Labelled:
    """The labelled images of a draw. labels: (n,) int64, those to be learnt; hashes: SHA-256 of each image by id."""

    images: ImageSet
    labels: Tensor
    hashes: Mapping[str, str]


def logits_of(trainee: FinetuneModel, images: Tensor, precision: Precision) -> Tensor:
    """Give (b, n_classes) of normalised images, in the weights' own type; bf16 by autocast around them."""
    with torch.autocast(images.device.type, dtype=torch.bfloat16, enabled=precision != "fp32"):
        logits: Tensor = trainee.network(images)
    return logits.to(trainee.head.weight.dtype)


def score_images(
    trainee: FinetuneModel,
    images: ImageSet,
    hashes: Mapping[str, str],
    *,
    decoder: str,
    precision: Precision,
    pace: Pace,
    group: Group = ALONE,
) -> Tensor:
    """Give the logits of images under the evaluation transform, (m, n_classes) float64, on the CPU, in their order.

    Raises DataError listing every image that cannot be used.
    """

    def ask(pixels: Tensor) -> Tensor:
        return logits_of(trainee, pixels, precision)

    return _asked(trainee, images, hashes, ask, decoder=decoder, pace=pace, group=group).double()


def start_head(
    trainee: FinetuneModel,
    labelled: Labelled,
    *,
    strength: float,
    precision: Precision,
    pace: Pace,
    group: Group = ALONE,
) -> None:
    """Put the head at the solution of logistic regression on what it sees of the labelled images, before anything is trained.

    strength: lambda of mean cross-entropy + (lambda / n) / 2 ||W||^2 on rows less their mean, in units of their mean length.
    Classes without labelled images keep a row of zeros. Raises NumericalError where what it sees is not finite.
    Source: linear probing before fine-tuning, arXiv:2202.10054.
    """
    seen: list[Tensor] = []
    with _head_watched(trainee.head, seen):

        def ask(pixels: Tensor) -> Tensor:
            logits_of(trainee, pixels, precision)
            return seen.pop().float()

        rows = _asked(trainee, labelled.images, labelled.hashes, ask, decoder="pillow", pace=pace, group=group).double()
    if not bool(rows.isfinite().all()):
        raise NumericalError(
            f"what the head sees of the labelled images at tap {trainee.tap} is not finite",
            hint="Retry with --precision fp32.",
        )
    middle = rows.mean(dim=0)
    centred = rows - middle
    unit = centred.norm(dim=1).mean().clamp_min(torch.finfo(torch.float64).tiny)
    present, labels = torch.unique(labelled.labels, return_inverse=True)
    mu = strength / len(rows)
    problem = CrossEntropyProblem(rows=centred / unit, labels=labels, n_classes=len(present), mu=mu)
    ((solution, _),) = minimise_path(problem, [mu], target=_TARGET_GAP)
    weight = solution.weights.double() / unit
    with torch.no_grad():
        trainee.head.weight[present] = weight.to(trainee.head.weight)
        trainee.head.bias[present] = -(weight @ middle).to(trainee.head.bias)


@contextmanager
def _head_watched(head: nn.Linear, seen: list[Tensor]) -> Iterator[None]:
    handle = head.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    try:
        yield
    finally:
        handle.remove()


def _asked(
    trainee: FinetuneModel,
    images: ImageSet,
    hashes: Mapping[str, str],
    ask: Callable[[Tensor], Tensor],
    *,
    decoder: str,
    pace: Pace,
    group: Group,
) -> Tensor:
    """Give what is answered for images under the evaluation transform, a row an image, on the CPU; ranks share them."""
    rows = share(len(images), group, block=pace.part)
    encoder = trainee.encoder
    pixels_of = PixelList(
        source=images.source,
        image_ids=images.ids[rows.start : rows.stop],
        transform=encoder.transform,
        hashes=hashes,
        decoder=decoder,
    )
    found: list[Tensor] = []
    failures: list[str] = []
    done = 0
    with torch.inference_mode(), exact_float32():
        for batch in load_pixels(pixels_of, batch_size=pace.part, workers=pace.workers):
            pixels, refused = batch.pixels, list(batch.failures)
            if not isinstance(pixels, Tensor):
                pixels, reasons = decode_on_device(pixels, encoder.transform, encoder.device)
                refused += [(pixels_of.image_ids[done + row], reason) for row, reason in reasons.items()]
            failures += [f"{images.source.place(image_id)}: {reason}" for image_id, reason in refused]
            done += len(pixels)
            if not failures:
                found.append(ask(normalised(pixels.to(encoder.device), encoder)).cpu())
    if failures:
        raise unreadable(failures)
    return rows_of_all_ranks(group, torch.cat(found) if found else None)
