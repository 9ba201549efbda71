"""SIGKILL at random moments of a pre-training: the resumed run is bit-identical to an uninterrupted one."""

from collections.abc import Callable
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/fd").is_dir(), reason="runs are forked, and watched by Linux's /proc"
)
RunScript = Callable[..., tuple[int, str]]
_HARNESS = Path(__file__).parent / "kill_training.py"


def test_a_killed_run_is_bit_identical_after_resuming(run_script: RunScript) -> None:
    code, output = run_script(_HARNESS, "--kills", "4", "--seed", "4", "--epochs", "2")

    assert (code, output.splitlines()[-1]) == (0, "4 of 4 trials passed"), output


def test_writing_in_place_is_detected(run_script: RunScript) -> None:
    code, output = run_script(
        _HARNESS, "--kills", "1", "--break", "writes", "--ranks", "1", "--workers", "0", "--epochs", "1"
    )

    assert code == 1, output
    assert "the second run ended with" in output
