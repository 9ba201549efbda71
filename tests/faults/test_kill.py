"""SIGKILL at random instants of an evaluation: nothing torn, nothing lost, the same records."""

import os
import subprocess
import sys
import tarfile
from collections import Counter
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="runs are forked")
_HARNESS = Path(__file__).parent / "kill_evaluation.py"
_IMAGES_A_CLASS = {"train": 3, "val": 8}


@pytest.fixture(scope="module")
def pictures(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give the first few images of each class of Tiny ImageNet as a folder."""
    root = tmp_path_factory.mktemp("tiny")
    taken: Counter[str] = Counter()
    with tarfile.open(shared_data / "tinyimagenet100.tar.gz") as archive:
        for member in archive:
            split, _, _ = member.name.partition("/")
            folder = member.name.rpartition("/")[0]
            if taken[folder] < _IMAGES_A_CLASS.get(split, 0):
                taken[folder] += 1
                archive.extract(member, root, filter="data")
    return root


def trials(pictures: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(_HARNESS), "--data", str(pictures), *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)


def test_a_run_that_is_killed_loses_nothing(pictures: Path) -> None:
    done = trials(pictures, "--kills", "10")
    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, "10 of 10 trials sound"), done.stdout + done.stderr


def test_writing_without_care_is_caught(pictures: Path) -> None:
    done = trials(pictures, "--kills", "4", "--seed", "1", "--torn-writes")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "torn" in done.stdout
