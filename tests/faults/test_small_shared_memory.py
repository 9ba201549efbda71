"""Shared memory that is too small for loader processes, as in a container: images are decoded without them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

_RECIPE = """
run: {device: cpu, log_every: 1}
data: {root: digits, workers: 2, limit: 20}
views: {image_pixels: 64, focal_pixels: 32, focal_views: 2}
encoder: {name: 'vit_tiny_patch16_224?img_size=64&patch_size=16&embed_dim=16&depth=1&num_heads=2'}
head: {hidden: 16, output: 8}
criterion: {prototypes: 8}
optimization: {epochs: 1, batch_size: 100, warmup: 1}
"""


def _run_with_shared_memory(options: str, arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run `python -m ARGUMENTS` with a /dev/shm of its own."""
    if os.geteuid():
        pytest.skip("mounting a file system needs root")
    program = f"mount -t tmpfs -o {options} tmpfs /dev/shm || exit 99; exec {sys.executable} -W ignore -m {arguments}"
    command = ["unshare", "--mount", "sh", "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False, cwd=folder)
    if done.returncode == 99 or "unshare failed" in done.stderr:
        pytest.skip(f"this system does not allow it: {done.stderr}")
    return done


@pytest.mark.parametrize("options", ["size=1m", "ro"])
def test_pre_training_starts_no_more_workers_than_shared_memory_has_room_for(options: str, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(_RECIPE)

    done = _run_with_shared_memory(options, "msn_pretrain recipe.yaml run.dir=run", tmp_path)

    assert done.returncode == 0, done.stderr
    assert "/dev/shm has room for 0 loader processes instead of 2" in done.stderr


def test_evaluation_without_shared_memory_names_it(tmp_path: Path) -> None:
    arguments = (
        "msn_eval --checkpoint pixels --data digits --subset 1img --probe ncm --device cpu --no-cache --workers 2"
    )

    done = _run_with_shared_memory("size=4k", arguments, tmp_path)

    assert done.returncode == 30, done.stderr
    assert (
        "ResourceError: /dev/shm: threads have no shared memory for their locks: No space left on device" in done.stderr
    )
