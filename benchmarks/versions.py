"""Compare the commands of two versions of the package: CPU seconds, in turns, each in a separate process.

    python benchmarks/versions.py BEFORE [AFTER] [--rounds 5]

BEFORE and AFTER are folders with a clone of the repository; AFTER defaults to this one. Both read the same inputs, made here.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

_CLASSES, _IMAGES = 10, 100  # images per class of each split


def main() -> None:
    """Print a Markdown table: the median CPU seconds of both versions, and their ratio with its range."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path, nargs="?", default=Path(__file__).parents[1])
    parser.add_argument("--rounds", type=int, default=5)
    chosen = parser.parse_args()
    print("| command | before, s | after, s | ratio |\n| --- | ---: | ---: | --- |")
    with tempfile.TemporaryDirectory() as folder:
        for name, arguments in make_commands(Path(folder)).items():
            pairs = [
                [cpu_seconds(version, arguments, Path(folder)) for version in (chosen.before, chosen.after)]
                for _ in range(chosen.rounds)
            ]
            before, after = (statistics.median(column) for column in zip(*pairs, strict=True))
            ratios = [new / old for old, new in pairs]
            ratio = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
            print(f"| {name} | {before:.2f} | {after:.2f} | {ratio} |", flush=True)


def make_commands(folder: Path) -> Mapping[str, Sequence[str]]:
    """Write the inputs into `folder` and return the arguments of `msn-eval` by the name of what they measure."""
    write_images(folder / "images")
    write_checkpoints(folder)
    arch = ["--arch", "vit_small_patch16_224"]
    evaluate = ["--device", "cpu", "--out", "{out}", "-q"]
    images = ["--data", str(folder / "images"), "--workers", "0"]
    digits = ["--checkpoint", "demo", "--data", "digits", "--subset", "low-shot", "--no-cache", *evaluate]
    subprocess.run(
        [sys.executable, "-m", "msn_eval", *digits, "--probe", "logistic,knn,ridge,ncm", "--out", str(folder / "runs")],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    return {
        "start: `--help`": ["--help"],
        "read a checkpoint, zip": ["inspect", str(folder / "zip.pth"), *arch],
        "read a checkpoint, legacy": ["inspect", str(folder / "legacy.pth"), *arch],
        "read a checkpoint, safetensors": ["inspect", str(folder / "vit.safetensors"), *arch],
        "read a Hugging Face folder": ["inspect", str(folder / "hf")],
        "verify 2,000 images": ["data", "verify", str(folder / "images")],
        "plan over 2,000 images": ["--checkpoint", "pixels", *images, "--no-cache", *evaluate, "--dry-run"],
        "features of 2,000 images": ["--checkpoint", "pixels", *images, "--probe", "ncm", "--no-cache", *evaluate],
        "digits, logistic": [*digits, "--probe", "logistic"],
        "digits, k-NN": [*digits, "--probe", "knn"],
        "tables of 40 records": ["report", str(folder / "runs"), "--format", "md,csv,json,latex", "--out", "{out}"],
        "page of 40 records": ["report", str(folder / "runs"), "--format", "html", "--out", "{out}"],
        "`verify` of 40 records": ["verify", str(folder / "runs")],
    }


def write_images(folder: Path) -> None:
    """Write JPEGs of noise, 160 x 120 pixels, as an image folder with two splits."""
    draw = np.random.default_rng(0)
    for split in ("train", "val"):
        for number in range(_CLASSES):
            target = folder / split / f"class{number}"
            target.mkdir(parents=True)
            for image in range(_IMAGES):
                coarse = Image.fromarray(draw.integers(0, 256, (12, 16, 3), dtype=np.uint8))
                coarse.resize((160, 120)).save(target / f"{image:03d}.jpg")


def write_checkpoints(folder: Path) -> None:
    """Write an untrained ViT-S/16 in four layouts."""
    torch.manual_seed(0)
    state = timm.create_model("vit_small_patch16_224", num_classes=0).state_dict()
    torch.save(state, folder / "zip.pth")
    torch.save(state, folder / "legacy.pth", _use_new_zipfile_serialization=False)
    save_file(state, folder / "vit.safetensors")
    assert zipfile.is_zipfile(folder / "zip.pth")
    from transformers import ViTMSNConfig, ViTMSNModel

    config = ViTMSNConfig(hidden_size=384, num_attention_heads=6, intermediate_size=1536)
    ViTMSNModel(config).save_pretrained(folder / "hf")
    mean = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
    (folder / "hf" / "preprocessor_config.json").write_text(json.dumps(mean))


def cpu_seconds(version: Path, arguments: Sequence[str], folder: Path) -> float:
    """Run `msn-eval` of one version; return the user and system seconds of the process and its children."""
    with tempfile.TemporaryDirectory(dir=folder) as out:
        command = [sys.executable, "-m", "msn_eval", *(out if word == "{out}" else word for word in arguments)]
        environment = os.environ | {"PYTHONPATH": str(version.resolve()), "OMP_NUM_THREADS": "1"}
        started = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run(command, env=environment, cwd=out, capture_output=True, text=True, check=False)
        ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} of {version} ended with {done.returncode}:\n{done.stderr}")
    return ended.ru_utime - started.ru_utime + ended.ru_stime - started.ru_stime


if __name__ == "__main__":
    main()
