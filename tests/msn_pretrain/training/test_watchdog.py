import subprocess
import sys
import time

from msn_pretrain.training.watchdog import Watchdog

_HANG = "import time; from msn_pretrain.training.watchdog import watching\n"
_HANG += "with watching(least_seconds=0.2, look_seconds=0.05) as dog: dog.step_done(); time.sleep(60)"


def test_a_process_without_progress_ends_with_its_stacks() -> None:
    done = subprocess.run([sys.executable, "-c", _HANG], capture_output=True, text=True, timeout=50, check=False)

    assert done.returncode == 31
    assert "in watching" in done.stderr or "<string>" in done.stderr


def test_long_steps_are_waited_for_ten_times_as_long() -> None:
    dog = Watchdog(least_seconds=0.0)
    time.sleep(0.05)
    dog.step_done()

    assert -0.6 < dog.overdue_seconds() < -0.3


def test_a_pause_is_no_hang() -> None:
    dog = Watchdog(least_seconds=0.0)
    with dog.paused():
        time.sleep(0.02)
        assert dog.overdue_seconds() <= 0
    assert dog.overdue_seconds() < 0.02
