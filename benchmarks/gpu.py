"""Run the GPU tests and time the main loops on one GPU, within about five minutes; write one table.

    python benchmarks/gpu.py [--out reports/benchmarks/gpu.md] [--device cuda] [--small]

`make gpu` runs it. Weights and data are random, so nothing is downloaded. A part that fails is a row with its error, and the exit
code is 1. --small uses tiny sizes, to check the program itself on a CPU.
"""

import argparse
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch

from msn_eval.checkpoints.checkpoint import read_checkpoint
from msn_eval.features.encoder import Precision, build_encoder, encode
from msn_eval.features.extraction import Features
from msn_eval.probes.knn_search import search_nearest
from msn_eval.probes.logistic import Logistic
from msn_pretrain.benchmark import bench
from msn_pretrain.config.load import read_recipe

_TEST_SECONDS = 180
_ROOT = Path(__file__).parents[1]
Part = Callable[[torch.device, bool], str]


def main() -> int:
    """Print the table and write it; return 0 if every part succeeded."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true")
    options = parser.parse_args()
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("no GPU: PyTorch sees no CUDA device. Check the driver with nvidia-smi.", file=sys.stderr)
        return 1
    failed = False
    lines = [
        f"# {_describe(device)}{', small sizes' if options.small else ''}",
        "",
        "| part | result | seconds |",
        "| --- | --- | --- |",
    ]
    for name, part in _parts(small=options.small):
        started = time.perf_counter()
        try:
            result = part(device, options.small)
        except Exception as error:  # one part must not hide the others
            result, failed = f"FAILED: {type(error).__name__}: {str(error).partition(chr(10))[0]}", True
        lines.append(f"| {name} | {result.replace('|', '/')} | {time.perf_counter() - started:.0f} |")
        print(lines[-1], flush=True)
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text("\n".join(lines) + "\n", encoding="utf-8")
        print(f"written: {options.out}")
    return int(failed)


def _describe(device: torch.device) -> str:
    if device.type != "cuda":
        return f"{torch.get_num_threads()} CPU threads, torch {torch.__version__}"
    properties = torch.cuda.get_device_properties(device)
    memory = properties.total_memory / 2**30
    return f"{properties.name}, {memory:.0f} GiB, torch {torch.__version__}, CUDA {torch.version.cuda}"


def _parts(*, small: bool) -> Iterator[tuple[str, Part]]:
    if not small:
        yield "tests/gpu", _run_tests
    yield "copies from page-locked memory", _copy
    precisions: tuple[Precision, ...] = ("fp32", "bf16")
    for arch in ("vit_tiny",) if small else ("vit_small", "vit_base", "vit_large"):
        for precision in precisions:
            yield f"encode {arch}_patch16_224 {precision}", partial(_encode, arch, precision)
    yield "logistic regression: 12,811 rows of 768, 1,000 classes, 3 lambdas", _fit
    yield "k-NN: 50,000 queries, 12,811 rows of 768, k = 200", _search
    for name in ("msn_digits",) if small else ("msn_vits16",):
        yield f"{name}: steps of pre-training on digits", partial(_pretrain, name)


def _run_tests(device: torch.device, small: bool) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "tests/gpu"],
        cwd=_ROOT, capture_output=True, text=True, timeout=_TEST_SECONDS, check=False,
    )  # fmt: skip
    summary = done.stdout.strip().splitlines()
    failures = [line.partition(" - ")[0] for line in summary if line.startswith(("FAILED", "ERROR"))]
    if done.returncode:
        raise RuntimeError("; ".join([*summary[-1:], *failures]))
    return summary[-1]


def _copy(device: torch.device, small: bool) -> str:
    rows = torch.empty((1 if small else 256) << 20, dtype=torch.uint8, pin_memory=device.type == "cuda")
    seconds = _best(device, lambda: rows.to(device, copy=True, non_blocking=True))
    return f"{len(rows) / seconds / 1e9:.1f} GB/s"


def _encode(arch: str, precision: Precision, device: torch.device, small: bool) -> str:
    encoder = build_encoder(read_checkpoint(f"random:{arch}_patch16_224"), device=device, precision=precision)
    pixels = torch.randint(0, 256, (2 if small else 256, 224, 224, 3), dtype=torch.uint8)
    seconds = _best(device, lambda: encode(encoder, pixels, ["cls"]))
    return f"{len(pixels) / seconds:,.0f} images/s; 71,635 images in {71_635 * seconds / len(pixels):.0f} s"


def _fit(device: torch.device, small: bool) -> str:
    n, classes = (400, 20) if small else (12_811, 1000)
    labels = torch.arange(n) % classes
    values = 0.3 * torch.randn(classes, 768)[labels] + torch.randn(n, 768)
    train = Features(values=values, labels=labels, image_ids=tuple(map(str, range(n))), n_classes=classes, tap="cls")
    started = time.perf_counter()
    fitted = Logistic(lambdas=(0.0025, 0.0137, 0.075)).fit(train, device)
    gap = max(item.certificate or 0.0 for item in fitted.settings)
    return f"{time.perf_counter() - started:.1f} s, largest duality gap {gap:.0e}"


def _search(device: torch.device, small: bool) -> str:
    sizes = (300, 400) if small else (50_000, 12_811)
    queries, bank = (torch.randn(n, 768).to(device) for n in sizes)
    started = time.perf_counter()
    search_nearest(queries, bank, 200)
    return f"{time.perf_counter() - started:.1f} s"


def _pretrain(name: str, device: torch.device, small: bool) -> str:
    batch = 8 if small else 128
    overrides = ["data.root=digits", "data.workers=0", f"run.device={device}", f"optimization.batch_size={batch}"]
    return bench(
        read_recipe(_ROOT / "configs" / "pretrain" / f"{name}.yaml", overrides=overrides), steps=2 if small else 10
    )


def _best(device: torch.device, run: Callable[[], object]) -> float:
    """Return the seconds of the fastest of several runs after a first one, with all their work on the device."""
    seconds = []
    for _ in range(6):
        started = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - started)
    return min(seconds[1:])


if __name__ == "__main__":
    sys.exit(main())
