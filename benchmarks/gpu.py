"""Run the GPU tests and time the main loops on one GPU, within about five minutes; write one table.

    python benchmarks/gpu.py [--out reports/benchmarks/gpu.md] [--device cuda] [--small]

`make gpu` runs it. Weights and data are random, so nothing is downloaded. A part that fails is a row with its error, and the exit
code is 1. The measured terms of the cost model (cost_model.py) are written beside the table as gpu.json, and the model's tables
with them follow in the same file. --small uses tiny sizes, to check the program itself on a CPU.
"""

import argparse
import hashlib
import io
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch
from cost_model import CLASSES, DRAWS, IMAGES, VAL, WIDTHS, make_tables, predict_terms
from PIL import Image

from msn_eval.checkpoints.checkpoint import Checkpoint, read_checkpoint
from msn_eval.data.decoders import decode_on_device, decode_pixels
from msn_eval.data.images import decode_image, make_eval_transform
from msn_eval.features.encoder import Precision, build_encoder, encode
from msn_eval.features.extraction import Features
from msn_eval.probes.knn_search import search_nearest
from msn_eval.probes.logistic import Logistic
from msn_pretrain.benchmark import bench
from msn_pretrain.config.load import read_recipe

_TEST_SECONDS = 180
_ROOT = Path(__file__).parents[1]
Measured = tuple[str, list[float]]  # what the table shows, and the values of the part's terms
Part = Callable[[torch.device, bool], Measured]


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
    failed, terms = False, dict[str, float]()
    lines = [
        f"# {_describe(device)}{', small sizes' if options.small else ''}",
        "",
        "| part | result | seconds |",
        "| --- | --- | --- |",
    ]
    for name, measures, part in list_parts(small=options.small):
        started = time.perf_counter()
        try:
            result, values = part(device, options.small)
            terms.update(zip(measures, values, strict=True))
        except Exception as error:  # one part must not hide the others
            result, failed = f"FAILED: {type(error).__name__}: {str(error).partition(chr(10))[0]}", True
        lines.append(f"| {name} | {result.replace('|', '/')} | {time.perf_counter() - started:.0f} |")
        print(lines[-1], flush=True)
    if options.out is not None:
        lines += ["", "## The cost model with these measurements", "", make_tables(predict_terms(), terms)]
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.with_suffix(".json").write_text(json.dumps(terms, indent=1) + "\n", encoding="utf-8")
        options.out.write_text("\n".join(lines) + "\n", encoding="utf-8")
        print(f"written: {options.out}")
    return int(failed)


def _describe(device: torch.device) -> str:
    if device.type != "cuda":
        return f"{torch.get_num_threads()} CPU threads, torch {torch.__version__}"
    properties = torch.cuda.get_device_properties(device)
    memory = properties.total_memory / 2**30
    return f"{properties.name}, {memory:.0f} GiB, torch {torch.__version__}, CUDA {torch.version.cuda}"


def list_parts(*, small: bool) -> Iterator[tuple[str, list[str], Part]]:
    """Yield the name of each part, the terms of the cost model that it measures, and its function."""
    if not small:
        yield "tests/gpu", [], _run_tests
    yield "start: one image through an encoder in a new process", ["start"], _start
    yield "one file of 1 GiB: read from the disk, and hashed", ["read", "hash"], _read
    yield "decode 500 x 375 JPEGs on one core", ["decode pillow", "decode torchvision", "decode only"], _decode
    yield "decode and resize JPEGs on the GPU", ["decode nvjpeg"], _decode_on_device
    yield "copies from page-locked memory", ["upload"], _copy
    yield "compressed predictions of 50,000 images", ["record"], _record
    precisions: tuple[Precision, ...] = ("fp32", "bf16")
    for arch in ("vit_tiny",) if small else WIDTHS:
        for precision in precisions:
            terms = [f"forward {arch}"] if precision == "bf16" and arch in WIDTHS else []
            yield f"encode {arch}_patch16_224 {precision}", terms, partial(_encode, arch, precision)
    for width in (48,) if small else WIDTHS.values():
        terms = [f"ten fits {width}", f"ten searches {width}"] if width in WIDTHS.values() else []
        yield f"fits and neighbours of ten draws, width {width}", terms, partial(_probe, width)
    for name in ("msn_digits",) if small else ("msn_vits16",):
        terms = [] if small else ["msn views", "msn step"]
        yield f"{name}: steps of pre-training on digits", terms, partial(_pretrain, name)


def _run_tests(device: torch.device, small: bool) -> Measured:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "tests/gpu"],
        cwd=_ROOT, capture_output=True, text=True, timeout=_TEST_SECONDS, check=False,
    )  # fmt: skip
    summary = done.stdout.strip().splitlines()
    failures = [line.partition(" - ")[0] for line in summary if line.startswith(("FAILED", "ERROR"))]
    if done.returncode:
        raise RuntimeError("; ".join([*summary[-1:], *failures]))
    return summary[-1], []


def _start(device: torch.device, small: bool) -> Measured:
    code = f"""import torch, msn_eval; from msn_eval.features.encoder import encode
encoder = msn_eval.load_encoder("random:{"vit_tiny" if small else "vit_small"}_patch16_224", device="{device}")
encode(encoder, torch.zeros(1, 224, 224, 3, dtype=torch.uint8), ["cls"])["cls"].cpu()"""
    started = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], cwd=_ROOT, check=True, capture_output=True)
    seconds = time.perf_counter() - started
    return f"{seconds:.1f} s", [seconds]


