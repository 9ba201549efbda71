"""Compare CPU image decoders: images per second on one core, as ratios within one run, and pixel differences.

    python benchmarks/decode.py --images FOLDER_OR_TAR [--image-pixels 224] [--rounds 7]

Measures the time from the contents of a file in memory to the uint8 crop, with one thread on one core. The decoders
alternate on every image, so that changes of the machine's speed affect all of them. The time of an image is its best
round. Prints images per second, the ratio to Pillow, the mean and the largest difference of pixel values from Pillow's,
and the time of each step.
"""

import argparse
import os
import tarfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torchvision
from torch.nn.functional import interpolate

from msn_eval.data.decoders import decode_pixels, decoder_version
from msn_eval.data.images import (
    EvalTransform,
    decode_image,
    eval_transform,
    is_image_name,
    read_header,
    resize_and_crop,
    resized_size,
)

_DECODERS = ("pillow", "torchvision")
Times = dict[str, float]  # seconds by decoder or step


def main() -> None:
    """Print one line per decoder and one per step."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--image-pixels", type=int, default=224)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    torch.set_num_threads(1)
    core = _one_core()
    contents = _contents(options.images)
    transform = eval_transform(options.image_pixels)
    print(
        f"torch {torch.__version__}, torchvision {torchvision.__version__}, core {core}, {len(contents)} images, "
        f"crop {transform.crop}"
    )
    gaps = [_gaps(content, transform) for content in contents]
    times = [_best_times(content, transform, options.rounds) for content in contents]
    seconds = {name: sum(one[name] for one in times) for name in times[0]}
    for decoder in _DECODERS:
        print(
            f"{decoder_version(decoder)}: {len(contents) / seconds[decoder]:.1f} images/s, "
            f"ratio {seconds['pillow'] / seconds[decoder]:.2f}"
        )
    means, largest = zip(*gaps, strict=True)
    print(
        f"difference of torchvision's pixels from Pillow's: mean {np.mean(means):.4f}, largest {max(largest)} of 255 "
        f"levels; largest mean of one image {max(means):.4f}; identical in {sum(gap == 0 for gap in largest)} images"
    )
    for step in [name for name in seconds if name not in _DECODERS]:
        print(f"  {step}: {1000 * seconds[step] / len(contents):.3f} ms per image")


def _one_core() -> str:
    if not hasattr(os, "sched_setaffinity"):
        return "not pinned"
    core = max(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {core})
    return str(core)


def _contents(images: Path) -> list[bytes]:
    """Read all image files of a folder or a tar file, sorted by name."""
    if images.is_dir():
        return [path.read_bytes() for path in sorted(images.rglob("*")) if is_image_name(path.name) and path.is_file()]
    with tarfile.open(images) as archive:
        members = [one for one in archive if one.isfile() and is_image_name(Path(one.name).name)]
        files = [archive.extractfile(member) for member in sorted(members, key=lambda one: one.name)]
        return [file.read() for file in files if file is not None]


def _gaps(content: bytes, transform: EvalTransform) -> tuple[float, int]:
    pillow, torchvisions = (decode_pixels(content, transform, decoder).astype(int) for decoder in _DECODERS)
    gaps = np.abs(pillow - torchvisions)
    return float(gaps.mean()), int(gaps.max())


def _best_times(content: bytes, transform: EvalTransform, rounds: int) -> Times:
    image = decode_image(content)
    # The memory layout of torchvision's decoder: channels last.
    decoded = torch.from_numpy(np.array(image))[None].permute(0, 3, 1, 2)
    width, height = resized_size(*image.size, transform)
    works: dict[str, Callable[[], object]] = {
        "pillow": lambda: decode_pixels(content, transform, "pillow"),
        "torchvision": lambda: decode_pixels(content, transform, "torchvision"),
        "Pillow reads the header": lambda: read_header(content),
        "Pillow decodes": lambda: decode_image(content),
        "Pillow resizes and crops": lambda: resize_and_crop(image, transform),
        "torch resizes": lambda: interpolate(decoded, (height, width), mode="bilinear", antialias=True),
    }
    return {name: min(column) for name, column in _turns(works, rounds).items()}


def _turns(works: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(rounds):
        for name, work in works.items():
            started = time.perf_counter()
            work()
            times[name].append(time.perf_counter() - started)
    return times


if __name__ == "__main__":
    main()
