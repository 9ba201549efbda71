"""SIGKILL at random instants of a pre-training: it becomes what it would have become, bit by bit."""

from collections.abc import Callable
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/fd").is_dir(), reason="runs are forked, and watched by Linux's /proc"
)
RunScript = Callable[..., tuple[int, str]]
_HARNESS = Path(__file__).parent / "kill_training.py"


def test_a_run_that_is_killed_becomes_what_it_would_have_become(run_script: RunScript) -> None:
    code, told = run_script(_HARNESS, "--kills", "4", "--seed", "4", "--epochs", "2")

    assert (code, told.splitlines()[-1]) == (0, "4 of 4 trials sound"), told


def test_writing_without_care_is_caught(run_script: RunScript) -> None:
    code, told = run_script(
        _HARNESS, "--kills", "1", "--break", "writes", "--ranks", "1", "--workers", "0", "--epochs", "1"
    )

    assert code == 1, told
    assert "the second run ended with" in told
