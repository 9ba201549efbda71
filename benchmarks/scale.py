"""Whether the cost of extraction grows linearly and memory stays flat: images per second and resident memory by list length.

    python benchmarks/scale.py --data FOLDER [--counts 1000,5000,20000] [--rounds 3]

The training images of an image folder, an untrained ViT of two blocks at 64 pixels, one thread, a new cache each time. The
lengths alternate. Memory is the peak of the process above its start, without the bytes of the features.
"""

import argparse
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from msn_eval.checkpoints.checkpoint import read_checkpoint
from msn_eval.data import read_split
from msn_eval.data.hashing import hash_images
from msn_eval.features.encoder import build_encoder
from msn_eval.features.extraction import extract_features

_NETWORK = "random:vit_tiny_patch16_224?img_size=64&patch_size=16&depth=2"


def main() -> None:
    """Print one line per length."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--counts", default="1000,5000,20000")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.only is not None:
        print(*_extract(options.data, options.only))
        return
    counts = [int(count) for count in options.counts.split(",")]
    found: dict[int, list[tuple[float, float]]] = {count: [] for count in counts}
    for _ in range(options.rounds):
        for count in counts:
            # A process of its own: memory left by a different length would hide the peak of this one.
            words = [sys.executable, __file__, "--data", options.data, "--only", str(count)]
            rate, held = map(float, subprocess.run(words, capture_output=True, text=True, check=True).stdout.split())
            found[count].append((rate, held))
    first = statistics.median(rate for rate, _ in found[counts[0]])
    print(f"torch {torch.__version__}, one thread, {_NETWORK}")
    for count, pairs in found.items():
        rates, memory = zip(*pairs, strict=True)
        median = statistics.median(rates)
        print(
            f"{count:>7,} images: {median:.0f} images/s, {median / first:.2f} of the shortest list's "
            f"({min(rates):.0f} to {max(rates):.0f}); {statistics.median(memory) / 1e6:.0f} MB held"
        )


def _extract(data: str, count: int) -> tuple[float, float]:
    """Return images per second, hashing and writing included, and the peak bytes beyond start and features."""
    torch.set_num_threads(1)
    encoder = build_encoder(read_checkpoint(_NETWORK), device=torch.device("cpu"), precision="fp32")
    images = read_split(data, "train")
    step = len(images) // count
    images = images.only(images.ids[::step][:count])
    with tempfile.TemporaryDirectory() as cache:
        extract_features(encoder, images.only(images.ids[:64]), taps=["cls"])
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        started = time.perf_counter()
        hashes = hash_images(images, cache_dir=Path(cache))
        extraction = extract_features(encoder, images, taps=["cls"], hashes=hashes, cache=Path(cache))
        seconds = time.perf_counter() - started
    values = extraction.features["cls"].values
    held = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 - values.nbytes
    return count / seconds, float(held)


if __name__ == "__main__":
    main()
