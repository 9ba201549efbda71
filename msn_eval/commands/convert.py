"""`msn-eval convert IN OUT --to safetensors|timm|hf`: write the same weights in another format, and read them back."""

import argparse
from collections.abc import Sequence
from pathlib import Path


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    parser.add_argument("checkpoint", metavar="IN", help="as `msn-eval inspect` takes it")
    parser.add_argument("out", metavar="OUT", type=Path, help="the file (hf: the folder) to write; must not exist")
    parser.add_argument(
        "--to",
        choices=("safetensors", "timm", "hf"),
        required=True,
        help="safetensors: every tensor of the file under its name",
    )
    parser.add_argument("--arch", metavar="NAME", help="the timm architecture, where the file leaves it open")
    parser.add_argument("--checkpoint-key", metavar="K", help="which of several networks")
    for name in ("mean", "std"):
        text = f"{name} of the images' channels to state, on the [0, 1] scale; default: the checkpoint's own"
        parser.add_argument(f"--{name}", metavar="R,G,B", help=text)


def run(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    """Convert, and print what was written."""
    from msn_eval.checkpoints.checkpoint import locate_weights
    from msn_eval.checkpoints.convert import convert_checkpoint
    from msn_eval.config.request import parse_channels
    from msn_eval.errors import printable

    path, _ = locate_weights(options.checkpoint)
    arch, written = convert_checkpoint(
        path,
        options.out,
        to=options.to,
        arch=options.arch,
        key=options.checkpoint_key,
        mean=parse_channels("--mean", options.mean),
        std=parse_channels("--std", options.std),
    )
    out, architecture = printable(str(options.out)), f"{arch}, " if arch else ""
    print(f"{out}\t{architecture}{written.file_bytes:,} bytes, sha256 {written.sha256}, read back equal")
    return 0
