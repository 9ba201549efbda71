"""Compare rules that choose lambda from labelled images only with the best lambda on validation images, which no rule can see.

    python benchmarks/lambda_auto.py [--sets digits:pixels,digits:demo,FOLDER:CHECKPOINT] [--shots 1,2,5,20] [--draws 8]

For each set of features (a data set and a checkpoint) and each number of labelled images per class, `draws` sets of
labelled images are drawn. The fits for every lambda of the grid are scored on validation images (at most 100 per
class). For each rule the table shows how many points its lambda is below the best one of that draw, the oracle. The
oracle is chosen from the grid on the same images that score it, so some tenths of a point cannot be avoided.

published   0.0025, the published lambda
spectrum    0.3 x the median eigenvalue of the labelled rows' scatter: the rule of `auto` if some class has one image
confidence  the largest lambda at which the labelled images' own class has a mean probability of one half
crops       the lambda whose fit is right on the most of four random crops of every labelled image (area 0.35 to 1, mirrored or
            not), of ties the largest; only with one image per class, because of its cost
evidence    the lambda of ridge regression with the largest marginal likelihood, maximised over the noise
ridge       the lambda of ridge regression with the smallest exact leave-one-out error
error       the smallest leave-one-out error as estimated by `auto`, of ties the largest lambda
exact       the smallest exact leave-one-out error, of ties the largest lambda; only for at most 20 labelled images
auto        the shipped rule: spectrum with one image per class, else the lambda nearest to spectrum among those whose estimated
            leave-one-out errors are not separable from the smallest
"""

import argparse
import math
import os
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from msn_eval.data import read_split
from msn_eval.data.images import ImageSet, resize_and_crop
from msn_eval.features.encoder import Encoder, encode, load_encoder
from msn_eval.features.extraction import Loading, extract_features
from msn_eval.probes.base import centre_rows
from msn_eval.probes.logistic_solvers.lambda_selection import (
    GRID,
    LabelledRows,
    can_be_left_out,
    choose_by_spectrum,
    choose_strength,
    left_out_error,
    typical_strength,
)
from msn_eval.probes.logistic_solvers.newton import minimise_path
from msn_eval.probes.logistic_solvers.objective import CrossEntropyProblem

_CROPS, _SMALLEST_AREA = 4, 0.35
_VAL_IMAGES = 100  # per class
_PUBLISHED = 0.0025
_MOST_FOR_EXACT = 20
_TARGET = 1e-6


@dataclass(frozen=True, kw_only=True)
class _Set:
    """Features of one data set from one checkpoint.

    Attributes:
        name: Title of the row in the table.
        rows: (n, d) centred and normalised features of the labelled images.
        labels: (n,) int64 labels of the labelled images.
        val: (m, d) centred and normalised features of the validation images.
        val_labels: (m,) int64 labels of the validation images.
        n_classes: Number of classes.
        crops: (n, 4, d) features of random crops, or None if they were not computed.
    """

    name: str
    rows: Tensor
    labels: Tensor
    val: Tensor
    val_labels: Tensor
    n_classes: int
    crops: Tensor | None


