"""Training states in shards: they are recognised, and never read."""

import re
from collections.abc import Mapping
from pathlib import Path

from msn_eval.errors import CheckpointError

_ZERO_FILE = re.compile(r"(bf16_|fp16_)?zero_pp_rank_\d+_mp_rank_\d+_\w+\.pt")
_DCP_TO_TORCH = "python -m torch.distributed.checkpoint.format_utils dcp_to_torch {} weights.pth"
_FLAT = re.compile(r"(^|\.)_?flat_param(_\d+)?$")


def check_not_sharded(path: Path) -> None:
    """Raise CheckpointError for a folder or file of torch's distributed checkpoints or of DeepSpeed's ZeRO."""
    folder = path if path.is_dir() else path.parent
    names = [file.name for file in path.glob("*")] if path.is_dir() else [path.name]
    if any(name.endswith(".distcp") or name == ".metadata" for name in names):
        what = "a distributed checkpoint (DCP) of torch, in shards. It is not read: torch unpickles its .metadata "
        what += "without restriction, which can run code"
        hint = f"If you trust it, convert it: {_DCP_TO_TORCH.format(folder)}"
        raise CheckpointError(what, where=str(path), hint=hint)
    steps = [step for step in path.glob("*/") if re.fullmatch(r"global_step\d+", step.name)]
    inside = [*names, *(file.name for step in steps for file in step.glob("*"))]
    if "zero_to_fp32.py" in names or any(map(_ZERO_FILE.fullmatch, inside)):
        root = folder if steps or "zero_to_fp32.py" in names else folder.parent
        raise _of_deepspeed(path, root)


def check_not_flat(content: Mapping[str, object], path: Path) -> None:
    """Raise CheckpointError for a file's content with flat parameters of FSDP, or with a share of DeepSpeed's weights."""
    pending: list[Mapping[str, object]] = [content]
    for mapping in pending:
        if flat := next((name for name in mapping if _FLAT.search(name)), None):
            what = f"holds flat parameters of FSDP ({flat}): one rank's share, without names and shapes of the weights"
            hint = "Save the full state dict where it is trained (StateDictOptions(full_state_dict=True)); a folder of .distcp "
            hint += f"files is converted by: {_DCP_TO_TORCH.format('FOLDER')}"
            raise CheckpointError(what, where=str(path), hint=hint)
        pending += [value for value in mapping.values() if isinstance(value, dict)]
    stated = content.get("ds_config")
    zero = stated.get("zero_optimization") if isinstance(stated, dict) else None
    if "ds_version" in content and isinstance(zero, dict) and zero.get("stage"):
        raise _of_deepspeed(path, path.parent.parent)


def _of_deepspeed(path: Path, root: Path) -> CheckpointError:
    what = "a training state of DeepSpeed (ZeRO), in shards of all ranks; it is not read"
    hint = f"If you trust it, convert it with the script beside it: cd {root} && python zero_to_fp32.py . weights"
    return CheckpointError(what, where=str(path), hint=hint)
