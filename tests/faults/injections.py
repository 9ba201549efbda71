"""Injections of faults: each function puts one fault into a folder in which a command is run afterwards.

A folder holds a copy of what `fill_scene` makes: `data` (images of two classes), `vit.safetensors` (the checkpoint `demo`),
`runs` (results of `pixels` on `data`), `baseline.json` (of `runs`) and `cache` (of that evaluation).
"""

import io
import json
import os
import pickle
import shutil
import struct
import tarfile
import zipfile
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from PIL import Image

import msn_eval
from msn_eval.cli import main as run_command
from msn_eval.files.json_records import add_seal

_PIXELS = ["--checkpoint", "pixels", "--data", "data", "--subset", "2imgs@1", "--probe", "ncm"]
_TINY_RECIPE = """
run: {dir: run, device: cpu, log_every: 1}
data: {root: digits, workers: 0, limit: 4}
views: {image_pixels: 16, focal_pixels: 8, focal_views: 2, focal_crop_scale: [0.2, 0.6]}
encoder: {name: "vit_tiny_patch16_224?img_size=16&patch_size=4&embed_dim=32&depth=2&num_heads=2"}
head: {hidden: 32, output: 16}
criterion: {prototypes: 16}
optimization: {epochs: 1, batch_size: 8, warmup: 1}
"""


