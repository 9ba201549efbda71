"""Environment: the versions and the commit that a number was computed with."""

import platform
import subprocess
from functools import cache
from pathlib import Path

import torch

from msn_eval.results.record import EnvironmentFacts
from msn_eval.version import __version__


def describe_environment(device: torch.device, *, batch_size: int, seed: int) -> EnvironmentFacts:
    """Give what a record states of its surroundings."""
    name = f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else str(device)
    return EnvironmentFacts(
        package=__version__,
        git=_commit(),
        python=platform.python_version(),
        torch=torch.__version__,
        device=name,
        batch_size=batch_size,
        seed=seed,
    )


@cache
def _commit() -> str | None:
    """Give the commit of the checkout that the package runs from, `+` behind it where files differ; else None."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return None
    try:
        commit = subprocess.run(
            ["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10, check=True
        ).stdout.strip()
        changed = subprocess.run(
            ["git", "-C", str(root), "status", "--porcelain", "--untracked-files=no"],
            capture_output=True, text=True, timeout=30, check=True,
        ).stdout  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return commit + ("+" if changed else "")
