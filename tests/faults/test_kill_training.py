"""Signals at random moments of a pre-training: the resumed run is bit-identical to an uninterrupted one."""

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/fd").is_dir(), reason="runs are forked, and watched by Linux's /proc"
)
RunScript = Callable[..., tuple[int, str]]
_HARNESS = Path(__file__).parent / "kill_training.py"


@pytest.mark.parametrize(
    ("trials", "options"),
    [
        (4, ("--signals", "KILL", "TERM")),
        (1, ("--signals", "STOP", "--ranks", "2", "--workers", "0", "--silent-seconds", "2")),  # in a save
    ],
)
def test_a_run_is_bit_identical_after_a_signal(trials: int, options: Sequence[str], run_script: RunScript) -> None:
    code, output = run_script(_HARNESS, "--kills", str(trials), "--seed", "4", "--epochs", "2", *options)

    assert (code, output.splitlines()[-1]) == (0, f"{trials} of {trials} trials passed"), output


def test_writing_in_place_is_detected(run_script: RunScript) -> None:
    code, output = run_script(
        _HARNESS, "--kills", "1", "--break", "writes", "--ranks", "1", "--workers", "0", "--epochs", "1"
    )

    assert code == 1, output
    assert "the second run ended with" in output