def main() -> None:
    """Print one Markdown table per number of shots, with rows for the mean and the worst loss."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", default="digits:pixels,digits:demo")
    parser.add_argument("--shots", default="1,2,5,20")
    parser.add_argument("--draws", type=int, default=8)
    options = parser.parse_args()
    shots = [int(one) for one in options.shots.split(",")]
    sets = [_read(one, shots, options.draws) for one in options.sets.split(",")]
    for count in shots:
        print(f"\n{count} image{'s' if count > 1 else ''} per class\n")
        _print_table([(one.name, _losses(one, count, options.draws)) for one in sets if _has(one, count)])


def _has(one: _Set, count: int) -> bool:
    return int(torch.bincount(one.labels).min()) > count


def _print_table(found: Sequence[tuple[str, tuple[float, dict[str, float]]]]) -> None:
    rules = list(dict.fromkeys(rule for _, (_, losses) in found for rule in losses))
    print("| features | oracle |", " | ".join(rules), "|")
    print("| --- | --- |", " | ".join("---" for _ in rules), "|")
    for name, (oracle, losses) in found:
        cells = (f"{losses[rule]:.2f}" if rule in losses else "" for rule in rules)
        print(f"| {name} | {oracle:.1f} |", " | ".join(cells), "|", flush=True)
    everywhere = [[losses[rule] for _, (_, losses) in found if rule in losses] for rule in rules]
    print("| mean | |", " | ".join(f"{sum(one) / len(one):.2f}" for one in everywhere), "|")
    print("| worst | |", " | ".join(f"{max(one):.2f}" for one in everywhere), "|", flush=True)


def _losses(one: _Set, count: int, draws: int) -> tuple[float, dict[str, float]]:
    """Return the oracle's mean accuracy in percent, and the mean number of points that each rule is below it."""
    oracle, lost = [], defaultdict(list)
    for draw in range(draws):
        chosen = _draw(one.labels, count, seed=draw)
        rows, labels = one.rows[chosen], one.labels[chosen]
        path = _path(rows, labels, one.n_classes)
        right = [100 * float(((one.val @ each.T).argmax(dim=1) == one.val_labels).double().mean()) for each in path]
        oracle.append(max(right))
        crops = None if one.crops is None or count > 1 else one.crops[chosen]
        for rule, index in _choices(rows, labels, path, one.n_classes, crops).items():
            lost[rule].append(max(right) - right[index])
    return sum(oracle) / draws, {rule: sum(points) / draws for rule, points in lost.items()}


def _draw(labels: Tensor, count: int, *, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(labels), generator=generator)
    of_class = (order[labels[order] == own] for own in range(int(labels.max()) + 1))
    return torch.cat([numbers[:count] for numbers in of_class])


def _path(rows: Tensor, labels: Tensor, n_classes: int) -> list[Tensor]:
    """Return the (n_classes, d) weights for every lambda of the grid."""
    reduced, basis = _reduced(rows)
    problem = CrossEntropyProblem(rows=reduced, labels=labels, n_classes=n_classes, mu=1.0)
    falling = [strength / len(rows) for strength in sorted(GRID, reverse=True)]
    found = [solution.weights.double() for solution, _ in minimise_path(problem, falling, target=_TARGET)]
    return [one @ basis.T for one in found[::-1]]


def _reduced(rows: Tensor) -> tuple[Tensor, Tensor]:
    if len(rows) >= rows.shape[1]:
        return rows, torch.eye(rows.shape[1], dtype=rows.dtype)
    basis, coordinates = torch.linalg.qr(rows.T)
    return coordinates.T.contiguous(), basis


def _choices(
    rows: Tensor, labels: Tensor, path: Sequence[Tensor], n_classes: int, crops: Tensor | None
) -> dict[str, int]:
    reduced, basis = _reduced(rows)
    weights = [one @ basis for one in path]
    labelled = LabelledRows(labels=labels, width=reduced.shape[1], prepared=reduced.__getitem__)
    typical = typical_strength(labelled)
    spectrum = choose_by_spectrum(typical)
    own = [float((reduced @ one.T).softmax(dim=1).gather(1, labels[:, None]).mean()) for one in weights]
    alphas, evidences, errors = _ridge(reduced, labels, n_classes)
    chosen = {
        "published": _nearest(_PUBLISHED),
        "spectrum": spectrum,
        "confidence": max((index for index, chance in enumerate(own) if chance >= 0.5), default=0),
        "evidence": _nearest(alphas[int(np.argmax(evidences))]),
        "ridge": _nearest(alphas[int(np.argmin(errors))]),
    }
    if crops is not None:
        flat, twice = crops.flatten(0, 1), labels.repeat_interleave(crops.shape[1])
        chosen["crops"] = _last_largest(
            [float(((flat @ one.T).argmax(dim=1) == twice).double().mean()) for one in path]
        )
    if not can_be_left_out(labels):
        return chosen | {"auto": spectrum}
    left_out = [left_out_error(labelled, one, strength) for one, strength in zip(weights, GRID, strict=True)]
    chosen["error"] = _last_largest([-error for error in left_out])
    if len(rows) <= _MOST_FOR_EXACT:
        chosen["exact"] = _last_largest(_exactly_right(reduced, labels, n_classes))
    return chosen | {"auto": choose_strength(left_out, n=len(rows), typical=typical)}


def _nearest(strength: float) -> int:
    return min(range(len(GRID)), key=lambda index: abs(math.log(GRID[index] / strength)))


