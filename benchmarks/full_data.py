"""Logistic regression over very many rows: what memory it takes beside the features, seconds, and what is proven.

    python benchmarks/full_data.py [--images 200000] [--width 384] [--classes 100] [--strength 0.0025]

Gaussian clusters that overlap, whose axes differ in strength by a factor of 150, with a common offset. Memory is the peak of
what the process holds above its start, when everything is imported and nothing made, over the bytes of the features.
"""

import argparse
import re
import time
from pathlib import Path

import torch

from msn_eval.features.extraction import Features
from msn_eval.probes.logistic import Logistic
from msn_eval.probes.logistic_solvers.newton import is_large

_BLOCK = 4096


def main() -> None:
    """Print one line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=200_000)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--classes", type=int, default=100)
    parser.add_argument("--strength", type=float, default=0.0025)
    options = parser.parse_args()
    fit(features(2 * options.classes, options.width, options.classes), options.strength)  # loads what is loaded once
    start = _peak_bytes()
    drawn = features(options.images, options.width, options.classes)
    size = drawn.values.numel() * drawn.values.element_size()
    began = time.perf_counter()
    setting = fit(drawn, options.strength)
    seconds = time.perf_counter() - began
    above = _peak_bytes() - start
    large = is_large(options.images, options.width, options.classes)
    print(
        f"torch {torch.__version__}, {torch.get_num_threads()} threads: {options.images:,} x {options.width}, "
        f"{options.classes} classes, {'in chunks' if large else 'whole'}: {seconds:.0f} s, gap {setting.certificate:.1e}, "
        f"{setting.iterations} steps, peak {above / 1e6:.0f} MB = {above / size:.2f} x the features' {size / 1e6:.0f} MB"
    )


def features(images: int, width: int, classes: int) -> Features:
    """Draw rows a block at a time, so that nothing but the features themselves is ever whole."""
    generator = torch.Generator().manual_seed(0)
    spread = torch.linspace(0, -5, width).exp()
    centres, offset = 0.25 * torch.randn(classes, width, generator=generator), torch.randn(width, generator=generator)
    labels = torch.arange(images) % classes
    values = torch.empty(images, width)
    for first in range(0, images, _BLOCK):
        own = labels[first : first + _BLOCK]
        noise = torch.randn(len(own), width, generator=generator)
        values[first : first + _BLOCK] = (centres[own] + noise) * spread + 0.5 * offset
    ids = tuple(str(row) for row in range(images))
    return Features(values=values, labels=labels, image_ids=ids, n_classes=classes, tap="cls")


def fit(train: Features, strength: float):  # type: ignore[no-untyped-def]
    """Return the setting of the one fit."""
    return Logistic(lambdas=(strength,)).fit(train, torch.device("cpu")).settings[0]


def _peak_bytes() -> int:
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return 1024 * int(found[1])


if __name__ == "__main__":
    main()
