import subprocess
import sys
import time

import pytest

from msn_pretrain.training.watchdog import Watchdog

_HANG = """
import time
from msn_pretrain.training.watchdog import Watchdog, watch_steps
with watch_steps(Watchdog(step_seconds=0.2), poll_seconds=0.05) as watchdog:
    watchdog.step_done()
    time.sleep(60)
"""


def _seconds_left(watchdog: Watchdog) -> float:
    return watchdog.deadline - time.monotonic()


def test_a_process_without_progress_ends_with_its_stacks() -> None:
    done = subprocess.run([sys.executable, "-c", _HANG], capture_output=True, text=True, timeout=50, check=False)

    assert done.returncode == 31
    assert "no step finished for too long" in done.stderr
    assert 'File "<string>"' in done.stderr


def test_a_step_may_take_ten_times_the_median() -> None:
    watchdog = Watchdog(step_seconds=0.0)
    time.sleep(0.05)
    watchdog.step_done()

    assert 0.3 < _seconds_left(watchdog) < 0.9


def test_a_first_step_that_compiles_has_its_own_limit() -> None:
    watchdog = Watchdog(first_seconds=50.0, step_seconds=2.0)
    assert _seconds_left(watchdog) == pytest.approx(50, abs=1)

    watchdog.step_done()

    assert _seconds_left(watchdog) == pytest.approx(2, abs=1)


def test_a_phase_has_its_own_limit_and_takes_nothing_from_the_step() -> None:
    watchdog = Watchdog(first_seconds=5.0)
    with watchdog.phase(50.0):
        time.sleep(0.2)
        assert _seconds_left(watchdog) == pytest.approx(49.8, abs=0.1)

    assert _seconds_left(watchdog) == pytest.approx(5, abs=0.1)
