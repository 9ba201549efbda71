"""Export of a run's encoder in the layouts of other projects."""

import os
from pathlib import Path

from safetensors.torch import load_file

from msn_eval.checkpoints.convert import convert_checkpoint
from msn_eval.checkpoints.formats.safetensors import read_metadata
from msn_eval.checkpoints.run_folder import SnapshotFiles, is_run_folder, newest_snapshot
from msn_eval.checkpoints.stored import ARCHITECTURE, IMAGE_PIXELS
from msn_eval.errors import CheckpointError, UsageError, format_count
from msn_eval.models.architectures import name_architecture
from msn_eval.models.build import outline_network
from msn_pretrain.training.snapshot import EvaluatedEncoder, read_snapshot, write_encoder, write_torch_file


def export(run: Path, out: Path, *, to: str) -> str:
    """Write the evaluated encoder of a run's newest complete snapshot.

    Args:
        run: Folder of the run.
        out: File or folder to write; must not exist.
        to: `timm`, one safetensors file with timm's names that states its architecture; `hf`, a folder for transformers; `msn`, a
            torch file like the MSN release, with target_encoder and prototypes behind `module.`; `torchvision`, a torch file with
            torchvision's names, for residual networks.

    Returns:
        One line that describes what was written.

    Raises:
        UsageError: `run` is not a run, or `out` exists.
        CheckpointError: There is no complete snapshot, or the network does not have this layout.
        StoreError: The disk refuses.
    """
    if not is_run_folder(run):
        raise UsageError("is not the folder of a pre-training run", where=str(run), hint="Pass its run.dir.")
    if os.path.lexists(out):
        raise UsageError("already exists", where=str(out), hint="Use another path, or remove it first.")
    if not out.parent.is_dir():
        raise UsageError("the folder does not exist", where=str(out.parent), hint="Create it first.")
    files, skipped = newest_snapshot(run)
    if files is None:
        hint = f"Continue training. {'; '.join(skipped)}".strip()
        raise CheckpointError("holds no complete snapshot", where=str(run), hint=hint)
    stated = read_metadata(files.encoder)
    architecture = stated.get(ARCHITECTURE, str(files.facts["architecture"]))
    match to:
        case "timm":
            pixels = int(stated[IMAGE_PIXELS]) if IMAGE_PIXELS in stated else None
            encoder = EvaluatedEncoder(weights=load_file(files.encoder), architecture=architecture, image_pixels=pixels)
            write_encoder(out, encoder, epoch=files.epoch)
        case "hf":
            convert_checkpoint(files.encoder, out, to="hf")
        case "msn":
            _write_release(files, out)
        case _:
            _write_torchvision(files, out, architecture)
    return f"{out}: {architecture}, {format_count(files.epoch, 'epoch')}, for {to}"


def _write_release(files: SnapshotFiles, out: Path) -> None:
    """Write a file that the authors' scripts can read."""
    model = read_snapshot(files).model
    if "prototypes" not in model:
        hint = "Use --to timm or --to torchvision."
        raise CheckpointError("was not trained by MSN", where=str(files.folder), hint=hint)
    target = {f"module.{name}": value for name, value in load_file(files.encoder).items()}
    # The release calls the head `fc`; its layers have the same names.
    start = "target.head."
    head = {name.removeprefix(start): value for name, value in model.items() if name.startswith(start)}
    target |= {f"module.fc.{name}": value for name, value in head.items()}
    write_torch_file(out, {"target_encoder": target, "prototypes": model["prototypes"], "epoch": files.epoch})


def _write_torchvision(files: SnapshotFiles, out: Path, architecture: str) -> None:
    from timm.models.resnet import ResNet

    if not isinstance(outline_network(name_architecture(architecture)), ResNet):
        what = f"{architecture} is not a residual network; torchvision has its own names for others"
        raise CheckpointError(what, where=str(files.folder), hint="Use --to timm, --to hf or --to msn.")
    write_torch_file(out, load_file(files.encoder))  # timm's names of a residual network are torchvision's
