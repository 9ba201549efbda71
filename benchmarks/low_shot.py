"""The features of a whole low-shot evaluation from real JPEGs, against the straightforward way: ratios in one run.

    python benchmarks/low_shot.py --images FOLDER_OF_JPEGS [--arch vit_small_patch16_224] [--rounds 3]

The images represent ImageNet in its proportions: of 71,635 that the ten published lists and the validation set name,
50,000 are for validation, and the lists name the other 21,635 36,811 times. The straightforward way goes list by list with
torchvision's ImageFolder, batches of 16, no workers, fp32, timm's network, and goes through the validation images once.
Ours hashes the files, reads each image once, and writes the features to a new cache; its bf16 is another precision class,
and its torchvision decoder another protocol. The two take turns.
"""

import argparse
import random
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import timm
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Subset
from torchvision import datasets, transforms

from msn_eval.checkpoints.checkpoint import read_checkpoint
from msn_eval.data import read_split
from msn_eval.data.hashing import hash_images
from msn_eval.features.encoder import Precision, build_encoder
from msn_eval.features.extraction import Loading, extract_features

_VALIDATION, _LABELLED, _LISTED = 50_000, 21_635, 36_811
_LIST_SIZES = (1000, 1000, 1000, 2000, 2000, 2000, 5000, 5000, 5000, 12811)


def main() -> None:
    """Print one line per method."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", required=True, type=Path)
    parser.add_argument("--arch", default="vit_small_patch16_224")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    files = sorted(path for path in options.images.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg"))
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        lists = _lay_out(files, root)
        listed = sum(map(len, lists))
        print(
            f"torch {torch.__version__}, {torch.get_num_threads()} threads, {options.arch}, {len(files)} images: "
            f"{len(list((root / 'val').rglob('*.*')))} for validation, {listed} named by the lists"
        )
        ways: dict[str, Callable[[], Tensor]] = {
            "fp32, all exact": lambda: _ours(root, options.arch, "fp32", "pillow"),
            "bf16": lambda: _ours(root, options.arch, "bf16", "pillow"),
            "bf16, torchvision decoder": lambda: _ours(root, options.arch, "bf16", "torchvision"),
        }
        ratios: dict[str, list[float]] = {name: [] for name in ways}
        seconds: dict[str, list[float]] = {name: [] for name in (*ways, "straightforward")}
        for _ in range(options.rounds):
            theirs, reference = _timed(lambda: _straightforward(root, options.arch, lists))
            seconds["straightforward"].append(theirs)
            for name, way in ways.items():
                ours, features = _timed(way)
                if name == "fp32, all exact":
                    torch.testing.assert_close(features, reference, atol=1e-3, rtol=1e-3)
                seconds[name].append(ours)
                ratios[name].append(theirs / ours)
        print(f"straightforward: {statistics.median(seconds['straightforward']):.1f} s")
        for name, found in ratios.items():
            print(
                f"{name}: {statistics.median(seconds[name]):.1f} s, ratio {statistics.median(found):.2f} "
                f"({min(found):.2f} to {max(found):.2f})"
            )


def _lay_out(files: list[Path], root: Path) -> list[list[int]]:
    """Copy the images into `train` and `val`, a class each, and return lists over `train` that overlap as the published do."""
    chance = random.Random(0)
    cut = round(len(files) * _LABELLED / (_LABELLED + _VALIDATION))
    for split, some in (("train", files[:cut]), ("val", files[cut:])):
        (root / split / "0").mkdir(parents=True)
        for path in some:
            shutil.copy(path, root / split / "0" / path.name)
    scale = cut / _LABELLED
    listed = list(range(cut)) + chance.choices(range(cut), k=round((_LISTED - _LABELLED) * scale))
    chance.shuffle(listed)
    edges = [0]
    for size in _LIST_SIZES:
        edges.append(edges[-1] + size)
    return [listed[len(listed) * a // edges[-1] : len(listed) * b // edges[-1]] for a, b in pairwise(edges)]


def _timed(way: Callable[[], Tensor]) -> tuple[float, Tensor]:
    started = time.perf_counter()
    features = way()
    return time.perf_counter() - started, features


def _straightforward(root: Path, arch: str, lists: list[list[int]]) -> Tensor:
    network = timm.create_model(arch, num_classes=0).eval()
    checkpoint = read_checkpoint(f"random:{arch}")
    network.load_state_dict(checkpoint.network.state_dict())
    transform = transforms.Compose(
        [
            transforms.Resize(256),
            transforms.CenterCrop(224),
            transforms.ToTensor(),
            transforms.Normalize(checkpoint.mean, checkpoint.std),
        ]
    )
    network.norm = torch.nn.Identity()
    splits = {split: datasets.ImageFolder(str(root / split), transform) for split in ("train", "val")}
    with torch.inference_mode():
        for rows in lists:
            for images, _ in DataLoader(Subset(splits["train"], rows), batch_size=16):
                network.forward_features(images)[:, 0]
        batches = DataLoader(splits["val"], batch_size=16)
        return torch.cat([network.forward_features(images)[:, 0] for images, _ in batches])


def _ours(root: Path, arch: str, precision: Precision, decoder: str) -> Tensor:
    with tempfile.TemporaryDirectory() as cache:
        encoder = build_encoder(read_checkpoint(f"random:{arch}"), device=torch.device("cpu"), precision=precision)
        values = torch.empty(0)
        for split in ("train", "val"):
            images = read_split(str(root), split)
            found = extract_features(
                encoder,
                images,
                taps=["cls"],
                hashes=hash_images(images, cache_dir=Path(cache)),
                loading=Loading(decoder=decoder),
                cache=Path(cache),
            )
            values = found.features["cls"].values
        return values


if __name__ == "__main__":
    main()
