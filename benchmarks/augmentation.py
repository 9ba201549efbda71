"""Compare the augmentation of pre-training with plain transforms by Pillow and torchvision: milliseconds per image on one core.

    python benchmarks/augmentation.py [--images ../shared/data/imagenet_samples.tar] [--rounds 3] [--batch 8]
    python benchmarks/augmentation.py --out reports/benchmarks/augmentation.md

2 views of 224 and 10 of 96 pixels of real JPEGs, normalised and as one batch. Ours and the plain ones (plain/transforms.py)
take turns on every batch, in one process with one thread. Times are processor time of the process, since other programs may
share the machine; ratios above 1: ours is faster. `loader` makes views where images are decoded, `device` is views.made=device
on a CPU. Images are decoded before, or in the measured time: plain by Pillow, ours by torchvision.
"""

import argparse
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
import torchvision
from decode import _read_contents
from PIL import __version__ as pillow_version
from plain import transforms as plain
from torch import Tensor
from torch.utils.data import default_collate

from msn_eval.data.decoders import decode_tensor
from msn_eval.data.images import IMAGENET_MEAN, IMAGENET_STD, decode_image
from msn_pretrain.data.view_loader import make_views_on, normalise
from msn_pretrain.data.views import ViewKind, draw_for_batch, make_views

_KINDS = (ViewKind(pixels=224, count=2, scale=(0.3, 1.0)), ViewKind(pixels=96, count=10, scale=(0.05, 0.3)))
_IMAGES = Path(__file__).parents[2] / "shared" / "data" / "imagenet_samples.tar"
_PAIRS = (("loader", "plain"), ("device", "plain"), ("loader, decoded", "plain, decoded"), ("decode", "plain decode"))
Times = dict[str, float]  # processor seconds by way


def main() -> None:
    """Print a table, and write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, default=_IMAGES)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--limit", type=int, default=None, help="take the first N images only")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    contents = _read_contents(options.images)[: options.limit]
    batches = [contents[first : first + options.batch] for first in range(0, len(contents), options.batch)]
    _measure(batches[0], epoch=0)
    rounds = []
    for epoch in range(options.rounds):
        times = [_measure(batch, epoch=epoch) for batch in batches]
        rounds.append({name: sum(batch[name] for batch in times) / len(contents) for name in times[0]})
    table = _make_table(rounds, len(contents), options.batch)
    print(table, end="")
    if options.out is not None:
        options.out.write_text(table)


def _measure(contents: Sequence[bytes], *, epoch: int) -> Times:
    """Measure all ways on one batch, one after the other."""
    images, opened = [decode_tensor(content) for content in contents], [decode_image(content) for content in contents]
    pixels = torch.cat([image.view(-1, 3) for image in images])
    ways: dict[str, Callable[[], object]] = {
        "plain": lambda: default_collate([plain.make_views(image) for image in opened]),
        "loader": lambda: _make_ours(images, epoch),
        "device": lambda: _make_ours(images, epoch, pixels),
        "plain, decoded": lambda: default_collate([plain.make_views(decode_image(content)) for content in contents]),
        "loader, decoded": lambda: _make_ours([decode_tensor(content) for content in contents], epoch),
        "plain decode": lambda: [decode_image(content) for content in contents],
        "decode": lambda: [decode_tensor(content) for content in contents],
    }
    times = {}
    for name, make in ways.items():
        started = time.process_time()
        make()
        times[name] = time.process_time() - started
    return times


def _make_ours(images: Sequence[Tensor], epoch: int, pixels: Tensor | None = None) -> list[Tensor]:
    """Return normalised views, made one image after the other, or of the pixels of all."""
    sizes, first, made = np.array([image.shape[:2] for image in images]), 0, []
    for kind in _KINDS:
        drawn = draw_for_batch(sizes, kind, first_view=first, seed=0, epoch=epoch, numbers=np.arange(len(images)))
        views = make_views(images, drawn, kind) if pixels is None else make_views_on(pixels, sizes, drawn, kind)
        made.append(normalise(views, IMAGENET_MEAN, IMAGENET_STD))
        first += kind.count
    return made


def _make_table(rounds: Sequence[Times], images: int, batch: int) -> str:
    lines = [
        "| ours | ms per image | plain | ms per image | ratio | ratios of the rounds |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for ours, theirs in _PAIRS:
        own, other = ([times[name] for times in rounds] for name in (ours, theirs))
        ratios = [there / here for here, there in zip(own, other, strict=True)]
        lines.append(
            f"| {ours} | {1000 * statistics.median(own):.2f} | {theirs} | {1000 * statistics.median(other):.2f} | "
            f"{statistics.median(ratios):.2f} | {min(ratios):.2f} to {max(ratios):.2f} |"
        )
    machine = f"{platform.machine()} with {torch.backends.cpu.get_cpu_capability()}, one thread"
    versions = f"torch {torch.__version__}, torchvision {torchvision.__version__}, pillow {pillow_version}"
    return (
        f"# Augmentation of pre-training\n\n`benchmarks/augmentation.py`: {images} photographs, batches of {batch}, "
        f"2 views of 224 and 10 of 96 pixels, normalised; processor time, medians of {len(rounds)} rounds.\n\n"
        f"{machine}; {versions}.\n\n" + "\n".join(lines) + "\n"
    )


if __name__ == "__main__":
    main()