def fill_scene(root: Path) -> None:
    """Write the files that every injection starts from into an empty folder."""
    generator = np.random.default_rng(0)
    for split, count in (("train", 6), ("val", 6)):
        for label, name in enumerate(("dark", "light")):
            folder = root / "data" / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = generator.integers(100 * label, 100 * label + 120, (32, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{number}.png")
    shutil.copy(Path(msn_eval.__file__).parent / "demo.safetensors", root / "vit.safetensors")
    (root / "tiny.yaml").write_text(_TINY_RECIPE)
    here = Path.cwd()
    os.chdir(root)
    try:
        assert run_command([*_PIXELS, "--device", "cpu", "--cache", "cache", "-q"]) == 0
        assert run_command(["baseline", "runs", "--out", "baseline.json", "-q"]) == 0
    finally:
        os.chdir(here)


def no_fault(work: Path) -> None:
    """Leave the files as they are: the command itself is the fault."""


# ---- checkpoints


def _weights(work: Path) -> dict[str, Any]:
    return dict(safetensors.torch.load_file(work / "vit.safetensors"))


def add_unknown_names(work: Path) -> None:
    torch.save({f"stage.{name}.inner": tensor for name, tensor in _weights(work).items()}, work / "bad.pth")


def add_second_network(work: Path) -> None:
    weights = _weights(work)
    torch.save(
        {"model": weights, "model_ema": {name: 2 * tensor for name, tensor in weights.items()}}, work / "bad.pth"
    )


def add_remote_code(work: Path) -> None:
    folder = work / "hub"
    folder.mkdir()
    shutil.copy(work / "vit.safetensors", folder / "model.safetensors")
    config = {"model_type": "vit", "auto_map": {"AutoModel": "modeling.Model"}}
    (folder / "config.json").write_text(json.dumps(config))


def set_weight_to_nan(work: Path) -> None:
    with safetensors.safe_open(work / "vit.safetensors", "pt") as file:
        metadata = file.metadata()
    weights = _weights(work)
    weights["norm.weight"][3] = float("nan")
    safetensors.torch.save_file(weights, work / "bad.safetensors", metadata)


class _Call:
    """Pickled as a call of `function`."""

    def __init__(self, function: Any, argument: str) -> None:
        self.function, self.argument = function, argument

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return self.function, (self.argument,)


def add_call_of_system(work: Path) -> None:
    torch.save({**_weights(work), "hook": _Call(os.system, f"touch {work}/canary")}, work / "bad.pth")


def add_call_of_exec(work: Path) -> None:
    (work / "bad.pth").write_bytes(pickle.dumps(_Call(exec, f"open({str(work / 'canary')!r}, 'w')"), protocol=2))


def add_foreign_class(work: Path) -> None:
    torch.save({**_weights(work), "scene": Image.new("RGB", (1, 1))}, work / "bad.pth")


def flip_weight_bit(work: Path) -> None:
    torch.save(_weights(work), work / "bad.pth")
    content = bytearray((work / "bad.pth").read_bytes())
    content[len(content) // 2] ^= 4
    (work / "bad.pth").write_bytes(content)


def name_checkpoint_like_markup(work: Path) -> None:
    (work / "vit.safetensors").rename(work / "a\nb|<x>.safetensors")


def write_html_page(work: Path) -> None:
    (work / "bad.pth").write_text("<!DOCTYPE html><title>404</title>")


def write_lfs_pointer(work: Path) -> None:
    (work / "bad.pth").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 343000000\n")


def write_empty_file(work: Path) -> None:
    (work / "bad.pth").touch()


def cut_checkpoint(work: Path) -> None:
    torch.save(_weights(work), work / "bad.pth")
    os.truncate(work / "bad.pth", (work / "bad.pth").stat().st_size // 2)


def write_arrays(work: Path) -> None:
    np.savez(work / "bad.npz", weight=np.ones(2))


def write_tar(work: Path) -> None:
    with tarfile.open(work / "bad.pth.tar", "w") as archive:
        archive.add(work / "vit.safetensors", "vit.safetensors")


def write_protocol_4(work: Path) -> None:
    content = {name: tensor.numpy() for name, tensor in _weights(work).items()}
    (work / "bad.pkl").write_bytes(pickle.dumps(content, protocol=4))


def compress_checkpoint(work: Path) -> None:
    plain = io.BytesIO()
    torch.save(_weights(work), plain)
    with zipfile.ZipFile(plain) as source, zipfile.ZipFile(work / "bad.pth", "w", zipfile.ZIP_DEFLATED) as target:
        for name in source.namelist():
            target.writestr(name, source.read(name))


def repeat_one_value(work: Path) -> None:
    torch.save({**_weights(work), "large": torch.zeros(1).expand(2**36, 4)}, work / "bad.pth")


def add_defaultdict(work: Path) -> None:
    torch.save({**_weights(work), "counts": defaultdict(int, a=1)}, work / "bad.pth")


def nest_values(work: Path) -> None:
    value: object = ()
    for _ in range(100):
        value = {"a": value, "b": value}
    torch.save({**_weights(work), "graph": value}, work / "bad.pth")


def repeat_key(work: Path) -> None:
    one = '"dtype":"F32","shape":[2],"data_offsets":'
    header = f'{{"a":{{{one}[0,8]}},"a":{{{one}[8,16]}}}}'.encode()
    (work / "bad.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(16))


# ---- images and data sets


def _image(work: Path) -> Path:
    return work / "data" / "val" / "dark" / "2.png"


def cut_images(work: Path) -> None:
    for path in (_image(work), work / "data" / "train" / "light" / "1.png"):
        os.truncate(path, path.stat().st_size // 2)


def write_16_bit_image(work: Path) -> None:
    Image.fromarray(np.full((32, 32), 4000, dtype=np.uint16)).save(_image(work))


def write_huge_image(work: Path) -> None:
    Image.new("1", (20_000, 20_000)).save(_image(work))


def write_postscript(work: Path) -> None:
    _image(work).write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n")


def replace_pixels(work: Path) -> None:
    assert run_command(["data", "verify", str(work / "data"), "--write-manifest", str(work / "manifest")]) == 0
    Image.new("RGB", (32, 32)).save(_image(work))


def rename_class(work: Path) -> None:
    (work / "data" / "val" / "light").rename(work / "data" / "val" / "lights")


def remove_image(work: Path) -> None:
    assert run_command(["data", "verify", str(work / "data"), "--write-manifest", str(work / "manifest")]) == 0
    _image(work).unlink()


def write_list_of_missing_image(work: Path) -> None:
    (work / "list.txt").write_text("dark/0.png\nlight/0.png\ndark/77.png\n")


def write_list_of_one_class(work: Path) -> None:
    (work / "list.txt").write_text("dark/0.png\ndark/1.png\n")


def copy_image_to_train(work: Path) -> None:
    shutil.copy(_image(work), work / "data" / "train" / "dark" / "0.png")


def empty_class(work: Path) -> None:
    for path in (work / "data" / "val" / "light").iterdir():
        path.unlink()
    (work / "data" / "val" / "light" / ".DS_Store").touch()


def add_class_of_other_case(work: Path) -> None:
    for split in ("train", "val"):
        shutil.copytree(work / "data" / split / "dark", work / "data" / split / "Dark")


def cut_image_of_undecodable_name(work: Path) -> None:
    cut_images(work)
    _image(work).rename(os.fsdecode(os.fsencode(_image(work).parent) + b"/\xff\x1b.png"))


def add_hidden_files(work: Path) -> None:
    folder = work / "data" / "val" / "dark"
    for name in (".DS_Store", "._0.png", "Thumbs.db"):
        (folder / name).write_bytes(b"no image")
    (folder / "0.png").rename(folder / "0.PNG")


def link_image_to_itself(work: Path) -> None:
    _image(work).unlink()
    _image(work).symlink_to(_image(work).name)


def replace_image_by_pipe(work: Path) -> None:
    _image(work).unlink()
    os.mkfifo(_image(work))


# ---- options and YAML


def make_pipe(work: Path) -> None:
    os.mkfifo(work / "pipe")


def write_typo_in_yaml(work: Path) -> None:
    (work / "bad.yaml").write_text("probe: [knn]\nlimt: 3\n")


def write_wrong_type_in_yaml(work: Path) -> None:
    (work / "bad.yaml").write_text("probe: [knn]\nk: [twenty]\n")


def write_yaml_tag(work: Path) -> None:
    (work / "bad.yaml").write_text(f"probe: !!python/object/apply:os.system ['touch {work}/canary']\n")


def write_yaml_bomb(work: Path) -> None:
    lines = ["a: &a [x, x, x, x, x, x, x, x, x]"]
    lines += [
        f"{name}: &{name} [{', '.join(9 * ['*' + before])}]"
        for before, name in zip("abcdefgh", "bcdefghi", strict=True)
    ]
    (work / "bad.yaml").write_text("\n".join(lines))


def write_reference_to_environment(work: Path) -> None:
    (work / "bad.yaml").write_text("checkpoint: ['${oc.env:HOME}']\n")


def break_listing(work: Path) -> None:
    lines = [
        "import msn_eval.commands.ls as listing",
        "def fail(*arguments): raise ValueError('broken')",
        "listing.run = fail",
    ]
    (work / "sitecustomize.py").write_text("\n".join(lines))


def write_file_as_out(work: Path) -> None:
    (work / "taken").write_text("not a folder")


# ---- results, baselines and caches


def _edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def _record(work: Path) -> Path:
    (path,) = (work / "runs").glob("*.json")
    return path


def edit_record(work: Path) -> None:
    path = _record(work)
    record = json.loads(path.read_text())
    record["metrics"]["top1"] = 0.25
    path.write_text(json.dumps(record))


def write_nan_into_record(work: Path) -> None:
    top1 = json.loads(_record(work).read_text())["metrics"]["top1"]
    _edit(_record(work), f'"top1": {top1}', '"top1": NaN')


def write_future_schema(work: Path) -> None:
    record = json.loads(_record(work).read_text())
    del record["seal"]
    _record(work).write_text(json.dumps(add_seal(record | {"schema": 99})))


def edit_baseline(work: Path) -> None:
    _edit(work / "baseline.json", '"top1": 1.0', '"top1": 0.9')


def measure_other_protocol(work: Path) -> None:
    _measure_again(work, "--subset", "1img@1")


def measure_fewer_images(work: Path) -> None:
    _measure_again(work, "--limit", "3")


def _measure_again(work: Path, *more: str) -> None:
    command = [*_PIXELS, *more, "--device", "cpu", "--no-cache", "--out", str(work / "other"), "-q"]
    command[command.index("data")] = str(work / "data")
    assert run_command(command) == 0


def flip_feature_bit(work: Path) -> None:
    path = max((work / "cache" / "features").rglob("*"), key=lambda file: file.stat().st_size * file.is_file())
    content = bytearray(path.read_bytes())
    content[-5] ^= 4
    path.write_bytes(content)


def pickle_predictions(work: Path) -> None:
    (path,) = (work / "runs").glob("*.npz")
    np.savez(path, image=np.array([_Call(os.system, f"touch {work}/canary")], dtype=object))


def write_earlier_report(work: Path) -> None:
    (work / "junit.xml").write_text('<testsuites tests="1" failures="0"/>')


# ---- code of users


def write_exiting_module(work: Path) -> None:
    (work / "mine.py").write_text("def make():\n    raise SystemExit(0)\n")


_MODULE = """
import torch

class Net(torch.nn.Module):
    image_pixels = 32

    def forward(self, images):
        {body}

def make():
    return Net()
"""


def write_printing_module(work: Path) -> None:
    (work / "mine.py").write_text(_MODULE.format(body="print('hello'); return images.flatten(1)"))


def write_module_of_nan(work: Path) -> None:
    (work / "mine.py").write_text(_MODULE.format(body="return images.flatten(1) * float('nan')"))


# ---- runs of pre-training


def set_batch_size_to_0(work: Path) -> None:
    (work / "tiny.yaml").write_text(_TINY_RECIPE.replace("batch_size: 8", "batch_size: 0"))


def change_recipe_of_run(work: Path) -> None:
    from msn_pretrain.cli import main as pretrain

    assert pretrain([str(work / "tiny.yaml"), f"run.dir={work / 'run'}", "-q"]) == 0
    _edit(work / "tiny.yaml", "log_every: 1}", "log_every: 1, seed: 9}")