def _read(device: torch.device, small: bool) -> Measured:
    content = os.urandom((1 if small else 64) << 20) * 16
    with tempfile.NamedTemporaryFile(dir=_ROOT) as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)  # else it is read from memory
        rates = [len(content) / _seconds(partial(Path(file.name).read_bytes))]
    rates.append(len(content) / _seconds(lambda: hashlib.sha256(content).digest()))
    return " and ".join(f"{rate / 1e9:.1f} GB/s" for rate in rates), rates


def _make_jpeg(width: int, height: int) -> bytes:
    file = io.BytesIO()
    noise = Image.effect_noise((width, height), 40)
    Image.merge("RGB", (noise, noise.rotate(180), noise)).save(file, "JPEG", quality=80)
    return file.getvalue()


def _decode(device: torch.device, small: bool) -> Measured:
    transform, content, count = make_eval_transform(224), _make_jpeg(500, 375), 4 if small else 400
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    calls: list[Callable[[], object]] = [
        *(partial(decode_pixels, content, transform, decoder) for decoder in ("pillow", "torchvision")),
        partial(decode_image, content),
    ]
    for call in calls:
        call()  # imports
    rates = [count / _seconds(partial(_repeat, call, count)) for call in calls]
    torch.set_num_threads(threads)
    shown = ", ".join(f"{rate:,.0f}" for rate in rates)
    return f"{shown} images/s by Pillow, by torchvision, by Pillow without resizing; {len(content):,} bytes each", rates


def _decode_on_device(device: torch.device, small: bool) -> Measured:
    transform = make_eval_transform(224)
    sizes = [(500, 375 - number * 41 // 64) for number in range(64)]  # 41 sizes, as among 64 files of ImageNet
    files = [_make_jpeg(*size) for size in sizes[: 4 if small else 64]] * 4
    seconds = _best(device, lambda: decode_on_device(files, transform, device))
    return f"{len(files) / seconds:,.0f} images/s", [len(files) / seconds]


def _copy(device: torch.device, small: bool) -> Measured:
    rows = torch.empty((1 if small else 256) << 20, dtype=torch.uint8, pin_memory=device.type == "cuda")
    rate = len(rows) / _best(device, lambda: rows.to(device, copy=True, non_blocking=True))
    return f"{rate / 1e9:.1f} GB/s", [rate]


def _record(device: torch.device, small: bool) -> Measured:
    n, generator = 100 if small else 50_000, np.random.default_rng(0)
    ids = np.array([f"n{row % 1000:08d}/ILSVRC2012_val_{row:08d}.JPEG" for row in range(n)]).astype("S")
    columns = [generator.integers(0, 1000, n) for _ in range(3)] + [
        generator.random(n, dtype=np.float32) for _ in range(3)
    ]
    seconds = _seconds(lambda: np.savez_compressed(io.BytesIO(), ids, *columns))
    return f"{seconds:.2f} s", [seconds]


@cache
def _checkpoint(arch: str) -> Checkpoint:
    return read_checkpoint(f"random:{arch}_patch16_224")


def _encode(arch: str, precision: Precision, device: torch.device, small: bool) -> Measured:
    encoder = build_encoder(_checkpoint(arch), device=device, precision=precision)
    pixels = torch.randint(0, 256, (2 if small else 256, 224, 224, 3), dtype=torch.uint8).to(device)
    seconds = _best(device, lambda: encode(encoder, pixels, ["cls", "cls-norm"]))
    rate = len(pixels) / seconds
    is_term = precision == "bf16" and arch in WIDTHS
    return f"{rate:,.0f} images/s; {IMAGES:,} images in {IMAGES / rate:.0f} s", [rate] if is_term else []


def _probe(width: int, device: torch.device, small: bool) -> Measured:
    classes, draws, queries = (20, (40, 100), 300) if small else (CLASSES, DRAWS, VAL)
    rows, centres = torch.randn(max(draws), width), torch.randn(classes, width)
    labels = torch.arange(max(draws)) % classes
    values, tests = 0.3 * centres[labels] + rows, torch.randn(queries, width).to(device)
    fits, searches, gap = 0.0, 0.0, 0.0
    for n in draws:
        ids = tuple(map(str, range(n)))
        train = Features(values=values[:n], labels=labels[:n], image_ids=ids, n_classes=classes, tap="cls")
        started = time.perf_counter()
        fitted = Logistic(lambdas=(0.075 if n == DRAWS[-1] else 0.0025,)).fit(train, device)
        fits += time.perf_counter() - started
        gap = max([gap, *(item.certificate or 0.0 for item in fitted.settings)])
        bank = values[:n].to(device)
        searches += _seconds(partial(_sum_nearest, tests, bank))
    shown = (
        f"{fits:.1f} s for the logistic regressions, largest duality gap {gap:.0e}; {searches:.1f} s for the neighbours"
    )
    return shown, [] if small else [fits, searches]


def _pretrain(name: str, device: torch.device, small: bool) -> Measured:
    batch = 8 if small else 128
    overrides = ["data.root=digits", "data.workers=0", f"run.device={device}", f"optimization.batch_size={batch}"]
    recipe = read_recipe(_ROOT / "configs" / "pretrain" / f"{name}.yaml", overrides=overrides)
    line = bench(recipe, steps=2 if small else 10)
    seconds = re.findall(r"([\d.]+) s for", line)
    return line.replace("\n", "; "), [] if small else [batch / max(float(value), 1e-3) for value in seconds]


def _repeat(call: Callable[[], object], count: int) -> None:
    for _ in range(count):
        call()


def _sum_nearest(queries: torch.Tensor, bank: torch.Tensor) -> float:
    return search_nearest(queries, bank, min(200, len(bank)))[0].sum().item()


def _seconds(run: Callable[[], object]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


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
