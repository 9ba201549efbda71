"""Checkpoints: from a name to a network with its weights."""

import os
import re
from pathlib import Path

from msn_eval.errors import CheckpointError, did_you_mean, suggest_paths
from msn_eval.registry import Entry, read_registry

_TABLE = (
    (
        "file",
        "read_stored",
        "PATH alone: .pth, .pth.tar, .pt, .ckpt, .bin, .safetensors of MSN, DINO, iBOT, DINOv2, MAE, MoCo, I-JEPA, "
        "BEiT, SimSiam, SwAV, Barlow Twins, VICReg, lightly, solo-learn, Lightning, timm, torchvision, Hugging Face; a "
        "folder in Hugging Face layout (config.json with model.safetensors or pytorch_model.bin); or a folder that "
        "msn-pretrain trains in: its newest complete snapshot",
    ),
    ("msn", "read_stored", "msn:NAME, the released MSN weights, downloaded once: vits16, vitb16, vitl16, vitb4, vitl7"),
    ("hf", "read_stored", "hf:REPO[@REVISION], from the Hugging Face hub or its local cache; hf:FOLDER is FOLDER"),
    ("timm", "read_timm", "timm:NAME, timm's pretrained weights, from its cache or its hub"),
    (
        "random",
        "read_untrained",
        "random:ARCH, untrained, e.g. random:vit_tiny_patch16_224 or "
        "'random:vit_tiny_patch16_224?img_size=32&patch_size=4'; random:FILE, with the architecture of that checkpoint",
    ),
    ("py", "read_factory", "py:package.module:factory, your own nn.Module; runs your code"),
    ("pixels", "read_pixels", "no network: 32 x 32 pixels as they are"),
    ("demo", "read_stored", "ships with the package: MSN pre-trained on the digits, 16 pixels"),
)
ENCODERS = tuple(
    Entry(name=name, summary=summary, target=f"msn_eval.checkpoints.checkpoint:{function}")
    for name, function, summary in _TABLE
)
"""Schemes of checkpoint names.

A built-in target gets the name and the options of `checkpoint.read_checkpoint`, and returns a `Checkpoint`. The target of
a plug-in (entry point `msn_eval.encoders`) gets the text after `NAME:` and returns an `nn.Module` as a `py:` factory does:
it maps normalised images (n, 3, S, S) to features (n, d), and may have the attributes `image_pixels`, `mean` and `std`.
"""


TESTED_LAYOUTS = Path(__file__).with_name("tested_layouts.tsv")


def read_schemes() -> dict[str, Entry]:
    """Return the built-in schemes and those of plug-ins, by name."""
    return read_registry("encoders", ENCODERS)


def read_tested_layouts() -> dict[str, str]:
    """Return what the test suite compares with the library that wrote it: kind of file and taps, by the layout's name."""
    lines = TESTED_LAYOUTS.read_text(encoding="utf-8").splitlines()
    return dict(line.split("\t", 1) for line in lines)


def split_label(text: str) -> tuple[str | None, str]:
    """Split `LABEL=CHECKPOINT`, as the user may write it. The label is None where there is none."""
    match = re.fullmatch(r"([^=:/\\?]+)=(.+)", text)
    if match is None or os.path.exists(text):  # noqa: PTH110 - Path.exists raises on names too long for the disk
        return None, text
    return match[1], match[2]


def find_scheme(name: str) -> tuple[Entry, str]:
    """Return the scheme of a checkpoint's name, and the rest of the name, without a label.

    Raises:
        CheckpointError: The name has no known scheme, and there is no such file.
    """
    schemes = read_schemes()
    _, name = split_label(name)
    scheme, colon, rest = name.partition(":")
    if name in ("pixels", "demo") or (colon and scheme in schemes.keys() - {"pixels", "demo", "file"}):
        return schemes[scheme], rest
    if os.path.exists(name):  # noqa: PTH110 - Path.exists raises on names too long for the disk
        return schemes["file"], name
    suggestion = suggest_paths(name) or did_you_mean(name, ("pixels", "demo"))
    what = f"No such checkpoint file: {name}{'.' if suggestion else ''}{suggestion}"
    if colon:
        what = f"No checkpoint scheme is called {scheme!r}.{did_you_mean(scheme, schemes)}"
    hint = f'Check the path; "msn-eval ls checkpoints" lists the schemes: {", ".join(schemes)}.'
    raise CheckpointError(what, where=name if colon else "", hint=hint)