def _last_largest(scores: Sequence[float]) -> int:
    return max(range(len(scores)), key=lambda index: (scores[index], index))


def _exactly_right(rows: Tensor, labels: Tensor, n_classes: int) -> list[float]:
    right = torch.zeros(len(GRID))
    for row in range(len(rows)):
        rest = torch.arange(len(rows)) != row
        path = _path(rows[rest], labels[rest], n_classes)
        right += torch.tensor([float(int((rows[row] @ one.T).argmax()) == int(labels[row])) for one in path])
    return right.tolist()


def _ridge(rows: Tensor, labels: Tensor, n_classes: int) -> tuple[list[float], list[float], list[float]]:
    """Return the penalties, log evidences and leave-one-out errors of ridge regression onto centred one-hot targets."""
    n = len(rows)
    centred = rows - rows.mean(dim=0)
    targets = torch.nn.functional.one_hot(labels, n_classes).double()
    targets -= targets.mean(dim=0)
    spectrum, axes = torch.linalg.eigh(centred @ centred.T)
    spectrum, energy = spectrum.clamp_min(0), (axes.T @ targets).square().sum(dim=1)
    kept = spectrum > 1e-10 * spectrum.max()  # removes the direction of the mean
    alphas, evidences, errors = list(GRID), [], []
    for alpha in alphas:
        ratio = spectrum / alpha + 1  # variance relative to the noise
        noise = float((energy[kept] / ratio[kept]).sum()) / (int(kept.sum()) * n_classes)  # maximum-likelihood noise
        evidences.append(
            -0.5 * int(kept.sum()) * n_classes * math.log(noise) - 0.5 * n_classes * float(ratio[kept].log().sum())
        )
        hat = (axes * (spectrum / (spectrum + alpha))) @ axes.T + 1 / n
        residual = (targets - hat @ targets) / (1 - hat.diagonal()).clamp_min(1e-12)[:, None]
        errors.append(float(residual.square().mean()))
    return alphas, evidences, errors


def _read(name: str, shots: Sequence[int], draws: int) -> _Set:
    data, _, checkpoint = name.partition(":")
    train, val = read_split(data, "train"), read_split(data, "val")
    encoder = load_encoder(checkpoint, device="cpu", image_pixels=32 if "resnet" in checkpoint else None)
    pool = train.first_of_each_class(2 * max(shots) if len(train.classes) > 20 else 5 * max(shots))
    tap = encoder.taps[0]
    parts = [
        extract_features(encoder, images, taps=[tap], loading=Loading(batch_size=64)).features[tap]
        for images in (pool, val.first_of_each_class(_VAL_IMAGES))
    ]
    crops = None
    if 1 in shots:
        selected = torch.unique(torch.cat([_draw(parts[0].labels, 1, seed=draw) for draw in range(draws)]))
        crops = torch.zeros(len(pool), _CROPS, parts[0].values.shape[1], dtype=torch.float64)
        crops[selected] = _crops(encoder, pool.only([pool.ids[row] for row in selected.tolist()]), tap)
    return _Set(
        name=f"{os.path.basename(data.rstrip('/'))} {checkpoint.partition('?')[0]}",  # noqa: PTH119
        rows=centre_rows(parts[0].values),
        labels=parts[0].labels,
        val=centre_rows(parts[1].values),
        val_labels=parts[1].labels,
        n_classes=len(train.classes),
        crops=crops,
    )


def _crops(encoder: Encoder, images: ImageSet, tap: str) -> Tensor:
    generator = np.random.default_rng(0)
    rows = []
    for image_id in images.ids:
        image = images.source.decode(images.source.read(image_id))
        made = []
        for _ in range(_CROPS):
            scale = math.sqrt(generator.uniform(_SMALLEST_AREA, 1))
            width, height = (max(1, round(side * scale)) for side in image.size)
            left = int(generator.integers(0, image.width - width + 1))
            top = int(generator.integers(0, image.height - height + 1))
            crop = image.crop((left, top, left + width, top + height))
            pixels = resize_and_crop(crop, encoder.transform)
            made.append(pixels[:, ::-1] if generator.random() < 0.5 else pixels)
        rows.append(centre_rows(encode(encoder, torch.from_numpy(np.stack(made)), [tap])[tap]))
    return torch.stack(rows)


if __name__ == "__main__":
    main()
