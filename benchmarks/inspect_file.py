"""Measure `msn-eval inspect` on a large file: seconds compared with sha256sum, and memory compared with the file's size.

    python benchmarks/inspect_file.py [--gigabytes 1] [--rounds 3]

The files are a Vision Transformer's weights of that size, written by torch.save and by safetensors, and read from the
page cache. Memory is the largest resident set of a process that only inspects the file.
"""

import argparse
import multiprocessing
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

_WIDTH = 1280
_BLOCK_VALUES = 12 * _WIDTH * _WIDTH + 13 * _WIDTH  # values of a Transformer block: two norms, attention, MLP
_INSPECT = """
import resource, sys, time
from pathlib import Path
from msn_eval.checkpoints.inspection import inspect_checkpoint
started = time.perf_counter()
facts = inspect_checkpoint(Path(sys.argv[1]))
print(time.perf_counter() - started, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, facts.problem, sep="\\t")
"""


def main() -> None:
    """Print seconds, the ratio and the largest resident set for each format."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for name in ("vit.pth", "vit.safetensors"):
            path = Path(folder) / name
            # Write in a separate process: on Linux, a child inherits the peak memory of its parent.
            writer = multiprocessing.get_context("spawn").Process(target=_write, args=(path, options.gigabytes))
            writer.start()
            writer.join()
            runs = [_once(path) for _ in range(options.rounds)]
            seconds, hashing, peak = (statistics.median(column) for column in zip(*runs, strict=True))
            size = path.stat().st_size
            print(
                f"{path.suffix}: {size / 1e9:.2f} GB, inspect {seconds:.1f} s, sha256sum {hashing:.1f} s, "
                f"ratio {seconds / hashing:.1f}, largest resident set {peak / 1e9:.2f} GB"
            )
            path.unlink()


def _write(path: Path, gigabytes: float) -> None:
    weights = _weights(round(gigabytes * 1e9 / 4 / _BLOCK_VALUES))
    if path.suffix == ".pth":
        torch.save({"model": weights}, path)
    else:
        save_file(weights, path)


def _weights(depth: int) -> dict[str, Tensor]:
    """Draw random weights of a Vision Transformer of the given depth, with timm's names."""
    shapes: dict[str, tuple[int, ...]] = {
        "cls_token": (1, 1, _WIDTH),
        "pos_embed": (1, 257, _WIDTH),
        "patch_embed.proj.weight": (_WIDTH, 3, 14, 14),
        "patch_embed.proj.bias": (_WIDTH,),
        "norm.weight": (_WIDTH,),
        "norm.bias": (_WIDTH,),
    }
    for block in range(depth):
        for name, rows, columns in (("attn.qkv", 3, 1), ("attn.proj", 1, 1), ("mlp.fc1", 4, 1), ("mlp.fc2", 1, 4)):
            shapes[f"blocks.{block}.{name}.weight"] = (rows * _WIDTH, columns * _WIDTH)
            shapes[f"blocks.{block}.{name}.bias"] = (rows * _WIDTH,)
        for name in ("norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias"):
            shapes[f"blocks.{block}.{name}"] = (_WIDTH,)
    return {name: torch.randn(shape) for name, shape in shapes.items()}


def _once(path: Path) -> tuple[float, float, float]:
    """Return the seconds of an inspection, the seconds of sha256sum, and the peak bytes of the inspection."""
    command = [sys.executable, "-c", _INSPECT, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    seconds, peak, problem = done.stdout.strip().split("\t")
    if problem != "None":
        raise RuntimeError(f"cannot inspect {path}: {problem}")
    started = time.perf_counter()
    subprocess.run(["sha256sum", str(path)], capture_output=True, check=True)
    return float(seconds), time.perf_counter() - started, float(peak)


if __name__ == "__main__":
    main()
