"""Small weights, files, pictures and results that several folders of tests share."""

import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from msn_eval.data.images import ImageSet, Stamp, decode_image
from msn_eval.results.record import (
    CheckpointInfo,
    DataInfo,
    EnvironmentInfo,
    FeatureInfo,
    Predictions,
    ProbeInfo,
    Result,
    SplitInfo,
    TimingInfo,
    TransformInfo,
    protocol_id,
    result_id,
    write_result,
)
from msn_eval.results.statistics import compute_metrics

Weights = dict[str, Tensor]
WeightMaker = Callable[..., Weights]
MSNWriter = Callable[..., Path]
RunWriter = Callable[..., list[Result]]
ImageSetMaker = Callable[..., ImageSet]


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Keep torch to one thread: networks this small gain nothing from more and lose much beside other processes."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def vit_weights() -> WeightMaker:
    """Return a function that draws the weights of a Vision Transformer with timm's names, without timm."""

    def draw(
        *,
        width: int = 192,
        depth: int = 2,
        patch: int = 8,
        image: int = 32,
        registers: int = 0,
        class_token: bool = True,
        class_position: bool = True,
        layer_scale: bool = False,
        qk_norm: bool = False,
        fc_norm: bool = False,
        device: str = "cpu",
    ) -> Weights:
        prefix = int(class_token) + registers
        shapes: dict[str, tuple[int, ...]] = {
            "patch_embed.proj.weight": (width, 3, patch, patch),
            "patch_embed.proj.bias": (width,),
            "pos_embed": (1, (image // patch) ** 2 + (prefix if class_position else 0), width),
        }
        if class_token:
            shapes["cls_token"] = (1, 1, width)
        if registers:
            shapes["reg_token"] = (1, registers, width)
        for block in range(depth):
            here = f"blocks.{block}"
            for name, rows, columns in (
                ("attn.qkv", 3 * width, width),
                ("attn.proj", width, width),
                ("mlp.fc1", 4 * width, width),
                ("mlp.fc2", width, 4 * width),
            ):
                shapes[f"{here}.{name}.weight"] = (rows, columns)
                shapes[f"{here}.{name}.bias"] = (rows,)
            norms = {"norm1": width, "norm2": width}
            if qk_norm:
                norms |= {"attn.q_norm": 64, "attn.k_norm": 64}
            for name, size in norms.items():
                shapes[f"{here}.{name}.weight"] = shapes[f"{here}.{name}.bias"] = (size,)
            if layer_scale:
                shapes[f"{here}.ls1.gamma"] = shapes[f"{here}.ls2.gamma"] = (width,)
        final = "fc_norm" if fc_norm else "norm"
        shapes[f"{final}.weight"] = shapes[f"{final}.bias"] = (width,)
        generator = torch.Generator().manual_seed(7)
        return {name: _draw(name, shape, generator, device) for name, shape in shapes.items()}

    return draw


def _draw(name: str, shape: tuple[int, ...], generator: torch.Generator, device: str) -> Tensor:
    if device == "meta":
        return torch.empty(shape, device="meta")
    noise = torch.randn(shape, generator=generator)
    if len(shape) == 1 and name.endswith(("weight", "gamma")):  # scales, about one
        return 1 + 0.2 * noise
    fan_in = math.prod(shape[1:]) if name.endswith("weight") else 25
    return noise / math.sqrt(fan_in)


@pytest.fixture
def msn_file(tmp_path: Path, vit_weights: WeightMaker) -> MSNWriter:
    """Return a function that writes a file like the MSN release: target encoder with its head, and prototypes."""

    def write(weights: Weights | None = None, *, name: str = "vit.pth.tar", **others: object) -> Path:
        encoder = vit_weights() if weights is None else weights
        width = encoder["patch_embed.proj.weight"].shape[0]
        head = {"fc.fc1.weight": torch.ones(8, width), "fc.fc1.bias": torch.zeros(8)}
        content = {
            "target_encoder": {f"module.{key}": tensor for key, tensor in (encoder | head).items()},
            "prototypes": torch.ones(16, 8),
            "epoch": 600,
        }
        path = tmp_path / name
        torch.save(content | others, path)
        return path

    return write


@pytest.fixture(scope="session")
def picture_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return an image folder with five pictures in each of three classes, only in `val`."""
    root = tmp_path_factory.mktemp("pictures")
    generator = np.random.default_rng(3)
    for name in ("ant", "bee", "cat"):
        folder = root / "val" / name
        folder.mkdir(parents=True)
        for number in range(5):
            pixels = generator.integers(0, 256, (40, 36 + number, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{number}.png")
    return root


@dataclass(frozen=True)
class MemorySource:
    """Images in memory; None is an image that cannot be read."""

    contents: Mapping[str, bytes | None]
    root: None = None

    def read(self, image_id: str) -> bytes:
        content = self.contents[image_id]
        if content is None:
            raise PermissionError(13, "Permission denied")
        return content

    def decode(self, content: bytes) -> Image.Image:
        return decode_image(content)

    def place(self, image_id: str) -> str:
        return f"/data/{image_id}"

    def stamp(self, image_id: str) -> Stamp:
        return (0,)


@pytest.fixture
def memory_images() -> ImageSetMaker:
    """Return a function that makes an image set of the bytes of images by id; None for an image that cannot be read."""

    def make(contents: Mapping[str, bytes | None], *, passed_over: int = 0) -> ImageSet:
        ids = tuple(sorted(contents, key=os.fsencode))
        classes = tuple(dict.fromkeys(image_id.partition("/")[0] for image_id in ids))
        labels = tuple(classes.index(image_id.partition("/")[0]) for image_id in ids)
        return ImageSet(ids=ids, labels=labels, classes=classes, source=MemorySource(contents), passed_over=passed_over)

    return make


@pytest.fixture
def random_pixels() -> Tensor:
    """Return four images of 32 x 32 pixels, as decoders return them."""
    return torch.randint(0, 256, (4, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(5))


@pytest.fixture(scope="session")
def write_run() -> RunWriter:
    """Return a function that writes the records of one checkpoint under one protocol, with chosen predictions."""

    def write(
        folder: Path,
        right: NDArray[np.bool_],
        *,
        name: str = "net",
        k: int = 1,
        limit: int | None = None,
        precision: str = "exact",
        weights: str = "a" * 64,
        changed: Callable[[Result], Result] = lambda result: result,
        wrong_class: int = 1,
    ) -> list[Result]:
        """right: (draws, n). Labels are 0 and 1 in halves, of classes `ant` and `bee`; wrong predictions name another."""
        n = right.shape[1]
        label = np.repeat([0, 1], [n - n // 2, n // 2])
        image = np.array([f"{('ant', 'bee')[index]}/{row:05d}.png".encode() for row, index in enumerate(label)])
        protocol = {
            "version": 1,
            "data": {"sha256": "d" * 64, "class_map_sha256": "c" * 64},
            "subset": {"name": "5imgs", "rule": "nested"},
            "probe": {"name": "knn", "version": 1, "params": {"k": k, "temperature": 0.07}},
            "precision": precision,
            "limit": limit,
            "skipped": None,
            "by_hand": {},
        }
        folder.mkdir(exist_ok=True)
        results = []
        for draw, row in enumerate(right, start=1):
            rank = np.where(row, 1, 2)
            prediction = np.where(row, label, (label + wrong_class) % 3)
            predictions = Predictions(image=image, label=label, prediction=prediction, rank_of_label=rank)
            results.append(write_result(folder, changed(_record(name, weights, protocol, draw, rank)), predictions))
        return results

    return write


def _record(name: str, weights: str, protocol: dict[str, object], draw: int, rank: NDArray[np.int64]) -> Result:
    key = protocol_id(protocol)
    identity = result_id(weights_sha256=weights, key=None, protocol_id=key, draw=draw)
    params = protocol["probe"]["params"]  # type: ignore[index]
    return Result(
        id=identity,
        status="ok",
        error=None,
        created="2026-01-31T12:00:00Z",
        protocol_id=key,
        protocol=protocol,
        checkpoint=CheckpointInfo(
            name=name, path=name, sha256=None, weights_sha256=weights, format="timm", key=None, arch="vit", params=9,
            matched=1.0, epoch=None,
        ),
        data=DataInfo(
            name="insects", sha256="d" * 64, class_map_sha256="c" * 64, classes=3, val_images=len(rank), skipped=0
        ),
        split=SplitInfo(subset="5imgs", draw=draw, images=15, sha256=f"{draw}" * 64, overlap=0),
        features=FeatureInfo(
            tap="cls", dim=4, precision="fp32", decoder="pillow 13.0",
            transform=TransformInfo(resize=256, crop=224, interpolation="bilinear", mean=(0.5,), std=(0.5,)),
        ),
        probe=ProbeInfo(
            name="knn", version=1, params=params, solver=None, converged=None, certificate=None, objective=None,
            iterations=None,
        ),
        metrics=compute_metrics(rank),
        timing_s=TimingInfo(extract=0.0, probe=0.0, total=0.0),
        environment=EnvironmentInfo(
            package="0.1", git=None, python="3.11", torch="2.14", device="cpu", batch_size=1, seed=0
        ),
        predictions=f"{identity}.npz",
    )  # fmt: skip
