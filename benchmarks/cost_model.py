"""Predict the time of the ImageNet low-shot protocol and of an epoch of MSN on H100 GPUs, term by term.

    python benchmarks/cost_model.py [--measured reports/benchmarks/gpu.json] [--write]

Prints the tables of docs/gpu.md; --write puts them there. Every term is a row of the first table. `make gpu` measures the terms,
and its file replaces the predicted values.
"""

import argparse
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from msn_eval.checkpoints.checkpoint import Checkpoint
from msn_eval.checkpoints.normalisation import IMAGENET
from msn_eval.features.encoder import build_encoder, encode
from msn_eval.models.architectures import name_architecture
from msn_eval.models.build import outline_network
from msn_pretrain.config.load import read_recipe
from msn_pretrain.config.recipe import MSNRecipe
from msn_pretrain.methods.msn import build_msn

_ROOT = Path(__file__).parents[1]
DOCUMENT, START, END = _ROOT / "docs" / "gpu.md", "<!-- cost model -->\n", "<!-- end -->\n"
WIDTHS = {"vit_small": 384, "vit_base": 768, "vit_large": 1024}
CORES, CLASSES, VAL, IMAGES, EPOCH_IMAGES = 16, 1000, 50_000, 71_635, 1_281_167
DRAWS = (1000,) * 3 + (2000,) * 3 + (5000,) * 3 + (12_811,)  # labelled images of the ten fits
RECORDS = len(DRAWS) * (1 + 4)  # of the logistic regression and of four ks
# Means of 224 full-size files of ImageNet. Of 64 of them, 40.4 have different sizes; 201 are plain JPEGs.
FILE_BYTES, FILE_PIXELS, SIZES_PER_IMAGE, PLAIN_SHARE = 107_704, 233_415, 40.4 / 64, 201 / 224
CROP_BYTES = 3 * 224**2
RESIZE_KERNELS, VIEW_PASSES, TRAINING_PASSES = 12, 30, 3
HASH_THREADS = 8
FIT_PASSES, FIT_KERNELS = 13, 11_000
_BF16_FLOPS, _FP32_FLOPS, _MEMORY_BYTES = 989e12, 67e12, 3.35e12  # peaks of an H100 SXM
_TARGETS = {"low-shot": 60.0, "low-shot, nvjpeg": 15.0, "epoch": 240.0}


@dataclass(frozen=True)
class Term:
    """A value that a measurement can replace, with its unit and where the prediction comes from."""

    value: float
    unit: str
    source: str


