import subprocess
import sys
import time

from msn_pretrain.training.watchdog import Watchdog

_HANG = "import time; from msn_pretrain.training.watchdog import watch_steps\n"
_HANG += "with watch_steps(least_seconds=0.2, look_seconds=0.05) as watchdog: watchdog.step_done(); time.sleep(60)"


def test_a_process_without_progress_ends_with_its_stacks() -> None:
    done = subprocess.run([sys.executable, "-c", _HANG], capture_output=True, text=True, timeout=50, check=False)

    assert done.returncode == 31
    assert "no step finished for too long" in done.stderr
    assert 'File "<string>"' in done.stderr


def test_a_step_may_take_ten_times_the_median() -> None:
    watchdog = Watchdog(least_seconds=0.0)
    time.sleep(0.05)
    watchdog.step_done()

    assert -0.6 < watchdog.overdue_seconds() < -0.3


def test_a_pause_is_not_a_hang() -> None:
    watchdog = Watchdog(least_seconds=0.0)
    with watchdog.paused():
        time.sleep(0.02)
        assert watchdog.overdue_seconds() <= 0
    assert watchdog.overdue_seconds() < 0.02
