"""SIGKILL at random instants of a pre-training: it becomes what it would have become, bit by bit."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="runs are forked")
_HARNESS = Path(__file__).parent / "kill_training.py"


def _trials(*options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(_HARNESS), *options]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, timeout=280, check=False, env=environment)


def test_a_run_that_is_killed_becomes_what_it_would_have_become() -> None:
    done = _trials("--kills", "3", "--seed", "4")

    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, "3 of 3 trials sound"), done.stdout + done.stderr


def test_writing_without_care_is_caught() -> None:
    done = _trials("--kills", "4", "--seed", "2", "--break", "writes", "--ranks", "1", "--workers", "0")

    assert done.returncode == 1, done.stdout + done.stderr
    assert "the second run ended with" in done.stdout
