"""Compare the CPU decoders: images per second on one core, as ratios within one run, and their pixels.

    python benchmarks/decode.py --images FOLDER_OR_TAR [--image-pixels 224] [--rounds 7]

File to uint8 crop, the contents in memory, one thread on one core. The decoders alternate on every image, so that a
drift of the machine's speed affects all of them; an image's time is the best of its rounds. Prints images per second, the
ratio to Pillow, the mean and the largest difference of pixel values from Pillow's, and the time of each step.
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
    compute_resized_size,
    decode_image,
    is_image_name,
    make_eval_transform,
    read_header,
    resize_and_crop,
)

_DECODERS = ("pillow", "torchvision")
Times = dict[str, float]  # seconds by step


def main() -> None:
    """Print one line per decoder and one per step."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--image-pixels", type=int, default=224)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    torch.set_num_threads(1)
    core = _pin_to_core()
    contents = _read_contents(options.images)
    transform = make_eval_transform(options.image_pixels)
    print(
        f"torch {torch.__version__}, torchvision {torchvision.__version__}, core {core}, {len(contents)} images, "
        f"crop {transform.crop}"
    )
    gaps = [_measure_gaps(content, transform) for content in contents]
    times = [_measure_best_times(content, transform, options.rounds) for content in contents]
    seconds = {name: sum(image_times[name] for image_times in times) for name in times[0]}
    for decoder in _DECODERS:
        print(
            f"{decoder_version(decoder)}: {len(contents) / seconds[decoder]:.1f} images/s, "
            f"ratio {seconds['pillow'] / seconds[decoder]:.2f}"
        )
    means, largest = zip(*gaps, strict=True)
    print(
        f"difference of torchvision's pixels from Pillow's: mean {np.mean(means):.4f}, largest {max(largest)} of 255 "
        f"levels; largest mean of one image {max(means):.4f}; the same in {sum(gap == 0 for gap in largest)} images"
    )
    for step in [name for name in seconds if name not in _DECODERS]:
        print(f"  {step}: {1000 * seconds[step] / len(contents):.3f} ms per image")


def _pin_to_core() -> str:
    if not hasattr(os, "sched_setaffinity"):
        return "not pinned"
    core = max(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {core})
    return str(core)


def _read_contents(images: Path) -> list[bytes]:
    """Read all image files of a folder or a tar, in the order of their names."""
    if images.is_dir():
        return [path.read_bytes() for path in sorted(images.rglob("*")) if is_image_name(path.name) and path.is_file()]
    with tarfile.open(images) as archive:
        members = [member for member in archive if member.isfile() and is_image_name(Path(member.name).name)]
        files = [archive.extractfile(member) for member in sorted(members, key=lambda member: member.name)]
        return [file.read() for file in files if file is not None]


def _measure_gaps(content: bytes, transform: EvalTransform) -> tuple[float, int]:
    pillow, torchvisions = (decode_pixels(content, transform, decoder).astype(int) for decoder in _DECODERS)
    gaps = np.abs(pillow - torchvisions)
    return float(gaps.mean()), int(gaps.max())


def _measure_best_times(content: bytes, transform: EvalTransform, rounds: int) -> Times:
    image = decode_image(content)
    # As torchvision leaves it: channels last in memory.
    decoded = torch.from_numpy(np.array(image))[None].permute(0, 3, 1, 2)
    width, height = compute_resized_size(*image.size, transform)
    works: dict[str, Callable[[], object]] = {
        "pillow": lambda: decode_pixels(content, transform, "pillow"),
        "torchvision": lambda: decode_pixels(content, transform, "torchvision"),
        "Pillow reads the header": lambda: read_header(content),
        "Pillow decodes": lambda: decode_image(content),
        "Pillow resizes and crops": lambda: resize_and_crop(image, transform),
        "torch resizes": lambda: interpolate(decoded, (height, width), mode="bilinear", antialias=True),
    }
    return {name: min(column) for name, column in _time_in_turns(works, rounds).items()}


def _time_in_turns(works: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(rounds):
        for name, work in works.items():
            started = time.perf_counter()
            work()
            times[name].append(time.perf_counter() - started)
    return times


if __name__ == "__main__":
    main()