def predict_terms() -> dict[str, Term]:
    """Return the predicted terms by name, for one H100 SXM and its host."""
    terms = {
        "start": Term(12.0, "s", "assumed: imports, CUDA context, checkpoint, first kernels"),
        "read": Term(3e9, "B/s", "assumed: one NVMe disk, files not in memory"),
        "hash": Term(1.5e9, "B/s per core", "assumed: SHA-256 with the processor's instructions"),
        "decode pillow": Term(427.5, "images/s per core", "reports/benchmarks/cpu.md"),
        "decode torchvision": Term(677.1, "images/s per core", "reports/benchmarks/cpu.md"),
        "decode only": Term(1 / 0.001226, "images/s per core", "reports/benchmarks/cpu.md: header and decoding"),
        "decode nvjpeg": Term(
            1 / (1 / (7834 * 372_476 / FILE_PIXELS * 7 / 5) + SIZES_PER_IMAGE * RESIZE_KERNELS * 1e-5),
            "images/s",
            "7,834 images/s of 551 x 676 pixels on an A100 (pytorch/vision pull request 8496), by pixels, 7 decoders for 5; "
            "then 12 kernels per size at 10 us",
        ),
        "upload": Term(50e9, "B/s", "assumed: PCIe 5.0 x16, page-locked"),
        "record": Term(0.25, "s", "compressed predictions of 50,000 images, one core"),
    }
    for name, width in WIDTHS.items():
        flops = count_forward(name)
        source = f"{flops / 1e9:.2f} GFLOP per image at 40 % of 989 TFLOP/s in bf16"
        terms[f"forward {name}"] = Term(0.4 * _BF16_FLOPS / flops, "images/s", source)
        flops = sum(4 * FIT_PASSES * n * width * CLASSES for n in DRAWS)
        source = (
            f"{FIT_PASSES} passes of 4ndc FLOP at 50 % of 67 TFLOP/s in fp32; {FIT_KERNELS:,} kernels of 10 us each"
        )
        terms[f"ten fits {width}"] = Term(2 * flops / _FP32_FLOPS + len(DRAWS) * FIT_KERNELS * 1e-5, "s", source)
        search = sum(4 * VAL * n * width / _FP32_FLOPS + 16 * VAL * n / (0.8 * _MEMORY_BYTES) for n in DRAWS)
        source = "2mnd FLOP at 50 % of 67 TFLOP/s; similarities pass through memory 4 times at 80 % of 3.35 TB/s"
        terms[f"ten searches {width}"] = Term(search, "s", source)
    recipe = read_recipe(_ROOT / "configs" / "pretrain" / "msn_vits16.yaml")
    assert isinstance(recipe, MSNRecipe)
    flops, weights = count_msn(recipe)
    source = f"{flops / 1e9:.1f} GFLOP per image at 35 % of 989 TFLOP/s in bf16"
    terms["msn step"] = Term(0.35 * _BF16_FLOPS / flops, "images/s", source)
    views = recipe.views
    pixels = (1 + views.random_views) * views.image_pixels**2 + views.focal_views * views.focal_pixels**2
    count = 1 + views.random_views + views.focal_views
    moved = 12 * (2 * VIEW_PASSES * pixels + 2 * count * FILE_PIXELS)
    source = f"float32 views pass through memory {VIEW_PASSES} times, each image once per view, at 80 % of 3.35 TB/s"
    terms["msn views"] = Term(0.8 * _MEMORY_BYTES / moved, "images/s", source)
    seconds = 2 * 7 / 8 * 4 * weights / (0.8 * 450e9)
    source = f"{weights / 1e6:.1f} million float32 gradients at 80 % of 450 GB/s (NVLink), not overlapped"
    terms["all-reduce of 8"] = Term(seconds, "s per step", source)
    return terms


def count_forward(name: str) -> int:
    """Return the FLOPs that the encoder spends on one image for the taps of both probes."""
    arch = f"{name}_patch16_224"
    checkpoint = Checkpoint(
        name=arch, path=arch, weights_sha256="", format="random", arch=arch, image_pixels=224,
        network=outline_network(name_architecture(arch)), normalisation=IMAGENET,
    )  # fmt: skip
    meta = torch.device("meta")
    encoder = build_encoder(checkpoint, device=meta, precision="bf16")
    pixels = torch.empty(1, 224, 224, 3, dtype=torch.uint8, device=meta)
    return _count(lambda: encode(encoder, pixels, ["cls", "cls-norm"]))


def count_msn(recipe: MSNRecipe) -> tuple[int, int]:
    """Return the FLOPs of a training step per image, without heads and loss, and the number of trained weights."""
    model, views = build_msn(recipe), recipe.views
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            setattr(module, "fused_attn", False)  # noqa: B010 - a flag of timm's layers, unknown to mypy; its FLOPs are not counted on a CPU
    trunk: nn.Module = model.anchor.trunk
    whole, focal = (torch.zeros(1, 3, side, side) for side in (views.image_pixels, views.focal_pixels))
    kept = model.draw_kept(torch.Generator().manual_seed(0), images=1)
    with torch.no_grad():
        target, anchor, small = (_count(partial(trunk, *given)) for given in ((whole,), (whole, kept), (focal,)))
    flops = target + TRAINING_PASSES * (views.random_views * anchor + views.focal_views * small)
    return flops, sum(weight.numel() for weight in model.parameters() if weight.requires_grad)


def _count(run: Callable[[], object]) -> int:
    with FlopCounterMode(display=False) as counter:
        run()
    return int(counter.get_total_flops())


def low_shot(value: Mapping[str, float], name: str, decoder: str) -> dict[str, float]:
    """Return the seconds of each part of the low-shot protocol, nothing cached, by name."""
    width, hashing = WIDTHS[name], FILE_BYTES / value["hash"]
    on_cores, on_gpu, moved = 1 / value[f"decode {'torchvision' if decoder == 'nvjpeg' else decoder}"], 0.0, CROP_BYTES
    if decoder == "nvjpeg":
        on_cores, on_gpu, moved = (1 - PLAIN_SHARE) * on_cores, PLAIN_SHARE / value["decode nvjpeg"], FILE_BYTES
    return {
        "start": value["start"],
        "read": IMAGES * max(FILE_BYTES / value["read"], hashing / HASH_THREADS),
        "decode": IMAGES * max((on_cores + hashing) / CORES, on_gpu),
        "copy": IMAGES * moved / value["upload"],
        "forward": IMAGES / value[f"forward {name}"],
        "fits": value[f"ten fits {width}"],
        "k-NN": value[f"ten searches {width}"],
        "records": RECORDS * value["record"],
    }


def low_shot_total(parts: Mapping[str, float]) -> float:
    """Return the total: decoding, copies and forward passes run at the same time, all else one after the other."""
    overlapped = ("decode", "copy", "forward")
    return max(parts[name] for name in overlapped) + sum(parts[name] for name in parts if name not in overlapped)


def epoch(value: Mapping[str, float], gpus: int, *, batch: int = 1024) -> dict[str, float]:
    """Return the seconds of each part of an epoch of MSN; every GPU has CORES cores."""
    images = EPOCH_IMAGES / gpus
    return {
        "decode": images / value["decode only"] / CORES,
        "copy": images * 3 * FILE_PIXELS / value["upload"],
        "views": images / value["msn views"],
        "step": images / value["msn step"],
        "all-reduce": 0.0 if gpus == 1 else EPOCH_IMAGES / batch * value["all-reduce of 8"],
    }


def epoch_total(parts: Mapping[str, float]) -> float:
    """Return the total: views, step and all-reduce follow each other on the GPU while the host decodes and copies."""
    return max(parts["decode"], parts["copy"], parts["views"] + parts["step"] + parts["all-reduce"])


def make_tables(terms: Mapping[str, Term], measured: Mapping[str, float]) -> str:
    """Return the tables as Markdown; measured values replace predicted ones."""
    value = {name: measured.get(name, term.value) for name, term in terms.items()}
    lines = ["| term | value | unit | source |", "| --- | --- | --- | --- |"]
    for name, term in terms.items():
        lines.append(
            f"| {name} | {value[name]:,.4g} | {term.unit} | {'measured' if name in measured else term.source} |"
        )
    lines += ["", "Seconds of the low-shot protocol on one H100 and 16 cores:", ""]
    rows = {}
    for name in WIDTHS:
        for decoder in ("pillow", "torchvision", "nvjpeg"):
            parts = low_shot(value, name, decoder)
            target = _TARGETS["low-shot, nvjpeg" if decoder == "nvjpeg" else "low-shot"]
            rows[f"{name}, {decoder}"] = (parts, low_shot_total(parts), target)
    lines += _table(rows)
    lines += ["", "Seconds of an epoch of MSN ViT-S/16, with 16 cores for each GPU:", ""]
    epochs = {gpus: epoch(value, gpus) for gpus in (1, 8)}
    targets = {1: _TARGETS["epoch"], 8: _TARGETS["epoch"] / 8}
    lines += _table(
        {f"{gpus} GPU{'s'[: gpus - 1]}": (parts, epoch_total(parts), targets[gpus]) for gpus, parts in epochs.items()}
    )
    return "\n".join(lines) + "\n"


def _table(rows: Mapping[str, tuple[dict[str, float], float, float]]) -> list[str]:
    names = list(next(iter(rows.values()))[0])
    lines = [f"| | {' | '.join(names)} | total | target | largest |", f"| --- |{' --- |' * (len(names) + 3)}"]
    for row, (parts, total, target) in rows.items():
        shown = " | ".join(f"{parts[name]:.1f}" for name in names)
        verdict = f"{target:.0f}: {'met' if total <= target else 'missed'}"
        lines.append(f"| {row} | {shown} | {total:.1f} | {verdict} | {max(parts, key=parts.__getitem__)} |")
    return lines


def main() -> None:
    """Print the tables, or write them into the document."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measured", type=Path)
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    measured = {} if options.measured is None else json.loads(options.measured.read_text(encoding="utf-8"))
    tables = make_tables(predict_terms(), measured)
    if not options.write:
        print(tables, end="")
        return
    head, _, rest = DOCUMENT.read_text(encoding="utf-8").partition(START)
    DOCUMENT.write_text(f"{head}{START}{tables}{END}{rest.partition(END)[2]}", encoding="utf-8")


if __name__ == "__main__":
    main()
